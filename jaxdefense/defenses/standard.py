"""Standard training: the baseline without a defence."""

import flax.linen as nn
import jax.numpy as jnp

from jaxdefense import losses
from jaxdefense.defenses import base
from jaxdefense.types import Key, Threat


def make(model: nn.Module, threat: Threat, *, smoothing: float = 0.0) -> base.Defense:
    """mean CE(f(x), y).

    Args:
      model: images (B, H, W, C) -> logits (B, K).
      threat: unused; every defence has the same signature.
      smoothing: label smoothing, in [0, 1).

    Returns:
      A `Defense` with the role and predictor `classifier`.
    """
    del threat
    net = base.Net(model)
    return base.single_phase(net, natural_loss(net, smoothing))


def natural_loss(net: base.Net, smoothing: float = 0.0) -> base.Loss:
    """The loss mean CE(f(x), y), for a defence that has such a phase too.

    Args:
      net: f.
      smoothing: label smoothing, in [0, 1).
    """

    def loss(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.LossValue:
        logits, carry = net.train(params, carry, batch["image"])
        target = base.targets(batch, logits, smoothing=smoothing)
        value = jnp.mean(losses.cross_entropy(logits, target))
        return value, (carry, {"accuracy": base.accuracy(logits, batch["label"])})

    return loss
