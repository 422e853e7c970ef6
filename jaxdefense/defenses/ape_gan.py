"""APE-GAN: a generative adversarial network that takes the perturbation for what is unreal."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxdefense import losses
from jaxdefense.attacks import checks
from jaxdefense.defenses import _purifying, base
from jaxdefense.types import Key, Threat


def make(
    model: nn.Module,
    threat: Threat,
    *,
    classifier: base.Trained | None = None,
    generator: str = "ape_gan",
    generator_options: Mapping[str, Any] | None = None,
    lengths: Mapping[str, float | str] | None = None,
    optimizer: Mapping[str, Any] | None = None,
    attacks: Sequence[str] = ("fgsm",),
    steps: int = 10,
    step_size: float | None = None,
    pixel_weight: float = 0.7,
    adversarial_weight: float = 0.3,
    root: bool = False,
    generator_updates: int = 2,
) -> base.Defense:
    """Two updates with opposite aims, x' crafted on the classifier F alone, x^ = G(x'):

        D: BCE(D(x), 1) + BCE(D(x^), 0)
        G: pixel_weight mean (x^ - x)^2 + adversarial_weight BCE(D(x^), 1)

    F plays no part in G's loss, and G none in F's.

    Args:
      model: F. Trained first, on clean images; then frozen.
      threat: the set that x' is searched in.
      classifier: F's weights, trained in a run of their own; `model` is then not used and there
        is no phase `classifier`.
      generator: G, one of `models.generators()`.
      generator_options: its fields.
      lengths: {'classifier' or 'gan': its length}; the other has the rest of the run.
      optimizer: of G and D; by default the authors' Adam with 2e-4 and b1 .5.
      attacks: kinds of x' that each batch holds in equal shares: 'fgsm', 'pgd', 'clean'.
      steps: number of PGD steps.
      step_size: of the PGD, in image units; default eps / 4.
      pixel_weight: of the squared error; the authors' .7.
      adversarial_weight: of the discriminator's term; the authors' .3.
      root: the square root of the mean square, as in the authors' code (there over the batch,
        here per image); the PyTorch port has none.
      generator_updates: of G for one of D; 2 in the authors' code, which says that its paper has
        1.

    Returns:
      A `Defense` with the predictors `purified`, F(G(.)), and `classifier`, F alone.

    Raises:
      ValueError: an unknown generator or attack, a negative weight, or a count that is not
        positive.

    Reference: Shen et al., APE-GAN: adversarial perturbation elimination with GAN,
      arXiv 1707.05474. Deviation: x' is crafted anew for every update, not once for all.
    """
    _purifying.check_weights(pixel_weight=pixel_weight, adversarial_weight=adversarial_weight)
    checks.check_count("generator_updates", generator_updates)
    system = _purifying.make_system(
        model,
        generator,
        generator_options,
        lambda x, out: out,
        classifier=classifier,
        discriminator=True,
    )

    def loss(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.LossValue:
        x = batch["image"]
        cleaned, carry = system.clean(params, carry, batch["adversarial"])
        pixels = losses.squared_error(cleaned, x)
        if root:
            # The root's slope at 0 is infinite.
            pixels = jnp.where(pixels > 0, jnp.sqrt(jnp.where(pixels > 0, pixels, 1)), 0)
        real = system.judge(params, carry, cleaned)[0]
        value = pixel_weight * pixels + adversarial_weight * losses.binary_cross_entropy(real, 1.0)
        metrics = {"pixels": base.mean_metric(pixels)}
        return jnp.mean(value), (carry, metrics)

    craft = _purifying.mixture_craft(
        threat, system.classifier.predict, kinds=attacks, steps=steps, step_size=step_size
    )
    spec = dict(optimizer or _purifying.OPTIMIZER)
    updates = [system.discriminate(craft)]
    updates += [base.Update(loss, ("generator",), craft)] * generator_updates
    roles = {"generator": spec, "discriminator": spec}
    phase = base.Phase("gan", tuple(updates), optimizers=roles)
    return system.defense(threat, lengths, [phase])
