"""The file config.json of a workdir: what the run is, beside its SHA-256 in config.json.sha256.

A damaged value is still a value: without the checksum, a flipped bit in eps would be evaluated.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxdefense import checksums, files

NAME = "config.json"
LISTING = f"{NAME}.sha256"


def write(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Writes a run's config, each file whole or not at all.

    Args:
      workdir: of the run.
      config: plain values.
    """
    text = json.dumps(config, indent=1, sort_keys=True) + "\n"
    # The checksum first: a config that is there has one, whenever the process is killed.
    files.write_text(workdir / LISTING, checksums.list_text(NAME, text))
    files.write_text(workdir / NAME, text)


def read(workdir: pathlib.Path) -> dict[str, Any]:
    """A run's config.

    Args:
      workdir: of the run.

    Raises:
      ValueError: no such file, or one that is damaged or was edited; says the way out.
    """
    path = workdir / NAME
    if not path.exists() and (workdir / "last").is_dir():
        raise ValueError(f"{path} is gone: train.py with the run's own --config writes it again")
    if not path.exists():
        raise ValueError(f"{workdir} holds no run: there is no {NAME}")
    again = f"remove {path} and train.py with the run's own --config writes it again"
    try:
        config = checksums.read_object(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {again}") from error
    checksums.check_file(
        path, workdir / LISTING, f"{again}; or remove {LISTING} if it was you who edited it"
    )
    return config


def check_places(workdir: pathlib.Path) -> None:
    """Checks that no folder lies where a run has a file, and no file where it has a folder.

    Args:
      workdir: of the run; it need not be there.

    Raises:
      ValueError: otherwise; names what to remove.
    """
    for name in ("metrics.jsonl", NAME, LISTING):
        path = workdir / name
        if path.is_dir():
            raise ValueError(f"{path} is a folder, where a run has a file: remove it")
        if path.is_symlink() and not path.exists():
            raise ValueError(f"{path} is a link to nothing: remove it")
    for name in ("last", "best"):
        path = workdir / name
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is no folder of checkpoints: remove it")
