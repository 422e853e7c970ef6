"""CSE: cost-sensitive training with the Min-Max property; with FGSM images too, it is CSE+AT."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxdefense import losses
from jaxdefense.defenses import base, fgsm_at, min_max
from jaxdefense.types import Labels, Logits, LossFn, PerExample, Threat


def make(
    model: nn.Module,
    threat: Threat,
    *,
    protect: int | Sequence[int] | str = 0,
    cost: float = 10.0,
    cost_weight: float = 1.0,
    layers: Mapping[str, float] | None = None,
    kurtosis: Mapping[str, float] | None = None,
    adversarial: bool = False,
    start: str | None = None,
    pretrain: float | str = "50%",
    step_size: float | None = None,
    bounds: Sequence[float] | None = None,
    ramp_epochs: float = 0.0,
) -> base.Defense:
    """L_CSE = CE(f(x), y) + l1 sum_j C[j, y] p_j + sum_layers l R(W), after a warm start.

    p = softmax(f(x)), R(W) = ||W||_1 - ||W||_2. Phase 1 is plain training (`normal`) or, with
    `adversarial`, FGSM training with two updates per batch (`adv`). Phase 2 (`cse`), with a fresh
    optimiser, takes a step on L_CSE(x) and, with `adversarial`, a second one on L_CSE(x'),
    x' = FGSM with L_CSE on the network just updated.

    Args:
      model: images (B, H, W, C) -> logits (B, K).
      threat: of the FGSM; unused without `adversarial`.
      protect: the class, or classes, whose errors cost `cost`; all others' cost 1. "each": one
        model per class, for the transform `stacked` with K members, of which member i protects
        class i (unstacked, it protects class 0).
      cost: c of the cost matrix; 5 in the paper's CSE on CIFAR-10.
      cost_weight: l1.
      layers: {convolution: l}, the weight of R of its kernel; default {"conv1": 1.0}. BatchNorm
        behind a convolution undoes the scale that R also takes away.
      kurtosis: {convolution: l}, subtracts l times its kernel's excess kurtosis (the paper's
        CSE2). An extension: the released code detaches the weights there, so that its term
        has no gradient; this one has.
      adversarial: the second step (CSE+AT; with `layers={}` it is CSA).
      start: the warm start, "normal" or "adv"; default "adv" with `adversarial`, else "normal".
      pretrain: its length; 0 for none.
      step_size, bounds, ramp_epochs: of the FGSM, as in `fgsm_at`.

    Returns:
      A `Defense` with the role and predictor `classifier`.

    Raises:
      ValueError: a class, cost, weight or start outside its range; when parameters are first
        made, a layer that is no convolution of the model.

    Reference: Shen et al., Adversarial learning with cost-sensitive classes, arXiv 2101.12372, and
      the first author's code. Inferred: CSE+AT is the loop of CSA with L_CSE, since only its
      result is described; several protected classes take all their rows and columns.
    """
    net = base.Net(model)
    if not 0 <= cost_weight < float("inf"):
        raise ValueError(f"cost_weight must be finite and not negative, got {cost_weight}")
    each = protect == "each"
    classes: Sequence[int | Sequence[int]]
    if not isinstance(protect, str):
        classes = [protect]
    elif each:
        classes = range(model.num_classes)
    else:
        raise ValueError(f'protect must be a class, several, or "each", got {protect!r}')
    matrices = jnp.stack([losses.cost_matrix(model.num_classes, k, cost) for k in classes])
    layers, kurtosis = {"conv1": 1.0} if layers is None else layers, kurtosis or {}
    penalty = min_max.penalty(layers, kurtosis) if layers or kurtosis else None

    def natural(logits: Logits, batch: base.Batch, carry: base.Carry) -> PerExample:
        return losses.cross_entropy(logits, base.targets(batch, logits))

    def sensitive(logits: Logits, batch: base.Batch, carry: base.Carry) -> PerExample:
        matrix = jnp.tensordot(carry["member"], matrices, 1) if each else matrices[0]
        expected = losses.expected_cost(logits, batch["label"], matrix)
        return natural(logits, batch, carry) + cost_weight * expected

    def init(key: Any, images: Any) -> tuple[base.Params, base.Carry]:
        params, carry = net.init(key, images)
        if penalty is not None:
            penalty(params[net.role])  # its layers exist
        return params, {**carry, "member": jnp.eye(len(matrices))[0]} if each else carry

    updates = functools.partial(
        fgsm_at.updates, net, threat, step_size=step_size, bounds=bounds, ramp_epochs=ramp_epochs
    )
    steps = updates(sensitive, penalty=penalty)
    phase = base.Phase("cse", steps if adversarial else steps[:1])
    start = start or ("adv" if adversarial else "normal")
    phases = fgsm_at.warm_start(net, start, updates(natural), pretrain, phase)
    judged = {net.role: 0} if each else {}
    return base.Defense(init, phases, {net.role: net.predict}, judged=judged)


def attack_loss(
    num_classes: int,
    *,
    protect: int | Sequence[int] = 0,
    cost: float = 10.0,
    cost_weight: float = 1.0,
) -> LossFn:
    """The part of L_CSE that sees images, of logits and labels: what the paper's attacks raise."""
    matrix = losses.cost_matrix(num_classes, protect, cost)

    def loss(logits: Logits, labels: Labels) -> PerExample:
        expected = losses.expected_cost(logits, labels, matrix)
        return losses.cross_entropy(logits, labels) + cost_weight * expected

    return loss
