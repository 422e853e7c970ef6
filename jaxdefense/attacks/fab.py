"""FAB: the nearest adversarial example, by projections onto linearised decision boundaries."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdefense.attacks import checks
from jaxdefense.attacks.method import attack_factory
from jaxdefense.attacks.outcome import (
    Passes,
    best_of_runs,
    fooled,
    initial_radii,
    interpolate,
    minimize_distance,
    nearest_found,
    required_margin,
    runner_up_class,
    runner_up_classes,
    select_rows,
    success_margin,
    threat_of_rows,
    warn_few_classes,
    zero_non_finite,
)
from jaxdefense.mixing import check_share
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

# Images (B, ...) -> the linearised decision boundary at each: gap (B,) and normal (B, ...). Its
# points x + step are those with <normal, step> = gap.
Boundary = Callable[[Images], tuple[PerExample, Images]]


def boundary_between(predict: Predict, labels: Labels, targets: Labels) -> Boundary:
    """The boundary z_t = z_y: its gap is z_y - z_t, its normal grad (z_t - z_y).

    Args:
      predict: the model.
      labels: (B,), y.
      targets: (B,), t.
    """

    def linearise(x):
        logits, pull = jax.vjp(predict, x)
        return _linearise(logits, pull, labels, targets)

    return linearise


def boundary_of_target(predict: Predict, targets: Labels) -> Boundary:
    """The boundary between the target and the class with the largest other logit.

    Args:
      predict: the model.
      targets: (B,).
    """

    def linearise(x):
        logits, pull = jax.vjp(predict, x)
        return _linearise(logits, pull, runner_up_class(logits, targets), targets)

    return linearise


def boundary_distances(
    predict: Predict, x: Images, labels: Labels, candidates: Array, threat: Threat
) -> Array:
    """(B, n) distances from x to the linearised boundaries with the candidates, in the norm alone.

    |z_y - z_k| / ||grad (z_k - z_y)||_dual, infinite without a gradient; one backward pass each.

    Args:
      predict: the model.
      x: (B, ...) images.
      labels: (B,).
      candidates: (B, n) other classes.
      threat: its norm measures.
    """
    logits, pull = jax.vjp(predict, x)

    def one(others: Labels) -> PerExample:
        gap, normal = _linearise(logits, pull, labels, others)
        dual = threat.dual_norm(normal)
        return jnp.where(dual > 0, jnp.abs(gap) / jnp.where(dual > 0, dual, 1), jnp.inf)

    return jax.lax.map(one, candidates.T).T


def nearest_boundary(
    predict: Predict, labels: Labels, threat: Threat, candidates: Array | None = None
) -> Boundary:
    """The linearised boundary that is nearest inside the box, over the other classes.

    One forward pass, then one backward pass a class, of which only the nearest is kept: the
    (B, K, ...) Jacobian never exists.

    Args:
      predict: the model.
      labels: (B,).
      threat: norm and bounds.
      candidates: (B, n) classes to look at; None for all others.
    """

    def linearise(x):
        logits, pull = jax.vjp(predict, x)
        count = logits.shape[-1] - 1 if candidates is None else candidates.shape[1]

        def keep_nearer(i, carry):
            least, gap, normal = carry
            others = i + (i >= labels) if candidates is None else candidates[:, i]
            new_gap, new_normal = _linearise(logits, pull, labels, others)
            distance = _distance_in_box(threat, x, new_gap, new_normal)
            closer = distance < least
            return (
                jnp.where(closer, distance, least),
                jnp.where(closer, new_gap, gap),
                select_rows(closer, new_normal, normal),
            )

        far = jnp.full(x.shape[0], jnp.inf, x.dtype)
        return jax.lax.fori_loop(0, count, keep_nearer, (far, far, jnp.zeros_like(x)))[1:]

    return linearise


def _linearise(
    logits: Array, pull: Callable[[Array], tuple[Images]], labels: Labels, targets: Labels
) -> tuple[PerExample, Images]:
    """The gap z_y - z_t and the normal grad (z_t - z_y) at the image of a forward pass.

    Args:
      logits: (B, K) of the forward pass.
      pull: its pull-back, cotangents (B, K) -> gradients (B, ...).
      labels: (B,), y.
      targets: (B,), t.
    """
    classes = logits.shape[-1]
    cotangent = jax.nn.one_hot(targets, classes, dtype=logits.dtype)
    cotangent -= jax.nn.one_hot(labels, classes, dtype=logits.dtype)
    normal = zero_non_finite(pull(cotangent)[0])
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    # The aim is one rounding of the logits beyond the boundary, because an iterate exactly on it
    # would stay there; and beyond the lead that a success has to exceed.
    beyond = jnp.finfo(logits.dtype).eps * jnp.max(jnp.abs(wide), -1) + required_margin(logits)
    gap = beyond - jnp.sum(cotangent.astype(wide.dtype) * wide, -1)
    return gap.astype(normal.dtype), normal


def _distance_in_box(threat: Threat, x: Images, gap: PerExample, normal: Images) -> PerExample:
    """The hyperplane's distance from x inside the box, (B,), for comparisons.

    A hyperplane outside the box, or without a normal, gets a number larger than all distances in
    the box; such numbers are in the order of the distances in the norm alone.
    """
    step = threat.step_to_hyperplane(x, normal, gap)
    gained = jnp.abs(jnp.sum(normal * step, range(1, x.ndim)))
    met = (gained > 0) & (gained >= 0.999 * jnp.abs(gap))
    behind = threat.diameter(x[0].size) + jnp.abs(gap) / (threat.dual_norm(normal) + 1e-12)
    return jnp.where(met, _size(threat, step), behind)


def _size(threat: Threat, step: Images) -> PerExample:
    """The step's norm, (B,)."""
    return threat.distance(step, jnp.zeros_like(step))


def refine(
    predict: Predict,
    x: Images,
    labels: Labels,
    x_adv: Images,
    *,
    steps: int,
    targeted: bool = False,
) -> Images:
    """The final search: the nearest fooling point to x on the segment from x to x_adv.

    False position (regula falsi) between the last right and the last fooled point, moved half-way
    to the fooled one, because a point exactly on the boundary is no result. One forward pass a step
    and two at the start.

    Args:
      predict: the model.
      x: (B, ...) images.
      labels: (B,) labels, or targets.
      x_adv: (B, ...) fooling points; a point that does not fool is returned as it is.
      steps: of the search; 0 returns x_adv.
      targeted: whether the labels are targets.
    """

    def margin(z: Images) -> PerExample:
        return success_margin(predict(z), labels, targeted).astype(x.dtype)

    def step(_: Any, carry: Any) -> Any:
        low, low_margin, high, high_margin = carry
        share = -low_margin / jnp.maximum(high_margin - low_margin, 1e-12)
        middle = low + (high - low) * (1 + jnp.clip(share, 0, 1)) / 2
        value = margin(interpolate(x, x_adv, middle))
        hit = value > 0
        return (
            jnp.where(hit, low, middle),
            jnp.where(hit, low_margin, value),
            jnp.where(hit, middle, high),
            jnp.where(hit, value, high_margin),
        )

    if not steps:
        return x_adv
    zeros = jnp.zeros(x.shape[0], x.dtype)
    start = (zeros, margin(x), zeros + 1, margin(x_adv))
    high = jax.lax.fori_loop(0, steps, step, start)[2]
    able = (start[1] <= 0) & (start[3] > 0) & (high < 1)
    return select_rows(able, interpolate(x, x_adv, high), x_adv)


def passes(
    *,
    steps: int = 100,
    restarts: int = 1,
    num_classes: int | None = None,
    targets: int = 1,
    search: int = 3,
) -> Passes:
    """One forward pass on the image, two and a gradient a step, and the final search's.

    Args:
      steps: of a run.
      restarts: runs, for each of `targets`.
      num_classes: K of the untargeted attack, which takes K - 1 gradients a step; None for the
        targeted one, which takes one.
      targets: of the targeted attack.
      search: steps of the final search.
    """
    runs = restarts * targets * steps
    gradients = runs if num_classes is None else runs * (num_classes - 1)
    return Passes(1 + 2 * runs + (search + 2 if search else 0), gradients)


@dataclasses.dataclass(frozen=True)
class _Search:
    """The runs of `fab` and of `fab_targeted`, which differ in the boundary that a run follows.

    Args: see `fab`.
    """

    threat: Threat
    steps: int
    restarts: int
    alpha_max: float
    eta: float
    beta: float
    search: int
    minimal: bool
    targeted: bool = False

    def __post_init__(self) -> None:
        checks.check_count("steps", self.steps)
        checks.check_count("restarts", self.restarts)
        checks.check_count("search", self.search, least=0)
        check_share("alpha_max", self.alpha_max)
        check_share("beta", self.beta)
        if not self.eta >= 1:
            raise ValueError(f"eta must be at least 1, got {self.eta!r}")

    def nearest(
        self,
        predict: Predict,
        key: Key,
        x: Images,
        labels: Labels,
        right: Array,
        boundaries: Callable[[Array, Array], Boundary],
        *,
        targets: int = 1,
    ) -> Images:
        """The nearest fooling point of all runs, after the final search; x where there is none.

        Args:
          predict: the model.
          key: one key, or one per example.
          x: (B, ...) images.
          labels: (B,) labels, or targets.
          right: (B,) bool, the examples that are not fooled yet; the others keep their image.
          boundaries: (numbers (B,), rows (B,)) -> the boundary that run numbers[i] of example
            rows[i] follows.
          targets: boundaries for each example; each has `restarts` runs.
        """
        keys = example_keys(key, x.shape[0])

        def run(numbers: Array, rows: Array, idle: Array) -> tuple[Images, PerExample]:
            image, ball = x[rows], threat_of_rows(self.threat, rows)
            best, enough = initial_radii(~idle, image, ball, self.minimal)
            start = self._start(numbers, keys[rows], image, ball)
            linearise = boundaries(numbers, rows)

            def advance(_: Any, z: Images, best: PerExample) -> tuple[Images, Array, Images]:
                gap, normal = linearise(z)
                z = self._step(z, image, gap, normal)
                hit = fooled(predict(z), labels[rows], self.targeted)
                return z, hit, select_rows(hit, image + self.beta * (z - image), z)

            _, best_x, best = minimize_distance(
                advance, start, image, image, best, ball, steps=self.steps, enough=enough
            )
            return best_x, jnp.where(best <= enough, jnp.inf, -best)

        best_x = best_of_runs(run, x, ~right, targets * self.restarts)
        best_x = refine(predict, x, labels, best_x, steps=self.search, targeted=self.targeted)
        return nearest_found(best_x, x, self.threat, self.minimal)

    def _start(self, numbers: Array, keys: Key, x: Images, ball: Threat) -> Images:
        """The image, and for all but a boundary's first run a random point of half the ball."""
        if self.restarts == 1:
            return x
        noisy = ball.scaled(0.5).sample(fold_in(keys, numbers), x)
        return select_rows(numbers % self.restarts > 0, noisy, x)

    def _step(self, z: Images, x: Images, gap: PerExample, normal: Images) -> Images:
        """The biased mean of z and x, both projected onto the hyperplane with an overshoot."""
        lead = jnp.sum(normal * (z - x), range(1, x.ndim))
        from_z = self.threat.step_to_hyperplane(z, normal, gap)
        from_x = self.threat.step_to_hyperplane(x, normal, gap + lead)
        near, far = (jnp.maximum(_size(self.threat, d), 1e-8) for d in (from_z, from_x))
        alpha = per_example(jnp.minimum(near / (near + far), self.alpha_max), x)
        z = (1 - alpha) * (z + self.eta * from_z) + alpha * (x + self.eta * from_x)
        return jnp.clip(z, *self.threat.bounds).astype(x.dtype)


@attack_factory()
def fab(
    threat: Threat,
    *,
    steps: int = 100,
    restarts: int = 1,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    search: int = 3,
    minimal: bool = False,
    targeted: bool = False,
) -> Attack:
    """FAB: the nearest misclassified point, whatever eps, by projections onto the boundary.

    At the iterate z the decision boundary nearest in the norm is linearised, and z and the image x
    are both projected onto that hyperplane inside the box, by steps d and d_x:

        z <- clip((1 - alpha) (z + eta d) + alpha (x + eta d_x)),
        alpha = min(|d| / (|d| + |d_x|), alpha_max)

    The step is biased to x by alpha and overshoots by eta; a misclassified z is noted, and goes
    back to x + beta (z - x).

    Args:
      threat: norm, bounds; eps for what is returned and for the random starts.
      steps: of a run; each takes K - 1 gradients.
      restarts: further runs start at random points of the ball of eps / 2.
      alpha_max: largest bias to the image.
      eta: overshoot, 1 or more.
      beta: how far a misclassified iterate goes back to the image.
      search: steps of the final search on the segment to the image.
      minimal: return the nearest misclassified point however far it is, and use all steps to
        bring it nearer. False: an example is finished inside the ball, and keeps its image where
        nothing inside was found.
      targeted: labels are targets: the nearest point that is classified so, by projections onto
        the boundary between the target and the class that leads; one gradient a step.

    Returns:
      An `Attack`; with `minimal`, `threat.distance(x_adv, images)` is the distance found, and the
      image itself says that nothing was found (or that it is misclassified).

    Raises:
      ValueError: counts or shares out of range; at the call, bad images, labels or keys.

    Reference: Croce, Hein, Minimally distorted adversarial examples with a fast adaptive boundary
      attack, arXiv 1907.02044, algorithm 1.

    Deviations: the nearest boundary is the nearest inside the box (the paper ranks the classes by
    |z_y - z_t| over the gradient's dual norm, blind to the box), and the final search runs once, on
    the nearest point of all runs.

    >>> import jax
    >>> from jaxdefense import attacks, threat
    >>> attack = attacks.fab(threat.L2(1.0), steps=5, minimal=True)
    >>> x, labels = jax.numpy.array([[0.625, 0.5, 0.25]]), jax.numpy.array([0])
    >>> x_adv = attack(lambda x: 10 * x, jax.random.key(0), x, labels)
    >>> threat.L2(1.0).distance(x_adv, x)  # to z_0 = z_1: 0.125 / sqrt(2)
    Array([0.088...], dtype=float32)
    """
    runs = _Search(
        threat, steps, restarts, alpha_max, eta, beta, search, minimal=minimal, targeted=targeted
    )

    def attack(predict: Predict, key: Key, images: Images, labels: Labels) -> Images:
        x = jax.lax.stop_gradient(images)

        def boundaries(numbers: Array, rows: Array) -> Boundary:
            if targeted:
                return boundary_of_target(predict, labels[rows])
            return nearest_boundary(predict, labels[rows], threat_of_rows(threat, rows))

        right = ~fooled(predict(x), labels, targeted)
        return runs.nearest(predict, key, x, labels, right, boundaries)

    return attack


@attack_factory()
def fab_targeted(
    threat: Threat,
    *,
    targets: int = 9,
    steps: int = 100,
    restarts: int = 1,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    search: int = 3,
    minimal: bool = False,
) -> Attack:
    """FAB-T: FAB against one boundary at a time, to each of the most likely wrong classes.

    One gradient a step instead of K - 1.

    Args:
      threat: see `fab`.
      targets: wrong classes tried, ranked by the clean logits; at most K - 1.
      steps: of a run.
      restarts: runs for each class.
      alpha_max: see `fab`.
      eta: see `fab`.
      beta: see `fab`.
      search: see `fab`.
      minimal: see `fab`.

    Returns:
      An `Attack`, as `fab`; any wrong class counts.

    Raises:
      ValueError: counts or shares out of range; at the call, bad images, labels or keys.

    With K <= targets there are K - 1 targets (a FewClassesWarning says so).

    Reference: Croce, Hein, arXiv 1907.02044 and arXiv 2003.01690, section 5.

    >>> import jax
    >>> from jaxdefense import attacks, threat
    >>> attack = attacks.fab_targeted(threat.L1(1.0), targets=1, steps=5, minimal=True)
    >>> x, labels = jax.numpy.array([[0.625, 0.5, 0.25]]), jax.numpy.array([0])
    >>> x_adv = attack(lambda x: 10 * x, jax.random.key(0), x, labels)
    >>> threat.L1(1.0).distance(x_adv, x)
    Array([0.12...], dtype=float32)
    """
    checks.check_count("targets", targets)
    runs = _Search(threat, steps, restarts, alpha_max, eta, beta, search, minimal=minimal)

    def attack(predict: Predict, key: Key, images: Images, labels: Labels) -> Images:
        x = jax.lax.stop_gradient(images)
        clean = predict(x)
        if clean.shape[-1] <= targets:
            tried = clean.shape[-1] - 1
            warn_few_classes(f"{targets} targets", clean.shape[-1], f"{tried} are tried")
        ranked = runner_up_classes(clean, labels, targets)

        def boundaries(numbers: Array, rows: Array) -> Boundary:
            return boundary_between(predict, labels[rows], ranked[rows, numbers // restarts])

        right = ~fooled(clean, labels)
        tried = ranked.shape[1]
        return runs.nearest(predict, key, x, labels, right, boundaries, targets=tried)

    return attack
