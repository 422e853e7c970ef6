"""What the attacks share about their results: who is fooled, what is kept, what it costs."""

import warnings
from typing import NamedTuple

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
