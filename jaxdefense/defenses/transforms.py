"""Transforms Defense -> Defense: what any recipe can be wrapped in."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdefense import registry
from jaxdefense.defenses import base
from jaxdefense.types import Key, PyTree


def _map_phases(
    defense: base.Defense, change: Callable[[base.Phase], base.Phase]
) -> tuple[base.Phase, ...]:
    """Every phase changed; what was one Phase in several places stays one."""
    changed = {phase: change(phase) for phase in defense.phases}
    return tuple(changed[phase] for phase in defense.phases)


def with_ema(defense: base.Defense, *, decay: float = 0.9995) -> base.Defense:
    """Predict with running averages of parameters and BatchNorm statistics.

    avg <- d avg + (1 - d) value after every batch, d = min(decay, (1 + t) / (10 + t)).

    Args:
      defense: any.
      decay: in [0, 1).

    Returns:
      A `Defense` whose predictors read the averages; the raw ones are `raw_<name>`.

    Raises:
      ValueError: decay outside [0, 1).

    Reference: Izmailov et al., arXiv 1803.05407; for adversarial training Gowal et al.,
      Uncovering the limits of adversarial training, arXiv 2010.03593.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}")

    def init(key: Key, images: Any) -> tuple[base.Params, base.Carry]:
        params, carry = defense.init(key, images)
        # Copies: two names for one buffer cannot both be donated to the step.
        return params, {**carry, "ema": jax.tree.map(jnp.copy, {"params": params, "carry": carry})}

    def follow(params: base.Params, carry: base.Carry, batch: base.Batch) -> base.Carry:
        t = batch["step"].astype(jnp.float32)
        d = jnp.minimum(decay, (1 + t) / (10 + t))
        now = {"params": params, "carry": {k: v for k, v in carry.items() if k != "ema"}}

        def average(old, new):
            if not jnp.issubdtype(new.dtype, jnp.floating):
                return new
            return d * old + (1 - d) * new

        return {**carry, "ema": jax.tree.map(average, carry["ema"], now)}

    def averaged(function: Callable[[base.Params, base.Carry], Any]) -> Any:
        return lambda params, carry: function(carry["ema"]["params"], carry["ema"]["carry"])

    def averaged_purifier(purifier: base.Purifier) -> base.Purifier:
        detours = {name: averaged(p) for name, p in purifier.detours.items()}
        return base.Purifier(purifier.base, averaged(purifier.purify), detours)

    def change(phase: base.Phase) -> base.Phase:
        return dataclasses.replace(phase, after=(*phase.after, follow))

    predictors = {name: averaged(p) for name, p in defense.predictors.items()}
    raw = {f"raw_{name}": p for name, p in defense.predictors.items()}
    purifiers = {name: averaged_purifier(p) for name, p in defense.purifiers.items()}
    phases = _map_phases(defense, change)
    return base.Defense(init, phases, {**predictors, **raw}, purifiers)


def with_weight_perturbation(
    defense: base.Defense, *, gamma: float = 5e-3, warmup_epochs: float = 0.0
) -> base.Defense:
    """Adversarial weight perturbation: descend at the worst point of a ball around the weights.

    v = gamma ||w|| g / ||g|| for each kernel w (arrays of two or more axes), g the loss's
    gradient there; the update is the loss's gradient at w + v, applied to w. The batch's
    adversarial examples are those crafted at w.

    Args:
      defense: any; every update is wrapped.
      gamma: relative size of the perturbation (the authors: 5e-3 for TRADES, 1e-2 for PGD-AT).
      warmup_epochs: no perturbation before.

    Raises:
      ValueError: gamma is negative.

    Reference: Wu et al., Adversarial weight perturbation helps robust generalization,
      arXiv 2004.05884, eq. 6-9.
    """
    if gamma < 0:
        raise ValueError(f"gamma must not be negative, got {gamma}")

    def perturbation(weights: PyTree, grads: PyTree, scale: Any) -> PyTree:
        def one(w, g):
            if w.ndim < 2:
                return jnp.zeros_like(w)
            norm = jnp.linalg.norm(g.reshape(-1))
            return scale * jnp.linalg.norm(w.reshape(-1)) * g / jnp.where(norm > 0, norm, 1)

        return jax.tree.map(one, weights, grads)

    def wrapped(update: base.Update) -> base.Update:
        def loss(params: Any, carry: Any, batch: base.Batch, key: Key) -> Any:
            trained = jax.lax.stop_gradient({role: params[role] for role in update.roles})
            grads = jax.grad(lambda p: update.loss({**params, **p}, carry, batch, key)[0])(trained)
            # The perturbation is the whole batch's, so that all devices descend at one point.
            grads = jax.lax.pmean(grads, base.AXIS)
            scale = gamma * (batch["epoch"] >= warmup_epochs)
            shift = jax.lax.stop_gradient(perturbation(trained, grads, scale))
            moved = {role: jax.tree.map(jnp.add, params[role], shift[role]) for role in shift}
            return update.loss({**params, **moved}, carry, batch, key)

        return dataclasses.replace(update, loss=loss)

    def change(phase: base.Phase) -> base.Phase:
        return dataclasses.replace(phase, updates=tuple(map(wrapped, phase.updates)))

    return dataclasses.replace(defense, phases=_map_phases(defense, change))


_NAMED = {"ema": with_ema, "weight_perturbation": with_weight_perturbation}


def names() -> list[str]:
    """The transforms that a config can name."""
    return sorted(_NAMED)


def apply(defense: base.Defense, name: str, **options: Any) -> base.Defense:
    """The transform called `name`, applied.

    Raises:
      ValueError: unknown name or options out of range.
    """
    if name not in _NAMED:
        registry.unknown("transform", name, _NAMED)
    return _NAMED[name](defense, **options)
