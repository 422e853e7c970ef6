"""Original files of data sets: where they are published, what they must be, how they are read.

Files are checked against their published sums (MNIST, Fashion-MNIST, CIFAR and SVHN: MD5 of each
file; archives as they are downloaded) or counted (the JPEG files of ImageNette and Tiny-ImageNet).
"""

import dataclasses
import gzip
import hashlib
import http.client
import io
import pathlib
import shutil
import tarfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from jaxdefense.files import check_name

Keyed = tuple[int | str, dict[str, Any]]  # the key that TFDS shuffles by, and an example
Examples = dict[str, Iterator[Keyed]]  # of each split


@dataclasses.dataclass(frozen=True)
class Original:
    """A data set's files as they are published.

    Attributes:
      folder: that holds them, below the folder of all originals.
      page: where people find them.
      urls: of the files, or of one archive of the folder.
      read: (its name, its folder) -> the examples of each split.
      sums: {file: MD5}; that of a .gz file is of its uncompressed content.
      archive_sums: {archive: (hash, sum)}, checked when it is downloaded.
      class_names: {feature: (file that names its classes, how many)}.
      counts: {split: images}, where there are too many files for a sum each.
      builder: TFDS's name, where it is not the set's own.
    """

    folder: str
    page: str
    urls: tuple[str, ...]
    read: Callable[[str, pathlib.Path], Examples]
    sums: dict[str, str] = dataclasses.field(default_factory=dict)
    archive_sums: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    class_names: dict[str, tuple[str, int]] = dataclasses.field(default_factory=dict)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    builder: str = ""


def read_class_names(name: str, folder: pathlib.Path) -> dict[str, list[str]]:
    """The class names that a set's files give, by feature.

    Args:
      name: of the set.
      folder: of its files.

    Raises:
      ValueError: a missing or damaged file.
    """
    named = ORIGINALS[name].class_names.items()
    return {feature: _class_names(folder / file, count) for feature, (file, count) in named}


def download(name: str, source: pathlib.Path) -> None:
    """Downloads a set's original files into `source`, as `prepare` takes them.

    Args:
      name: one of `ORIGINALS`.
      source: an existing folder; the set's own folder is made in it.

    Raises:
      ValueError: no network, or an archive that is damaged.
    """
    original = ORIGINALS[name]
    folder = source / original.folder
    for url in original.urls:
        archive = url.endswith((".tar.gz", ".tgz", ".zip"))
        target = source / url.rpartition("/")[2] if archive else folder / url.rpartition("/")[2]
        target.parent.mkdir(exist_ok=True)
        try:
            with urllib.request.urlopen(url, timeout=60) as answer, open(target, "wb") as file:
                shutil.copyfileobj(answer, file)
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(
                f"{name}: cannot download {url} ({error}); its files are published at "
                f"{original.page}: put them in DIR/{original.folder}, then run "
                f"python experiments/prepare_data.py --from DIR {name}"
            ) from error
        if archive:
            _extract(name, target, source)


def _extract(name: str, archive: pathlib.Path, folder: pathlib.Path) -> None:
    """Unpacks an archive whose sum is the published one, and removes it."""
    kind, published = ORIGINALS[name].archive_sums[archive.name]
    with open(archive, "rb") as file:
        digest = hashlib.file_digest(file, kind).hexdigest()
    if digest != published:
        raise ValueError(
            f"{name}: the downloaded {archive.name} is damaged: {kind} {digest}, not {published}"
        )
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as packed:
                packed.extractall(folder)  # drops ".." and leading slashes of names, makes no links
        else:
            with tarfile.open(archive) as packed_tar:
                packed_tar.extractall(folder, filter="data")  # refuses what would lie outside
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        raise ValueError(f"{name}: cannot unpack {archive.name}: {error}") from error
    archive.unlink()


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
        ORIGINALS[name].sums[path.name],
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


def _idx_splits(name: str, folder: pathlib.Path) -> Examples:
    """Both splits of a set in the IDX format: a header, then one byte per pixel or label."""
    contents = [_content(name, folder / file) for file in _IDX]  # all checked before any is used
    splits = {}
    for split, images, labels in zip(("train", "test"), contents[::2], contents[1::2]):
        splits[split] = _examples(
            np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28, 1),
            {"label": np.frombuffer(labels, np.uint8, offset=8)},
        )
    return splits


def _cifar_splits(name: str, folder: pathlib.Path) -> Examples:
    """Both splits of CIFAR's binary version: label bytes, then red, green and blue planes."""
    columns = ("label",) if name == "cifar10" else ("coarse_label", "label")
    contents = {file: _content(name, folder / file) for file in ORIGINALS[name].sums}
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


def _svhn_splits(name: str, folder: pathlib.Path) -> Examples:
    """Train and test of SVHN's MATLAB files; its `extra` is left out. Label 10 is the digit 0."""
    import scipy.io  # of jax's own dependencies; a second to import

    splits = {}
    for split in ("train", "test"):
        file = io.BytesIO(_content(name, folder / f"{split}_32x32.mat"))
        held = scipy.io.loadmat(file)
        images, labels = held["X"].transpose(3, 0, 1, 2), held["y"].reshape(-1) % 10
        splits[split] = _examples(images, {"label": labels}, prefix=f"{split}_", digits=6)
    return splits


def _imagenette_splits(name: str, folder: pathlib.Path) -> Examples:
    """SPLIT/CLASS/FILE.JPEG, kept as they are."""
    stored = {"train": "train", "validation": "val"}
    files = {
        split: [(path, path.parent.name) for path in sorted((folder / own).glob("*/*.JPEG"))]
        for split, own in stored.items()
    }
    return _file_splits(name, folder, files)


def _tiny_imagenet_splits(name: str, folder: pathlib.Path) -> Examples:
    """train/CLASS/images/FILE.JPEG, and val/images with a list of classes; test has no labels."""
    annotations = folder / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise ValueError(f"{name}: missing original file {annotations}")
    rows = [line.split("\t")[:2] for line in annotations.read_text().splitlines()]
    for file, _ in rows:
        check_name(f"{name}: {annotations}: image", file)
    train = sorted((folder / "train").glob("*/images/*.JPEG"))
    files = {
        "train": [(path, path.parents[1].name) for path in train],
        "validation": [(folder / "val" / "images" / file, label) for file, label in rows],
    }
    return _file_splits(name, folder, files)


def _file_splits(
    name: str, folder: pathlib.Path, files: dict[str, list[tuple[pathlib.Path, str]]]
) -> Examples:
    """The examples of image files, which must be as many as are published."""
    for split, count in ORIGINALS[name].counts.items():
        if len(files[split]) != count:
            raise ValueError(
                f"{name}: {folder} has {len(files[split])} images for {split}, not {count}"
            )
    return {split: _file_examples(name, own) for split, own in files.items()}


def _file_examples(name: str, files: list[tuple[pathlib.Path, str]]) -> Iterator[Keyed]:
    for path, label in files:
        if not path.is_file():
            raise ValueError(f"{name}: missing original file {path}")
        yield path.name, {"image": io.BytesIO(path.read_bytes()), "label": label}


def _examples(
    images: np.ndarray,
    labels: dict[str, np.ndarray],
    prefix: str | None = None,
    digits: int = 5,
) -> Iterator[Keyed]:
    """Key and example of each row, in order; with a `prefix`, an `id` such as train_00042."""
    for row, image in enumerate(images):
        example = {"image": png(image)} | {key: int(value[row]) for key, value in labels.items()}
        yield row, example if prefix is None else example | {"id": f"{prefix}{row:0{digits}d}"}


def png(image: np.ndarray) -> io.BytesIO:
    """An image (H, W, 1 or 3) as the PNG file that TFDS stores: without it, it needs TensorFlow."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
    file.seek(0)
    return file


_IDX = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


def _idx(folder: str, page: str, base: str, sums: tuple[str, ...]) -> Original:
    urls = tuple(f"{base}/{file}" for file in _IDX)
    return Original(folder, page, urls, _idx_splits, dict(zip(_IDX, sums)))


_KRIZ = "https://www.cs.toronto.edu/~kriz"
_SVHN = "http://ufldl.stanford.edu/housenumbers"
_FASHION = "https://github.com/zalandoresearch/fashion-mnist"

ORIGINALS = {
    "mnist": _idx(
        "mnist",
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        (
            "6bbc9ace898e44ae57da46a324031adb",
            "a25bea736e30d166cdddb491f175f624",
            "2646ac647ad5339dbf082846283269ea",
            "27ae3e4e09519cfbb04c329615203637",
        ),
    ),
    "fashion_mnist": _idx(
        "fashion_mnist",
        _FASHION,
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        (
            "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            "9018921c3c673c538a1fc5bad174d6f9",
            "8181f5470baa50b63fa0f6fddb340f0a",
            "15d484375f8d13e6eb1aabb0c3f46965",
        ),
    ),
    "cifar10": Original(
        "cifar-10-batches-bin",
        f"{_KRIZ}/cifar.html",
        (f"{_KRIZ}/cifar-10-binary.tar.gz",),
        _cifar_splits,
        sums={
            "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
            "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
            "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
            "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
            "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
            "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
        },
        archive_sums={
            "cifar-10-binary.tar.gz": (
                "sha256",
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            )
        },
        class_names={"label": ("batches.meta.txt", 10)},
    ),
    "cifar100": Original(
        "cifar-100-binary",
        f"{_KRIZ}/cifar.html",
        (f"{_KRIZ}/cifar-100-binary.tar.gz",),
        _cifar_splits,
        sums={
            "train.bin": "6172c7755cfe09b2fe270c85cebc1b15",
            "test.bin": "4499cfba6c016c1be1438163640a0898",
        },
        archive_sums={
            "cifar-100-binary.tar.gz": (
                "sha256",
                "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            )
        },
        class_names={
            "label": ("fine_label_names.txt", 100),
            "coarse_label": ("coarse_label_names.txt", 20),
        },
    ),
    "svhn_cropped": Original(
        "svhn",
        f"{_SVHN}/",
        (f"{_SVHN}/train_32x32.mat", f"{_SVHN}/test_32x32.mat"),
        _svhn_splits,
        sums={
            "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
            "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
        },
    ),
    "imagenette": Original(
        "imagenette2-160",
        "https://github.com/fastai/imagenette",
        ("https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz",),
        _imagenette_splits,
        archive_sums={
            "imagenette2-160.tgz": (
                "sha256",
                "64d0c4859f35a461889e0147755a999a48b49bf38a7e0f9bd27003f10db02fe5",
            )
        },
        counts={"train": 9469, "validation": 3925},
        builder="imagenette/160px-v2",
    ),
    "tiny_imagenet": Original(
        "tiny-imagenet-200",
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        ("http://cs231n.stanford.edu/tiny-imagenet-200.zip",),
        _tiny_imagenet_splits,
        archive_sums={"tiny-imagenet-200.zip": ("md5", "90528d7ca1a48142e341f4ef8d21d0de")},
        class_names={"label": ("wnids.txt", 200)},
        counts={"train": 100_000, "validation": 10_000},
    ),
}
