"""Threat models: a norm ball around each image, cut by the box of valid images.

Each norm is one frozen dataclass with exact operations. Elsewhere a norm is a key of a table: of
step rules (`attacks.apgd`), proposals (`attacks.square`), budgets (`attacks.ensemble`), names
(`evaluation.tables`). What knows one norm only refuses the others.

`eps` and distances are in image units ([0, 1] pixels unless `bounds` says otherwise). `eps` is one
number or one per example, and may be traced, so a grid of eps is one program.
"""

import abc
import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxdefense import registry
from jaxdefense.types import (
    Array,
    Images,
    Key,
    PerExample,
    Threat,
    example_keys,
    fold_in,
    per_example,
)

# So many halvings shrink an interval of float32 numbers below their spacing.
_HALVINGS = 32


def _flat(x: Array) -> Array:
    """x as rows, (B, D)."""
    return x.reshape(x.shape[0], -1)


def _unflatten(flat: Array, x: Array) -> Array:
    """`flat`, (B, D), in the shape of x."""
    return flat.reshape(x.shape)


def _column(value: float | Array, x: Array) -> Array:
    """`value`, () or (B,), as a (B, 1) column."""
    return jnp.broadcast_to(per_example(value, _flat(x)), (x.shape[0], 1))


def _concrete(value: Any) -> np.ndarray | None:
    """The value as an array, None while it is traced."""
    return None if isinstance(value, jax.core.Tracer) else np.asarray(value)


def _is_box(bounds: Any) -> bool:
    """Whether it is two finite numbers, the smaller one first."""
    if not isinstance(bounds, Iterable) or isinstance(bounds, Mapping):
        return False
    ends = [float(end) if hasattr(end, "__float__") else math.nan for end in bounds]
    return len(ends) == 2 and -math.inf < ends[0] < ends[1] < math.inf


@dataclasses.dataclass(frozen=True)
class _Ball(abc.ABC):
    """What the norms share: eps and bounds with their checks, and the box."""

    eps: float | PerExample
    bounds: tuple[float, float] = (0.0, 1.0)
    norm: ClassVar[str]
    _exponent: ClassVar[float]  # the norm of n ones is n to this power

    def __post_init__(self) -> None:
        if self.eps is None or isinstance(self.eps, str | bytes | Mapping | set):
            raise ValueError(f"eps must be a number or one per example, got {self.eps!r}")
        if isinstance(self.eps, list | tuple):
            if not self.eps:
                raise ValueError(f"eps must be a number or one per example, got {self.eps!r}")
            with np.errstate(over="ignore"):  # to infinity, which is refused below
                object.__setattr__(self, "eps", np.asarray(self.eps, np.float32))
        if not _is_box(self.bounds):
            raise ValueError(
                f"bounds must be (low, high), finite and low < high, got {self.bounds!r}"
            )
        # An integer of more than 64 bits would be an array of objects.
        eps = _concrete(float(self.eps) if isinstance(self.eps, int) else self.eps)
        if eps is None or eps.dtype == object:  # traced, or a pytree's placeholder
            return
        if eps.ndim > 1 or eps.dtype.kind not in "iuf" or isinstance(self.eps, bool):
            raise ValueError(f"eps must be a number or one per example, got {self.eps!r}")
        if not np.all(np.isfinite(eps)) or np.any(eps < 0):
            raise ValueError(f"eps must be finite and not negative, got {self.eps!r}")
        limit = self.diameter(math.inf)
        if np.any(eps > limit):
            raise ValueError(
                f"eps={self.eps!r} is larger than {limit:g}, all that images in {self.bounds} "
                f"allow; eps is in image units: write 8/255, not 8"
            )

    def diameter(self, n: float) -> float:
        """The largest distance between two images in the box; no sensible eps is larger.

        Args:
          n: values of an image.
        """
        width = self.bounds[1] - self.bounds[0]
        return width * n**self._exponent

    def scaled(self, factor: float | PerExample) -> Self:
        """The same threat with `factor` times the eps (warm-up of eps, eps grids)."""
        return dataclasses.replace(self, eps=self.eps * factor)

    def with_eps(self, eps: float | PerExample) -> Self:
        """The same norm and bounds with another eps (a ball that an attack grows and shrinks)."""
        return dataclasses.replace(self, eps=eps)

    def step_to_hyperplane(self, x: Images, normal: Images, gap: PerExample) -> Images:
        """The shortest step inside the box with <normal, step> = gap: onto a hyperplane.

        The step is sign(gap normal) min(t r, room) with r the norm's rates and the smallest t
        that closes the gap. What t gains is concave and piecewise linear, so Newton's method from
        the left reaches the exact t after finitely many steps. Where the box holds no point of
        the hyperplane, the step goes to the box's nearest corner.

        Args:
          x: (B, ...) images in the box.
          normal: (B, ...) the hyperplane's normal at each image.
          gap: (B,) what the step has to gain; negative goes down the normal.

        Returns:
          (B, ...) steps, zero where the normal is.

        Reference: Croce, Hein, Minimally distorted adversarial examples with a fast adaptive
          boundary attack, arXiv 1907.02044, eq. 4 (solved there by sorting).
        """
        gap = gap.astype(x.dtype)
        normal = normal * per_example(jnp.where(gap < 0, -1, 1), x)
        size = jnp.abs(_flat(normal))
        # Scaled to a largest entry of 1: squares of tiny gradients would underflow.
        scale = jnp.max(size, -1, keepdims=True)
        size = size / jnp.where(scale > 0, scale, 1)
        room = jnp.where(size > 0, _flat(self._room(normal, x)), 0)
        most = jnp.sum(size * room, -1, keepdims=True)
        goal = jnp.minimum(jnp.abs(gap)[:, None] / jnp.where(scale > 0, scale, 1), most)
        return _unflatten(self._shortest_move(size, room, goal), x) * jnp.sign(normal)

    def rounded(self, x_adv: Images, x: Images, levels: int) -> Images:
        """x_adv on the grid low + k / levels of the box's width, still in the ball.

        To the nearest points of the grid; where those lie outside, each coordinate towards x.

        Args:
          x_adv: (B, ...) images of the set.
          x: (B, ...) the centres, on the grid.
          levels: steps over the box, 255 for images of 8 bits.

        Returns:
          (B, ...) images.
        """
        low, high = self.bounds
        step = (high - low) / levels
        centre = jnp.rint((x - low) / step)
        moved = (x_adv - x) / step

        def image(steps: Array) -> Images:
            return self._clip(low + (centre + steps) / levels * (high - low)).astype(x.dtype)

        near = image(jnp.rint(moved))
        # A move of k steps comes with a rounding of its own: 2.9999998 are 3.
        inner = image(jnp.sign(moved) * jnp.floor(jnp.abs(moved) + 1e-3))
        inside = self.distance(near, x) <= self.eps + 1e-4 * step
        return jnp.where(per_example(inside, x) > 0, near, inner)

    @abc.abstractmethod
    def distance(self, x_adv: Images, x: Images) -> PerExample:
        """The norm of x' - x per example, (B,)."""

    @abc.abstractmethod
    def _shortest_move(self, size: Array, room: Array, goal: Array) -> Array:
        """The shortest move with coordinates in [0, room] and sum size * move = goal."""

    def _eps(self, x: Array) -> Array:
        return per_example(self.eps, x)

    def _clip(self, x: Images) -> Images:
        return jnp.clip(x, *self.bounds)

    def _room(self, delta: Images, x: Images) -> Images:
        """How far each coordinate of x can go in the direction of delta, >= 0."""
        low, high = self.bounds
        return jnp.maximum(jnp.where(delta > 0, high - x, x - low), 0)


@dataclasses.dataclass(frozen=True)
class Linf(_Ball):
    """max_i |x'_i - x_i| <= eps.

    Args:
      eps: radius in image units, () or (B,), at most the box's width.
      bounds: (low, high) of valid images.

    >>> from jaxdefense import threat
    >>> ball = threat.Linf(8 / 255)
    >>> ball.norm, ball.bounds, ball.diameter(32 * 32 * 3)
    ('linf', (0.0, 1.0), 1.0)
    """

    norm: ClassVar[str] = "linf"
    _exponent: ClassVar[float] = 0.0

    def project(self, x_adv: Images, x: Images) -> Images:
        """The nearest point of ball and box, for x in the box: clip to both.

        >>> import jax.numpy as jnp
        >>> from jaxdefense import threat
        >>> threat.Linf(0.125).project(jnp.array([[0.9, -0.5]]), jnp.array([[0.5, 0.0]]))
        Array([[0.625, 0.   ]], dtype=float32)
        """
        eps = self._eps(x)
        return self._clip(jnp.clip(x_adv, x - eps, x + eps))

    def sample(self, key: Key, x: Images) -> Images:
        """x plus uniform noise of the ball, cut to the box."""
        noise = _draw(jax.random.uniform, key, x, minval=-1.0, maxval=1.0)
        return self._clip(x + self._eps(x) * noise)

    def ascent(self, grad: Images, x: Images, step_size: float | PerExample) -> Images:
        """The step of that length that raises a linear function most: step_size * sign(grad)."""
        return per_example(step_size, x) * jnp.sign(grad)

    def distance(self, x_adv: Images, x: Images) -> PerExample:
        """max |x' - x| per example, (B,)."""
        return jnp.max(jnp.abs(_flat(x_adv - x)), -1)

    def dual_norm(self, grad: Images) -> PerExample:
        """||grad||_1: what a step of length 1 gains at most, (B,)."""
        return jnp.sum(jnp.abs(_flat(grad)), -1)

    def _shortest_move(self, size: Array, room: Array, goal: Array) -> Array:
        return _capped_multiple(size, jnp.ones_like(size), room, goal)


@dataclasses.dataclass(frozen=True)
class L2(_Ball):
    """||x' - x||_2 <= eps.

    Args:
      eps: radius in image units, () or (B,).
      bounds: (low, high) of valid images.

    >>> from jaxdefense import threat
    >>> threat.L2(0.5).scaled(2.0)
    L2(eps=1.0, bounds=(0.0, 1.0))
    """

    norm: ClassVar[str] = "l2"
    _exponent: ClassVar[float] = 0.5

    def project(self, x_adv: Images, x: Images) -> Images:
        """The nearest point of ball and box, for x in the box.

        It is x + sign(d) min(t |d|, room) with d = x' - x and the largest t <= 1 that stays in
        the ball. The squared length is concave and piecewise linear in t^2, so Newton's method
        from the left reaches the exact t after finitely many steps. (Scaling to the ball and
        then clipping, as other libraries do, also lands inside, but not at the nearest point;
        the two agree where no pixel is at the box.)

        >>> import jax.numpy as jnp
        >>> from jaxdefense import threat
        >>> threat.L2(0.3125).project(jnp.array([[0.625, 0.75]]), jnp.array([[0.25, 0.25]]))
        Array([[0.4375, 0.5   ]], dtype=float32)
        """
        delta = _flat(x_adv - x)
        room = _flat(self._room(x_adv - x, x))
        eps2 = jnp.square(_column(self.eps, x))
        d2, room2 = jnp.square(delta), jnp.square(room)

        def newton(carry):
            t2, _ = carry
            cut = t2 * d2 >= room2
            free = jnp.sum(jnp.where(cut, 0, d2), -1, keepdims=True)
            left = eps2 - jnp.sum(jnp.where(cut, room2, 0), -1, keepdims=True)
            new = jnp.where(free > 0, jnp.maximum(left, 0) / jnp.where(free > 0, free, 1), 1)
            new = jnp.clip(new, t2, 1)
            return new, jnp.any(new > t2)

        total = jnp.sum(d2, -1, keepdims=True)
        start = jnp.minimum(eps2 / jnp.where(total > 0, total, 1), 1)
        start = jnp.where(total > 0, start, 1)
        t2, _ = jax.lax.while_loop(lambda carry: carry[1], newton, (start, jnp.array(True)))
        step = jnp.sign(delta) * jnp.minimum(jnp.sqrt(t2) * jnp.abs(delta), room)
        # A point that is inside already stays as it is, to the bit.
        inside = jnp.sum(jnp.minimum(d2, room2), -1, keepdims=True) <= eps2
        flat = jnp.where(inside, _flat(x_adv), _flat(x) + step)
        return self._clip(_unflatten(flat, x))

    def sample(self, key: Key, x: Images) -> Images:
        """x plus uniform noise of the ball, cut to the box."""
        noise = _draw(jax.random.normal, key, x)
        radius = _draw(jax.random.uniform, _subkeys(key, 1, x), x, ()) ** (1 / x[0].size)
        length = jnp.sqrt(jnp.sum(jnp.square(_flat(noise)), -1))
        return self._clip(x + self._eps(x) * noise * per_example(radius / length, x))

    def ascent(self, grad: Images, x: Images, step_size: float | PerExample) -> Images:
        """The step of that length that raises a linear function most: along grad / ||grad||_2."""
        scale = jnp.max(jnp.abs(_flat(grad)), -1)  # squares of tiny gradients would underflow
        grad = grad / per_example(jnp.where(scale > 0, scale, 1), x)
        length = jnp.sqrt(jnp.sum(jnp.square(_flat(grad)), -1))
        return per_example(step_size, x) * grad / per_example(jnp.where(length > 0, length, 1), x)

    def distance(self, x_adv: Images, x: Images) -> PerExample:
        """||x' - x||_2 per example, (B,)."""
        return jnp.sqrt(jnp.sum(jnp.square(_flat(x_adv - x)), -1))

    def dual_norm(self, grad: Images) -> PerExample:
        """||grad||_2: what a step of length 1 gains at most, (B,)."""
        scale = jnp.max(jnp.abs(_flat(grad)), -1)
        unit = _flat(grad) / jnp.where(scale > 0, scale, 1)[:, None]
        return scale * jnp.sqrt(jnp.sum(jnp.square(unit), -1))

    def _shortest_move(self, size: Array, room: Array, goal: Array) -> Array:
        return _capped_multiple(size, size, room, goal)


@dataclasses.dataclass(frozen=True)
class L1(_Ball):
    """||x' - x||_1 <= eps.

    Args:
      eps: radius in image units, () or (B,).
      bounds: (low, high) of valid images.

    >>> from jaxdefense import threat
    >>> threat.L1(12.0, bounds=(-1.0, 1.0)).diameter(100)
    200.0
    """

    norm: ClassVar[str] = "l1"
    _exponent: ClassVar[float] = 1.0

    def project(self, x_adv: Images, x: Images) -> Images:
        """The nearest point of ball and box, for x in the box.

        It is x + sign(d) clip(|d| - lambda, 0, room) with the smallest lambda >= 0 that stays
        in the ball. Halving finds lambda's linear piece to the spacing of the floats; the
        closed form on that piece finishes.

        >>> import jax.numpy as jnp
        >>> from jaxdefense import threat
        >>> threat.L1(0.25).project(jnp.array([[1.0, 0.625]]), jnp.array([[0.5, 0.5]]))
        Array([[0.75, 0.5 ]], dtype=float32)
        """
        delta = x_adv - x
        size, room = jnp.abs(_flat(delta)), _flat(self._room(delta, x))
        eps = _column(self.eps, x)

        def length(lam):
            return jnp.sum(jnp.clip(size - lam, 0, room), -1, keepdims=True)

        def halve(_, interval):
            low, high = interval
            middle = (low + high) / 2
            outside = length(middle) > eps
            return jnp.where(outside, middle, low), jnp.where(outside, high, middle)

        inside = length(0.0) <= eps
        low, high = jnp.zeros_like(eps), jnp.max(size, -1, keepdims=True)
        low, high = jax.lax.fori_loop(0, _HALVINGS, halve, (low, high))
        full, free = size - high >= room, size > high
        count = jnp.sum(free & ~full, -1, keepdims=True)
        spent = jnp.sum(jnp.where(full, room, jnp.where(free, size, 0)), -1, keepdims=True)
        closed = (spent - eps) / jnp.maximum(count, 1)
        lam = jnp.where(count > 0, jnp.clip(closed, low, high), high)
        step = jnp.sign(_flat(delta)) * jnp.clip(size - lam, 0, room)
        return self._clip(_unflatten(jnp.where(inside, _flat(x_adv), _flat(x) + step), x))

    def sample(self, key: Key, x: Images) -> Images:
        """x plus uniform noise of the ball, cut to the box.

        Exponential magnitudes over their sum plus one more exponential are uniform in the
        simplex's interior; random signs make it the ball.
        """
        size = _draw(jax.random.exponential, key, x)
        sign = _draw(jax.random.rademacher, _subkeys(key, 1, x), x)
        rest = _draw(jax.random.exponential, _subkeys(key, 2, x), x, ())
        noise = sign * size / per_example(jnp.sum(_flat(size), -1) + rest, x)
        return self._clip(x + self._eps(x) * noise)

    def ascent(self, grad: Images, x: Images, step_size: float | PerExample) -> Images:
        """The step of that length that raises a linear function most inside the box.

        Without the box that is the one coordinate of the largest gradient. With it, each
        coordinate in the order of |grad| goes to its bound until the length is spent.
        """
        size = jnp.abs(_flat(grad))
        order = jnp.argsort(-size, -1)
        room = jnp.take_along_axis(_flat(self._room(grad, x)) * (size > 0), order, -1)
        before = jnp.cumsum(room, -1) - room
        spent = jnp.clip(_column(step_size, x) - before, 0, room)
        back = jnp.argsort(order, -1)
        return _unflatten(jnp.sign(_flat(grad)) * jnp.take_along_axis(spent, back, -1), x)

    def distance(self, x_adv: Images, x: Images) -> PerExample:
        """||x' - x||_1 per example, (B,)."""
        return jnp.sum(jnp.abs(_flat(x_adv - x)), -1)

    def dual_norm(self, grad: Images) -> PerExample:
        """max |grad|: what a step of length 1 gains at most, (B,)."""
        return jnp.max(jnp.abs(_flat(grad)), -1)

    def _shortest_move(self, size: Array, room: Array, goal: Array) -> Array:
        """A knapsack: the coordinates of the largest sizes go to their bounds until goal is met.

        The last one goes as far as needed. Halving finds its size without a sort; coordinates of
        equal size share what is left.
        """

        def halve(_, interval):
            low, high = interval
            middle = (low + high) / 2
            gained = jnp.sum(jnp.where(size > middle, size * room, 0), -1, keepdims=True)
            return jnp.where(gained > goal, middle, low), jnp.where(gained > goal, high, middle)

        low, high = jnp.zeros_like(goal), jnp.ones_like(goal)
        low, high = jax.lax.fori_loop(0, _HALVINGS, halve, (low, high))
        full = size > high
        last = (size > low) & ~full
        left = goal - jnp.sum(jnp.where(full, size * room, 0), -1, keepdims=True)
        held = jnp.sum(jnp.where(last, size * room, 0), -1, keepdims=True)
        share = jnp.clip(left / jnp.where(held > 0, held, 1), 0, 1)
        return jnp.where(full, room, jnp.where(last, share * room, 0))


def _capped_multiple(size: Array, rate: Array, room: Array, goal: Array) -> Array:
    """min(t rate, room) with the smallest t for which sum size * min(t rate, room) = goal."""

    def newton(carry):
        t, _ = carry
        cut = t * rate >= room
        free = jnp.sum(jnp.where(cut, 0, size * rate), -1, keepdims=True)
        left = goal - jnp.sum(jnp.where(cut, size * room, 0), -1, keepdims=True)
        new = jnp.maximum(jnp.where(free > 0, left / jnp.where(free > 0, free, 1), t), t)
        return new, jnp.any(new > t)

    start = (jnp.zeros_like(goal), jnp.array(True))
    t, _ = jax.lax.while_loop(lambda carry: carry[1], newton, start)
    return jnp.minimum(t * rate, room)


def _draw(
    sampler: Any, key: Key, x: Array, shape: tuple[int, ...] | None = None, **kwargs: float
) -> Array:
    """Draws of x's dtype, (B, *shape) or like x, each example's from its own key."""
    shape = x.shape[1:] if shape is None else shape
    keys = example_keys(key, x.shape[0])
    return jax.vmap(lambda k: sampler(k, shape, dtype=x.dtype, **kwargs))(keys)


def _subkeys(key: Key, number: int, x: Array) -> Key:
    """Other keys, one per example, for a draw of that number."""
    return fold_in(example_keys(key, x.shape[0]), number)


_NORMS = {cls.norm: cls for cls in (Linf, L2, L1)}


def _register(cls: type[Any]) -> None:
    """Makes a norm a pytree: eps is a leaf, bounds are static.

    Not by `register_dataclass`: its trees compare equal whatever their class (jaxlib 0.10, 0.11),
    and once in a hundred processes their hashes meet too: jit then runs L2's program for L1.
    """
    jax.tree_util.register_pytree_with_keys(
        cls,
        lambda ball: (((jax.tree_util.GetAttrKey("eps"), ball.eps),), ball.bounds),
        lambda bounds, leaves: cls(*leaves, bounds),
        lambda ball: ((ball.eps,), ball.bounds),
    )


for _cls in _NORMS.values():
    _register(_cls)


def names() -> list[str]:
    """The norms that `make` knows.

    >>> from jaxdefense import threat
    >>> threat.names()
    ['l1', 'l2', 'linf']
    """
    return sorted(_NORMS)


def make(norm: str, eps: float, bounds: tuple[float, float] = (0.0, 1.0)) -> Threat:
    """The threat of a config: `make(norm='linf', eps=8/255)`.

    Args:
      norm: 'linf', 'l2' or 'l1'.
      eps: radius in image units.
      bounds: (low, high) of valid images.

    Raises:
      ValueError: unknown norm, or an eps of the wrong scale.

    >>> from jaxdefense import threat
    >>> threat.make("l2", eps=0.5)
    L2(eps=0.5, bounds=(0.0, 1.0))
    """
    if norm not in _NORMS:
        registry.raise_unknown("norm", norm, _NORMS)
    low, high = bounds
    return _NORMS[norm](eps, (low, high))
