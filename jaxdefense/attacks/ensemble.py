"""Several attacks as one: the worst case per example, and AutoAttack."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdefense import registry
from jaxdefense.attacks import checks
from jaxdefense.attacks.apgd import apgd, apgd_targeted
from jaxdefense.attacks.apgd import passes as apgd_passes
from jaxdefense.attacks.fab import fab, fab_targeted
from jaxdefense.attacks.fab import passes as fab_passes
from jaxdefense.attacks.outcome import Passes, fooled, pick
from jaxdefense.attacks.square import passes as square_passes
from jaxdefense.attacks.square import square
from jaxdefense.types import Attack, Images, Key, Labels, Predict, Threat, example_keys, fold_in


def worst_case(*attacks: Attack) -> Attack:
    """Per example, the first attack's success wins; without one, the last attack's image.

    An attack starts from the adversarial image where an earlier one succeeded, so an attack that
    leaves misclassified images alone (all of this library's that stop early do) spends nothing
    there, and an attack is skipped once the whole batch is fooled.

    Args:
      attacks: in their order; each draws from `fold_in(key, its number)`.

    Returns:
      An `Attack`; the image itself where it is misclassified.

    Raises:
      ValueError: no attacks.
    """
    if not attacks:
        raise ValueError("worst_case needs at least one attack")

    def attack(predict: Predict, key: Key, images: Images, labels: Labels) -> Images:
        x = jax.lax.stop_gradient(images)
        keys = example_keys(key, x.shape[0])
        done, x_adv = fooled(predict(x), labels), x
        for n, one in enumerate(attacks):

            def run(x_adv, done, one=one, n=n):
                found = one(predict, fold_in(keys, n), pick(done, x_adv, x), labels)
                found = pick(done, x_adv, found)
                return found, done | fooled(predict(found), labels)

            x_adv, done = jax.lax.cond(jnp.all(done), lambda *kept: kept, run, x_adv, done)
        return x_adv

    return attack


class _Stage(NamedTuple):
    name: str
    attack: Attack
    passes: Passes
    note: str = ""  # what few classes changed


def _stage_apgd(name: str, loss: str, threat: Threat, classes: int, **options: Any) -> _Stage:
    note = ""
    if loss == "dlr" and classes < 3:
        loss, note = "margin", f"{name}: the margin replaces the DLR loss, which needs 3 classes"
    return _Stage(name, apgd(threat, loss=loss, **options), apgd_passes(**options), note)


def _stage_apgd_targeted(threat: Threat, classes: int, targets: int, **options: Any) -> _Stage:
    notes, loss, tried = [], "dlr_targeted", min(targets, classes - 1)
    if classes < 4:
        loss = "difference"
        notes.append("the logits' difference replaces the targeted DLR loss, which needs 4 classes")
    if tried < targets:
        notes.append(f"{tried} of {targets} targets exist")
    note = f"apgd-t: {', '.join(notes)}" if notes else ""
    attack = apgd_targeted(threat, targets=tried, loss=loss, **options)
    return _Stage("apgd-t", attack, apgd_passes(targets=tried, **options), note)


def _stage_fab_targeted(threat: Threat, classes: int, targets: int) -> _Stage:
    tried = min(targets, classes - 1)
    note = f"fab-t: {tried} of {targets} targets exist" if tried < targets else ""
    return _Stage("fab-t", fab_targeted(threat, targets=tried), fab_passes(targets=tried), note)


def _stage_fab(threat: Threat, classes: int) -> _Stage:
    attack = fab(threat, restarts=5)
    return _Stage("fab", attack, fab_passes(restarts=5, num_classes=classes))


# The reference's settings that depend on the norm: L1 has its multi-eps schedule, more restarts
# and fewer targets.
_STANDARD: dict[str, dict[str, Any]] = {
    "linf": dict(restarts=1, targets=9, warm_eps=False),
    "l2": dict(restarts=1, targets=9, warm_eps=False),
    "l1": dict(restarts=5, targets=5, warm_eps=True),
}


def _standard(threat: Threat, classes: int) -> list[_Stage]:
    own = _STANDARD[threat.norm]
    restarts, targets, warm_eps = own["restarts"], own["targets"], own["warm_eps"]
    return [
        _stage_apgd(
            "apgd-ce", "cross_entropy", threat, classes, restarts=restarts, warm_eps=warm_eps
        ),
        _stage_apgd_targeted(threat, classes, targets, warm_eps=warm_eps),
        _stage_fab_targeted(threat, classes, 9),
        _Stage("square", square(threat), square_passes()),
    ]


def _plus(threat: Threat, classes: int) -> list[_Stage]:
    return [
        _stage_apgd("apgd-ce", "cross_entropy", threat, classes, restarts=5),
        _stage_apgd("apgd-dlr", "dlr", threat, classes, restarts=5),
        _stage_fab(threat, classes),
        _Stage("square", square(threat), square_passes()),
        _stage_apgd_targeted(threat, classes, 9),
        _stage_fab_targeted(threat, classes, 9),
    ]


def _rand(threat: Threat, classes: int) -> list[_Stage]:
    return [
        _stage_apgd("apgd-ce", "cross_entropy", threat, classes),
        _stage_apgd("apgd-dlr", "dlr", threat, classes),
    ]


_PLANS: dict[str, Callable[[Threat, int], list[_Stage]]] = {
    "standard": _standard,
    "plus": _plus,
    "rand": _rand,
}


def _plan(threat: Threat, version: str, num_classes: int) -> list[_Stage]:
    if version not in _PLANS:
        registry.unknown("AutoAttack version", version, _PLANS)
    checks.check_count("num_classes", num_classes, least=2)
    return _PLANS[version](threat, num_classes)


def stages(
    threat: Threat, version: str = "standard", num_classes: int = 10
) -> list[tuple[str, Attack]]:
    """AutoAttack's attacks by name, in order: a cascade runs each on the survivors of the last.

    Args:
      threat: norm, eps, bounds.
      version: 'standard' (APGD-CE, APGD-T, FAB-T, Square), 'plus' (APGD-CE and APGD-DLR with 5
        restarts, FAB with 5, Square, APGD-T, FAB-T) or 'rand' (APGD-CE, APGD-DLR; give it a
        `predict` made by `eot`).
      num_classes: K; with few, `notes` says what replaces what.

    Raises:
      ValueError: unknown version, or fewer than 2 classes.
    """
    return [(stage.name, stage.attack) for stage in _plan(threat, version, num_classes)]


def budgets(threat: Threat, version: str = "standard", num_classes: int = 10) -> dict[str, Passes]:
    """The most passes that each of `stages` spends on an example that it does not fool."""
    return {stage.name: stage.passes for stage in _plan(threat, version, num_classes)}


def notes(threat: Threat, version: str = "standard", num_classes: int = 10) -> list[str]:
    """What few classes changed in `stages`, a line each; empty from 10 classes up."""
    return [stage.note for stage in _plan(threat, version, num_classes) if stage.note]


def autoattack(threat: Threat, *, version: str = "standard") -> Attack:
    """AutoAttack as one pure attack: the stages one after another, per example the first success.

    standard: APGD-CE (100 steps), APGD-T (9 targets x 100), FAB-T (9 x 100), Square (5000);
      in L1 APGD-CE has 5 restarts, APGD-T 5 targets, and both `warm_eps`.
    plus: APGD-CE and APGD-DLR (5 restarts x 100), FAB (5 x 100), Square, APGD-T, FAB-T.
    rand: APGD-CE and APGD-DLR (100 steps), for a `predict` that averages: `eot`, 20 samples.

    An evaluation of many images should run `stages` one by one on the survivors instead: inside
    one program a batch is as slow as its most robust example.

    Args:
      threat: norm, eps, bounds.
      version: 'standard', 'plus' or 'rand'.

    Returns:
      An `Attack`: the first fooling point, else the last stage's image. Fallbacks for few classes
      are those of `stages`; `notes` names them.

    Raises:
      ValueError: unknown version; at the call, bad images, labels or keys.

    Reference: Croce, Hein, Reliable evaluation of adversarial robustness with an ensemble of
      diverse parameter-free attacks, arXiv 2003.01690.
    """
    if version not in _PLANS:
        registry.unknown("AutoAttack version", version, _PLANS)

    def attack(predict: Predict, key: Key, images: Images, labels: Labels) -> Images:
        classes = checks.num_classes(predict, images)
        attacks = [one for _, one in stages(threat, version, classes)]
        return worst_case(*attacks)(predict, key, images, labels)

    return checks.checked(attack, threat, "autoattack", spatial=True)
