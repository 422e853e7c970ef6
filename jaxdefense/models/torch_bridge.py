"""Any PyTorch module as a JAX function: `torch.export` writes its graph, a table runs it.

The graph holds PyTorch's core operators only, some hundred names whatever the module's code; the
table below has those of image classifiers. It is the only module here that imports torch, which
`pip install 'jaxdefense[torch]'` brings; what it returns needs torch no more.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdefense import extras
from jaxdefense.conv import conv
from jaxdefense.models.torch import TOLERANCE
from jaxdefense.types import Array, Images, Logits

Variables = dict[str, Array]
Apply = Callable[[Variables, Images], Logits]


def from_module(
    module: Any, image_shape: tuple[int, int, int], *, tolerance: float = TOLERANCE
) -> tuple[Apply, Variables]:
    """A PyTorch classifier as a JAX function with the same logits and gradients.

    Args:
      module: a `torch.nn.Module` of float32 in eval mode, (B, C, H, W) in [0, 1] -> logits (B, K);
        a normalisation belongs inside it.
      image_shape: (H, W, C).
      tolerance: largest difference of the logits of four random images, as a part of the largest
        logit.

    Returns:
      apply: (variables, images (B, H, W, C)) -> logits (B, K), for any B.
      variables: {PyTorch's name: array}.

    Raises:
      MissingExtra: torch is not installed.
      ValueError: a module in training mode or of another dtype, one that torch.export cannot trace,
        another image_shape, an operator that is not in the table (it is named), or logits that
        differ.

    >>> apply, variables = from_module(net.eval(), (32, 32, 3))  # doctest: +SKIP
    >>> verdict = evaluation.autoattack(
    ...     apply, images, labels, threat.Linf(8 / 255), variables=variables
    ... )  # doctest: +SKIP
    """
    with extras.required("torch", __name__):
        import torch
    if not isinstance(module, torch.nn.Module):
        raise ValueError(
            f"need a torch.nn.Module, got {type(module).__name__}; models.from_torch takes weights"
        )
    if module.training:
        raise ValueError("the module is in training mode: call module.eval() first")
    dtypes = {x.dtype for x in module.state_dict().values() if x.is_floating_point()}
    if other := sorted(str(dtype) for dtype in dtypes - {torch.float32}):
        raise ValueError(f"the module computes in {', '.join(other)}: call module.float() first")
    height, width, channels = _check_shape(image_shape)
    first = next(module.parameters(), torch.zeros(()))
    images = torch.rand(4, channels, height, width, generator=torch.Generator().manual_seed(0))
    example = images.to(first.device)
    batch = ({0: torch.export.Dim("batch")},)
    try:
        # Without `no_grad`, under which attention takes a path of one fused operator.
        with _silenced():
            program = torch.export.export(module, (example,), dynamic_shapes=batch)
            program = program.run_decompositions()
            answer = module(example)
    except Exception as error:  # torch raises many kinds
        said = str(error).strip().splitlines() or [type(error).__name__]
        hint = ""
        if height in (1, 3) and channels not in (1, 3):
            hint = f"; image_shape is (H, W, C): is it {(width, channels, height)}?"
        raise ValueError(f"torch.export cannot trace the module: {said[0]}{hint}") from error
    if not isinstance(answer, torch.Tensor) or answer.ndim != 2:
        told = tuple(answer.shape) if isinstance(answer, torch.Tensor) else type(answer).__name__
        raise ValueError(f"the module must return logits (B, K), one tensor, and it returns {told}")
    want = answer.detach().float().cpu().numpy()
    if not np.all(np.isfinite(want)):
        raise ValueError("the module's logits of random images are not finite")
    variables, names, inputs = {}, {}, []
    for spec in program.graph_signature.input_specs:
        if spec.kind is torch.export.graph_signature.InputKind.USER_INPUT:
            inputs.append(spec.arg.name)
            continue
        held = program.state_dict if spec.target in program.state_dict else program.constants
        names[spec.arg.name] = spec.target
        variables[spec.target] = _array(held[spec.target])
    apply = functools.partial(_run, _instructions(program.graph), names, inputs[0])
    with jax.default_matmul_precision("highest"):
        got = np.asarray(jax.jit(apply)(variables, np.moveaxis(images.numpy(), 1, -1)))
    if got.shape != want.shape:
        raise ValueError(f"the logits have shape {got.shape}, and PyTorch's {want.shape}")
    difference, allowed = float(np.abs(got - want).max()), tolerance * float(np.abs(want).max())
    if not difference <= allowed:
        raise ValueError(
            f"the logits of random images differ by {difference:.2g} from PyTorch's, and "
            f"{allowed:.2g} is allowed"
        )
    return apply, variables


def _check_shape(image_shape: Any) -> tuple[int, int, int]:
    sides = tuple(image_shape) if isinstance(image_shape, Sequence) else ()
    if len(sides) != 3 or not all(isinstance(n, int | np.integer) and n > 0 for n in sides):
        raise ValueError(f"image_shape is (H, W, C), three numbers, got {image_shape!r}")
    return sides


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Without torch's warnings, logs and prints: of a failure, one line is what helps."""
    disabled = logging.root.manager.disable  # torch has a handler on each of its loggers
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _array(tensor: Any) -> Array:
    tensor = tensor.detach().cpu()
    return jnp.asarray((tensor.float() if tensor.is_floating_point() else tensor).numpy())


class _Name(str):
    """The name of an earlier result, in an instruction's arguments."""


_Instruction = tuple[str, Any, Any, Any]  # (result's name, function, args, kwargs)


def _instructions(graph: Any) -> list[_Instruction]:
    """The graph without anything of torch's.

    Raises:
      ValueError: an operator that is not in the table.
    """
    import torch

    steps: list[_Instruction] = []

    def plain(value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            return _Name(value.name)
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, torch.dtype):
            return None if value.is_complex else _dtype(value)
        return value

    unknown = set()
    for node in graph.nodes:
        if node.op == "call_function":
            packet = getattr(node.target, "overloadpacket", None)
            name = packet.__name__ if packet is not None else ""
            function = TABLE.get(name) if name else node.target  # Python's own, on sizes
            if function is None:
                unknown.add(str(node.target))
            kwargs = {k: plain(v) for k, v in node.kwargs.items() if k not in _PLACEMENT}
            steps.append((node.name, function, plain(node.args), kwargs))
        elif node.op == "output":
            (result,) = plain(node.args[0])
            steps.append(("output", lambda x: x, [result], {}))
    if unknown:
        raise ValueError(
            f"no JAX form of {', '.join(sorted(unknown))} in jaxdefense.models.torch_bridge"
        )
    return steps


_PLACEMENT = ("device", "layout", "pin_memory", "memory_format", "non_blocking")


def _dtype(dtype: Any) -> Any:
    """The nearest dtype that JAX computes in: halves and doubles become float32."""
    if dtype.is_floating_point:
        return jnp.float32
    return jnp.bool_ if str(dtype) == "torch.bool" else jnp.int32


def _run(
    steps: Sequence[_Instruction],
    names: dict[str, str],
    image: str,
    variables: Variables,
    images: Images,
) -> Logits:
    known: dict[str, Any] = {name: variables[target] for name, target in names.items()}
    known[image] = jnp.moveaxis(jnp.asarray(images, jnp.float32), -1, 1)

    def value(argument: Any) -> Any:
        if isinstance(argument, _Name):
            return known[argument]
        return [value(item) for item in argument] if isinstance(argument, list) else argument

    with jax.numpy_rank_promotion("allow"):  # as PyTorch does
        for name, function, args, kwargs in steps:
            known[name] = function(*map(value, args), **{k: value(v) for k, v in kwargs.items()})
    return known["output"]


def _pair(value: Any) -> tuple[int, int]:
    """PyTorch's 3, [3] or [3, 3] as a pair."""
    values = [value] if isinstance(value, int) else list(value)
    return (values[0], values[-1])


def _convolution(
    x: Array,
    weight: Array,
    bias: Array | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Array:
    if x.ndim != 4 or (transposed and groups != 1):
        raise ValueError("only convolutions of images are known, transposed ones without groups")
    edges = [(p, p) for p in _pair(padding)]
    kernel, steps = weight.transpose(2, 3, 1, 0), (_pair(stride), (1, 1))
    if transposed:
        sizes = zip(weight.shape[2:], _pair(dilation), _pair(padding), _pair(output_padding))
        edges = [(d * (k - 1) - p, d * (k - 1) - p + more) for k, d, p, more in sizes]
        kernel, steps = weight.transpose(2, 3, 0, 1)[::-1, ::-1], steps[::-1]
    y = conv(
        jnp.moveaxis(x, 1, -1),
        kernel,
        steps[0],
        edges,
        lhs_dilation=steps[1],
        rhs_dilation=_pair(dilation),
        dimension_numbers=lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2)),
        feature_group_count=groups,
    )
    return jnp.moveaxis(y if bias is None else y + bias, -1, 1)


def _batch_norm(
    x: Array, weight: Any, bias: Any, mean: Array, var: Array, momentum: float, eps: float
) -> tuple[Array]:
    scale = lax.rsqrt(var + eps) * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - mean * scale
    shape = (1, -1, *[1] * (x.ndim - 2))
    return (x * scale.reshape(shape) + shift.reshape(shape),)


def _layer_norm(x: Array, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> tuple[Array]:
    axes = tuple(range(x.ndim - len(shape), x.ndim))
    centred = x - x.mean(axes, keepdims=True)
    y = centred * lax.rsqrt((centred**2).mean(axes, keepdims=True) + eps)
    return (y * (1 if weight is None else weight) + (0 if bias is None else bias),)


def _group_norm(
    x: Array, weight: Any, bias: Any, n: int, c: int, pixels: int, groups: int, eps: float
) -> tuple[Array]:
    (y,) = _layer_norm(x.reshape(len(x), groups, -1), [c // groups * pixels], None, None, eps)
    shape = (1, -1, *[1] * (x.ndim - 2))
    y = y.reshape(x.shape) * (1 if weight is None else weight.reshape(shape))
    return (y + (0 if bias is None else bias.reshape(shape)),)


def _instance_norm(
    x: Array, weight: Any, bias: Any, training: bool, momentum: float, eps: float
) -> tuple[Array]:
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    return _batch_norm(x, weight, bias, mean, var, momentum, eps)


def _windows(
    x: Array, kernel: Any, stride: Any, padding: Any, ceil: bool, fill: float
) -> list[Array]:
    """One strided view of x (B, C, H, W) for each place in the pooling window, row by row.

    In ceil_mode a last window may reach over the padding, but must begin before its right edge.
    """
    stops, edges = [], []
    sizes = zip(x.shape[2:], _pair(kernel), _pair(stride or kernel), _pair(padding))
    for size, k, s, p in sizes:
        count = (size + 2 * p - k) // s + 1
        if ceil and (size + 2 * p - k) % s and count * s < size + p:
            count += 1
        stops.append((count - 1) * s + 1)
        edges.append((p, max(p, stops[-1] - 1 + k - size - p)))
    x = jnp.pad(x, ((0, 0), (0, 0), *edges), constant_values=fill)
    (h, w), (sh, sw), (kh, kw) = stops, _pair(stride or kernel), _pair(kernel)
    return [x[:, :, a : a + h : sh, b : b + w : sw] for a in range(kh) for b in range(kw)]


def _max_pool(
    x: Array, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil: bool = False
) -> tuple[Array]:
    """By comparisons: of equal values the first gets the gradient, as in PyTorch."""
    if _pair(dilation) != (1, 1):
        raise ValueError("max-pooling with dilation is not known")
    views = _windows(x, kernel, stride, padding, ceil, -math.inf)
    return (functools.reduce(lambda a, b: jnp.where(a >= b, a, b), views),)


def _average_pool(
    x: Array,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Array:
    total = functools.reduce(operator.add, _windows(x, kernel, stride, padding, ceil, 0.0))
    if divisor:
        return total / divisor
    ones, (ph, pw) = jnp.ones((1, 1, *x.shape[2:])), _pair(padding)
    if count_include_pad:  # what ceil_mode adds beyond the padding is never counted
        pads = ((0, 0), (0, 0), (ph, ph), (pw, pw))
        ones, padding = jnp.pad(ones, pads, constant_values=1), 0
    return total / functools.reduce(
        operator.add, _windows(ones, kernel, stride, padding, ceil, 0.0)
    )


def _resize(x: Array, size: Any, scales: Any, matrix: Callable[..., np.ndarray]) -> Array:
    """x (B, C, H, W) with a matrix along each axis: matrix(pixels, wanted, pixels a step)."""
    for axis in (2, 3):
        pixels = x.shape[axis]
        wanted = size[axis - 2] if size else math.floor(pixels * scales[axis - 2])
        step = 1 / scales[axis - 2] if scales else None
        x = jnp.moveaxis(jnp.tensordot(x, matrix(pixels, wanted, step), (axis, 1)), -1, axis)
    return x


def _nearest(pixels: int, wanted: int, step: float | None) -> np.ndarray:
    at = np.floor(np.arange(wanted) * (step or pixels / wanted)).astype(int)
    return np.eye(pixels, dtype=np.float32)[np.minimum(at, pixels - 1)]


def _linear(pixels: int, wanted: int, step: float | None, align: bool) -> np.ndarray:
    at = np.arange(wanted, dtype=np.float64)
    if align:
        at = at * ((pixels - 1) / (wanted - 1) if wanted > 1 else 0.0)
    else:
        at = np.maximum((at + 0.5) * (step or pixels / wanted) - 0.5, 0.0)
    low = np.minimum(np.floor(at).astype(int), pixels - 1)
    high, eye = np.minimum(low + 1, pixels - 1), np.eye(pixels)
    return ((1 - (at - low))[:, None] * eye[low] + (at - low)[:, None] * eye[high]).astype("f4")


def _variance(x: Array, dim: Any = None, correction: int = 1, keepdim: bool = False) -> Array:
    return jnp.var(x, tuple(dim) if dim else None, ddof=correction, keepdims=keepdim)


def _adaptive_average_pool(x: Array, size: Any) -> Array:
    (h, w), (b, c, height, width) = _pair(size), x.shape
    if height % h or width % w:
        raise ValueError(f"adaptive pooling of {height}x{width} to {h}x{w} is not even")
    return x.reshape(b, c, h, height // h, w, width // w).mean((3, 5))


def _reduce(function: Callable) -> Callable:
    def reduce(x: Array, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Array:
        axes = tuple(dim) if isinstance(dim, list) and dim else dim
        return function(x, axis=None if axes == [] else axes, keepdims=keepdim)

    return reduce


def _slice(x: Array, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Array:
    at = [slice(None)] * x.ndim
    at[dim] = slice(start, None if end is not None and end >= x.shape[dim] else end, step)
    return x[tuple(at)]


def _split(x: Array, sizes: Sequence[int], dim: int = 0) -> list[Array]:
    return jnp.split(x, np.cumsum(sizes)[:-1].tolist(), dim)


def _expand(x: Array, sizes: Sequence[int], implicit: bool = False) -> Array:
    own = (1,) * (len(sizes) - x.ndim) + x.shape
    shape = [o if s == -1 else s for s, o in zip(sizes, own, strict=True)]
    return jnp.broadcast_to(x, shape)


def _pad(x: Array, pad: Sequence[int], value: float = 0.0) -> Array:
    """PyTorch lists the last dimension's two numbers first."""
    pairs = [(pad[i], pad[i + 1]) for i in range(0, len(pad), 2)][::-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - len(pairs)) + pairs, constant_values=value)


def _clamp(x: Array, low: Any = None, high: Any = None) -> Array:
    return jnp.clip(x, low, high)


def _copy(x: Array, dtype: Any = None) -> Array:
    return x if dtype is None else x.astype(dtype)


# PyTorch's core operators by name, with its own positional arguments.
TABLE: dict[str, Callable[..., Any]] = {
    "_adaptive_avg_pool2d": _adaptive_average_pool,
    "_log_softmax": lambda x, dim, half=False: jax.nn.log_softmax(x, dim),
    "_native_batch_norm_legit": _instance_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "_softmax": lambda x, dim, half=False: jax.nn.softmax(x, dim),
    "_to_copy": _copy,
    "abs": jnp.abs,
    "add": lambda x, y, alpha=1: x + y * alpha,
    "addmm": lambda b, x, y, beta=1, alpha=1: beta * b + alpha * (x @ y),
    "alias": _copy,
    "amax": _reduce(jnp.max),
    "amin": _reduce(jnp.min),
    "any": _reduce(jnp.any),
    "avg_pool2d": _average_pool,
    "bmm": operator.matmul,
    "cat": lambda xs, dim=0: jnp.concatenate(xs, dim),
    "clamp": _clamp,
    "clone": _copy,
    "constant_pad_nd": _pad,
    "convolution": _convolution,
    "cos": jnp.cos,
    "div": operator.truediv,
    "elu": lambda x, alpha=1, scale=1, inner=1: (
        scale * jnp.where(x > 0, x, alpha * jnp.expm1(inner * jnp.minimum(x, 0)))
    ),
    "eq": operator.eq,
    "erf": jax.scipy.special.erf,
    "exp": jnp.exp,
    "expand": _expand,
    "expm1": jnp.expm1,
    "flip": lambda x, dims: jnp.flip(x, tuple(dims)),
    "floor": jnp.floor,
    "full": lambda size, value, dtype=None: jnp.full(size, value, dtype),
    "full_like": lambda x, value, dtype=None: jnp.full_like(x, value, dtype),
    "ge": operator.ge,
    "gelu": lambda x, approximate="none": jax.nn.gelu(x, approximate=approximate == "tanh"),
    "gt": operator.gt,
    "hardtanh": lambda x, low=-1.0, high=1.0: jnp.clip(x, low, high),
    "le": operator.le,
    "leaky_relu": lambda x, slope=0.01: jnp.where(x > 0, x, slope * x),
    "log": jnp.log,
    "log1p": jnp.log1p,
    "logical_and": jnp.logical_and,
    "logical_not": jnp.logical_not,
    "logical_or": jnp.logical_or,
    "lt": operator.lt,
    "max_pool2d_with_indices": _max_pool,
    "maximum": jnp.maximum,
    "mean": _reduce(jnp.mean),
    "minimum": jnp.minimum,
    "mm": operator.matmul,
    "mul": operator.mul,
    "native_group_norm": _group_norm,
    "native_layer_norm": _layer_norm,
    "ne": operator.ne,
    "neg": operator.neg,
    "permute": lambda x, dims: jnp.transpose(x, dims),
    "pow": operator.pow,
    "reciprocal": jnp.reciprocal,
    "relu": jax.nn.relu,
    "repeat": lambda x, times: jnp.tile(x, tuple(times)),
    "round": jnp.round,
    "rsqrt": lax.rsqrt,
    "scalar_tensor": lambda value, dtype=None: jnp.asarray(value, dtype),
    "select": lambda x, dim, index: jnp.take(x, index, dim),
    "sigmoid": jax.nn.sigmoid,
    "sign": jnp.sign,
    "sin": jnp.sin,
    "slice": _slice,
    "split_with_sizes": _split,
    "sqrt": jnp.sqrt,
    "squeeze": lambda x, dims: jnp.squeeze(x, tuple(dims) if isinstance(dims, list) else dims),
    "sub": lambda x, y, alpha=1: x - y * alpha,
    "sum": _reduce(jnp.sum),
    "sym_size": lambda x, dim: x.shape[dim],
    "tanh": jnp.tanh,
    "unsqueeze": jnp.expand_dims,
    "upsample_bilinear2d": lambda x, size, align, scales=None: _resize(
        x, size, scales, functools.partial(_linear, align=align)
    ),
    "upsample_nearest2d": lambda x, size, scales=None: _resize(x, size, scales, _nearest),
    "var": _variance,
    "view": jnp.reshape,
    "where": jnp.where,
}
