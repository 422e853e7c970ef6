"""ADD: a lightweight network learns from a robust teacher's soft labels, and from nothing else."""

import flax.linen as nn
import jax.numpy as jnp

from jaxdefense import losses
from jaxdefense.attacks import checks
from jaxdefense.defenses import _teachers, base
from jaxdefense.types import Key, Objective, Threat


def make(
    model: nn.Module,
    threat: Threat,
    *,
    teacher: _teachers.Spec = None,
    temperature: float = 1.0,
    robust_weight: float = 5 / 6,
    clean_weight: float = 1 / 6,
    scale: float = 1.0,
    steps: int = 10,
    step_size: float | None = None,
    noise: float = 1e-3,
    ramp_epochs: float = 0.0,
) -> base.Defense:
    """min_S mean of scale (robust_weight D(x') + clean_weight D(x)), x' the maximum of D around x,

        D(z) = tau^2 KL(softmax(T(x) / tau) || softmax(S(z) / tau))

    The teacher T sees the clean image only, and no term sees the label.

    Args:
      model: the student S, images (B, H, W, C) -> logits (B, K).
      threat: the set that x' is searched in.
      teacher: T, a trained network (in a config {"workdir": ..., "checkpoint": "best"}), or how
        the run's first phase trains one (`_teachers.make_teacher`).
      temperature: tau, INFERRED; at 1 this is RSLAD.
      robust_weight: of D(x'); RSLAD's 5/6.
      clean_weight: of D(x); RSLAD's 1/6.
      scale: of the whole loss. RSLAD's code averages the KL over the classes too: .1 is its loss on
        ten classes and, as it multiplies by 10 there, on a hundred.
      steps: number of steps of the inner maximisation.
      step_size: of those steps, in image units; default eps / 4.
      noise: standard deviation of its Gaussian start, image units.
      ramp_epochs: eps and step size grow linearly from 0 over so many epochs of the run.

    Returns:
      A `Defense` with the predictors `classifier` (the student, deployed) and `teacher`.

    Raises:
      ValueError: an option out of range, or a teacher that cannot be made.

    Reference: X. W. Zhang, master thesis, 2023, second part. Only its abstract could be read: a
      lightweight network, distillation with adversarial training, and soft labels that guide the
      loss globally. That is the claim of RSLAD (Zi et al., Revisiting adversarial robustness
      distillation, arXiv 2108.07969), whose form is taken; all values are RSLAD's or INFERRED. As
      in its code the attack runs on the eval-mode student, and x', then x, pass BatchNorm as two
      batches. RSLAD's cross-entropy against soft labels differs from the KL by a constant.
    """
    _teachers.check_distillation(temperature)
    _teachers.check_temperature_scale(scale)
    for name, weight in (("robust_weight", robust_weight), ("clean_weight", clean_weight)):
        checks.check_step(name, weight)
    student, guide = base.Net(model), _teachers.make_teacher(teacher, model, threat)

    def objective(params: base.Params, carry: base.Carry, batch: base.Batch) -> Objective:
        predict = student.predict(params, carry)
        return lambda z: losses.distillation(batch["soft"], predict(z), temperature=temperature)

    climb = base.objective_craft(
        objective, threat, steps=steps, step_size=step_size, noise=noise, ramp_epochs=ramp_epochs
    )

    def craft(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.Batch:
        soft = guide.predict(params, carry)(batch["image"])
        return climb(params, carry, {**batch, "soft": soft}, key)

    def loss(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.LossValue:
        moved, carry = student.train(params, carry, batch["adversarial"])
        clean, carry = student.train(params, carry, batch["image"])
        robust = losses.distillation(batch["soft"], moved, temperature=temperature)
        natural = losses.distillation(batch["soft"], clean, temperature=temperature)
        value = scale * jnp.mean(robust_weight * robust + clean_weight * natural)
        return value, (carry, _teachers.metrics(batch, clean, moved))

    return guide.defense(student, loss, craft=craft)
