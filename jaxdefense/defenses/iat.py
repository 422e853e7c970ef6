"""IAT: mixup of the clean images and, apart from it, of the adversarial ones."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdefense import losses, mixing
from jaxdefense.defenses import base
from jaxdefense.types import Key, Threat


def make(
    model: nn.Module,
    threat: Threat,
    *,
    alpha: float = 1.0,
    lam_per_sample: bool = False,
    steps: int = 7,
    step_size: float | None = None,
    smoothing: float = 0.0,
    ramp_epochs: float = 0.0,
) -> base.Defense:
    """mean 1/2 CE(f(mix(x)), mix(y)) + 1/2 CE(f(mix'(x')), mix'(y)), x' = PGD(x, y).

    mix(z) = lam z + (1 - lam) z[order] with lam ~ Beta(alpha, alpha) and a random order of the
    batch; mix' draws its own. The attack sees the unmixed images.

    Args:
      model: images (B, H, W, C) -> logits (B, K).
      threat: the set of x'.
      alpha: of lam's Beta law; 1 is uniform.
      lam_per_sample: one lam per image; else one per batch and device, as mixup's authors have it.
      steps: number of PGD steps.
      step_size: of the PGD, in image units; default eps / 4.
      smoothing: label smoothing of both losses, in [0, 1).
      ramp_epochs: eps and step size grow linearly from 0 over so many epochs.

    Returns:
      A `Defense` with the role and predictor `classifier`.

    Raises:
      ValueError: an option out of range.

    Reference: Lamb et al., Interpolated adversarial training: achieving robust neural networks
      without sacrificing too much accuracy, arXiv 1906.06784. Clean and adversarial images pass
      BatchNorm as two batches, clean first; its running averages serve the attack.
    """
    mixing.check_positive("alpha", alpha)
    mixing.check_share("smoothing", smoothing)
    net = base.Net(model)
    attack = base.pgd_craft(net, threat, steps=steps, step_size=step_size, ramp_epochs=ramp_epochs)
    kinds = {"image": "accuracy", "adversarial": "robust_accuracy"}

    def craft(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.Batch:
        k_attack, key = jax.random.split(key)
        batch = attack(params, carry, batch, k_attack)
        mixtures = {}
        for i, kind in enumerate(kinds):
            k_lam, k_order = jax.random.split(jax.random.fold_in(key, i))
            x = batch[kind]
            lam = mixing.weights(k_lam, len(x), alpha=alpha, per_sample=lam_per_sample)
            order = jax.random.permutation(k_order, len(x))
            mixtures[kind] = {"image": mixing.mix(lam, x, x[order]), "lam": lam, "order": order}
        return {**batch, "mixtures": mixtures}

    def loss(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.LossValue:
        total, metrics = jnp.zeros(()), {}
        for kind, metric in kinds.items():
            mixture = batch["mixtures"][kind]
            logits, carry = net.train(params, carry, mixture["image"])
            target = base.targets(batch, logits, smoothing=smoothing)
            target = mixing.mix(mixture["lam"], target, target[mixture["order"]])
            total = total + 0.5 * jnp.mean(losses.cross_entropy(logits, target))
            metrics[f"mixed_{metric}"] = base.accuracy(logits, jnp.argmax(target, -1))
        return total, (carry, metrics)

    return base.single_phase(net, loss, craft=craft)
