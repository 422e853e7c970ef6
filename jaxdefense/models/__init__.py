"""Classifiers and generators as Flax modules: a file's name is its registry key.

Every classifier's file holds a module class and `make(num_classes, **kwargs)`; every module answers

    apply(variables, x, *, train=False, features=False) -> logits or (logits, features)

with x (B, H, W, C) floats in [0, 1], logits (B, K) float32 and features (B, D) float32, the input
of the last linear layer. Normalisation by `mean` and `std` happens inside, so an attack's eps is
always in image units. The last linear layer is the submodule `head`: `params["head"]` is the head,
every other entry of `params` the encoder.

A generator turns images into images. Its file defines `make_generator(channels, **kwargs)` instead
(so that the two kinds never mix), and its module answers

    apply(variables, x, *, train=False, ...) -> (B, H, W, channels) float32

with the height and width of x. Without further arguments it is deterministic; what it draws
(a latent code, a mask) it draws from a `key` given to the call.

Weights: `zoo` saves and loads them without pickle and holds those that come with the package;
`torch` reads PyTorch's state dicts into the networks here, `torch_bridge` turns any other PyTorch
module into a JAX function.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from jaxdefense import extras, registry
from jaxdefense.conv import conv, explicit_gradients
from jaxdefense.models.torch import from_torch
from jaxdefense.models.zoo import Loaded, load, load_pretrained, pretrained, save

if TYPE_CHECKING:
    import flax.linen as nn

__all__ = [
    "Loaded",
    "conv",
    "explicit_gradients",
    "from_torch",
    "generator",
    "generators",
    "load",
    "load_pretrained",
    "make",
    "names",
    "pretrained",
    "save",
]


def names() -> list[str]:
    """The registered models: the files of this package that define `make`, sorted."""
    return registry.names(sys.modules[__name__])


def make(name: str, num_classes: int, **kwargs: Any) -> nn.Module:
    """The model called `name`.

    Args:
      name: one of `names()`.
      num_classes: K, at least 2.
      **kwargs: fields of that model's module: `width`, `dtype`, `mean`, `std`, ...

    Returns:
      An unbound Flax module.

    Raises:
      ValueError: unknown name (the nearest is named), fewer than two classes, or an unknown field
        (the allowed ones are listed).
    """
    with extras.required("train", __name__):
        module = registry.load(sys.modules[__name__], name, "model")
    return module.make(num_classes, **kwargs)


def generators() -> list[str]:
    """The registered generators: the files of this package that define `make_generator`, sorted."""
    return registry.names(sys.modules[__name__], needs="make_generator")


def generator(name: str, channels: int, **kwargs: Any) -> nn.Module:
    """The generator called `name`.

    Args:
      name: one of `generators()`.
      channels: of the images it returns, 1 or 3 for all data sets here.
      **kwargs: fields of that generator's module.

    Returns:
      An unbound Flax module.

    Raises:
      ValueError: unknown name (the nearest is named), no channels, or an unknown field (the
        allowed ones are listed).
    """
    with extras.required("train", __name__):
        module = registry.load(sys.modules[__name__], name, "generator", needs="make_generator")
    return module.make_generator(channels, **kwargs)
