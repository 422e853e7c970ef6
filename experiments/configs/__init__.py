"""The configs: NAME.py with get_config(variant); recipes.py holds what they share."""

import importlib
import pathlib

from jaxdefense import registry


def names() -> list[str]:
    """The configs' names."""
    here = pathlib.Path(__file__).parent
    return sorted(p.stem for p in here.glob("*.py") if p.stem not in ("__init__", "recipes"))


def load(name: str, variant: str):
    """The locked config NAME:VARIANT.

    Raises:
      ValueError: unknown name or variant; the nearest are named.
    """
    if name not in names():
        registry.unknown("config", name, names())
    return importlib.import_module(f"configs.{name}").get_config(variant)
