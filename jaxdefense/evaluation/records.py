"""Records: what was measured, of what, with what, in one JSON file that tables and plots read.

    {"format": 1, "name": "trades-mnist", "config": {...}, "seed": 0, "dataset": {...},
     "results": {predictor: {attack: {"accuracy", "per_class", "per_class_n", "n", "bits"}}},
     "training": {...}, "reported": {...}, "versions": {...}, "device": {...},
     "git": "...", "date": "...", "seconds": ...}

Optional keys describe the measurement: "attacks": {attack: how it was built}, "threat": {"norm",
"eps", "note"} where the attacks were allowed something else than the config's threat, "parameters":
{predictor: how many numbers it computes with, without BatchNorm's statistics}, "command": [lines
that train and evaluate it], and "examples": a few images that the hardest attack fooled. "training"
may hold "validation": [[epoch, clean, robust]], percent, "warnings": [{"step", "epoch", "name",
"evidence"}] of the run, its "steps" in all, the "step" that was judged with the "seconds" until it,
and the most "memory" till then: bytes of one accelerator, or on a CPU of the whole process.
Bits are one per example in the order of the test set, base64 of NumPy's packbits.
"""

import base64
import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxdefense import checksums, files, validate

FORMAT = 1
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy")

Record = dict[str, Any]


def pack_bits(bits: np.ndarray) -> str:
    """Booleans as text.

    Args:
      bits: (N,) bool.
    """
    return base64.b64encode(np.packbits(bits).tobytes()).decode()


def unpack_bits(text: str, n: int) -> np.ndarray:
    """The booleans of `pack_bits`.

    Args:
      text: of `pack_bits`.
      n: how many they are.

    >>> import numpy as np
    >>> from jaxdefense.evaluation import records
    >>> records.unpack_bits(records.pack_bits(np.array([True, False, True])), 3).tolist()
    [True, False, True]
    """
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=n).astype(bool)


def pack_images(images: np.ndarray) -> Record:
    """Images as compressed text, rounded to steps of 1/255: to be looked at and no more.

    Args:
      images: (N, H, W, C) in [0, 1].
    """
    pixels = np.rint(255 * np.clip(images, 0, 1)).astype(np.uint8)
    return {
        "shape": list(pixels.shape),
        "pixels": base64.b64encode(zlib.compress(pixels.tobytes(), 9)).decode(),
    }


def unpack_images(packed: Mapping[str, Any]) -> np.ndarray:
    """The images (N, H, W, C) of `pack_images`, float32.

    Args:
      packed: of `pack_images`.
    """
    pixels = np.frombuffer(zlib.decompress(base64.b64decode(packed["pixels"])), np.uint8)
    return pixels.reshape(packed["shape"]).astype(np.float32) / 255


def environment() -> Record:
    """Versions, device, git revision and date of this process."""
    devices = jax.local_devices()
    return {
        "versions": {
            "python": platform.python_version(),
            **_versions(),
        },
        "device": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": jax.device_count(),
            "host": f"{platform.machine()}, {os.cpu_count()} cores",
        },
        "git": _git_revision(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _versions() -> dict[str, str]:
    """The versions of those packages that are installed: the plain install lacks some."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _git_revision() -> str:
    """The revision of the checkout this file lies in, "-dirty" with uncommitted changes."""
    folder = pathlib.Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def make(
    name: str,
    config: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
    *,
    seed: int,
    seconds: float,
    **more: Any,
) -> Record:
    """A record of an evaluation in this process, with its versions, device and date.

    Args:
      name: the row's name in tables, one per configuration.
      config: plain values.
      results: {predictor: {attack: {"accuracy", "per_class", "n", "bits"}}}, percent.
      seed: of the run.
      seconds: wall time of the evaluation.
      **more: further plain values ("training", "reported", "flags", ...).

    >>> from jaxdefense.evaluation import records
    >>> record = records.make("trades-mnist", {"seed": 0}, {"main": {}}, seed=0, seconds=1.5)
    >>> record["name"], record["format"], "jax" in record["versions"]
    ('trades-mnist', 1, True)
    """
    return {
        "format": FORMAT,
        "name": name,
        "config": dict(config),
        "seed": seed,
        "results": results,
        "seconds": seconds,
        **more,
        **environment(),
    }


def save(record: Record, path: str | os.PathLike) -> None:
    """Writes a record with its checksum, whole or not at all.

    Args:
      record: plain values of `make`.
      path: of the JSON file; its folder is made.

    >>> import tempfile
    >>> from jaxdefense.evaluation import records
    >>> record = records.make("trades-mnist", {}, {"main": {}}, seed=0, seconds=1.5)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     records.save(record, f"{folder}/trades.json")
    ...     records.load(f"{folder}/trades.json") == record
    True
    """
    files.write_text(path, json.dumps(checksums.seal(record), indent=1) + "\n")


# Older records' names of the protocols.
_RENAMED = {"paper": "configured", "honest": "autoattack"}


# Types of what tables and reports read of a record, whatever else stands there.
_TEXTS = ("name", "protocol", "git", "date")
_MAPPINGS = (
    *("results", "config", "training", "reported", "attacks", "cascade", "audit", "dataset"),
    *("parameters", "versions", "device"),
)
_ENTRIES = {**dict.fromkeys(_TEXTS, str), **dict.fromkeys(_MAPPINGS, Mapping), "seconds": float}


def _check_entries(record: Record) -> None:
    """Refuses a record whose entries are of other types than those that `make` writes.

    Raises:
      ValueError: names the entry.
    """
    validate.check_types("record", record, _ENTRIES)
    results = record["results"]
    validate.check_types("results", results, dict.fromkeys(results, Mapping))
    for predictor, attacks in results.items():
        validate.check_types(f"results.{predictor}", attacks, dict.fromkeys(attacks, Mapping))


def load(path: str | os.PathLike) -> Record:
    """Reads a record; see `save` for an example.

    Args:
      path: of the JSON file.

    Raises:
      ValueError: not a record, one of another format, or one that is damaged or was edited.
    """
    try:
        sealed = checksums.read_object(pathlib.Path(path))
    except ValueError as error:
        raise ValueError(f"{path} is not a record: {error}; evaluate again") from error
    if sealed.get("format") != FORMAT:
        raise ValueError(f"{path} is not a record of format {FORMAT}")
    try:
        record = checksums.unseal(sealed)
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged or was edited: {error}; evaluate again, or, if it was you who "
            f'edited it, remove its "sha256"'
        ) from error
    if lacking := [key for key in ("name", "seed", "results") if key not in record]:
        raise ValueError(f"{path} is damaged: it has no {', no '.join(lacking)}; evaluate again")
    try:
        _check_entries(record)
    except ValueError as error:
        raise ValueError(f"{path} is damaged or was edited: {error}; evaluate again") from error
    if (protocol := record.get("protocol")) in _RENAMED:
        record["protocol"] = _RENAMED[protocol]
    return record


def load_all(paths: Iterable[str | os.PathLike]) -> list[Record]:
    """The records of files and folders, in the order of their paths.

    A folder gives every *.json below it that says it is a record; other JSON files are skipped.

    Args:
      paths: files and folders.

    Raises:
      ValueError: a path that does not exist, or a file that is no record.
    """
    chosen = []
    for path in map(pathlib.Path, paths):
        if not path.exists():
            raise ValueError(f"no such file or folder: {path}")
        if path.is_dir():
            chosen += [p for p in sorted(path.rglob("*.json")) if b'"format"' in p.read_bytes()]
        else:
            chosen.append(path)
    return [load(path) for path in chosen]
