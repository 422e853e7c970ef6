"""ARD: a student's answer to adversarial examples is taught by a teacher's to clean images."""

import flax.linen as nn
import jax.numpy as jnp

from jaxdefense import losses
from jaxdefense.defenses import _teachers, base
from jaxdefense.types import Key, Threat


def make(
    model: nn.Module,
    threat: Threat,
    *,
    teacher: _teachers.Spec = None,
    temperature: float = 30.0,
    alpha: float = 1.0,
    scale: float = 1.0,
    steps: int = 10,
    step_size: float | None = None,
    ramp_epochs: float = 0.0,
) -> base.Defense:
    """mean scale alpha tau^2 KL(T(x) || S(x')) + (1 - alpha) CE(S(x), y), both at temperature tau.

    x' is what PGD on the student's cross-entropy finds around x.

    Args:
      model: the student S, images (B, H, W, C) -> logits (B, K).
      threat: the set that x' is searched in.
      teacher: T, a trained network (in a config {"workdir": ..., "checkpoint": "best"}), or how
        the run's first phase trains one (`_teachers.make_teacher`).
      temperature: tau; the authors' 30 on CIFAR-10.
      alpha: the teacher's share of the loss.
      scale: of the KL. The authors' code averages it over the classes too: .1 is its loss on ten.
      steps: number of PGD steps.
      step_size: of the PGD, in image units; default eps / 4.
      ramp_epochs: eps and step size grow linearly from 0 over so many epochs of the run.

    Returns:
      A `Defense` with the predictors `classifier` (the student, deployed) and `teacher`.

    Raises:
      ValueError: an option out of range, or a teacher that cannot be made.

    Reference: Goldblum et al., Adversarially robust distillation, arXiv 1905.09747. As in the
      authors' code S(x) passes BatchNorm even where alpha = 1. Deviation: BatchNorm uses its
      running averages inside the attack.
    """
    _teachers.check_distillation(temperature, alpha=alpha)
    _teachers.check_temperature_scale(scale)
    student, guide = base.Net(model), _teachers.make_teacher(teacher, model, threat)
    attack = base.pgd_craft(
        student, threat, steps=steps, step_size=step_size, ramp_epochs=ramp_epochs
    )

    def craft(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.Batch:
        soft = guide.predict(params, carry)(batch["image"])
        return {**attack(params, carry, batch, key), "soft": soft}

    def loss(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.LossValue:
        moved, carry = student.train(params, carry, batch["adversarial"])
        clean, carry = student.train(params, carry, batch["image"])
        taught = losses.distillation(batch["soft"], moved, temperature=temperature)
        natural = losses.cross_entropy(clean, base.targets(batch, clean))
        value = jnp.mean(scale * alpha * taught + (1 - alpha) * natural)
        return value, (carry, _teachers.metrics(batch, clean, moved))

    return guide.defense(student, loss, craft=craft)
