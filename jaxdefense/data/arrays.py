"""A split of a data set as arrays, and how a set is divided into train, validation and test."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from jaxdefense import registry, validate
from jaxdefense.data import decoding, order

SPLITS = ("train", "validation", "test")
# What TFDS and folders call the split in between.
_VALIDATION_NAMES = ("validation", "val", "valid", "dev")
# A set whose decoded images take more bytes stays on disk unless asked for otherwise.
IN_MEMORY = 2 << 30


class Source(Protocol):
    """Encoded images by row: files of a folder, or records that TFDS wrote."""

    def read(self, rows: np.ndarray) -> Iterable[bytes]:
        """The encoded images of `rows`, in order.

        Args:
          rows: integers.
        """
        ...

    def describe(self, row: int) -> str:
        """Where an image is, for an error.

        Args:
          row: of the source.
        """
        ...


class Encoded:
    """Images on disk: read like an (N, H, W, C) uint8 array, each decoded when asked for.

    Args:
      source: the encoded images.
      rows: (N,) integers, where in `source` each image is.
      shape: (H, W, C); images of another size are resized, see `decoding.decode`.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, source: Source, rows: np.ndarray, shape: tuple[int, int, int]) -> None:
        self._source = source
        self._rows = rows
        self.shape = (len(rows), *shape)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        """The decoded images of `rows`: (n, H, W, C) uint8."""
        positions = self._rows[rows]
        shape = self.shape[1:]
        images = np.empty((len(positions), *shape), np.uint8)
        for image, row, encoded in zip(images, positions, self._source.read(positions)):
            try:
                image[:] = decoding.decode(encoded, shape)
            except ValueError as error:
                raise ValueError(f"{self._source.describe(int(row))}: {error}") from error
        return images

    def take(self, rows: np.ndarray, axis: int = 0) -> "Encoded":
        """The chosen rows, still encoded.

        Args:
          rows: integers.
          axis: 0; it is here because NumPy's `take` has it.
        """
        del axis
        return Encoded(self._source, self._rows[rows], self.shape[1:])


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
    """A split of a data set.

    Attributes:
      images: (N, H, W, C) uint8, in memory or on disk.
      labels: (N,) int32, each in [0, num_classes).
      ids: (N,) int32, one per example of the split that the rows come from.
      num_classes: K.
      name: the data set's.
      label_names: K names.
      notes: what was done to the data to make them so: a resize, labels renumbered, a split that
        serves as another. Scripts print them and records keep them.

    Raises:
      ValueError: another shape or dtype, or a label out of range.
    """

    images: np.ndarray | Encoded
    labels: np.ndarray
    ids: np.ndarray
    num_classes: int
    name: str
    label_names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            got = f"{self.images.dtype} {self.images.shape}"
            raise ValueError(
                f"{self.name}: images must be uint8 (N, H, W, C), got {got}; "
                f"data.from_arrays converts others"
            )
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


class Splits(NamedTuple):
    """A data set's three splits.

    Attributes:
      train: what is trained on.
      validation: what is held out of it, to choose a checkpoint by.
      test: None where the set has no test images and none were held out.
    """

    train: Arrays
    validation: Arrays
    test: Arrays | None


class Roles(NamedTuple):
    """Which stored split serves as which.

    Attributes:
      name: of the data set.
      train: its name.
      validation: its name; None where it is held out of `train`.
      test: its name; None where it is held out of `train`.
      notes: what is to be said of that.
    """

    name: str
    train: str
    validation: str | None
    test: str | None
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class HoldOut:
    """How many training images are held out, and by which seed.

    Attributes:
      validation: a number (int) or a share (float) of the training images; None for the set's own
        validation split, or else 2 %, 10 % of fewer than 10,000.
      test: likewise, for sets without test images; None for none. It does not depend on the seed.
      seed: of the validation split.
    """

    validation: int | float | None = None
    test: int | float | None = None
    seed: int = 0

    def check(self) -> None:
        """Checks that these are numbers of the right kind; how many rows there are is not asked.

        Raises:
          ValueError: a seed that has not 32 bits, or a text, NaN or infinity held out.
        """
        validate.check_seed("seed", self.seed)
        for name, value in (("validation", self.validation), ("test", self.test)):
            validate.check_types("dataset", {name: value}, {name: int | float | None})


def assign_roles(name: str, stored: Iterable[str]) -> Roles:
    """Which of the stored splits is trained on, validated on and tested on.

    Args:
      name: of the data set, for errors.
      stored: the splits that it has.

    Raises:
      ValueError: no split called train.

    >>> from jaxdefense.data import arrays
    >>> arrays.assign_roles("imagenette", ["train", "validation"]).test
    'validation'
    """
    stored = list(stored)
    if "train" not in stored:
        raise ValueError(f"{name} has no split 'train', only {', '.join(stored) or 'none'}")
    between = next((split for split in _VALIDATION_NAMES if split in stored), None)
    if "test" in stored:
        return Roles(name, "train", between, "test", ())
    if between is None:
        return Roles(name, "train", None, None, ())
    note = f"its split {between!r} is the test set: it has no split 'test'"
    return Roles(name, "train", None, between, (note,))


def choose_split(
    split: str, roles: Roles, read: Callable[[str], Arrays], hold_out: HoldOut
) -> Arrays:
    """One of the splits 'train', 'validation' and 'test' of a set.

    Held-out rows are a seeded stratified choice of the stored training images.

    Args:
      split: which.
      roles: of the stored splits.
      read: the arrays of a stored split.
      hold_out: how many images are held out.

    Raises:
      ValueError: an unknown split, no test images, `test` where there are some, or held-out rows
        that are none or all.
    """
    if split not in SPLITS:
        registry.raise_unknown("split", split, SPLITS)
    hold_out.check()
    if roles.test and hold_out.test is not None:
        raise ValueError(
            f"{roles.name} has test images, its split {roles.test!r}: test={hold_out.test} is for "
            f"sets without"
        )
    if split == "test" and roles.test:
        return _with_notes(read(roles.test), roles.notes)
    if split == "validation" and roles.validation and hold_out.validation is None:
        return _with_notes(read(roles.validation), roles.notes)
    arrays = _with_notes(read(roles.train), roles.notes)
    if hold_out.test is not None:
        rows = _held_out(arrays, "test", hold_out.test, 0)
        note = f"{len(rows)} of its {len(arrays)} images are the test set: it has no split 'test'"
        arrays = _with_notes(arrays, (note,))
        if split == "test":
            return arrays.take(rows)
        arrays = arrays.take(np.setdiff1d(np.arange(len(arrays)), rows))
    elif split == "test":
        raise ValueError(
            f"{arrays.name} has no test images; hold some out with test=0.2 (in a config "
            f"dataset.test=0.2)"
        )
    if roles.validation and hold_out.validation is None:
        return arrays
    if hold_out.validation == 0 and split == "train":
        return arrays
    rows = _held_out(arrays, "validation", hold_out.validation, hold_out.seed)
    if split == "validation":
        return arrays.take(rows)
    return arrays.take(np.setdiff1d(np.arange(len(arrays)), rows))


def choose_splits(roles: Roles, read: Callable[[str], Arrays], hold_out: HoldOut) -> Splits:
    """All splits of a set, see `choose_split`.

    Args:
      roles: of the stored splits.
      read: the arrays of a stored split.
      hold_out: how many images are held out.
    """
    train, validation = (
        choose_split(split, roles, read, hold_out) for split in ("train", "validation")
    )
    has_test = roles.test or hold_out.test is not None
    test = choose_split("test", roles, read, hold_out) if has_test else None
    return Splits(train, validation, test)


def _with_notes(arrays: Arrays, notes: tuple[str, ...]) -> Arrays:
    return dataclasses.replace(arrays, notes=arrays.notes + notes) if notes else arrays


def _held_out(arrays: Arrays, what: str, asked: int | float | None, seed: int) -> np.ndarray:
    """The rows held out of the training images."""
    n = len(arrays)
    if asked is None:
        count = max(1, round((0.02 if n >= 10_000 else 0.1) * n))
    else:
        count = round(asked * n) if isinstance(asked, float) else asked
    if not 0 < count < n:
        raise ValueError(
            f"{arrays.name}: {what}={asked} holds out {count} of {n} training examples"
        )
    return order.stratified(arrays.labels, count, seed)
