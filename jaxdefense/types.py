"""The types that the floors share.

Images are (B, H, W, C) floats in the threat's bounds ([0, 1] unless said), labels (B,) integers,
logits (B, K) floats. A `Key` is one typed PRNG key, or one key per example, shape (B,): then what
an attack draws for an example does not depend on the batch it sits in.
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
HostArray = np.ndarray | jax.Array  # what only checks and evaluation read

Predict = Callable[[Images], Logits]  # parameters already inside, eval mode
PredictWithKey = Callable[[Key, Images], Logits]  # a randomised model
LossFn = Callable[[Logits, Labels], PerExample]
Objective = Callable[[Images], PerExample]


class Attack(Protocol):
    """`attack(predict, key, images, labels) -> images`: inside the threat's ball and box."""

    def __call__(self, predict: Predict, key: Key, images: Images, labels: Labels) -> Images: ...


class Threat(Protocol):
    """A norm ball around each image, cut by the box of valid images: a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    norm: ClassVar[str]

    @property
    def eps(self) -> float | Array: ...
    @property
    def bounds(self) -> tuple[float, float]: ...
    def diameter(self, n: float) -> float: ...
    def project(self, x_adv: Images, x: Images) -> Images: ...
    def sample(self, key: Key, x: Images) -> Images: ...
    def ascent(self, grad: Images, x: Images, step_size: float | PerExample) -> Images: ...
    def distance(self, x_adv: Images, x: Images) -> PerExample: ...
    def dual_norm(self, grad: Images) -> PerExample: ...
    def step_to_hyperplane(self, x: Images, normal: Images, gap: PerExample) -> Images: ...
    def scaled(self, factor: float | PerExample) -> "Threat": ...
    def with_eps(self, eps: float | PerExample) -> "Threat": ...
    def rounded(self, x_adv: Images, x: Images, levels: int) -> Images: ...


class Static:
    """What of a pytree is no array: compared by equality, hashable, an argument of the program.

    Args:
      tree: the pytree's structure.
      leaves: its leaves, None in the places of arrays.
    """

    def __init__(self, tree: Any, leaves: Sequence[Any]):
        self.tree, self.leaves = tree, tuple(leaves)

    def join(self, arrays: Sequence[Array]) -> PyTree:
        """The pytree with these arrays in their places."""
        waiting = iter(arrays)
        leaves = [next(waiting) if leaf is None else leaf for leaf in self.leaves]
        return jax.tree.unflatten(self.tree, leaves)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and (self.tree, self.leaves) == (other.tree, other.leaves)

    def __hash__(self) -> int:
        return hash(self.tree)


def partition(variables: PyTree) -> tuple[list[Any], Static]:
    """A pytree's arrays and the rest: an Equinox module holds functions beside its weights.

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

    Raises:
      ValueError: `key` is no typed key, or has another shape.
    """
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
    """`jax.random.fold_in` of one number, or of one per example, for a key or one per example."""
    if key.ndim:
        return jax.vmap(jax.random.fold_in, (0, 0 if jnp.ndim(data) else None))(key, data)
    return jax.random.fold_in(key, data)


def per_example(value: float | Array, x: Array) -> Array:
    """`value`, () or (B,), shaped to broadcast against `x` (B, ...), in x's dtype.

    Raises:
      ValueError: `value` has another shape.
    """
    value = jnp.asarray(value, x.dtype)
    if value.ndim > 1 or (value.ndim == 1 and value.shape[0] != x.shape[0]):
        raise ValueError(f"need one value or one per example ({x.shape[0]}), got {value.shape}")
    return value.reshape(value.shape + (1,) * (x.ndim - 1)) if value.ndim else value
