"""CSA: cost-sensitive adversarial training, two updates per batch."""

from collections.abc import Sequence

import flax.linen as nn

from jaxdefense.defenses import base, cse
from jaxdefense.types import Threat


def make(
    model: nn.Module,
    threat: Threat,
    *,
    protect: int | Sequence[int] | str = 0,
    cost: float = 10.0,
    cost_weight: float = 1.0,
    start: str = "adv",
    pretrain: float | str = "50%",
    step_size: float | None = None,
    bounds: Sequence[float] | None = None,
    ramp_epochs: float = 0.0,
) -> base.Defense:
    """L_CSA = CE(f(x), y) + l1 sum_j C[j, y] p_j, on x, then on x' = FGSM of the network updated.

    The FGSM raises L_CSA too. Phase `adv` before it is FGSM training with the cross-entropy.

    Args:
      model: images (B, H, W, C) -> logits (B, K).
      threat: of the FGSM.
      protect: the class, or classes, whose errors cost `cost`; or "each", see `cse`.
      cost: of an error of a protected class; all others' cost 1.
      cost_weight: l1.
      start: the warm start, "adv" or "normal".
      pretrain: its length; 0 for none.
      step_size: of the FGSM, image units; default eps.
      bounds: box of the crafted images where it is not the threat's, see `fgsm_at`.
      ramp_epochs: eps and step size grow linearly from 0 over so many epochs.

    Returns:
      A `Defense` with the role and predictor `classifier`.

    Raises:
      ValueError: as `cse`.

    Reference: Shen et al., Adversarial learning with cost-sensitive classes, arXiv 2101.12372, and
      the first author's code.
    """
    return cse.make(
        model,
        threat,
        protect=protect,
        cost=cost,
        cost_weight=cost_weight,
        layers={},
        adversarial=True,
        start=start,
        pretrain=pretrain,
        step_size=step_size,
        bounds=bounds,
        ramp_epochs=ramp_epochs,
    )
