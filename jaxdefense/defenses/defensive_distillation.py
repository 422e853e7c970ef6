"""Defensive distillation: a network trained at a high temperature. A control: it is broken."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdefense import losses
from jaxdefense.defenses import _teachers, base
from jaxdefense.types import Array, Key, Logits, Threat


def make(
    model: nn.Module,
    threat: Threat,
    *,
    teacher: base.Trained | None = None,
    temperature: float = 20.0,
    teacher_length: float | str | None = None,
) -> base.Defense:
    """mean CE(S(x) / tau, softmax(T(x) / tau)); before that, mean CE(T(x) / tau, y) for T.

    The student is deployed at temperature 1, where its logits are about tau times larger, its
    softmax is saturated, and the cross-entropy's gradient vanishes in float32. That hides the
    gradient and protects nothing: attacks on logits (DLR, CW's margin) break it, so judge it with
    `--protocol=autoattack`.

    Args:
      model: the student S and, trained in the run, T: images (B, H, W, C) -> logits (B, K).
      threat: unused; every defence has the same signature.
      teacher: T, a network trained before (in a config {"workdir": ..., "checkpoint": "best"});
        None: the run's first phase trains one of the student's kind.
      temperature: tau, 20 to 100 in the literature.
      teacher_length: of that phase, by default half of the run.

    Returns:
      A `Defense` with the predictors `classifier` (the student, deployed) and `teacher`.

    Raises:
      ValueError: a temperature that is not positive, or a teacher that is no trained network.

    Reference: Papernot et al., Distillation as a defense to adversarial perturbations, arXiv
      1511.04508; broken by Carlini and Wagner, arXiv 1608.04644.
    """
    del threat
    _teachers.check_distillation(temperature)
    if teacher is not None and not isinstance(teacher, base.Trained):
        raise ValueError(f"teacher must be a trained network or None, got {teacher!r}")

    def at_temperature(net: base.Net, target: Callable[..., Array]) -> base.Loss:
        def loss(
            params: base.Params, carry: base.Carry, batch: base.Batch, key: Key
        ) -> base.LossValue:
            logits, carry = net.train(params, carry, batch["image"])
            wanted = target(params, carry, batch, logits)
            value = jnp.mean(losses.cross_entropy(_over(logits, temperature), wanted))
            return value, (carry, {"accuracy": base.accuracy(logits, batch["label"])})

        return loss

    def labels(params: base.Params, carry: base.Carry, batch: base.Batch, logits: Logits) -> Array:
        return base.targets(batch, logits)

    def softened(
        params: base.Params, carry: base.Carry, batch: base.Batch, logits: Logits
    ) -> Array:
        answer = guide.predict(params, carry)(batch["image"])
        return jax.lax.stop_gradient(jax.nn.softmax(_over(answer, temperature)))

    if teacher is None:
        net = base.Net(model, _teachers.ROLE)
        first = base.Update(at_temperature(net, labels), (net.role,))
        phase = base.Phase(net.role, (first,), teacher_length)
        guide = _teachers.Teacher(net.init, net.predict, (phase,))
    else:
        guide = _teachers.frozen_teacher(teacher)
    student = base.Net(model)
    return guide.defense(student, at_temperature(student, softened))


def _over(logits: Logits, temperature: float) -> Logits:
    return logits.astype(jnp.float32) / temperature
