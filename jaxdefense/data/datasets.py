"""Image data sets by name or by a config's section.

    train = load("cifar10", "train")  # 49,000 examples
    held_out = load("cifar10", "validation")  # the other 1,000 of the training set
    test = load("cifar10", "test")

Rows are in the order of their ids. Where TFDS stores a numbered id (digits, CIFAR, SVHN:
`test_00042`), that is the row in the original files, so `test.take(slice(1000))` is what a paper
calls the first 1,000 test images; elsewhere (MNIST, Fashion-MNIST) it is the row in TFDS's stored
order, which is shuffled.
"""

import functools
import inspect
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxdefense import registry, validate
from jaxdefense.data import arrays as splits
from jaxdefense.data import convert, decoding, prepare, prepared
from jaxdefense.data import folder as _folders
from jaxdefense.data.arrays import Arrays, HoldOut


def names(data_dir: str | os.PathLike | None = None) -> list[str]:
    """The data sets that `load` knows, sorted: digits, those of prepare_data.py, prepared ones.

    Args:
      data_dir: TFDS's folder; default $TFDS_DATA_DIR or ~/tensorflow_datasets.
    """
    found = prepared.list_prepared(prepare.default_data_dir(data_dir))
    return sorted({"digits", *prepare.originals(), *found})


def load(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike | None = None,
    size: int | tuple[int, int] | None = None,
    validation: int | float | None = None,
    test: int | float | None = None,
    seed: int = 0,
    in_memory: bool | None = None,
) -> Arrays:
    """A split of a prepared data set; `digits` is prepared on the way.

    Any image-classification set that TFDS prepared as array_record or TFRecord can be read, in the
    newest version that is there. Where a set has no split `test`, its `validation` is the test set,
    and `notes` say so; where it has both, its `validation` is taken unless `validation` is given.

    Args:
      name: of TFDS, NAME or NAME/CONFIG, perhaps with :VERSION; see `names`.
      split: 'train', 'validation' or 'test'. TFDS slices cannot be seeded, so `validation` is a
        seeded stratified choice of rows of TFDS's `train`, and 'train' is all its other rows.
      data_dir: TFDS's folder; default $TFDS_DATA_DIR or ~/tensorflow_datasets.
      size: pixels, (height, width) or one number: images are scaled so that they cover it, then
        cropped at the centre. Needed where images differ in size.
      validation: how much of the training set to hold out, a number of examples (int) or a
        fraction (float); default 2 %, 10 % of fewer than 10,000.
      test: how much to hold out as test images, for sets that have none.
      seed: of the validation split.
      in_memory: decode all images now (kept in this process, and beside the data set for the
        next), or each when it is read; default: by their size, 2 GiB.

    Returns:
      The split, rows in the order of their ids; its arrays are read-only.

    Raises:
      ValueError: unknown name or split, a data set that is not prepared or is no image
        classification, or a validation split that is empty or leaves nothing to train on.
    """
    stored = _open_set(
        name,
        data_dir=data_dir,
        size=size,
        validation=validation,
        test=test,
        seed=seed,
        in_memory=in_memory,
    )
    return splits.choose_split(split, *stored)


def load_section(section: Mapping[str, Any], split: str) -> Arrays:
    """A split of the data that a config's section "dataset" names.

    {"name": "cifar10", ...} with the options of `load`, {"name": "folder", "folder": PATH, ...}
    with those of `from_folder`, or {"name": "arrays", "file": PATH.npz, "num_classes", "test",
    "validation", "seed"}, a file of `numpy.savez(PATH, images=, labels=, test_images=,
    test_labels=)`. None means that an option has its default; "limit" keeps the first so many rows.

    Args:
      section: plain values.
      split: 'train', 'validation' or 'test'.

    Raises:
      ValueError: an unknown option, a missing path, or see `load`, `from_folder`, `from_arrays`.
    """
    return splits.choose_split(split, *_open_section(section)).take(slice(section.get("limit")))


def has_test(section: Mapping[str, Any]) -> bool:
    """Whether the data of a config's section "dataset" have a split 'test'; no image is decoded.

    Args:
      section: see `load_section`.

    Raises:
      ValueError: an unknown option, a missing path, or data that cannot be read.

    >>> from jaxdefense.data import datasets
    >>> datasets.has_test({"name": "digits"})
    True
    """
    stored = _open_section(section)
    return stored.roles.test is not None or stored.hold_out.test is not None


# Of the options of a section "dataset"; `HoldOut.check` and `decoding.parse_size` see to the rest.
_TYPES = {"name": str, "data_dir": str, "folder": str, "file": str, "num_classes": int}
_TYPES |= {"in_memory": bool}


class _Stored(NamedTuple):
    """What `arrays.choose_split` needs to know of a data set."""

    roles: splits.Roles
    read: Callable[[str], Arrays]
    hold_out: HoldOut


def _open_section(section: Mapping[str, Any]) -> _Stored:
    options = {key: value for key, value in section.items() if value is not None}
    limit = {"limit": options.pop("limit", 1)}
    validate.check_types("dataset", limit, {"limit": int})
    validate.check_positive_numbers("dataset", limit)
    name = options.pop("name", "folder" if "folder" in options else None)
    opener = _OPENERS.get(str(name), _open_set)
    known = [key for key in inspect.signature(opener).parameters if key != "name"]
    registry.check_known("option of dataset", options, [*known, "name", "limit"])
    validate.check_types("dataset", options, _TYPES)
    if opener is _open_set:
        return _open_set(name, **options)
    path = "folder" if name == "folder" else "file"
    if path not in options:
        raise ValueError(f"dataset {name!r} needs its path: --config.dataset.{path}=PATH")
    return opener(**options)


def _open_set(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    size: int | tuple[int, int] | None = None,
    validation: int | float | None = None,
    test: int | float | None = None,
    seed: int = 0,
    in_memory: bool | None = None,
) -> _Stored:
    validate.check_types("data", {"in_memory": in_memory}, {"in_memory": bool | None})
    found = _open_prepared(name, prepare.default_data_dir(data_dir))
    read = functools.partial(found.read, size=decoding.parse_size(size), in_memory=in_memory)
    roles = splits.assign_roles(name, found.splits)
    return _Stored(roles, read, HoldOut(validation, test, seed))


def _open_folder(
    folder: str,
    *,
    size: int | tuple[int, int] | None = None,
    validation: int | float | None = None,
    test: int | float | None = None,
    seed: int = 0,
    in_memory: bool | None = None,
) -> _Stored:
    found = _folders.open_folder(folder, size=size)
    read = functools.partial(found.read, in_memory=in_memory)
    return _Stored(found.roles, read, HoldOut(validation, test, seed))


def _open_file(
    file: str,
    *,
    num_classes: int | None = None,
    validation: int | float | None = None,
    test: int | float | None = None,
    seed: int = 0,
) -> _Stored:
    path = pathlib.Path(file).expanduser()
    changed = path.stat().st_mtime_ns if path.is_file() else 0
    stored = _read_file(file, changed, num_classes)
    roles = splits.assign_roles(file, stored)
    return _Stored(roles, stored.__getitem__, HoldOut(validation, test, seed))


_OPENERS: dict[str, Callable[..., _Stored]] = {"folder": _open_folder, "arrays": _open_file}


@functools.lru_cache(maxsize=2)
def _read_file(file: str, changed: int, num_classes: int | None) -> dict[str, Arrays]:
    """The arrays of a file, kept until it changes."""
    del changed
    return convert.read_file(file, num_classes)


@functools.cache
def _open_prepared(name: str, data_dir: pathlib.Path) -> prepared.Prepared:
    """The set of a name that is prepared in `data_dir`; others raise."""
    path = prepared.find_folder(name, data_dir) if isinstance(name, str) else None
    if name == "digits" and path is None:
        path = prepare.prepare_digits(data_dir)
    if path is None:
        if not prepare.is_known(name):
            registry.raise_unknown("data set", name, names(data_dir))
        raise ValueError(
            f"{name} is not prepared in {data_dir}; prepare it: "
            f"python experiments/prepare_data.py --data_dir {data_dir} {name} (from files that you "
            f"have: --from DIR)"
        )
    return prepared.open_folder(name, path)
