"""GSSL: learn from adversarial examples that a self-supervised generator has screened."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdefense import attacks, defenses, losses, models, registry
from jaxdefense.defenses import base
from jaxdefense.models import layers
from jaxdefense.types import Images, Key, Predict, Threat

GENERATORS = ("mae", "vae")
SCREENS = ("generated", "none", "residual")
CORRUPTIONS = ("mask", "noise", "none")
STAGES = ("self_supervised", "standard", "screening", "joint")
# The lengths 100, 100, 50 and 50 epochs as shares of a run.
LENGTHS = {"self_supervised": "33%", "standard": "33%", "screening": "17%", "joint": None}
ADAM = {"name": "adam", "lr": 1e-3}


def make(
    model: nn.Module,
    threat: Threat,
    *,
    eps: float | None = None,
    steps: int = 5,
    step_size: float | None = None,
    attacked: str = "clean",
    screen: str = "generated",
    generator: str = "vae",
    generator_options: Mapping[str, Any] | None = None,
    generator_optimizer: Mapping[str, Any] | None = None,
    gate: bool = True,
    bn: str = "dual",
    screened_weight: float = 0.5,
    kl_weight: float = 0.5,
    latent_weight: float = 0.01,
    corruption: str = "noise",
    noise: float = 0.1,
    mask: float = 0.5,
    patch: int = 4,
    smoothing: float = 0.0,
    stages: Mapping[str, Any] | None = None,
    robust_loss: Mapping[str, Any] | None = None,
) -> base.Defense:
    """Train F on clean images and on what a generator G leaves of their adversarial examples.

    F_c and F_s are one network with two BatchNorm sets, for clean and for screened images. With
    x~ a corrupted x, x' the end of a PGD on F_c from x, s = G(x') and g = F_s(s)'s probability of
    the label y, without gradient:

        self_supervised  G     L_g = MSE(G(x~), x) + latent_weight KL / (H W C)
        standard         F     CE(F_c(x), y)
        screening        F     L_f = CE(F_c(x), y) + g (screened_weight CE(F_s(s), y)
                                     + kl_weight KL(F_c(x) || F_s(s))),  no gradient to F_c there
        joint            F, G  L_f + L_g + MSE(G(x'), x); L_f's gradient reaches G through s

    x' is made anew for every batch, and screened without randomness (a VAE's mean, an unmasked
    MAE), in training as afterwards. Predictors: `classifier` is F_c(x), `screened` F_s(screen(x)),
    `auxiliary` F_s(x). The aim is a higher clean accuracy: this is no defence by its own claim,
    and is to be attacked like any other.

    Args:
      model: images (B, H, W, C) -> logits (B, K); for `bn="dual"` one with BatchNorm sets.
      threat: the kind of ball that x' lies in.
      eps: its size in image units, by default the threat's. The examples are lessons, not the
        attack to be withstood: the method wants far smaller ones.
      steps, step_size: of the PGD; step_size in image units, by default eps / 4.
      attacked: which BatchNorm set the PGD attacks, "clean", or "screened" as AdvProp does.
      screen: "generated" s = G(x'), "residual" s = x' - G(x') (CD-VAE), "none" s = x' (AdvProp).
      generator: "vae" or "mae", of `models.generators()`.
      generator_options: its fields, e.g. {"latent": 64}.
      generator_optimizer: G's in every stage, by default Adam with rate 1e-3; F has the run's.
      gate: whether g weighs the screened terms; else it is 1.
      bn: "dual", or "shared" for one BatchNorm set (or none).
      screened_weight, kl_weight: of the two screened terms.
      latent_weight: of the VAE's KL, per pixel of the image.
      corruption: x~ is x with Gaussian "noise" of standard deviation `noise` (clipped to the
        threat's bounds), or with a share `mask` of its `patch` x `patch` squares put to 0
        ("mask"), or x itself ("none"). An MAE hides patches of its own besides.
      noise, mask, patch: see above; patch divides the image's sides.
      smoothing: label smoothing of the cross-entropies, in [0, 1).
      stages: {stage: length}, those of `STAGES` that are run, always in that order; a length as
        in `base.Phase`. Default: all four, lengths 2:2:1:1.
      robust_loss: a further loss of F_c in the screening and joint stages: {"name": a defence of
        one phase and one update of the classifier, "weight": default 1, **its options}, e.g.
        {"name": "trades", "beta": 6.0}. It keeps the threat's own eps.

    Returns:
      A `Defense` with the roles `classifier` and, with a screen, `generator`.

    Raises:
      ValueError: an unknown name or a value out of range; stages that leave the classifier or the
        generator untrained; two BatchNorm sets asked of a model that has none.

    Reference: Yang Fan et al., adversarial-example classification with a generative
      self-supervised model, Microelectronics & Computer 41(2), 2024. Only its abstract could be
      read: that there are self-supervised training, screening of adversarial examples, feedback
      to the classifier and joint training. All else here is INFERRED: the losses, weights,
      generators, sizes and lengths, from Yang et al., arXiv 2109.00946 (CD-VAE); Xie et al.,
      arXiv 1911.09665 (AdvProp); He et al., arXiv 2111.06377 (MAE).
    """
    choices = (
        ("attacked", attacked, ("clean", "screened")),
        ("screen", screen, SCREENS),
        ("generator", generator, GENERATORS),
        ("bn", bn, ("dual", "shared")),
        ("corruption", corruption, CORRUPTIONS),
    )
    for option, chosen, known in choices:
        if chosen not in known:
            registry.raise_unknown(f"{option} of gssl", chosen, known)
    weights = {
        "screened_weight": screened_weight,
        "kl_weight": kl_weight,
        "latent_weight": latent_weight,
        "noise": noise,
    }
    for option, value in weights.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{option} must be 0 or more, got {value!r}")
    if not 0 <= mask < 1:
        raise ValueError(f"mask must be in [0, 1), got {mask!r}")
    if patch < 1:
        raise ValueError(f"patch must be at least 1, got {patch!r}")
    radius = threat.eps if eps is None else eps
    if not radius > 0:
        raise ValueError(f"eps must be positive, got {radius!r}")
    lengths = _lengths(LENGTHS if stages is None else stages, screen)

    if bn == "dual":
        if not layers.has_bn_sets(model):
            raise ValueError(
                f"bn='dual' needs a model with BatchNorm sets, got {type(model).__name__}; "
                f"allowed for it: bn='shared'"
            )
        model = model.clone(bn_sets=2)
    net = base.Net(model)
    second = {"bn_set": 1} if bn == "dual" else {}  # keyword arguments of F_s
    options = dict(generator_options or {})
    models.generator(generator, 1, **options)  # a wrong option fails here, not in a jit
    robust, robust_weight = _robust(robust_loss, model, threat)
    pgd = attacks.pgd(
        threat.scaled(radius / threat.eps),
        steps=steps,
        step_size=radius / 4 if step_size is None else step_size,
    )

    def maker(x: Images) -> base.Net:
        return base.Net(models.generator(generator, x.shape[-1], **options), "generator")

    def init(key: Key, images: Images) -> tuple[base.Params, base.Carry]:
        params, carry = net.init(key, images)
        if screen != "none":
            more = maker(images).init(jax.random.fold_in(key, 1), images)
            params, carry = {**params, **more[0]}, {**carry, **more[1]}
        if robust:
            more = robust.init(key, images)
            params, carry = {**more[0], **params}, {**more[1], **carry}
        return params, carry

    def screened(x: Images, generated: Images) -> Images:
        return x - generated if screen == "residual" else generated

    def purify(params: base.Params, carry: base.Carry) -> Predict:
        return lambda x: screened(x, maker(x).predict(params, carry)(x))

    def corrupt(key: Key, x: Images) -> Images:
        if corruption == "noise":
            return jnp.clip(x + noise * jax.random.normal(key, x.shape, x.dtype), *threat.bounds)
        return mask_patches(key, x, share=mask, patch=patch) if corruption == "mask" else x

    def craft(params: Any, carry: Any, batch: base.Batch, key: Any) -> base.Batch:
        k_attack, k_robust = jax.random.split(key)
        crafted = dict(batch)
        predict = net.predict(params, carry, **(second if attacked == "screened" else {}))
        crafted["adversarial"] = pgd(predict, k_attack, batch["image"], batch["label"])
        if robust:
            update = robust.phases[0].updates[0]
            own = update.craft(params, carry, batch, k_robust)
            crafted["robust"] = own
        return crafted

    def screened_craft(params: Any, carry: Any, batch: base.Batch, key: Any) -> base.Batch:
        crafted = craft(params, carry, batch, key)
        x_adv = crafted["adversarial"]
        s = x_adv if screen == "none" else purify(params, carry)(x_adv)
        return {**crafted, "screened": s}

    def self_supervised(params: Any, carry: Any, batch: base.Batch, key: Any) -> Any:
        k_corrupt, k_own = jax.random.split(key)
        x = batch["image"]
        given = corrupt(k_corrupt, x)
        if generator == "vae":
            out, carry = maker(x).train(params, carry, given, key=k_own, moments=True)
            image, mean, log_variance = out
            code = losses.gaussian_kl(mean, log_variance) / (x.size / len(x))
        else:
            image, carry = maker(x).train(params, carry, given, key=k_own)
            code = jnp.zeros(len(x))
        error = losses.squared_error(image, x)
        metrics = {"reconstruction": _sum(error), "latent": _sum(code)}
        return jnp.mean(error + latent_weight * code), (carry, metrics)

    def standard(params: Any, carry: Any, batch: base.Batch, key: Any) -> Any:
        logits, carry = net.train(params, carry, batch["image"])
        target = base.targets(batch, logits, smoothing=smoothing)
        value = jnp.mean(losses.cross_entropy(logits, target))
        return value, (carry, {"accuracy": base.accuracy(logits, batch["label"])})

    def screening(params: Any, carry: Any, batch: base.Batch, key: Any) -> Any:
        label = batch["label"]
        clean, carry = net.train(params, carry, batch["image"])
        seen, carry = net.train(params, carry, batch["screened"], **second)
        target = base.targets(batch, clean, smoothing=smoothing)
        opened = jnp.ones(len(label))
        if gate:  # with a gradient, F would learn to close it
            probability = jnp.take_along_axis(jax.nn.softmax(seen), label[:, None], -1)[:, 0]
            opened = jax.lax.stop_gradient(probability)
        divergence = losses.kl(jax.lax.stop_gradient(clean), seen)
        lesson = screened_weight * losses.cross_entropy(seen, target) + kl_weight * divergence
        value = jnp.mean(losses.cross_entropy(clean, target) + opened * lesson)
        metrics = {
            "accuracy": base.accuracy(clean, label),
            "screened_accuracy": base.accuracy(seen, label),
            "gate": _sum(opened),
        }
        if robust:
            more, (carry, new) = (
                robust.phases[0].updates[0].loss(params, carry, batch["robust"], key)
            )
            value = value + robust_weight * more
            metrics |= {f"robust_loss_{name}": metric for name, metric in new.items()}
        return value, (carry, metrics)

    def joint(params: Any, carry: Any, batch: base.Batch, key: Any) -> Any:
        k_screening, k_supervised = jax.random.split(key)
        x, x_adv = batch["image"], batch["adversarial"]
        generated, carry = maker(x).train(params, carry, x_adv)
        batch = {**batch, "screened": screened(x_adv, generated)}
        value, (carry, metrics) = screening(params, carry, batch, k_screening)
        supervised, (carry, new) = self_supervised(params, carry, batch, k_supervised)
        restored = losses.squared_error(generated, x)
        metrics |= {**new, "restoration": _sum(restored)}
        return value + supervised + jnp.mean(restored), (carry, metrics)

    both = ("classifier", "generator")
    updates = {
        "self_supervised": base.Update(self_supervised, ("generator",)),
        "standard": base.Update(standard),
        "screening": base.Update(screening, craft=screened_craft),
        "joint": base.Update(joint, both, craft),
    }
    optimizers = {"generator": dict(ADAM if generator_optimizer is None else generator_optimizer)}
    phases = tuple(
        base.Phase(name, (updates[name],), length, optimizers) for name, length in lengths.items()
    )

    def auxiliary(params: base.Params, carry: base.Carry) -> Predict:
        return net.predict(params, carry, **second)

    def behind_screen(params: base.Params, carry: base.Carry) -> Predict:
        predict, clean = auxiliary(params, carry), purify(params, carry)
        return lambda x: predict(clean(x))

    predictors: dict[str, base.Predictor] = {"classifier": net.predict}
    purifiers = {}
    if bn == "dual":
        predictors["auxiliary"] = auxiliary
    if screen != "none":
        predictors["screened"] = behind_screen
        purifiers["screened"] = base.Purifier("auxiliary" if bn == "dual" else "classifier", purify)
    return base.Defense(init, phases, predictors, purifiers)


def mask_patches(key: Key, images: Images, *, share: float, patch: int) -> Images:
    """The images with round(share n) of their n = H W / patch^2 squares put to 0.

    Args:
      key: one key; every image has its own squares.
      images: (B, H, W, C).
      share: in [0, 1].
      patch: side of a square; it divides H and W.

    Raises:
      ValueError: sides that `patch` does not divide.
    """
    batch, height, width, _ = images.shape
    if height % patch or width % patch:
        raise ValueError(f"patch ({patch}) must divide the sides of images {images.shape}")
    rows, columns = height // patch, width // patch
    order = jnp.argsort(jax.random.uniform(key, (batch, rows * columns)), -1)
    ranks = jnp.argsort(order, -1).reshape(batch, rows, columns, 1)
    kept = (ranks >= round(share * rows * columns)).astype(images.dtype)
    return images * jnp.repeat(jnp.repeat(kept, patch, 1), patch, 2)


def _sum(values: Any) -> tuple[Any, Any]:
    """(sum, count) of one number per example: a metric."""
    return jnp.sum(values), jnp.float32(values.size)


def _lengths(stages: Mapping[str, Any], screen: str) -> dict[str, Any]:
    """The stages' lengths in their order, which a config's JSON does not keep."""
    for stage in stages:
        if stage not in STAGES:
            registry.raise_unknown("stage of gssl", stage, STAGES)
    chosen = {stage: stages[stage] for stage in STAGES if stage in stages}
    trains_generator = {"self_supervised", "joint"} & set(chosen)
    if screen == "none" and trains_generator:
        raise ValueError(
            f"screen 'none' has no generator, got stages {list(chosen)}; "
            f"allowed: standard, screening"
        )
    if screen != "none" and not trains_generator:
        raise ValueError(
            f"no stage trains the generator, got {list(chosen)}; add self_supervised or joint"
        )
    if not {"screening", "joint"} & set(chosen):
        raise ValueError(
            f"no stage shows screened images to the classifier, got {list(chosen)}; "
            f"add screening or joint"
        )
    return chosen


def _robust(
    spec: Mapping[str, Any] | None, model: nn.Module, threat: Threat
) -> tuple[base.Defense | None, float]:
    """The defence whose loss is added, and its weight."""
    if not spec:
        return None, 0.0
    options = dict(spec)
    name, weight = options.pop("name", None), float(options.pop("weight", 1.0))
    defense = defenses.make(name, model, threat, **options)
    updates = [update for phase in defense.phases for update in phase.updates]
    if len(updates) != 1 or updates[0].roles != ("classifier",):
        raise ValueError(
            f"robust_loss needs a defence of one phase with one update of the classifier, "
            f"got {name!r} with updates of {[update.roles for update in updates]}"
        )
    return defense, weight
