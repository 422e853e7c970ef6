"""Image files in folders, as `tfds.ImageFolder` and torchvision lay them out.

PATH/train/CLASS/*.png   PATH/test/CLASS/*.jpg      and perhaps PATH/val/CLASS/*
PATH/CLASS/*.png                                    all in one: `test` holds test images out
PATH/train/CLASS/images/*.JPEG, PATH/val/images/*.JPEG, PATH/val/val_annotations.txt
                                                    Tiny-ImageNet as it is published
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np

from jaxdefense.data import arrays as splits
from jaxdefense.data import copies, decoding, order
from jaxdefense.data.arrays import Arrays, Encoded, HoldOut, Splits

_SUFFIXES = (".png", ".jpg", ".jpeg")
# What lies beside images and is none: Tiny-ImageNet's boxes, what systems write.
_NO_IMAGES = (".txt", ".csv", ".tsv", ".json", ".xml", ".yaml", ".md", ".db", ".ini", ".mat")
# A file's start tells it from others of its size; little more is read for its header.
_START = 1 << 14
_SPLITS = ("train", "validation", "val", "valid", "dev", "test")
_ALSO = {"training": "train", "testing": "test"}  # names of splits, in any case
_ANNOTATIONS = pathlib.Path("val") / "val_annotations.txt"
_ALL = "train"  # the stored split of a folder without splits

Listing = dict[str, list[tuple[pathlib.Path, str]]]  # split: (file, class), sorted


def from_folder(
    path: str | os.PathLike,
    *,
    size: int | tuple[int, int] | None = None,
    validation: int | float | None = None,
    test: int | float | None = None,
    seed: int = 0,
    in_memory: bool | None = None,
) -> Splits:
    """The images of a folder, PNG and JPEG, by class.

    The names of the class folders, sorted, are the classes. A folder `val` (or `validation`) is the
    test set where there is no folder `test`; capitals do not matter (`Train`), and `training` and
    `testing` are `train` and `test`. Rows are in a fixed random order, so that the first n
    are a fair sample. Grey images among coloured ones become three equal channels, and transparency
    is dropped; `notes` of the arrays say so, and name files of other kinds (BMP, WebP), which are
    left out.

    Args:
      path: holds split/class/file or class/file.
      size: pixels, (height, width) or one number: images are scaled so that they cover it, then
        cropped at the centre. Needed where images differ in size.
      validation: how much of the training images to hold out, see `arrays.HoldOut`.
      test: how much to hold out as test images where the folder has no test split.
      seed: of the validation split.
      in_memory: decode all images now, or each when it is read; default: by their size, 2 GiB.

    Returns:
      `train`, `validation` and `test`; `test` is None where there is none and none was asked for.

    Raises:
      ValueError: no such folder, no images, a class of the test set that the training set lacks, a
        damaged image, or images of several sizes without `size`.

    >>> import pathlib, tempfile
    >>> from PIL import Image
    >>> from jaxdefense import data
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for i in range(20):
    ...         file = pathlib.Path(folder, ("cat", "dog")[i % 2], f"{i}.png")
    ...         file.parent.mkdir(exist_ok=True)
    ...         Image.new("RGB", (20 + i, 20), (i, i, i)).save(file)
    ...     train, validation, test = data.from_folder(folder, size=16, test=0.2)
    >>> train.images.shape, len(validation), len(test), train.label_names
    ((14, 16, 16, 3), 2, 4, ('cat', 'dog'))
    """
    found = open_folder(path, size=size)
    hold_out = HoldOut(validation, test, seed)
    return splits.choose_splits(
        found.roles, functools.partial(found.read, in_memory=in_memory), hold_out
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Folder:
    """A folder whose files are listed and whose headers are read.

    Attributes:
      name: as the user gave it.
      files: of each stored split, with their classes.
      label_names: the classes.
      shape: (H, W, C) of the images.
      roles: of the stored splits.
      notes: what is to be said of the images.
    """

    name: str
    files: Listing
    label_names: tuple[str, ...]
    shape: tuple[int, int, int]
    roles: splits.Roles
    notes: tuple[str, ...]

    def read(self, split: str, *, in_memory: bool | None = None) -> Arrays:
        """A stored split.

        Args:
          split: one of `files`.
          in_memory: decode now, or when read; None by the images' size.

        Raises:
          ValueError: a damaged image.
        """
        if in_memory is None:
            in_memory = len(self.files[split]) * int(np.prod(self.shape)) <= splits.IN_MEMORY
        return _read(self, split, in_memory)


class _Files:
    """Image files by row."""

    def __init__(self, paths: list[pathlib.Path]) -> None:
        self._paths = paths

    def read(self, rows: np.ndarray) -> Iterable[bytes]:
        """The contents of the files of `rows`."""
        return (self._paths[row].read_bytes() for row in rows)

    def describe(self, row: int) -> str:
        """The path of a file."""
        return str(self._paths[row])


def open_folder(path: str | os.PathLike, *, size: int | tuple[int, int] | None = None) -> Folder:
    """Lists a folder and reads its images' headers; the same folder is not read twice.

    Args:
      path: see `from_folder`.
      size: see `from_folder`.

    Raises:
      ValueError: see `from_folder`.
    """
    root = pathlib.Path(path).expanduser()
    if not root.is_dir():
        raise ValueError(f"there is no folder {path}")
    listing, notes = _list(root)
    digest = hashlib.sha256()
    for split, files in listing.items():
        for file, _ in files:
            stat = file.stat()
            line = f"{split} {file.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}\n"
            digest.update(line.encode())
    key = (str(path), str(root.resolve()), decoding.parse_size(size), digest.hexdigest(), notes)
    if key not in _OPENED:
        while len(_OPENED) >= 4:
            _OPENED.pop(next(iter(_OPENED)))
        _OPENED[key] = _inspect(str(path), listing, key[2], notes)
    return _OPENED[key]


_OPENED: dict[tuple, Folder] = {}  # the folders read last, by their files' sizes and times


@functools.lru_cache(maxsize=8)
def _read(folder: Folder, split: str, in_memory: bool) -> Arrays:
    classes = {name: i for i, name in enumerate(folder.label_names)}
    files = folder.files[split]
    chosen = [files[row] for row in order.permutation(len(files), seed=0)]
    rows = np.arange(len(files))
    encoded = Encoded(_Files([file for file, _ in chosen]), rows, folder.shape)
    labels = np.array([classes[label] for _, label in chosen], np.int32)
    images = encoded[:] if in_memory else encoded
    for array in (images, labels, rows):
        if isinstance(array, np.ndarray):
            array.flags.writeable = False  # shared by all who load the split
    ids = rows.astype(np.int32)
    names = folder.label_names
    return Arrays(images, labels, ids, len(names), folder.name, names, folder.notes)


def _list(root: pathlib.Path) -> tuple[Listing, tuple[str, ...]]:
    """The files of each split with their classes, and what is to be said of them."""
    folders = _subfolders(root)
    named = {name: _ALSO.get(name.lower(), name.lower()) for name in folders}
    named = {name: split for name, split in named.items() if split in _SPLITS}
    if (root / _ANNOTATIONS).is_file():
        listing = {"train": _classes(root / "train"), "val": _annotated(root)}
        unlabelled = (root / "test").is_dir()
        notes = ("its folder test/ has no labels and is left out",) if unlabelled else ()
    elif len(set(named.values())) < len(named):
        raise ValueError(f"{root} has a split twice: {', '.join(named)}")
    elif "train" in named.values():
        ordered = sorted(named, key=lambda name: _SPLITS.index(named[name]))
        listing = {named[name]: _classes(root / name) for name in ordered}
        others = sorted(set(folders) - set(named))
        notes = (f"its folders {', '.join(others)} are no splits and are left out",)
        notes = notes if others else ()
    elif named:
        raise ValueError(f"{root} has the splits {', '.join(named)} and no split train")
    else:
        listing, notes = {_ALL: _classes(root)}, ()
    for split, files in listing.items():
        if not files:
            raise ValueError(
                f"{root}: no images for split {split!r}; they are expected as split/class/file or "
                f"class/file, .png, .jpg or .jpeg"
            )
    return listing, (*notes, *_describe_others(root, listing))


def _describe_others(root: pathlib.Path, listing: Listing) -> list[str]:
    """A note on the files beside the images that may be images of another kind."""
    folders = {file.parent for files in listing.values() for file, _ in files}
    seen = (file for folder in sorted(folders) for file in sorted(folder.iterdir()))
    known = (*_SUFFIXES, *_NO_IMAGES)
    others = [
        str(file.relative_to(root))
        for file in seen
        if not file.name.startswith(".") and file.suffix.lower() not in known and file.is_file()
    ]
    if not others:
        return []
    verb = "file is" if len(others) == 1 else "files are"
    more = ", ..." if len(others) > 3 else ""
    named = ", ".join(others[:3])
    return [f"{len(others)} {verb} no PNG or JPEG and left out: {named}{more}"]


def _subfolders(path: pathlib.Path) -> list[str]:
    names = (entry.name for entry in path.iterdir() if entry.is_dir())
    return sorted(name for name in names if not name.startswith((".", "__")))


def _classes(path: pathlib.Path) -> list[tuple[pathlib.Path, str]]:
    """The image files of each class folder, which must have some; hidden ones are left out.

    macOS writes a hidden `._3.png`, which is no image, beside `3.png` on other file systems.
    """
    files = []
    for label in _subfolders(path):
        seen = (file for file in (path / label).rglob("*") if not file.name.startswith("."))
        own = [file for file in seen if file.suffix.lower() in _SUFFIXES]
        if not own:
            raise ValueError(f"{path / label} holds no .png, .jpg or .jpeg file")
        files += [(file, label) for file in sorted(own)]
    return files


def _annotated(root: pathlib.Path) -> list[tuple[pathlib.Path, str]]:
    """Tiny-ImageNet's val split: a line for each file with its name, its class and a box."""
    files = []
    for line in (root / _ANNOTATIONS).read_text().splitlines():
        name, _, rest = line.partition("\t")
        file = root / "val" / "images" / name
        if not file.is_file():
            raise ValueError(f"{root / _ANNOTATIONS} names {name}, and there is no {file}")
        files.append((file, rest.partition("\t")[0]))
    return sorted(files)


def _inspect(
    name: str, listing: Listing, size: tuple[int, int] | None, notes: tuple[str, ...]
) -> Folder:
    """What the headers of all files say; nothing is decoded yet."""
    label_names = tuple(sorted({label for _, label in listing["train"]}))
    roles = splits.assign_roles(name, listing)
    sizes: dict[tuple[int, int], pathlib.Path] = {}
    count = {"all": 0, "colour": 0, "alpha": 0}
    digests: dict[str, list[bytes]] = {split: [] for split in listing}
    for split, files in listing.items():
        for file, label in files:
            if label not in label_names:
                raise ValueError(f"{name}: class {label!r} of split {split!r} is not in train")
            try:
                with open(file, "rb") as stream:
                    header = decoding.read_header(stream)
                    digests[split].append(_hash_start(stream))
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from error
            sizes.setdefault(header.size, file)
            count["all"] += 1
            count["colour"] += header.colour
            count["alpha"] += header.alpha
    if size is None and len(sizes) > 1:
        (one, first), (other, second) = list(sizes.items())[:2]
        raise ValueError(
            f"{name} has images of {len(sizes)} sizes, e.g. {first.name} of {one[0]}x{one[1]} and "
            f"{second.name} of {other[0]}x{other[1]} (height x width): give size, e.g. "
            f"size={min(min(shape) for shape in sizes)} (in a config dataset.size)"
        )
    chosen = size or next(iter(sizes))
    if set(sizes) != {chosen}:
        notes = (*notes, f"its images are {decoding.RESIZE.format(*chosen)}")
    if 0 < count["colour"] < count["all"]:
        grey = count["all"] - count["colour"]
        notes = (*notes, f"{grey} of its {count['all']} images are grey: three equal channels")
    if count["alpha"]:
        notes = (*notes, f"{count['alpha']} of its images have transparency, which is dropped")
    notes += tuple(copies.describe_copies(digests["train"], digests.get(roles.test or "", ())))
    shape = (*chosen, 3 if count["colour"] else 1)
    return Folder(name, listing, label_names, shape, roles, notes)


def _hash_start(stream: BinaryIO) -> bytes:
    """Of a file's size and start, which no two images share that are not the same."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    return copies.hash_content(b"%d " % size + stream.read(_START))
