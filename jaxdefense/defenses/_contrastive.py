"""Shared by the contrastive defences: a classifier in three roles, its views, its phases.

roles   encoder    the network f without its last layer, h = f(x); it owns the statistics
        head       that last, linear layer c on h
        projector  g: h -> a unit vector z, which the contrast compares
views   {"image": a weak crop, "view1", "view2": two strong ones}
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxdefense import data, losses
from jaxdefense.attacks import checks
from jaxdefense.defenses import base
from jaxdefense.models.projector import Projector
from jaxdefense.types import Array, Attack, Images, Key, Predict

CONTRAST = ("encoder", "projector")


class Parts:
    """The model c(f(x)) and the projector g in their roles.

    Args:
      model: images -> logits, whose last layer is the submodule `head`.
      projection: size of z.

    Raises:
      ValueError: projection is no positive integer.
    """

    def __init__(self, model: nn.Module, *, projection: int = 128):
        checks.check_count("projection", projection)
        self._net = base.Net(model, "encoder")
        self._projector = Projector(features=projection)

    def init(self, key: Key, images: Images) -> tuple[base.Params, base.Carry]:
        """Parameters of the three roles, and the encoder's statistics."""
        k_model, k_projector = jax.random.split(key)
        params, carry = self._net.init(k_model, images)
        predict = self._net.predict(params, carry, features=True)
        h = jax.eval_shape(predict, images)[1]
        projector = jax.jit(self._projector.init)(k_projector, jnp.zeros(h.shape, h.dtype))
        encoder = dict(params["encoder"])
        head = encoder.pop("head")
        params = {"encoder": encoder, "head": head, "projector": projector["params"]}
        return params, {**carry, "head": {}, "projector": {}}

    @staticmethod
    def _joined(params: base.Params) -> base.Params:
        return {"encoder": {**params["encoder"], "head": params["head"]}}

    def predict(self, params: base.Params, carry: base.Carry, **kwargs: Any) -> Predict:
        """c(f(x)) in eval mode; keyword arguments are the model's."""
        return self._net.predict(self._joined(params), carry, **kwargs)

    def train(
        self, params: base.Params, carry: base.Carry, x: Images, **kwargs: Any
    ) -> tuple[Any, base.Carry]:
        """(logits, carry), BatchNorm in train mode."""
        return self._net.train(self._joined(params), carry, x, **kwargs)

    def embed(
        self, params: base.Params, carry: base.Carry, *views: Images, **kwargs: Any
    ) -> tuple[Array, Array, base.Carry]:
        """(z (V, B, D), logits (V, B, K), carry): one train-mode pass over all views at once."""
        x = jnp.concatenate(views)
        (logits, h), carry = self.train(params, carry, x, features=True, **kwargs)
        z = self._project(params, h)
        shape = (len(views), len(views[0]), -1)
        return z.reshape(shape), logits.reshape(shape), carry

    def _project(self, params: base.Params, h: Array) -> Any:
        return self._projector.apply({"params": params["projector"]}, h)

    def embed_eval(
        self, params: base.Params, carry: base.Carry, *views: Images, **kwargs: Any
    ) -> Array:
        """z (V, B, D) in eval mode, for attacks."""
        x = jnp.concatenate(views)
        _, h = self.predict(params, carry, features=True, **kwargs)(x)
        z = self._project(params, h)
        return z.reshape(len(views), len(views[0]), -1)


def views(dataset: str) -> base.View:
    """(key, images) -> {"image": a weak crop, "view1", "view2": two strong ones}."""
    weak, strong = (data.make_contrast_view(name, dataset) for name in ("weak", "strong"))

    def view(key: Key, images: Images) -> dict[str, Images]:
        k_image, k_1, k_2 = jax.random.split(key, 3)
        return {
            "image": weak(k_image, images),
            "view1": strong(k_1, images),
            "view2": strong(k_2, images),
        }

    return view


def check_temperature(temperature: float) -> None:
    """The contrast's temperature is positive.

    Raises:
      ValueError: it is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def contrast_phase(
    parts: Parts,
    view: base.View,
    *,
    labels: bool,
    temperature: float,
    length: float | str | None = None,
) -> base.Phase:
    """A phase of f and g on SupCon of the two strong views; without labels on NT-Xent (SimCLR).

    Args:
      parts: the model and the projector.
      view: makes the strong views (see `views`).
      labels: whether views of one class are positives, or only views of one image.
      temperature: of the contrast.
      length: of the phase.

    Raises:
      ValueError: a temperature that is not positive.
    """
    check_temperature(temperature)

    def loss(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.LossValue:
        z, _, carry = parts.embed(params, carry, batch["view1"], batch["view2"])
        value = losses.supcon(
            z,
            batch["label"] if labels else None,
            temperature=temperature,
            axis_name=base.AXIS,
        )
        return jnp.mean(value), (carry, {})

    return base.Phase("contrast", (base.Update(loss, CONTRAST),), length=length, view=view)


def head_phase(
    name: str,
    parts: Parts,
    view: base.View,
    *,
    length: float | str | None,
    lr: float,
    fresh: bool,
    attack: Attack | None = None,
    train_bn: bool = False,
    **kwargs: Any,
) -> base.Phase:
    """A phase of the head alone, by a fresh Adam on the cross-entropy of weak crops.

    Args:
      name: of the phase.
      parts: the model and the projector.
      view: makes the weak crops (see `views`).
      length: of the phase.
      lr: Adam's rate.
      fresh: whether the head begins anew too.
      attack: makes the images that the head is trained on; None: clean crops.
      train_bn: the encoder's BatchNorm uses, and its running averages follow, the batch's
        statistics; else they too stay.
      **kwargs: of the model's call (`bn_set`).
    """

    def craft(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.Batch:
        predict = parts.predict(params, carry, **kwargs)
        x = batch["image"]
        if attack is not None:
            x = attack(predict, key, batch["image"], batch["label"])
        return {**batch, "adversarial": x}

    def loss(params: base.Params, carry: base.Carry, batch: base.Batch, key: Key) -> base.LossValue:
        x = batch["adversarial"]
        if train_bn:
            logits, carry = parts.train(params, carry, x, **kwargs)
        else:
            logits = parts.predict(params, carry, **kwargs)(x)
        value = jnp.mean(losses.cross_entropy(logits, base.targets(batch, logits)))
        metric = "robust_accuracy" if attack else "accuracy"
        return value, (carry, {metric: base.accuracy(logits, batch["label"])})

    update = base.Update(loss, ("head",), craft)
    return base.Phase(
        name,
        (update,),
        length=length,
        optimizers={"head": {"name": "adam", "lr": lr}},
        view=view,
        fresh_params=("head",) if fresh else (),
        fresh_optimizers=("head",),
    )


def two_phases(
    parts: Parts,
    view: base.View,
    contrast: base.Update,
    *,
    head_epochs: float | str,
    head_lr: float,
    attack: Attack | None,
    **kwargs: Any,
) -> base.Defense:
    """The defence of a phase `contrast`, and of a phase `head` that trains a new head.

    Args:
      parts: the model and the projector.
      view: makes the views of both phases (see `views`).
      contrast: the update of the first phase.
      head_epochs: length of the phase `head`.
      head_lr: Adam's rate there.
      attack: makes the images that the head is trained on; None: clean crops.
      **kwargs: of the deployed model's call (`bn_set`).
    """

    def predict(params: base.Params, carry: base.Carry) -> Predict:
        return parts.predict(params, carry, **kwargs)

    head = head_phase(
        "head",
        parts,
        view,
        length=head_epochs,
        lr=head_lr,
        fresh=True,
        attack=attack,
        **kwargs,
    )
    phases = (base.Phase("contrast", (contrast,), view=view), head)
    return base.Defense(parts.init, phases, {"classifier": predict})
