"""Defences: one file each; `make(name, model, threat, **options)` builds one.

A new defence is one file here with a `make(model, threat, *, ...) -> Defense` and one config in
experiments/configs; nothing else is edited.
"""

import inspect
import sys
from collections.abc import Mapping
from typing import Any

from jaxdefense import extras, registry
from jaxdefense import validate as _validate
from jaxdefense.types import Threat

with extras.required("train", __name__):
    import flax.linen as nn

    from jaxdefense.defenses import transforms as _transforms
    from jaxdefense.defenses.base import AXIS, Defense, Net, Phase, Update

__all__ = ["AXIS", "Defense", "Net", "Phase", "Update", "make", "names"]


def names() -> list[str]:
    """The registered defences: the files of this package that define `make`, sorted."""
    return registry.names(sys.modules[__name__])


def make(
    name: str,
    model: nn.Module,
    threat: Threat,
    *,
    transforms: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> Defense:
    """The defence of a config.

    Args:
      name: one of `names()`.
      model: the classifier.
      threat: what it is defended against.
      transforms: {transform: options}, applied in alphabetical order, `stacked` last, e.g.
        `{"ema": {"decay": 0.9995}, "weight_perturbation": {"gamma": 5e-3}}`.
      **options: keyword arguments of that defence's `make`.

    Raises:
      ValueError: unknown defence, option or transform.
    """
    factory = registry.load(sys.modules[__name__], name, "defense").make
    known = list(inspect.signature(factory).parameters)[2:]
    registry.check_known(f"option of defense {name}", options, [*known, "transforms"])
    _validate.check_types("defense", options, _validate.declared(factory))
    _validate.check_types("defense", {"transforms": transforms}, _validate.declared(make))
    sections = dict.fromkeys(transforms or {}, Mapping)
    _validate.check_types("defense.transforms", transforms or {}, sections)
    defense = factory(model, threat, **options)
    chosen = sorted((transforms or {}).items(), key=lambda item: (item[0] == "stacked", item[0]))
    for transform, arguments in chosen:
        defense = _transforms.apply(defense, transform, **arguments)
    return defense
