"""What the networks share: input checks, normalisation, initialisers, pooling, layer defaults."""

import dataclasses
import functools
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxdefense import registry, validate
from jaxdefense.conv import conv, depth_to_space

Module = TypeVar("Module", bound=nn.Module)

DTYPES = ("float32", "bfloat16")


def build(cls: type[Module], num_classes: int, kwargs: Mapping[str, Any]) -> Module:
    """`cls(num_classes, **kwargs)`, with errors that name the allowed fields.

    Args:
      cls: a module class whose field `num_classes` is K.
      num_classes: K, at least 2.
      kwargs: the other fields. `dtype` may be a name or a dtype; it is stored as a name.

    Raises:
      ValueError: K < 2, an unknown field, or a dtype that is not one of `DTYPES`.
    """
    if not isinstance(num_classes, int | np.integer) or num_classes < 2 or num_classes is True:
        raise ValueError(f"need num_classes, an integer of at least 2, got {num_classes!r}")
    return _construct(cls, {"num_classes": int(num_classes)}, kwargs)


def build_generator(cls: type[Module], channels: int, kwargs: Mapping[str, Any]) -> Module:
    """`cls(channels, **kwargs)` for a generator's class, with `build`'s errors.

    Args:
      cls: a module class whose field `channels` is C.
      channels: C, at least 1.
      kwargs: the other fields, as in `build`.

    Raises:
      ValueError: no channels, an unknown field, or a dtype that is not one of `DTYPES`.
    """
    if not isinstance(channels, int | np.integer) or channels < 1 or channels is True:
        raise ValueError(f"need channels, an integer of at least 1, got {channels!r}")
    return _construct(cls, {"channels": int(channels)}, kwargs)


def _construct(cls: type[Module], first: Mapping[str, int], kwargs: Mapping[str, Any]) -> Module:
    inherited = (*first, "parent", "name")
    allowed = [f.name for f in dataclasses.fields(cls) if f.name not in inherited]
    registry.check_known(f"argument of {cls.__name__}", kwargs, allowed)
    # A config's lists become tuples: a module that is a static argument of `jit` must be hashable.
    kwargs = {key: tuple(v) if isinstance(v, list) else v for key, v in kwargs.items()}
    if "dtype" in kwargs:
        kwargs["dtype"] = dtype_name(kwargs["dtype"])
    validate.check_types("model", kwargs, typing.get_type_hints(cls))
    sizes = {key: v for key, v in kwargs.items() if key not in _NOT_SIZES}
    validate.check_positive_numbers("model", sizes, most=_LARGEST)
    for key in ("mean", "std"):
        _check_channels(key, kwargs.get(key))
    return cls(**first, **kwargs)


# Fields of networks that are no sizes: they check their own range.
_LARGEST = 100_000  # channels, blocks: more would not fit any device
_NOT_SIZES = ("mask", "padding")


def _check_channels(name: str, values: Sequence[float] | None) -> None:
    """Refuses a mean or std that holds anything but finite numbers, or a std of 0 or less."""
    numbers = {f"{name}[{i}]": value for i, value in enumerate(values or ())}
    validate.check_types("model", numbers, dict.fromkeys(numbers, float))
    if name == "std":
        validate.check_positive_numbers("model", numbers)


def dtype_name(dtype: Any) -> str:
    """The name of a compute dtype: "float32" or "bfloat16".

    Raises:
      ValueError: another dtype.
    """
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise ValueError(f"unknown compute dtype {dtype!r}; allowed: {', '.join(DTYPES)}")
    return name


def normalise(
    x: jax.Array, mean: Sequence[float] | None, std: Sequence[float] | None, dtype: str
) -> jax.Array:
    """(x - mean) / std per channel, computed in float32, in the compute dtype.

    Args:
      x: (B, H, W, C) floats in [0, 1].
      mean: C numbers, or None for 0.
      std: C positive numbers, or None for 1.
      dtype: the compute dtype.

    Returns:
      (B, H, W, C) of `dtype`.

    Raises:
      ValueError: x is not of rank 4 or not floating; mean or std do not fit the channels.
    """
    if x.ndim != 4:
        raise ValueError(f"need images (B, H, W, C), got an array of shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"need float images in [0, 1], got {x.dtype}; divide by 255 first")
    for label, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != x.shape[-1]:
            raise ValueError(f"{label} {tuple(values)} does not fit {x.shape[-1]} channels")
    if std is not None and min(std) <= 0:
        raise ValueError(f"std must be positive, got {tuple(std)}")
    x = x.astype(jnp.float32)
    if mean is not None:
        x = x - jnp.asarray(mean, jnp.float32).reshape(1, 1, 1, -1)
    if std is not None:
        x = x / jnp.asarray(std, jnp.float32).reshape(1, 1, 1, -1)
    return x.astype(dtype_name(dtype))


def convolutions(shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those of PyTorch's weights that are convolutions', (out, in, height, width).

    Args:
      shapes: {layer: shape of its weight}, in order.
    """
    return [shape for shape in shapes.values() if len(shape) == 4]


def scaled(channels: int, width: float) -> int:
    """`channels` times `width`, rounded, at least 1."""
    return max(1, round(channels * width))


def max_pool2(x: jax.Array) -> jax.Array:
    """2x2 maximum with stride 2; an odd last row or column is dropped, as VALID does.

    By two comparisons, so that each gradient goes to one pixel, of equal ones to the first. The
    gradient of `max` would divide it among those that equal the maximum; a compiler that computes
    x anew for that comparison, rounding differently, finds none, and 0 / 0 is NaN (XLA:CPU without
    optimisations does). Its own takes a tenth of `nn.max_pool`'s on the CPU.

    Args:
      x: (B, H, W, C), H and W at least 2.

    Returns:
      (B, H // 2, W // 2, C).
    """
    b, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2 * c)
    upper, lower = x[:, :, 0], x[:, :, 1]
    x = jnp.where(upper >= lower, upper, lower)
    left, right = x[..., :c], x[..., c:]
    return jnp.where(left >= right, left, right)


def spread2(x: jax.Array) -> jax.Array:
    """Channels as 2x2 blocks of pixels: (B, H, W, 4 C) -> (B, 2 H, 2 W, C).

    After a 3x3 convolution it can do what a 4x4 transposed convolution with stride 2 does, and
    its gradients are those of an ordinary convolution.

    Reference: Shi et al., arXiv 1609.05158.
    """
    return depth_to_space(x, (2, 2))


# PyTorch's defaults, which the published recipes rely on: weights and biases of convolutions and
# linear layers from U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def bias_init(fan_in: int) -> nn.initializers.Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the bias of a layer with `fan_in` inputs per output."""

    def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return init


# Every convolution of the package: PyTorch's initialiser and the explicit gradients of conv.py.
Conv = functools.partial(nn.Conv, kernel_init=kernel_init, conv_general_dilated=conv)

# PyTorch's BatchNorm2d: its momentum .1 weighs the new value, Flax's .9 the old one. (Flax keeps
# the biased variance in its running average, PyTorch the unbiased one: they differ by 1/(BHW).)
BatchNorm = functools.partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)


class Classifier(nn.Module):
    """The fields that every classifier has.

    Attributes:
      num_classes: K.
      dtype: compute dtype, "float32" or "bfloat16"; parameters and logits are float32.
      mean: C numbers subtracted inside the model, or None.
      std: C numbers divided by inside the model, or None.
    """

    num_classes: int
    dtype: str = "float32"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


class NormedClassifier(Classifier):
    """The fields of a classifier with BatchNorm.

    Attributes:
      bn_axis: mapped axis over which BatchNorm averages in training, or None.
      bn_sets: number of BatchNorm sets, of which a call's `bn_set` uses one.

    Further attributes: those of `Classifier`.
    """

    bn_axis: str | None = None
    bn_sets: int = 1

    @property
    def norm_fields(self) -> dict[str, Any]:
        """The fields of a `NormedBlock` inside this network."""
        return {"dtype": self.dtype, "bn_axis": self.bn_axis, "bn_sets": self.bn_sets}


class NormedBlock(nn.Module):
    """The fields of a block inside a `NormedClassifier`.

    Attributes:
      dtype: compute dtype.
      bn_axis: mapped axis over which BatchNorm averages, or None.
      bn_sets: number of BatchNorm sets.
    """

    dtype: str
    bn_axis: str | None
    bn_sets: int


def has_bn_sets(model: nn.Module) -> bool:
    """Whether a network can keep several sets of BatchNorm, i.e. has BatchNorm and `bn_sets`."""
    return hasattr(model, "bn_sets") and getattr(model, "bn", True)


def batch_norm(module: nn.Module, x: jax.Array, name: str, *, train: bool, which: int) -> jax.Array:
    """BatchNorm number `which` of the module's `bn_sets`; call it inside a compact method.

    A network with several sets has one set of scales, biases and statistics for each kind of
    input (clean, adversarial) and shares all else. Set 0 is called `name`, set k `name_set{k}`;
    all exist from initialisation on.

    Args:
      module: the caller, with fields `dtype`, `bn_axis` and `bn_sets`.
      x: (B, ..., C).
      name: of set 0's submodule.
      train: whether the batch's statistics are used and followed.
      which: 0 .. bn_sets - 1, static.

    Raises:
      ValueError: the module has no such set.

    Reference: Xie et al., Adversarial examples improve image recognition, arXiv 1911.09665.
    """
    if not 0 <= which < module.bn_sets:
        raise ValueError(f"bn_set must be below bn_sets ({module.bn_sets}), got {which}")
    out = {}
    for k in range(module.bn_sets) if module.is_initializing() else (which,):
        out[k] = BatchNorm(
            use_running_average=not train,
            dtype=module.dtype,
            axis_name=module.bn_axis,
            name=f"{name}_set{k}" if k else name,
        )(x)
    return out[which]


def convolve(
    x: jax.Array, channels: int, size: int, stride: int, *, name: str, **kwargs: Any
) -> jax.Array:
    """`Conv` of an odd size or of twice its stride, padded so that H becomes H / stride.

    Call it inside a compact method. The bias has PyTorch's initialiser.

    Args:
      x: (B, H, W, C).
      channels: of the result.
      size: of the kernel's side.
      stride: of the convolution.
      name: of the submodule.
      **kwargs: of `Conv`.
    """
    padding = (size - stride + 1) // 2
    kwargs = {"bias_init": bias_init(size**2 * x.shape[-1]), **kwargs}
    return Conv(channels, (size, size), strides=stride, padding=padding, name=name, **kwargs)(x)


def dense(features: int, fan_in: int, **kwargs: Any) -> nn.Dense:
    """A linear layer with PyTorch's initialisers."""
    return nn.Dense(features, kernel_init=kernel_init, bias_init=bias_init(fan_in), **kwargs)


def classify(
    x: jax.Array, num_classes: int, features: bool
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The linear layer `head`, in float32; call it inside a compact method.

    Args:
      x: (B, D), the encoder's output.
      num_classes: K.
      features: whether to return x too.

    Returns:
      logits (B, K) float32, or (logits, x as float32).
    """
    x = x.astype(jnp.float32)
    logits = dense(num_classes, x.shape[-1], name="head")(x)
    return (logits, x) if features else logits
