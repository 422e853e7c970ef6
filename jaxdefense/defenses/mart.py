"""MART: adversarial training that weighs misclassified examples most."""

import flax.linen as nn
import jax.numpy as jnp

from jaxdefense import losses
from jaxdefense.defenses import base
from jaxdefense.types import Key, Threat


def make(
    model: nn.Module,
    threat: Threat,
    *,
    beta: float = 5.0,
    steps: int = 10,
    step_size: float | None = None,
    ramp_epochs: float = 0.0,
) -> base.Defense:
    """mean BCE(f(x'), y) + beta KL(f(x) || f(x')) (1 - p_y(x)), x' = PGD(x, y).

    BCE = CE(f(x'), y) - log(1 - max_{k != y} p_k(x')), see `losses.mart`.

    Args:
      model: images (B, H, W, C) -> logits (B, K).
      threat: the set of x'.
      beta: weight of the KL (the paper's lambda; 5 and 6 in the authors' scripts).
      steps: number of PGD steps.
      step_size: of the PGD, in image units; default eps / 4.
      ramp_epochs: eps and step size grow linearly from 0 over so many epochs.

    Returns:
      A `Defense` with the role and predictor `classifier`.

    Raises:
      ValueError: an option out of range.

    Reference: Wang et al., Improving adversarial robustness requires revisiting misclassified
      examples, ICLR 2020. As in the authors' code the attack runs on the eval-mode network, and
      clean and adversarial images pass BatchNorm as two batches, clean first. Deviations: the
      attack starts at a uniform point of the ball, theirs at Gaussian noise of .001; and the
      logarithms are exact (theirs carry constants up to 1e-4).
    """
    if not beta >= 0:
        raise ValueError(f"beta must not be negative, got {beta!r}")
    net = base.Net(model)
    craft = base.pgd_craft(net, threat, steps=steps, step_size=step_size, ramp_epochs=ramp_epochs)

    def loss(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.LossValue:
        label = batch["label"]
        clean, moved, carry = net.train_on_both(params, carry, batch)
        target = base.targets(batch, clean)
        value = losses.mart(clean, moved, label, weight=beta, targets=target)
        metrics = base.accuracies(clean, moved, label)
        return jnp.mean(value), (carry, metrics)

    return base.single_phase(net, loss, craft=craft)
