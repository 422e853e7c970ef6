"""Whether training went wrong in a way that its accuracies hide: warnings from its validations.

A single-step attack in training can teach the network to fool that attack alone (catastrophic
overfitting): its images are classified rightly ever more often, and those of a longer attack no
more. Or the network answers one class, and its robust accuracy is then its clean one. `Watch` sees
each validation of a run's last phase, with the metrics of the steps before it, and says so.
docs/flags.md tells what each warning means and what to do.

Reference: Wong et al., Fast is better than free, arXiv 2001.03994, where catastrophic overfitting
  is described. The limits below are this library's own.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdefense.types import HostArray

OVERFITTING = "catastrophic overfitting"
ONE_CLASS = "one class"
ROBUST_ABOVE_CLEAN = "robust above clean"
CHANCE = "no better than chance"
NO_ROBUSTNESS = "no robust accuracy"

# What to do, in one line; docs/flags.md has more.
ADVICE = {
    OVERFITTING: (
        "give the attack in training more steps, a smaller step size or a ramp of eps, or stop "
        "where validation was best"
    ),
    ONE_CLASS: "lower the learning rate, warm it up, or let eps grow from 0 (ramp_epochs)",
    ROBUST_ABOVE_CLEAN: "give the attack in training more steps, or a random start",
    CHANCE: "train longer, lower the learning rate, or let eps grow from 0 (ramp_epochs)",
    NO_ROBUSTNESS: "train longer, let eps grow from 0 (ramp_epochs), or defend a smaller eps",
}
NAMES = tuple(ADVICE)

_MOSTLY = 0.9  # share from which nearly all answers are of one class


@dataclasses.dataclass(frozen=True)
class Validation:
    """A validation, with what training's own metrics said just before it; accuracies in percent.

    Attributes:
      step: of the run.
      epoch: of the run.
      clean: accuracy on the validation images.
      robust: under the config's validation attack.
      one_class: the class that nearly all images are given, None where there is none.
      crafted: training's accuracy on the images that it crafts, None where no metric tells.
      plain: training's accuracy on its clean images, None where no metric tells.
    """

    step: int
    epoch: float
    clean: float
    robust: float
    one_class: int | None = None
    crafted: float | None = None
    plain: float | None = None


@dataclasses.dataclass(frozen=True)
class Warned:
    """A warning.

    Attributes:
      step: of the validation.
      epoch: likewise.
      name: one of `NAMES`, the same for the same reason.
      evidence: what was seen, in words with figures.
    """

    step: int
    epoch: float
    name: str
    evidence: str

    def __str__(self) -> str:
        return f"warning: {self.name}: {self.evidence}; {ADVICE[self.name]}"


def constant_answer(right: HostArray, labels: HostArray) -> int | None:
    """The class that nearly all images are given, as far as right answers show it.

    A model that answers one class is right on that class alone, and on nearly all of it.

    Args:
      right: (N,) bool, whether the answer is right.
      labels: (N,) integers.

    Returns:
      The class, or None where there is none, or all labels are of one class.

    >>> import numpy as np
    >>> from jaxdefense.train import collapse
    >>> labels = np.array([0, 1, 2, 0, 1, 2])
    >>> collapse.constant_answer(labels == 1, labels)
    1
    """
    right, labels = np.asarray(right), np.asarray(labels)
    counts = np.bincount(labels)
    if not right.any() or (counts > 0).sum() < 2:
        return None
    hits = np.bincount(labels[right], minlength=len(counts))
    top = int(hits.argmax())
    mostly = hits[top] >= _MOSTLY * hits.sum() and hits[top] >= _MOSTLY * counts[top]
    return top if mostly else None


def training_accuracies(metrics: Mapping[str, float]) -> dict[str, float]:
    """What a step's metrics say of crafted and of clean images, percent.

    Args:
      metrics: means in [0, 1] by name; one of several updates has a prefix.

    Returns:
      Of "crafted" and "plain" those that a metric tells, with `Validation`'s meaning.
    """
    found = {}
    for name, value in metrics.items():
        short = name.partition("_")[2] if name.startswith("update") else name
        if short == "robust_accuracy":
            found["crafted"] = 100 * value
        elif short == "accuracy":
            found["plain"] = 100 * value
    return found


def _noise(percent: float, n: int) -> float:
    """Three standard errors of an accuracy of n images, in points."""
    share = percent / 100
    return 300 * math.sqrt(max(share * (1 - share), 1 / n) / n)


def _exceeds_chance(percent: float, chance: float, n: int) -> bool:
    return percent > chance + _noise(chance, n)


def find_warnings(
    history: Sequence[Validation], *, n: int, num_classes: int, is_end: bool
) -> list[Warned]:
    """The warnings of the newest validation.

    Early in training everything is at chance, and that is no collapse: a model at chance, or one
    that answers one class, is told where an earlier one was better, or at the run's end. A fall of
    robust accuracy is one from the best validation of the last epoch, or from the one before, where
    that was above chance by more than noise (three standard errors) and clean accuracy stays. At
    the end the attack in training also tells: if nearly all of its images are classified rightly
    and those of the validation attack no better than by guessing, it was fooled from the start.

    Args:
      history: of the run's last phase, oldest first, the newest last.
      n: validation images.
      num_classes: K.
      is_end: whether the newest is the run's last one.

    >>> from jaxdefense.train import collapse
    >>> history = [
    ...     collapse.Validation(100, 1.0, clean=80.0, robust=45.0),
    ...     collapse.Validation(200, 2.0, clean=88.0, robust=0.5),
    ... ]
    >>> [w.name for w in collapse.find_warnings(history, n=1000, num_classes=10, is_end=False)]
    ['catastrophic overfitting']
    """
    *before, now = history
    chance = 100 / num_classes
    raised: list[tuple[str, str]] = []
    at = f"epoch {now.epoch:.4g}, {n} validation images"
    learned = [v for v in before if v.one_class is None and _exceeds_chance(v.clean, chance, n)]
    was = before[-1] if before else None
    # Where it has been told already, it is not told again at every validation.
    if now.one_class is not None:
        if is_end or (learned and was is not None and was.one_class is None):
            says = f"{at}: nearly every image is given class {now.one_class}"
            raised.append((ONE_CLASS, f"{says} (clean {now.clean:.1f} %)"))
    elif not _exceeds_chance(now.clean, chance, n):
        if is_end or (was is not None and was in learned):
            says = f"{at}: clean accuracy {now.clean:.1f} %, guessing gives {chance:.1f} %"
            raised.append((CHANCE, says))
    else:
        raised += _robustness_lost(now, before, learned, at, chance, n, is_end)
        crafted, plain = now.crafted, now.plain
        if crafted is not None and plain is not None:
            noise = max(_noise(plain, n), _noise(crafted, n))
            if crafted > plain + noise and now.robust < crafted / 2:
                says = f"{at}: in training {crafted:.1f} % of crafted images are classified rightly"
                says += f" and {plain:.1f} % of clean ones; under the validation attack "
                raised.append((ROBUST_ABOVE_CLEAN, says + f"{now.robust:.1f} %"))
    return [Warned(now.step, now.epoch, name, evidence) for name, evidence in raised]


def _robustness_lost(
    now: Validation,
    before: Sequence[Validation],
    learned: Sequence[Validation],
    at: str,
    chance: float,
    n: int,
    is_end: bool,
) -> list[tuple[str, str]]:
    """Robust accuracy that fell or never was, of a model whose clean accuracy is above chance."""
    near = [v for v in before if v is before[-1] or v.epoch >= now.epoch - 1]
    candidates = [v for v in near if v in learned and _exceeds_chance(v.robust, chance, n)]
    if candidates:
        best = max(candidates, key=lambda v: v.robust)
        keeps_clean = now.clean - chance >= (best.clean - chance) / 2
        fell = now.robust < best.robust / 2 and best.robust - now.robust > _noise(best.robust, n)
        if fell and keeps_clean:
            says = f"{at}: robust accuracy fell from {best.robust:.1f} % (epoch {best.epoch:.4g}) "
            says += f"to {now.robust:.1f} %, clean is {now.clean:.1f} %"
            return [(OVERFITTING, says)]
    crafted = now.crafted if is_end and now.robust <= chance else None
    if crafted is None:
        return []
    says = f"{at}: {now.robust:.1f} % under the validation attack, guessing gives {chance:.1f} %; "
    says += f"{crafted:.1f} % on the images crafted in training, {now.clean:.1f} % on clean ones"
    fooled = crafted > max(2 * now.robust, chance) + _noise(crafted, n)
    return [(OVERFITTING if fooled else NO_ROBUSTNESS, says)]


class Watch:
    """Keeps a run's validations and warnings; a resumed run goes on with those of its checkpoint.

    Args:
      n: validation images.
      num_classes: K.
    """

    def __init__(self, n: int, num_classes: int):
        self._n, self._num_classes = n, num_classes
        self._history: list[Validation] = []
        self.warnings: list[Warned] = []
        self._recent: dict[str, float] = {}

    def note_metrics(self, metrics: Mapping[str, float]) -> None:
        """Keeps what a dispatch's metrics say, for the next validation.

        Args:
          metrics: means by name.
        """
        self._recent = training_accuracies(metrics)

    def add(
        self, step: int, epoch: float, scores: Mapping[str, float], one_class: int | None, end: bool
    ) -> list[Warned]:
        """Takes in a validation of the last phase; returns its new warnings.

        Args:
          step: of the run.
          epoch: of the run.
          scores: {"validation_clean", "validation_robust"}, percent.
          one_class: of `constant_answer`.
          end: whether it is the run's last one.
        """
        accuracies = (scores["validation_clean"], scores["validation_robust"])
        self._history.append(Validation(step, epoch, *accuracies, one_class, **self._recent))
        new = find_warnings(self._history, n=self._n, num_classes=self._num_classes, is_end=end)
        self.warnings += new
        return new

    def told(self) -> list[dict[str, Any]]:
        """The warnings so far as plain values."""
        return [dataclasses.asdict(warned) for warned in self.warnings]

    def state(self) -> dict[str, Any]:
        """Plain values that `restore` takes beside the warnings."""
        history = [dataclasses.asdict(validation) for validation in self._history]
        return {"history": history, "recent": self._recent}

    def restore(self, meta: Mapping[str, Any]) -> None:
        """Goes on where a checkpoint was; one of before there were warnings starts anew.

        Args:
          meta: of the checkpoint, with its "watch" of `state` and its "warnings" of `told`.
        """
        state = meta.get("watch", {})
        self._history = [Validation(**found) for found in state.get("history", ())]
        self._recent = dict(state.get("recent", {}))
        self.warnings = [Warned(**found) for found in meta.get("warnings", ())]
