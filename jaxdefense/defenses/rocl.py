"""RoCL: robust contrastive learning without labels, by instance-wise attacks."""

import flax.linen as nn
import jax.numpy as jnp

from jaxdefense import attacks, losses, registry
from jaxdefense.attacks import checks
from jaxdefense.defenses import _contrastive, base
from jaxdefense.types import Array, Images, Key, PerExample, Threat


def make(
    model: nn.Module,
    threat: Threat,
    *,
    dataset: str = "cifar10",
    temperature: float = 0.5,
    weight: float = 1 / 256,
    projection: int = 128,
    steps: int = 7,
    step_size: float | None = None,
    head: str = "clean",
    head_epochs: float | str = 100,
    head_lr: float = 1e-3,
) -> base.Defense:
    """min mean NT-Xent(x1, x2, x') + weight NT-Xent(x', x2), x' = argmax NT-Xent(x', x2) near x1.

    x1 and x2 are strong views of an image, all other images' views the negatives. Two phases:
    `contrast` takes what the other leaves of the run; `head` trains the linear head alone, the
    encoder and its statistics fixed.

    Args:
      model: images (B, H, W, C) -> logits (B, K), its last layer called `head`.
      threat: the set around x1 that x' is searched in.
      dataset: whose strong and weak views are drawn (`data.make_contrast_view`).
      temperature: of the contrast.
      weight: of the second term.
      projection: size of the projector's output.
      steps: number of steps of every PGD.
      step_size: of every PGD, in image units; default eps / 4.
      head: 'clean' trains the head on weak crops, 'adv' on what PGD on its cross-entropy finds.
      head_epochs: length of the phase `head`.
      head_lr: Adam's rate there.

    Returns:
      A `Defense` with the roles `encoder`, `head`, `projector` and the predictor `classifier`.

    Raises:
      ValueError: unknown data set or head, or a count or temperature that is not positive.

    Reference: Kim, Tack, Hwang, Adversarial self-supervised contrastive learning, arXiv
      2006.07589. INFERRED: the three views pass BatchNorm as one batch, the attack runs on its
      running averages, the head's optimiser is Adam.
    """
    _contrastive.check_temperature(temperature)
    checks.check_count("steps", steps)
    checks.check_step("step_size", step_size)
    if head not in ("clean", "adv"):
        registry.raise_unknown("rocl head", head, ("clean", "adv"))
    length = base.default_step_size(threat, step_size)
    parts = _contrastive.Parts(model, projection=projection)
    view = _contrastive.views(dataset)

    def contrast(z: Array) -> PerExample:
        return losses.supcon(z, temperature=temperature, axis_name=base.AXIS)

    def craft(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.Batch:
        def objective(x: Images) -> PerExample:
            return contrast(parts.embed_eval(params, carry, x, batch["view2"]))

        moved = attacks.maximize(
            objective, batch["view1"], threat, key, steps=steps, step_size=length
        )
        return {**batch, "moved": moved}

    def loss(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.LossValue:
        z, _, carry = parts.embed(params, carry, batch["view1"], batch["view2"], batch["moved"])
        value = contrast(z) + weight * contrast(z[1:])
        return jnp.mean(value), (carry, {})

    return _contrastive.two_phases(
        parts,
        view,
        base.Update(loss, _contrastive.CONTRAST, craft),
        head_epochs=head_epochs,
        head_lr=head_lr,
        attack=attacks.pgd(threat, steps=steps, step_size=length) if head == "adv" else None,
    )
