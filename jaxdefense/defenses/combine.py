"""A weighted sum of whole defences over one model."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from jaxdefense import defenses
from jaxdefense.defenses import base
from jaxdefense.types import Images, Key, Threat


def make(
    model: nn.Module, threat: Threat, *, parts: Mapping[str, float | Mapping[str, Any]]
) -> base.Defense:
    """sum_i weight_i loss_i, each loss with its own inner maximisation.

    Args:
      model: the one network.
      threat: given to every part.
      parts: {defence: its weight, or {"weight": w, **its options}}, e.g.
        `{"trades": {"weight": 1.0, "beta": 6.0}, "standard": 0.5}`.

    Returns:
      A `Defense`; its predictors are the first part's.

    Raises:
      ValueError: no parts, or parts that cannot run in step (see `combine`).
    """
    built = []
    for name, options in parts.items():
        options = {"weight": options} if isinstance(options, int | float) else dict(options)
        weight = float(options.pop("weight", 1.0))
        built.append((weight, defenses.make(name, model, threat, **options)))
    return combine(built)


def combine(parts: Sequence[tuple[float, base.Defense]]) -> base.Defense:
    """The defence whose losses are the weighted sums of the parts' losses.

    The parts share the parameters and statistics of the roles they have in common. Phases and
    updates are matched one to one; a part of a single phase and update joins every update of
    the others that trains the same roles. The carry passes through the parts in order.

    Raises:
      ValueError: no parts, or phases or roles that do not match.
    """
    if not parts:
        raise ValueError("combine needs at least one part")
    longest = max((part for _, part in parts), key=lambda d: len(d.phases))
    phases = tuple(_phase(i, phase, parts) for i, phase in enumerate(longest.phases))

    def init(key: Key, images: Images) -> tuple[base.Params, base.Carry]:
        params: base.Params = {}
        carry: base.Carry = {}
        for _, part in reversed(parts):  # of a shared role the first part's parameters are taken
            new_params, new_carry = part.init(key, images)
            params, carry = {**params, **new_params}, {**carry, **new_carry}
        return params, carry

    first = parts[0][1]
    pretrained = {role: net for _, part in reversed(parts) for role, net in part.pretrained.items()}
    return dataclasses.replace(
        first,
        init=init,
        phases=phases,
        pretrained=pretrained,
        variant_classes=next((p.variant_classes for _, p in parts if p.variant_classes), ()),
    )


def _phase(i: int, phase: base.Phase, parts: Sequence[tuple[float, base.Defense]]) -> base.Phase:
    chosen = []
    for weight, part in parts:
        if len(part.phases) == 1:
            chosen.append((weight, part.phases[0]))
        elif len(part.phases) > i and part.phases[i].name == phase.name:
            chosen.append((weight, part.phases[i]))
        else:
            raise ValueError(
                f"cannot combine: phase {i} is {phase.name!r} in one part, and the parts have "
                f"{[[p.name for p in d.phases] for _, d in parts]}"
            )
    updates = tuple(_update(j, update, chosen) for j, update in enumerate(phase.updates))
    after = tuple(dict.fromkeys(f for _, p in chosen for f in p.after))
    return dataclasses.replace(phase, updates=updates, after=after)


def _update(j: int, update: base.Update, phases: Sequence[tuple[float, base.Phase]]) -> base.Update:
    terms = []
    for weight, phase in phases:
        mine = phase.updates[0] if len(phase.updates) == 1 else phase.updates[j]
        if set(mine.roles) == set(update.roles):
            terms.append((weight, mine))
        elif len(phase.updates) > 1:
            raise ValueError(f"cannot combine updates of {mine.roles} and {update.roles}")
    if len(terms) < len(phases):
        raise ValueError(f"no loss of every part trains {update.roles}")

    def craft(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.Batch:
        crafted = []
        for i, (_, term) in enumerate(terms):
            k = jax.random.fold_in(key, i)
            crafted.append(term.craft(params, carry, batch, k))
        return {**batch, "parts": tuple(crafted)}

    def loss(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.LossValue:
        total: Any = 0.0
        metrics: base.Metrics = {}
        for i, ((weight, term), part) in enumerate(zip(terms, batch["parts"], strict=True)):
            k = jax.random.fold_in(key, i)
            value, (carry, new) = term.loss(params, carry, part, k)
            total = total + weight * value
            metrics |= {f"{i}_{name}": metric for name, metric in new.items()}
        return total, (carry, metrics)

    return base.Update(loss, update.roles, craft)
