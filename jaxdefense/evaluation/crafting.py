"""An attack's program for one batch: its images, whether they are allowed, and how far they win."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxdefense.attacks.method import Method, run_attack, takes_targets
from jaxdefense.attacks.outcome import require_margin, success_margin
from jaxdefense.evaluation.checks import check_attack_output, has_unknown_threat
from jaxdefense.types import (
    Array,
    Attack,
    Images,
    Labels,
    Logits,
    PerExample,
    Predict,
    PyTree,
    Threat,
)

Apply = Callable[..., Logits]  # (variables, images) -> logits, eval mode

# Rounding of x + eps in float32, and of a sum over an image's pixels.
_TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Examples of an evaluation, as an attack gets them.

    Args:
      images: (n, ...) floats.
      labels: (n,) integers; for a targeted attack the classes to be reached.
      ids: (n,) integers, the examples' names in the random keys.
      rows: (n,) integers, the examples' places in the whole evaluation: eps and options that hold
        a value for each example are looked up there.

    >>> import numpy as np
    >>> from jaxdefense.evaluation import Examples
    >>> examples = Examples.of(np.zeros((8, 2, 2, 1)), np.arange(8) % 3, np.arange(100, 108))
    >>> some = examples.take(np.array([5, 7]))
    >>> some.labels.tolist(), some.ids.tolist(), some.rows.tolist()
    ([2, 1], [105, 107], [5, 7])
    """

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, images: np.ndarray, labels: np.ndarray, ids: np.ndarray) -> "Examples":
        """All examples of an evaluation, in order.

        Args:
          images: (N, ...) floats.
          labels: (N,) integers, or targets.
          ids: (N,) integers.
        """
        return cls(images, labels, ids, np.arange(len(images)))

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, places: np.ndarray) -> "Examples":
        """Some of these examples.

        Args:
          places: (m,) integers in [0, n).
        """
        return Examples(
            self.images[places], self.labels[places], self.ids[places], self.rows[places]
        )


@dataclasses.dataclass(frozen=True, eq=False)
class AttackProgram:
    """An attack on a model as one function of arrays, which `Evaluator.dispatch` compiles.

    Args:
      name: of the attack, for messages.
      attack: any `Attack` of the threat.
      apply: (variables, images) -> logits; with a key before the images for an attack on a
        randomised model.
      threat: its eps is one number or one for each example of the evaluation.
      grid: steps over the box that the images are rounded to, or None.
      with_margin: whether a win counts only by a margin, the program's last argument.
    """

    name: str
    attack: Attack
    apply: Apply
    threat: Threat
    grid: int | None
    with_margin: bool

    @property
    def targeted(self) -> bool:
        """Whether the labels are classes to be reached."""
        return takes_targets(self.attack)

    @property
    def randomised(self) -> bool:
        """Whether the model takes a key; a single pass then does not tell who is fooled."""
        return isinstance(self.attack, Method) and self.attack.samples is not None

    @property
    def _has_own_eps(self) -> bool:
        """Whether each example has its own eps."""
        return bool(jnp.ndim(self.threat.eps))

    def values_of(self, rows: np.ndarray) -> list[np.ndarray]:
        """The examples' own eps, then their own options of the attack: arguments of the program.

        Args:
          rows: (n,) integers, places in the whole evaluation.

        Returns:
          Arrays (n,): none where all examples share eps and options.
        """
        eps = [np.asarray(self.threat.eps, np.float32)] if self._has_own_eps else []
        options = self.attack.per_example() if isinstance(self.attack, Method) else []
        return [np.asarray(array)[rows] for array in (*eps, *options)]

    def _with_values(self, values: Sequence[Array]) -> tuple[Threat, Attack]:
        """The batch's threat and attack: `values_of`'s arrays in their places."""
        threat, options = self.threat, list(values)
        if self._has_own_eps:
            threat = threat.with_eps(options.pop(0))
        if isinstance(self.attack, Method) and options:
            return threat, self.attack.with_per_example(iter(options))
        return threat, self.attack

    def __call__(
        self, variables: PyTree, key_data: Array, x: Images, y: Labels, *values: Array
    ) -> tuple[Images, Array, PerExample]:
        """Attacks a batch.

        Args:
          variables: `apply`'s first argument.
          key_data: (B, ...) of one random key for each example.
          x: (B, ...) images.
          y: (B,) labels, or targets.
          *values: `values_of`'s arrays, then the margin to win by as an array (B,) of one value.

        Returns:
          Images (B, ...) in float32 or wider, whether each lies in the threat's set (B,), and the
          lead of the wrong class (of the target) in logits that this program sees (B,).
        """
        *own_values, margin = values
        threat, attack = self._with_values(own_values)
        predict = functools.partial(self.apply, variables)
        keys = jax.random.wrap_key_data(key_data)
        with self._winning_by(margin[0], predict) as target:
            x_adv = run_attack(attack, target, keys, x, y)
        check_attack_output(self.name, x_adv, x)
        centres = widen(x)
        if x_adv.dtype != centres.dtype:  # half precision leaves the ball by its rounding
            x_adv = threat.project(x_adv.astype(centres.dtype), centres)
        lead = jnp.zeros(len(x))
        if not self.randomised:
            lead = success_margin(widen(predict(x_adv.astype(x.dtype))), y, self.targeted)
        if self.grid is not None:
            x_adv = threat.rounded(x_adv, centres, self.grid)
        return x_adv, in_threat_set(threat, x_adv, centres), lead

    @contextlib.contextmanager
    def _winning_by(self, margin: Array, predict: Predict) -> Iterator[Predict]:
        """The model to be attacked, inside a context in which wins have to be by the margin.

        Our own attacks read the margin from the context; a bare function is given a model that
        hides smaller wins.
        """
        if not self.with_margin:
            yield predict
        elif has_unknown_threat(self.attack):
            yield with_margin_to_beat(predict, margin)
        else:
            with require_margin(margin):
                yield predict


def in_threat_set(threat: Threat, x_adv: Images, images: Images) -> Array:
    """(B,) bool: in the box, in the ball but for rounding, and finite.

    Args:
      threat: its ball and box.
      x_adv: (B, ...).
      images: (B, ...), the centres.
    """
    low, high = threat.bounds
    inside = jnp.all((x_adv >= low) & (x_adv <= high), range(1, x_adv.ndim))
    slack = _TOLERANCE * (high - low)
    limit = threat.eps * (1 + _TOLERANCE) + slack
    return inside & (threat.distance(x_adv, images) <= limit)  # NaN compares false


def with_margin_to_beat(predict: Predict, margin: Array | float) -> Predict:
    """A model in which a class that leads by less than a margin only ties.

    Logits are cut to the largest one less the margin. A tie fools nobody, so an attack on this
    model has won only where it wins on `predict` by more than the margin. Gradients stay.

    Args:
      predict: images -> logits.
      margin: in logits, ().
    """

    def cut(x: Images) -> Logits:
        logits = widen(predict(x))
        over = jnp.maximum(logits - (jnp.max(logits, -1, keepdims=True) - margin), 0)
        return logits - jax.lax.stop_gradient(over)

    return cut


def round_to_grid(images: np.ndarray, threat: Threat, levels: int) -> np.ndarray:
    """Images exactly on the grid, as files of 8 bits give them.

    XLA divides by reciprocals, so what it computes may differ in the last bit.

    Args:
      images: (N, ...) on the grid but for rounding.
      threat: its bounds are the box.
      levels: steps over the box.
    """
    low, high = threat.bounds
    steps = np.rint((images - low) / (high - low) * levels).astype(np.float32)
    return low + steps / np.float32(levels) * np.float32(high - low)


def widen(x: Array) -> Array:
    """`x` in float32, or in its own type if that is wider.

    Args:
      x: floats of any shape.
    """
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
