"""Transforms Defense -> Defense: what any recipe can be wrapped in."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxdefense import losses, registry, validate
from jaxdefense.defenses import base
from jaxdefense.defenses._stacked import stacked
from jaxdefense.types import Array, Images, Key, PyTree

Built = TypeVar("Built")


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

    def init(key: Key, images: Images) -> tuple[base.Params, base.Carry]:
        params, carry = defense.init(key, images)
        now = {
            "params": defense.without_pretrained(params),
            "carry": defense.without_pretrained(carry),
        }
        # Copies: two names for one buffer cannot both be donated to the step.
        return params, {**carry, "ema": jax.tree.map(jnp.copy, now)}

    def follow(params: base.Params, carry: base.Carry, batch: base.Batch) -> base.Carry:
        t = batch["step"].astype(jnp.float32)
        d = jnp.minimum(decay, (1 + t) / (10 + t))
        kept = carry["ema"]
        # Of the roles that had averages at first, not of those that later transforms add.
        now = {
            "params": {role: params[role] for role in kept["params"]},
            "carry": {role: carry[role] for role in kept["carry"]},
        }

        def average(old: Array, new: Array) -> Array:
            if not jnp.issubdtype(new.dtype, jnp.floating):
                return new
            return d * old + (1 - d) * new

        return {**carry, "ema": jax.tree.map(average, kept, now)}

    def averages(params: base.Params, carry: base.Carry) -> tuple[base.Params, base.Carry]:
        ema = carry["ema"]
        return {**params, **ema["params"]}, {**carry, **ema["carry"]}

    def averaged(
        function: Callable[[base.Params, base.Carry], Built],
    ) -> Callable[[base.Params, base.Carry], Built]:
        def of_averages(params: base.Params, carry: base.Carry) -> Built:
            return function(*averages(params, carry))

        return of_averages

    def averaged_purifier(purifier: base.Purifier) -> base.Purifier:
        detours = {name: averaged(p) for name, p in purifier.detours.items()}
        return base.Purifier(purifier.base, averaged(purifier.purify), detours)

    def change(phase: base.Phase) -> base.Phase:
        return dataclasses.replace(phase, after=(*phase.after, follow))

    predictors = {name: averaged(p) for name, p in defense.predictors.items()}
    raw = {f"raw_{name}": p for name, p in defense.predictors.items()}
    purifiers = {name: averaged_purifier(p) for name, p in defense.purifiers.items()}
    return dataclasses.replace(
        defense,
        init=init,
        phases=defense.map_phases(change),
        predictors={**predictors, **raw},
        purifiers=purifiers,
        deployed=averaged(defense.deployed),
    )


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

    def perturbation(weights: PyTree, grads: PyTree, scale: Array) -> PyTree:
        def one(w: Array, g: Array) -> Array:
            if w.ndim < 2:
                return jnp.zeros_like(w)
            norm = jnp.linalg.norm(g.reshape(-1))
            return scale * jnp.linalg.norm(w.reshape(-1)) * g / jnp.where(norm > 0, norm, 1)

        return jax.tree.map(one, weights, grads)

    def wrapped(update: base.Update) -> base.Update:
        def loss(
            params: base.Params, carry: base.Carry, batch: base.Batch, key: Key
        ) -> base.LossValue:
            trained = jax.lax.stop_gradient({role: params[role] for role in update.roles})
            grads = jax.grad(lambda p: update.loss({**params, **p}, carry, batch, key)[0])(trained)
            # The perturbation is the whole batch's, so that all devices descend at one point.
            grads = jax.lax.pmean(grads, base.AXIS)
            scale = gamma * (batch["epoch"] >= warmup_epochs)
            shift = jax.lax.stop_gradient(perturbation(trained, grads, scale))
            moved = {role: jax.tree.map(jnp.add, params[role], shift[role]) for role in shift}
            return update.loss({**params, **moved}, carry, batch, key)

        return dataclasses.replace(update, loss=loss)

    return dataclasses.replace(defense, phases=defense.map_updates(wrapped))


def with_soft_labels(
    defense: base.Defense,
    *,
    teacher: base.Trained,
    temperature: float = 1.0,
    weight: float = 1.0,
) -> base.Defense:
    """A teacher's softened predictions in place of the labels, where a loss has targets.

    target = weight softmax(T(x) / tau) + (1 - weight) one-hot(y), x the batch's images.

    What a defence does with labels themselves (PGD's cross-entropy, a margin) it still does.

    Args:
      defense: any whose losses read `base.targets`.
      teacher: T, in eval mode.
      temperature: tau.
      weight: the teacher's share.

    Returns:
      A `Defense` with the teacher in the role `soft_labels`.

    Raises:
      ValueError: no trained teacher, a temperature that is not positive, or a weight outside
        [0, 1].
    """
    if not isinstance(teacher, base.Trained):
        raise ValueError(
            f"soft_labels needs a trained teacher ({{'workdir': ...}} in a config), got {teacher!r}"
        )
    if not temperature > 0 or not 0 <= weight <= 1:
        raise ValueError(
            f"need temperature > 0 and weight in [0, 1], got {temperature} and {weight}"
        )
    net = base.Net(teacher.module, "soft_labels")

    def init(key: Key, images: Images) -> tuple[base.Params, base.Carry]:
        (params, carry), (weights, statistics) = defense.init(key, images), teacher.init(net.role)
        return {**params, **weights}, {**carry, **statistics}

    def wrapped(update: base.Update) -> base.Update:
        def craft(
            params: base.Params, carry: base.Carry, batch: base.Batch, key: Key
        ) -> base.Batch:
            logits = net.predict(params, carry)(batch["image"])
            hot = losses.one_hot(batch["label"], logits.shape[-1])
            soft = jax.nn.softmax(logits.astype(hot.dtype) / temperature)
            batch = {**batch, "target": weight * soft + (1 - weight) * hot}
            return update.craft(params, carry, batch, key)

        return dataclasses.replace(update, craft=craft)

    return dataclasses.replace(
        defense,
        init=init,
        phases=defense.map_updates(wrapped),
        pretrained={**defense.pretrained, net.role: teacher},
    )


_NAMED: dict[str, Callable[..., base.Defense]] = {
    "ema": with_ema,
    "soft_labels": with_soft_labels,
    "stacked": stacked,
    "weight_perturbation": with_weight_perturbation,
}


def names() -> list[str]:
    """The transforms that a config can name."""
    return sorted(_NAMED)


def apply(defense: base.Defense, name: str, **options: Any) -> base.Defense:
    """The transform called `name`, applied.

    Args:
      defense: what is transformed.
      name: one of `names()`.
      **options: of the transform.

    Raises:
      ValueError: unknown name or options out of range.
    """
    if name not in _NAMED:
        registry.raise_unknown("transform", name, _NAMED)
    wanted = validate.declared(_NAMED[name])
    registry.check_known(f"option of transform {name}", options, list(wanted)[1:])
    validate.check_types(f"defense.transforms.{name}", options, wanted)
    return _NAMED[name](defense, **options)
