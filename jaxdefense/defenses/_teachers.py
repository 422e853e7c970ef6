"""Shared by the distilling defences: a teacher, trained before or in the run's first phase.

A trained one (`base.Trained`; in a config {"workdir": ..., "checkpoint": "best"}) stands in the
role `teacher` and never moves. Otherwise the run begins with a phase that trains one.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdefense import defenses, models
from jaxdefense.defenses import base
from jaxdefense.types import Images, Key, Logits, PyTree, Threat

ROLE = "teacher"

Spec = base.Trained | Mapping[str, Any] | None


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
    """A network that a student learns from.

    Attributes:
      init: (key, images) -> the teacher's (params, carry).
      predict: the teacher in eval mode.
      phases: those that train it inside the run, before the student's; none for a trained one.
      pretrained: {role: the trained network}, or nothing.
    """

    init: Callable[[Key, Images], tuple[base.Params, base.Carry]]
    predict: base.Predictor
    phases: tuple[base.Phase, ...] = ()
    pretrained: Mapping[str, base.Trained] = dataclasses.field(default_factory=dict)

    def defense(
        self, student: base.Net, loss: base.Loss, *, craft: base.Craft = base.unchanged
    ) -> base.Defense:
        """The defence whose last phase trains the student; predictors `classifier` and `teacher`.

        The student starts as it would without a teacher, from the same seed.

        Args:
          student: in the role `classifier`.
          loss: of the student.
          craft: of the student's phase.
        """

        def init(key: Key, images: Images) -> tuple[base.Params, base.Carry]:
            params, carry = student.init(key, images)
            more, statistics = self.init(jax.random.fold_in(key, 1), images)
            return {**params, **more}, {**carry, **statistics}

        phase = base.Phase("distill", (base.Update(loss, (student.role,), craft),))
        predictors = {student.role: student.predict, ROLE: self.predict}
        return base.Defense(init, (*self.phases, phase), predictors, pretrained=self.pretrained)


def frozen_teacher(network: base.Trained) -> Teacher:
    """A teacher that was trained before."""
    predict = base.Net(network.module, ROLE).predict
    return Teacher(lambda key, images: network.init(ROLE), predict, pretrained={ROLE: network})


def make_teacher(spec: Spec, model: nn.Module, threat: Threat) -> Teacher:
    """The teacher of a defence's option `teacher`.

    Args:
      spec: a trained network; or how the run's first phase trains one: {"name": a defence of one
        phase, by default pgd_at, **its options, "model": {"name": ..., **fields}, by default the
        student's, "length": of the phase, by default half of the run}; None is {}.
      model: the student.
      threat: what a teacher in the run is defended against.

    Raises:
      ValueError: a workdir that is not loaded yet, a defence of several phases, or wrong names
        or options.
    """
    if isinstance(spec, base.Trained):
        return frozen_teacher(spec)
    options = dict(spec or {})
    if "workdir" in options:
        raise ValueError(
            f"a teacher is a trained network: runs.load_classifier({options['workdir']!r}); a "
            f"config's 'workdir' is read by runs.build"
        )
    fields, length = dict(options.pop("model", None) or {}), options.pop("length", None)
    name = options.pop("name", "pgd_at")
    if fields:
        model = models.make(fields.pop("name", ""), model.num_classes, **fields)  # type: ignore
    defense = defenses.make(name, model, threat, **options)
    if len(defense.phases) != 1:
        raise ValueError(
            f"a teacher inside the run is trained by a defence of one phase; {name} has "
            f"{len(defense.phases)}: train it in a run of its own and give its workdir"
        )
    (phase,) = defense.phases

    def init(key: Key, images: Images) -> tuple[base.Params, base.Carry]:
        params, carry = defense.init(key, images)
        return _outside(params), _outside(carry)

    return Teacher(
        init,
        lambda params, carry: defense.predictors[defense.primary](_inside(params), _inside(carry)),
        (_renamed(phase, length),),
    )


def _name(role: str) -> str:
    return ROLE if role == "classifier" else f"{ROLE}_{role}"


def _outside(by_role: Mapping[str, PyTree]) -> dict[str, PyTree]:
    return {_name(role): tree for role, tree in by_role.items()}


def _inside(by_role: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """The teacher's own roles under the names that its defence gave them."""
    prefix = f"{ROLE}_"
    more = {role: tree for role, tree in by_role.items() if role.startswith(prefix)}
    others = {role.removeprefix(prefix): tree for role, tree in more.items()}
    return {"classifier": by_role[ROLE], **others}


def _renamed(phase: base.Phase, length: float | str | None) -> base.Phase:
    """A defence's phase with `teacher` in place of its role `classifier`."""

    def wrapped(update: base.Update) -> base.Update:
        def craft(
            params: base.Params, carry: base.Carry, batch: base.Batch, key: Key
        ) -> base.Batch:
            return update.craft(_inside(params), _inside(carry), batch, key)

        def loss(
            params: base.Params, carry: base.Carry, batch: base.Batch, key: Key
        ) -> base.LossValue:
            value, (new, metrics) = update.loss(_inside(params), _inside(carry), batch, key)
            return value, ({**carry, **_outside(new)}, metrics)

        roles = tuple(map(_name, update.roles))
        return base.Update(loss, roles, craft)

    def followed(after: base.After) -> base.After:
        def follow(params: base.Params, carry: base.Carry, batch: base.Batch) -> base.Carry:
            return {**carry, **_outside(after(_inside(params), _inside(carry), batch))}

        return follow

    return dataclasses.replace(
        phase,
        name=ROLE,
        updates=tuple(map(wrapped, phase.updates)),
        length=length,
        optimizers=_outside(phase.optimizers),
        after=tuple(map(followed, phase.after)),
    )


def metrics(batch: base.Batch, clean: Logits, moved: Logits) -> base.Metrics:
    """The student's accuracy on x and x', and its agreement at x' with the teacher at x.

    Args:
      batch: with "label" and "soft", the teacher's logits of x.
      clean: the student's logits of x.
      moved: the student's logits of x'.
    """
    return {
        **base.accuracies(clean, moved, batch["label"]),
        "agreement": base.accuracy(moved, jnp.argmax(batch["soft"], -1)),
    }


def check_temperature_scale(scale: float) -> None:
    """A positive weight of a loss.

    Raises:
      ValueError: otherwise.
    """
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale!r}")


def check_distillation(temperature: float, **shares: float) -> None:
    """A positive temperature, and shares in [0, 1].

    Args:
      temperature: of the softened predictions.
      **shares: by their names in the message.

    Raises:
      ValueError: otherwise.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature!r}")
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {share!r}")
