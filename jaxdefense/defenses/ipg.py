"""IPG: a generator's bounded perturbation that cancels the attacker's."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxdefense import losses, registry
from jaxdefense.attacks import bpda
from jaxdefense.defenses import _purifying, base
from jaxdefense.types import Images, Key, Predict, Threat

PHASES = ("oblivious", "end_to_end")


def make(
    model: nn.Module,
    threat: Threat,
    *,
    classifier: base.Trained | None = None,
    generator: str = "unet",
    generator_options: Mapping[str, Any] | None = None,
    reach: float = 1.0,
    phases: Sequence[str] = PHASES,
    lengths: Mapping[str, float | str] | None = None,
    optimizer: Mapping[str, Any] | None = None,
    attacks: Sequence[str] = _purifying.ATTACKS,
    steps: int = 10,
    step_size: float | None = None,
    clean_weight: float = 1.0,
    feature_weight: float = 0.1,
    pixel_weight: float = 1.0,
    adversarial_weight: float = 0.0,
    layer: str = "features",
) -> base.Defense:
    """min_G of, with purify(x) = clip(x + eps_d tanh(G(x))) and x^ = purify(x'),

        CE(F(x^), y) + clean_weight CE(F(purify(x)), y) + feature_weight mean|F_l(x^) - F_l(x)|
        + pixel_weight mean|x^ - x| + adversarial_weight BCE(D(x^), 1)

    To first order CE(F(x' + d)) = CE(F(x')) + <gradient, d>, whose best step in an L_inf ball is
    -eps_d sign(gradient): G learns that step without being told the label.

    Args:
      model: F. Trained first, on clean images; then frozen, in eval mode.
      threat: the set that x' is searched in.
      classifier: F's weights, trained in a run of their own; `model` is then not used and there
        is no phase `classifier`.
      generator: G, one of `models.generators()`.
      generator_options: its fields.
      reach: eps_d in units of the threat's eps.
      phases: of 'oblivious' (x' crafted on F, as in the paper) and 'end_to_end' (crafted on the
        whole, F(purify(.))), in that order or one of them.
      lengths: {'classifier' or a phase: its length}; the others share the rest of the run.
      optimizer: of G and D; by default Adam with 2e-4 and b1 .5.
      attacks: kinds of x' that each batch holds in equal shares: 'fgsm', 'pgd', 'clean'.
      steps: number of PGD steps.
      step_size: of the PGD, in image units; default eps / 4.
      clean_weight: of the cross-entropy of purified clean images.
      feature_weight: of the distance between features.
      pixel_weight: of the distance between pixels.
      adversarial_weight: of the discriminator D's term; D exists only where it is not 0.
      layer: l, 'features' (the head's input), 'logits' or a submodule of F by its name.

    Returns:
      A `Defense` with the predictors `purified`, F(purify(.)), and `classifier`, F alone.

    Raises:
      ValueError: an unknown generator, phase, attack or (at init) layer, a negative weight, or a
        reach that is not positive.

    Reference: X. W. Zhang, master thesis, 2023, first part. Only its abstract could be read: it
      says that a generator builds an inverse perturbation in front of the classifier, and that
      the classifier guides it. Every value and choice here beyond that is INFERRED from its
      lineage (APE-GAN, arXiv 1707.05474; HGD, arXiv 1712.02976; JATP, arXiv 2106.05453), phase
      'end_to_end' is our addition, and D is an ablation.
    """
    _purifying.check_weights(
        clean_weight=clean_weight,
        feature_weight=feature_weight,
        pixel_weight=pixel_weight,
        adversarial_weight=adversarial_weight,
    )
    if not reach > 0:
        raise ValueError(f"reach must be positive, got {reach}")
    registry.check_known("phase", phases, PHASES)
    if list(phases) not in ([*PHASES], [PHASES[0]], [PHASES[1]]):
        raise ValueError(f"phases must be {' then '.join(PHASES)}, or one of them, got {phases}")
    eps_d, (low, high) = reach * threat.eps, threat.bounds

    def finish(x: Images, out: Images) -> Images:
        return jnp.clip(x + eps_d * jnp.tanh(out), low, high)

    system = _purifying.make_system(
        model,
        generator,
        generator_options,
        finish,
        classifier=classifier,
        discriminator=adversarial_weight > 0,
    )

    def straight_through(params: base.Params, carry: base.Carry) -> Predict:
        generate = system.generator.predict(params, carry)
        classify = system.classifier.predict(params, carry)
        squash, cut = bpda(jnp.tanh), bpda(lambda z: jnp.clip(z, low, high))
        return lambda x: classify(cut(x + eps_d * squash(generate(x))))

    def loss(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.LossValue:
        x, labels = batch["image"], batch["label"]
        both = jnp.concatenate((batch["adversarial"], x))
        cleaned, carry = system.clean(params, carry, both)
        logits, features = _purifying.feature_distance(
            system.classifier, params, carry, cleaned, x, layer
        )
        restored, kept = logits[: len(x)], logits[len(x) :]
        pixels = losses.absolute_error(cleaned[: len(x)], x)
        target = base.targets(batch, restored)
        value = losses.cross_entropy(restored, target)
        value += clean_weight * losses.cross_entropy(kept, target)
        value += feature_weight * features + pixel_weight * pixels
        if system.discriminator is not None:
            real = system.judge(params, carry, cleaned[: len(x)])[0]
            value += adversarial_weight * losses.binary_cross_entropy(real, 1.0)
        metrics = {
            "accuracy": base.accuracy(kept, labels),
            "restored_accuracy": base.accuracy(restored, labels),
            "pixels": base.mean_metric(pixels),
        }
        return jnp.mean(value), (carry, metrics)

    def phase(name: str, target: base.Predictor) -> base.Phase:
        craft = _purifying.mixture_craft(
            threat, target, kinds=attacks, steps=steps, step_size=step_size
        )
        updates = [base.Update(loss, ("generator",), craft)]
        if system.discriminator is not None:
            updates.insert(0, system.discriminate(craft))
        spec = dict(optimizer or _purifying.OPTIMIZER)
        roles = {role: spec for update in updates for role in update.roles}
        return base.Phase(name, tuple(updates), optimizers=roles)

    targets = {"oblivious": system.classifier.predict, "end_to_end": system.purified}
    return system.defense(
        threat,
        lengths,
        [phase(name, targets[name]) for name in phases],
        layer=layer,
        detours={"around tanh and clip": straight_through},
    )
