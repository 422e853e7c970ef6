"""Several attacks as one: the worst case per example, and AutoAttack."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdefense import registry
from jaxdefense.attacks import checks
from jaxdefense.attacks.apgd import RANKED, apgd, apgd_targeted
from jaxdefense.attacks.apgd import passes as apgd_passes
from jaxdefense.attacks.fab import fab, fab_targeted
from jaxdefense.attacks.fab import passes as fab_passes
from jaxdefense.attacks.method import attack_factory, takes_targets
from jaxdefense.attacks.outcome import Passes, fooled, select_rows
from jaxdefense.attacks.square import passes as square_passes
from jaxdefense.attacks.square import square
from jaxdefense.types import Attack, Images, Key, Labels, Predict, Threat, example_keys, fold_in


@attack_factory(flatten_images=False)
def worst_case(*attacks: Attack) -> Attack:
    """Several attacks one after another: per example the first success, else the last image.

    Where an earlier attack succeeded, the later ones get its adversarial image, which they leave
    alone if they stop early; once the whole batch is fooled they are skipped.

    Args:
      *attacks: in their order; each draws from `fold_in(key, its number)`.

    Returns:
      An `Attack`; the image itself where it is misclassified. It takes targets where its attacks
      do.

    Raises:
      ValueError: no attacks, something else, or some that take labels beside some that take
        targets.

    >>> import jax
    >>> from jaxdefense import attacks, threat
    >>> ball = threat.Linf(0.125)
    >>> attack = attacks.worst_case(attacks.fgsm(ball), attacks.pgd(ball, restarts=3))
    >>> x, labels = jax.numpy.array([[0.625, 0.5, 0.25]]), jax.numpy.array([0])
    >>> attacks.fooled(10 * attack(lambda x: 10 * x, jax.random.key(0), x, labels), labels)
    Array([ True], dtype=bool)
    """
    if not attacks:
        raise ValueError("worst_case needs at least one attack")
    for one in attacks:
        if not callable(one):
            raise ValueError(f"worst_case takes attacks one after another, got {one!r}")
    kinds = {takes_targets(one) for one in attacks}
    if len(kinds) > 1:
        raise ValueError(f"worst_case of attacks on labels and on targets: {attacks}")
    targeted = kinds.pop()

    def attack(predict: Predict, key: Key, images: Images, labels: Labels) -> Images:
        x = jax.lax.stop_gradient(images)
        keys = example_keys(key, x.shape[0])
        done, x_adv = fooled(predict(x), labels, targeted), x
        for n, one in enumerate(attacks):

            def run(x_adv, done, one=one, n=n):
                found = one(predict, fold_in(keys, n), select_rows(done, x_adv, x), labels)
                found = select_rows(done, x_adv, found)
                return found, done | fooled(predict(found), labels, targeted)

            x_adv, done = jax.lax.cond(jnp.all(done), lambda *kept: kept, run, x_adv, done)
        return x_adv

    return attack


class Stage(NamedTuple):
    """One attack of a cascade, and the most passes it spends on an example.

    Attributes:
      name: of the stage, part of its random keys.
      attack: any `Attack` of the evaluation's threat.
      forward: passes through the model.
      backward: gradients of the model.
      note: what few classes changed, "" for nothing.

    >>> from jaxdefense import attacks, threat
    >>> from jaxdefense.attacks.ensemble import Stage
    >>> pgd = attacks.pgd(threat.Linf(8 / 255), steps=40)
    >>> Stage("pgd-40", pgd, forward=40, backward=40).passes
    Passes(forward=40, backward=40)
    """

    name: str
    attack: Attack
    forward: int
    backward: int
    note: str = ""

    @property
    def passes(self) -> Passes:
        """Forward and backward."""
        return Passes(self.forward, self.backward)


class _StageMaker(NamedTuple):
    """Makes the stages for a threat and a number of classes, with fallbacks for few classes."""

    threat: Threat
    classes: int
    layout: str | None  # of the images, for Square
    samples: int | None  # draws a step of a randomised model

    def apgd(self, name: str, loss: str, **options: Any) -> Stage:
        note = ""
        if loss == "dlr" and self.classes < 3:
            note = f"{name}: the margin replaces the DLR loss, which needs 3 classes"
            loss = "margin"
        attack = apgd(self.threat, loss=loss, samples=self.samples, **options)
        options.pop("targeted", None)
        passes = apgd_passes(samples=self.samples, **options)
        return Stage(name, attack, *passes, note)

    def apgd_targeted(self, targets: int, rank: str = "logit", **options: Any) -> Stage:
        notes, loss, tried = [], "dlr_targeted", min(targets, self.classes - 1)
        if self.classes < 4:
            loss = "difference"
            notes.append(
                "the logits' difference replaces the targeted DLR loss, which needs 4 classes"
            )
        if tried < targets:
            notes.append(f"{tried} of {targets} targets exist")
        note = f"apgd-t: {', '.join(notes)}" if notes else ""
        attack = apgd_targeted(self.threat, targets=tried, loss=loss, rank=rank, **options)
        ranked = min(self.classes - 1, RANKED) if rank == "distance" else 0
        passes = apgd_passes(targets=tried, ranked=ranked, **options)
        return Stage("apgd-t", attack, *passes, note)

    def fab_targeted(self, targets: int) -> Stage:
        tried = min(targets, self.classes - 1)
        note = f"fab-t: {tried} of {targets} targets exist" if tried < targets else ""
        attack = fab_targeted(self.threat, targets=tried)
        return Stage("fab-t", attack, *fab_passes(targets=tried), note)

    def fab(self, **options: Any) -> Stage:
        attack = fab(self.threat, **options)
        classes = None if options.pop("targeted", False) else self.classes
        return Stage("fab", attack, *fab_passes(num_classes=classes, **options))

    def square(self, queries: int = 5000, **options: Any) -> Stage:
        attack = square(
            self.threat, queries=queries, samples=self.samples, layout=self.layout, **options
        )
        return Stage("square", attack, *square_passes(queries=queries, samples=self.samples))


# The reference's settings that depend on the norm: L1 has its multi-eps schedule, more restarts
# and fewer targets.
_STANDARD: dict[str, dict[str, Any]] = {
    "linf": dict(restarts=1, targets=9, warm_eps=False),
    "l2": dict(restarts=1, targets=9, warm_eps=False),
    "l1": dict(restarts=5, targets=5, warm_eps=True),
}


def _standard(make: _StageMaker) -> list[Stage]:
    own = _STANDARD[make.threat.norm]
    warm_eps = own["warm_eps"]
    return [
        make.apgd("apgd-ce", "cross_entropy", restarts=own["restarts"], warm_eps=warm_eps),
        make.apgd_targeted(own["targets"], warm_eps=warm_eps),
        make.fab_targeted(9),
        make.square(),
    ]


def _fast(make: _StageMaker) -> list[Stage]:
    """Two gradient attacks, then Square with the passes left of a quarter of standard's."""
    warm_eps = _STANDARD[make.threat.norm]["warm_eps"]
    found = [
        make.apgd("apgd-pm", "probability_margin", warm_eps=warm_eps),
        make.apgd_targeted(3, rank="distance", warm_eps=warm_eps),
    ]
    standard, spent = (sum(sum(s.passes) for s in some) for some in (_standard(make), found))
    queries = min(1500, standard // 4 - spent - square_passes(queries=0).forward)
    return [*found, make.square(queries=max(queries, 1), rescale=True)]


def _plus(make: _StageMaker) -> list[Stage]:
    return [
        make.apgd("apgd-ce", "cross_entropy", restarts=5),
        make.apgd("apgd-dlr", "dlr", restarts=5),
        make.fab(restarts=5),
        make.square(),
        make.apgd_targeted(9),
        make.fab_targeted(9),
    ]


def _rand(make: _StageMaker) -> list[Stage]:
    found = [make.apgd("apgd-ce", "cross_entropy"), make.apgd("apgd-dlr", "dlr")]
    # A query costs 2 passes a draw: with 20 draws 5,000 queries would be 200,000 passes an image.
    return found if make.samples is None else [*found, make.square(queries=1000, rescale=True)]


def _targeted(make: _StageMaker) -> list[Stage]:
    return [
        make.apgd("apgd-ce", "cross_entropy", targeted=True),
        make.apgd("apgd-dlr", "dlr", targeted=True),
        make.fab(targeted=True),
        make.square(targeted=True),
    ]


_VERSIONS: dict[str, Callable[[_StageMaker], list[Stage]]] = {
    "standard": _standard,
    "fast": _fast,
    "plus": _plus,
    "rand": _rand,
    "targeted": _targeted,
}


def _check_version(version: str) -> None:
    if version not in _VERSIONS:
        registry.raise_unknown("AutoAttack version", version, _VERSIONS)


def stages(
    threat: Threat,
    version: str = "standard",
    num_classes: int = 10,
    *,
    layout: str | None = None,
    samples: int | None = None,
) -> list[Stage]:
    """AutoAttack's attacks in their order; a cascade runs each on the survivors of those before.

    Args:
      threat: norm, eps, bounds.
      version: see `autoattack`.
      num_classes: K; with few, a stage's note says what replaces what.
      layout: of the images, see `square`.
      samples: for 'rand': the stages take a randomised model, predict(key, images), and Square is
        among them; None gives those for a `predict` made by `eot`.

    Returns:
      `Stage`s, with the passes that each spends on an example that it does not fool.

    Raises:
      ValueError: unknown version or layout, samples for another version, or fewer than 2 classes.

    >>> from jaxdefense import threat
    >>> from jaxdefense.attacks.ensemble import stages
    >>> [(stage.name, *stage.passes) for stage in stages(threat.Linf(8 / 255))]
    [('apgd-ce', 102, 101), ('apgd-t', 910, 909), ('fab-t', 1806, 900), ('square', 5002, 0)]
    """
    _check_version(version)
    checks.check_count("num_classes", num_classes, least=2)
    if samples is not None and version != "rand":
        raise ValueError(f"a randomised model is judged by version='rand', got {version!r}")
    return _VERSIONS[version](_StageMaker(threat, num_classes, layout, samples))


@attack_factory(flatten_images=False)
def autoattack(threat: Threat, *, version: str = "standard", layout: str | None = None) -> Attack:
    """AutoAttack as one pure attack: the stages one after another, per example the first success.

    standard: APGD-CE (100 steps), APGD-T (9 targets x 100), FAB-T (9 x 100), Square (5000);
      in L1 APGD-CE has 5 restarts, APGD-T 5 targets, and both `warm_eps`.
    plus: APGD-CE and APGD-DLR (5 restarts x 100), FAB (5 x 100), Square, APGD-T, FAB-T.
    rand: APGD-CE and APGD-DLR (100 steps), for a `predict` that averages: `eot`, 20 samples.
    fast: APGD on the probability margin, APGD-T on the 3 nearest of the linearised boundaries,
      Square (1,500 at most, schedule stretched): a quarter of standard's passes at most.
    targeted: APGD-CE, APGD-DLR, FAB, Square; labels are targets to be reached.

    An evaluation of many images should run `stages` one by one on the survivors instead: inside
    one program a batch is as slow as its most robust example.

    Args:
      threat: norm, eps, bounds.
      version: 'standard', 'fast', 'plus', 'rand' or 'targeted'.
      layout: of the images, see `square`.

    Returns:
      An `Attack`: the first fooling point, else the last stage's image. Fallbacks for few classes
      are those of `stages`, whose notes name them.

    Raises:
      ValueError: unknown version; at the call, bad images, labels or keys.

    Reference: Croce, Hein, Reliable evaluation of adversarial robustness with an ensemble of
      diverse parameter-free attacks, arXiv 2003.01690; 'fast' after MALT (arXiv 2407.02240) and
      PMA (arXiv 2411.15210).

    >>> import jax
    >>> from jaxdefense import attacks, threat
    >>> attack = attacks.autoattack(threat.Linf(0.125), version="fast")
    >>> x, labels = jax.numpy.array([[0.625, 0.5, 0.25]]), jax.numpy.array([0])
    >>> x_adv = attack(lambda x: 10 * x, jax.random.key(0), x, labels)
    >>> attacks.fooled(10 * x_adv, labels)
    Array([ True], dtype=bool)
    """
    _check_version(version)

    def attack(predict: Predict, key: Key, images: Images, labels: Labels) -> Images:
        classes = checks.count_classes(predict, images)
        attacks = [stage.attack for stage in stages(threat, version, classes, layout=layout)]
        return worst_case(*attacks)(predict, key, images, labels)

    return attack
