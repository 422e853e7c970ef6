"""AVmixup: between an image and a vertex beyond its adversarial example, labels between too."""

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
    gamma: float = 2.0,
    l1: float = 1.0,
    l2: float = 0.1,
    lam_alpha: float = 1.0,
    steps: int = 10,
    step_size: float | None = None,
    ramp_epochs: float = 0.0,
) -> base.Defense:
    """mean CE(f(w x + (1 - w) v), w LS(y, l1) + (1 - w) LS(y, l2)), v = clip(x + gamma d).

    d = PGD(x, y) - x, w ~ Beta(lam_alpha, lam_alpha) per image, and LS(y, q) has q on y and
    (1 - q) / (K - 1) on each other class. Neither the clean image nor PGD's is trained on as it is.

    Args:
      model: images (B, H, W, C) -> logits (B, K).
      threat: the ball that PGD searches; with gamma above 1 the mixture may leave it.
      gamma: the vertex' distance, in units of PGD's.
      l1: what the true class keeps at the image.
      l2: what the true class keeps at the vertex. .1 is the uniform label of ten classes; below
        1 / K the label would no longer be the likeliest class there.
      lam_alpha: of w's Beta law; 1 is uniform.
      steps: number of PGD steps.
      step_size: of the PGD, in image units; default eps / 4.
      ramp_epochs: eps and step size grow linearly from 0 over so many epochs.

    Returns:
      A `Defense` with the role and predictor `classifier`. Its soft labels flatter attacks on the
      cross-entropy: evaluate with the margin loss too.

    Raises:
      ValueError: an option out of range.

    Reference: Lee et al., Adversarial vertex mixup: toward better adversarially robust
      generalization, CVPR 2020, arXiv 2003.02484. Deviation: BatchNorm uses its running averages
      inside the attack.
    """
    mixing.check_positive("gamma", gamma)
    mixing.check_positive("lam_alpha", lam_alpha)
    mixing.check_share("l1", l1)
    mixing.check_share("l2", l2)
    net = base.Net(model)
    attack = base.pgd_craft(net, threat, steps=steps, step_size=step_size, ramp_epochs=ramp_epochs)

    def craft(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.Batch:
        k_attack, k_lam = jax.random.split(key)
        batch = attack(params, carry, batch, k_attack)
        x = batch["image"]
        vertex = mixing.perturb(x, batch["adversarial"], gamma, threat.bounds)
        lam = mixing.weights(k_lam, len(x), alpha=lam_alpha)
        return {**batch, "lam": lam, "mixed": mixing.mix(lam, x, vertex)}

    def loss(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.LossValue:
        logits, carry = net.train(params, carry, batch["mixed"])
        target = mixing.soften(base.targets(batch, logits), 1 - batch["lam"], l1, l2)
        value = jnp.mean(losses.cross_entropy(logits, target))
        return value, (carry, {"mixed_accuracy": base.accuracy(logits, batch["label"])})

    return base.single_phase(net, loss, craft=craft)
