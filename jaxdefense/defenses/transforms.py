"""Transforms Defense -> Defense: what any recipe can be wrapped in."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdefense import losses, registry
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
        now = {
            "params": defense.without_pretrained(params),
            "carry": defense.without_pretrained(carry),
        }
        # Copies: two names for one buffer cannot both be donated to the step.
        return params, {**carry, "ema": jax.tree.map(jnp.copy, now)}

    def follow(params: base.Params, carry: base.Carry, batch: base.Batch) -> base.Carry:
        t = batch["step"].astype(jnp.float32)
        d = jnp.minimum(decay, (1 + t) / (10 + t))
        rest = {role: tree for role, tree in carry.items() if role != "ema"}
        now = {
            "params": defense.without_pretrained(params),
            "carry": defense.without_pretrained(rest),
        }

        def average(old, new):
            if not jnp.issubdtype(new.dtype, jnp.floating):
                return new
            return d * old + (1 - d) * new

        return {**carry, "ema": jax.tree.map(average, carry["ema"], now)}

    def averaged(function: Callable[[base.Params, base.Carry], Any]) -> Any:
        def at(params: base.Params, carry: base.Carry) -> Any:
            ema = carry["ema"]
            return function({**params, **ema["params"]}, {**carry, **ema["carry"]})

        return at

    def averaged_purifier(purifier: base.Purifier) -> base.Purifier:
        detours = {name: averaged(p) for name, p in purifier.detours.items()}
        return base.Purifier(purifier.base, averaged(purifier.purify), detours)

    def change(phase: base.Phase) -> base.Phase:
        return dataclasses.replace(phase, after=(*phase.after, follow))

    predictors = {name: averaged(p) for name, p in defense.predictors.items()}
    raw = {f"raw_{name}": p for name, p in defense.predictors.items()}
    purifiers = {name: averaged_purifier(p) for name, p in defense.purifiers.items()}
    phases = _map_phases(defense, change)
    return base.Defense(init, phases, {**predictors, **raw}, purifiers, defense.pretrained)


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


def stacked(
    defense: base.Defense, *, members: int = 2, prefix: str = "member", same_keys: bool = False
) -> base.Defense:
    """Several members of a defence trained in one program, on the same batches.

    Parameters, carry and optimiser states get a leading axis of members, and the loss is the
    members' sum, so that each moves by its own gradient. Members are mapped one after the other
    on the CPU (a convolution vmapped over kernels is slower there) and vmapped elsewhere.

    Members differ in their keys (initialisation, what is drawn in crafts and losses) and, where
    the defence asks for it, in a constant: a defence whose carry holds "member", a one-hot vector
    over its variants (`cse` with `protect="each"`), finds its own number there, and must be
    stacked as often as it has variants. The batches, with their order and augmentation, are the
    same for all: members are not quite as different as runs of several seeds.

    Optimisers act on each entry, so they serve the stack as they would each member; two options
    do not: "clip_norm" takes the norm of the whole stack, and "decay_kernels_only" takes stacked
    biases for kernels. `defenses.make` stacks last, behind weight perturbation and EMA.

    Args:
      defense: any.
      members: how many.
      prefix: the predictors are `<prefix>0`, `<prefix>1`, ... and, of others than the deployed
        one, `<prefix>0_<name>`, ... Validation and selection look at the first alone; where that
        will not do, train for a fixed length and take the checkpoint `last`.
      same_keys: all members draw from the same keys: with a constant of their own each is then
        what the unstacked defence would be with that constant and the same seed. A phase that
        does not ask for the constant (`Phase.common`: a warm start) is computed once for all.

    Raises:
      ValueError: no members; when parameters are first made, not as many as variants.
    """
    if members < 1:
        raise ValueError(f"stacked needs at least one member, got {members}")
    numbers = jnp.arange(members)

    def each(function: Callable[..., Any], *stacks: Any) -> Any:
        """function(number, *member's slices) of every member, stacked."""
        if jax.default_backend() == "cpu":
            return jax.lax.map(lambda slices: function(*slices), (numbers, *stacks))
        return jax.vmap(function)(numbers, *stacks)

    def own(key: Key, number: Any) -> Key:
        return key if same_keys else jax.random.fold_in(key, number)

    def init(key: Key, images: Any) -> tuple[base.Params, base.Carry]:
        params, carry = each(lambda i: defense.init(own(key, i), images))
        if "member" in carry:
            variants = carry["member"].shape[-1]
            if variants != members:
                raise ValueError(f"the defence has {variants} variants, and {members} members")
            carry = {**carry, "member": jnp.eye(members)}
        return params, carry

    def wrapped(update: base.Update) -> base.Update:
        def craft(params: Any, carry: Any, batch: base.Batch, key: Key) -> base.Batch:
            def one(i, params, carry):
                crafted = update.craft(params, carry, batch, own(key, i))
                return {name: v for name, v in crafted.items() if batch.get(name) is not v}

            return {**batch, "members": each(one, params, carry)}

        def loss(params: Any, carry: Any, batch: base.Batch, key: Key) -> Any:
            shared = {name: v for name, v in batch.items() if name != "members"}

            def one(i, params, carry, crafted):
                return update.loss(params, carry, {**shared, **crafted}, own(key, i))

            values, (carry, metrics) = each(one, params, carry, batch.get("members", {}))
            metrics = {"loss": (values, jnp.ones(members)), **metrics}
            return jnp.sum(values), (carry, jax.tree.map(lambda v: jnp.sum(v, 0), metrics))

        return base.Update(loss, update.roles, craft)

    def once(update: base.Update) -> base.Update:
        """The first member's update, for all: they are still equal."""

        def first(tree: Any) -> Any:
            return jax.tree.map(lambda leaf: leaf[0], tree)

        def craft(params: Any, carry: Any, batch: base.Batch, key: Key) -> base.Batch:
            return update.craft(first(params), first(carry), batch, key)

        def loss(params: Any, carry: Any, batch: base.Batch, key: Key) -> Any:
            value, (new, metrics) = update.loss(_equal(params), first(carry), batch, key)
            new = jax.tree.map(lambda leaf, old: jnp.broadcast_to(leaf, old.shape), new, carry)
            if "member" in carry:
                new = {**new, "member": carry["member"]}
            return value, (new, metrics)

        return base.Update(loss, update.roles, craft)

    def followed(after: base.After) -> base.After:
        def follow(params: base.Params, carry: base.Carry, batch: base.Batch) -> base.Carry:
            return each(lambda _, params, carry: after(params, carry, batch), params, carry)

        return follow

    def change(phase: base.Phase) -> base.Phase:
        change_one = once if phase.common and same_keys else wrapped
        updates, after = tuple(map(change_one, phase.updates)), tuple(map(followed, phase.after))
        return dataclasses.replace(phase, updates=updates, after=after)

    def of(i: int, function: Callable[[base.Params, base.Carry], Any]) -> Any:
        def at(params: base.Params, carry: base.Carry) -> Any:
            return function(*jax.tree.map(lambda leaf: leaf[i], (params, carry)))

        return at

    def label(i: int, name: str) -> str:
        return f"{prefix}{i}" if name == defense.primary else f"{prefix}{i}_{name}"

    def purifier(i: int, purifier: base.Purifier) -> base.Purifier:
        detours = {name: of(i, p) for name, p in purifier.detours.items()}
        return base.Purifier(label(i, purifier.base), of(i, purifier.purify), detours)

    every = range(members)
    predictors = {label(i, n): of(i, p) for i in every for n, p in defense.predictors.items()}
    purifiers = {label(i, n): purifier(i, p) for i in every for n, p in defense.purifiers.items()}
    phases = _map_phases(defense, change)
    judged = {label(i, name): i for i in every for name in defense.judged}
    return base.Defense(init, phases, predictors, purifiers, defense.pretrained, judged)


def _equal(stack: Any) -> Any:
    """One of the equal members of a stack; what its gradient is, each of them gets."""

    def one(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf[0]
        held = jax.lax.stop_gradient(leaf)
        return held[0] + jnp.sum(leaf - held, 0)

    return jax.tree.map(one, stack)


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

    def init(key: Key, images: Any) -> tuple[base.Params, base.Carry]:
        (params, carry), (given, statistics) = defense.init(key, images), teacher.init(net.role)
        return {**params, **given}, {**carry, **statistics}

    def wrapped(update: base.Update) -> base.Update:
        def craft(params: Any, carry: Any, batch: base.Batch, key: Key) -> base.Batch:
            logits = net.predict(params, carry)(batch["image"])
            hot = losses.one_hot(batch["label"], logits.shape[-1])
            soft = jax.nn.softmax(logits.astype(hot.dtype) / temperature)
            batch = {**batch, "target": weight * soft + (1 - weight) * hot}
            return update.craft(params, carry, batch, key)

        return dataclasses.replace(update, craft=craft)

    def change(phase: base.Phase) -> base.Phase:
        return dataclasses.replace(phase, updates=tuple(map(wrapped, phase.updates)))

    return dataclasses.replace(
        defense,
        init=init,
        phases=_map_phases(defense, change),
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

    Raises:
      ValueError: unknown name or options out of range.
    """
    if name not in _NAMED:
        registry.raise_unknown("transform", name, _NAMED)
    return _NAMED[name](defense, **options)
