"""What makes a number doubtful: questions that are asked of every model before it is attacked.

`evaluation.autoattack` asks those that cost little and keeps what it finds as `Flag`s; the audit
asks the same ones and says pass or FAIL. docs/flags.md tells what each means and what to do.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdefense import losses
from jaxdefense.attacks.outcome import fooled
from jaxdefense.types import Array, HostArray, Images, Labels, Predict

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
    "loop in the forward pass",
    "ties",
    "one class",
    "masked gradients",
    "unconfirmed wins",
    "few classes",
    "own labels",
    "not random",
    "attack without its threat",
    "small sample",
)


@dataclasses.dataclass(frozen=True)
class Noise:
    """How far logits differ that a deterministic classifier gives alike, over their scale.

    Attributes:
      repeat: the same batch once more.
      company: the same images at other places, beside others.
      traced: whether two traces of the model are different programs: it draws on the host.
      tolerance: what rounding explains.
    """

    repeat: float
    company: float
    traced: bool
    tolerance: float

    @property
    def random(self) -> bool:
        """Whether the model answers one question in two ways."""
        return self.traced or self.repeat > self.tolerance

    @property
    def mixed(self) -> bool:
        """Whether what it says of an image depends on the batch, or on the place in it."""
        return self.company > self.tolerance

    def evidence(self) -> str:
        """What was seen, in words."""
        if self.traced:
            return "two traces of it are different programs: it draws numbers on the host"
        return (
            f"of the logits' scale, the same batch again differs by {self.repeat:.2g}, the same "
            f"images at other places beside others by {self.company:.2g} "
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
        if self.mixed:
            raise ValueError(
                f"the logits of an image change with the rest of its batch or its place in it "
                f"({self.evidence()}): BatchNorm in train mode? Evaluate with running averages. "
                f"Noise drawn for the batch? Give evaluation.autoattack(random=predict) with "
                f"predict(key, images)"
            )


_SHOWN = 32  # images that the questions of noise are asked about


def noise(
    forward: Callable[[np.ndarray], np.ndarray],
    images: np.ndarray,
    bounds: tuple[float, float],
    trace: Callable[[np.ndarray], Any] | None = None,
) -> Noise:
    """Asks the same of a model several times.

    Args:
      forward: images (n, ...) -> logits (n, K), compiled.
      images: (N, ...); the first 32 are used.
      bounds: of valid images, for other ones beside them.
      trace: images -> the model's jaxpr, traced anew at each call; None to leave that out.
    """
    low, high = bounds
    x = images[:_SHOWN]
    n = len(x)
    with_mirrors = np.concatenate([x, (low + high - x).astype(x.dtype)])
    with_grey = np.concatenate([np.full_like(x, (low + high) / 2), x[::-1]])
    first, again, moved = (
        np.asarray(forward(batch)) for batch in (with_mirrors, with_mirrors, with_grey)
    )
    precise = float(jnp.finfo(first.dtype).eps)
    exact = 1e-4 if jax.default_backend() == "cpu" else 2e-3  # matrix units round to 10 bits
    first, again, moved = (logits.astype(np.float64) for logits in (first, again, moved))
    scale = np.abs(first).max() + 1e-6
    traced = trace is not None and _program(trace(x)) != _program(trace(x))
    return Noise(
        repeat=float(np.abs(first - again).max() / scale),
        company=float(np.abs(first[:n] - moved[n:][::-1]).max() / scale),
        traced=traced,
        tolerance=max(4 * precise, exact),
    )


def _program(jaxpr: Any) -> tuple[str, list[bytes]]:
    """A traced program and its constants, without the addresses of Python's objects."""
    constants = [_bytes(constant) for constant in jaxpr.consts if hasattr(constant, "dtype")]
    return re.sub(r"0x[0-9a-f]+", "", str(jaxpr.jaxpr)), constants


def _bytes(array: Any) -> bytes:
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(array) if is_key else array).tobytes()


def has_loop(predict: Predict, images: Images) -> bool:
    """Whether the forward pass iterates: an optimisation at test time hides its gradient so.

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


class NoGradients(ValueError):
    """Reverse-mode differentiation through the model fails."""


def gradient_shares(predict: Predict, images: Images, labels: Labels) -> Array:
    """(B, 2): whether an image's gradient is zero everywhere, and the share of it not finite.

    The gradient is that of the attacks' cross-entropy, `losses.log_odds`.

    Args:
      predict: images -> logits.
      images: (B, ...).
      labels: (B,).

    Raises:
      NoGradients: JAX cannot differentiate the model in reverse.
    """

    def total(x: Images) -> Array:
        return jnp.sum(losses.log_odds(predict(x), labels))

    try:
        grad = jax.grad(total)(images)
    except Exception as error:
        if "differentiation" not in str(error) and "transpose" not in str(error).lower():
            raise
        raise NoGradients(
            f"gradients cannot be taken through the model ({str(error).splitlines()[0]})"
        ) from error
    grad = grad.reshape(len(grad), -1)
    broken = ~jnp.isfinite(grad)
    zero = jnp.all((grad == 0) | broken, -1)
    return jnp.stack([zero.astype(jnp.float32), jnp.mean(broken, -1, dtype=jnp.float32)], -1)


def about_gradients(shares: np.ndarray) -> list[Flag]:
    """The flags of `gradient_shares`.

    Args:
      shares: (N, 2).
    """
    found = []
    zero, broken = shares[:, 0].mean(), (shares[:, 1] > 0).mean()
    if zero > 0:
        severity = "error" if zero >= 0.05 else "warning"
        found.append(
            Flag("zero gradients", severity, f"zero everywhere for {zero:.1%} of the images asked")
        )
    if broken > 0:
        evidence = (
            f"{shares[:, 1].mean():.2%} of the entries, in {broken:.1%} of the images asked, are "
            f"NaN or infinite and counted as 0"
        )
        found.append(Flag("non-finite gradients", "warning", evidence))
    return found


def about_logits(logits: np.ndarray, labels: np.ndarray) -> list[Flag]:
    """The flags of clean logits: ties, and a model that answers one class.

    Args:
      logits: (N, K).
      labels: (N,).
    """
    found = []
    top = np.sort(logits, -1)[:, -2:]
    tied = (top[:, 0] == top[:, 1]).mean()
    if tied > 0.005:
        evidence = f"{tied:.1%} of clean images have two largest logits"
        found.append(Flag("ties", "warning", evidence))
    answers = np.unique(logits.argmax(-1))
    if len(answers) == 1 and len(np.unique(labels)) > 1:
        found.append(Flag("one class", "error", f"every image is class {answers[0]} to the model"))
    if len(labels) < 100:
        error = 100 / np.sqrt(max(len(labels), 1))
        evidence = f"{len(labels)} images: accuracies are known to ± {error:.0f} points"
        found.append(Flag("small sample", "note", evidence))
    return found


def about_survivors(survivors: dict[str, int], examples: int) -> list[Flag]:
    """The masking alarm: what gradient attacks on the loss left and others took.

    Args:
      survivors: {"clean" or attack: how many are left}, in order.
      examples: all of them.
    """
    found = []
    for before, name in itertools.pairwise(survivors):
        taken = survivors[before] - survivors[name]
        if name.startswith(("square", "fab")) and before != "clean" and taken > 0.002 * examples:
            severity = "error" if taken > 0.05 * examples else "warning"
            evidence = (
                f"{name} fooled {taken} of {examples} examples that the gradient attacks on the "
                f"loss had left"
            )
            found.append(Flag("masked gradients", severity, evidence))
    return found


def wins(logits: HostArray, labels: HostArray, targeted: bool = False) -> np.ndarray:
    """(B,) bool: who is fooled by a plain pass; a tie fools nobody.

    Args:
      logits: (B, K) float32.
      labels: (B,) labels, or targets.
      targeted: which.
    """
    return np.asarray(fooled(jnp.asarray(logits), jnp.asarray(labels), targeted))
