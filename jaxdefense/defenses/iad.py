"""IAD-I: a student trusts its teacher as far as the teacher withstands the student's attacks."""

import flax.linen as nn
import jax.numpy as jnp

from jaxdefense import losses
from jaxdefense.attacks import checks
from jaxdefense.defenses import _teachers, base
from jaxdefense.types import Key, Threat


def make(
    model: nn.Module,
    threat: Threat,
    *,
    teacher: _teachers.Spec = None,
    temperature: float = 1.0,
    beta: float = 0.1,
    begin_epochs: float = 60.0,
    scale: float = 1.0,
    steps: int = 10,
    step_size: float | None = None,
    ramp_epochs: float = 0.0,
) -> base.Defense:
    """mean scale (tau^2 KL(T(x) || S(x')) at temperature tau + (1 - A) KL(S(x) || S(x'))).

    A = softmax(T(x'))_y^beta from epoch `begin_epochs` on, 1 before: where the teacher itself is
    fooled by x', the student listens to its own answer to x as well. x' is what PGD on the
    student's cross-entropy finds around x.

    Args:
      model: the student S, images (B, H, W, C) -> logits (B, K).
      threat: the set that x' is searched in.
      teacher: T, a trained network (in a config {"workdir": ..., "checkpoint": "best"}), or how
        the run's first phase trains one (`_teachers.make_teacher`).
      temperature: tau.
      beta: how sharply trust falls with the teacher's probability of the label.
      begin_epochs: epochs of the run before the student listens to itself (the authors: 60 of 200).
      scale: of the whole loss.
      steps: number of PGD steps.
      step_size: of the PGD, in image units; default eps / 4.
      ramp_epochs: eps and step size grow linearly from 0 over so many epochs of the run.

    Returns:
      A `Defense` with the predictors `classifier` (the student, deployed) and `teacher`.

    Raises:
      ValueError: an option out of range, or a teacher that cannot be made.

    Reference: Zhu et al., Reliable adversarial distillation with unreliable teachers, arXiv
      2106.04928, as in the authors' code for IAD-I: the first term is not weighted by A, and the
      gradient goes through S(x) too. Deviation: BatchNorm uses its running averages inside the
      attack.
    """
    _teachers.check_distillation(temperature)
    _teachers.check_temperature_scale(scale)
    for name, value in (("beta", beta), ("begin_epochs", begin_epochs)):
        checks.check_step(name, value)
    student, guide = base.Net(model), _teachers.make_teacher(teacher, model, threat)
    attack = base.pgd_craft(
        student, threat, steps=steps, step_size=step_size, ramp_epochs=ramp_epochs
    )

    def craft(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.Batch:
        predict = guide.predict(params, carry)
        batch = attack(params, carry, batch, key)
        # softmax(z)_y = exp(-CE(z, y)), in float32.
        right = jnp.exp(-losses.cross_entropy(predict(batch["adversarial"]), batch["label"]))
        trust = jnp.where(batch["epoch"] >= begin_epochs, right**beta, 1.0)
        return {**batch, "soft": predict(batch["image"]), "trust": trust}

    def loss(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.LossValue:
        moved, carry = student.train(params, carry, batch["adversarial"])
        clean, carry = student.train(params, carry, batch["image"])
        taught = losses.distillation(batch["soft"], moved, temperature=temperature)
        trust = batch["trust"]
        value = scale * jnp.mean(taught + (1 - trust) * losses.kl(clean, moved))
        metrics = _teachers.metrics(batch, clean, moved)
        return value, (carry, {**metrics, "trust": base.mean_metric(trust)})

    return guide.defense(student, loss, craft=craft)
