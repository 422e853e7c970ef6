"""Files are written whole or not at all: under a temporary name, then renamed."""

import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import IO, Any

import numpy as np


def check_name(what: str, name: object) -> None:
    """A name that becomes a file's stays in the folder that the file is written to.

    Args:
      what: is named, for the error: "attack", "the config's name".
      name: from a config, a record or a caller.

    Raises:
      ValueError: no text, an empty one, "." or "..", or one with a slash, backslash or NUL.

    >>> from jaxdefense import files
    >>> files.check_name("attack", "pgd40")
    >>> files.check_name("attack", "../pgd40")
    Traceback (most recent call last):
    ValueError: attack '../pgd40' cannot name a file: give one without slashes
    """
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise ValueError(f"{what} {name!r} cannot name a file: give one without slashes")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file and the folders above it.

    Args:
      path: of the file; one that is there is replaced.
      text: all of it.
    """
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes a binary file and the folders above it.

    Args:
      path: of the file; one that is there is replaced.
      data: all of it.
    """
    _write(pathlib.Path(path), lambda file: file.write(data))


def write_arrays(path: str | os.PathLike, **arrays: Any) -> None:
    """Writes a NumPy archive and the folders above it.

    Args:
      path: of the file, ending in .npz; one that is there is replaced.
      **arrays: by name.
    """
    _write(pathlib.Path(path), lambda file: np.savez(file, **arrays))


def _write(path: pathlib.Path, fill: Callable[[IO[bytes]], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, delete=False, suffix=".tmp") as file:
        part = pathlib.Path(file.name)
    try:
        with part.open("wb") as file:
            fill(file)
        part.chmod(0o644)
        os.replace(part, path)
    except BaseException:  # Ctrl-C too: no half of a file stays
        part.unlink(missing_ok=True)
        raise
