"""What the attacks share about their results: who is fooled, what is kept, what it costs."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdefense import losses
from jaxdefense.types import Array, Images, Labels, Logits, PerExample, Threat, per_example


class Passes(NamedTuple):
    """The most passes through the model that an attack spends on one example."""

    forward: int
    backward: int


class FewClassesWarning(UserWarning):
    """The model has fewer classes than the attack was written for, and a fallback runs."""


def few_classes(attack: str, num_classes: int, instead: str) -> None:
    """Says at trace time that `attack` does not exist for so few classes, and what runs."""
    warnings.warn(
        f"{attack} needs more than {num_classes} classes: {instead}",
        FewClassesWarning,
        stacklevel=2,
    )


def fooled(logits: Logits, labels: Labels) -> Array:
    """(B,) bool: another class is strictly larger; ties and NaN count for the defender.

    Half-precision logits tie often, and a tie may be broken either way when an evaluation
    repeats the forward pass in float32.
    """
    return losses.margin(logits, labels) > 0


def pick(mask: Array, x: Array, y: Array) -> Array:
    """x (B, ...) where mask (B,), else y."""
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 1)), x, y)


def rivals(logits: Logits, labels: Labels, count: int) -> Array:
    """(B, count) classes other than the label, the largest logit first.

    `count` is cut to K - 1.
    """
    own = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    others = jnp.where(own, -jnp.inf, logits.astype(jnp.float32))
    return jax.lax.top_k(others, min(count, logits.shape[-1] - 1))[1]


def keep_inside(x_adv: Images, x: Images, threat: Threat) -> Images:
    """x_adv where it lies in the threat's ball, else x."""
    return pick(threat.distance(x_adv, x) <= threat.eps, x_adv, x)


def between(x: Images, x_adv: Images, fraction: PerExample) -> Images:
    """The point at that fraction of the way from x to x_adv."""
    return x + per_example(fraction, x) * (x_adv - x)


def nearest(
    advance: Callable[[Any, Any, PerExample], tuple[Images, Array, Any]],
    state: Any,
    x: Images,
    best_x: Images,
    best: PerExample,
    threat: Threat,
    *,
    steps: int,
    enough: PerExample,
) -> tuple[Any, Images, PerExample]:
    """Runs a minimal-norm attack's steps and keeps each example's nearest fooling point.

    Args:
      advance: (step's number, state, best distance) -> (point, whether it fools, state).
      state: of the attack, any pytree.
      x: (B, ...) images.
      best_x: (B, ...) nearest fooling points so far.
      best: (B,) their distances, inf for none.
      threat: gives the distance.
      steps: at most; the loop ends when every example is finished.
      enough: (B,) an example at this distance or nearer is finished, and keeps its point.

    Returns:
      State, best_x, best.
    """

    def step(carry: Any) -> Any:
        n, state, best_x, best = carry
        z, hit, state = advance(n, state, best)
        distance = threat.distance(z, x)
        closer = hit & (distance < best) & (best > enough)
        return n + 1, state, pick(closer, z, best_x), jnp.where(closer, distance, best)

    def going(carry: Any) -> Array:
        return (carry[0] < steps) & jnp.any(carry[3] > enough)

    return jax.lax.while_loop(going, step, (jnp.array(0), state, best_x, best))[1:]


def radii(right: Array, x: Images, threat: Threat, minimal: bool) -> tuple[PerExample, PerExample]:
    """Where a minimal-norm attack starts and ends: best distances so far, and what is enough.

    What is misclassified already is at distance 0. Inside the ball is enough, unless `minimal`.
    """
    best = jnp.where(right, jnp.inf, 0).astype(x.dtype)
    eps = jnp.broadcast_to(jnp.asarray(threat.eps, x.dtype), right.shape)
    return best, jnp.zeros_like(eps) if minimal else eps
