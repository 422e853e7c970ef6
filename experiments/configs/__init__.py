"""The configs: NAME.py with DEFENSE = {row: its defence section} and get_config(variant).

recipes.py holds what they share.
"""

import importlib
import pathlib

from configs import recipes
from jaxdefense import registry


def names() -> list[str]:
    """The configs' names."""
    here = pathlib.Path(__file__).parent
    return sorted(p.stem for p in here.glob("*.py") if p.stem not in ("__init__", "recipes"))


def _module(name: str):
    if name not in names():
        registry.raise_unknown("config", name, names())
    return importlib.import_module(f"configs.{name}")


def variants(name: str) -> list[str]:
    """The variants of a config: its rows, each also with _debug.

    Raises:
      ValueError: unknown name.
    """
    return recipes.variants(_module(name).DEFENSE)


def load(name: str, variant: str):
    """The locked config NAME:VARIANT.

    Raises:
      ValueError: unknown name or variant; the nearest are named.
    """
    return _module(name).get_config(variant)
