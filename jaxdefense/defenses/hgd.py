"""HGD: a denoiser guided by the classifier's high-level features."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxdefense.attacks import bpda
from jaxdefense.defenses import _purifying, base
from jaxdefense.types import Images, Key, Predict, Threat


def make(
    model: nn.Module,
    threat: Threat,
    *,
    classifier: base.Trained | None = None,
    generator: str = "unet",
    generator_options: Mapping[str, Any] | None = None,
    lengths: Mapping[str, float | str] | None = None,
    optimizer: Mapping[str, Any] | None = None,
    attacks: Sequence[str] = _purifying.ATTACKS,
    steps: int = 10,
    step_size: float | None = None,
    layer: str = "logits",
) -> base.Defense:
    """min_G mean |F_l(x^) - F_l(x)|, x^ = clip(x' + G(x')), x' crafted on F alone.

    The label is not used: what the denoiser must restore is what the classifier makes of the
    clean image.

    Args:
      model: F. Trained first, on clean images; then frozen, in eval mode.
      threat: the set that x' is searched in.
      classifier: F's weights, trained in a run of their own; `model` is then not used and there
        is no phase `classifier`.
      generator: G, one of `models.generators()`.
      generator_options: its fields.
      lengths: {'classifier' or 'denoise': its length}; the other has the rest of the run.
      optimizer: of G; by default Adam with 2e-4 and b1 .5, APE-GAN's.
      attacks: kinds of x' that each batch holds in equal shares: 'fgsm', 'pgd', 'clean'.
      steps: number of PGD steps.
      step_size: of the PGD, in image units; default eps / 4.
      layer: l, 'logits' (the paper's LGD), 'features' (the head's input, near its FGD) or a
        submodule of F by its name.

    Returns:
      A `Defense` with the predictors `purified`, F(clip(. + G(.))), and `classifier`, F alone.

    Raises:
      ValueError: an unknown generator, attack or (at init) layer.

    Reference: Liao et al., Defense against adversarial attacks using high-level representation
      guided denoiser, arXiv 1712.02976, eq. 6. Deviations: a smaller U-Net without BatchNorm, a
      clip to valid images, and one eps where theirs are drawn from 1 to 16 of 255.
    """
    low, high = threat.bounds

    def finish(x: Images, out: Images) -> Images:
        return jnp.clip(x + out, low, high)

    system = _purifying.make_system(
        model, generator, generator_options, finish, classifier=classifier
    )

    def straight_through(params: base.Params, carry: base.Carry) -> Predict:
        generate = system.generator.predict(params, carry)
        classify = system.classifier.predict(params, carry)
        cut = bpda(lambda z: jnp.clip(z, low, high))
        return lambda x: classify(cut(x + generate(x)))

    def loss(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.LossValue:
        cleaned, carry = system.clean(params, carry, batch["adversarial"])
        logits, distance = _purifying.feature_distance(
            system.classifier, params, carry, cleaned, batch["image"], layer
        )
        metrics = {"restored_accuracy": base.accuracy(logits, batch["label"])}
        return jnp.mean(distance), (carry, metrics)

    craft = _purifying.mixture_craft(
        threat, system.classifier.predict, kinds=attacks, steps=steps, step_size=step_size
    )
    phase = base.Phase(
        "denoise",
        (base.Update(loss, ("generator",), craft),),
        optimizers={"generator": dict(optimizer or _purifying.OPTIMIZER)},
    )
    detours = {"around clip": straight_through}
    return system.defense(threat, lengths, [phase], layer=layer, detours=detours)
