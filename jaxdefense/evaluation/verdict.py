"""The results of a cascade of attacks: `Verdict`, and `RandomVerdict` of a randomised model."""

import dataclasses

import numpy as np

from jaxdefense.evaluation.flags import Flag


@dataclasses.dataclass(frozen=True, eq=False)
class Verdict:
    """What a cascade found.

    Attributes:
      clean: (N,) bool, classified rightly without an attack.
      robust: (N,) bool, classified rightly under every attack; with targets, not the target.
      by_attack: {attack: (N,) bool}, the survivors after each attack, in order.
      x_adv: (N, H, W, C), the adversarial image where one was found, else the image itself.
      passes: {attack: (forward, backward)} passes through the model, summed over the examples
        that met the attack; an upper bound, since finished examples leave early.
      flags: what should make a reader doubt the numbers: name, severity, evidence.
      seconds: wall time, of all sessions together where it was resumed.
    """

    clean: np.ndarray
    robust: np.ndarray
    by_attack: dict[str, np.ndarray]
    x_adv: np.ndarray
    passes: dict[str, tuple[int, int]]
    flags: tuple[Flag, ...]
    seconds: float

    @property
    def fast(self) -> np.ndarray:
        """AA-fast: the survivors of the gradient attacks on the loss (APGD-CE and APGD-T)."""
        names = [name for name in self.by_attack if name.startswith("apgd")]
        return self.by_attack[names[-1]] if names else self.clean


@dataclasses.dataclass(frozen=True, eq=False)
class RandomVerdict(Verdict):
    """What a cascade found of a randomised model; `clean` and `robust` go by majorities of draws.

    An image's adversarial image is the worst of all attacks', chosen by draws of its own; the
    shares below come from draws that neither an attack nor that choice has seen. `by_attack` goes
    by the choice's draws, so it may differ from `robust` by an image, and an image may be in
    `robust` that is not in `clean`.

    Attributes:
      clean_share: (N,) share of draws in which the clean image is classified rightly.
      share: (N,) the same of the adversarial image `x_adv`.
      draws: m, fresh draws of each image.
    """

    clean_share: np.ndarray
    share: np.ndarray
    draws: int

    @property
    def accuracy(self) -> float:
        """The mean over images and draws: how often the model is right under attack."""
        return float(self.share.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of `accuracy` over the model's draws, for these images.

        mean +- 1.96 sqrt(sum_i p_i (1 - p_i) / m) / N with p_i = (right + 1) / (m + 2), so that
        an image that was right in every draw still counts.
        """
        p = (self.share * self.draws + 1) / (self.draws + 2)
        error = 1.96 * float(np.sqrt(np.sum(p * (1 - p)) / self.draws)) / len(p)
        return max(self.accuracy - error, 0.0), min(self.accuracy + error, 1.0)

    @property
    def fooled_in_majority(self) -> float:
        """The share of images that are misclassified in more than half of the draws."""
        return float((self.share < 0.5).mean())
