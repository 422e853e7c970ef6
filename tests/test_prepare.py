import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request

import configs
import numpy as np
import prepare_data
import pytest
import scipy.io
import tensorflow_datasets as tfds
from PIL import Image

from jaxdefense import data, runs
from jaxdefense.data import originals, prepare
from jaxdefense.train import train

PACKED = pathlib.Path(__file__).parents[2] / "shared" / "data"
needs_packed = pytest.mark.skipif(
    not (PACKED / "unpack.py").is_file(), reason=f"the packed data sets are not in {PACKED}"
)


def idx(array):
    header = struct.pack(">HBB", 0, 8, array.ndim)
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder, rng):
    """A tiny MNIST: (images, labels) by split, and the bytes of each file, uncompressed."""
    contents, splits = {}, {}
    for split, prefix, n in (("train", "train", 30), ("test", "t10k", 12)):
        images = rng.integers(0, 256, (n, 28, 28), np.uint8)
        labels = rng.integers(0, 10, n, np.uint8)
        contents[f"{prefix}-images-idx3-ubyte.gz"] = idx(images)
        contents[f"{prefix}-labels-idx1-ubyte.gz"] = idx(labels)
        splits[split] = {"image": images[..., None], "label": labels}
    for name, content in contents.items():
        (folder / name).write_bytes(gzip.compress(content))
    return splits, contents


def write_cifar(folder, rng, name):
    """A tiny CIFAR in the binary version: one row of bytes per image."""
    batches = {"cifar10": [f"data_batch_{i}.bin" for i in range(1, 6)], "cifar100": ["train.bin"]}
    test = {"cifar10": "test_batch.bin", "cifar100": "test.bin"}[name]
    columns = {"label": 10} if name == "cifar10" else {"coarse_label": 20, "label": 100}
    contents, splits = {}, {}
    for split, files in (("train", batches[name]), ("test", [test])):
        parts = []
        for file in files:
            images = rng.integers(0, 256, (4, 32, 32, 3), np.uint8)
            labels = {c: rng.integers(0, k, 4, np.uint8) for c, k in columns.items()}
            planes = images.transpose(0, 3, 1, 2).reshape(4, -1)
            contents[file] = np.column_stack([*labels.values(), planes]).tobytes()
            parts.append({"image": images} | labels)
        splits[split] = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
    for file, content in contents.items():
        (folder / file).write_bytes(content)
    names = {"batches.meta.txt": 10} if name == "cifar10" else {}
    names = names or {"fine_label_names.txt": 100, "coarse_label_names.txt": 20}
    for file, n in names.items():
        (folder / file).write_text("".join(f"class_{i}\n" for i in range(n)))
    return splits, contents


def write_svhn(folder, rng):
    """A tiny SVHN: MATLAB files, images last, the digit 0 as label 10."""
    contents, splits = {}, {}
    for split in ("train", "test"):
        images = rng.integers(0, 256, (12, 32, 32, 3), np.uint8)
        labels = rng.permutation(np.arange(12) % 10)
        path = folder / f"{split}_32x32.mat"
        y = np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)
        scipy.io.savemat(path, {"X": images.transpose(1, 2, 3, 0), "y": y})
        contents[path.name] = path.read_bytes()
        splits[split] = {"image": images, "label": labels}
    return splits, contents


def save_jpeg(path, rng, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(path, "JPEG")
    with Image.open(path) as image:
        return np.asarray(image)


def write_imagenette(folder, rng):
    """A tiny ImageNette: JPEG files of several sizes, in folders of ten classes."""
    standard = tfds.builder("imagenette/160px-v2", data_dir=folder).info.features["label"]
    splits = {}
    for split, own in (("train", "train"), ("validation", "val")):
        images, labels = [], []
        for i in range(20):
            label = standard.names[i % 10]
            path = folder / own / label / f"{label}_{i}.JPEG"
            images.append(save_jpeg(path, rng, (160, 160 + i)))
            labels.append(i % 10)
        splits[split] = {"image": images, "label": np.array(labels)}
    return splits, {}


def write_tiny_imagenet(folder, rng):
    """A tiny Tiny-ImageNet: its three folders, their layouts, and images of one channel too."""
    wnids = [f"n{i:08d}" for i in rng.permutation(200)]
    (folder / "wnids.txt").write_text("\n".join(wnids) + "\n")
    train, val, boxes = {"image": [], "label": []}, {"image": [], "label": []}, []
    for i, wnid in enumerate(sorted(wnids)):
        path = folder / "train" / wnid / "images" / f"{wnid}_0.JPEG"
        train["image"].append(save_jpeg(path, rng, (64, 64)))
        train["label"].append(i)
        if i < 10:
            path = folder / "val" / "images" / f"val_{i}.JPEG"
            val["image"].append(save_jpeg(path, rng, (64, 64)))
            val["label"].append(i)
            boxes.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t62\t62\n")
            save_jpeg(folder / "test" / "images" / f"test_{i}.JPEG", rng, (64, 64))
    (folder / "val" / "val_annotations.txt").write_text("".join(boxes))
    return {"train": train, "validation": val}, {}


WRITERS = {
    "mnist": write_idx,
    "fashion_mnist": write_idx,
    "cifar10": lambda folder, rng: write_cifar(folder, rng, "cifar10"),
    "cifar100": lambda folder, rng: write_cifar(folder, rng, "cifar100"),
    "svhn_cropped": write_svhn,
    "imagenette": write_imagenette,
    "tiny_imagenet": write_tiny_imagenet,
}
# Those of which every image of a split is as large as the others, and TFDS has a builder.
SAME_SIZE = [name for name in WRITERS if name not in ("imagenette", "tiny_imagenet")]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Writes tiny originals whose sums and counts stand in for the published ones."""

    def write(name):
        rng = np.random.default_rng(0)
        original = originals.ORIGINALS[name]
        folder = tmp_path / "originals" / original.folder
        folder.mkdir(parents=True)
        splits, contents = WRITERS[name](folder, rng)
        sums = {file: hashlib.md5(content).hexdigest() for file, content in contents.items()}
        counts = {split: len(splits[split]["label"]) for split in original.counts}
        changed = dataclasses.replace(original, sums=sums, counts=counts)
        monkeypatch.setitem(originals.ORIGINALS, name, changed)
        return folder, splits

    return write


@pytest.mark.parametrize("name", SAME_SIZE)
def test_plain_tfds_reads_what_was_prepared(name, tiny, tmp_path):
    folder, splits = tiny(name)
    written = prepare.prepare(name, folder.parent, tmp_path / "tfds")
    builder = tfds.builder(name, data_dir=tmp_path / "tfds", file_format="array_record")
    standard = tfds.builder(name, data_dir=tmp_path / "none")
    assert written == tmp_path / "tfds" / name / str(standard.version)
    assert repr(builder.info.features) == repr(standard.info.features)
    for split, columns in splits.items():
        examples = list(builder.as_data_source(split))
        n = len(columns["label"])
        assert len(examples) == n
        if "mnist" not in name:  # ids are rows
            examples.sort(key=lambda example: example["id"])
            assert examples[2]["id"].startswith(f"{split}_0000".encode())
            for column, expected in columns.items():
                found = np.stack([example[column] for example in examples])
                assert np.array_equal(found, expected)
        else:
            found = {(e["image"].tobytes(), int(e["label"])) for e in examples}
            assert found == {(i.tobytes(), int(k)) for i, k in zip(*columns.values())}
    assert len(builder.as_data_source("train[:50%]")) == len(splits["train"]["label"]) // 2
    loaded = data.load(name, "test", data_dir=tmp_path / "tfds")
    assert loaded.num_classes == standard.info.features["label"].num_classes
    if "mnist" not in name:
        assert np.array_equal(loaded.images, splits["test"]["image"])
        assert np.array_equal(loaded.labels, splits["test"]["label"])
    if "cifar" in name:
        assert loaded.label_names[3] == "class_3"


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("imagenette/160px-v2", {"size": 160}, (160, 160, 3)),
        ("imagenette", {"size": 32}, (32, 32, 3)),  # its one config
        ("tiny_imagenet", {}, (64, 64, 3)),
    ],
)
def test_sets_of_jpeg_files_are_prepared_and_read(name, options, shape, tiny, tmp_path):
    base = name.partition("/")[0]
    folder, splits = tiny(base)
    prepare.prepare(name, folder.parent, tmp_path / "tfds")
    test = data.load(name, "test", data_dir=tmp_path / "tfds", **options)
    assert test.images.shape == (len(splits["validation"]["label"]), *shape)
    assert sorted(test.labels) == sorted(splits["validation"]["label"])
    assert any("split 'validation' is the test set" in note for note in test.notes)
    own = splits["validation"]["image"]
    if base == "tiny_imagenet":
        assert {image.tobytes() for image in test.images} == {image.tobytes() for image in own}
        assert (test.num_classes, test.label_names) == (200, tuple(sorted(test.label_names)))
    elif shape[0] == 160:  # an even number of columns too many is cut without rounding
        cropped = {x[:, i // 2 : i // 2 + 160].tobytes() for i, x in enumerate(own) if i % 2 == 0}
        assert len(cropped) == 10
        assert cropped <= {image.tobytes() for image in test.images}
        with pytest.raises(ValueError, match="images of several sizes: give size"):
            data.load(name, "test", data_dir=tmp_path / "tfds")


@pytest.mark.parametrize(
    ("row", "name", "shape", "classes"),
    [
        ("svhn", "svhn_cropped", (32, 32, 3), 10),
        ("imagenette", "imagenette", (160, 160, 3), 10),
        ("tiny_imagenet", "tiny_imagenet", (64, 64, 3), 200),
    ],
)
@pytest.mark.slow
def test_the_recipe_of_a_set_trains_on_it(row, name, shape, classes, tiny, tmp_path):
    folder, _ = tiny(name)
    prepare.prepare(name, folder.parent, tmp_path / "tfds")
    config = json.loads(configs.load("standard", f"{row}_debug").to_json())
    config["dataset"] |= {"data_dir": str(tmp_path / "tfds"), "validation": 4}
    config["model"] = {"name": "cnn", "width": 0.125}
    config["train"] |= {"length": "3s", "batch_size": 4, "steps_per_dispatch": 3}
    config["train"] |= {"validate_every": "3s", "checkpoint_every": "3s"}
    config["validation"]["steps"] = 1
    run = runs.build(config)
    assert run.arrays("test").images.shape[1:] == shape
    assert run.arrays("test").num_classes == classes
    assert train(config, tmp_path / "run", progress=False)["steps"] == 3


def test_a_missing_jpeg_is_noticed(tiny, tmp_path):
    folder, _ = tiny("tiny_imagenet")
    next(folder.glob("train/*/images/*.JPEG")).unlink()
    with pytest.raises(ValueError, match="has 199 images for train, not 200"):
        prepare.prepare("tiny_imagenet", folder.parent, tmp_path / "tfds")
    assert not prepare.is_prepared("tiny_imagenet", tmp_path / "tfds")


def test_is_idempotent_and_leaves_nothing_else(tiny, tmp_path):
    folder, _ = tiny("mnist")
    first = prepare.prepare("mnist", folder.parent, tmp_path / "tfds")
    times = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    shutil.rmtree(folder)  # the originals are not needed again
    assert prepare.prepare("mnist", folder.parent, tmp_path / "tfds") == first
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == times
    assert [path.name for path in (tmp_path / "tfds").iterdir()] == ["mnist"]
    assert [path.name for path in (tmp_path / "tfds" / "mnist").iterdir()] == ["3.0.1"]


def test_an_interruption_leaves_nothing_half_written(tiny, tmp_path, monkeypatch):
    folder, _ = tiny("mnist")

    def interrupt(image):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(originals, "png", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare("mnist", folder.parent, tmp_path / "tfds")
    assert not list((tmp_path / "tfds").rglob("*.*"))
    assert not prepare.is_prepared("mnist", tmp_path / "tfds")
    prepare.prepare("mnist", folder.parent, tmp_path / "tfds")
    assert prepare.is_prepared("mnist", tmp_path / "tfds")


def test_two_processes_may_prepare_at_once(tmp_path, monkeypatch):
    rename = os.rename

    def lose_the_race(source, target):
        if ".preparing-" not in str(target):  # the last step, out of the temporary folder
            shutil.copytree(source, target)
        rename(source, target)

    monkeypatch.setattr(prepare.os, "rename", lose_the_race)
    folder = prepare.prepare_digits(tmp_path)
    monkeypatch.undo()
    assert (folder / "dataset_info.json").is_file()
    assert len(data.load("digits", "test", data_dir=tmp_path)) == 500


def damage_gzip(folder):
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    return path


def damage_not_gzip(folder):
    path = folder / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(b"<html>404</html>")
    return path


def damage_pixel(folder):
    path = folder / "t10k-images-idx3-ubyte.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[-1] ^= 1
    path.write_bytes(gzip.compress(content))
    return path


def remove(folder):
    path = folder / "train-labels-idx1-ubyte.gz"
    path.unlink()
    return path


def remove_folder(folder):
    shutil.rmtree(folder)
    return folder / "train-images-idx3-ubyte.gz"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_gzip, "damaged"),
        (damage_not_gzip, "damaged"),
        (damage_pixel, "damaged .*: MD5 [0-9a-f]{32}, not [0-9a-f]{32}"),
        (remove, "missing"),
        (remove_folder, "missing"),
    ],
)
def test_a_damaged_original_is_named(tiny, tmp_path, damage, message):
    folder, _ = tiny("mnist")
    path = damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        prepare.prepare("mnist", folder.parent, tmp_path / "tfds")
    assert str(path) in str(error.value)
    assert not prepare.is_prepared("mnist", tmp_path / "tfds")


@pytest.mark.parametrize("text", [None, "cat\ndog\n"])
def test_damaged_class_names_are_named(tiny, tmp_path, text):
    folder, _ = tiny("cifar10")
    path = folder / "batches.meta.txt"
    path.unlink()
    if text:
        path.write_text(text)
    message = "damaged .*: 2 class names, not 10" if text else "missing"
    with pytest.raises(ValueError, match=message) as error:
        prepare.prepare("cifar10", folder.parent, tmp_path / "tfds")
    assert str(path) in str(error.value)


def test_an_unknown_name_lists_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="nearest: mnist"):
        prepare.prepare("minst", tmp_path)


def test_digits_without_scikit_learn_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "sklearn.datasets", raising=False)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match=r"pip install 'jaxdefense\[digits\]'"):
        prepare.prepare_digits(tmp_path)


class TestDownload:
    """Without a network; `urlopen` answers with files, or not at all."""

    def archive(self, folder, target):
        with tarfile.open(target, "w:gz") as packed:
            packed.add(folder, folder.name)

    def test_originals_are_downloaded_checked_and_prepared(self, tiny, tmp_path, monkeypatch):
        folder, splits = tiny("cifar10")
        archive = tmp_path / "cifar-10-binary.tar.gz"
        self.archive(folder, archive)
        asked = []

        def urlopen(url, timeout):
            asked.append(url)
            return open(archive, "rb")

        monkeypatch.setattr(urllib.request, "urlopen", urlopen)
        with pytest.raises(ValueError, match=r"damaged: sha256 .*, not c4a38c50"):
            prepare.prepare("cifar10", None, tmp_path / "tfds")
        assert list((tmp_path / "tfds").iterdir()) == []
        sums = {archive.name: ("sha256", hashlib.sha256(archive.read_bytes()).hexdigest())}
        changed = dataclasses.replace(originals.ORIGINALS["cifar10"], archive_sums=sums)
        monkeypatch.setitem(originals.ORIGINALS, "cifar10", changed)
        prepare.prepare("cifar10", None, tmp_path / "tfds")
        assert asked == ["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"] * 2
        assert [path.name for path in (tmp_path / "tfds").iterdir()] == ["cifar10"]
        loaded = data.load("cifar10", "test", data_dir=tmp_path / "tfds")
        assert np.array_equal(loaded.images, splits["test"]["image"])

    @pytest.mark.parametrize("name", prepare.originals())
    def test_without_a_network_one_line_says_where_the_files_are(
        self, name, tmp_path, monkeypatch, capsys
    ):
        def urlopen(url, timeout):
            raise urllib.error.URLError("no route to host")

        monkeypatch.setattr(urllib.request, "urlopen", urlopen)
        assert prepare_data.main(["--data_dir", str(tmp_path), name]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert originals.ORIGINALS[name].page in error
        assert f"--from DIR {name}" in error
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("error", "said"),
        [
            (ConnectionError("no network"), r"prepare it \(no network\); its home is http"),
            (ModuleNotFoundError("No", name="tensorflow"), "pip install tensorflow"),
        ],
    )
    def test_other_sets_are_prepared_by_tfds(self, error, said, tmp_path, monkeypatch):
        def fail(self, **options):
            (self.data_path / "half").mkdir(parents=True)
            raise error

        monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
        with pytest.raises(ValueError, match=said):
            prepare.prepare("eurosat", None, tmp_path)
        assert not [path for path in tmp_path.rglob("*") if "half" in path.name]
        assert "eurosat" not in data.names(tmp_path)

    def test_unknown_names_and_names_without_originals(self, tmp_path):
        with pytest.raises(ValueError, match=r"unknown data set .* 'minst'; nearest: mnist"):
            prepare.prepare("minst", None, tmp_path)
        with pytest.raises(ValueError, match="with original files 'eurosat'"):
            prepare.prepare("eurosat", tmp_path, tmp_path)


class TestCommand:
    def test_prepares_what_the_folder_holds(self, tiny, tmp_path, capsys):
        folder, _ = tiny("mnist")
        tiny("cifar10")
        arguments = ["--from", str(folder.parent), "--data_dir", str(tmp_path / "tfds")]
        assert prepare_data.main(arguments) == 0
        out = capsys.readouterr().out.splitlines()
        assert out == [
            f"cifar10: {tmp_path / 'tfds' / 'cifar10' / '3.0.2'}",
            f"mnist: {tmp_path / 'tfds' / 'mnist' / '3.0.1'}",
        ]

    def test_reports_errors_in_one_line(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
        assert prepare_data.main(["--from", str(tmp_path)]) == 1
        assert "holds none of cifar10" in capsys.readouterr().err
        assert prepare_data.main(["--from", str(tmp_path), "mnist"]) == 1
        assert "mnist: missing original file" in capsys.readouterr().err

    def test_help_is_readable(self, capsys):
        with pytest.raises(SystemExit) as end:
            prepare_data.main(["--help"])
        assert end.value.code == 0
        assert "cifar-10-batches-bin/" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "said"), [([], "name a data set"), (["--form", "x"], "nearest: --from")]
    )
    def test_wrong_arguments_are_said_in_one_line(self, arguments, said, capsys):
        with pytest.raises(SystemExit) as end:
            prepare_data.main(arguments)
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.startswith("error: ")
        assert error.count("\n") == 1


def check_published(name, tmp_path):
    """Unpacks the published files, prepares them, and reads the same bytes back."""
    subprocess.run([sys.executable, "-B", "unpack.py", str(tmp_path), name], cwd=PACKED, check=True)
    prepare.prepare(name, tmp_path, tmp_path / "tfds")
    arguments = "import sys, numpy, load; numpy.savez(sys.argv[2], *load.load(sys.argv[1], {!r}))"
    for split in ("train", "test"):
        out = tmp_path / f"{split}.npz"
        command = [sys.executable, "-B", "-c", arguments.format(split), name, str(out)]
        subprocess.run(command, cwd=PACKED, check=True)
        with np.load(out) as expected:
            images, labels = expected["arr_0"], expected["arr_1"]
        arrays = data.load(name, split, data_dir=tmp_path / "tfds", validation=0)
        if "mnist" in name:  # ids are rows of TFDS's order: compare as sets of examples
            assert examples(arrays.images, arrays.labels) == examples(images, labels)
        else:
            assert np.array_equal(arrays.images, images)
            assert np.array_equal(arrays.labels, labels)


def examples(images, labels):
    return sorted(zip(labels.tolist(), (image.tobytes() for image in images)))


@pytest.mark.slow
@needs_packed
def test_the_published_mnist(tmp_path):
    check_published("mnist", tmp_path)


@needs_packed
@pytest.mark.slow
@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10", "cifar100"])
def test_the_other_published_sets(name, tmp_path):
    check_published(name, tmp_path)
