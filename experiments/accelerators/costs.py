"""What a program costs a device: operations, bytes of memory traffic, memory held.

XLA's cost analysis counts the body of a loop once, so a program that loops is costed in pieces:

    cost(program) = once(program) + sum over its loops of turns * cost(body) - once(body)

`once` is XLA's number for what it has compiled, and each body that holds a convolution or a matrix
product is compiled by itself. Turns are the most that the loop can take: a `scan` has its length, a
`while_loop` the literal that its condition compares a counter with, and one without such a literal
the program's `rounds`. Loops without products (a projection's bisection) count once.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

_PRODUCTS = ("conv_general_dilated", "dot_general")


class Cost(NamedTuple):
    """Of one device.

    Attributes:
      flops: a multiplication and an addition are two.
      moved: bytes that its operations read and write.
    """

    flops: float
    moved: float

    def __add__(self, other: "Cost") -> "Cost":  # type: ignore[override]
        return Cost(self.flops + other.flops, self.moved + other.moved)

    def scaled(self, factor: float) -> "Cost":
        """So many times this."""
        return Cost(self.flops * factor, self.moved * factor)


class Loop(NamedTuple):
    """A loop of a program.

    Attributes:
      turns: the most it takes; None where no number in the program bounds them.
      body: of one turn.
    """

    turns: int | None
    body: ClosedJaxpr


def loops(jaxpr: Jaxpr) -> Iterator[Loop]:
    """The outermost loops of a program that hold a convolution or a matrix product."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in ("scan", "while"):
            is_scan = name == "scan"
            body = equation.params["jaxpr" if is_scan else "body_jaxpr"]
            turns = equation.params["length"] if is_scan else _bound(equation)
            if products(body.jaxpr) > 0:
                yield Loop(turns, body)
        else:
            for inner in _inner(equation):
                yield from loops(inner)


def _inner(equation: Any) -> Iterator[Jaxpr]:
    """The programs inside an equation."""
    for value in equation.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, ClosedJaxpr | Jaxpr):
                yield getattr(one, "jaxpr", one)


def _bound(equation: Any) -> int | None:
    """The literal that a while loop's condition compares a whole number with."""
    for one in equation.params["cond_jaxpr"].jaxpr.eqns:
        name = one.primitive.name
        right = getattr(one.invars[-1], "val", None)  # of a literal
        if name in ("lt", "le") and np.ndim(right) == 0 and isinstance(right, int | np.integer):
            return int(right) + (name == "le")
    return None


def products(jaxpr: Jaxpr, rounds: int = 1) -> float:
    """The operations of a program's convolutions and matrix products, loops in full.

    Counted from shapes: products with padding or with the zeros between dilated pixels are left
    out, as XLA does.

    Args:
      jaxpr: for one device.
      rounds: the turns of loops that no number bounds.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "conv_general_dilated":
            total += _convolution(equation)
        elif name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            sizes = [equation.invars[0].aval.shape[axis] for axis in contracted]
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(sizes)
        elif name == "cond":
            total += max(products(branch.jaxpr, rounds) for branch in equation.params["branches"])
        elif name == "while":
            turns = _bound(equation)
            inside = products(equation.params["body_jaxpr"].jaxpr, rounds)
            total += (rounds if turns is None else turns) * inside
        elif name == "scan":
            inside = products(equation.params["jaxpr"].jaxpr, rounds)
            total += equation.params["length"] * inside
        else:
            total += sum(products(inner, rounds) for inner in _inner(equation))
    return total


def _convolution(equation: Any) -> float:
    lhs, rhs = (var.aval.shape for var in equation.invars)
    out, params = equation.outvars[0].aval.shape, equation.params
    numbers = params["dimension_numbers"]
    (_, _, *image), (_, channels, *kernel) = numbers.lhs_spec, numbers.rhs_spec
    (batch, features, *space) = numbers.out_spec
    total = 2.0 * out[batch] * out[features] * rhs[channels]
    for i, (low, _) in enumerate(params["padding"]):
        total *= _used_taps(
            lhs[image[i]],
            rhs[kernel[i]],
            out[space[i]],
            (params["window_strides"][i], low),
            (params["lhs_dilation"][i], params["rhs_dilation"][i]),
        )
    return total / params["batch_group_count"]


@functools.cache
def _used_taps(
    size: int, taps: int, outputs: int, placed: tuple[int, int], dilations: tuple[int, int]
) -> int:
    """How many pairs of an output and a tap of the kernel meet a pixel, along one axis."""
    (stride, low), (dilation, apart) = placed, dilations
    at = np.arange(outputs)[:, None] * stride + np.arange(taps)[None] * apart - low
    return int(np.sum((at >= 0) & (at <= (size - 1) * dilation) & (at % dilation == 0)))


def cost(
    once: Cost, jaxpr: Jaxpr, compile_body: Callable[[ClosedJaxpr], Cost], rounds: int = 1
) -> Cost:
    """What a program costs with all turns of its loops.

    Args:
      once: XLA's numbers of the program, each body counted once.
      jaxpr: of the program for one device.
      compile_body: -> XLA's numbers of a body by itself, loops inside it counted once.
      rounds: see `products`.
    """
    total = once
    for turns, body in loops(jaxpr):
        alone = compile_body(body)
        whole = cost(alone, body.jaxpr, compile_body, rounds)
        total += whole.scaled(rounds if turns is None else turns) + alone.scaled(-1)
    return total


def body_function(body: ClosedJaxpr) -> tuple[Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]:
    """A loop's body as a function, and its arguments' shapes."""
    shapes = tuple(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in body.in_avals)
    return jaxpr_as_fun(body), shapes
