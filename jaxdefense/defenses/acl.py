"""ACL(DS): contrast of clean and of attacked pairs, each through its own BatchNorm."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxdefense import attacks, losses, registry
from jaxdefense.attacks import checks
from jaxdefense.defenses import _contrastive, base
from jaxdefense.models import layers
from jaxdefense.types import Array, Images, Key, PerExample, Threat

BRANCHES = ("clean", "adversarial")


def make(
    model: nn.Module,
    threat: Threat,
    *,
    dataset: str = "cifar10",
    temperature: float = 0.5,
    projection: int = 128,
    steps: int = 5,
    step_size: float | None = None,
    branch: str = "adversarial",
    head: str = "clean",
    head_epochs: float | str = 100,
    head_lr: float = 1e-3,
) -> base.Defense:
    """min mean (NT-Xent(x1, x2; BN 0) + NT-Xent(x1', x2'; BN 1)) / 2, x1', x2' = argmax of it.

    x1 and x2 are strong views; all weights but BatchNorm's are shared. One branch is deployed: the
    head is trained on it, the predictor uses it, so that any attack meets it. Two phases:
    `contrast` takes what the other leaves of the run; `head` trains the linear head alone, the
    encoder and its statistics fixed.

    Args:
      model: images (B, H, W, C) -> logits (B, K), its last layer called `head`. It is given two
        sets of BatchNorm; without BatchNorm the branches are one.
      threat: the set around x1 and x2 that x1' and x2' are searched in.
      dataset: whose strong and weak views are drawn (`data.make_contrast_view`).
      temperature: of the contrast.
      projection: size of the projector's output.
      steps: number of steps of every PGD.
      step_size: of every PGD, in image units; default eps / 4.
      branch: the BatchNorm set that is deployed, 'adversarial' or 'clean'.
      head: 'clean' trains the head on weak crops, 'adv' on what PGD on its cross-entropy finds.
      head_epochs: length of the phase `head`.
      head_lr: Adam's rate there.

    Returns:
      A `Defense` with the roles `encoder`, `head`, `projector` and the predictor `classifier`.

    Raises:
      ValueError: unknown data set, branch or head, or a count or temperature that is not
        positive.

    Reference: Jiang et al., Robust pre-training by adversarial contrastive learning, arXiv
      2010.13337, ACL(DS). Deviation: a linear head instead of fine-tuning the whole network.
      INFERRED: temperature, steps, the deployed branch; the attack runs on running averages.
    """
    _contrastive.check_temperature(temperature)
    checks.check_count("steps", steps)
    checks.check_step("step_size", step_size)
    if branch not in BRANCHES:
        registry.raise_unknown("acl branch", branch, BRANCHES)
    if head not in ("clean", "adv"):
        registry.raise_unknown("acl head", head, ("clean", "adv"))
    length = base.default_step_size(threat, step_size)
    dual = layers.has_bn_sets(model)
    clean: dict[str, Any] = {"bn_set": 0} if dual else {}
    adversarial: dict[str, Any] = {"bn_set": 1} if dual else {}
    deployed = clean if branch == "clean" else adversarial
    parts = _contrastive.Parts(model.clone(bn_sets=2) if dual else model, projection=projection)
    view = _contrastive.views(dataset)

    def contrast(z: Array) -> PerExample:
        return losses.supcon(z, temperature=temperature, axis_name=base.AXIS)

    def craft(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.Batch:
        def objective(both: Images) -> PerExample:
            z = parts.embed_eval(params, carry, *jnp.split(both, 2), **adversarial)
            return jnp.tile(contrast(z), 2)  # one value per image: either moves the pair's loss

        both = jnp.concatenate([batch["view1"], batch["view2"]])
        moved = attacks.maximize(objective, both, threat, key, steps=steps, step_size=length)
        return {**batch, "moved": moved}

    def loss(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.LossValue:
        z, _, carry = parts.embed(params, carry, batch["view1"], batch["view2"], **clean)
        moved = jnp.split(batch["moved"], 2)
        z_adv, _, carry = parts.embed(params, carry, *moved, **adversarial)
        natural, robust = contrast(z), contrast(z_adv)
        metrics = {"robust_contrast": base.mean_metric(robust)}
        return jnp.mean(natural + robust) / 2, (carry, metrics)

    return _contrastive.two_phases(
        parts,
        view,
        base.Update(loss, _contrastive.CONTRAST, craft),
        head_epochs=head_epochs,
        head_lr=head_lr,
        attack=attacks.pgd(threat, steps=steps, step_size=length) if head == "adv" else None,
        **deployed,
    )
