"""The configs: NAME.py with DEFENSE = {row: its defence section} and get_config(variant).

recipes.py holds what they share.
"""

import importlib
import json
import pathlib
import shlex
from collections.abc import Mapping
from typing import Any

from configs import recipes
from jaxdefense import registry

_PROTOCOLS = ("configured", "autoattack", "audit")  # of experiments/evaluate.py


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


def commands(
    config: Mapping[str, Any], *, protocol: str = "configured", checkpoint: str = "best"
) -> list[str]:
    """The lines that train and evaluate a config's run, with the values that its file has not.

    Where another run lies (a teacher's workdir) is said by its folder's name alone.

    Args:
      config: plain values, of a record or a workdir.
      protocol: of experiments/evaluate.py.
      checkpoint: "best" or "last".

    Returns:
      Shell lines; none for a config that is not of these files. A value that no flag can set
      follows as a comment.
    """
    name, _, row = str(config.get("name", "")).partition("-")
    rows = set(variants(name)) if name in names() else set()
    variant = row.replace("-debug", "_debug")
    while variant and variant not in rows:  # a name that was changed: add-mnist-light
        variant = variant.rpartition("-")[0]
    if not variant:
        return []
    now = _flat(config)
    file = _flat(json.loads(load(name, variant).to_json()))
    words, comments = [], []
    for key, value in now.items():
        if key not in file:
            # As JSON where it is no plain key: a line break would end the comment.
            plain = key if key.isprintable() else json.dumps(key)
            comments.append(f"# not in the config file: {plain} = {json.dumps(value)}")
        elif file[key] != value:
            text = value if isinstance(value, str) else json.dumps(value)
            words.append(shlex.quote(f"--config.{key}={text}"))
    comments += [f"# without the config file's {key}" for key in file if key not in now]
    workdir = shlex.quote(f"runs/{config['name']}-{config.get('seed', 0)}")
    train = [f"python experiments/train.py --config={name}:{variant} --workdir={workdir}"]
    train += sorted(words)
    judge = [f"python experiments/evaluate.py --workdir={workdir} --protocol={protocol}"]
    judge += ["--checkpoint=last"] if checkpoint == "last" else []
    if protocol not in _PROTOCOLS:
        judge = [f"# judged by a script of experiments/papers, with the protocol {protocol!r}"]
    return [" ".join(train), " ".join(judge), *comments]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: plain value}; another run's absolute path is cut down to runs/NAME."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        elif key == "workdir" and pathlib.PurePath(str(value)).is_absolute():
            found[f"{prefix}{key}"] = f"runs/{pathlib.PurePath(value).name}"
        else:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found
