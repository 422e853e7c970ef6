"""The types that the whole library shares, and what keys and per-example values need.

Images are (B, H, W, C) floats in the threat's bounds ([0, 1] unless said), labels (B,) integers,
logits (B, K) floats. A `Key` is one typed PRNG key, or one key per example, shape (B,); with
one per example, an example's random numbers do not depend on the rest of the batch.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Scalar = jax.Array  # ()
Images = jax.Array  # (B, H, W, C)
Labels = jax.Array  # (B,)
Logits = jax.Array  # (B, K)
Key = jax.Array  # () or (B,) typed PRNG keys
PerExample = jax.Array  # (B,)
PyTree = Any
HostArray = np.ndarray | jax.Array  # of checks and evaluation, which also read NumPy arrays

Predict = Callable[[Images], Logits]  # parameters already inside, eval mode
PredictWithKey = Callable[[Key, Images], Logits]  # a randomised model
LossFn = Callable[[Logits, Labels], PerExample]
Objective = Callable[[Images], PerExample]


class Attack(Protocol):
    """`attack(predict, key, images, labels) -> images`: inside the threat's ball and box."""

    def __call__(self, predict: Predict, key: Key, images: Images, labels: Labels) -> Images: ...


class Threat(Protocol):
    """A norm ball around each image, cut by the box of valid images: a frozen dataclass.

    `threat.Linf`, `L2` and `L1` are the library's; see `threat` for what each method computes.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    norm: ClassVar[str]

    @property
    def eps(self) -> float | Array:
        """The ball's radius in image units, () or (B,)."""

    @property
    def bounds(self) -> tuple[float, float]:
        """(low, high) of valid images."""

    def diameter(self, n: float) -> float:
        """The largest distance between two images in the box.

        Args:
          n: values of an image.
        """

    def project(self, x_adv: Images, x: Images) -> Images:
        """The nearest point of ball and box, (B, ...).

        Args:
          x_adv: (B, ...) points anywhere.
          x: (B, ...) the centres of the balls, in the box.
        """

    def sample(self, key: Key, x: Images) -> Images:
        """Uniform points of the ball, cut to the box, (B, ...).

        Args:
          key: one key, or one per example.
          x: (B, ...) the centres of the balls.
        """

    def ascent(self, grad: Images, x: Images, step_size: float | PerExample) -> Images:
        """The step that raises a linear function most, (B, ...).

        Args:
          grad: (B, ...) the function's gradient.
          x: (B, ...) the images that the step starts from.
          step_size: the step's length in the norm, () or (B,).
        """

    def distance(self, x_adv: Images, x: Images) -> PerExample:
        """The norm of x_adv - x, (B,).

        Args:
          x_adv: (B, ...).
          x: (B, ...).
        """

    def dual_norm(self, grad: Images) -> PerExample:
        """What a step of length 1 gains at most, (B,).

        Args:
          grad: (B, ...) a linear function's gradient.
        """

    def step_to_hyperplane(self, x: Images, normal: Images, gap: PerExample) -> Images:
        """The shortest step inside the box with <normal, step> = gap, (B, ...).

        Args:
          x: (B, ...) images in the box.
          normal: (B, ...) the hyperplane's normal at each image.
          gap: (B,) what the step has to gain.
        """

    def scaled(self, factor: float | PerExample) -> "Threat":
        """The same threat with `factor` times the eps.

        Args:
          factor: () or (B,).
        """

    def with_eps(self, eps: float | PerExample) -> "Threat":
        """The same norm and bounds with another eps.

        Args:
          eps: () or (B,).
        """

    def rounded(self, x_adv: Images, x: Images, levels: int) -> Images:
        """x_adv on a grid of `levels` steps over the box, still in the ball.

        Args:
          x_adv: (B, ...) images of the set.
          x: (B, ...) the centres, on the grid.
          levels: steps over the box, 255 for images of 8 bits.
        """


class Static:
    """The part of a pytree that is not arrays: hashable, so that `jit` can take it as static.

    Args:
      tree: the pytree's structure.
      leaves: its leaves, None in the places of arrays.
    """

    def __init__(self, tree: Any, leaves: Sequence[Any]):
        self.tree, self.leaves = tree, tuple(leaves)

    def join(self, arrays: Sequence[Array]) -> PyTree:
        """The whole pytree.

        Args:
          arrays: as `partition` returned them, or others in their places.
        """
        waiting = iter(arrays)
        leaves = [next(waiting) if leaf is None else leaf for leaf in self.leaves]
        return jax.tree.unflatten(self.tree, leaves)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and (self.tree, self.leaves) == (other.tree, other.leaves)

    def __hash__(self) -> int:
        return hash(self.tree)


def partition(variables: PyTree) -> tuple[list[Any], Static]:
    """Splits a pytree into its arrays and the rest, such as an Equinox module's functions.

    Args:
      variables: any pytree.

    Returns:
      (arrays, rest) with `rest.join(arrays)` the pytree.
    """
    leaves, tree = jax.tree.flatten(variables)
    kinds = (bool, int, float, complex, np.generic, np.ndarray, jax.Array)
    is_array = [isinstance(leaf, kinds) for leaf in leaves]
    arrays = [leaf for leaf, yes in zip(leaves, is_array, strict=True) if yes]
    rest = [None if yes else leaf for leaf, yes in zip(leaves, is_array, strict=True)]
    return arrays, Static(tree, rest)


def example_keys(key: Key, batch: int) -> Key:
    """One key per example: `key` itself if it has shape (batch,), else `fold_in(key, row)`.

    Args:
      key: one typed key, or one per example.
      batch: B.

    Raises:
      ValueError: `key` is no typed key, or has another shape.
    """
    if not hasattr(key, "dtype"):
        raise ValueError(f"need a typed key, e.g. jax.random.key(0), got {key!r}")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise ValueError(f"need a typed key (jax.random.key), got an array of {key.dtype}")
    if key.shape == (batch,):
        return key
    if key.shape != ():
        raise ValueError(
            f"need one key or one per example: shape () or ({batch},), got {key.shape}"
        )
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))


def fold_in(key: Key, data: int | Array) -> Key:
    """`jax.random.fold_in` for one key or one per example.

    Args:
      key: () or (B,) typed keys.
      data: one number, or one per example.
    """
    if key.ndim:
        return jax.vmap(jax.random.fold_in, (0, 0 if jnp.ndim(data) else None))(key, data)
    return jax.random.fold_in(key, data)


def per_example(value: float | Array, x: Array) -> Array:
    """`value` shaped to broadcast against `x`, in x's dtype.

    Args:
      value: () or (B,).
      x: (B, ...).

    Raises:
      ValueError: `value` has another shape.
    """
    value = jnp.asarray(value, x.dtype)
    if value.ndim > 1 or (value.ndim == 1 and value.shape[0] != x.shape[0]):
        raise ValueError(f"need one value or one per example ({x.shape[0]}), got {value.shape}")
    return value.reshape(value.shape + (1,) * (x.ndim - 1)) if value.ndim else value
