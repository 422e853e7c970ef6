"""Classifiers as Flax modules: a file's name is its registry key.

Every file holds a module class and `make(num_classes, **kwargs)`; every module answers

    apply(variables, x, *, train=False, features=False) -> logits or (logits, features)

with x (B, H, W, C) floats in [0, 1], logits (B, K) float32 and features (B, D) float32, the input
of the last linear layer. Normalisation by `mean` and `std` happens inside, so an attack's eps is
always in image units. The last linear layer is the submodule `head`: `params["head"]` is the head,
every other entry of `params` the encoder.
"""

import sys
from typing import Any

import flax.linen as nn

from jaxdefense import registry
from jaxdefense.models.conv import conv, explicit_gradients

__all__ = ["conv", "explicit_gradients", "make", "names"]


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
    return registry.load(sys.modules[__name__], name, "model").make(num_classes, **kwargs)
