"""CLAF: the adversarial example is one more positive, and the head it is made with stays fresh."""

import flax.linen as nn
import jax.numpy as jnp

from jaxdefense import attacks, losses, registry
from jaxdefense.attacks import checks
from jaxdefense.defenses import _contrastive, base
from jaxdefense.threat import Linf
from jaxdefense.types import Array, Attack, Images, Key, Labels, PerExample, Predict, Threat


def literal_pgd(
    threat: Linf,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    steps: int,
    step_size: float | Array,
) -> Attack:
    """PGD as CLAF's released code runs it: in normalised space, clamped to [0, 1] *there*.

    n = (x - mean) / std; n_0 = clamp(n + U(-eps, eps)); n_{t+1} = clamp(n + clip(n_t +
    step_size sign(grad) - n, eps)). The clamp maps every pixel value below `mean` to the mean
    and every one above mean + std to that: what it returns is **not** within eps of the image,
    neither in pixels nor in units of std. Never report it as an L_inf result.

    Args:
      threat: its eps counts in units of std; its bounds are the clamp's.
      mean: C numbers.
      std: C numbers.
      steps: number of PGD steps.
      step_size: in units of std.

    Returns:
      An `Attack` of images in [0, 1], whose results lie in [mean, mean + std].

    Raises:
      ValueError: counts or step sizes out of range.
    """
    checks.check_count("steps", steps)
    checks.check_step("step_size", step_size)

    def attack(predict: Predict, key: Key, images: Images, labels: Labels) -> Images:
        centre = jnp.asarray(mean, images.dtype).reshape(1, 1, 1, -1)
        scale = jnp.asarray(std, images.dtype).reshape(1, 1, 1, -1)

        def objective(n: Images) -> PerExample:
            return losses.cross_entropy(predict(n * scale + centre), labels)

        n = (images - centre) / scale
        adversarial = attacks.maximize(objective, n, threat, key, steps=steps, step_size=step_size)
        return adversarial * scale + centre

    return attack


def _attack(
    mode: str, model: nn.Module, threat: Threat, *, steps: int, step_size: float | None
) -> Attack:
    length = base.default_step_size(threat, step_size)
    if mode == "pixel":
        return attacks.pgd(threat, steps=steps, step_size=length)
    if mode != "literal":
        registry.raise_unknown("claf mode", mode, ("pixel", "literal"))
    mean, std = getattr(model, "mean", None), getattr(model, "std", None)
    if mean is None or std is None or not isinstance(threat, Linf):
        raise ValueError(
            "mode='literal' needs an L_inf threat and a model with mean and std, got "
            f"{threat} and mean={mean}, std={std}"
        )
    return literal_pgd(threat, mean=mean, std=std, steps=steps, step_size=length)


def make(
    model: nn.Module,
    threat: Threat,
    *,
    dataset: str = "cifar10",
    mode: str = "pixel",
    labels: bool = True,
    temperature: float = 0.07,
    projection: int = 128,
    steps: int = 5,
    step_size: float | None = None,
    cycles: int = 140,
    refresh_epochs: float | str = 5,
    refresh_every: float | str = 1,
    refresh_adv: bool = True,
    refresh_bn: str = "train",
    keep_head: bool = True,
    final_epochs: float | str = 100,
    final_head: str = "clean",
    head_lr: float = 1e-3,
) -> base.Defense:
    """Stage 1 min_{f,g} SupCon(x1, x2); stage 2 min_{f,g} SupCon(x1, x2, x') with a fresh head.

    f is the encoder, g the projector, c the head; x1, x2 are strong views, x a weak crop, and
    x' = PGD on CE(c(f(x)), y), eval-mode BatchNorm. Phases:

        contrast    f, g on (x1, x2); takes what the others leave of the run
        refresh     c on CE(c(f(x')), y) by a fresh Adam, f's weights fixed  }  `cycles` times
        encode      f, g on one forward pass of (x1, x2, x')                  }
        final head  a new c on weak crops, f's weights fixed

    The optimiser of f and g, with its schedule, goes on through `contrast` and every `encode`.

    Args:
      model: images (B, H, W, C) -> logits (B, K), its last layer called `head`.
      threat: the set of x'.
      dataset: whose strong and weak views are drawn (`data.make_contrast_view`).
      mode: 'pixel', or 'literal' for the released code's attack (`literal_pgd`), which needs
        `mean` and `std` in the model and exists to reproduce that code's own number only.
      labels: whether views of one class are positives, or only views of one image (NT-Xent).
      temperature: of the contrast.
      projection: size of the projector's output.
      steps: number of PGD steps.
      step_size: of the PGD, in image units (literal: of std); default eps / 4.
      cycles: of stage 2.
      refresh_epochs: length of each refresh (passes over the data, or as `Phase.length`).
      refresh_every: length of each `encode`.
      refresh_adv: the refresh sees x', else x.
      refresh_bn: 'train': f's BatchNorm uses and follows the batch's statistics while the head
        is trained; 'eval': f does not change at all.
      keep_head: each refresh goes on with the old head, else with a new one.
      final_epochs: length of `final head`.
      final_head: 'clean', or 'adv' to train it on x'.
      head_lr: Adam's rate for c.

    Returns:
      A `Defense` with the roles `encoder`, `head`, `projector` and the predictor `classifier`.

    Raises:
      ValueError: an unknown mode, data set or choice, or a count that is not positive.

    Reference: Rahamim, Naeh, Robustness through cognitive dissociation mitigation in contrastive
      adversarial training, arXiv 2203.08959, and the authors' code. Deviations: `pixel` is an
      honest L_inf ball, as theirs is not; z is of unit length in both stages (their last
      revision normalises before g in stage 1); f's optimiser is the run's (their revisions
      differ: SGD without momentum, Adam). INFERRED: `refresh_bn` holds for the final head too.
      Not ported: freezing four tensors only, the final decay of the wrong optimiser, eval mode
      left on after the first test.
    """
    checks.check_count("cycles", cycles)
    if refresh_bn not in ("train", "eval"):
        registry.raise_unknown("refresh_bn", refresh_bn, ("train", "eval"))
    if final_head not in ("clean", "adv"):
        registry.raise_unknown("final_head", final_head, ("clean", "adv"))
    attack = _attack(mode, model, threat, steps=steps, step_size=step_size)
    parts = _contrastive.Parts(model, projection=projection)
    view = _contrastive.views(dataset)

    def craft(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.Batch:
        predict = parts.predict(params, carry)
        return {**batch, "adversarial": attack(predict, key, batch["image"], batch["label"])}

    def loss(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.LossValue:
        z, logits, carry = parts.embed(
            params, carry, batch["view1"], batch["view2"], batch["adversarial"]
        )
        value = losses.supcon(
            z,
            batch["label"] if labels else None,
            temperature=temperature,
            axis_name=base.AXIS,
        )
        metrics = {"robust_accuracy": base.accuracy(logits[2], batch["label"])}
        return jnp.mean(value), (carry, metrics)

    refresh = _contrastive.head_phase(
        "refresh",
        parts,
        view,
        length=refresh_epochs,
        lr=head_lr,
        fresh=not keep_head,
        attack=attack if refresh_adv else None,
        train_bn=refresh_bn == "train",
    )
    encode = base.Phase(
        "encode",
        (base.Update(loss, _contrastive.CONTRAST, craft),),
        length=refresh_every,
        view=view,
    )
    final = _contrastive.head_phase(
        "final head",
        parts,
        view,
        length=final_epochs,
        lr=head_lr,
        fresh=True,
        attack=attack if final_head == "adv" else None,
        train_bn=refresh_bn == "train",
    )
    contrast = _contrastive.contrast_phase(parts, view, labels=labels, temperature=temperature)
    phases = (contrast, *(refresh, encode) * cycles, final)
    return base.Defense(parts.init, phases, {"classifier": parts.predict})
