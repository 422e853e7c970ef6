"""Arrays of any usual kind to a data set: what is converted is said, what is unclear is refused."""

import os
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxdefense import registry
from jaxdefense.data import arrays as splits
from jaxdefense.data import copies
from jaxdefense.data.arrays import Arrays, HoldOut, Splits

_FILE = ("images", "labels", "test_images", "test_labels", "label_names")
_DARK = 32  # of 255: images all darker than this are of another range, e.g. of 4 bits


def from_arrays(
    images: Any,
    labels: Any,
    *,
    test: tuple[Any, Any] | int | float | None = None,
    validation: int | float | None = None,
    num_classes: int | None = None,
    label_names: Sequence[str] | None = None,
    seed: int = 0,
    name: str = "arrays",
) -> Splits:
    """A data set of arrays in memory: NumPy, JAX, torch on the CPU, or lists.

    Images may be uint8, integers in 0..255, or floats in [0, 1] (rounded to 8 bits); (N, H, W) are
    grey, and a fourth channel is dropped. Labels may be integers from 0 or from 1, strings (sorted,
    they are the classes), or one-hot. `notes` of the arrays say what was converted, and how many
    test images are also training images.

    Args:
      images: (N, H, W, C) or (N, H, W).
      labels: (N,), (N, 1) or one-hot (N, K).
      test: (images, labels) of the test set, or how many of the images to hold out for it.
      validation: how much of the training images to hold out, see `arrays.HoldOut`.
      num_classes: K; default: as many as there are.
      label_names: K names of the classes; default: the strings, or the numbers.
      seed: of the validation split.
      name: of the set.

    Returns:
      `train`, `validation` and `test`; `test` is None where none is given or held out.

    Raises:
      ValueError: images of another shape, range or channel order, images that are all dark (none
        reaches an eighth of the range), or labels that say no class.

    >>> import numpy as np
    >>> from jaxdefense import data
    >>> images = np.random.default_rng(0).random((50, 8, 8))
    >>> train, validation, test = data.from_arrays(images, ["cat", "dog"] * 25, test=10)
    >>> train.images.shape, len(validation), len(test), train.label_names
    ((36, 8, 8, 1), 4, 10, ('cat', 'dog'))
    >>> print(*train.notes, sep="; ")  # doctest: +ELLIPSIS
    images (N, H, W) are grey: one channel; float images are rounded to 8 bits; labels are ...
    """
    pairs = {"train": (images, labels)}
    if test is not None and not isinstance(test, (int, float)):
        pairs["test"] = test
    stored = _convert(pairs, num_classes, label_names, name)
    hold_out = HoldOut(validation, None if "test" in pairs else test, seed)  # type: ignore[arg-type]
    return splits.choose_splits(splits.assign_roles(name, stored), stored.__getitem__, hold_out)


def read_file(path: str | os.PathLike, num_classes: int | None = None) -> dict[str, Arrays]:
    """The stored splits of an .npz file with images, labels, perhaps test_images and test_labels.

    Args:
      path: of the file that `numpy.savez` wrote; nothing in it is unpickled.
      num_classes: see `from_arrays`.

    Raises:
      ValueError: no such file, a damaged one, an array that is missing, or see `from_arrays`.
    """
    try:
        where = pathlib.Path(path).expanduser()
        with open(where, "rb") as raw:
            file = np.load(raw, allow_pickle=False)
            held = None if isinstance(file, np.ndarray) else {key: file[key] for key in file.files}
    except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no .npz file that can be read: {error}") from error
    if held is None:
        raise ValueError(
            f"{path} holds one array, and images and labels are needed: write them with "
            f"numpy.savez({where.stem + '.npz'!r}, images=..., labels=...)"
        )
    registry.check_known(f"array in {path}", held, _FILE)
    pairs = {}
    for split, prefix in (("train", ""), ("test", "test_")):
        pair = [key for key in (f"{prefix}images", f"{prefix}labels") if key in held]
        if len(pair) == 1 or (split == "train" and not pair):
            raise ValueError(
                f"{path} needs the arrays {prefix}images and {prefix}labels; it holds "
                f"{', '.join(sorted(held))}"
            )
        if pair:
            pairs[split] = (held[pair[0]], held[pair[1]])
    names = [str(label) for label in held["label_names"]] if "label_names" in held else None
    return _convert(pairs, num_classes, names, str(path))


def _convert(
    pairs: dict[str, tuple[Any, Any]],
    num_classes: int | None,
    label_names: Sequence[str] | None,
    name: str,
) -> dict[str, Arrays]:
    """Images and labels of each stored split as arrays; labels are converted alike in all."""
    notes: dict[str, None] = {}  # in order, each once
    images, labels, columns = {}, {}, {}
    for split, pair in pairs.items():
        where = name if split == "train" else f"{name} ({split})"
        if len(pair) != 2:
            raise ValueError(f"{where}: need (images, labels), got {len(pair)} values")
        images[split], said = _convert_images(pair[0], where)
        notes |= dict.fromkeys(said)
        labels[split], columns[split] = _flatten_labels(pair[1], where, notes)
        if len(labels[split]) != len(images[split]):
            counts = f"{len(images[split])} images and {len(labels[split])} labels"
            raise ValueError(f"{where}: {counts} do not belong together")
    shapes = {split: x.shape[1:] for split, x in images.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{name}: training and test images differ in shape: {shapes}")
    if len(set(columns.values())) > 1 or len({x.dtype.kind for x in labels.values()}) > 1:
        raise ValueError(f"{name}: training and test labels are of different kinds")
    if (width := columns["train"]) and num_classes not in (None, width):
        raise ValueError(f"{name}: one-hot labels of {width} columns and num_classes={num_classes}")
    numbered, names = _number_labels(labels, width or num_classes, label_names, name, notes)
    notes |= dict.fromkeys(_doubts(numbered, len(names)))
    digests = {split: [copies.hash_content(image) for image in x] for split, x in images.items()}
    notes |= dict.fromkeys(copies.describe_copies(digests["train"], digests.get("test", ())))
    found = {}
    for split, x in images.items():
        x.flags.writeable = False
        ids = np.arange(len(x), dtype=np.int32)
        found[split] = Arrays(x, numbered[split], ids, len(names), name, names, tuple(notes))
    return found


def _doubts(labels: dict[str, np.ndarray], num_classes: int) -> list[str]:
    """What is suspicious of labels from 0, by split, and yet may be meant so."""
    notes = []
    held = {split: set(x.tolist()) for split, x in labels.items()}
    if missing := sorted(set(range(num_classes)) - set().union(*held.values())):
        verb = "classes {} have" if len(missing) > 1 else "class {} has"
        notes.append(f"{verb.format(_format_numbers(missing))} no image")
    if "test" in held and (new := sorted(held["test"] - held["train"])):
        shifted = 0 in held["train"] and min(held["test"]) == 1
        question = "; do the test labels begin at 1?" if shifted else ""
        notes.append(f"the test images have classes that the training images lack: {new}{question}")
    return notes


def _format_numbers(numbers: Sequence[int]) -> str:
    """Sorted integers for a reader: "3 and 10 to 16"."""
    breaks = np.flatnonzero(np.diff(numbers) > 1) + 1
    parts: list[str] = []
    for group in np.split(np.asarray(numbers), breaks):
        inner = len(group) > 2
        parts += [f"{group[0]} to {group[-1]}"] if inner else [str(number) for number in group]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _convert_images(values: Any, where: str) -> tuple[np.ndarray, list[str]]:
    """(N, H, W, C) uint8, and what was done."""
    try:
        images = np.asarray(values)
    except ValueError:  # lists of arrays of several shapes
        images = np.empty(0, object)
    if images.dtype == object:
        raise ValueError(f"{where}: the images are no array; do they differ in size? Resize them")
    notes = []
    if images.ndim == 3:
        images = images[..., None]
        notes.append("images (N, H, W) are grey: one channel")
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"{where}: need images (N, H, W, C) or (N, H, W), got {images.shape}")
    channels = images.shape[-1]
    if channels not in (1, 2, 3, 4):
        if images.shape[1] in (1, 3, 4):
            raise ValueError(
                f"{where}: images {images.shape} have their channels first: give "
                f"images.transpose(0, 2, 3, 1)"
            )
        raise ValueError(f"{where}: images need 1 or 3 channels, the last axis of {images.shape}")
    if channels in (2, 4):
        images = images[..., : channels - 1]
        notes.append(f"the last of {channels} channels, transparency, is dropped")
    return _to_uint8(images, where, notes), notes


def _to_uint8(images: np.ndarray, where: str, notes: list[str]) -> np.ndarray:
    """A copy of the images in 8 bits."""
    if images.dtype.kind not in "uif":
        raise ValueError(f"{where}: images must be integers or floats, got {images.dtype}")
    low, high = images.min(), images.max()
    if not np.isfinite([low, high]).all():
        raise ValueError(f"{where}: images hold NaN or infinite values")
    if low == high == 0:
        raise ValueError(f"{where}: all images are black")
    if images.dtype.kind == "f" and low >= 0 and high <= 1:
        if 255 * high < _DARK:
            way = "divided by 255 twice?" if 255 * high < 1.5 else "give images / images.max()"
            raise ValueError(f"{where}: no float image is brighter than {high:.3g}; {way}")
        notes.append("float images are rounded to 8 bits")
        return np.round(images.astype(np.float64) * 255).astype(np.uint8)
    if not 0 <= low <= high <= 255 or (images.dtype.kind == "f" and (images % 1 != 0).any()):
        raise ValueError(
            f"{where}: images must be uint8, integers in 0..255 or floats in [0, 1], got "
            f"{images.dtype} in [{low:.4g}, {high:.4g}]; a normalisation is part of the model"
        )
    if high == 1:
        raise ValueError(
            f"{where}: {images.dtype} images whose values are 0 and 1 would be black: give floats"
        )
    if high < _DARK:
        raise ValueError(
            f"{where}: no image is brighter than {high:.0f} of 255: give images / {high:.0f}, "
            f"floats in [0, 1]"
        )
    if images.dtype != np.uint8:
        notes.append(f"{images.dtype} images in 0..255 became uint8")
    return images.astype(np.uint8)


def _flatten_labels(
    values: Any, where: str, notes: dict[str, None]
) -> tuple[np.ndarray, int | None]:
    """(N,) labels, integers or strings, and the number of classes where they were one-hot."""
    labels = np.asarray(values)
    if labels.dtype == object and all(isinstance(label, str) for label in labels.flat):
        labels = labels.astype(str)
    if labels.dtype.kind == "S":
        labels = np.char.decode(labels, "utf-8")
    if labels.dtype.kind not in "uifUb":
        raise ValueError(f"{where}: labels must be numbers or strings, got {labels.dtype}")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2 and labels.dtype.kind != "U":
        rows = np.flatnonzero(((labels != 0).sum(1) != 1) | (labels.max(1) != 1))
        if len(rows):
            raise ValueError(
                f"{where}: labels {labels.shape} must be one-hot, and row {rows[0]} is not; soft "
                f"labels are no classes"
            )
        notes[f"one-hot labels of {labels.shape[1]} columns became class numbers"] = None
        return labels.argmax(1), labels.shape[1]
    if labels.ndim != 1:
        raise ValueError(f"{where}: labels must be (N,) or one-hot (N, K), got {labels.shape}")
    if labels.dtype.kind == "f" and (not np.isfinite(labels).all() or (labels % 1 != 0).any()):
        raise ValueError(f"{where}: float labels must be whole numbers")
    return labels if labels.dtype.kind == "U" else labels.astype(np.int64), None


def _number_labels(
    labels: dict[str, np.ndarray],
    num_classes: int | None,
    label_names: Sequence[str] | None,
    name: str,
    notes: dict[str, None],
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Labels (N,) int32 from 0, and the names of the classes."""
    values = np.unique(np.concatenate(list(labels.values())))
    if values.dtype.kind == "U":
        known = [str(value) for value in values] if label_names is None else list(label_names)
        for value in values:
            registry.check_known(f"label of {name}", [str(value)], known)
        first = ", ".join(f"{i} {label}" for i, label in enumerate(known[:3]))
        more = ", ..." if len(known) > 3 else ""
        notes[f"labels are strings, numbered {first}{more}"] = None
        numbers = {label: i for i, label in enumerate(known)}
        labels = {k: np.array([numbers[str(v)] for v in x], np.int64) for k, x in labels.items()}
        values, label_names = np.arange(len(known)), known
    if label_names is not None and num_classes not in (None, len(label_names)):
        raise ValueError(f"{name}: {len(label_names)} label names for {num_classes} classes")
    count = num_classes if label_names is None else len(label_names)
    low, high = int(values.min()), int(values.max())
    begins_at_one = low == 1 and (high == count or (count is None and len(values) == high))
    if begins_at_one:
        notes[f"labels began at 1: class 1 is now 0, and {high} is {high - 1}"] = None
        labels = {split: x - 1 for split, x in labels.items()}
        low, high = 0, high - 1
    if count is None and not begins_at_one and low > 0:
        raise ValueError(
            f"{name}: labels are {low}..{high} and none is 0: give num_classes, or number them "
            f"from 0"
        )
    count = high + 1 if count is None else count
    if low < 0 or high >= count:
        raise ValueError(f"{name}: labels must be in [0, {count}), got {low}..{high}")
    if count < 2:
        raise ValueError(f"{name}: all labels are {low}; a classifier needs two classes")
    if label_names is None:  # the labels as they were
        label_names = [str(label + begins_at_one) for label in range(count)]
    names = tuple(str(label) for label in label_names)
    return {split: x.astype(np.int32) for split, x in labels.items()}, names
