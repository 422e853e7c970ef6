"""Image data sets through TFDS, read without TensorFlow and decoded once.

    train = load("cifar10", "train")  # 49,000 examples
    held_out = load("cifar10", "validation")  # the other 1,000 of the training set
    test = load("cifar10", "test")

Rows are in the order of their ids. Where TFDS stores an id (digits, CIFAR: `test_00042`), that is
the row in the original files, so `test.take(slice(1000))` is what a paper calls the first 1,000
test images; elsewhere (MNIST, Fashion-MNIST) it is the row in TFDS's stored order.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import os
import pathlib
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image

from jaxdefense import registry
from jaxdefense.data import order, prepare

SPLITS = ("train", "validation", "test")

# The share of the training set held out unless said; 2 % of digits would be 26 images.
_VALIDATION = {
    "digits": 0.1,
    "mnist": 0.02,
    "fashion_mnist": 0.02,
    "cifar10": 0.02,
    "cifar100": 0.02,
}


class Encoded:
    """Images on disk: read like an (N, H, W, C) uint8 array, each decoded when asked for.

    Args:
      records: a TFDS data source whose images are still encoded.
      rows: (N,) integers, where in `records` each image is.
      shape: (H, W, C).
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, records: Any, rows: np.ndarray, shape: tuple[int, int, int]) -> None:
        self._records = records
        self._rows = rows
        self.shape = (len(rows), *shape)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        """The decoded images of `rows`: (n, H, W, C) uint8."""
        positions = self._rows[rows]
        images = np.empty((len(positions), *self.shape[1:]), np.uint8)
        for image, record in zip(images, _read(self._records, positions)):
            pixels = np.asarray(Image.open(io.BytesIO(record["image"])))
            image[:] = pixels.reshape(self.shape[1:])
        return images

    def take(self, rows: np.ndarray, axis: int = 0) -> "Encoded":
        """The chosen rows, still encoded.

        Args:
          rows: integers.
          axis: 0; it is here because NumPy's `take` has it.
        """
        del axis
        return Encoded(self._records, self._rows[rows], self.shape[1:])


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
    """A split of a data set.

    Attributes:
      images: (N, H, W, C) uint8, in memory or on disk.
      labels: (N,) int32, each in [0, num_classes).
      ids: (N,) int32, one per example of the TFDS split that the rows come from.
      num_classes: K.
      name: the data set's.
      label_names: K names.

    Raises:
      ValueError: another shape or dtype, or a label out of range.
    """

    images: np.ndarray | Encoded
    labels: np.ndarray
    ids: np.ndarray
    num_classes: int
    name: str
    label_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            got = f"{self.images.dtype} {self.images.shape}"
            raise ValueError(f"{self.name}: images must be uint8 (N, H, W, C), got {got}")
        for what, rows in (("labels", self.labels), ("ids", self.ids)):
            if rows.dtype != np.int32 or rows.shape != self.images.shape[:1]:
                got = f"{rows.dtype} {rows.shape} for {len(self.images)} images"
                raise ValueError(f"{self.name}: {what} must be int32 (N,), got {got}")
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < self.num_classes:
            got = f"{self.labels.min()}..{self.labels.max()}"
            raise ValueError(f"{self.name}: labels must be in [0, {self.num_classes}), got {got}")
        if len(self.label_names) != self.num_classes:
            names = len(self.label_names)
            raise ValueError(f"{self.name}: {names} label names for {self.num_classes} classes")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: slice | np.ndarray | Sequence[int]) -> "Arrays":
        """The chosen rows, in their order.

        Args:
          rows: a slice or integers.
        """
        rows = np.arange(len(self))[rows]
        return dataclasses.replace(
            self, images=self.images.take(rows, 0), labels=self.labels[rows], ids=self.ids[rows]
        )


def names() -> list[str]:
    """The data sets that `load` knows, sorted."""
    return sorted(_VALIDATION)


def load(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike | None = None,
    validation: int | float | None = None,
    seed: int = 0,
    in_memory: bool = True,
) -> Arrays:
    """A split of a prepared data set; `digits` is prepared on the way.

    Args:
      name: one of `names()`.
      split: 'train', 'validation' or 'test'. TFDS slices cannot be seeded, so `validation` is a
        seeded stratified choice of rows of TFDS's `train`, and 'train' is all its other rows.
      data_dir: TFDS's folder; default $TFDS_DATA_DIR or ~/tensorflow_datasets.
      validation: how much of the training set to hold out, a number of examples (int) or a
        fraction (float); default 2 %, for digits 10 %.
      seed: of the validation split.
      in_memory: decode all images now (kept in this process, and beside the data set for the
        next), or each when it is read.

    Returns:
      The split, rows in the order of their ids; its arrays are read-only.

    Raises:
      ValueError: unknown name or split, a data set that is not prepared, or a validation split
        that is empty or leaves nothing to train on.
    """
    if split not in SPLITS:
        registry.raise_unknown("split", split, SPLITS)
    builder = _builder(name, prepare.default_data_dir(data_dir))
    read = _decoded if in_memory else _encoded
    arrays = read(builder, "test" if split == "test" else "train")
    if split == "test":
        return arrays
    validation = _VALIDATION[name] if validation is None else validation
    count = round(validation * len(arrays)) if isinstance(validation, float) else validation
    if not (count == 0 and split == "train") and not 0 < count < len(arrays):
        raise ValueError(
            f"{name}: validation={validation} holds out {count} of {len(arrays)} training examples"
        )
    held_out = order.stratified(arrays.labels, count, seed)
    if split == "validation":
        return arrays.take(held_out)
    return arrays.take(np.setdiff1d(np.arange(len(arrays)), held_out))


@functools.cache
def _builder(name: str, data_dir: pathlib.Path) -> tfds.core.DatasetBuilder:
    """The builder of a data set that is prepared in `data_dir`; builders of others raise."""
    if name not in _VALIDATION:
        registry.raise_unknown("data set", name, names())
    if name == "digits":
        prepare.prepare_digits(data_dir)
        return prepare.Digits(data_dir=data_dir, file_format=prepare.FORMAT)
    if not prepare.is_prepared(name, data_dir):
        raise ValueError(
            f"{name} is not prepared in {data_dir}; prepare it from its original files: "
            f"python experiments/prepare_data.py --from DIR --data_dir {data_dir} {name}"
        )
    return tfds.builder(name, data_dir=data_dir, file_format=prepare.FORMAT)


@functools.cache
def _encoded(builder: tfds.core.DatasetBuilder, split: str) -> Arrays:
    """A TFDS split in the order of ids, its images left on disk."""
    # Images stay encoded, so that Pillow and not whatever TFDS finds decodes them.
    decoders = {"image": tfds.decode.SkipDecoding()}
    records = builder.as_data_source(split, decoders=decoders)
    labels = np.empty(len(records), np.int32)
    ids = np.arange(len(records), dtype=np.int32)
    for row, record in enumerate(_read(records, ids)):
        labels[row] = record["label"]
        if "id" in record:
            ids[row] = int(record["id"].rsplit(b"_", 1)[1])
    rows = np.argsort(ids, kind="stable")
    return _arrays(
        builder,
        Encoded(records, rows, builder.info.features["image"].shape),
        labels[rows],
        ids[rows],
    )


@functools.cache
def _decoded(builder: tfds.core.DatasetBuilder, split: str) -> Arrays:
    """A TFDS split in memory: decoding CIFAR takes seconds, so the result is kept on disk too."""
    path = builder.data_path.parent / f"{builder.version}-{split}.decoded.npz"
    fingerprint = _fingerprint(builder.data_path)
    cached = _read_cache(path, fingerprint)
    if cached is None:
        arrays = _encoded(builder, split)
        cached = {"images": arrays.images[:], "labels": arrays.labels, "ids": arrays.ids}
        _write_cache(path, cached | {"fingerprint": fingerprint})
    return _arrays(builder, **cached)


def _arrays(
    builder: tfds.core.DatasetBuilder,
    images: np.ndarray | Encoded,
    labels: np.ndarray,
    ids: np.ndarray,
) -> Arrays:
    for array in (images, labels, ids):
        if isinstance(array, np.ndarray):
            array.flags.writeable = False  # shared by all who load the split
    feature = builder.info.features["label"]
    label_names = tuple(feature.names)
    return Arrays(images, labels, ids, feature.num_classes, builder.name, label_names)


def _read(records: Any, rows: np.ndarray) -> Iterable[dict[str, Any]]:
    """The records of `rows`, in order, read some hundreds at a time."""
    for start in range(0, len(rows), 512):
        yield from records.__getitems__([int(row) for row in rows[start : start + 512]])


def _fingerprint(folder: pathlib.Path) -> np.ndarray:
    """What changes whenever a prepared data set does: its files' names, sizes and times."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        stat = os.stat(path)
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return np.frombuffer(digest.digest(), np.uint8)


def _read_cache(path: pathlib.Path, fingerprint: np.ndarray) -> dict[str, np.ndarray] | None:
    """The decoded arrays, or None where they are absent, damaged or of another preparation."""
    try:
        # zip checks the CRC-32 of every array that is read.
        with open(path, "rb") as raw, np.load(raw) as file:
            if not np.array_equal(file["fingerprint"], fingerprint):
                return None
            return {name: file[name] for name in ("images", "labels", "ids")}
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def _write_cache(path: pathlib.Path, arrays: dict[str, Any]) -> None:
    """Writes a temporary file and renames it; where that fails, the next process decodes again."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except OSError as error:  # a folder that is read-only, or a disk that is full
        logging.info("no decoded copy of the images is kept in %s: %s", path, error)
        with contextlib.suppress(OSError):
            temporary.unlink()
