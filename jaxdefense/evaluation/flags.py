"""What makes a number doubtful: questions that are asked of every model before it is attacked.

`evaluation.autoattack` asks those that cost little and keeps what it finds as `Flag`s; the audit
asks the same ones and says pass or FAIL. docs/flags.md tells what each means and what to do.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdefense import checksums, losses
from jaxdefense.types import Array, Images, Labels, Predict, Threat

# From harmless to fatal. A note says what was done; a warning, that another attack may find more;
# an error, that the number is no robust accuracy.
SEVERITIES = ("note", "warning", "error")


@dataclasses.dataclass(frozen=True)
class Flag:
    """Something that should make a reader doubt a number.

    Attributes:
      name: one of `NAMES`, the same for the same reason.
      severity: 'note', 'warning' or 'error'.
      evidence: what was seen, in words with figures.

    >>> from jaxdefense.evaluation import Flag
    >>> str(Flag("few classes", "note", "apgd-t: 2 of 9 targets exist"))
    'note: few classes: apgd-t: 2 of 9 targets exist'
    """

    name: str
    severity: str
    evidence: str

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"unknown flag {self.name!r}; known: {', '.join(NAMES)}")
        if self.severity not in SEVERITIES:
            raise ValueError(f"unknown severity {self.severity!r}; known: {', '.join(SEVERITIES)}")

    def __str__(self) -> str:
        return f"{self.severity}: {self.name}: {self.evidence}"


NAMES = (
    "zero gradients",
    "non-finite gradients",
    "no gradients",
    "misleading gradients",
    "undefined answers",
    "loop in the forward pass",
    "ties",
    "one class",
    "no better than chance",
    "masked gradients",
    "unconfirmed wins",
    "few classes",
    "another scale",
    "copies",
    "own labels",
    "not random",
    "attack without its threat",
    "small sample",
)


@dataclasses.dataclass(frozen=True)
class Noise:
    """How far logits differ that should be equal, over the logits' spread.

    Attributes:
      between_calls: of the same batch.
      between_batches: of the same images at other places of a batch, beside other images.
      traces_differ: whether two traces of the model are different programs: it draws on the host.
      tolerance: what rounding explains.
    """

    between_calls: float
    between_batches: float
    traces_differ: bool
    tolerance: float

    @property
    def random(self) -> bool:
        """Whether the model gives the same batch other logits the second time."""
        return self.traces_differ or self.between_calls > self.tolerance

    @property
    def depends_on_batch(self) -> bool:
        """Whether an image's logits depend on the rest of its batch, or on its place in it."""
        return self.between_batches > self.tolerance

    def evidence(self) -> str:
        """What was seen, in words."""
        if self.traces_differ:
            return "two traces of it are different programs: it draws numbers on the host"
        return (
            f"of the logits' spread, the same batch again differs by {self.between_calls:.2g}, "
            f"the same images at other places beside others by {self.between_batches:.2g} "
            f"(rounding: {self.tolerance:.0e})"
        )

    def check(self) -> None:
        """Refuses a model that is not deterministic.

        Raises:
          ValueError: it is random, or what it says of an image depends on the rest of the batch.
        """
        if self.random:
            raise ValueError(
                f"the model is random ({self.evidence()}): its verdict would be one draw's. Give "
                f"evaluation.autoattack(random=predict) with predict(key, images), or fix its noise"
            )
        if self.depends_on_batch:
            raise ValueError(
                f"the logits of an image change with the rest of its batch or its place in it "
                f"({self.evidence()}): BatchNorm in train mode? Evaluate with running averages. "
                f"Noise drawn for the batch? Give evaluation.autoattack(random=predict) with "
                f"predict(key, images)"
            )


_NOISE_IMAGES = 32  # that `measure_noise` uses


def logit_difference(first: np.ndarray, second: np.ndarray) -> float:
    """The largest difference between two models' logits, over the spread of the logits.

    The spread is the median over the images of the logits' median distance from their median, so
    that a class masked by -1e9 hides nothing; what the last digits of a large logit explain does
    not count.

    Args:
      first: (N, K).
      second: (N, K).
    """
    precise = float(jnp.finfo(first.dtype).eps)
    a, b = (
        np.nan_to_num(z.astype(np.float64), posinf=1e300, neginf=-1e300) for z in (first, second)
    )
    spread = np.median(np.abs(a - np.median(a, -1, keepdims=True)), -1)
    far = np.abs(a - b) - 16 * precise * np.maximum(np.abs(a), np.abs(b))
    return float(max(far.max(initial=0), 0) / max(np.median(spread), np.finfo(np.float32).tiny))


def random_points(images: np.ndarray, threat: Threat, seed: int = 0) -> np.ndarray:
    """Random points of the ball around each image, and of the box, on the host.

    Args:
      images: (N, ...), the first ones of an evaluation.
      threat: the set; of an eps for each image of the evaluation, the first ones count.
      seed: of the points.
    """
    low, high = threat.bounds
    size = images[0].size
    eps = np.asarray(threat.eps, np.float32) * (high - low) / threat.diameter(size)
    eps = np.broadcast_to(eps[: len(images)] if eps.ndim else eps, len(images)).reshape(
        (-1,) + (1,) * (images.ndim - 1)
    )
    noise = np.random.default_rng(seed).uniform(-1, 1, images.shape)
    return np.clip(images.astype(np.float32) + eps * noise, low, high).astype(images.dtype)


def measure_noise(
    forward: Callable[[np.ndarray], np.ndarray],
    images: np.ndarray,
    threat: Threat,
    traces_differ: bool = False,
) -> Noise:
    """Asks a model for the same logits several times: of images and of random points beside them.

    Args:
      forward: images (n, ...) -> logits (n, K), compiled.
      images: (N, ...); the first 32 are used.
      threat: of the evaluation.
      traces_differ: whether two traces of the model were different programs.
    """
    x = images[:_NOISE_IMAGES]
    n = len(x)
    beside = random_points(x, threat)
    grey = np.full_like(x, sum(threat.bounds) / 2)
    batch = np.concatenate([x, beside])
    first, again = (np.asarray(forward(batch)) for _ in range(2))
    others = np.asarray(forward(np.concatenate([grey, x[::-1]])))[n:][::-1]
    besides = np.asarray(forward(np.concatenate([beside[::-1], grey])))[:n][::-1]
    exact = 1e-4 if jax.default_backend() == "cpu" else 1e-2  # matrix units round to 10 bits
    return Noise(
        between_calls=logit_difference(first, again),
        between_batches=logit_difference(first, np.concatenate([others, besides])),
        traces_differ=traces_differ,
        tolerance=max(4 * float(jnp.finfo(first.dtype).eps), exact),
    )


def program_text(jaxpr: Any) -> tuple[str, list[bytes]]:
    """A traced program and its constants, without the addresses of Python's objects.

    Args:
      jaxpr: of `jax.make_jaxpr`.
    """
    constants = [_bytes(constant) for constant in jaxpr.consts if hasattr(constant, "dtype")]
    return re.sub(r"0x[0-9a-f]+", "", str(jaxpr.jaxpr)), constants


def _bytes(array: Any) -> bytes:
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(array) if is_key else array).tobytes()


def has_loop(predict: Predict, images: Images) -> bool:
    """Whether the forward pass iterates, as a model that optimises at test time does.

    Args:
      predict: images -> logits.
      images: a batch, whose shape alone counts.
    """

    def search(jaxpr: Any) -> bool:
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("while", "scan"):
                return True
            for value in jax.tree.leaves(list(equation.params.values())):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns") and search(inner):
                    return True
        return False

    return search(jax.make_jaxpr(predict)(images).jaxpr)


# Of JAX's messages: loops of unknown length, callbacks, functions without a transpose.
_NO_REVERSE = ("differentiation", "do not support JVP", "ranspos")


class NoGradients(ValueError):
    """JAX cannot differentiate the model in reverse."""


def gradient_shares(predict: Predict, images: Images, labels: Labels, threat: Threat) -> Array:
    """What is wrong with each image's gradient: zero, not finite, or leading downhill.

    The gradient is that of the attacks' cross-entropy, `losses.log_odds`; it leads downhill where
    a step along it, a hundredth of eps long, lowers the loss.

    Args:
      predict: images -> logits.
      images: (B, ...).
      labels: (B,).
      threat: the set; its eps is one number or one for each of these images.

    Returns:
      (B, 3): 1 where the gradient is zero everywhere; the share of its entries that is not finite;
      1 where it leads downhill.

    Raises:
      NoGradients: JAX cannot differentiate the model in reverse.
    """

    def loss(x: Images) -> Array:
        return losses.log_odds(predict(x), labels)

    try:
        values, pull = jax.vjp(loss, images)
        grad = pull(jnp.ones_like(values))[0]
    except Exception as error:
        if not any(words in str(error) for words in _NO_REVERSE):
            raise
        raise NoGradients(
            f"gradients cannot be taken through the model ({str(error).splitlines()[0]})"
        ) from error
    broken = ~jnp.isfinite(grad)
    grad = jnp.where(broken, 0, grad)
    zero = jnp.all(grad == 0, range(1, grad.ndim))
    moved = jnp.clip(images + threat.ascent(grad, images, threat.eps / 100), *threat.bounds)
    lower = ~zero & (loss(moved.astype(images.dtype)) < values)
    share = jnp.mean(broken, range(1, grad.ndim), dtype=jnp.float32)
    return jnp.stack([zero.astype(jnp.float32), share, lower.astype(jnp.float32)], -1)


_FEWEST_FOR_CHANCE = 20  # images of which an accuracy of chance says something
_ACCIDENT = 0.02  # probability below which it is no accident

TOO_MANY_ZERO = 0.05  # share of images whose gradients may be zero by chance (saturation)
TOO_MANY_DOWNHILL = 0.25  # share of images whose gradients may lead downhill


def gradient_flags(shares: np.ndarray) -> list[Flag]:
    """The flags of `gradient_shares`.

    Args:
      shares: (N, 3).
    """
    raised = []
    zero, broken = shares[:, 0].mean(), (shares[:, 1] > 0).mean()
    if zero > 0:
        severity = "error" if zero >= TOO_MANY_ZERO else "warning"
        evidence = f"zero everywhere for {zero:.1%} of the images asked and points beside them"
        raised.append(Flag("zero gradients", severity, evidence))
    if broken > 0:
        evidence = (
            f"{shares[:, 1].mean():.2%} of the entries, in {broken:.1%} of the images asked, are "
            f"NaN or infinite and counted as 0"
        )
        raised.append(Flag("non-finite gradients", "warning", evidence))
    lower = shares[:, 2].mean()
    if lower > TOO_MANY_DOWNHILL:
        severity = "error" if lower > 0.5 else "warning"
        evidence = f"a small step along the gradient lowers the loss of {lower:.1%} of images"
        raised.append(Flag("misleading gradients", severity, evidence))
    return raised


def answer_flags(logits: np.ndarray, examples: int, where: str) -> list[Flag]:
    """The flags of logits of images in the ball: NaN, and ties.

    Args:
      logits: (n, K) of images that were not fooled, or of any.
      examples: of which these are some.
      where: what images they are, in words.
    """
    raised = []
    undefined = int((~np.isfinite(logits)).any(-1).sum())
    if undefined:
        evidence = f"NaN or infinite logits for {undefined} of {examples} {where}"
        raised.append(Flag("undefined answers", "error", evidence))
    top = np.sort(np.nan_to_num(logits), -1)[:, -2:]
    tied = int((top[:, 0] == top[:, 1]).sum())
    if tied > 0.005 * examples:
        severity = "error" if tied > 0.05 * examples else "warning"
        evidence = f"two largest logits for {tied} of {examples} {where}"
        raised.append(Flag("ties", severity, evidence))
    return raised


def chance_flags(logits: np.ndarray, labels: np.ndarray) -> list[Flag]:
    """The flag of a clean accuracy that guessing reaches: labels or images do not fit the model.

    It is raised where so few right answers would be an accident even for a weak model.

    Args:
      logits: (N, K), clean.
      labels: (N,).
    """
    n, classes = logits.shape
    answers = logits.argmax(-1)
    accuracy, chance = float((answers == labels).mean()) if n else 1.0, 1 / classes
    if n < _FEWEST_FOR_CHANCE or accuracy > chance or len(np.unique(labels)) == 1:
        return []
    # Chernoff's bound on how likely a model of accuracy `weak` is to be right no more often.
    weak = min(max(2 * chance, 0.2), (1 + chance) / 2)
    far = (1 - accuracy) * math.log((1 - accuracy) / (1 - weak))
    if accuracy > 0:
        far += accuracy * math.log(accuracy / weak)
    if math.exp(-n * far) > _ACCIDENT:
        return []
    evidence = (
        f"clean accuracy {accuracy:.1%} of {n} images, guessing among {classes} classes gives "
        f"{chance:.1%}: labels are probably shifted or in another order, or the images are not "
        f"what the model was trained on"
    )
    shifts = np.bincount((labels.astype(int) - answers) % classes, minlength=classes) / n
    shift = int(shifts.argmax())
    if classes > 2 and shifts[shift] >= 0.5:
        evidence += f"; (labels - {shift}) % {classes} would give {shifts[shift]:.1%}"
    return [Flag("no better than chance", "error", evidence)]


def logit_flags(logits: np.ndarray, labels: np.ndarray) -> list[Flag]:
    """The flags of clean logits: ties, one class alone, an accuracy of chance.

    Args:
      logits: (N, K).
      labels: (N,).
    """
    raised = answer_flags(logits, len(logits), "clean images")
    answers = np.unique(logits.argmax(-1))
    if len(answers) > 1 or len(labels) == 1:
        return raised + chance_flags(logits, labels)
    evidence = f"every image is class {answers[0]} to the model"
    if len(np.unique(labels)) > 1:
        return [*raised, Flag("one class", "error", evidence)]
    if labels[0] != answers[0]:
        return raised
    evidence += " and by its label: one that always answers so looks the same"
    return [*raised, Flag("one class", "warning", evidence)]


_DARK = 0.05  # share of the bounds that images should fill
_TINY = 2e-4  # eps, as a share of the box's diameter, below which it is in other units


def image_flags(images: np.ndarray, threat: Threat) -> list[Flag]:
    """The flags of images: few of them, copies, and another scale than the threat's.

    Args:
      images: (N, ...).
      threat: of the evaluation.
    """
    raised = []
    low, high = threat.bounds
    least, largest = float(images.min()), float(images.max())
    if largest - least < _DARK * (high - low):
        share = (largest - least) / (high - low)
        evidence = f"images in [{least:g}, {largest:g}] fill {share:.1%} of the bounds [{low:g}, "
        raised.append(Flag("another scale", "warning", f"{evidence}{high:g}]"))
    eps, diameter = float(np.max(threat.eps)), threat.diameter(images[0].size)
    usual = _TINY * diameter if threat.norm != "l1" else 0.1 * (high - low)  # of one pixel
    if 0 < eps < usual:
        evidence = f"eps {eps:g} in bounds [{low:g}, {high:g}]: eps has the images' units"
        raised.append(Flag("another scale", "warning", evidence))
    different = len({checksums.describe_array(image) for image in images})
    if different < 0.99 * len(images):
        evidence = f"{len(images)} images, of which {different} are different"
        raised.append(Flag("copies", "warning", evidence))
    if different < 100:
        error = 100 / np.sqrt(different)
        evidence = f"{different} images: accuracies are known to ± {error:.0f} points"
        raised.append(Flag("small sample", "note", evidence))
    return raised


def survivor_flags(survivors: dict[str, int], examples: int) -> list[Flag]:
    """The flag of masked gradients: FAB or Square took what gradient attacks on the loss left.

    Args:
      survivors: {"clean" or attack: how many are left}, in order.
      examples: all of them.
    """
    raised = []
    for before, name in itertools.pairwise(survivors):
        taken = survivors[before] - survivors[name]
        if name.startswith(("square", "fab")) and before != "clean" and taken > 0.002 * examples:
            severity = "error" if taken > 0.05 * examples else "warning"
            evidence = (
                f"{name} fooled {taken} of {examples} examples that the gradient attacks on the "
                f"loss had left"
            )
            raised.append(Flag("masked gradients", severity, evidence))
    return raised


def is_fooled(logits: np.ndarray, labels: np.ndarray, targeted: bool = False) -> np.ndarray:
    """(B,) bool: whether the model's answer is wrong, or is the target.

    The answer is the class of the largest logit, of equal ones the first. NaN is no right answer,
    and reaches no target.

    Args:
      logits: (B, K) float32.
      labels: (B,) labels, or targets.
      targeted: whether they are targets.
    """
    undefined = np.isnan(logits).any(-1)
    answers = logits.argmax(-1)
    return (answers == labels) & ~undefined if targeted else (answers != labels) | undefined
