"""PyTorch's weights in the networks here: names, layouts, BatchNorm and normalisation.

A network's file may hold two things for this, both about layer names without a common prefix such
as "module.":

    TORCH                    pairs (pattern, replacement) that `re.sub` applies in turn to a
                             PyTorch layer's name, and that make it ours; to "" where it is not used
    torch_options(shapes)    the network's fields that {layer: shape of its weight} tells

Without TORCH, convolutions, linear layers and BatchNorms are matched by their order. Nothing here
imports torch: a tensor is asked for its NumPy array.
"""

from __future__ import annotations

import functools
import itertools
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdefense import extras, models, registry
from jaxdefense.models import zoo
from jaxdefense.types import HostArray

TOLERANCE = 1e-4  # of the check: of the largest logit; right weights differ by some 1e-6 of it
_EPS = 1e-5  # of `layers.BatchNorm`, and PyTorch's default
_OURS = {"bias": "bias", "running_mean": "mean", "running_var": "var"}
_KINDS = {4: "convolutions", 2: "linear layers", 1: "BatchNorms"}  # by a weight's dimensions
_MEANS, _STDS = ("mean", "mu"), ("std", "sigma")  # buffers of a layer that normalises images
_SIDES = (32, 28, 8, 16, 64, 224)  # of images, in the order in which they are tried

# Normalisations of published recipes by channels, tried where logits disagree.
_USUAL = {
    1: (((0.1307,), (0.3081,)), ((0.2860,), (0.3530,)), ((0.5,), (0.5,))),
    3: (
        ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
        ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ),
}


def from_torch(
    name: str,
    state_dict: Any,
    *,
    images: HostArray | None = None,
    logits: HostArray | None = None,
    tolerance: float = TOLERANCE,
    bn_eps: float = _EPS,
    image_shape: tuple[int, int, int] | None = None,
    **fields: Any,
) -> zoo.Loaded:
    """A registered network with the weights of a PyTorch state dict.

    Layouts: pytorch-cifar's and RobustBench's ResNet and PreActResNet, torchvision's ResNet (with
    its 7x7 stem, or a 3x3 one in its place), the WideResNet of TRADES and RobustBench,
    pytorch-cifar's VGG and MobileNetV2; CNN, LeNet, MNISTNet and VGG by the order of their layers,
    whatever these are called. Kernels are transposed, the first linear layer's rows reordered from
    PyTorch's flatten (C, H, W) to (H, W, C), a convolution's bias before BatchNorm goes into its
    mean. Buffers called mean and std (or mu and sigma) become the network's own normalisation.

    Names and shapes may fit although the function differs: another normalisation, eps, padding,
    activation. Give `images` and the `logits` that PyTorch has for them.

    Args:
      name: one of `models.names()`.
      state_dict: {name: array or tensor}, what `torch.load(weights_only=True)` gave, or the path
        of a .npz or .safetensors file.
      images: (B, C, H, W) or (B, H, W, C) in [0, 1], before any normalisation, to check with.
      logits: (B, K), the PyTorch model's in eval mode for these images.
      tolerance: largest difference allowed, as a part of the largest logit.
      bn_eps: the eps of PyTorch's BatchNorms; another than 1e-5 is put into the variances.
      image_shape: (H, W, C); default that of `images`, or a usual one that fits.
      **fields: of the network: `mean` and `std` of the normalisation, and what shapes do not tell.
        Width, depth, number of classes and the like are read from the shapes.

    Returns:
      The module, its variables, and "image_shape", "layers" {PyTorch's name: ours}, "assumed" and,
      with logits, the largest "difference".

    Raises:
      ValueError: entries that are missing, left over, of another shape (all are named) or not
        finite, images that are not in [0, 1], or logits that differ.

    >>> import numpy as np
    >>> from jaxdefense import models
    >>> shapes = {"0": (4, 1, 4, 4), "2": (8, 4, 4, 4), "5": (25, 32), "7": (10, 25)}
    >>> state = {f"{k}.weight": np.ones(s, np.float32) for k, s in shapes.items()}
    >>> state |= {f"{k}.bias": np.zeros(s[0], np.float32) for k, s in shapes.items()}
    >>> module, variables, meta = models.from_torch("cnn", state, mean=[0.1307], std=[0.3081])
    >>> module.width, meta["image_shape"], meta["layers"]["5"]
    (0.25, (8, 8, 1), 'fc1')
    """
    if (images is None) != (logits is None):
        raise ValueError("the check needs both images and their logits")
    with extras.required("train", __name__):
        network = registry.load(sys.modules[models.__name__], name, "model")
    arrays = _arrays(state_dict)
    if broken := [key for key, array in arrays.items() if not np.all(np.isfinite(array))]:
        raise ValueError(f"the state dict holds values that are not finite: {', '.join(broken)}")
    state = _State.of(arrays)
    if not state.by_kind(4) or not state.by_kind(2):
        raise ValueError("the state dict needs convolutions and a linear layer")
    channels = state.shapes()[_first_convolution(state)][1]
    if images is not None:
        images = _nhwc(images, channels)
        image_shape = tuple(images.shape[1:])  # type: ignore[assignment]

    def convert(bn_eps: float, fields: Mapping[str, Any]) -> zoo.Loaded:
        made = {**state.normalisation, **_options(network, state), **fields}
        module = models.make(name, made.pop("num_classes"), **made)
        first_error: ValueError | None = None
        for shape in [image_shape] if image_shape else _shapes(channels):
            try:
                return _convert(module, network, state, shape, bn_eps)
            except ValueError as error:
                first_error = first_error or error
        raise ValueError(f"{name} cannot take this state dict: {first_error}") from first_error

    loaded = convert(bn_eps, fields)
    if images is None:
        return loaded
    want = _numpy(logits)
    if not np.all(np.isfinite(want)):
        raise ValueError("the logits to check with are not finite")
    difference = _difference(loaded.module, loaded.variables, images, want)
    allowed = tolerance * float(np.abs(want).max())
    if difference <= allowed:
        return loaded._replace(meta={**loaded.meta, "difference": difference})
    # Without its own normalisation, the network is compiled once for all that is tried.
    bare = convert(bn_eps, {**fields, "mean": None, "std": None}).module
    eps = (bn_eps, 1e-3) if state.has_batch_norm() else (bn_eps,)
    own = (loaded.module.mean, loaded.module.std)
    hint = ""
    for other, (mean, std) in itertools.product(eps, (own, *_USUAL.get(channels, ()))):
        normalised = (images - np.float32(mean or 0)) / np.float32(std or 1)
        tried = _difference(bare, convert(other, fields).variables, normalised, want)
        if tried <= allowed:
            hint = f"; with mean={mean}, std={std}, bn_eps={other} they agree"
            break
    raise ValueError(
        f"the logits differ by up to {difference:.3g}, and {allowed:.2g} is allowed: another "
        f"normalisation, BatchNorm eps, padding or activation{hint}"
    )


class _State(NamedTuple):
    """A state dict by layers.

    Attributes:
      layers: {name without the common prefix: {"weight": ..., "bias": ...}}, in their order.
      normalisation: "mean" and "std" of the images, where buffers hold them.
      prefix: the common one.
      unknown: keys that belong to no layer of a known kind.
    """

    layers: dict[str, dict[str, np.ndarray]]
    normalisation: dict[str, tuple[float, ...]]
    prefix: str
    unknown: list[str]

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> _State:
        layers: dict[str, dict[str, np.ndarray]] = {}
        normalisation, unknown = {}, []
        for key, array in arrays.items():
            layer, _, kind = key.rpartition(".")
            if kind in ("weight", *_OURS):
                layers.setdefault(layer, {})[kind] = array
            elif kind in (*_MEANS, *_STDS) and array.size in (1, 3):
                ours = "mean" if kind in _MEANS else "std"
                normalisation[ours] = tuple(float(value) for value in array.ravel())
            elif kind != "num_batches_tracked":
                unknown.append(key)
        weights = [layer for layer, kinds in layers.items() if "weight" in kinds]
        if not weights:
            raise ValueError(f"no weights among the keys: {zoo.shorten(list(arrays)) or 'none'}")
        prefix = _common_prefix(weights)
        # A file of sorted keys has lost the order: sorted with numbers as numbers, conv2 is before
        # conv10.
        names = sorted(layers, key=_natural) if list(layers) == sorted(layers) else list(layers)
        layers = {name.removeprefix(prefix): layers[name] for name in names}
        return cls(layers, normalisation, prefix, unknown)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each layer's weight."""
        return {n: kinds["weight"].shape for n, kinds in self.layers.items() if "weight" in kinds}

    def has_batch_norm(self) -> bool:
        """Whether a layer has running statistics."""
        return any("running_var" in kinds for kinds in self.layers.values())

    def by_kind(self, dimensions: int) -> list[str]:
        """The layers whose weights have so many dimensions, in order."""
        return [name for name, shape in self.shapes().items() if len(shape) == dimensions]


def _arrays(state_dict: Any) -> dict[str, np.ndarray]:
    """The arrays of a file or of a mapping, out of the mapping around them if there is one."""
    if isinstance(state_dict, str | pathlib.Path):
        return _read(pathlib.Path(state_dict))
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"need a state dict or its path, got {type(state_dict).__name__}")
    inside = {k: v for k, v in state_dict.items() if isinstance(v, Mapping) and _has_weights(v)}
    if len(inside) > 1:
        raise ValueError(f"several state dicts: give one of {', '.join(map(repr, inside))}")
    chosen = next(iter(inside.values()), state_dict)
    return {str(key): _numpy(value) for key, value in chosen.items() if hasattr(value, "shape")}


def _has_weights(mapping: Mapping[Any, Any]) -> bool:
    return any(len(getattr(value, "shape", ())) >= 2 for value in mapping.values())


def _numpy(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):  # a PyTorch tensor; NumPy has no bfloat16
        value = value.detach().cpu()
        value = value.float().numpy() if value.is_floating_point() else value.numpy()
    return np.asarray(value)


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    if path.suffix == ".npz":
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                return dict(file)
        except Exception as error:  # NumPy and zipfile raise many kinds
            raise ValueError(f"{path} is damaged or no NumPy archive: {error}") from error
    if path.suffix == ".safetensors":
        return zoo.read_arrays(path)[0]
    raise ValueError(
        f"{path} is no .npz or .safetensors file; give what torch.load(path, weights_only=True) "
        "returns"
    )


def _common_prefix(names: list[str]) -> str:
    """The dotted prefix that all names share; a lone layer has none."""
    parts = [name.split(".")[:-1] for name in names]
    shared = []
    for column in zip(*parts, strict=False):
        if len(names) < 2 or len(set(column)) > 1:
            break
        shared.append(f"{column[0]}.")
    return "".join(shared)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts conv2 before conv10, and the head last."""
    parts = re.split(r"(\d+)", name)
    split = [(int(part), "") if part.isdigit() else (0, part) for part in parts]
    return [(int(name.startswith("head")), ""), *split]


def _first_convolution(state: _State) -> str:
    """Which convolution takes the images: the one of 1 or 3 channels, else the first."""
    names = state.by_kind(4)
    shapes = state.shapes()
    return next((n for n in names if shapes[n][1] in (1, 3) and "." not in n), names[0])


def _nhwc(images: HostArray, channels: int) -> np.ndarray:
    images = np.asarray(images, np.float32)
    if images.ndim != 4 or channels not in (images.shape[1], images.shape[-1]):
        raise ValueError(f"need images of {channels} channels for the check, got {images.shape}")
    if not (images.min(initial=0.0) >= 0 and images.max(initial=0.0) <= 1):
        raise ValueError(
            f"need images in [0, 1] for the check, before any normalisation, got values from "
            f"{images.min():.3g} to {images.max():.3g}"
        )
    return images.transpose(0, 2, 3, 1) if images.shape[1] == channels else images


def _shapes(channels: int) -> Iterator[tuple[int, int, int]]:
    sides = sorted(_SIDES, key=lambda side: side != 28) if channels == 1 else _SIDES
    return ((side, side, channels) for side in sides)


def _options(network: Any, state: _State) -> dict[str, Any]:
    """The network's fields that the shapes tell, and the number of classes."""
    shapes = state.shapes()
    options = {"num_classes": shapes[state.by_kind(2)[-1]][0]}
    return options | getattr(network, "torch_options", lambda shapes: {})(shapes)


def _convert(
    module: Any, network: Any, state: _State, image_shape: tuple[int, int, int], bn_eps: float
) -> zoo.Loaded:
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    like = dict(jax.eval_shape(module.init, jax.random.key(0), image))
    shapes = {name: tuple(leaf.shape) for name, leaf in zoo.leaves_by_path(like).items()}
    by_order = not hasattr(network, "TORCH")
    if by_order:
        names = _match_by_order(state, shapes)
        state = _reorder_and_fold(state, names, shapes, image_shape)
    else:
        names = {layer: _rename(layer, network.TORCH) for layer in state.layers}
    assumed = []
    arrays: dict[str, np.ndarray] = {}
    unknown = list(state.unknown)
    for layer, kinds in state.layers.items():
        if names[layer] == "":
            continue
        for kind, array in kinds.items():
            path = _path(names[layer], kind, array)
            if path in shapes and path not in arrays:
                arrays[path] = _layout(kind, array, bn_eps)
            else:
                unknown.append(f"{state.prefix}{layer}.{kind}")
    if "params/head/bias" not in arrays and "params/head/kernel" in arrays:
        arrays["params/head/bias"] = np.zeros(shapes["params/head/bias"], np.float32)
        assumed.append("a head without bias: zeros")
    if by_order:
        assumed.append("layers matched by their order")
    complaints = zoo.compare(shapes, {path: array.shape for path, array in arrays.items()})
    if complaints or unknown:
        left = f"left over: {zoo.shorten(unknown)}" if unknown else ""
        raise ValueError("; ".join(filter(None, (complaints, left))))
    meta = {"image_shape": image_shape, "layers": names, "assumed": assumed}
    return zoo.Loaded(module, zoo.unflatten(arrays, like, "the state dict"), meta)


def _rename(layer: str, rules: Iterable[tuple[str, Any]]) -> str:
    for pattern, replacement in rules:
        layer = re.sub(pattern, replacement, layer)
    return layer


def _path(ours: str, kind: str, array: np.ndarray) -> str:
    collection = "batch_stats" if kind.startswith("running") else "params"
    weight = "scale" if array.ndim == 1 else "kernel"
    return f"{collection}/{ours}/{weight if kind == 'weight' else _OURS[kind]}"


def _layout(kind: str, array: np.ndarray, bn_eps: float) -> np.ndarray:
    """An array in Flax's layout: OIHW becomes HWIO, (out, in) becomes (in, out)."""
    array = np.asarray(array, np.float32)
    if kind == "running_var":
        return array + np.float32(bn_eps - _EPS)
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _match_by_order(state: _State, shapes: Mapping[str, tuple]) -> dict[str, str]:
    """{PyTorch's layer: ours}, the n-th of each kind with the n-th."""
    names: dict[str, str] = {}
    for dimensions, kind in _KINDS.items():
        weight = "scale" if dimensions == 1 else "kernel"
        ours = [
            path.split("/")[1]
            for path, shape in shapes.items()
            if path.endswith(f"/{weight}") and len(shape) == dimensions
        ]
        theirs = state.by_kind(dimensions)
        if len(ours) != len(theirs):
            raise ValueError(f"{len(theirs)} {kind} ({zoo.shorten(theirs)}), not {len(ours)}")
        names |= dict(zip(theirs, sorted(ours, key=_natural), strict=True))
    lone = [layer for layer in state.layers if layer not in names]
    if lone:
        raise ValueError(f"layers without a weight: {zoo.shorten(lone)}")
    return names


def _reorder_and_fold(
    state: _State,
    names: Mapping[str, str],
    shapes: Mapping[str, tuple],
    image_shape: tuple[int, int, int],
) -> _State:
    """Sequential networks: flattened features as (H, W, C); biases before BatchNorm in its mean."""
    layers = {layer: dict(kinds) for layer, kinds in state.layers.items()}
    theirs = {ours: layer for layer, ours in names.items()}
    ordered = {
        dimensions: sorted((names[n] for n in state.by_kind(dimensions)), key=_natural)
        for dimensions in _KINDS
    }
    first = layers[theirs[ordered[2][0]]]
    channels = len(layers[theirs[ordered[4][-1]]]["weight"])
    pixels, rest = divmod(first["weight"].shape[1], channels)
    if not rest and pixels > 1:
        height, width = image_shape[:2]
        sides = [h for h in range(1, pixels + 1) if pixels % h == 0]
        h = min(sides, key=lambda h: abs(h * width - pixels // h * height))
        weight = first["weight"].reshape(-1, channels, h, pixels // h)
        first["weight"] = weight.transpose(0, 2, 3, 1).reshape(len(weight), -1)
    for layer, norm in zip((*ordered[4], *ordered[2]), ordered[1], strict=False):
        kinds = layers[theirs[layer]]
        if "bias" in kinds and f"params/{layer}/bias" not in shapes:
            into = layers[theirs[norm]]
            into["running_mean"] = into["running_mean"] - kinds.pop("bias")
    return state._replace(layers=layers)


@functools.partial(jax.jit, static_argnums=0)
def _logits(module: Any, variables: Any, images: Any) -> Any:
    with jax.default_matmul_precision("highest"):
        return module.apply(variables, images)


def _difference(module: Any, variables: Any, images: np.ndarray, want: np.ndarray) -> float:
    """The largest difference of the logits.

    Raises:
      ValueError: they are of another shape.
    """
    got = np.asarray(_logits(module, variables, images))
    if got.shape != want.shape:
        raise ValueError(f"the logits to check with have shape {want.shape}, not {got.shape}")
    return float(np.abs(got - want).max())
