"""AdaAD: the attack looks for where teacher and student disagree, and the teacher answers there."""

import flax.linen as nn
import jax.numpy as jnp

from jaxdefense import losses
from jaxdefense.defenses import _teachers, base
from jaxdefense.types import Images, Key, Objective, PerExample, Threat


def make(
    model: nn.Module,
    threat: Threat,
    *,
    teacher: _teachers.Spec = None,
    alpha: float = 1.0,
    scale: float = 1.0,
    steps: int = 10,
    step_size: float | None = None,
    noise: float = 1e-3,
    ramp_epochs: float = 0.0,
) -> base.Defense:
    """min_S mean of scale (alpha D(x') + (1 - alpha) D(x)), D(z) = KL(T(z) || S(z)).

    x' is the maximum of D around x; its gradient goes through the student and the teacher.

    Args:
      model: the student S, images (B, H, W, C) -> logits (B, K).
      threat: the set that x' is searched in.
      teacher: T, a trained network (in a config {"workdir": ..., "checkpoint": "best"}), or how
        the run's first phase trains one (`_teachers.make_teacher`).
      alpha: share of the adversarial examples.
      scale: of the whole loss.
      steps: number of steps of the inner maximisation. Each step differentiates the teacher, which
        is the price of this defence.
      step_size: of those steps, in image units; default eps / 4.
      noise: standard deviation of its Gaussian start, image units.
      ramp_epochs: eps and step size grow linearly from 0 over so many epochs of the run.

    Returns:
      A `Defense` with the predictors `classifier` (the student, deployed) and `teacher`.

    Raises:
      ValueError: an option out of range, or a teacher that cannot be made.

    Reference: Huang et al., Boosting accuracy and robustness of student models via adaptive
      adversarial distillation, CVPR 2023. The attack runs on the eval-mode student; x', then x,
      pass BatchNorm as two batches, also where alpha = 1.
    """
    _teachers.check_distillation(1.0, alpha=alpha)
    _teachers.check_temperature_scale(scale)
    student, guide = base.Net(model), _teachers.make_teacher(teacher, model, threat)

    def objective(params: base.Params, carry: base.Carry, batch: base.Batch) -> Objective:
        teach, learn = guide.predict(params, carry), student.predict(params, carry)

        def disagreement(z: Images) -> PerExample:
            return losses.kl(teach(z), learn(z))

        return disagreement

    climb = base.objective_craft(
        objective, threat, steps=steps, step_size=step_size, noise=noise, ramp_epochs=ramp_epochs
    )

    def craft(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.Batch:
        batch, predict = climb(params, carry, batch, key), guide.predict(params, carry)
        answers = {"soft": predict(batch["image"]), "soft_moved": predict(batch["adversarial"])}
        return {**batch, **answers}

    def loss(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.LossValue:
        moved, carry = student.train(params, carry, batch["adversarial"])
        clean, carry = student.train(params, carry, batch["image"])
        robust, natural = losses.kl(batch["soft_moved"], moved), losses.kl(batch["soft"], clean)
        value = scale * jnp.mean(alpha * robust + (1 - alpha) * natural)
        return value, (carry, _teachers.metrics(batch, clean, moved))

    return guide.defense(student, loss, craft=craft)
