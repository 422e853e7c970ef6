"""Shared by the purifying defences: a classifier, frozen once trained, behind a generator.

    predict(x) = F(purify(x)),    purify(x) = finish(x, G(x))

Phase `classifier` trains F on clean images, unless F is a trained network (`base.Trained`; in a
config {"workdir": ..., "checkpoint": "best"}); every later phase trains the generator G (and a
discriminator, where there is one) and leaves F's parameters and statistics as they are.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdefense import attacks, losses, models, registry
from jaxdefense.attacks import checks
from jaxdefense.defenses import base, standard
from jaxdefense.models import ape_gan
from jaxdefense.types import Array, Images, Key, Logits, PerExample, Predict, Threat

# APE-GAN's and IAED-GAN's optimiser, for generators and discriminators alike.
OPTIMIZER = {"name": "adam", "lr": 2e-4, "b1": 0.5}

ATTACKS = ("fgsm", "pgd", "clean")


@dataclasses.dataclass(frozen=True)
class Generator:
    """A generator of `models.generators()` in a role, for images of any number of channels."""

    name: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    role: str = "generator"

    def __post_init__(self) -> None:
        self._net(1)  # an unknown name or option fails here

    def _net(self, channels: int) -> base.Net:
        return base.Net(models.generator(self.name, channels, **self.options), self.role)

    def init(self, key: Key, images: Images) -> tuple[base.Params, base.Carry]:
        """({role: parameters}, {role: running statistics})."""
        return self._net(images.shape[-1]).init(key, images)

    def predict(self, params: base.Params, carry: base.Carry) -> Callable[[Images], Images]:
        """The network in eval mode."""
        return lambda x: self._net(x.shape[-1]).predict(params, carry)(x)

    def train(self, params: base.Params, carry: base.Carry, x: Images) -> tuple[Images, base.Carry]:
        """(output, carry): BatchNorm, if any, on the batch's statistics."""
        return self._net(x.shape[-1]).train(params, carry, x)


@dataclasses.dataclass(frozen=True, eq=False)
class System:
    """Classifier, generator and discriminator, and what the three can be asked.

    Attributes:
      classifier: F.
      generator: G.
      finish: (images, G's output on them) -> cleaned images.
      discriminator: D, images -> one logit each, or None.
      trained: F's weights, where they are given.
    """

    classifier: base.Net
    generator: Generator
    finish: Callable[[Images, Images], Images]
    discriminator: base.Net | None = None
    trained: base.Trained | None = None

    def init(self, key: Key, images: Images) -> tuple[base.Params, base.Carry]:
        """(params, carry) of all roles."""
        params: base.Params = {}
        carry: base.Carry = {}
        for i, net in enumerate((self.classifier, self.generator, self.discriminator)):
            if net is not None:
                new_params, new_carry = net.init(jax.random.fold_in(key, i), images)
                params, carry = {**params, **new_params}, {**carry, **new_carry}
        if self.trained is not None:
            weights, statistics = self.trained.init(self.classifier.role)
            params, carry = {**params, **weights}, {**carry, **statistics}
        return params, carry

    def purify(self, params: base.Params, carry: base.Carry) -> Callable[[Images], Images]:
        """Images -> cleaned images, as deployed."""
        generate = self.generator.predict(params, carry)
        return lambda x: self.finish(x, generate(x))

    def purified(self, params: base.Params, carry: base.Carry) -> Predict:
        """F(purify(.)), the deployed classifier."""
        purify, classify = self.purify(params, carry), self.classifier.predict(params, carry)
        return lambda x: classify(purify(x))

    def clean(self, params: base.Params, carry: base.Carry, x: Images) -> tuple[Images, base.Carry]:
        """(cleaned images, carry), the generator in train mode."""
        out, carry = self.generator.train(params, carry, x)
        return self.finish(x, out), carry

    def judge(self, params: base.Params, carry: base.Carry, x: Images) -> tuple[Array, base.Carry]:
        """(logits (B,) of being real, carry), the discriminator in train mode."""
        assert self.discriminator is not None
        return self.discriminator.train(params, carry, x)

    def discriminate(self, craft: base.Craft) -> base.Update:
        """D's step on BCE(D(x), 1) + BCE(D(purify(x')), 0): it raises what G lowers."""

        def loss(
            params: base.Params, carry: base.Carry, batch: base.Batch, key: Key
        ) -> base.LossValue:
            cleaned = self.clean(params, carry, batch["adversarial"])[0]
            real, carry = self.judge(params, carry, batch["image"])
            fake, carry = self.judge(params, carry, jax.lax.stop_gradient(cleaned))
            value = losses.binary_cross_entropy(real, 1.0) + losses.binary_cross_entropy(fake, 0.0)
            right = jnp.sum(real > 0, dtype=jnp.float32) + jnp.sum(fake <= 0, dtype=jnp.float32)
            return jnp.mean(value), (carry, {"told_apart": (right, jnp.float32(2 * fake.size))})

        return base.Update(loss, ("discriminator",), craft)

    def defense(
        self,
        threat: Threat,
        lengths: Mapping[str, float | str] | None,
        phases: Sequence[base.Phase],
        *,
        layer: str = "features",
        detours: Mapping[str, base.Predictor] | None = None,
    ) -> base.Defense:
        """The defence with the predictors `purified` (deployed) and `classifier`.

        Args:
          threat: the run's.
          lengths: of the phases by name, None an equal share of what the others leave.
          phases: after the classifier's own.
          layer: of F, whose name is checked.
          detours: of the purifier.

        Raises:
          ValueError: a length for an unknown phase; at init, an unknown layer.
        """
        if self.trained is None:
            first = standard.make(self.classifier.module, threat).phases[0]
            phases = [dataclasses.replace(first, name="classifier"), *phases]
        lengths = dict(lengths or {})
        registry.check_known("phase in lengths", lengths, [phase.name for phase in phases])
        phases = [dataclasses.replace(p, length=lengths.get(p.name)) for p in phases]

        def init(key: Key, images: Images) -> tuple[base.Params, base.Carry]:
            params, carry = self.init(key, images)
            layers = [*params[self.classifier.role], "features", "logits"]
            if layer not in layers:
                registry.raise_unknown("layer", layer, layers)
            return params, carry

        predictors = {"purified": self.purified, "classifier": self.classifier.predict}
        purifier = base.Purifier("classifier", self.purify, detours or {})
        pretrained = {} if self.trained is None else {self.classifier.role: self.trained}
        return base.Defense(init, tuple(phases), predictors, {"purified": purifier}, pretrained)


def make_system(
    model: nn.Module,
    generator: str,
    options: Mapping[str, Any] | None,
    finish: Callable[[Images, Images], Images],
    *,
    classifier: base.Trained | None = None,
    discriminator: bool = False,
) -> System:
    """The system of a classifier, trained where one is given, and a generator by name.

    Args:
      model: F; not used where `classifier` is given.
      generator: the name of G.
      options: G's fields.
      finish: (images, G's output on them) -> cleaned images.
      classifier: F's module and weights, trained in a run of their own.
      discriminator: whether there is one.

    Raises:
      ValueError: an unknown generator or option of it, or a classifier that is no `base.Trained`.
    """
    if classifier is not None:
        if not isinstance(classifier, base.Trained):
            raise ValueError(
                f"classifier must be a trained network ({{'workdir': ...}} in a config), "
                f"got {classifier!r}"
            )
        model = classifier.module
    options = dict(options or {})
    judge = None
    if discriminator:
        # As wide, against its own, as an APE-GAN generator; beside any other as published.
        width = options.get("width", 1.0) if generator == "ape_gan" else 1.0
        judge = base.Net(ape_gan.Discriminator(width=width), "discriminator")
    return System(base.Net(model), Generator(generator, options), finish, judge, classifier)


def mixture_craft(
    threat: Threat,
    target: base.Predictor,
    *,
    kinds: Sequence[str] = ATTACKS,
    steps: int = 10,
    step_size: float | None = None,
) -> base.Craft:
    """The craft that adds batch["adversarial"]: equal shares by each kind of attack on `target`.

    The order of a batch is random, so this is a draw of the kind for each image, and a third of
    the work of crafting all three.

    Args:
      threat: the set.
      target: what is attacked.
      kinds: of `ATTACKS`; a kind may stand there twice.
      steps: number of PGD steps.
      step_size: of the PGD, in image units; default eps / 4.

    Raises:
      ValueError: no or an unknown kind, or steps that are no positive integer.
    """
    if not kinds:
        raise ValueError(f"attacks must name at least one of {', '.join(ATTACKS)}")
    made: dict[str, Any] = {
        "fgsm": attacks.fgsm(threat),
        "pgd": attacks.pgd(
            threat, steps=steps, step_size=base.default_step_size(threat, step_size)
        ),
        "clean": lambda predict, key, x, y: x,
    }
    registry.check_known("attack", kinds, made)

    def craft(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.Batch:
        predict = target(params, carry)
        n = batch["image"].shape[0]
        parts = []
        for i, kind in enumerate(kinds):
            rows = slice(n * i // len(kinds), n * (i + 1) // len(kinds))
            x, y = batch["image"][rows], batch["label"][rows]
            if len(x):
                parts.append(made[kind](predict, jax.random.fold_in(key, i), x, y))
        return {**batch, "adversarial": jnp.concatenate(parts)}

    return craft


def activations(
    net: base.Net, params: base.Params, carry: base.Carry, x: Images, layer: str
) -> tuple[Logits, Array]:
    """(logits, a layer's output (B, ...)) of the network in eval mode.

    Args:
      net: the network.
      params: by role.
      carry: by role.
      x: (B, H, W, C).
      layer: "logits", "features" (the head's input), or the name of a submodule.
    """
    if layer in ("logits", "features"):
        logits, features = net.predict(params, carry, features=True)(x)
        return logits, logits if layer == "logits" else features

    def wanted(module: nn.Module, _: str) -> bool:
        return module.name == layer

    variables = {"params": params[net.role], "batch_stats": carry[net.role]}
    logits, kept = net.module.apply(
        variables, x, capture_intermediates=wanted, mutable=["intermediates"]
    )
    return logits, kept["intermediates"][layer]["__call__"][0]


def feature_distance(
    net: base.Net,
    params: base.Params,
    carry: base.Carry,
    cleaned: Images,
    images: Images,
    layer: str,
) -> tuple[Logits, PerExample]:
    """(F(cleaned), mean |F_l(cleaned) - F_l(images)| (B,)), no gradient through F_l(images).

    Args:
      net: F.
      params: by role.
      carry: by role.
      cleaned: at least as many images as `images`; only as many are compared.
      images: (B, H, W, C), the targets.
      layer: l, as in `activations`.
    """
    logits, got = activations(net, params, carry, cleaned, layer)
    wanted = activations(net, params, carry, images, layer)[1]
    return logits, losses.absolute_error(got[: len(images)], jax.lax.stop_gradient(wanted))


def check_weights(**weights: float) -> None:
    """Weights of a loss's terms are finite and not negative.

    Raises:
      ValueError: otherwise.
    """
    for name, weight in weights.items():
        checks.check_step(name, weight)
