"""FGSM adversarial training with two updates per batch: the ADV of cost-sensitive learning."""

import dataclasses
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp

from jaxdefense import attacks, losses, registry
from jaxdefense.defenses import base, min_max
from jaxdefense.types import Key, Logits, PerExample, Threat

# What is minimised, one number per example: (logits, batch, carry) -> (B,).
Criterion = Callable[[Logits, base.Batch, base.Carry], PerExample]


def make(
    model: nn.Module,
    threat: Threat,
    *,
    clean_step: bool = True,
    step_size: float | None = None,
    bounds: Sequence[float] | None = None,
    ramp_epochs: float = 0.0,
    pretrain: float | str = 0,
) -> base.Defense:
    """Per batch a step on CE(f(x), y), then one on CE(f'(x'), y), x' = FGSM of the new f'.

    Args:
      model: images (B, H, W, C) -> logits (B, K).
      threat: of the FGSM.
      clean_step: without it the step on x' alone, as in the reference's printed example.
      step_size: of the FGSM, image units; default eps.
      bounds: box of the crafted images where it is not the threat's; the reference code does not
        clip at all, for which (-1, 2) is wide enough.
      ramp_epochs: eps and step size grow linearly from 0 over so many epochs.
      pretrain: length of a first phase `normal` of steps on clean images only; the optimiser
        begins anew behind it.

    Returns:
      A `Defense` with the role and predictor `classifier`.

    Raises:
      ValueError: bounds that are no interval.

    Reference: Shen et al., Adversarial learning with cost-sensitive classes, arXiv 2101.12372, and
      the first author's code. Deviation: images stay inside the threat's box unless `bounds` says
      otherwise. Known to overfit to the single step at large eps: FGSM accuracy near the clean
      one says nothing about PGD.
    """
    net = base.Net(model)

    def criterion(logits: Logits, batch: base.Batch, carry: base.Carry) -> PerExample:
        return losses.cross_entropy(logits, base.targets(batch, logits))

    steps = updates(
        net, threat, criterion, step_size=step_size, bounds=bounds, ramp_epochs=ramp_epochs
    )
    phase = base.Phase("adv", steps if clean_step else steps[1:])
    phases = warm_start(net, "normal", steps, pretrain, phase)
    return base.Defense(net.init, phases, {net.role: net.predict})


def updates(
    net: base.Net,
    threat: Threat,
    criterion: Criterion,
    *,
    penalty: min_max.Penalty | None = None,
    step_size: float | None = None,
    bounds: Sequence[float] | None = None,
    ramp_epochs: float = 0.0,
) -> tuple[base.Update, base.Update]:
    """The step on the batch, and the step on the FGSM images of the network just updated.

    Args:
      net: what is trained and attacked.
      threat: as in `make`.
      criterion: minimised on both, and raised by the FGSM.
      penalty: added to both steps' losses; it has no gradient to the images.
      step_size: as in `make`.
      bounds: as in `make`.
      ramp_epochs: as in `make`.
    """
    if bounds is not None:
        if len(bounds) != 2:
            raise ValueError(f"bounds must be (low, high), got {bounds!r}")
        threat = dataclasses.replace(threat, bounds=(float(bounds[0]), float(bounds[1])))
    length = threat.eps if step_size is None else step_size

    def craft(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.Batch:
        factor = base.eps_ramp(batch, ramp_epochs)
        attack = attacks.fgsm(
            threat.scaled(factor),
            step_size=length * factor,
            loss=lambda logits, labels: criterion(logits, batch, carry),
        )
        x_adv = attack(net.predict(params, carry), key, batch["image"], batch["label"])
        return {**batch, "adversarial": x_adv}

    def loss_on(images: str, metric: str) -> base.Loss:
        def loss(
            params: base.Params, carry: base.Carry, batch: base.Batch, key: Key
        ) -> base.LossValue:
            logits, carry = net.train(params, carry, batch[images])
            value = jnp.mean(criterion(logits, batch, carry))
            metrics = {metric: base.accuracy(logits, batch["label"])}
            if penalty is not None:
                added = penalty(params[net.role])
                value, metrics["penalty"] = value + added, (added, jnp.float32(1))
            return value, (carry, metrics)

        return loss

    return (
        base.Update(loss_on("image", "accuracy"), (net.role,)),
        base.Update(loss_on("adversarial", "robust_accuracy"), (net.role,), craft),
    )


def warm_start(
    net: base.Net,
    start: str,
    updates: tuple[base.Update, base.Update],
    length: float | str,
    phase: base.Phase,
) -> tuple[base.Phase, ...]:
    """A warm start and, with a fresh optimiser, `phase`; `phase` alone where the start is 0 long.

    Args:
      net: whose optimiser begins anew.
      start: name of the warm start; "normal" takes the first of the updates, "adv" both.
      updates: clean and adversarial (see `updates`), the same for all variants.
      length: of the first phase (`train.optim.steps_of`); 0 for none.
      phase: what follows.

    Raises:
      ValueError: another start.
    """
    counts = {"normal": 1, "adv": 2}
    if start not in counts:
        registry.raise_unknown("start", start, counts)
    if length == 0:
        return (phase,)
    first = base.Phase(start, updates[: counts[start]], length, shared_by_variants=True)
    return first, dataclasses.replace(phase, fresh_optimizers=(net.role,))
