"""Prepares data sets for TFDS without TensorFlow, a network, or pickle.

`digits` is our own builder over scikit-learn's bundled scans, and Tiny-ImageNet, which TFDS does
not know, another. The others are TFDS's standard builders fed with the original distribution files
(`originals.py`), from a folder or downloaded; what they write is what plain
`tfds.builder(name, file_format='array_record')` expects to find. Any other set is prepared by TFDS
itself, which may need TensorFlow for that.
"""

import contextlib
import io
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf import json_format

from jaxdefense import checksums, registry, validate
from jaxdefense.data import order, prepared
from jaxdefense.data.originals import ORIGINALS, Keyed, download, png, read_class_names

FORMAT = "array_record"


def originals() -> list[str]:
    """The data sets that `prepare` builds from original files, sorted."""
    return sorted(ORIGINALS)


def is_known(name: object) -> bool:
    """Whether `prepare` could prepare a data set of this name: one of ours or of TFDS.

    Args:
      name: as a user gives it, perhaps with /CONFIG or :VERSION.
    """
    path = str(name).partition(":")[0]
    if not prepared.stays_below(path):
        return False
    base = path.partition("/")[0]
    return base in ORIGINALS or base in tfds.list_builders(with_community_datasets=False)


def default_data_dir(data_dir: str | os.PathLike | None = None) -> pathlib.Path:
    """TFDS's folder: `data_dir`, else $TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Args:
      data_dir: any path, or None.
    """
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return validate.check_folder("data_dir", pathlib.Path(chosen).expanduser())


def is_prepared(name: str, data_dir: str | os.PathLike | None = None) -> bool:
    """Whether a data set is prepared, in the version that `prepare` writes.

    Args:
      name: one of `originals()`.
      data_dir: see `default_data_dir`.
    """
    return _is_written(_builder(name, default_data_dir(data_dir)))


def detect(source: str | os.PathLike) -> list[str]:
    """The data sets whose original files' folder exists, sorted.

    Args:
      source: see `prepare`.
    """
    root = pathlib.Path(source)
    return [name for name in originals() if (root / ORIGINALS[name].folder).is_dir()]


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
            example = {"id": f"{split}_{row:05d}", "image": png(image), "label": int(label)}
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
        return _write(
            lambda folder: Digits(data_dir=folder, file_format=FORMAT), default_data_dir(data_dir)
        )
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "sklearn":
            raise
        raise ValueError(
            "preparing 'digits' needs scikit-learn: pip install 'jaxdefense[digits]'"
        ) from error


class TinyImagenet(tfds.core.GeneratorBasedBuilder):
    """64x64 photographs of 200 classes, 500 of each to train on and 50 to validate.

    `prepare` says where the examples come from. The published test images have no labels and are
    left out. Classes are WordNet ids, sorted.
    """

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Tiny-ImageNet of Stanford's course CS231n.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(64, 64, 3), encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(num_classes=200),
                }
            ),
            supervised_keys=("image", "label"),
            homepage=ORIGINALS["tiny_imagenet"].page,
        )


def prepare(
    name: str,
    source: str | os.PathLike | None = None,
    data_dir: str | os.PathLike | None = None,
) -> pathlib.Path:
    """Prepares one data set; does nothing if it is there.

    Args:
      name: one of `originals()`, or any other set of TFDS, which TFDS then downloads.
      source: holds `mnist/` and `fashion_mnist/` (four IDX .gz files each),
        `cifar-10-batches-bin/` and `cifar-100-binary/` (the binary versions), `svhn/` (two .mat
        files), `imagenette2-160/`, `tiny-imagenet-200/`; None to download the files.
      data_dir: TFDS's folder; default $TFDS_DATA_DIR or ~/tensorflow_datasets.

    Returns:
      The folder of the prepared set, data_dir/name/version.

    Raises:
      ValueError: unknown name, no network, a set that TFDS cannot prepare here, or an original file
        that is missing or damaged.
    """
    folder = default_data_dir(data_dir)
    ours = "imagenette" if name == ORIGINALS["imagenette"].builder else name
    if ours not in ORIGINALS:
        if source is not None or not is_known(name):
            registry.raise_unknown("data set with original files", name, ORIGINALS)
        return _prepare_by_tfds(name, folder)
    if _is_written(final := _open_builder(lambda where: _builder(ours, where), folder)):
        return pathlib.Path(final.data_path)
    with contextlib.ExitStack() as stack:
        if source is None:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = tempfile.TemporaryDirectory(prefix=".downloading-", dir=folder)
            source = stack.enter_context(temporary)
            download(ours, pathlib.Path(source))
        files = pathlib.Path(source) / ORIGINALS[ours].folder
        return _write(lambda where: _builder(ours, where, files), folder)


def _prepare_by_tfds(name: str, data_dir: pathlib.Path) -> pathlib.Path:
    """What TFDS downloads and prepares itself."""
    builder = tfds.builder(name, data_dir=data_dir, file_format=FORMAT)
    try:
        return _write(
            lambda folder: tfds.builder(name, data_dir=folder, file_format=FORMAT), data_dir
        )
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{name}: TFDS needs {error.name} to prepare it: pip install {error.name}; or copy a "
            f"folder that TFDS prepared elsewhere to {builder.data_path}"
        ) from error
    except Exception as error:  # a builder's own code may raise anything: no network, a full disk
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise ValueError(
            f"{name}: TFDS could not prepare it ({reason}); its home is {builder.info.homepage}, "
            f"and a folder that TFDS prepared elsewhere may be copied to {builder.data_path}"
        ) from error


def _builder(
    name: str, data_dir: str | os.PathLike, files: pathlib.Path | None = None
) -> tfds.core.DatasetBuilder:
    """The standard builder, but for where its examples come from: name and features stay."""
    base, _, config = (ORIGINALS[name].builder or name).partition("/")
    standard: Any = TinyImagenet if base == "tiny_imagenet" else tfds.builder_cls(base)

    class FromOriginals(standard, skip_registration=True):  # type: ignore[call-arg]
        __module__ = standard.__module__
        url_infos = None

        def _split_generators(self, dl_manager: object) -> dict[str, Iterator[Keyed]]:
            del dl_manager  # nothing to download
            assert files is not None
            for feature, names in read_class_names(name, files).items():
                self.info.features[feature].names = sorted(names) if counted else names
            splits = ORIGINALS[name].read(name, files)
            return {split: self._generate_examples(rows) for split, rows in splits.items()}

        def _generate_examples(self, rows: Iterator[Keyed]) -> Iterator[Keyed]:
            yield from rows

    counted = bool(ORIGINALS[name].counts)  # files by class: their names sorted, as of a folder
    FromOriginals.name = base
    options = {"config": config} if config else {}
    return FromOriginals(data_dir=data_dir, file_format=FORMAT, **options)


def _open_builder(
    make_builder: Callable[[str | os.PathLike], tfds.core.DatasetBuilder], data_dir: pathlib.Path
) -> tfds.core.DatasetBuilder:
    """A builder, which reads what is prepared already."""
    try:
        return make_builder(data_dir)
    except json_format.ParseError as error:
        raise ValueError(
            f"a dataset_info.json in {data_dir} is damaged ({checksums.shorten(error)}); remove "
            f"its folder and prepare the set again"
        ) from error


def _is_written(builder: tfds.core.DatasetBuilder) -> bool:
    return (pathlib.Path(builder.data_path) / "dataset_info.json").is_file()


def _write(
    make_builder: Callable[[str | os.PathLike], tfds.core.DatasetBuilder], data_dir: pathlib.Path
) -> pathlib.Path:
    """Prepares a builder's data set in a temporary folder and renames it: whole or not there."""
    final = _open_builder(make_builder, data_dir)
    target = pathlib.Path(final.data_path)
    if _is_written(final):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        told = f"{error.strerror} (TFDS_DATA_DIR names another place for data sets)"
        raise OSError(error.errno, told, os.fspath(data_dir)) from error
    with tempfile.TemporaryDirectory(prefix=".preparing-", dir=data_dir) as temporary:
        builder = make_builder(temporary)
        # TFDS announces a download on stdout, and there is none.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
        written = pathlib.Path(builder.data_path)
        small = sorted(path for path in written.iterdir() if path.suffix in (".json", ".txt"))
        (written / checksums.LISTING).write_text(checksums.list_files(small))
        try:
            os.rename(written, target)
        except OSError as error:
            # Another process may have prepared the same set in the meantime.
            if not _is_written(final):
                raise ValueError(
                    f"{target} is damaged: it has no dataset_info.json; "
                    f"{prepared.explain_repair(final.name, target)}"
                ) from error
    return target
