"""Data sets that TFDS has prepared, read without TensorFlow: array_record and TFRecord.

A prepared set is a folder NAME[/CONFIG]/VERSION below TFDS's folder, whoever prepared it, with or
without the code of its builder: features.json and dataset_info.json say what it holds.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.core import decode as tfds_decode
from tensorflow_datasets.proto import tf_example_pb2

from jaxdefense import checksums, files
from jaxdefense.data import crc32c, decoding
from jaxdefense.data.arrays import IN_MEMORY, Arrays, Encoded

_INFO = "dataset_info.json"
_FEATURES = "features.json"
_TFDS = "tensorflow_datasets."


class Features(NamedTuple):
    """What is read of each example.

    Attributes:
      image: the image's feature.
      label: the label's feature.
      shape: (H, W, C), H and W None where images differ in size.
      label_names: of the classes.
      has_id: whether there is a text "id".
      notes: what is to be said of them.
    """

    image: str
    label: str
    shape: tuple[int | None, int | None, int]
    label_names: tuple[str, ...]
    has_id: bool
    notes: tuple[str, ...]


def list_prepared(data_dir: pathlib.Path) -> list[str]:
    """The names of the sets prepared in a folder, sorted; those with configs as NAME/CONFIG.

    Args:
      data_dir: TFDS's folder.
    """
    found = {path.parent.parent for path in data_dir.glob(f"*/*/{_INFO}")}
    found |= {path.parent.parent for path in data_dir.glob(f"*/*/*/{_INFO}")}
    return sorted(str(path.relative_to(data_dir)) for path in found if path != data_dir)


def stays_below(name: str) -> bool:
    """Whether NAME[/CONFIG] is a folder below TFDS's: no absolute path, and no "..".

    Args:
      name: as a config gives it, without :VERSION.

    >>> from jaxdefense.data import prepared
    >>> prepared.stays_below("imagenette/160px-v2"), prepared.stays_below("../../etc")
    (True, False)
    """
    return not {"", ".", ".."} & set(re.split(r"[/\\]", name))


def find_folder(name: str, data_dir: pathlib.Path) -> pathlib.Path | None:
    """The folder of a prepared set in its newest version; None where there is none.

    Args:
      name: NAME, NAME/CONFIG, or either with :VERSION.
      data_dir: TFDS's folder.

    Raises:
      ValueError: NAME is prepared in several configs and none is named.
    """
    path, _, version = name.partition(":")
    base = data_dir / path
    if not stays_below(path) or not base.is_dir():
        return None
    if versions := _versions(base, version):
        return versions[-1]
    configs = [folder for folder in sorted(base.iterdir()) if _versions(folder, version)]
    if len(configs) > 1:
        known = ", ".join(f"{path}/{folder.name}" for folder in configs)
        raise ValueError(f"data set {name!r} is prepared in several configs, name one: {known}")
    return _versions(configs[0], version)[-1] if configs else None


def _versions(folder: pathlib.Path, version: str) -> list[pathlib.Path]:
    """The prepared versions in a folder, oldest first."""
    found = []
    for info in folder.glob(f"*/{_INFO}"):
        named = info.parent.name
        if re.fullmatch(r"\d+\.\d+\.\d+", named) and version in ("", named):
            found.append(info.parent)
    return sorted(found, key=lambda path: [int(part) for part in path.name.split(".")])


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """A prepared set: what it holds, and its splits as arrays.

    Attributes:
      name: as asked for.
      builder: TFDS's reader of its folder.
      features: what is read of each example.
      way_out: what to do where a file is damaged.
    """

    name: str
    builder: Any
    features: Features
    way_out: str

    @property
    def splits(self) -> list[str]:
        """The names of the splits that hold examples."""
        return [name for name, info in self.builder.info.splits.items() if info.num_examples]

    def read(
        self, split: str, *, size: tuple[int, int] | None = None, in_memory: bool | None = None
    ) -> Arrays:
        """A stored split, rows in the order of their ids.

        Args:
          split: one of `splits`.
          size: (height, width) of the images, which are resized; None for their own.
          in_memory: decode all images now, or each when it is read; None by their size.

        Raises:
          ValueError: images of several sizes and no `size`, or a damaged image.
        """
        height, width, channels = self.features.shape
        if size is None and (height is None or width is None):
            raise ValueError(
                f"{self.name} has images of several sizes: give size, e.g. size=160 (in a config "
                f"dataset.size=160)"
            )
        chosen = size or (height, width)
        count = self.builder.info.splits[split].num_examples
        if in_memory is None:
            in_memory = count * chosen[0] * chosen[1] * channels <= IN_MEMORY
        read = _decoded if in_memory else _encoded
        return read(self, split, (*chosen, channels))


def open_folder(name: str, folder: pathlib.Path) -> Prepared:
    """A prepared set of one image and one class an example.

    Args:
      name: of the set, as the user says it.
      folder: of `find_folder`.

    Raises:
      ValueError: TFDS cannot read the folder, it names code or files outside, or the set holds
        something else.
    """
    way_out = explain_repair(name, folder)
    # Of the small files that `prepare` wrote; shards hold checksums of their own.
    for listed in checksums.read_listing(folder / checksums.LISTING):
        checksums.check_file(folder / listed, folder / checksums.LISTING, way_out)
    _check_classes(name, folder / _FEATURES, way_out)
    try:
        builder = tfds.builder_from_directory(folder)
        paths = {split: info.filepaths for split, info in builder.info.splits.items()}
    except Exception as error:  # of TFDS, protobuf or a feature's own reader
        reason = checksums.shorten(error)
        raise ValueError(f"{name}: TFDS cannot read {folder} ({reason}); {way_out}") from error
    own = pathlib.Path(builder.data_path)
    for split, shards in paths.items():
        files.check_name(f"{name}: split", split)
        outside = [path for path in shards if pathlib.Path(path).parent != own]
        if outside:
            raise ValueError(f"{name}: {folder / _INFO} names a file elsewhere, {outside[0]}")
    return Prepared(name, builder, _read_features(name, builder), way_out)


def explain_repair(name: str, folder: pathlib.Path) -> str:
    """What to do about a damaged data set.

    Args:
      name: of the set, perhaps with :VERSION.
      folder: of the set in one version.
    """
    base = name.partition(":")[0]
    if base == "digits":
        return f"remove {folder}, and it is prepared anew when it is next read"
    data_dir = folder.parents[base.count("/") + 1]
    return (
        f"remove {folder}, and prepare the set again as it was, or by python "
        f"experiments/prepare_data.py --data_dir {data_dir} {base}"
    )


def _check_classes(name: str, path: pathlib.Path, way_out: str) -> None:
    """Refuses a set whose features are of other classes than TFDS's own.

    TFDS imports the module of each class that features.json names: a data set would bring code.
    """
    try:
        left = [json.loads(path.read_text(encoding="utf-8"))]
        while left:
            value = left.pop()
            if isinstance(value, str) and value.lstrip().startswith("{"):
                value = json.loads(value)  # older sets keep a feature as a text of JSON
            if isinstance(value, list):
                left += value
            if not isinstance(value, dict):
                continue
            left += value.values()
            for key in ("pythonClassName", "python_class_name", "type"):
                kind = value.get(key, "")
                if isinstance(kind, str) and "." in kind and not kind.startswith(_TFDS):
                    raise ValueError(f"it names the class {kind}, which is not one of TFDS")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: TFDS cannot read {path} ({error}); {way_out}") from error


def _read_features(name: str, builder: Any) -> Features:
    """The image and the label that a set's examples hold."""
    features = dict(builder.info.features.items())
    images = [
        key
        for key, feature in features.items()
        if isinstance(feature, tfds.features.Image)
        and not isinstance(feature, tfds.features.LabeledImage)
    ]
    labels = [
        key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)
    ]
    supervised = builder.info.supervised_keys or ()
    chosen = []
    for what, known in (("image", images), ("class label", labels)):
        preferred = [key for key in known if key in supervised]
        if len(preferred or known) != 1:
            held = ", ".join(f"{key} ({type(f).__name__})" for key, f in sorted(features.items()))
            raise ValueError(f"{name} needs one {what} in each example; it holds {held}")
        chosen += preferred or known
    image, label = chosen
    if features[image].np_dtype != np.uint8:
        raise ValueError(f"{name} has images of {features[image].np_dtype}; they must be uint8")
    height, width, channels = features[image].shape
    notes: tuple[str, ...] = ()
    if channels == 4:
        notes = ("its images have an alpha channel, which is dropped",)
    feature = features[label]
    if feature.num_classes is None:
        raise ValueError(f"{name} does not say how many classes its feature {label!r} has")
    label_names = tuple(feature.names)
    has_id = isinstance(features.get("id"), tfds.features.Text)
    shape = (height, width, 1 if channels == 1 else 3)
    return Features(image, label, shape, label_names, has_id, notes)


class _Records:
    """The examples of a split, as TFDS's tf.train.Example messages."""

    def __init__(self, prepared: Prepared, split: str) -> None:
        self._prepared, self._split = prepared, split
        self._image = prepared.features.image
        kind = prepared.builder.info.file_format.file_suffix
        if kind not in ("array_record", "tfrecord"):
            raise ValueError(
                f"{prepared.name} is prepared as {kind}; array_record and TFRecord can be read"
            )
        raw = tfds_decode.DeserializeMethod.RAW_BYTES
        try:
            if kind == "tfrecord":
                self._raw: Any = _TFRecords(prepared.builder.info.splits[split].filepaths)
            else:
                self._raw = prepared.builder.as_data_source(split, deserialize_method=raw)
                self._raw.__getitems__([0])  # the shards are opened here
        except Exception as error:  # array_record raises RuntimeError, of which not all have names
            raise self._complain(error, 0) from error

    def __len__(self) -> int:
        return len(self._raw)

    def examples(self, rows: np.ndarray) -> Iterator[Any]:
        """The feature maps of `rows`, read some hundreds at a time.

        Args:
          rows: integers.

        Raises:
          ValueError: a damaged shard; names it.
        """
        for start in range(0, len(rows), 512):
            chunk = [int(row) for row in rows[start : start + 512]]
            try:
                messages = self._raw.__getitems__(chunk)
            except Exception as error:
                raise self._complain(error, self._find_unreadable(chunk)) from error
            for message in messages:
                yield tf_example_pb2.Example.FromString(message).features.feature

    def _find_unreadable(self, rows: Iterable[int]) -> int:
        """The first row that cannot be read alone."""
        for row in rows:
            try:
                self._raw.__getitems__([row])
            except Exception:  # the error of all rows is the one that is told
                return row
        return 0

    def _complain(self, error: Exception, row: int) -> ValueError:
        """The error of a shard that cannot be read."""
        if isinstance(error, _DamagedFile):
            told = str(error)
        else:
            info = self._prepared.builder.info.splits[self._split]
            shard = int(np.searchsorted(np.cumsum(info.shard_lengths), row, side="right"))
            told = f"{info.filepaths[shard]} is damaged ({checksums.shorten(error)})"
        return ValueError(f"{self._prepared.name}: {told}; {self._prepared.way_out}")

    def read(self, rows: np.ndarray) -> Iterable[bytes]:
        """The encoded images of `rows`."""
        return (example[self._image].bytes_list.value[0] for example in self.examples(rows))

    def describe(self, row: int) -> str:
        """Where an image is."""
        return f"{self._prepared.name}: image {row} of split {self._split!r}"


class _DamagedFile(ValueError):
    """A TFRecord file that is damaged; names it."""


class _TFRecords:
    """Random access to TFRecord files, which are mapped into memory and whose index is built once.

    A record is its length (8 bytes), that length's checksum (4), its content and the content's
    checksum (4). Those of lengths are compared when the index is built, the others when a record
    is read.
    """

    def __init__(self, paths: Sequence[os.PathLike]) -> None:
        self._files = [np.memmap(path, np.uint8, "r") for path in paths if os.path.getsize(path)]
        self._places: list[tuple[int, int, int]] = []  # file, first byte, end
        for i, file in enumerate(self._files):
            position, path, lengths = 0, file.filename, []
            while position + 12 <= len(file):
                header = bytes(file[position : position + 12])
                begin, end = position + 12, position + 12 + struct.unpack("<Q", header[:8])[0]
                lengths.append((header[:8], header[8:]))
                self._places.append((i, begin, end))
                position = end + 4
            if (bad := _find_damaged(lengths)) is not None:
                begin = self._places[bad - len(lengths)][1] - 12
                raise _DamagedFile(f"{path} is damaged at byte {begin}")
            if position != len(file):
                raise _DamagedFile(f"{path} is cut short: it has {len(file)} bytes")

    def __len__(self) -> int:
        return len(self._places)

    def __getitems__(self, rows: Iterable[int]) -> list[bytes]:
        """The contents of records.

        Args:
          rows: of the records.

        Raises:
          _DamagedFile: a damaged record.
        """
        places = [self._places[row] for row in rows]
        found = [
            (bytes(self._files[i][begin:end]), bytes(self._files[i][end : end + 4]))
            for i, begin, end in places
        ]
        if (bad := _find_damaged(found)) is not None:
            i, begin, _ = places[bad]
            raise _DamagedFile(f"{self._files[i].filename} is damaged at byte {begin}")
        return [content for content, _ in found]


def _find_damaged(sums: Sequence[tuple[bytes, bytes]]) -> int | None:
    """The first of the byte strings whose checksum, beside it, is another."""
    stored = np.frombuffer(b"".join(digest for _, digest in sums), "<u4")
    differ = crc32c.masked([content for content, _ in sums]) != stored
    return int(differ.argmax()) if differ.any() else None


@functools.cache
def _encoded(prepared: Prepared, split: str, shape: tuple[int, int, int]) -> Arrays:
    """A split in the order of ids, its images left on disk."""
    records, features = _Records(prepared, split), prepared.features
    labels = np.empty(len(records), np.int32)
    ids = np.arange(len(records), dtype=np.int32)
    numbered = features.has_id
    for row, example in enumerate(records.examples(np.arange(len(records)))):
        labels[row] = example[features.label].int64_list.value[0]
        if numbered:
            number = re.search(rb"_(\d{1,9})$", example["id"].bytes_list.value[0])
            numbered = number is not None
            ids[row] = int(number[1]) if number else 0
    if numbered is False or len(np.unique(ids)) < len(ids):
        ids = np.arange(len(records), dtype=np.int32)  # no ids, or none that are numbers
    rows = np.argsort(ids, kind="stable")
    return _make_arrays(prepared, Encoded(records, rows, shape), labels[rows], ids[rows])


@functools.lru_cache(maxsize=16)
def _decoded(prepared: Prepared, split: str, shape: tuple[int, int, int]) -> Arrays:
    """A split in memory: decoding CIFAR takes seconds, so the result is kept on disk too."""
    builder = prepared.builder
    resized = "" if shape == prepared.features.shape else f"-{shape[0]}x{shape[1]}"
    path = builder.data_path.parent / f"{builder.version}-{split}{resized}.decoded.npz"
    fingerprint = _fingerprint(builder.data_path)
    cached = _read_cache(path, fingerprint)
    if cached is None:
        arrays = _encoded(prepared, split, shape)
        cached = {"images": arrays.images[:], "labels": arrays.labels, "ids": arrays.ids}
        _write_cache(path, cached | {"fingerprint": fingerprint})
    return _make_arrays(prepared, **cached)


def _make_arrays(
    prepared: Prepared, images: np.ndarray | Encoded, labels: np.ndarray, ids: np.ndarray
) -> Arrays:
    for array in (images, labels, ids):
        if isinstance(array, np.ndarray):
            array.flags.writeable = False  # shared by all who load the split
    features = prepared.features
    notes = features.notes
    if images.shape[1:3] != features.shape[:2]:
        notes = (*notes, f"its images are {decoding.RESIZE.format(*images.shape[1:3])}")
    names = features.label_names
    return Arrays(images, labels, ids, len(names), prepared.name, names, notes)


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
