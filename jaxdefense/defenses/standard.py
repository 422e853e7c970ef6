"""Standard training: the baseline without a defence."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxdefense import losses
from jaxdefense.defenses import base
from jaxdefense.types import Threat


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

    def loss(params: Any, carry: Any, batch: base.Batch, key: Any) -> Any:
        logits, carry = net.train(params, carry, batch["image"])
        target = base.targets(batch, logits, smoothing=smoothing)
        value = jnp.mean(losses.cross_entropy(logits, target))
        return value, (carry, {"accuracy": base.accuracy(logits, batch["label"])})

    return base.single_phase(net, loss)
