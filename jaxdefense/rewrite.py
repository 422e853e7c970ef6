"""`fast_convolutions`: a model of any library, its convolutions replaced by those of `conv`.

XLA:CPU runs the gradients that autodiff gives a convolution 3 to 190 times slower inside a loop
(every attack, every scan over training steps) than outside, and those of a max-pooling as well; the
networks of `jaxdefense.models` avoid both (`conv`). A model of Flax linen, NNX, Haiku, Equinox,
torchax or bare `jax.lax` does not, and its owner cannot know: PGD-40 on 500 MNIST images took a
plain `nn.Conv` network 28.9 s and takes it 5.2 s so. The model becomes a jaxpr, the program that
JAX traces from any function, and the jaxpr is evaluated with other forms of two operations: a
convolution becomes `conv`, its layout transposed to the one that `conv` knows; a max-pooling a
few comparisons, whose gradient goes to the first of equal pixels, as XLA's does. All else is
evaluated as it is, so logits and gradients are the same to rounding. `jit`, `checkpoint`, `scan`,
`while_loop` and `cond` are entered where they hold such an operation; functions with derivatives of
their own (`custom_jvp`, `custom_vjp`) are not, and neither is `shard_map`.

The attacks, `evaluation` and the networks of defences pass every model through
`fast_convolutions`, so nobody needs to call it. Where there is nothing to replace, the function
itself is called and its program is the same to the bit; so are those of this library's models. As
`conv`, this is for the CPU until it has been measured elsewhere, and one switch decides for both:
inside `models.explicit_gradients(False)` nothing is replaced. As with `conv`, a program that was
rewritten has reverse-mode derivatives of every order, but no forward-mode ones (`jax.jvp`,
`jax.hessian`), for which the switch has to be off.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from jaxdefense.conv import conv, covers, is_explicit
from jaxdefense.types import Array

R = TypeVar("R")

# Calls that are evaluated in place, and loops and branches that get other bodies.
_CALLS = ("jit", "pjit", "closed_call")
_BODIES = ("scan", "while", "cond")
_CHECKPOINTS = ("checkpoint", "remat2")

# Comparisons along an axis of a pooling; more of them are no faster than XLA's own.
_MOST_TAPS = 3


def fast_convolutions(function: Callable[..., R]) -> Callable[..., R]:
    """The same function, with convolutions and max-poolings that are fast in a loop's gradient.

    Args:
      function: of arrays in any pytrees, e.g. images -> logits; it may close over weights, traced
        ones too.

    Returns:
      A function of the same arguments, whose results and gradients are equal to rounding. On other
      backends than the CPU, and inside `models.explicit_gradients(False)`, it is `function`.

    >>> import flax.linen as nn
    >>> import jax
    >>> from jaxdefense import rewrite
    >>> net, x = nn.Conv(4, (3, 3)), jax.numpy.ones((1, 8, 8, 3))
    >>> variables = net.init(jax.random.key(0), x)
    >>> rewrite.fast_convolutions(net.apply)(variables, x).shape
    (1, 8, 8, 4)
    """
    innermost: Any = function
    while isinstance(innermost, functools.partial):
        innermost = innermost.func
    return function if isinstance(innermost, _Fast) else _Fast(function)


class _Fast:
    """What `fast_convolutions` returns.

    Args:
      function: of arrays.
    """

    def __init__(self, function: Callable[..., Any]):
        functools.update_wrapper(self, function, updated=())
        self._function = function
        self._unchanged: set[tuple] = set()  # shapes at which there was nothing to replace

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, kwargs))
        is_array = [isinstance(leaf, jax.Array) for leaf in leaves]
        arrays = [leaf for leaf, yes in zip(leaves, is_array) if yes]
        shapes = tuple((array.shape, array.dtype) for array in arrays)
        if not is_explicit() or shapes in self._unchanged:
            return self._function(*args, **kwargs)

        def program(arrays: list[Array]) -> Any:
            given = iter(arrays)
            whole = [next(given) if yes else leaf for leaf, yes in zip(leaves, is_array)]
            args, kwargs = jax.tree.unflatten(tree, whole)
            return self._function(*args, **kwargs)

        try:
            closed, out = jax.make_jaxpr(program, return_shape=True)(arrays)
        except TypeError:  # it returns what is no array: nothing is replaced
            return self._function(*args, **kwargs)
        if not _has_slow(closed.jaxpr):
            self._unchanged.add(shapes)
            return self._function(*args, **kwargs)
        results = _evaluate(closed.jaxpr, closed.consts, arrays)
        return jax.tree.unflatten(jax.tree.structure(out), results)


def _evaluate(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """The results of a program, its slow equations replaced."""
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args]))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        with equation.ctx.manager:
            results = _evaluate_equation(equation, [read(atom) for atom in equation.invars])
        values.update(zip(equation.outvars, results))
    return [read(atom) for atom in jaxpr.outvars]


def _evaluate_equation(equation: Any, inputs: list[Any]) -> Sequence[Any]:
    name, params = equation.primitive.name, equation.params
    if name == "conv_general_dilated" and _is_slow_convolution(equation):
        return [_convolution(params, *inputs)]
    if name == "reduce_window_max" and _is_slow_pooling(equation):
        return [_max_pooling(params, *inputs)]
    if _is_entered(equation) and any(map(_has_slow, _inner(equation))):
        if name in _CALLS:
            closed = params.get("jaxpr") or params["call_jaxpr"]
            return _evaluate(closed.jaxpr, closed.consts, inputs)
        if name in _CHECKPOINTS:
            again = functools.partial(_evaluate, params["jaxpr"], ())
            options = {key: params[key] for key in ("prevent_cse", "policy")}
            return jax.checkpoint(lambda *inputs: again(inputs), **options)(*inputs)
        params = {key: _map_closed(_rewritten, value) for key, value in params.items()}
    results = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params(params))
    return results if equation.primitive.multiple_results else [results]


def _rewritten(closed: ClosedJaxpr) -> ClosedJaxpr:
    """The program of a loop's body or of a branch, its slow equations replaced."""

    def body(*inputs: Any) -> list[Any]:
        return _evaluate(closed.jaxpr, closed.consts, inputs)

    return jax.make_jaxpr(body)(*closed.in_avals)


def _map_closed(function: Callable[[ClosedJaxpr], ClosedJaxpr], value: Any) -> Any:
    """A parameter with function(program) in place of each program in it."""
    if isinstance(value, ClosedJaxpr):
        return function(value)
    if isinstance(value, tuple) and any(isinstance(one, ClosedJaxpr) for one in value):
        return tuple(_map_closed(function, one) for one in value)
    return value


def _is_entered(equation: Any) -> bool:
    """Whether an equation is a call, a loop or a branch whose inside may be replaced."""
    name, params = equation.primitive.name, equation.params
    if name in _CHECKPOINTS:
        return not params["differentiated"]
    placed = (*params.get("in_shardings", ()), *params.get("out_shardings", ()))
    return name in (*_CALLS, *_BODIES) and not any(
        isinstance(one, jax.sharding.Sharding) for one in placed
    )


def _inner(equation: Any) -> Iterator[Jaxpr]:
    """The programs inside an equation."""
    for value in equation.params.values():
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, ClosedJaxpr):
                yield one.jaxpr
            elif isinstance(one, Jaxpr):
                yield one


def _has_slow(jaxpr: Jaxpr) -> bool:
    """Whether a program holds an equation to be replaced."""
    return any(
        _is_slow_convolution(equation)
        or _is_slow_pooling(equation)
        or (_is_entered(equation) and any(map(_has_slow, _inner(equation))))
        for equation in jaxpr.eqns
    )


def is_forward_mode(jaxpr: Jaxpr) -> bool:
    """Whether a program holds a forward-mode derivative of explicit gradients, which cannot run.

    Args:
      jaxpr: of any function.
    """
    return any(
        equation.primitive.name == "custom_lin" or any(map(is_forward_mode, _inner(equation)))
        for equation in jaxpr.eqns
    )


def _is_slow_convolution(equation: Any) -> bool:
    """Whether an equation is a convolution that `conv` covers, in any layout."""
    if equation.primitive.name != "conv_general_dilated":
        return False
    params = equation.params
    images, kernel = (atom.aval for atom in equation.invars)
    to_images, to_kernel, _ = _permutations(params)
    dilations = (*params["lhs_dilation"], *params["rhs_dilation"])
    return (
        all(d == 1 for d in dilations)
        and params["batch_group_count"] == 1
        and params.get("out_sharding") is None
        and covers(
            _permuted(images, to_images),
            _permuted(kernel, to_kernel),
            params["padding"],
            params["feature_group_count"],
            params["preferred_element_type"],
        )
    )


def _permutations(params: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The axes that make images (B, ..., C) and a kernel (..., C, K), and the result from those."""
    images, kernel, result = params["dimension_numbers"]
    last = [(spec[0], *spec[2:], spec[1]) for spec in (images, result)]
    back = tuple(last[1].index(axis) for axis in range(len(result)))
    return last[0], (*kernel[2:], kernel[1], kernel[0]), back


def _permuted(array: Any, axes: Sequence[int]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct([array.shape[axis] for axis in axes], array.dtype)


def _transposed(x: Array, axes: tuple[int, ...]) -> Array:
    return x if axes == tuple(range(x.ndim)) else lax.transpose(x, axes)


def _convolution(params: Any, images: Array, kernel: Array) -> Array:
    """A convolution's result by `conv`."""
    to_images, to_kernel, back = _permutations(params)
    y = conv(
        _transposed(images, to_images),
        _transposed(kernel, to_kernel),
        params["window_strides"],
        params["padding"],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=params["feature_group_count"],
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    return _transposed(y, back)


def _is_slow_pooling(equation: Any) -> bool:
    """Whether an equation is a max-pooling of floats over windows of a few pixels."""
    if equation.primitive.name != "reduce_window_max":
        return False
    params, x = equation.params, equation.invars[0].aval
    dilations = (*params["base_dilation"], *params["window_dilation"])
    return (
        jnp.issubdtype(x.dtype, jnp.floating)
        and x.size > 0
        and all(d == 1 for d in dilations)
        and 1 < max(params["window_dimensions"]) <= _MOST_TAPS
        and all(lo >= 0 and hi >= 0 for lo, hi in params["padding"])
        and equation.outvars[0].aval.size > 0
    )


def _max_pooling(params: Any, x: Array) -> Array:
    """A max-pooling's result, axis by axis from the last.

    Of equal pixels the gradient goes to the first in a row and then to the first row, which is the
    one that XLA's window visits first. NaN is larger than any number, as there.
    """
    windows = zip(params["window_dimensions"], params["window_strides"], params["padding"])
    for axis, (window, stride, (low, high)) in reversed(list(enumerate(windows))):
        if low or high:
            edges = [(low, high, 0) if i == axis else (0, 0, 0) for i in range(x.ndim)]
            x = lax.pad(x, jnp.array(-jnp.inf, x.dtype), edges)
        if window > 1 or stride > 1:
            x = _largest_along(x, axis, window, stride)
    return x


def _largest_along(x: Array, axis: int, window: int, stride: int) -> Array:
    """The first of the largest values in each window along an axis."""
    before, size, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    count = (size - window) // stride + 1
    if window == stride and after:  # each pixel in one window: what is side by side stays so
        last = after[-1]
        x = lax.slice_in_dim(x, 0, count * stride, axis=axis)
        if len(after) == 1:
            x = x.reshape(*before, count, stride * last)
            cuts = range(0, stride * last, last)
            taps = [lax.slice_in_dim(x, i, i + last, axis=axis + 1) for i in cuts]
        else:
            x = x.reshape(*before, count, stride, *after)
            taps = [lax.index_in_dim(x, i, axis + 1, keepdims=False) for i in range(stride)]
    else:
        reach = (count - 1) * stride + 1
        taps = [lax.slice_in_dim(x, i, i + reach, stride, axis) for i in range(window)]
    largest = taps[0]
    for tap in taps[1:]:
        largest = jnp.where((largest >= tap) | jnp.isnan(largest), largest, tap)
    return largest
