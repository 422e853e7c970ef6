"""GSSL: learn from adversarial examples that a self-supervised generator has screened."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdefense import attacks, defenses, losses, models, registry
from jaxdefense.defenses import base, standard
from jaxdefense.models import layers
from jaxdefense.types import Array, Attack, Images, Key, Predict, Threat

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
      steps: number of PGD steps.
      step_size: of the PGD, in image units, by default eps / 4.
      attacked: which BatchNorm set the PGD attacks, "clean", or "screened" as AdvProp does.
      screen: "generated" s = G(x'), "residual" s = x' - G(x') (CD-VAE), "none" s = x' (AdvProp).
      generator: "vae" or "mae", of `models.generators()`.
      generator_options: its fields, e.g. {"latent": 64}.
      generator_optimizer: G's in every stage, by default Adam with rate 1e-3; F has the run's.
      gate: whether g weighs the screened terms; else it is 1.
      bn: "dual", or "shared" for one BatchNorm set (or none).
      screened_weight: of the screened images' cross-entropy.
      kl_weight: of the KL between clean and screened predictions.
      latent_weight: of the VAE's KL, per pixel of the image.
      corruption: x~ is x with Gaussian "noise" (clipped to the threat's bounds), or with some
        of its squares put to 0 ("mask"), or x itself ("none"). An MAE hides patches of its own
        besides.
      noise: standard deviation of the noise, image units.
      mask: share of the squares that are put to 0, in [0, 1).
      patch: side of a square, in pixels; it divides the image's sides.
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
    if bn == "dual":
        model = _with_two_bn_sets(model)
    system = _System(
        net=base.Net(model),
        threat=threat,
        eps=threat.eps if eps is None else eps,
        steps=steps,
        step_size=step_size,
        attacked=attacked,
        screen=screen,
        generator=generator,
        generator_options=dict(generator_options or {}),
        generator_optimizer=ADAM if generator_optimizer is None else generator_optimizer,
        gate=gate,
        bn=bn,
        screened_weight=screened_weight,
        kl_weight=kl_weight,
        latent_weight=latent_weight,
        corruption=corruption,
        noise=noise,
        mask=mask,
        patch=patch,
        smoothing=smoothing,
        lengths=_stage_lengths(LENGTHS if stages is None else stages, screen),
        robust=_robust_loss(robust_loss, model, threat),
    )
    return system.defense()


@dataclasses.dataclass(frozen=True, eq=False)
class _RobustLoss:
    """A defence whose loss is added to that of F_c, and the weight of that loss."""

    defense: base.Defense
    weight: float

    @property
    def update(self) -> base.Update:
        """The defence's only update."""
        return self.defense.phases[0].updates[0]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _System:
    """The classifier F, the generator G and their losses; the other attributes are `make`'s.

    Attributes:
      net: F, with two BatchNorm sets where `bn` is "dual".
      eps: radius of the ball around x, in image units.
      lengths: {stage: length} of the stages that are run, in their order.
      robust: the further loss of F_c, or None.
    """

    net: base.Net
    threat: Threat
    eps: float | Array
    steps: int
    step_size: float | None
    attacked: str
    screen: str
    generator: str
    generator_options: Mapping[str, Any]
    generator_optimizer: Mapping[str, Any]
    gate: bool
    bn: str
    screened_weight: float
    kl_weight: float
    latent_weight: float
    corruption: str
    noise: float
    mask: float
    patch: int
    smoothing: float
    lengths: Mapping[str, Any]
    robust: _RobustLoss | None

    def __post_init__(self) -> None:
        choices = {
            "attacked": ("clean", "screened"),
            "screen": SCREENS,
            "generator": GENERATORS,
            "bn": ("dual", "shared"),
            "corruption": CORRUPTIONS,
        }
        for option, known in choices.items():
            if getattr(self, option) not in known:
                registry.raise_unknown(f"{option} of gssl", getattr(self, option), known)
        for option in ("screened_weight", "kl_weight", "latent_weight", "noise"):
            if not 0 <= getattr(self, option) < float("inf"):
                raise ValueError(f"{option} must be 0 or more, got {getattr(self, option)!r}")
        if not 0 <= self.mask < 1:
            raise ValueError(f"mask must be in [0, 1), got {self.mask!r}")
        if self.patch < 1:
            raise ValueError(f"patch must be at least 1, got {self.patch!r}")
        if not self.eps > 0:
            raise ValueError(f"eps must be positive, got {self.eps!r}")
        # Wrong options of the generator and of the attack fail here, not in a jit.
        self.generator_net(channels=1)
        self.attack()

    def generator_net(self, channels: int) -> base.Net:
        """G for images of so many channels."""
        module = models.generator(self.generator, channels, **self.generator_options)
        return base.Net(module, "generator")

    def attack(self) -> Attack:
        """The PGD that crafts x'."""
        return attacks.pgd(
            self.threat.scaled(self.eps / self.threat.eps),
            steps=self.steps,
            step_size=self.eps / 4 if self.step_size is None else self.step_size,
        )

    @property
    def screened_set(self) -> dict[str, int]:
        """The keyword arguments of a call of F that make it F_s."""
        return {"bn_set": 1} if self.bn == "dual" else {}

    def init(self, key: Key, images: Images) -> tuple[base.Params, base.Carry]:
        """(params, carry) of both networks and of the robust loss."""
        params, carry = self.net.init(key, images)
        if self.screen != "none":
            generator = self.generator_net(images.shape[-1])
            new_params, new_carry = generator.init(jax.random.fold_in(key, 1), images)
            params, carry = {**params, **new_params}, {**carry, **new_carry}
        if self.robust:
            new_params, new_carry = self.robust.defense.init(key, images)
            params, carry = {**new_params, **params}, {**new_carry, **carry}
        return params, carry

    def screened(self, x: Images, generated: Images) -> Images:
        """What the screen makes of x and G(x)."""
        return x - generated if self.screen == "residual" else generated

    def purify(self, params: base.Params, carry: base.Carry) -> Callable[[Images], Images]:
        """Images -> screened images, G in eval mode."""
        return lambda x: self.screened(x, self.generator_net(x.shape[-1]).predict(params, carry)(x))

    def corrupt(self, key: Key, x: Images) -> Images:
        """x~, the corrupted x."""
        if self.corruption == "noise":
            noise = self.noise * jax.random.normal(key, x.shape, x.dtype)
            return jnp.clip(x + noise, *self.threat.bounds)
        if self.corruption == "mask":
            return mask_patches(key, x, share=self.mask, patch=self.patch)
        return x

    def craft(
        self, params: base.Params, carry: base.Carry, batch: base.Batch, key: Key
    ) -> base.Batch:
        """Adds x' as "adversarial", and the batch of the robust loss as "robust"."""
        k_attack, k_robust = jax.random.split(key)
        crafted = dict(batch)
        attacked_set = self.screened_set if self.attacked == "screened" else {}
        predict = self.net.predict(params, carry, **attacked_set)
        crafted["adversarial"] = self.attack()(predict, k_attack, batch["image"], batch["label"])
        if self.robust:
            crafted["robust"] = self.robust.update.craft(params, carry, batch, k_robust)
        return crafted

    def craft_screened(
        self, params: base.Params, carry: base.Carry, batch: base.Batch, key: Key
    ) -> base.Batch:
        """Adds s as "screened" besides, for the stage in which G does not move."""
        crafted = self.craft(params, carry, batch, key)
        x_adv = crafted["adversarial"]
        s = x_adv if self.screen == "none" else self.purify(params, carry)(x_adv)
        return {**crafted, "screened": s}

    def self_supervised(
        self, params: base.Params, carry: base.Carry, batch: base.Batch, key: Key
    ) -> base.LossValue:
        """L_g."""
        k_corrupt, k_generator = jax.random.split(key)
        x = batch["image"]
        corrupted = self.corrupt(k_corrupt, x)
        net = self.generator_net(x.shape[-1])
        if self.generator == "vae":
            out, carry = net.train(params, carry, corrupted, key=k_generator, moments=True)
            image, mean, log_variance = out
            code = losses.gaussian_kl(mean, log_variance) / (x.size / len(x))
        else:
            image, carry = net.train(params, carry, corrupted, key=k_generator)
            code = jnp.zeros(len(x))
        error = losses.squared_error(image, x)
        metrics = {"reconstruction": base.mean_metric(error), "latent": base.mean_metric(code)}
        return jnp.mean(error + self.latent_weight * code), (carry, metrics)

    def screening(
        self, params: base.Params, carry: base.Carry, batch: base.Batch, key: Key
    ) -> base.LossValue:
        """L_f, and the robust loss."""
        label = batch["label"]
        clean, carry = self.net.train(params, carry, batch["image"])
        seen, carry = self.net.train(params, carry, batch["screened"], **self.screened_set)
        target = base.targets(batch, clean, smoothing=self.smoothing)
        opening = jnp.ones(len(label))
        if self.gate:  # with a gradient, F would learn to close it
            probability = jnp.take_along_axis(jax.nn.softmax(seen), label[:, None], -1)[:, 0]
            opening = jax.lax.stop_gradient(probability)
        divergence = losses.kl(jax.lax.stop_gradient(clean), seen)
        lesson = self.screened_weight * losses.cross_entropy(seen, target)
        lesson = lesson + self.kl_weight * divergence
        value = jnp.mean(losses.cross_entropy(clean, target) + opening * lesson)
        metrics = {
            "accuracy": base.accuracy(clean, label),
            "screened_accuracy": base.accuracy(seen, label),
            "gate": base.mean_metric(opening),
        }
        if self.robust:
            more, (carry, new) = self.robust.update.loss(params, carry, batch["robust"], key)
            value = value + self.robust.weight * more
            metrics |= {f"robust_loss_{name}": metric for name, metric in new.items()}
        return value, (carry, metrics)

    def joint(
        self, params: base.Params, carry: base.Carry, batch: base.Batch, key: Key
    ) -> base.LossValue:
        """L_f + L_g + MSE(G(x'), x)."""
        k_screening, k_supervised = jax.random.split(key)
        x, x_adv = batch["image"], batch["adversarial"]
        generated, carry = self.generator_net(x.shape[-1]).train(params, carry, x_adv)
        batch = {**batch, "screened": self.screened(x_adv, generated)}
        value, (carry, metrics) = self.screening(params, carry, batch, k_screening)
        supervised, (carry, new) = self.self_supervised(params, carry, batch, k_supervised)
        restored = losses.squared_error(generated, x)
        metrics = {**metrics, **new, "restoration": base.mean_metric(restored)}
        return value + supervised + jnp.mean(restored), (carry, metrics)

    def auxiliary(self, params: base.Params, carry: base.Carry) -> Predict:
        """F_s(x)."""
        return self.net.predict(params, carry, **self.screened_set)

    def behind_screen(self, params: base.Params, carry: base.Carry) -> Predict:
        """F_s(screen(x))."""
        predict, clean = self.auxiliary(params, carry), self.purify(params, carry)
        return lambda x: predict(clean(x))

    def phases(self) -> tuple[base.Phase, ...]:
        """The stages, each of one update per batch."""
        both = ("classifier", "generator")
        updates = {
            "self_supervised": base.Update(self.self_supervised, ("generator",)),
            "standard": base.Update(standard.natural_loss(self.net, self.smoothing)),
            "screening": base.Update(self.screening, craft=self.craft_screened),
            "joint": base.Update(self.joint, both, self.craft),
        }
        optimizers = {"generator": dict(self.generator_optimizer)}
        return tuple(
            base.Phase(name, (updates[name],), length, optimizers)
            for name, length in self.lengths.items()
        )

    def defense(self) -> base.Defense:
        """The defence with the predictors that `make` names."""
        predictors: dict[str, base.Predictor] = {"classifier": self.net.predict}
        purifiers = {}
        if self.bn == "dual":
            predictors["auxiliary"] = self.auxiliary
        if self.screen != "none":
            predictors["screened"] = self.behind_screen
            behind = "auxiliary" if self.bn == "dual" else "classifier"
            purifiers["screened"] = base.Purifier(behind, self.purify)
        return base.Defense(self.init, self.phases(), predictors, purifiers)


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


def _with_two_bn_sets(model: nn.Module) -> nn.Module:
    """The model with BatchNorm sets 0 and 1."""
    if not layers.has_bn_sets(model):
        raise ValueError(
            f"bn='dual' needs a model with BatchNorm sets, got {type(model).__name__}; "
            f"allowed for it: bn='shared'"
        )
    return model.clone(bn_sets=2)


def _stage_lengths(stages: Mapping[str, Any], screen: str) -> dict[str, Any]:
    """The stages' lengths in their order, which a config's JSON does not keep."""
    registry.check_known("stage of gssl", stages, STAGES)
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


def _robust_loss(
    spec: Mapping[str, Any] | None, model: nn.Module, threat: Threat
) -> _RobustLoss | None:
    """The loss that `make`'s argument `robust_loss` names."""
    if not spec:
        return None
    options = dict(spec)
    name, weight = options.pop("name", None), float(options.pop("weight", 1.0))
    defense = defenses.make(name, model, threat, **options)
    updates = [update for phase in defense.phases for update in phase.updates]
    if len(updates) != 1 or updates[0].roles != ("classifier",):
        raise ValueError(
            f"robust_loss needs a defence of one phase with one update of the classifier, "
            f"got {name!r} with updates of {[update.roles for update in updates]}"
        )
    return _RobustLoss(defense, weight)
