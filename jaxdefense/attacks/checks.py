"""Bad input gets a clear ValueError before anything is compiled.

The checks look at values, so they run on concrete arrays only: inside a caller's `jit` the arrays
are tracers and the caller's own code is trusted.
"""

import functools
import inspect
import math
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdefense import files, validate
from jaxdefense.types import (
    Array,
    HostArray,
    Threat,
    example_keys,
)


def _concrete(*arrays: Any) -> bool:
    return not any(isinstance(a, jax.core.Tracer) for a in arrays)


@jax.jit
def _least_and_largest(array: Array) -> tuple[Array, Array]:
    least, largest = array.min(), array.max()
    if jnp.issubdtype(array.dtype, jnp.floating):  # on a CPU, XLA's minimum passes over NaN
        missing = jnp.isnan(array).any()
        least, largest = (jnp.where(missing, jnp.nan, end) for end in (least, largest))
    return least, largest


def _extent(array: HostArray) -> tuple[float, float]:
    """The least and the largest value of a concrete array, also while a program is traced."""
    if isinstance(array, np.ndarray):
        return array.min(), array.max()
    with jax.ensure_compile_time_eval():
        return jax.device_get(_least_and_largest(array))


def check_threat(threat: Any, attack: str = "") -> None:
    """Checks that `threat` is a norm with eps and bounds, as in `jaxdefense.threat`.

    Args:
      threat: what was given.
      attack: name of the factory whose first argument it is.

    Raises:
      ValueError: something else, a bare eps for example.
    """
    if not hasattr(threat, "eps") or not hasattr(threat, "project"):
        needed = "the threat must be a norm with its eps, e.g. threat.Linf(8 / 255)"
        if attack:
            needed = f"{attack} needs a threat first, e.g. {attack}(threat.Linf(8 / 255))"
        raise ValueError(f"{needed}, got {threat!r}")


def _is_linen_module(model: Any) -> bool:
    """Whether it is a Flax linen module; Flax, which is optional, is not imported for it."""
    names = [(base.__module__, base.__name__) for base in type(model).__mro__]
    return ("flax.linen.module", "Module") in names


def takes(function: Any, count: int) -> bool | None:
    """Whether `function` can be called with `count` positional arguments; None if nobody can tell.

    Of a linen network's `apply`, whose signature takes any number, it is told as of
    (variables, images).

    Args:
      function: any callable.
      count: how many.
    """
    while isinstance(function, jax.stages.Wrapped) and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    inner = function
    while isinstance(inner, functools.partial) and not inner.args:
        inner = inner.func
    is_apply = isinstance(inner, types.MethodType) and inner.__name__ == "apply"
    if is_apply and _is_linen_module(inner.__self__) and count < 2:
        return False
    try:  # a wrapper's own signature: it may fill in arguments of what it wraps
        signature = inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def check_takes(
    role: str, function: Any, inputs: tuple[str, ...], *, variables: bool, way: str
) -> None:
    """Checks by its signature, if there is one, whether a model takes variables before its inputs.

    Args:
      role: the argument's name, for the message.
      function: what was given.
      inputs: ("images",), or ("key", "images") for a randomised model.
      variables: whether it will be given variables first.
      way: what to give instead if it is of the other kind.

    Raises:
      ValueError: it is no function, a PyTorch module or a linen module without its variables, it
        takes variables where none will be given, or none where they will be, or neither.
    """
    if not callable(function):
        instead = ": give its predict" if hasattr(function, "predict") else ""
        raise ValueError(f"{role} must be a function, got {type(function).__name__}{instead}")
    if hasattr(function, "state_dict") and hasattr(function, "named_parameters"):
        raise ValueError(
            f"{role} is a PyTorch module: give what models.torch_bridge.from_module makes of it"
        )
    if _is_linen_module(function) and function.scope is None:
        raise ValueError(f"{role} is a Flax module: give its apply (net.apply), and its variables")
    both = ("variables", *inputs)
    wanted, other = (both, inputs) if variables else (inputs, both)
    if takes(function, len(wanted)) is False:
        if takes(function, len(other)):
            raise ValueError(f"{role} takes ({', '.join(other)}): {way}")
        raise ValueError(f"{role} must take ({', '.join(wanted)}): wrap it in a function that does")


def is_key(value: Any) -> bool:
    """Whether it is a typed key, or several.

    Args:
      value: anything.
    """
    return isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def check_keys(key: Any, batch: int) -> None:
    """Checks that `key` is one typed key or one per example.

    Args:
      key: what was given.
      batch: B.

    Raises:
      ValueError: something else.
    """
    example_keys(key, batch)


# How far values may lie outside the box, as a share of its width: undoing a normalisation leaves
# rounding errors of that size.
_EDGE = 1e-5


def check_images(images: HostArray, bounds: tuple[float, float] | None = (0.0, 1.0)) -> Any:
    """Checks that images are floating, finite and inside the bounds, and clips rounding errors.

    Args:
      images: (B, ...).
      bounds: (low, high), or None where they are not known.

    Returns:
      The images, clipped where a value lies outside by at most 1e-5 of the box's width.

    Raises:
      ValueError: integer images, no batch axis, no image, NaN, or values outside.
    """
    if not hasattr(images, "dtype"):
        raise ValueError(f"images must be an array (B, H, W, C), got {type(images).__name__}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images must be floating in {bounds}, got {images.dtype}; divide uint8 by 255"
        )
    if images.ndim < 2:
        raise ValueError(f"images must be a batch (B, H, W, C), got shape {images.shape}")
    if images.size == 0:
        raise ValueError(f"there are no images: shape {images.shape}")
    if not _concrete(images):
        return images
    low, high = map(float, _extent(images))
    if not np.isfinite(low) or not np.isfinite(high):
        raise ValueError("images contain NaN or infinite values")
    if bounds is None or (low >= bounds[0] and high <= bounds[1]):
        return images
    slack = _EDGE * (bounds[1] - bounds[0])
    if low < bounds[0] - slack or high > bounds[1] + slack:
        raise ValueError(
            f"images must lie in {bounds}, got [{low:g}, {high:g}]; normalise inside the model, "
            f"or give the threat the bounds of your images"
        )
    return images.clip(*bounds)


def check_label_count(labels: HostArray, batch: int) -> None:
    """Checks that labels are (B,) integers.

    Args:
      labels: what was given.
      batch: B.

    Raises:
      ValueError: another shape or dtype, as where one image is no batch.
    """
    if labels.shape == (batch,) and jnp.issubdtype(labels.dtype, jnp.integer):
        return
    told = f"labels must be ({batch},) integers, got shape {labels.shape} of {labels.dtype}"
    if labels.ndim == 0:
        told += "; one image is a batch of one: images[None], labels[None]"
    raise ValueError(told)


def check_labels(labels: HostArray, batch: int, num_classes: int) -> None:
    """Checks that labels are (B,) integers in [0, num_classes).

    Args:
      labels: what was given.
      batch: B.
      num_classes: K.

    Raises:
      ValueError: another shape or dtype, or labels out of range.
    """
    check_label_count(labels, batch)
    if batch == 0 or not _concrete(labels):
        return
    low, high = map(int, _extent(labels))
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels must be in [0, {num_classes}), got values in [{low}, {high}]")


def check_outputs(logits: Any, batch: int) -> None:
    """Checks by its shape that predict's output is an array (B, K) with K >= 2.

    Args:
      logits: an array, or its shape and dtype.
      batch: B.

    Raises:
      ValueError: a tuple, a dict, one logit, or another shape; the way out is said.
    """
    if not hasattr(logits, "shape"):
        kind = type(logits).__name__
        way = 'lambda x: predict(x)["logits"]' if isinstance(logits, dict) else "predict(x)[0]"
        raise ValueError(f"predict must return logits (B, K), got a {kind}: give e.g. {way}")
    if logits.shape in ((batch,), (batch, 1)):
        raise ValueError(
            f"predict must return logits (B, K >= 2), got one an image, {logits.shape}: give "
            f"attacks.binary(predict), whose two classes are the logit's two signs"
        )
    if len(logits.shape) != 2 or logits.shape[0] != batch:
        raise ValueError(f"predict must return logits ({batch}, K >= 2), got {logits.shape}")


def check_logits(logits: HostArray, batch: int) -> None:
    """Checks that logits are (B, K), finite and not probabilities.

    Args:
      logits: predict's output.
      batch: B.

    Raises:
      ValueError: another shape, NaN, or rows that are probabilities (in [0, 1] with sum 1).
    """
    check_outputs(logits, batch)
    if batch == 0 or not _concrete(logits):
        return
    values = np.asarray(logits, np.float32)
    if not np.all(np.isfinite(values)):
        rows = np.flatnonzero(~np.isfinite(values).all(-1))[:5].tolist()
        raise ValueError(f"predict returned NaN or infinite logits, first at rows {rows}")
    if values.min() >= 0 and values.max() <= 1 and np.allclose(values.sum(-1), 1, atol=1e-2):
        raise ValueError(
            "predict returned probabilities (rows in [0, 1] with sum 1); attacks need logits: "
            "leave out the softmax"
        )


def check_eps(threat: Threat, images: HostArray) -> None:
    """Checks that eps is one or one per example, and no larger than images of this size allow.

    Args:
      threat: norm, eps, bounds.
      images: (B, ...).

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
    """Checks that an option is None, or one or several finite numbers that are not negative.

    Args:
      name: of the option, for the message.
      value: of the option.

    Raises:
      ValueError: otherwise.
    """
    if value is None or not _concrete(value):
        return
    array = np.asarray(value)
    if array.dtype.kind not in "iuf" or not np.all(np.isfinite(array)) or np.any(array < 0):
        raise ValueError(f"{name} must be finite and not negative, got {value!r}")


def check_attack_name(name: object) -> None:
    """Checks a name that an attack has in an evaluation: results and files are called so.

    Args:
      name: of a config or a caller.

    Raises:
      ValueError: no text, one that cannot name a file, or "clean", which is the images' own.
    """
    files.check_name("attack", name)
    if name == "clean":
        raise ValueError("no attack may be called 'clean', as the accuracy without one is")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Checks that an option is a Python integer of at least `least`.

    Args:
      name: of the option, for the message.
      value: of the option.
      least: smallest allowed.

    Raises:
      ValueError: otherwise, or more than JAX counts with.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    if value > validate.LARGEST:
        raise ValueError(f"{name} must be at most {validate.LARGEST}, got {value!r}")


def count_classes(predict: Any, images: HostArray, *, keyed: bool = False) -> int:
    """K, from the shape of predict's output; nothing is computed.

    Args:
      predict: images -> logits, or (key, images) -> logits where `keyed`.
      images: (B, ...).
      keyed: whether predict takes a key first.

    Raises:
      ValueError: predict does not return (B, K), or changes its own state while it is traced.
    """
    image = jax.ShapeDtypeStruct(images.shape, jax.dtypes.canonicalize_dtype(images.dtype))
    first = (jax.eval_shape(lambda: jax.random.key(0)),) if keyed else ()
    try:
        logits = jax.eval_shape(lambda *arguments: predict(*arguments), *first, image)
    except Exception as error:
        if type(error).__name__ != "TraceContextError":
            raise
        raise ValueError(
            "predict changes its own state while it is traced, as an NNX module in train mode "
            "does: call model.eval() first"
        ) from error
    check_outputs(logits, images.shape[0])
    return logits.shape[1]
