"""Prepares data sets for TFDS without TensorFlow, a network, or pickle.

`digits` is our own builder over scikit-learn's bundled scans. The others are TFDS's standard
builders fed with the original distribution files, checked against their published MD5 sums; what
they write is what plain `tfds.builder(name, file_format='array_record')` expects to find.
"""

import contextlib
import gzip
import hashlib
import io
import os
import pathlib
import tempfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from jaxdefense import registry
from jaxdefense.data import order

FORMAT = "array_record"

# The published MD5 sums; those of the IDX files are of their uncompressed content.
_IDX = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
_FILES = {
    "mnist": dict(
        zip(
            _IDX,
            (
                "6bbc9ace898e44ae57da46a324031adb",
                "a25bea736e30d166cdddb491f175f624",
                "2646ac647ad5339dbf082846283269ea",
                "27ae3e4e09519cfbb04c329615203637",
            ),
        )
    ),
    "fashion_mnist": dict(
        zip(
            _IDX,
            (
                "f4a8712d7a061bf5bd6d2ca38dc4d50a",
                "9018921c3c673c538a1fc5bad174d6f9",
                "8181f5470baa50b63fa0f6fddb340f0a",
                "15d484375f8d13e6eb1aabb0c3f46965",
            ),
        )
    ),
    "cifar10": {
        "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
        "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
        "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
        "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
        "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
        "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
    },
    "cifar100": {
        "train.bin": "6172c7755cfe09b2fe270c85cebc1b15",
        "test.bin": "4499cfba6c016c1be1438163640a0898",
    },
}
_FOLDERS = {
    "mnist": "mnist",
    "fashion_mnist": "fashion_mnist",
    "cifar10": "cifar-10-batches-bin",
    "cifar100": "cifar-100-binary",
}
_CLASS_NAMES = {
    "cifar10": {"label": ("batches.meta.txt", 10)},
    "cifar100": {
        "label": ("fine_label_names.txt", 100),
        "coarse_label": ("coarse_label_names.txt", 20),
    },
}

Keyed = tuple[int, dict[str, Any]]  # the key that TFDS shuffles by, and an example


def originals() -> list[str]:
    """The data sets that `prepare` builds from original files, sorted."""
    return sorted(_FILES)


def default_data_dir(data_dir: str | os.PathLike | None = None) -> pathlib.Path:
    """TFDS's folder: `data_dir`, else $TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Args:
      data_dir: any path, or None.
    """
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return pathlib.Path(chosen).expanduser()


def is_prepared(name: str, data_dir: str | os.PathLike | None = None) -> bool:
    """Whether a data set is prepared, in the installed TFDS's version of it.

    Args:
      name: one of `originals()`.
      data_dir: see `default_data_dir`.
    """
    return _is_written(tfds.builder(name, data_dir=default_data_dir(data_dir), file_format=FORMAT))


def detect(source: str | os.PathLike) -> list[str]:
    """The data sets whose original files' folder exists, sorted.

    Args:
      source: see `prepare`.
    """
    return [name for name in originals() if (pathlib.Path(source) / _FOLDERS[name]).is_dir()]


class Digits(tfds.core.GeneratorBasedBuilder):
    """scikit-learn's 1,797 8x8 scans of handwritten digits: 1,297 to train, 500 to test.

    Pixel values 0..16 become 0..255. The 500 are stratified by class and fixed; an example's `id`
    ends in its row in `sklearn.datasets.load_digits()`.
    """

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # no downloads, so no check sums of them to look for

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Optical recognition of handwritten digits, as bundled in scikit-learn.",
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager: object) -> dict[str, Iterator[Keyed]]:
        del dl_manager  # nothing to download
        # An optional dependency (the extra `digits`), needed only to prepare.
        from sklearn.datasets import load_digits

        scans = load_digits()
        images = np.round(scans.images * (255 / 16)).astype(np.uint8)[..., None]
        test = order.stratified(scans.target, 500, seed=0)
        train = np.setdiff1d(np.arange(len(images)), test)
        return {
            split: self._generate_examples(split, rows, images[rows], scans.target[rows])
            for split, rows in (("train", train), ("test", test))
        }

    def _generate_examples(
        self, split: str, rows: np.ndarray, images: np.ndarray, labels: np.ndarray
    ) -> Iterator[Keyed]:
        for row, image, label in zip(rows, images, labels):
            example = {"id": f"{split}_{row:05d}", "image": _png(image), "label": int(label)}
            yield int(row), example


def prepare_digits(data_dir: str | os.PathLike | None = None) -> pathlib.Path:
    """Prepares `digits` unless it is prepared: a second or two, without a network.

    Args:
      data_dir: see `default_data_dir`.

    Returns:
      The folder of the prepared set.

    Raises:
      ValueError: scikit-learn is not installed.
    """
    try:
        return _write(Digits, default_data_dir(data_dir))
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "sklearn":
            raise
        raise ValueError(
            "preparing 'digits' needs scikit-learn: pip install 'jaxdefense[digits]'"
        ) from error


def prepare(
    name: str, source: str | os.PathLike, data_dir: str | os.PathLike | None = None
) -> pathlib.Path:
    """Prepares one data set from its original distribution files; does nothing if it is there.

    Args:
      name: one of `originals()`.
      source: holds `mnist/` and `fashion_mnist/` (four IDX .gz files each),
        `cifar-10-batches-bin/` and `cifar-100-binary/` (the binary versions).
      data_dir: TFDS's folder; default $TFDS_DATA_DIR or ~/tensorflow_datasets.

    Returns:
      The folder of the prepared set, data_dir/name/version.

    Raises:
      ValueError: unknown name, or an original file that is missing or damaged.
    """
    if name not in _FILES:
        registry.raise_unknown("data set with original files", name, _FILES)
    folder = pathlib.Path(source) / _FOLDERS[name]
    standard: Any = tfds.builder_cls(name)

    # The standard builder, but for where its examples come from: name, version and features stay.
    class FromOriginals(standard, skip_registration=True):  # type: ignore[call-arg]
        __module__ = standard.__module__
        url_infos = None

        def _split_generators(self, dl_manager: object) -> dict[str, Iterator[Keyed]]:
            del dl_manager  # nothing to download
            for feature, (file, count) in _CLASS_NAMES.get(name, {}).items():
                self.info.features[feature].names = _class_names(folder / file, count)
            return _idx_splits(name, folder) if "mnist" in name else _cifar_splits(name, folder)

    FromOriginals.name = name
    return _write(FromOriginals, default_data_dir(data_dir))


def _is_written(builder: tfds.core.DatasetBuilder) -> bool:
    return (pathlib.Path(builder.data_path) / "dataset_info.json").is_file()


def _write(builder_cls: type, data_dir: pathlib.Path) -> pathlib.Path:
    """Prepares a builder's data set in a temporary folder and renames it: whole or not there."""
    final = builder_cls(data_dir=data_dir, file_format=FORMAT)
    target = pathlib.Path(final.data_path)
    if _is_written(final):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".preparing-", dir=data_dir) as temporary:
        builder = builder_cls(data_dir=temporary, file_format=FORMAT)
        # TFDS announces a download on stdout, and there is none.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
        try:
            os.rename(builder.data_path, target)
        except OSError:
            # Another process may have prepared the same set in the meantime.
            if not _is_written(final):
                raise
    return target


def _content(name: str, path: pathlib.Path) -> bytes:
    """The bytes of an original file, uncompressed and equal to the published ones."""
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except FileNotFoundError as error:
        raise ValueError(f"{name}: missing original file {path}") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{name}: damaged original file {path}: {error}") from error
    digest, published = (
        hashlib.md5(data, usedforsecurity=False).hexdigest(),
        _FILES[name][path.name],
    )
    if digest != published:
        raise ValueError(f"{name}: damaged original file {path}: MD5 {digest}, not {published}")
    return data


def _class_names(path: pathlib.Path, count: int) -> list[str]:
    """The class names in a text file, one a line."""
    if not path.is_file():
        raise ValueError(f"missing original file {path}")
    lines = path.read_text(encoding="utf-8").split()
    if len(lines) != count:
        raise ValueError(f"damaged original file {path}: {len(lines)} class names, not {count}")
    return lines


def _idx_splits(name: str, folder: pathlib.Path) -> dict[str, Iterator[Keyed]]:
    """Both splits of a set in the IDX format: a header, then one byte per pixel or label."""
    contents = [_content(name, folder / file) for file in _IDX]  # all checked before any is used
    splits = {}
    for split, images, labels in zip(("train", "test"), contents[::2], contents[1::2]):
        splits[split] = _examples(
            np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28, 1),
            {"label": np.frombuffer(labels, np.uint8, offset=8)},
        )
    return splits


def _cifar_splits(name: str, folder: pathlib.Path) -> dict[str, Iterator[Keyed]]:
    """Both splits of CIFAR's binary version: label bytes, then red, green and blue planes."""
    columns = ("label",) if name == "cifar10" else ("coarse_label", "label")
    contents = {file: _content(name, folder / file) for file in _FILES[name]}
    splits = {}
    for split in ("train", "test"):
        data = b"".join(
            value
            for file, value in contents.items()
            if (split == "test") == file.startswith("test")
        )
        rows = np.frombuffer(data, np.uint8).reshape(-1, len(columns) + 3072)
        planes = rows[:, len(columns) :].reshape(-1, 3, 32, 32)
        splits[split] = _examples(
            planes.transpose(0, 2, 3, 1),
            {column: rows[:, i] for i, column in enumerate(columns)},
            prefix=f"{split}_",
        )
    return splits


def _examples(
    images: np.ndarray, labels: dict[str, np.ndarray], prefix: str | None = None
) -> Iterator[Keyed]:
    """Key and example of each row, in order; with a `prefix`, an `id` such as train_00042."""
    for row, image in enumerate(images):
        example = {"image": _png(image)} | {key: int(value[row]) for key, value in labels.items()}
        yield row, example if prefix is None else example | {"id": f"{prefix}{row:05d}"}


def _png(image: np.ndarray) -> io.BytesIO:
    """An image (H, W, 1 or 3) as the PNG file that TFDS stores: without it, it needs TensorFlow."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
    file.seek(0)
    return file
