"""Square attack: random search over square windows, with the model's outputs only."""

import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxdefense import registry
from jaxdefense.attacks import checks
from jaxdefense.attacks.method import attack_factory
from jaxdefense.attacks.outcome import DRAWS, Passes, mean_over_draws, select_rows, success_margin
from jaxdefense.types import (
    Array,
    Attack,
    Images,
    Key,
    Labels,
    PerExample,
    Predict,
    Threat,
    example_keys,
    fold_in,
    per_example,
)

# p is halved after these queries, in an attack of 10,000.
_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


class _Proposal(Protocol):
    """How a norm's perturbation starts and changes; u are uniform numbers, (B, draws)."""

    def side(self, p: float, height: int, width: int) -> int: ...
    def tables(self, sides: np.ndarray) -> np.ndarray: ...
    def starts(self, shape: tuple[int, ...]) -> int: ...
    def draws(self, channels: int) -> int: ...
    def start(self, x: Images, threat: Threat, u: Array) -> Images: ...
    def change(
        self, x_adv: Images, x: Images, threat: Threat, u: Array, side: Array, table: Array
    ) -> Images: ...


def _signs(u: Array, dtype: Any) -> Array:
    return jnp.where(u < 0.5, -1, 1).astype(dtype)


def _corner(u: Array, side: Array, length: int) -> Array:
    """Uniform over the positions at which a window of that side fits."""
    return jnp.minimum((u * (length - side + 1)).astype(jnp.int32), length - side)


def _window(x: Images, row: Array, column: Array, side: Array) -> tuple[Array, Array, Array]:
    """(B, H, W) mask of each window, and each row's (B, H) and column's (B, W) place in it."""
    rows = jnp.arange(x.shape[1])[None] - row[:, None]
    columns = jnp.arange(x.shape[2])[None] - column[:, None]
    in_rows, in_columns = (rows >= 0) & (rows < side), (columns >= 0) & (columns < side)
    return in_rows[:, :, None] & in_columns[:, None, :], rows, columns


class _Stripes(NamedTuple):
    """L_inf: vertical stripes of +-eps, then windows of +-eps, one sign per channel."""

    def side(self, p, height, width):
        side = max(round(float(np.sqrt(p * height * width))), 1)
        return min(side, height, width)

    def tables(self, sides):
        return np.zeros((len(sides), 1, 1), np.float32)

    def starts(self, shape):
        return shape[1] * shape[2]

    def draws(self, channels):
        return 2 + channels

    def start(self, x, threat, u):
        batch, _, width, channels = x.shape
        signs = _signs(u, x.dtype).reshape(batch, 1, width, channels)
        return threat.project(x + per_example(threat.eps, x) * signs, x)

    def change(self, x_adv, x, threat, u, side, table):
        row, column = _corner(u[:, 0], side, x.shape[1]), _corner(u[:, 1], side, x.shape[2])
        mask = _window(x, row, column, side)[0][..., None]
        signs = _signs(u[:, 2:], x.dtype)[:, None, None, :]
        return threat.project(x_adv + jnp.where(mask, 2 * per_example(threat.eps, x) * signs, 0), x)


class _Masses(NamedTuple):
    """L2 and L1: two-sided bumps; a change moves one window's mass into another.

    Attributes:
      power: the norm's.
      falloff: the bump's rings weigh 1 / ring ** falloff.
      spread: L1's new windows get C times their mass (the projection takes the excess).
    """

    power: int
    falloff: int
    spread: bool

    def side(self, p, height, width):
        side = max(round(float(np.sqrt(p * height * width))), 3)
        return min(side + 1 - side % 2, height, width)

    def tables(self, sides):
        """(n, S, S) bumps of the sides, in the upper left corners."""
        largest = int(max(sides))
        tables = np.zeros((len(sides), largest, largest), np.float32)
        for table, side in zip(tables, sides):
            table[:side, :side] = self._bump(int(side))
        return tables

    def starts(self, shape):
        _, rows, columns = self._tiles(shape)
        return rows * columns * (1 + shape[2])

    def draws(self, channels):
        return 5 + channels

    def start(self, x, threat, u):
        """A grid of bumps, about 5 x 5, scaled to the ball."""
        batch, height, width, channels = x.shape
        side, rows, columns = self._tiles(x.shape[1:])
        tiles = rows * columns
        bump = jnp.asarray(self._bump(side), x.dtype)
        flip = (u[:, :tiles] < 0.5).reshape(batch, rows, columns, 1, 1)
        upright = jnp.broadcast_to(bump, flip.shape[:3] + bump.shape)
        grid = jnp.where(flip, upright.swapaxes(3, 4), upright)[..., None]  # (..., side, side, 1)
        signs = _signs(u[:, tiles:], x.dtype).reshape(batch, rows, columns, 1, 1, channels)
        grid = (grid * signs).swapaxes(2, 3)
        grid = grid.reshape(batch, rows * side, columns * side, channels)
        spare = (height - rows * side, width - columns * side)
        pads = [(n // 2, n - n // 2) for n in spare]
        return self._fit(jnp.pad(grid, [(0, 0), *pads, (0, 0)]), x, threat)

    def change(self, x_adv, x, threat, u, side, table):
        height, width, channels = x.shape[1:]
        eps, delta = per_example(threat.eps, x), x_adv - x
        row, column = _corner(u[:, 0], side, height), _corner(u[:, 1], side, width)
        window, rows, columns = _window(x, row, column, side)
        donor = _window(x, _corner(u[:, 2], side, height), _corner(u[:, 3], side, width), side)[0]
        window, donor = window[..., None], donor[..., None]
        bump = jnp.where(window, self._placed(table, rows, columns, u[:, 4] < 0.5), 0)
        signs = _signs(u[:, 5:], x.dtype)[:, None, None, :]

        spent = jnp.sum(self._mass(delta), -1, keepdims=True)  # of the whole image
        free = jnp.maximum(eps**self.power - spent, 0) / channels
        mass = free + self._mass(jnp.where(window | donor, delta, 0))
        old = jnp.where(window, delta, 0)
        new = bump * signs + old / (self._root(self._mass(old)) + 1e-12)
        new = new / (self._root(self._mass(new)) + 1e-12) * self._root(mass)
        new = new * channels if self.spread else new
        moved = jnp.where(window, new, jnp.where(donor, 0, delta))
        return self._fit(moved, x, threat)

    def _tiles(self, shape):
        """Side, rows and columns of the first grid."""
        side = max(min(shape[0] // 5, shape[1]), 1)
        return side, shape[0] // side, shape[1] // side

    def _bump(self, side):
        """A bump over a square, of norm 1: its upper half positive, its lower half negative."""
        halves = []
        for sign, height in ((1, side // 2), (-1, side - side // 2)):
            rings = np.maximum(
                np.abs(np.arange(height) - height // 2)[:, None],
                np.abs(np.arange(side) - side // 2)[None, :],
            )
            weights = 1 / np.arange(1.0, side // 2 + 2) ** self.falloff
            half = np.cumsum(weights[::-1])[::-1][rings]  # rings nest: the inner ones add up
            if height:
                halves.append(sign * half / np.sum(half**self.power) ** (1 / self.power))
        bump = np.concatenate(halves)
        return bump / np.sum(np.abs(bump) ** self.power) ** (1 / self.power)

    def _placed(self, table, rows, columns, flip):
        """(B, H, W, 1): the bump at each window, upright or on its side; arbitrary outside."""
        last = table.shape[0] - 1
        i = jnp.clip(rows, 0, last)[:, :, None]
        j = jnp.clip(columns, 0, last)[:, None, :]
        flip = flip[:, None, None]
        place = jnp.where(flip, j, i) * (last + 1) + jnp.where(flip, i, j)
        return jnp.take(table.reshape(-1), place)[..., None]

    def _mass(self, delta):
        """Each channel's share of the norm's power, (B, 1, 1, C)."""
        return jnp.sum(jnp.abs(delta) ** self.power, (1, 2), keepdims=True)

    def _root(self, mass):
        return mass ** (1 / self.power)

    def _fit(self, delta, x, threat):
        """On the sphere, cut to the box; in L1 the nearest point of ball and box."""
        if not self.spread:
            length = jnp.sum(self._mass(delta), -1, keepdims=True) ** (1 / self.power)
            delta = delta * (per_example(threat.eps, x) / (length + 1e-12))
        return threat.project(x + delta, x)


_PROPOSALS: dict[str, _Proposal] = {
    "linf": _Stripes(),
    "l2": _Masses(power=2, falloff=2, spread=False),
    "l1": _Masses(power=1, falloff=4, spread=True),
}


def _shares(queries: int, p_init: float, rescale: bool) -> np.ndarray:
    """(queries,) the share p of the pixels that each query changes."""
    n = np.arange(queries)
    n = (n / queries * 10_000).astype(int) if rescale else n
    return p_init / 2 ** np.sum(n[:, None] > np.asarray(_HALVED_AFTER), -1)


def passes(*, queries: int = 5000, samples: int | None = None) -> Passes:
    """One forward pass on the image, one on the start and one a query; no gradients.

    Args:
      queries: changes tried.
      samples: draws of a randomised model for each pass, and two passes a query.
    """
    return Passes(queries + 2 if samples is None else 2 * samples * (queries + 1), 0)


def check_layout(shape: tuple[int, ...], layout: str | None) -> None:
    """Checks that images of this shape have a height and a width for Square's windows.

    Args:
      shape: (B, H, W, C), (B, H, W) or (B, D).
      layout: 'NHWC', 'NCHW', or None where it is not given.

    Raises:
      ValueError: another number of axes, an unknown layout, or no layout for a shape that looks
        like channels first.
    """
    if layout not in (None, "NHWC", "NCHW"):
        registry.raise_unknown("layout", layout, ("NHWC", "NCHW"))
    if len(shape) not in (2, 3, 4):
        raise ValueError(f"square needs images (B, H, W, C) or vectors (B, D), got shape {shape}")
    if layout is None and len(shape) == 4 and shape[1] in (1, 3) and shape[3] > 4:
        raise ValueError(
            f"images {shape} look like channels first (B, C, H, W), and Square's windows would be "
            f"stripes: say layout='NCHW', or 'NHWC' if they are (B, H, W, C)"
        )


class _Layout(NamedTuple):
    """Reshapes images of another shape to (B, H, W, C) and back."""

    shape: tuple[int, ...]
    channels_first: bool
    low: float  # the value of padding, by which a vector becomes a square

    def to_nhwc(self, x: Images) -> Images:
        if len(self.shape) == 2:
            side = math.isqrt(self.shape[1] - 1) + 1
            spare = side * side - self.shape[1]
            x = jnp.pad(x, ((0, 0), (0, spare)), constant_values=self.low)
            return x.reshape(-1, side, side, 1)
        if len(self.shape) == 3:
            return x[..., None]
        return jnp.moveaxis(x, 1, -1) if self.channels_first else x

    def from_nhwc(self, x: Images) -> Images:
        if len(self.shape) == 2:
            return x.reshape(len(x), -1)[:, : self.shape[1]]
        if len(self.shape) == 3:
            return x[..., 0]
        return jnp.moveaxis(x, -1, 1) if self.channels_first else x


@attack_factory(flatten_images=False)
def square(
    threat: Threat,
    *,
    queries: int = 5000,
    p_init: float = 0.8,
    rescale: bool = False,
    targeted: bool = False,
    samples: int | None = None,
    layout: str | None = None,
) -> Attack:
    """Square attack: keep a random change of a square window where it raises the margin.

    Per query and example a window of side sqrt(p H W) at a random place is changed, and the change
    is kept where max_{k != y} z_k - z_y rises. L_inf: the window's channels go to +-eps, from a
    start of vertical stripes. L2, L1: the window receives a bump and the mass of a second window,
    which is emptied, from a start of a grid of bumps. p starts at `p_init` and is halved after 10,
    50, 200, 500, 1000, 2000, 4000, 6000 and 8000 queries.

    Args:
      threat: norm, eps, bounds.
      queries: changes tried.
      p_init: share of the pixels that the first windows cover.
      rescale: stretch p's schedule, made for 10,000 queries, to `queries`. AutoAttack does not.
      targeted: labels are targets to be reached.
      samples: for a randomised model; the attack then takes predict(key, images), each query
        compares the old and the new image over so many fresh draws, and nothing stops early.
      layout: 'NHWC' or 'NCHW'; by default NHWC, and refused where the shape looks like channels
        first. Vectors (B, D) are laid out as a square.

    Returns:
      An `Attack`: the first fooling point, or the point of the largest margin; the image itself
      where it is misclassified. It stops once the whole batch is fooled.

    Raises:
      ValueError: counts or shares out of range; at the call, bad images, labels or keys, or images
        of another shape.

    Reference: Andriushchenko et al., Square attack: a query-efficient black-box adversarial attack
      via random search, arXiv 1912.00049; L1: Croce, Hein, arXiv 2103.01208, section 4.3.

    Deviations: as in the paper, each example has windows and signs of its own, and a window may
    lie at the last rows and columns (in the authors' code a batch shares them, and it may not).

    >>> import jax
    >>> from jaxdefense import attacks, threat
    >>> attack = attacks.square(threat.Linf(0.25), queries=100)
    >>> x, labels = jax.numpy.array([[0.625, 0.5, 0.25]]), jax.numpy.array([0])
    >>> x_adv = attack(lambda x: 10 * x, jax.random.key(0), x, labels)
    >>> attacks.fooled(10 * x_adv, labels)
    Array([ True], dtype=bool)
    """
    checks.check_count("queries", queries)
    if not 0 < p_init <= 1:
        raise ValueError(f"p_init must be in (0, 1], got {p_init!r}")
    if samples is not None:
        checks.check_count("samples", samples)
    check_layout((1, 1), layout)
    proposal = _PROPOSALS[threat.norm]

    def attack(predict: Any, key: Key, images: Images, labels: Labels) -> Images:
        check_layout(images.shape, layout)
        reshape = _Layout(images.shape, layout == "NCHW", threat.bounds[0])
        x = reshape.to_nhwc(jax.lax.stop_gradient(images))
        batch, height, width, channels = x.shape
        keys = example_keys(key, batch)
        draws = fold_in(keys, DRAWS)
        shares, turn = np.unique(_shares(queries, p_init, rescale), return_inverse=True)
        lengths = np.array([proposal.side(p, height, width) for p in shares], np.int32)
        tables = jnp.asarray(proposal.tables(lengths), x.dtype)
        sides, which = jnp.asarray(lengths), jnp.asarray(turn)

        def uniform(n: Any, count: int) -> Array:
            return jax.vmap(lambda k: jax.random.uniform(k, (count,)))(fold_in(keys, n))

        def score(x_adv: Images, n: Any) -> PerExample:
            def values(fixed: Predict) -> PerExample:
                return success_margin(fixed(reshape.from_nhwc(x_adv)), labels, targeted)

            if samples is None:
                found = values(predict)
            else:
                found = mean_over_draws(predict, fold_in(draws, n), samples, values)
            return jnp.where(jnp.isnan(found), -jnp.inf, found)

        def proposed(n: Any, x_best: Images) -> Images:
            u, k = uniform(n + 1, proposal.draws(channels)), which[n]
            return proposal.change(x_best, x, threat, u, sides[k], tables[k])

        def finished(best: PerExample) -> Array:
            return best > 0 if samples is None else jnp.zeros(batch, bool)

        def going(carry: Any) -> Array:
            return (carry[0] < queries) & ~jnp.all(finished(carry[2]))

        # A turn ends by proposing the next turn's image. As part of the carry that image is in
        # memory; if the turn that scores it made it, XLA:CPU would compute it again for each tap of
        # the network's first convolution (a query of 64 MNIST images takes 1.4 times as long).
        def query(carry: Any) -> Any:
            n, x_best, best, x_new = carry
            value = score(x_new, n)
            if samples is not None:  # both images under the same draws
                best = score(x_best, n)
            better = (value > best) & ~finished(best)
            x_best = select_rows(better, x_new, x_best)
            return n + 1, x_best, jnp.where(better, value, best), proposed(n + 1, x_best)

        first = proposal.start(x, threat, uniform(0, proposal.starts(x.shape[1:])))
        if samples is None:
            clean = score(x, 0)
            best = jnp.where(clean > 0, clean, score(first, 0))
            x_best = select_rows(clean > 0, x, first)
        else:
            best, x_best = score(first, queries), first
        start = (jnp.array(0), x_best, best, proposed(0, x_best))
        return reshape.from_nhwc(jax.lax.while_loop(going, query, start)[1])

    return attack
