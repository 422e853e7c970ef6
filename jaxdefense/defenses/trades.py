"""TRADES: the natural loss, and how far an attack can move the prediction."""

import flax.linen as nn
import jax.numpy as jnp

from jaxdefense import losses
from jaxdefense.defenses import base
from jaxdefense.types import Key, Threat


def make(
    model: nn.Module,
    threat: Threat,
    *,
    beta: float = 6.0,
    steps: int = 10,
    step_size: float | None = None,
    noise: float = 1e-3,
    smoothing: float = 0.0,
    ramp_epochs: float = 0.0,
) -> base.Defense:
    """mean CE(f(x), y) + beta KL(f(x) || f(x')), x' the maximum of the same KL around x.

    Args:
      model: images (B, H, W, C) -> logits (B, K).
      threat: the set that x' is searched in.
      beta: weight of the KL (the paper's 1 / lambda).
      steps: number of steps of the inner maximisation.
      step_size: of those steps, in image units; default eps / 4.
      noise: standard deviation of the Gaussian start; the KL's gradient vanishes at x itself.
      smoothing: label smoothing of the natural loss, in [0, 1).
      ramp_epochs: eps and step size grow linearly from 0 over so many epochs.

    Returns:
      A `Defense` with the role and predictor `classifier`.

    Reference: Zhang et al., Theoretically principled trade-off between robustness and accuracy,
      arXiv 1901.08573, eq. 5. As in the authors' code the attack runs on the eval-mode network,
      and clean and adversarial images pass BatchNorm as two batches, clean first.
    """
    net = base.Net(model)
    craft = base.objective_craft(
        base.kl_objective(net),
        threat,
        steps=steps,
        step_size=step_size,
        noise=noise,
        ramp_epochs=ramp_epochs,
    )

    def loss(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.LossValue:
        clean, moved, carry = net.train_on_both(params, carry, batch)
        target = base.targets(batch, clean, smoothing=smoothing)
        natural = losses.cross_entropy(clean, target)
        robust = losses.kl(clean, moved)
        metrics = {
            **base.accuracies(clean, moved, batch["label"]),
            "kl": base.mean_metric(robust),
        }
        return jnp.mean(natural + beta * robust), (carry, metrics)

    return base.single_phase(net, loss, craft=craft)
