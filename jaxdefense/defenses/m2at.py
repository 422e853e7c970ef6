"""M2AT: mixtures of two partially perturbed images, with labels as soft as they are perturbed.

Only the paper's abstract and first page could be read; its body, tables and code were not to be
had. The abstract says: mask a perturbation with a binary mask, then mix two partially perturbed
images. Everything else here is our choice, each a named option: the mask (CutMix's box), the two
images (a mask and its complement on one image), the laws of mask and weight, the strength gamma,
the label rule (AVmixup's, by area) and its end points.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdefense import losses, mixing, registry
from jaxdefense.defenses import base
from jaxdefense.types import Key, Threat

PAIRINGS = ("complement", "shuffle")
LABELS = ("area", "onehot")


def make(
    model: nn.Module,
    threat: Threat,
    *,
    pairing: str = "complement",
    gamma: float = 1.0,
    mask_alpha: float = 1.0,
    mask_per_sample: bool = True,
    lam_alpha: float = 1.0,
    labels: str = "area",
    l1: float = 1.0,
    l2: float = 0.55,
    steps: int = 10,
    step_size: float | None = None,
    ramp_epochs: float = 0.0,
) -> base.Defense:
    """mean CE(f(x_m), t_m), x_m = lam x_a + (1 - lam) x_b, t_m = lam t(a) + (1 - lam) t(1 - a).

    With d = PGD(x, y) - x, a box mask M of area a and lam ~ Beta(lam_alpha, lam_alpha):

        x_a = clip(x + gamma M d),  x_b = clip(x + gamma (1 - M) d)
        t(s) = (1 - s) LS(y, l1) + s LS(y, l2),  LS(y, q): q on y, (1 - q) / (K - 1) elsewhere

    At gamma 1 with pairing 'complement', x_m = x + [lam M + (1 - lam)(1 - M)] d stays in the ball,
    at half its radius in the mean; gamma 2 restores the full radius in the mean, as AVmixup's
    vertex does, and may leave the ball.

    Args:
      model: images (B, H, W, C) -> logits (B, K).
      threat: the ball that PGD searches.
      pairing: 'complement': both images are made of the same x. 'shuffle': x_b and its target
        come from another image of the batch, as in mixup; x_m then leaves the ball around x.
      gamma: length of the perturbations, in units of PGD's.
      mask_alpha: of the Beta law of the boxes (`mixing.box_mask`).
      mask_per_sample: a box per image; else one per batch and device.
      lam_alpha: of the Beta law of lam, which is drawn per image.
      labels: 'area': the rule above; 'onehot': t(s) = y.
      l1: what the true class keeps at s = 0; 1 in AVmixup.
      l2: what the true class keeps at s = 1. AVmixup has .1 at gamma 2 and ten classes; at half the
        length, half of that fall is .55.
      steps: number of PGD steps.
      step_size: of the PGD, in image units; default eps / 4.
      ramp_epochs: eps and step size grow linearly from 0 over so many epochs.

    Returns:
      A `Defense` with the role and predictor `classifier`. Masks and mixtures exist in training
      only. Soft labels flatter attacks on the cross-entropy: evaluate with the margin loss too.

    Raises:
      ValueError: an option out of range.

    Reference: Adachi et al., Masking and mixing adversarial training, VISAPP 2023,
      arXiv 2302.08066 (for what is not from there, see the module's docstring).
    """
    if pairing not in PAIRINGS:
        registry.raise_unknown("pairing", pairing, PAIRINGS)
    if labels not in LABELS:
        registry.raise_unknown("labels", labels, LABELS)
    mixing.check_positive("gamma", gamma)
    mixing.check_positive("mask_alpha", mask_alpha)
    mixing.check_positive("lam_alpha", lam_alpha)
    mixing.check_share("l1", l1)
    mixing.check_share("l2", l2)
    net = base.Net(model)
    attack = base.pgd_craft(net, threat, steps=steps, step_size=step_size, ramp_epochs=ramp_epochs)

    def craft(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.Batch:
        k_attack, k_mask, k_lam, k_order = jax.random.split(key, 4)
        batch = attack(params, carry, batch, k_attack)
        x, x_adv = batch["image"], batch["adversarial"]
        mask = mixing.box_mask(k_mask, x, alpha=mask_alpha, per_sample=mask_per_sample)
        lam = mixing.weights(k_lam, len(x), alpha=lam_alpha)
        order = jnp.arange(len(x))
        if pairing == "shuffle":
            order = jax.random.permutation(k_order, order)
        first = mixing.perturb(x, x_adv, gamma * mask, threat.bounds)
        second = mixing.perturb(x, x_adv, gamma * (1 - mask), threat.bounds)
        mixed = mixing.mix(lam, first, second[order])
        return {**batch, "mask": mask, "lam": lam, "order": order, "mixed": mixed}

    def loss(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.LossValue:
        logits, carry = net.train(params, carry, batch["mixed"])
        target, area = base.targets(batch, logits), mixing.area(batch["mask"])
        first = second = target
        if labels == "area":
            first, second = (mixing.soften(target, s, l1, l2) for s in (area, 1 - area))
        target = mixing.mix(batch["lam"], first, second[batch["order"]])
        value = jnp.mean(losses.cross_entropy(logits, target))
        metrics = {"mixed_accuracy": base.accuracy(logits, jnp.argmax(target, -1))}
        return value, (carry, metrics)

    return base.single_phase(net, loss, craft=craft)
