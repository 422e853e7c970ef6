"""Adversarial training: train on what PGD finds."""

import flax.linen as nn
import jax.numpy as jnp

from jaxdefense import losses
from jaxdefense.defenses import base
from jaxdefense.types import Key, Threat


def make(
    model: nn.Module,
    threat: Threat,
    *,
    steps: int = 10,
    step_size: float | None = None,
    random_start: bool = True,
    attack_loss: str = "cross_entropy",
    smoothing: float = 0.0,
    ramp_epochs: float = 0.0,
) -> base.Defense:
    """min mean max_{x' in S(x)} CE(f(x'), y), the inner maximum by PGD on the eval-mode network.

    Args:
      model: images (B, H, W, C) -> logits (B, K).
      threat: the set S.
      steps: number of PGD steps. One of 1.25 eps is fast adversarial training (arXiv 2001.03994).
      step_size: of the PGD, in image units; default eps / 4.
      random_start: whether the PGD starts at a random point of S(x), else at x.
      attack_loss: what the PGD raises, a name of `losses`.
      smoothing: label smoothing of the outer loss, in [0, 1).
      ramp_epochs: eps and step size grow linearly from 0 over so many epochs; large eps (.3 on
        MNIST) stays at chance without.

    Returns:
      A `Defense` with the role and predictor `classifier`.

    Raises:
      ValueError: an option of the PGD out of range.

    Reference: Madry et al., Towards deep learning models resistant to adversarial attacks,
      arXiv 1706.06083. Deviation: BatchNorm uses its running averages inside the attack.
    """
    net = base.Net(model)
    craft = base.pgd_craft(
        net,
        threat,
        steps=steps,
        step_size=step_size,
        loss=attack_loss,
        random_start=random_start,
        ramp_epochs=ramp_epochs,
    )

    def loss(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.LossValue:
        logits, carry = net.train(params, carry, batch["adversarial"])
        target = base.targets(batch, logits, smoothing=smoothing)
        value = jnp.mean(losses.cross_entropy(logits, target))
        return value, (carry, {"robust_accuracy": base.accuracy(logits, batch["label"])})

    return base.single_phase(net, loss, craft=craft)
