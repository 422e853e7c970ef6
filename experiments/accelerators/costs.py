"""What a program costs a device: operations, and bytes of memory traffic.

XLA's cost analysis counts the body of a loop once. Its numbers are scaled by what the turns of the
loops add: operations by the products of the traced program, bytes by the operands and results of
the compiled program's instructions, each counted once and then in every turn.

Turns are the most that a loop can take: a `scan` has its length, a `while_loop` the literal that
its condition compares a counter with, and one without such a literal the program's `rounds`. Loops
without products (a projection's bisection) count once.
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

_PRODUCTS = ("convolution", "dot")  # in a compiled program
# Instructions that move nothing, or are counted where they begin.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-done", "after-all")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\((.*)$")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) ")
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|(?:true|false)_computation)=%?([\w.\-]+)")
_WHOLE_NUMBER = re.compile(r"[su]\d+\[\]")
_CONDITION = re.compile(r".*condition=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")


class Cost(NamedTuple):
    """Of one device.

    Attributes:
      flops: a multiplication and an addition are two.
      moved: bytes that its operations read and write.
    """

    flops: float
    moved: float


class Instruction(NamedTuple):
    """Of a compiled program.

    Attributes:
      name: what others call its result.
      shape: of the result, as text.
      opcode: what it does.
      rest: its operands and attributes, as text.
    """

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def size(self) -> int:
        """Bytes of the result, or of all arrays of a tuple."""
        total = 0
        for kind, sides in _ARRAY.findall(self.shape):
            bits = 8 if kind == "pred" else int(re.sub(r"\D", "", kind))
            total += math.prod(int(side) for side in sides.split(",") if side) * bits // 8
        return total

    def operands(self) -> list[str]:
        """The names of what it reads."""
        return re.findall(r"[\w.\-]+", self.rest.split(")")[0].replace("%", " "))

    def called(self) -> list[str]:
        """The computations in it; of a loop, its body and its condition."""
        listed = _BRANCHES.search(self.rest)
        branches = re.findall(r"[\w.\-]+", listed[1]) if listed else []
        return _CALLED.findall(self.rest) + branches


class Traffic:
    """The bytes that a compiled program's instructions read and write.

    Args:
      text: of the program, as `Compiled.as_text` gives it.
      rounds: see `products`.
    """

    def __init__(self, text: str, rounds: int = 1):
        self._rounds = rounds
        self._computations: dict[str, list[Instruction]] = {}
        self._entry = ""
        inside: list[Instruction] = []
        for line in text.splitlines():
            found = _INSTRUCTION.match(line)
            if found:
                inside.append(Instruction(*found.groups()))
            elif line.endswith("{") and not line.startswith("HloModule"):
                is_entry, name = _must_match(_COMPUTATION, line).groups()
                inside = self._computations.setdefault(name, [])
                self._entry = name if is_entry else self._entry

    @property
    def once(self) -> float:
        """With every loop's body counted once, as XLA does."""
        return self._moved(self._entry, in_full=False)

    @property
    def full(self) -> float:
        """With all turns of the loops."""
        return self._moved(self._entry, in_full=True)

    def _moved(self, computation: str, in_full: bool) -> float:
        known = {one.name: one.size for one in self._computations[computation]}
        total = 0.0
        for one in self._computations[computation]:
            if one.opcode == "while":
                turns = self._turns(one) if in_full else 1
                total += turns * sum(self._moved(name, in_full) for name in one.called())
            elif one.opcode == "conditional":
                total += max(self._moved(name, in_full) for name in one.called())
            elif one.opcode == "call":
                total += sum(self._moved(name, in_full) for name in one.called())
            elif one.opcode not in _FREE:
                total += one.size + sum(known.get(name, 0) for name in one.operands())
        return total

    def _turns(self, loop: Instruction) -> int:
        if not any(self._multiplies(name) for name in loop.called()):
            return 1
        condition = _must_match(_CONDITION, loop.rest)[1]
        inside = list(self._inside(condition))
        numbers = [
            int(one.rest.split(")")[0])
            for one in inside
            if one.opcode == "constant" and _WHOLE_NUMBER.match(one.shape)
        ]
        bound = max(numbers, default=0)
        if bound < 2:
            return self._rounds
        return bound + any("direction=LE" in one.rest for one in inside)

    def _inside(self, computation: str) -> Iterator[Instruction]:
        """The instructions of a computation and of those in it."""
        for one in self._computations[computation]:
            yield one
            for name in one.called():
                yield from self._inside(name)

    def _multiplies(self, computation: str) -> bool:
        return any(one.opcode in _PRODUCTS for one in self._inside(computation))


def _must_match(pattern: re.Pattern[str], text: str) -> re.Match[str]:
    found = pattern.match(text)
    if found is None:
        raise ValueError(f"no compiled program: {text[:80]!r}")
    return found


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


def products(jaxpr: Jaxpr, rounds: int = 1, *, in_full: bool = True) -> float:
    """The operations of a program's convolutions and matrix products, loops in full.

    Counted from shapes: products with padding or with the zeros between dilated pixels are left
    out, as XLA does.

    Args:
      jaxpr: for one device.
      rounds: the turns of loops that no number bounds.
      in_full: count all turns of a loop; otherwise one.
    """
    inside = functools.partial(products, rounds=rounds, in_full=in_full)
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
            total += max(inside(branch.jaxpr) for branch in equation.params["branches"])
        elif name == "while":
            turns = _bound(equation)
            turns = (rounds if turns is None else turns) if in_full else 1
            total += turns * inside(equation.params["body_jaxpr"].jaxpr)
        elif name == "scan":
            turns = equation.params["length"] if in_full else 1
            total += turns * inside(equation.params["jaxpr"].jaxpr)
        else:
            total += sum(map(inside, _inner(equation)))
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


def cost(xla: Cost, text: str, jaxpr: Jaxpr, rounds: int = 1) -> Cost:
    """What a program costs with all turns of its loops.

    Args:
      xla: its numbers of the compiled program, each body counted once.
      text: of the compiled program.
      jaxpr: of the program for one device.
      rounds: see `products`.
    """
    traffic = Traffic(text, rounds)
    once = products(jaxpr, rounds, in_full=False)
    return Cost(xla.flops * products(jaxpr, rounds) / once, xla.moved * traffic.full / traffic.once)
