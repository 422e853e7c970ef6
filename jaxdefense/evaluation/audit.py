"""The audit: attacks of several kinds on a defence, and checks that its numbers can be believed.

Tiers of knowledge, each an accuracy per example:

    T0  oblivious     crafted on the undefended base, judged on the defence. Not white-box: its name
                      says so wherever it is printed, and no worst case counts it.
    T1  end to end    gradients through the whole defence: PGD with restarts, APGD-CE, APGD-T
    T2  BPDA          the purifier's backward pass is the identity
    T3  black box     Square, and transfer from other models

and checks, each with its evidence. A defence with its own randomness is averaged over keys (EOT).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from jaxdefense import attacks, validate
from jaxdefense.attacks import checks as inputs
from jaxdefense.evaluation import cascade, curves, examine, flags, randomised, tables
from jaxdefense.evaluation.checks import check_attack
from jaxdefense.evaluation.evaluator import MIN_PER_DEVICE, Evaluator, Examples, summarize
from jaxdefense.evaluation.journal import Journal
from jaxdefense.types import Attack, HostArray, Images, Key, Logits, Predict, Threat

OBLIVIOUS = "T0 oblivious pgd (not white-box)"

# Steps towards any class at eps .5 of the box must break every classifier that can be broken.
_WIDE = 0.5

_FRESH = 100  # draws of each image of a randomised model

# Without these an attack's result would mean nothing.
_FATAL = {
    "deterministic",
    "finite logits",
    "logits, not probabilities",
    "independent of the batch",
}


@dataclasses.dataclass(frozen=True)
class Check:
    """One question, its answer, and what the answer rests on.

    Attributes:
      name: what passes, e.g. "gradients are finite"; docs/flags.md says what a failure means.
      passed: the answer.
      evidence: what was seen, in words with figures.
    """

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
    x_adv: np.ndarray = dataclasses.field(repr=False)

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def markdown(self) -> str:
        """What was judged, and two tables: accuracy per tier, the checks with their evidence."""
        rows = [[name, f"{100 * right.mean():.2f}"] for name, right in self.tiers.items()]
        rows.append(["worst case per example", f"{100 * self.worst.mean():.2f}"])
        if not self.tiers:
            rows = [["not attacked: a check below failed", "–"]]
        answers = [[c.name, "pass" if c.passed else "FAIL", c.evidence] for c in self.checks]
        first = tables.markdown(["accuracy, %", "all"], rows)
        head = f"{len(self.worst)} images, {self.threat}"
        return f"{head}\n\n{first}\n\n{tables.markdown(['check', 'answer', 'evidence'], answers)}"

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
    journal: Journal | None = None,
    progress: bool = False,
) -> Audit:
    """Attacks a classifier, or a purifier in front of one, in every tier, and checks the numbers.

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
      steps: of T1's and T2's PGD, and of the curve's.
      restarts: of T1's PGD.
      stages: AutoAttack's that T1 holds, "fab-t" among them where there is the time.
      queries: of Square.
      samples: of EOT.
      layout: of the images, 'NHWC' or 'NCHW', see `attacks.square`.
      seed: of all attacks.
      batch_size: most examples per dispatch; default as `Evaluator`'s.
      journal: keeps what attacks find, for the same audit to go on with.
      progress: show a bar of the attacks.

    Returns:
      An `Audit`. Attacks are left out where a check shows that they would mean nothing, and those
      that need gradients where there are none; docs/flags.md says what a failed check means and
      what to do.

    Raises:
      ValueError: bad images or labels, or `purify` without `base`.

    >>> import numpy as np
    >>> from jaxdefense import evaluation, threat
    >>> images = np.random.default_rng(0).uniform(size=(8, 2, 2, 1)).astype("float32")
    >>> predict = lambda x: x.reshape(len(x), -1)[:, :3] - 0.5
    >>> quick = dict(steps=2, restarts=1, stages=(), queries=5)
    >>> report = evaluation.audit(predict, images, None, threat.Linf(0.9), **quick)
    >>> list(report.tiers)
    ['clean', 'T1 pgd-10', 'T1 pgd', 'T3 square']
    """
    if purify is not None and base is None:
        raise ValueError("purify needs base: the classifier behind the purifier")
    inputs.check_count("samples", samples)
    validate.check_seed("seed", seed)
    if random is not None:
        predict = attacks.eot(random, jax.random.key(seed), samples=samples)
    judge = Evaluator(lambda _, x: predict(x), threat, batch_size=batch_size, journal=journal)
    images = judge.check_images(images)
    if labels is not None:
        inputs.check_label_count(np.asarray(labels), len(images))
    classes = inputs.count_classes(predict, images[:1])
    logits = judge.logits((), images)
    labels = logits.argmax(-1) if labels is None else np.asarray(labels)
    inputs.check_labels(labels, len(images), classes)
    noise = judge.measure_noise((), images)
    answers = examine.ask(judge, (), images, labels, count=MIN_PER_DEVICE)
    checks = _basic_checks(noise, logits, answers)
    if any(not check.passed and check.name in _FATAL for check in checks):
        nothing = np.zeros(len(images), bool)
        return Audit(threat, {}, {}, nothing, tuple(checks), (), images.copy())

    found = flags.logit_flags(logits, labels) + flags.image_flags(images, threat)
    checks += [_flag_check(found, flag, question) for flag, question in _QUESTIONS.items()]
    if base is not None and purify is not None and random is None:
        behind = judge.with_model(lambda _, x: base(purify(x)))
        checks.append(_is_composed(logits, behind.logits((), images)))
    gradients = answers.gradients is not None
    plan = _Plan(
        threat=threat,
        base=base,
        purify=purify,
        sources=sources,
        extra=extra or {},
        steps=steps,
        restarts=restarts,
        stages=stages,
        queries=queries,
        layout=layout,
    )
    with tqdm(disable=not progress, unit="attack") as bar:
        survey = _Survey(judge, images, labels, seed, bar)
        for tier_attack in plan.tier_attacks(classes, gradients=gradients):
            survey.add(tier_attack)
        tiers = survey.tiers
        worst = np.all([b for name, b in tiers.items() if not name.startswith("T0")], axis=0)
        curve: tuple[tuple[float, float], ...] = ()
        if gradients:
            curve = survey.curve(steps)
            everywhere = survey.accuracy_everywhere(plan.short())
            checks += _comparisons(tiers, curve, threat, everywhere)
        if random is not None:
            checks.append(_fresh_draws(survey, random, samples, worst))
    return Audit(threat, tiers, survey.calls, worst, tuple(checks), curve, survey.x_adv)


def _basic_checks(noise: flags.Noise, logits: np.ndarray, answers: examine.Answers) -> list[Check]:
    """The checks of the model itself, before any attack.

    Args:
      noise: of `Evaluator.measure_noise`.
      logits: (N, K), clean.
      answers: of `examine.ask` about the first of the images.
    """
    rows = (~np.isfinite(np.concatenate([logits, answers.nearby]))).any(-1).mean()
    sums = logits.sum(-1)
    soft = rows == 0 and logits.min() >= 0 and np.allclose(sums, 1, atol=1e-2)
    alone = noise.random or not noise.depends_on_batch  # noise has failed a check of its own
    loop = "it iterates: attack what it optimises too"
    return [
        Check("deterministic", not noise.random, noise.evidence()),
        Check("finite logits", rows == 0, f"{rows:.1%} of images and points beside them are not"),
        Check(
            "logits, not probabilities",
            not soft,
            f"rows sum to {sums.min():.3g}..{sums.max():.3g}",
        ),
        Check("independent of the batch", alone, noise.evidence()),
        Check(
            "no loop in the forward pass",
            not answers.loop,
            loop if answers.loop else "no while or scan in its program",
        ),
        *_gradient_checks(answers),
    ]


def _gradient_checks(answers: examine.Answers) -> list[Check]:
    """The checks of the model's gradients."""
    if answers.gradients is None:
        return [
            Check("gradients are there", False, answers.why_no_gradients),
            Check("gradients are finite", False, "there are none"),
        ]
    zero, broken, lower = answers.gradients.T
    return [
        Check(
            "gradients are there",
            zero.mean() < flags.TOO_MANY_ZERO,
            f"zero for {zero.mean():.1%} of images",
        ),
        Check(
            "gradients are finite",
            bool((broken == 0).all()),
            f"{broken.mean():.2%} of the entries, in {(broken > 0).mean():.1%} of images, are not",
        ),
        Check(
            "gradients lead uphill",
            bool(lower.mean() <= flags.TOO_MANY_DOWNHILL),
            f"a small step along it lowers the loss of {lower.mean():.1%} of images",
        ),
    ]


# What these flags of `evaluation.autoattack` are called as questions.
_QUESTIONS = {
    "ties": "one logit is the largest",
    "one class": "more than one class is answered",
    "no better than chance": "better than chance",
    "another scale": "images and eps have the bounds' scale",
    "copies": "images are different",
}


def _flag_check(found: Sequence[flags.Flag], flag: str, question: str) -> Check:
    """A flag as a check, which fails where the flag was raised."""
    evidence = [one.evidence for one in found if one.name == flag]
    return Check(question, not evidence, "; ".join(evidence) or f"no flag '{flag}'")


def _is_composed(logits: np.ndarray, behind: np.ndarray) -> Check:
    """Whether the purifier and the classifier behind it are the defence.

    Args:
      logits: (N, K) of the defence.
      behind: (N, K) of `base(purify(images))`.
    """
    far = np.median(np.abs(logits - behind).max(-1)) / max(logits.std(), np.finfo("f4").tiny)
    evidence = f"of the logits' spread, they differ by {far:.2g} for half of the images"
    return Check("predict is base(purify)", bool(far <= 0.01), evidence)


class _TierAttack(NamedTuple):
    """One attack of an audit.

    Attributes:
      name: its tier and name.
      attack: of the audit's threat.
      model: the one that it is made on; None for the defence itself.
      counts: whether its images may be the report's adversarial ones.
    """

    name: str
    attack: Attack
    model: Predict | None = None
    counts: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Plan:
    """The attacks of an audit; the attributes are the arguments of `audit`."""

    threat: Threat
    base: Predict | None
    purify: Callable[[Images], Images] | None
    sources: Sequence[Predict]
    extra: Mapping[str, Attack]
    steps: int
    restarts: int
    stages: Sequence[str]
    queries: int
    layout: str | None

    def tier_attacks(self, num_classes: int, *, gradients: bool) -> list[_TierAttack]:
        """All attacks, in order.

        Args:
          num_classes: K.
          gradients: whether the defence has gradients; without, T1 is left out.
        """
        result = []
        if self.base is not None:
            result.append(_TierAttack(OBLIVIOUS, self._pgd(), self.base, counts=False))
        if gradients:
            result += self._white_box(num_classes)
        if self.purify is not None and self.base is not None:
            base, through = self.base, attacks.bpda(self.purify)
            result.append(_TierAttack("T2 bpda pgd", self._pgd(), lambda x: base(through(x))))
        return result + self._black_box()

    def short(self) -> _TierAttack:
        """A PGD of ten steps, which longer attacks are compared with."""
        return _TierAttack("T1 pgd-10", attacks.pgd(self.threat, steps=10))

    def _pgd(self) -> Attack:
        return attacks.pgd(self.threat, steps=self.steps)

    def _white_box(self, num_classes: int) -> list[_TierAttack]:
        long = attacks.pgd(self.threat, steps=self.steps, restarts=self.restarts, best=True)
        stages = cascade.stages(self.threat, num_classes, attacks=self.stages)
        return [
            self.short(),
            _TierAttack("T1 pgd", long),
            *(_TierAttack(f"T1 {stage.name}", stage.attack) for stage in stages),
            *(_TierAttack(f"T1 {name}", attack) for name, attack in self.extra.items()),
        ]

    def _black_box(self) -> list[_TierAttack]:
        square = attacks.square(self.threat, queries=self.queries, layout=self.layout)
        apgd = attacks.apgd(self.threat, early_stop=False)
        result = [_TierAttack("T3 square", square)]
        if self.sources:
            result.append(_TierAttack("T3 transfer", attacks.transfer(apgd, self.sources)))
        if self.base is not None:
            result.append(_TierAttack("T3 transfer from base", attacks.transfer(apgd, [self.base])))
        return result


class _Survey:
    """Attacks made one after another, each judged on the deployed defence.

    Args:
      judge: of the defence.
      images: (N, H, W, C) of `Evaluator.check_images`.
      labels: (N,) integers.
      seed: of all attacks.
      bar: shows which attack runs.
    """

    def __init__(
        self, judge: Evaluator, images: np.ndarray, labels: np.ndarray, seed: int, bar: tqdm
    ):
        self.judge, self.seed, self.bar = judge, seed, bar
        self.examples = Examples.of(images, labels, np.arange(len(images)))
        self.tiers = {"clean": judge.logits((), images).argmax(-1) == labels}
        self.calls: dict[str, str] = {}
        self.x_adv = images.astype(np.promote_types(images.dtype, np.float32))

    def add(self, tier_attack: _TierAttack) -> None:
        """Attacks the examples that are right without an attack; the defence judges its images.

        Args:
          tier_attack: of the plan.
        """
        name, attack, model, counts = tier_attack
        check_attack(name, attack, self.judge.threat, len(self.examples))
        self.bar.set_postfix_str(name)
        right = self.tiers["clean"].copy()
        crafter = self.judge if model is None else self.judge.with_model(lambda _, x: model(x))
        for pack in crafter.split_rows(np.flatnonzero(right)):
            examples = self.examples.take(pack)
            if model is None:
                x_adv, wrong, *_ = crafter.attack(name, attack, (), examples, seed=self.seed)
            else:
                x_adv, _ = crafter.craft(name, attack, (), examples, seed=self.seed)
                logits = self.judge.logits((), x_adv.astype(examples.images.dtype))
                wrong = flags.is_fooled(logits, examples.labels)
            right[pack[wrong]] = False
            if counts:
                self.x_adv[pack[wrong]] = x_adv[wrong]
        self.tiers[name], self.calls[name] = right, _call_of(attack)
        self.bar.update()

    def accuracy_everywhere(self, tier_attack: _TierAttack) -> float:
        """Accuracy in percent when the attack also gets what is misclassified already.

        Args:
          tier_attack: of the plan.
        """
        bits = self.judge.bits(
            (),
            self.examples.images,
            self.examples.labels,
            self.examples.ids,
            {tier_attack.name: tier_attack.attack},
            seed=self.seed,
            everywhere=True,
        )
        return 100 * float(bits[tier_attack.name].mean())

    def curve(self, steps: int) -> tuple[tuple[float, float], ...]:
        """(eps, PGD's accuracy in percent) from 0 to eps .5 of the box's diameter.

        Args:
          steps: of PGD.
        """
        self.bar.set_postfix_str("curve")
        threat, images = self.judge.threat, self.examples.images
        wide = _WIDE * threat.diameter(images[0].size)
        eps = [*(share * np.max(threat.eps) for share in (0.0, 0.25, 0.5, 1.0, 2.0)), wide]
        eps = sorted({float(e) for e in eps if e <= wide})
        survives = curves.survival_over_eps(
            self.judge,
            (),
            images,
            self.examples.labels,
            eps,
            lambda ball: attacks.pgd(ball, steps=steps),
            seed=self.seed,
        )
        return tuple(zip(eps, (100 * survives.mean(-1)).tolist(), strict=True))


def _fresh_draws(
    survey: _Survey, random: Callable[[Key, Images], Logits], samples: int, worst: np.ndarray
) -> Check:
    """Whether the tiers' verdict on the mean of draws is the deployed model's over fresh draws."""
    keyed = survey.judge.with_model(lambda _, key, x: random(key, x))
    examples = survey.examples
    draws = randomised.Draws(keyed, (), examples.labels, examples.ids, _FRESH, survey.seed)
    clean, under = (draws.share("audit", x).mean() for x in (examples.images, survey.x_adv))
    return Check(
        "the mean's verdict holds for fresh draws",
        bool(abs(under - worst.mean()) <= 0.05),
        f"over {_FRESH} fresh draws clean {clean:.1%}, on the worst images found {under:.1%}; the "
        f"mean of {samples} draws {worst.mean():.1%}",
    )


def _call_of(attack: Attack) -> str:
    """The call that makes an attack; of a combination, its parts alone."""
    if isinstance(attack, attacks.Method):
        parts = [_call_of(part) for part in attack.parts]
        return f"{attack.name}({', '.join(parts)})" if parts else repr(attack)
    return getattr(attack, "__name__", type(attack).__name__)


def _comparisons(
    tiers: dict[str, np.ndarray],
    curve: tuple[tuple[float, float], ...],
    threat: Threat,
    everywhere: float,
) -> list[Check]:
    """The checks that compare the attacks' accuracies.

    Args:
      tiers: {tier and attack: (N,) bool}.
      curve: (eps, accuracy in percent), the largest eps last.
      threat: of the attacks.
      everywhere: percent, of `_Survey.accuracy_everywhere`.
    """
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
            everywhere <= accuracy["clean"],
            f"clean {accuracy['clean']:.2f} %, PGD-10 on all images {everywhere:.2f} %",
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
