"""SHA-256 of arrays, of plain values and of files: a damaged one is found when it is read.

Plain values carry their checksum under the key "sha256" (`seal`, `unseal`); files have theirs in a
listing beside them, in the form of the command sha256sum (`list_files`, `check_file`).
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

KEY = "sha256"


LISTING = "SHA256SUMS"  # the usual name of a folder's listing


def describe_array(array: np.ndarray) -> str:
    """An array's dtype, shape and SHA-256, as text.

    Args:
      array: any.

    >>> import numpy as np
    >>> from jaxdefense import checksums
    >>> checksums.describe_array(np.zeros((2, 3), np.float32))[:22]
    'float32 (2, 3) 9d908ec'
    """
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return f"{array.dtype} {array.shape} {digest}"


def hash_plain(value: Any) -> str:
    """The SHA-256 of plain values, whatever the order of their keys.

    Args:
      value: what JSON can hold.
    """
    plain = json.loads(json.dumps(value))  # keys as texts, before they are sorted
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values with their checksum under "sha256".

    Args:
      content: what JSON can hold, without such a key.

    >>> from jaxdefense import checksums
    >>> checksums.unseal(checksums.seal({"seed": 0}))
    {'seed': 0}
    """
    return {**content, KEY: hash_plain(content)}


def unseal(content: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `seal` without their checksum; values without one are returned as they are.

    Args:
      content: as read from a file.

    Raises:
      ValueError: the values are not those that were sealed.
    """
    rest = {key: value for key, value in content.items() if key != KEY}
    if KEY in content and content[KEY] != hash_plain(rest):
        raise ValueError("its checksum differs")
    return rest


def list_files(paths: Iterable[pathlib.Path]) -> str:
    """The listing of files, "SHA-256  NAME" on each line; `sha256sum -c` reads it too.

    Args:
      paths: of the files.
    """
    return "".join(f"{hash_file(path)}  {path.name}\n" for path in paths)


def list_text(name: str, text: str) -> str:
    """The listing of one file that is yet to be written.

    Args:
      name: of the file.
      text: its content.
    """
    return f"{hashlib.sha256(text.encode()).hexdigest()}  {name}\n"


def read_listing(listing: pathlib.Path) -> dict[str, str]:
    """{name: SHA-256} of a listing; none of one that is not there.

    Args:
      listing: of `list_files`.
    """
    text = listing.read_bytes().decode(errors="replace") if listing.exists() else ""
    return {
        name: digest
        for digest, _, name in (line.partition("  ") for line in text.split("\n"))
        if name
    }


def check_file(path: pathlib.Path, listing: pathlib.Path, way_out: str) -> None:
    """Refuses a file that is not what its listing says; one without a listing passes.

    Args:
      path: of the file.
      listing: of `list_files`.
      way_out: what the user can do, for the message.

    Raises:
      ValueError: another checksum, or none in the listing.
    """
    if not listing.exists():
        return
    if not path.is_file():
        raise ValueError(f"{path} is missing, and {listing.name} lists it; {way_out}")
    if read_listing(listing).get(path.name) != hash_file(path):
        raise ValueError(
            f"{path} is damaged or was edited: its SHA-256 is not the one in {listing.name}; "
            f"{way_out}"
        )


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
      path: of the file.

    Raises:
      ValueError: it cannot be read, or holds something else; in a few words, without the path.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(error.strerror or type(error).__name__) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content


def shorten(error: Exception) -> str:
    """The first line of an error, at most 120 characters: some readers tell of all their layers.

    Args:
      error: any.
    """
    line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {line[:120]}"


def hash_file(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's bytes.

    Args:
      path: of the file.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
