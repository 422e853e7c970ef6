"""Damage to files: the kinds that disks and killed processes make, for tests and soak runs.

rng = random.Random(0)
path = rng.choice(files_in("runs/trades-mnist"))
print(damage(path, rng.choice(KINDS), rng))  # runs/.../config.json: bit 3 of byte 17 flipped
"""

import os
import pathlib
import random
from collections.abc import Callable


def _flip(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    at, bit = rng.randrange(len(content)), rng.randrange(8)
    changed = bytearray(content)
    changed[at] ^= 1 << bit
    return bytes(changed), f"bit {bit} of byte {at} flipped"


def _zero(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A block that a file system allocated and never wrote."""
    begin = rng.randrange(len(content))
    end = min(len(content), begin + rng.randint(1, 512))
    return content[:begin] + bytes(end - begin) + content[end:], f"NUL from {begin} to {end}"


def _truncate(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    end = rng.randrange(len(content))
    return content[:end], f"cut to {end} of {len(content)} bytes"


def _empty(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    del content, rng
    return b"", "emptied"


_CHANGES: dict[str, Callable[[bytes, random.Random], tuple[bytes, str]]] = {
    "flip": _flip,
    "zero": _zero,
    "truncate": _truncate,
    "empty": _empty,
}
KINDS = (*_CHANGES, "delete")


def files_in(folder: str | os.PathLike) -> list[pathlib.Path]:
    """The files below a folder that hold anything, sorted.

    Args:
      folder: searched at any depth.
    """
    found = sorted(pathlib.Path(folder).rglob("*"))
    return [path for path in found if path.is_file() and path.stat().st_size]


def damage(path: pathlib.Path, kind: str, rng: random.Random) -> str:
    """Damages one file in place, its time of change kept as a failing disk keeps it.

    Args:
      path: of a file that is not empty.
      kind: one of `KINDS`.
      rng: chooses the place.

    Returns:
      What was done, for a message.

    Raises:
      KeyError: an unknown kind.
    """
    if kind == "delete":
        path.unlink()
        return f"{path}: deleted"
    before = path.stat()
    content, told = _CHANGES[kind](path.read_bytes(), rng)
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return f"{path}: {told}"
