"""Bad input gets a clear ValueError before anything is compiled.

The checks look at values, so they run on concrete arrays only: inside a caller's `jit` the arrays
are tracers and the caller's own code is trusted.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdefense.types import (
    Array,
    Attack,
    HostArray,
    Images,
    Key,
    Labels,
    Logits,
    Predict,
    Threat,
    example_keys,
)


def _concrete(*arrays: Any) -> bool:
    return not any(isinstance(a, jax.core.Tracer) for a in arrays)


@jax.jit
def _least_and_largest(array: Array) -> tuple[Array, Array]:
    return array.min(), array.max()


def _extent(array: HostArray) -> tuple[float, float]:
    """The least and the largest value of concrete values, which may be met inside a jit."""
    if isinstance(array, np.ndarray):
        return array.min(), array.max()
    with jax.ensure_compile_time_eval():
        low, high = jax.device_get(_least_and_largest(array))
    return low, high


def check_images(images: HostArray, bounds: tuple[float, float] = (0.0, 1.0)) -> None:
    """Floating, finite, inside the bounds.

    Raises:
      ValueError: integer images, no batch axis, NaN, or values outside.
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images must be floating in {bounds}, got {images.dtype}; divide uint8 by 255"
        )
    if images.ndim < 2:
        raise ValueError(f"images must be a batch (B, H, W, C), got shape {images.shape}")
    if images.size == 0 or not _concrete(images):
        return
    low, high = _extent(images)
    if not np.isfinite(low) or not np.isfinite(high):
        raise ValueError("images contain NaN or infinite values")
    if low < bounds[0] or high > bounds[1]:
        raise ValueError(
            f"images must lie in {bounds}, got [{low:g}, {high:g}]; normalise inside the model, "
            f"or give the threat the bounds of your images"
        )


def check_labels(labels: HostArray, batch: int, num_classes: int) -> None:
    """(B,) integers in [0, num_classes).

    Raises:
      ValueError: another shape or dtype, or labels out of range.
    """
    if labels.shape != (batch,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be ({batch},) integers, got shape {labels.shape} of {labels.dtype}"
        )
    if batch == 0 or not _concrete(labels):
        return
    low, high = map(int, _extent(labels))
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels must be in [0, {num_classes}), got values in [{low}, {high}]")


def check_logits(logits: HostArray, batch: int) -> None:
    """(B, K) finite logits that are not probabilities.

    Raises:
      ValueError: another shape, NaN, or rows that are probabilities (in [0, 1] with sum 1).
    """
    if logits.ndim != 2 or logits.shape[0] != batch or logits.shape[1] < 2:
        raise ValueError(f"predict must return logits ({batch}, K >= 2), got {logits.shape}")
    if batch == 0 or not _concrete(logits):
        return
    values = np.asarray(logits, np.float32)
    if not np.all(np.isfinite(values)):
        rows = np.flatnonzero(~np.isfinite(values).all(-1))[:5].tolist()
        raise ValueError(f"predict returned NaN or infinite logits, first at rows {rows}")
    if values.min() >= 0 and values.max() <= 1 and np.allclose(values.sum(-1), 1, atol=1e-3):
        raise ValueError(
            "predict returned probabilities (rows in [0, 1] with sum 1); attacks need logits: "
            "leave out the softmax"
        )


def check_eps(threat: Threat, images: HostArray) -> None:
    """eps can be meant for images of this size, and is one or one per example.

    Raises:
      ValueError: eps larger than the box's diameter in the threat's norm, or of another length.
    """
    if not _concrete(threat.eps):
        return
    eps = np.asarray(threat.eps)
    if eps.ndim == 1 and eps.shape[0] != images.shape[0]:
        raise ValueError(f"eps has {eps.shape[0]} entries for {images.shape[0]} images")
    diameter = threat.diameter(math.prod(images.shape[1:]))
    if eps.size and eps.max() > diameter * (1 + 1e-6):
        raise ValueError(
            f"eps={eps.max():g} is larger than the box of images of shape {images.shape[1:]} "
            f"({diameter:g}); eps is in image units: write 128/255, not 128"
        )


def check_step(name: str, value: Any) -> None:
    """A positive finite number (or numbers).

    Raises:
      ValueError: otherwise.
    """
    if value is None or not _concrete(value):
        return
    array = np.asarray(value)
    if array.dtype == object or not np.all(np.isfinite(array)) or np.any(array < 0):
        raise ValueError(f"{name} must be finite and not negative, got {value!r}")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """A Python integer of at least `least`.

    Raises:
      ValueError: otherwise.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


def num_classes(predict: Predict, images: HostArray) -> int:
    """K, from the shape of predict's output; nothing is computed.

    Raises:
      ValueError: predict does not return (B, K).
    """
    shape = jax.eval_shape(predict, jax.ShapeDtypeStruct(images.shape, images.dtype))
    if not hasattr(shape, "shape") or len(shape.shape) != 2 or shape.shape[0] != images.shape[0]:
        raise ValueError(
            f"predict must map images {images.shape} to logits ({images.shape[0]}, K), "
            f"got {jax.tree.map(lambda s: s.shape, shape)}"
        )
    return shape.shape[1]


def checked(attack: Attack, threat: Threat, name: str, *, spatial: bool = False) -> Attack:
    """`attack` behind the checks that its concrete inputs allow.

    Args:
      attack: gets and returns the images as rows (B, H W C), unless `spatial`: over the few
        channels of pixels, XLA:CPU's norms take ten times as long.
      threat: of the attack.
      name: of the function returned.
      spatial: the attack needs (B, H, W, C).
    """

    @functools.wraps(attack)
    def call(predict: Predict, key: Key, images: Images, labels: Labels) -> Images:
        images, labels = jnp.asarray(images), jnp.asarray(labels)
        check_images(images, threat.bounds)
        check_eps(threat, images)
        example_keys(key, images.shape[0])
        check_labels(labels, images.shape[0], num_classes(predict, images))
        if spatial:
            return attack(predict, key, images, labels)

        def predict_rows(z: Array) -> Logits:
            return predict(z.reshape(z.shape[0], *images.shape[1:]))

        rows = images.reshape(images.shape[0], math.prod(images.shape[1:]))
        return attack(predict_rows, key, rows, labels).reshape(images.shape)

    call.__name__ = call.__qualname__ = name
    return call
