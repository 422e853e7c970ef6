"""SupCon: supervised contrastive training of the encoder, then a linear head; no adversary."""

import flax.linen as nn

from jaxdefense.defenses import _contrastive, base
from jaxdefense.types import Threat


def make(
    model: nn.Module,
    threat: Threat,
    *,
    dataset: str = "cifar10",
    labels: bool = True,
    temperature: float = 0.07,
    projection: int = 128,
    head_epochs: float | str = 100,
    head_lr: float = 1e-3,
) -> base.Defense:
    """min mean SupCon(g(f(x1)), g(f(x2)), y) over f and g; then min mean CE(c(f(x)), y) over c.

    Two phases: `contrast` on two strong views takes what the other leaves of the run; `head` on
    weak crops, the encoder and its statistics fixed. The baseline of CLAF and, without labels
    (SimCLR), of RoCL and ACL.

    Args:
      model: images (B, H, W, C) -> logits (B, K), its last layer called `head`.
      threat: not used; training is clean.
      dataset: whose strong and weak views are drawn (`data.make_contrast_view`).
      labels: whether views of one class are positives, or only views of one image (NT-Xent).
      temperature: of the contrast.
      projection: size of the projector's output.
      head_epochs: length of the phase `head`.
      head_lr: Adam's rate there.

    Returns:
      A `Defense` with the roles `encoder`, `head`, `projector` and the predictor `classifier`.

    Raises:
      ValueError: unknown data set, or a size or temperature that is not positive.

    Reference: Khosla et al., Supervised contrastive learning, arXiv 2004.11362.
    """
    del threat
    parts = _contrastive.Parts(model, projection=projection)
    view = _contrastive.views(dataset)
    phases = (
        _contrastive.contrast_phase(parts, view, labels=labels, temperature=temperature),
        _contrastive.head_phase("head", parts, view, length=head_epochs, lr=head_lr, fresh=True),
    )
    return base.Defense(parts.init, phases, {"classifier": parts.predict})
