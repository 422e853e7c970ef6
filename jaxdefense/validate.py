"""Checks of plain values: an option has the type that its function declares, and a seed 32 bits.

    check_types("train", {"batch_size": "16"}, {"batch_size": int})
    ValueError: train.batch_size must be an integer, got '16'

What a function or a dataclass declares in its annotations is checked where a config's section is
read, so a new option is checked without a further line. A declaration that is no plain type (an
array, a function) is left to the function itself.
"""

import inspect
import math
import os
import pathlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

LARGEST = 2**31 - 1  # that JAX counts with
SEEDS = 2**32  # so many different keys does jax.random.key make of an integer


def check_seed(name: str, value: Any) -> None:
    """Checks that a seed is an integer of 32 bits.

    Args:
      name: of the argument, for the message.
      value: of the argument.

    Raises:
      ValueError: otherwise: `jax.random.key` would take 2**32 for 0.

    >>> from jaxdefense import validate
    >>> validate.check_seed("seed", 2**32)
    Traceback (most recent call last):
    ValueError: seed must be an integer in [0, 4294967296), got 4294967296
    """
    if not _is_integer(value) or not 0 <= value < SEEDS:
        raise ValueError(f"{name} must be an integer in [0, {SEEDS}), got {value!r}")


def declared(function: Callable[..., Any]) -> dict[str, Any]:
    """The type that each parameter of a function, or each field of a dataclass, declares.

    Args:
      function: a function or a dataclass; parameters without an annotation are left out.

    >>> from jaxdefense import mixing, validate
    >>> validate.declared(mixing.area)["mask"] is not None
    True
    """
    hints = typing.get_type_hints(function)
    return {name: hints[name] for name in inspect.signature(function).parameters if name in hints}


def check_types(where: str, values: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Checks that values have their declared types, and that numbers are finite.

    Args:
      where: the section that they stand in, "train"; the message begins with it.
      values: by name.
      wanted: types by name, see `declared`; a name without one is not checked.

    Raises:
      ValueError: a value of another type, NaN or infinity.

    >>> from jaxdefense import validate
    >>> validate.check_types("model", {"width": float("nan")}, {"width": float})
    Traceback (most recent call last):
    ValueError: model.width must be a finite number, got nan
    """
    for name, value in values.items():
        kinds = _kinds(wanted.get(name, Any))
        if kinds and not any(_fits(value, kind) for kind in kinds):
            told = " or ".join(_NAMES[kind] for kind in kinds)
            raise ValueError(f"{where}.{name} must be {told}, got {value!r}")
        if _is_integer(value) and int in kinds and not -LARGEST <= value <= LARGEST:
            raise ValueError(f"{where}.{name} must be at most {LARGEST}, got {value!r}")


def check_positive_numbers(
    where: str, values: Mapping[str, Any], *, most: float = math.inf
) -> None:
    """Checks that the numbers among some values are larger than zero: sizes, widths, counts.

    Args:
      where: the section that they stand in, for the message.
      values: by name; what is no number is not checked.
      most: the largest that is allowed.

    Raises:
      ValueError: a number that is zero, negative or larger than that.

    >>> from jaxdefense import validate
    >>> validate.check_positive_numbers("model", {"width": 0, "stem": "cifar"})
    Traceback (most recent call last):
    ValueError: model.width must be larger than 0, got 0
    """
    for name, value in values.items():
        if _is_number(value) and not value > 0:
            raise ValueError(f"{where}.{name} must be larger than 0, got {value!r}")
        if _is_number(value) and value > most:
            raise ValueError(f"{where}.{name} must be at most {most}, got {value!r}")


def check_folder(name: str, path: str | os.PathLike) -> pathlib.Path:
    """Checks that a folder can be made at a path, or is there; nothing is written.

    Args:
      name: of the option, for the message.
      path: its value.

    Returns:
      The path.

    Raises:
      ValueError: no path, an empty one, or a file there or above it.

    >>> from jaxdefense import validate
    >>> validate.check_folder("workdir", "")
    Traceback (most recent call last):
    ValueError: workdir must be the path of a folder, got ''
    """
    if not isinstance(path, str | os.PathLike) or not str(path).strip():
        raise ValueError(f"{name} must be the path of a folder, got {path!r}")
    path = pathlib.Path(path)
    if "\0" in str(path) or any(len(os.fsencode(part)) > 255 for part in path.parts):
        raise ValueError(f"{name} holds a name that no folder can have: {str(path)[:80]!r}")
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise ValueError(f"{name} must be a folder, and {part} is a file")
    return path


def check_file(name: str, path: str | os.PathLike) -> pathlib.Path:
    """Checks that a file can be written at a path, before the work that fills it.

    Args:
      name: of the option, for the message.
      path: its value.

    Returns:
      The path.

    Raises:
      ValueError: a folder is there, or a file is above it.

    >>> from jaxdefense import validate
    >>> validate.check_file("--record", ".")
    Traceback (most recent call last):
    ValueError: --record must be a file, and . is a folder
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise ValueError(f"{name} must be a file, and {path} is a folder")
    check_folder(f"the folder of {name}", path.parent)
    return path


def describe_differences(
    one: Any, other: Any, places: tuple[str, str] = ("there", "here"), name: str = ""
) -> list[str]:
    """The dotted keys whose values differ, with both values where these are no mappings.

    Args:
      one: plain values.
      other: likewise.
      places: where the two are, for the message.
      name: of the values, as the first part of each key.

    >>> from jaxdefense import validate
    >>> validate.describe_differences({"seed": 0, "train": {"lr": 1}}, {"seed": 0, "train": {}})
    ['train.lr: 1 there, None here']
    """
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = sorted(key for key in {**one, **other} if one.get(key) != other.get(key))
        return [
            told
            for key in keys
            for told in describe_differences(
                one.get(key), other.get(key), places, f"{name}.{key}".lstrip(".")
            )
        ]
    if isinstance(one, Mapping) or isinstance(other, Mapping):
        return [name]
    return [f"{name}: {one!r} {places[0]}, {other!r} {places[1]}"]


_NAMES = {
    int: "an integer",
    float: "a finite number",
    bool: "true or false",
    str: "a text",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}
_SEQUENCES = (Sequence, list, tuple)


def _kinds(declaration: Any) -> list[type]:
    """The plain types that a declaration allows; none where it allows others too."""
    if typing.get_origin(declaration) in (typing.Union, types.UnionType):
        parts = [_kinds(part) for part in typing.get_args(declaration)]
        return list(dict.fromkeys(k for part in parts for k in part)) if all(parts) else []
    base = typing.get_origin(declaration) or declaration
    if base in _SEQUENCES:
        return [list]
    if base in (Mapping, dict):
        return [dict]
    return [base] if isinstance(base, type) and base in _NAMES else []


def _fits(value: Any, kind: type) -> bool:
    if hasattr(value, "ndim") and not isinstance(value, np.generic):
        return True  # an array, which may be traced: its function looks at it
    if kind is int:
        return _is_integer(value)
    if kind is float:
        return _is_number(value) and math.isfinite(value)
    if kind is list:
        return isinstance(value, list | tuple)
    if kind is dict:
        return isinstance(value, Mapping)
    return isinstance(value, kind)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
