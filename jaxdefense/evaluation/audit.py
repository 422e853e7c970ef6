"""An executable honesty report: what an evaluation must survive before its numbers are believed.

Tiers of knowledge, each an accuracy per example:

    T0  oblivious     crafted on the undefended base, judged on the defence. Not white-box: its name
                      says so wherever it is printed, and no worst case counts it.
    T1  end to end    gradients through the whole defence: PGD with restarts, APGD-CE, APGD-T
    T2  BPDA          the purifier's backward pass is the identity
    T3  black box     Square, and transfer from other models

and checks, each with its evidence. A defence with its own randomness is averaged over keys (EOT).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxdefense import attacks
from jaxdefense.attacks import checks as inputs
from jaxdefense.evaluation import cascade, curves, flags, randomised, tables
from jaxdefense.evaluation.checks import check_attack
from jaxdefense.evaluation.evaluator import LEAST, Evaluator, Examples, summarize
from jaxdefense.types import Attack, HostArray, Images, Key, Labels, Logits, Predict, Threat

OBLIVIOUS = "T0 oblivious pgd (not white-box)"

# Steps towards any class at eps .5 of the box must break every classifier that can be broken.
_WIDE = 0.5


@dataclasses.dataclass(frozen=True)
class Check:
    """One question, its answer, and what the answer rests on."""

    name: str
    passed: bool
    evidence: str


@dataclasses.dataclass(frozen=True, eq=False)
class Audit:
    """What an audit found.

    Attributes:
      threat: every attack's.
      tiers: {"clean" or tier and attack: (N,) bool, classified rightly}.
      attacks: {tier and attack: the call that makes it}.
      worst: (N,) bool, right under every attack but the oblivious ones.
      checks: in a fixed order.
      curve: (eps, accuracy in percent) of PGD over a grid of eps.
      x_adv: (N, H, W, C), an adversarial image of the threat's set for each example that is not
        in `worst` and was right, else the image.
    """

    threat: Threat
    tiers: dict[str, np.ndarray]
    attacks: dict[str, str]
    worst: np.ndarray
    checks: tuple[Check, ...]
    curve: tuple[tuple[float, float], ...]
    x_adv: np.ndarray

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def markdown(self) -> str:
        """What was judged, and two tables: accuracy per tier, the checks with their evidence."""
        rows = [[name, f"{100 * right.mean():.2f}"] for name, right in self.tiers.items()]
        rows.append(["worst case per example", f"{100 * self.worst.mean():.2f}"])
        told = [[c.name, "pass" if c.passed else "FAIL", c.evidence] for c in self.checks]
        first = tables.markdown(["accuracy, %", "all"], rows)
        head = f"{len(self.worst)} images, {self.threat}"
        if not self.tiers:
            rows = [["not attacked: a check below failed", "–"]]
        return f"{head}\n\n{first}\n\n{tables.markdown(['check', 'answer', 'evidence'], told)}"

    def record(self, labels: np.ndarray, num_classes: int) -> dict[str, Any]:
        """Plain values for a record: bits and accuracies, checks, attacks, curve.

        Args:
          labels: (N,) integers.
          num_classes: K.
        """
        bits = {**self.tiers, "worst": self.worst}
        return {
            "tiers": summarize(bits, labels, num_classes),
            "checks": [{**dataclasses.asdict(c), "passed": bool(c.passed)} for c in self.checks],
            "attacks": self.attacks,
            "curve": [list(point) for point in self.curve],
        }


def _evaluator(predict: Predict, threat: Threat, batch_size: int | None) -> Evaluator:
    return Evaluator(lambda _, x: predict(x), threat, batch_size=batch_size)


def _basics(judge: Evaluator, images: np.ndarray, labels: np.ndarray) -> tuple[list[Check], bool]:
    """The checks of the forward and backward pass, and whether there is a backward pass.

    The questions are those of `flags`.
    """
    some = slice(LEAST)
    x, y = images[some], labels[some]
    found = []

    def ask(name: str, passed: bool, evidence: str) -> None:
        found.append(Check(name, passed, evidence))

    def predict(z: Images) -> Logits:
        return judge.apply((), z)

    noise = judge.measure_noise((), x)
    ask("deterministic", not noise.random, noise.evidence())
    logits = judge.logits((), x)
    beside = flags.random_points(x, judge.threat)
    answers = np.concatenate([logits, judge.logits((), beside)])
    rows = (~np.isfinite(answers)).any(-1).mean()
    ask("finite logits", rows == 0, f"{rows:.1%} of images and points beside them are not")
    sums = logits.sum(-1)
    soft = rows == 0 and logits.min() >= 0 and np.allclose(sums, 1, atol=1e-2)
    ask("logits, not probabilities", not soft, f"rows sum to {sums.min():.3g}..{sums.max():.3g}")
    ask("independent of the batch", noise.random or not noise.mixed, noise.evidence())
    loop = flags.has_loop(predict, jnp.asarray(x))
    ask(
        "no loop in the forward pass",
        not loop,
        "it iterates: attack what it optimises too" if loop else "no while or scan in its program",
    )

    eps = np.broadcast_to(np.asarray(judge.threat.eps, np.float32), len(images))[some]

    def shares(_: Any, x: Images, y: Labels, eps: Any) -> Any:
        return flags.gradient_shares(predict, x, y, judge.threat.with_eps(eps))

    try:
        twice = [np.concatenate([a, b]) for a, b in ((x, beside), (y, y), (eps, eps))]
        zero, broken, _ = judge.map_rows("gradients", shares, (), *twice).T
    except flags.NoGradients as error:
        ask("gradients are there", False, str(error))
        ask("gradients are finite", False, "there are none")
        return found, False
    ask("gradients are there", zero.mean() < 0.05, f"zero for {zero.mean():.1%} of images")
    told = f"{broken.mean():.2%} of the entries, in {(broken > 0).mean():.1%} of images, are not"
    ask("gradients are finite", bool((broken == 0).all()), told)
    return found, True


def audit(
    predict: Predict,
    images: HostArray,
    labels: HostArray | None,
    threat: Threat,
    *,
    base: Predict | None = None,
    purify: Callable[[Images], Images] | None = None,
    random: Callable[[Key, Images], Logits] | None = None,
    sources: Sequence[Predict] = (),
    extra: dict[str, Attack] | None = None,
    steps: int = 50,
    restarts: int = 5,
    stages: Sequence[str] = ("apgd-ce", "apgd-t"),
    queries: int = 5000,
    samples: int = 20,
    layout: str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
) -> Audit:
    """The honesty report of a classifier, or of a purifier in front of one.

    Args:
      predict: images (B, H, W, C) -> logits (B, K), the whole defence as it is deployed.
      images: (N, H, W, C) floats in the threat's bounds.
      labels: (N,) integers; None judges the defence against its own answers.
      threat: Linf, L2 or L1.
      base: the classifier without the defence (T0, T2).
      purify: the purifier, predict(x) = base(purify(x)) (T2).
      random: (key, images) -> logits where the defence draws at test time. Attacks and tiers then
        see the mean over `samples` draws that are fixed for each image (EOT), which is another
        model; a check says what the deployed one makes of their images over fresh draws, and
        `autoattack(random=)` judges it.
      sources: other models, to transfer from (T3).
      extra: further attacks of the threat's set by name, e.g. on the defence's own loss (T1).
      steps, restarts: of T1's PGD.
      stages: AutoAttack's that T1 holds, "fab-t" among them where there is the time.
      queries: of Square.
      samples: of EOT.
      layout: of the images, 'NHWC' or 'NCHW', see `attacks.square`.
      seed: of all attacks.
      batch_size: most examples per dispatch; default as `Evaluator`'s.
      progress: show a bar of the attacks.

    Returns:
      An `Audit`. Attacks are left out where a check shows that they would mean nothing, and those
      that need gradients where there are none; docs/flags.md says what a failed check means and
      what to do.

    Raises:
      ValueError: bad images or labels, or `purify` without `base`.
    """
    if purify is not None and base is None:
        raise ValueError("purify needs base: the classifier behind the purifier")
    if random is not None:
        predict = attacks.eot(random, jax.random.key(seed), samples=samples)
    survey = _Survey(predict, images, labels, threat, seed, batch_size, progress)
    classes = inputs.count_classes(predict, survey.images[:1])
    labels = survey.labels
    inputs.check_labels(labels, len(survey.images), classes)
    checks, gradients = _basics(survey.judge, survey.images, labels)
    if any(not check.passed and check.name in _FATAL for check in checks):
        nothing = np.zeros(len(images), bool)
        return Audit(threat, {}, {}, nothing, tuple(checks), (), survey.images.copy())

    survey.start()
    tiers, x_adv = survey.tiers, survey.x_adv
    short = attacks.pgd(threat, steps=10)
    if base is not None:
        survey.craft(OBLIVIOUS, attacks.pgd(threat, steps=steps), base, counts=False)
    if gradients:
        survey.craft("T1 pgd-10", short)
        survey.craft("T1 pgd", attacks.pgd(threat, steps=steps, restarts=restarts, best=True))
        for stage in cascade.stages(threat, classes, attacks=stages):
            survey.craft(f"T1 {stage.name}", stage.attack)
        for name, attack in (extra or {}).items():
            survey.craft(f"T1 {name}", attack)
    if purify is not None and base is not None:
        through = attacks.bpda(purify)
        survey.craft("T2 bpda pgd", attacks.pgd(threat, steps=steps), lambda x: base(through(x)))
    square = attacks.square(threat, queries=queries, layout=layout)
    survey.craft("T3 square", square)
    climb = attacks.apgd(threat, early_stop=False)
    if sources:
        survey.craft("T3 transfer", attacks.transfer(climb, sources))
    if base is not None:
        survey.craft("T3 transfer from base", attacks.transfer(climb, [base]))

    worst = np.all([b for name, b in tiers.items() if not name.startswith("T0")], axis=0)
    curve: tuple[tuple[float, float], ...] = ()
    if gradients:
        curve = survey.curve(steps)
        checks += _comparisons(tiers, curve, threat, survey.raw(short))
    if random is not None:
        checks.append(_fresh_draws(survey, random, samples, worst))
    survey.bar.close()
    return Audit(threat, tiers, survey.made, worst, tuple(checks), curve, x_adv)


# Without these an attack's result would mean nothing.
_FATAL = {
    "deterministic",
    "finite logits",
    "logits, not probabilities",
    "independent of the batch",
}


class _Survey:
    """The attacks of an audit, each judged on the deployed defence."""

    def __init__(
        self,
        predict: Predict,
        images: HostArray,
        labels: HostArray | None,
        threat: Threat,
        seed: int,
        batch_size: int | None,
        progress: bool,
    ):
        self.threat, self.seed, self.batch_size = threat, seed, batch_size
        self.judge = _evaluator(predict, threat, batch_size)
        self.images = self.judge.check_images(images)
        if labels is None:
            labels = self.judge.logits((), self.images).argmax(-1)
        self.labels = np.asarray(labels)
        self.ids = np.arange(len(self.images))
        self.tiers: dict[str, np.ndarray] = {}
        self.made: dict[str, str] = {}
        self.x_adv = self.images.astype(np.promote_types(self.images.dtype, np.float32))
        self.bar = tqdm(disable=not progress, unit="attack")

    def start(self) -> None:
        """Clean accuracy: what is wrong already is not attacked."""
        self.tiers["clean"] = self.judge.logits((), self.images).argmax(-1) == self.labels

    def craft(
        self, name: str, attack: Attack, on: Predict | None = None, *, counts: bool = True
    ) -> None:
        """Runs an attack, on another model where one is given; the defence judges its images."""
        check_attack(name, attack, self.threat, len(self.images))
        self.bar.set_postfix_str(name)
        right = self.tiers["clean"].copy()
        crafter = self.judge if on is None else _evaluator(on, self.threat, self.batch_size)
        for pack in crafter.split_rows(np.flatnonzero(right)):
            examples = Examples.of(self.images, self.labels, self.ids).take(pack)
            if on is None:
                found, wrong, *_ = crafter.attack(name, attack, (), examples, seed=self.seed)
            else:
                found, _ = crafter.craft(name, attack, (), examples, seed=self.seed)
                logits = self.judge.logits((), found.astype(self.images.dtype))
                wrong = flags.is_fooled(logits, self.labels[pack])
            right[pack[wrong]] = False
            if counts:
                self.x_adv[pack[wrong]] = found[wrong]
        self.tiers[name], self.made[name] = right, _told(attack)
        self.bar.update()

    def raw(self, attack: Attack) -> float:
        """Accuracy in percent when the attack also meets what is misclassified already."""
        name, given = "T1 pgd-10", (self.images, self.labels, self.ids)
        bits = self.judge.bits((), *given, {name: attack}, seed=self.seed, everywhere=True)
        return 100 * float(bits[name].mean())

    def curve(self, steps: int) -> tuple[tuple[float, float], ...]:
        """PGD's accuracy at shares of eps, at eps, and at eps .5 of the box's diameter."""
        self.bar.set_postfix_str("curve")
        wide = _WIDE * self.threat.diameter(self.images[0].size)
        eps = [*(share * np.max(self.threat.eps) for share in (0.0, 0.25, 0.5, 1.0, 2.0)), wide]
        eps = sorted({float(e) for e in eps if e <= wide})
        survives = curves.survival_over_eps(
            self.judge,
            (),
            self.images,
            self.labels,
            eps,
            lambda ball: attacks.pgd(ball, steps=steps),
            seed=self.seed,
        )
        return tuple(zip(eps, (100 * survives.mean(-1)).tolist(), strict=True))


def _fresh_draws(
    survey: "_Survey",
    random: Callable[[Key, Images], Logits],
    samples: int,
    worst: np.ndarray,
) -> Check:
    """Whether the tiers' verdict on the mean of draws is the deployed model's over fresh draws."""
    keyed = Evaluator(lambda _, k, x: random(k, x), survey.threat, batch_size=survey.batch_size)
    draws = randomised.Draws(keyed, (), survey.labels, survey.ids, _FRESH, survey.seed)
    clean, under = (draws.share("audit", x).mean() for x in (survey.images, survey.x_adv))
    return Check(
        "the mean's verdict holds for fresh draws",
        abs(under - worst.mean()) <= 0.05,
        f"over {_FRESH} fresh draws clean {clean:.1%}, on the worst images found {under:.1%}; the "
        f"mean of {samples} draws {worst.mean():.1%}",
    )


_FRESH = 100  # draws of each image


def _told(attack: Attack) -> str:
    """The call that makes it; what a combination closes over has no use in a record."""
    if isinstance(attack, attacks.Method):
        parts = [_told(part) for part in attack.parts]
        return f"{attack.name}({', '.join(parts)})" if parts else repr(attack)
    return getattr(attack, "__name__", type(attack).__name__)


def _comparisons(
    tiers: dict[str, np.ndarray],
    curve: tuple[tuple[float, float], ...],
    threat: Threat,
    raw: float,
) -> list[Check]:
    """What the accuracies say of each other."""
    accuracy = {name: 100 * float(right.mean()) for name, right in tiers.items()}
    white = min(v for name, v in accuracy.items() if name.startswith("T1"))
    black = {name: v for name, v in accuracy.items() if name.startswith("T3")}
    best = min(black, key=black.__getitem__)
    more = accuracy["T1 pgd-10"] - accuracy["T1 pgd"]
    robust_curve = [value for _, value in curve]
    rises = max(np.diff(robust_curve), default=0.0)
    wide_eps, wide = curve[-1]
    slack = 1.0  # percentage points of sampling noise
    return [
        Check(
            "robust accuracy is not above clean",
            raw <= accuracy["clean"],
            f"clean {accuracy['clean']:.2f} %, PGD-10 on all images {raw:.2f} %",
        ),
        Check(
            "black box does not beat white box",
            black[best] >= white - slack,
            f"{best}: {black[best]:.2f} %, best white box {white:.2f} %",
        ),
        Check(
            "more steps and restarts are not much stronger",
            more <= 10.0,
            f"10 steps {accuracy['T1 pgd-10']:.2f} %, the long attack {accuracy['T1 pgd']:.2f} %",
        ),
        Check(
            "accuracy falls with eps",
            rises <= slack,
            ", ".join(f"{e:.3g}: {v:.1f} %" for e, v in curve),
        ),
        Check(
            f"accuracy falls to 0 at eps {wide_eps:.3g}",
            wide <= slack,
            f"{wide:.2f} % at half the box's diameter in {threat.norm}",
        ),
    ]
