"""Minimal-norm attacks: the nearest misclassified point, whatever eps.

All of them, and FAB, have one form: an `Attack` that keeps an image's nearest fooling point if it
lies inside the threat's ball, and stops there. With `minimal=True` the point is returned however
far it is, and all steps bring it nearer: then `threat.distance(x_adv, images)` is the distance
found, and an unchanged image says that nothing was found or that it is misclassified as it is.

Lengths that an attack starts from are in image units and scale with the threat's bounds.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxdefense import losses
from jaxdefense.attacks import checks
from jaxdefense.attacks.fab import nearest_boundary
from jaxdefense.attacks.method import attack_factory
from jaxdefense.attacks.outcome import (
    fooled,
    initial_radii,
    minimize_distance,
    nearest_found,
    runner_up_classes,
    success_margin,
    value_fooled_grad,
    zero_non_finite,
)
from jaxdefense.types import (
    Array,
    Attack,
    Images,
    Key,
    Labels,
    Logits,
    PerExample,
    Predict,
    Threat,
    per_example,
)


def _check_l2(threat: Threat, attack: str) -> None:
    if threat.norm != "l2":
        raise ValueError(f"{attack} is an L2 attack, got {threat}; fmn and fab know every norm")


def _cosine(first: float, last: float, n: Any, steps: int) -> Array:
    """From first to last along half a cosine."""
    return last + (first - last) * (1 + jnp.cos(jnp.pi * n / max(steps - 1, 1))) / 2


def _width(threat: Threat) -> float:
    """The box's width: lengths meant for images in [0, 1] are multiplied by it."""
    return threat.bounds[1] - threat.bounds[0]


def _l2_divisor(x: Images) -> PerExample:
    """||x||_2 as a divisor: 1 where it is 0."""
    length = jnp.sqrt(jnp.sum(jnp.square(x), range(1, x.ndim)))
    return jnp.where(length > 0, length, 1)


def _unit(grad: Images) -> Images:
    """grad / ||grad||_2, or 0."""
    scale = jnp.max(jnp.abs(grad), range(1, grad.ndim))
    grad = grad / per_example(jnp.where(scale > 0, scale, 1), grad)
    return grad / per_example(_l2_divisor(grad), grad)


@attack_factory()
def deepfool(
    threat: Threat,
    *,
    steps: int = 50,
    overshoot: float = 0.02,
    candidates: int = 10,
    minimal: bool = False,
) -> Attack:
    """DeepFool: go to the nearest linearised decision boundary until the class changes.

    x_{t+1} = clip(x_t + (1 + overshoot) d_t), d_t the shortest step inside the box onto
    {x: z_k(x) = z_y(x)} linearised at x_t, for the class k where it is shortest.

    Args:
      threat: norm (any; the paper has L2 and L_inf), bounds, eps for what is returned.
      steps: at most; each takes a gradient per candidate.
      overshoot: share by which a step is longer than to the boundary.
      candidates: the most likely wrong classes, at most K - 1, by the clean logits.
      minimal: return the point found however far it is.

    Returns:
      An `Attack`; see the module.

    Raises:
      ValueError: counts or shares out of range; at the call, bad images, labels or keys.

    Reference: Moosavi-Dezfooli et al., DeepFool: a simple and accurate method to fool deep neural
      networks, arXiv 1511.04599.

    Deviation: the steps are exact inside the box; the paper's leave it and are clipped.

    >>> import jax
    >>> from jaxdefense import attacks, threat
    >>> attack = attacks.deepfool(threat.L2(1.0), minimal=True)
    >>> x, labels = jax.numpy.array([[0.625, 0.5, 0.25]]), jax.numpy.array([0])
    >>> x_adv = attack(lambda x: 10 * x, jax.random.key(0), x, labels)
    >>> threat.L2(1.0).distance(x_adv, x)
    Array([0.090...], dtype=float32)
    """
    checks.check_count("steps", steps)
    checks.check_count("candidates", candidates)
    checks.check_step("overshoot", overshoot)

    def attack(predict: Predict, key: Key, images: Images, labels: Labels) -> Images:
        x = jax.lax.stop_gradient(images)
        clean = predict(x)
        linearise = nearest_boundary(
            predict, labels, threat, runner_up_classes(clean, labels, candidates)
        )

        def advance(_: Any, z: Images, best: PerExample) -> tuple[Images, Array, Images]:
            gap, normal = linearise(z)
            z = z + (1 + overshoot) * threat.step_to_hyperplane(z, normal, gap)
            z = jnp.clip(z, *threat.bounds).astype(x.dtype)
            return z, fooled(predict(z), labels), z

        best, _ = initial_radii(~fooled(clean, labels), x, threat, minimal)
        # The first fooling point ends the method, near or far.
        anywhere = jnp.full_like(best, jnp.finfo(best.dtype).max)
        _, best_x, _ = minimize_distance(
            advance, x, x, x, best, threat, steps=steps, enough=anywhere
        )
        return nearest_found(best_x, x, threat, minimal)

    return attack


@attack_factory()
def ddn(
    threat: Threat,
    *,
    steps: int = 100,
    gamma: float = 0.05,
    init_norm: float | None = None,
    step_size: float | None = None,
    minimal: bool = False,
    targeted: bool = False,
) -> Attack:
    """DDN: the gradient gives the direction, a radius that shrinks and grows gives the norm (L2).

    delta <- delta + alpha g / ||g||_2 with g the gradient of the cross-entropy (in the form that
    does not saturate, `losses.log_odds`); the radius is multiplied by 1 - gamma where the iterate
    is misclassified and by 1 + gamma where it is not; delta is scaled to it and clipped to the box.
    alpha falls along a cosine to a hundredth.

    Args:
      threat: an L2 threat: bounds, eps for what is returned.
      steps: gradients.
      gamma: the radius's relative change.
      init_norm: first radius, image units; default the box's width.
      step_size: first alpha, image units; default the box's width.
      minimal: return the nearest point found however far it is.
      targeted: labels are targets to be reached.

    Returns:
      An `Attack`; see the module.

    Raises:
      ValueError: another norm, counts out of range; at the call, bad images, labels or keys.

    Reference: Rony et al., Decoupling direction and norm for efficient gradient-based L2
      adversarial attacks and defenses, arXiv 1811.09600.

    >>> import jax
    >>> from jaxdefense import attacks, threat
    >>> attack = attacks.ddn(threat.L2(1.0), steps=50, minimal=True)
    >>> x, labels = jax.numpy.array([[0.625, 0.5, 0.25]]), jax.numpy.array([0])
    >>> x_adv = attack(lambda x: 10 * x, jax.random.key(0), x, labels)
    >>> threat.L2(1.0).distance(x_adv, x) < 0.1
    Array([ True], dtype=bool)
    """
    _check_l2(threat, "ddn")
    checks.check_count("steps", steps)
    for name, value in (("gamma", gamma), ("init_norm", init_norm), ("step_size", step_size)):
        checks.check_step(name, value)
    radius_0 = _width(threat) if init_norm is None else init_norm
    alpha_0 = _width(threat) if step_size is None else step_size

    def attack(predict: Predict, key: Key, images: Images, labels: Labels) -> Images:
        x = jax.lax.stop_gradient(images)

        def loss(logits: Logits, labels: Labels) -> PerExample:
            return losses.log_odds(logits, labels) * (-1 if targeted else 1)

        def advance(n: Any, state: Any, best: PerExample) -> tuple[Images, Array, Any]:
            z, radius = state
            _, hit, grad = value_fooled_grad(predict, z, labels, loss, targeted)
            grad = grad.astype(x.dtype)
            alpha = _cosine(alpha_0, alpha_0 / 100, n, steps).astype(x.dtype)
            delta = z - x + alpha * _unit(grad)
            radius = radius * jnp.where(hit, 1 - gamma, 1 + gamma).astype(x.dtype)
            moved = x + delta * per_example(radius / _l2_divisor(delta), x)
            return z, hit, (jnp.clip(moved, *threat.bounds), radius)

        best, enough = initial_radii(~fooled(predict(x), labels, targeted), x, threat, minimal)
        start = (x, jnp.full_like(best, radius_0))
        _, best_x, _ = minimize_distance(
            advance, start, x, x, best, threat, steps=steps, enough=enough
        )
        return nearest_found(best_x, x, threat, minimal)

    return attack


@attack_factory()
def fmn(
    threat: Threat,
    *,
    steps: int = 100,
    gamma: float = 0.05,
    step_size: float | None = None,
    minimal: bool = False,
    targeted: bool = False,
) -> Attack:
    """FMN: steepest ascent on the margin inside a ball whose radius follows the boundary.

    delta <- P_radius(delta + alpha g / ||g||_2) with g the margin's gradient. Until a fooling point
    is found the radius is (1 + gamma) (||delta|| + |margin| / ||g||_dual), a linear estimate;
    afterwards it is min(radius (1 - gamma), best distance) at fooling points and
    radius (1 + gamma) elsewhere. alpha falls along a cosine to a hundredth, gamma to a thousandth.

    Args:
      threat: norm (any), bounds, eps for what is returned.
      steps: gradients.
      gamma: the radius's first relative change.
      step_size: first alpha, an L2 length in image units; default the box's width.
      minimal: return the nearest point found however far it is.
      targeted: labels are targets to be reached.

    Returns:
      An `Attack`; see the module.

    Raises:
      ValueError: counts out of range; at the call, bad images, labels or keys.

    Reference: Pintor et al., Fast minimum-norm adversarial attacks through adaptive norm
      constraints, arXiv 2102.12827.

    Deviations: the projection is the nearest point of ball and box, not of the ball alone; the
    first radius is 1 + gamma times the paper's, because a point on the boundary fools nobody.

    >>> import jax
    >>> from jaxdefense import attacks, threat
    >>> attack = attacks.fmn(threat.Linf(1.0), steps=50, minimal=True)
    >>> x, labels = jax.numpy.array([[0.625, 0.5, 0.25]]), jax.numpy.array([0])
    >>> x_adv = attack(lambda x: 10 * x, jax.random.key(0), x, labels)
    >>> threat.Linf(1.0).distance(x_adv, x) < 0.07
    Array([ True], dtype=bool)
    """
    checks.check_count("steps", steps)
    for name, value in (("gamma", gamma), ("step_size", step_size)):
        checks.check_step(name, value)
    alpha_0 = _width(threat) if step_size is None else step_size

    def attack(predict: Predict, key: Key, images: Images, labels: Labels) -> Images:
        x = jax.lax.stop_gradient(images)
        aim = functools.partial(success_margin, targeted=targeted)

        def advance(n: Any, state: Any, best: PerExample) -> tuple[Images, Array, Any]:
            z, radius, found = state
            value, hit, grad = value_fooled_grad(predict, z, labels, aim, targeted)
            value, grad = value.astype(x.dtype), grad.astype(x.dtype)
            distance = threat.distance(z, x)
            found = found | hit
            share = _cosine(gamma, gamma / 1000, n, steps).astype(x.dtype)
            dual = threat.dual_norm(grad)
            guess = (1 + share) * (distance - value / jnp.where(dual > 0, dual, 1))
            outside = jnp.where(found, radius * (1 + share), guess)
            inside = jnp.minimum(radius * (1 - share), jnp.minimum(best, distance))
            radius = jnp.where(hit, inside, outside)
            alpha = _cosine(alpha_0, alpha_0 / 100, n, steps).astype(x.dtype)
            moved = threat.with_eps(radius).project(z + alpha * _unit(grad), x)
            return z, hit, (moved, radius, found)

        right = ~fooled(predict(x), labels, targeted)
        best, enough = initial_radii(right, x, threat, minimal)
        start = (x, jnp.full_like(best, jnp.inf), ~right)
        _, best_x, _ = minimize_distance(
            advance, start, x, x, best, threat, steps=steps, enough=enough
        )
        return nearest_found(best_x, x, threat, minimal)

    return attack


@attack_factory()
def cw(
    threat: Threat,
    *,
    steps: int = 1000,
    searches: int = 9,
    learning_rate: float = 0.01,
    initial_const: float = 1e-3,
    confidence: float = 0.0,
    minimal: bool = False,
    targeted: bool = False,
) -> Attack:
    """Carlini and Wagner's L2 attack: Adam on distance plus margin, the box by tanh.

    min_w ||x(w) - x||_2^2 + c max(confidence - margin(x(w)), 0), x(w) = (tanh(w) + 1) / 2 scaled to
    the bounds, where margin = max_{k != y} z_k - z_y (of a target, the other way round) and the
    distance is in units of the box's width. c starts small, grows tenfold until a fooling
    point is found, and is then searched by halving, per example.

    Args:
      threat: an L2 threat: bounds, eps for what is returned.
      steps: of Adam for each c.
      searches: values of c tried.
      learning_rate: Adam's, in units of w.
      initial_const: first c.
      confidence: margin aimed at, in logits.
      minimal: return the nearest point found however far it is.
      targeted: labels are targets to be reached.

    Returns:
      An `Attack`; see the module.

    Raises:
      ValueError: another norm, counts out of range; at the call, bad images, labels or keys.

    Reference: Carlini, Wagner, Towards evaluating the robustness of neural networks,
      arXiv 1608.04644, section VI-A.

    Deviation: the original stops a search early when Adam stalls; here it takes its steps.

    >>> import jax
    >>> from jaxdefense import attacks, threat
    >>> attack = attacks.cw(threat.L2(1.0), steps=50, searches=5, minimal=True)
    >>> x, labels = jax.numpy.array([[0.625, 0.5, 0.25]]), jax.numpy.array([0])
    >>> x_adv = attack(lambda x: 10 * x, jax.random.key(0), x, labels)
    >>> threat.L2(1.0).distance(x_adv, x) < 0.1
    Array([ True], dtype=bool)
    """
    _check_l2(threat, "cw")
    checks.check_count("steps", steps)
    checks.check_count("searches", searches)
    for name, value in (
        ("learning_rate", learning_rate),
        ("initial_const", initial_const),
        ("confidence", confidence),
    ):
        checks.check_step(name, value)
    low, high = threat.bounds
    adam = optax.adam(learning_rate)

    def to_box(w: Images) -> Images:
        return low + (high - low) * (jnp.tanh(w) + 1) / 2

    def attack(predict: Predict, key: Key, images: Images, labels: Labels) -> Images:
        x = jax.lax.stop_gradient(images)
        # Slightly inside the box, whose edge tanh reaches at infinity only.
        origin = jnp.arctanh((2 * (x - low) / (high - low) - 1) * (1 - 1e-6))

        def advance(_: Any, state: Any, best: PerExample) -> tuple[Images, Array, Any]:
            w, memory, const, ever = state

            def total(w):
                z = to_box(w)
                margin = success_margin(predict(z), labels, targeted)
                far = jnp.sum(jnp.square((z - x) / (high - low)), range(1, x.ndim))
                cost = far + const * jnp.maximum(confidence - margin, 0).astype(x.dtype)
                return jnp.sum(cost), (z, margin > confidence)

            grad, (z, hit) = jax.grad(total, has_aux=True)(w)
            moves, memory = adam.update(zero_non_finite(grad), memory)
            return z, hit, (optax.apply_updates(w, moves), memory, const, ever | hit)

        def search(_: Any, carry: Any) -> Any:
            const, least, most, best_x, best = carry
            never = jnp.zeros(x.shape[0], bool)
            state = (origin, adam.init(origin), const, never)
            state, best_x, best = minimize_distance(
                advance, state, x, best_x, best, threat, steps=steps, enough=enough
            )
            ever = state[3]
            least, most = jnp.where(ever, least, const), jnp.where(ever, const, most)
            const = jnp.where(jnp.isinf(most), 10 * const, (least + most) / 2)
            return const, least, most, best_x, best

        best, enough = initial_radii(~fooled(predict(x), labels, targeted), x, threat, minimal)
        zeros = jnp.zeros_like(best)
        start = (zeros + initial_const, zeros, zeros + jnp.inf, x, best)
        best_x = jax.lax.fori_loop(0, searches, search, start)[3]
        return nearest_found(best_x, x, threat, minimal)

    return attack
