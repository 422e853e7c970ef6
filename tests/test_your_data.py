"""Data of one's own: arrays, folders, files, whatever TFDS prepared, and images of 224 pixels."""

import io
import json
import struct

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jaxdefense import attacks, data, runs
from jaxdefense.data import arrays, crc32c, datasets, decoding, prepared
from jaxdefense.evaluation import cascade, protocols
from jaxdefense.train import train

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (40, 6, 5, 3), np.uint8)
LABELS = np.arange(40) % 4


def convert(images=COLOUR, labels=LABELS, **options):
    return data.from_arrays(images, labels, **{"validation": 0.25, "test": 8} | options)


class TestFromArrays:
    def test_splits_are_stratified_disjoint_and_keep_their_rows(self):
        train_set, validation, test = convert()
        assert [len(x) for x in (train_set, validation, test)] == [24, 8, 8]
        for split in (train_set, validation, test):
            assert np.bincount(split.labels).tolist() == [len(split) // 4] * 4
            assert np.array_equal(split.images, COLOUR[split.ids])
            assert np.array_equal(split.labels, LABELS[split.ids])
        ids = np.concatenate([x.ids for x in (train_set, validation, test)])
        assert np.array_equal(np.sort(ids), np.arange(40))

    def test_the_held_out_test_set_does_not_depend_on_the_seed(self):
        a, b = convert(seed=0), convert(seed=1)
        assert np.array_equal(a.test.ids, b.test.ids)
        assert not np.array_equal(a.validation.ids, b.validation.ids)

    def test_test_images_of_their_own(self):
        found = convert(test=(COLOUR[:5], LABELS[:5]))
        assert [len(x) for x in found] == [30, 10, 5]
        assert convert(test=None).test is None

    @pytest.mark.parametrize(
        ("images", "shape", "note"),
        [
            (COLOUR, (6, 5, 3), None),
            (COLOUR / np.float32(255), (6, 5, 3), "float images are rounded to 8 bits"),
            (COLOUR.astype(np.int64), (6, 5, 3), "int64 images in 0..255 became uint8"),
            (COLOUR.astype(np.float32), (6, 5, 3), "float32 images in 0..255 became uint8"),
            (COLOUR[..., 0], (6, 5, 1), "images (N, H, W) are grey: one channel"),
            (
                np.concatenate([COLOUR, COLOUR[..., :1]], -1),
                (6, 5, 3),
                "the last of 4 channels, transparency, is dropped",
            ),
        ],
    )
    def test_images_are_converted_and_it_is_said(self, images, shape, note):
        found = convert(images).train
        assert found.images.shape[1:] == shape
        assert np.array_equal(found.images, COLOUR[found.ids][..., : shape[-1]])
        said = [text for text in found.notes if "test set" not in text]
        assert said == ([note] if note else [])

    @pytest.mark.parametrize(
        ("labels", "names", "note"),
        [
            (LABELS, "0123", None),
            (LABELS[:, None], "0123", None),
            (LABELS.astype(float), "0123", None),
            (LABELS + 1, "1234", "labels began at 1: class 1 is now 0, and 4 is 3"),
            (np.eye(4)[LABELS], "0123", "one-hot labels of 4 columns became class numbers"),
            (
                np.array(list("abcd"))[LABELS],
                "abcd",
                "labels are strings, numbered 0 a, 1 b, 2 c, ...",
            ),
            (
                np.array([b"a", b"b", b"c", b"d"])[LABELS],
                "abcd",
                "labels are strings, numbered 0 a, 1 b, 2 c, ...",
            ),
        ],
    )
    def test_labels_are_converted_and_it_is_said(self, labels, names, note):
        found = convert(labels=labels).train
        assert found.labels.dtype == np.int32
        assert np.array_equal(found.labels, LABELS[found.ids])
        assert found.label_names == tuple(names)
        said = [text for text in found.notes if "test set" not in text]
        assert said == ([note] if note else [])

    def test_a_class_may_lack_examples_where_the_number_of_classes_is_given(self):
        assert convert(num_classes=9).train.num_classes == 9
        shifted = convert(labels=LABELS + 1, num_classes=9).train  # then 1 is not the first class
        assert np.array_equal(shifted.labels, LABELS[shifted.ids] + 1)

    @pytest.mark.parametrize(
        ("changes", "note"),
        [
            (
                {"labels": np.where(LABELS == 3, 9, LABELS), "num_classes": 17},
                "classes 3 to 8 and 10 to 16 have no image",
            ),
            ({"labels": LABELS + (LABELS > 1)}, "class 2 has no image"),
            (
                {"test": (COLOUR, LABELS + 1)},
                "the test images have classes that the training images lack: [4]; do the test "
                "labels begin at 1?",
            ),
            (
                {"test": (COLOUR, LABELS + (LABELS > 2))},
                "the test images have classes that the training images lack: [4]",
            ),
        ],
    )
    def test_suspicious_labels_are_said(self, changes, note):
        assert note in convert(**changes).train.notes

    def test_copies_are_said(self):
        fresh = RNG.integers(0, 256, (40, 6, 5, 3), np.uint8)
        both = convert(test=(np.concatenate([fresh[:7], COLOUR[:3]]), np.arange(10) % 4))
        for split in both:
            assert split.notes == ("3 of 10 test images are also training images",)
        twice = convert(np.concatenate([COLOUR, COLOUR[:2]]), np.arange(42) % 4, test=None)
        assert twice.train.notes == ("2 of 42 training images are copies of others",)
        many = np.arange(200 * 12).reshape(200, 2, 2, 3) % 251
        many[-2:] = many[:2]  # one per cent is no matter
        found = convert(many.astype(np.uint8), np.arange(200) % 4, test=(fresh[:, :2, :2], LABELS))
        assert found.test.notes == ()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"images": COLOUR.transpose(0, 3, 1, 2)},
                r"\(40, 3, 6, 5\) have their channels first: give images.transpose\(0, 2, 3, 1\)",
            ),
            ({"images": np.zeros((40, 6, 5, 7), np.uint8)}, "need 1 or 3 channels"),
            ({"images": COLOUR.reshape(40, -1)}, r"need images \(N, H, W, C\)"),
            ({"images": [np.zeros((2, 2)), np.zeros((3, 3))]}, "do they differ in size"),
            ({"images": COLOUR / 127.5 - 1}, r"float64 in \[-1, 1\]; a normalisation is part"),
            ({"images": COLOUR.astype(np.uint16) * 9}, "images must be uint8, integers in 0..255"),
            ({"images": COLOUR * np.float32(np.nan)}, "NaN"),
            ({"images": COLOUR / 255 / 255}, r"brighter than 0\.00\d+; divided by 255 twice\?"),
            (
                {"images": COLOUR // 16 / 255},
                r"brighter than 0\.0588; give images / images\.max",
            ),
            (
                {"images": (COLOUR // 16).astype(float)},
                r"no image is brighter than 15 of 255: give images / 15, floats in \[0, 1\]",
            ),
            ({"images": COLOUR // 16}, r"brighter than 15 of 255: give images / 15"),
            ({"images": COLOUR * 0}, "all images are black"),
            ({"images": (COLOUR > 9).astype(np.uint8)}, "values are 0 and 1 would be black"),
            ({"labels": LABELS[:-1]}, "40 images and 39 labels do not belong together"),
            ({"labels": LABELS + 2}, r"labels are 2..5 and none is 0"),
            ({"labels": LABELS - 1}, r"labels must be in \[0, 3\), got -1..2"),
            ({"labels": LABELS, "num_classes": 3}, r"labels must be in \[0, 3\), got 0..3"),
            ({"labels": np.full((40, 4), 0.25)}, "must be one-hot, and row 0 is not"),
            ({"labels": LABELS + 0.5}, "whole numbers"),
            ({"labels": LABELS * 0}, "needs two classes"),
            ({"labels": np.zeros((40, 2, 2))}, r"labels must be \(N,\)"),
            ({"label_names": ("a", "b")}, r"labels must be in \[0, 2\)"),
            (
                {"labels": np.array(list("abcd"))[LABELS], "label_names": list("abcx")},
                "unknown label of arrays 'd'",
            ),
            ({"test": (COLOUR[:2, :3], LABELS[:2])}, "differ in shape"),
            ({"test": (COLOUR[:2], ["a", "b"])}, "of different kinds"),
            ({"test": 40}, "test=40 holds out 40 of 40"),
            ({"validation": 32}, "validation=32 holds out 32 of 32"),
        ],
    )
    def test_refuses(self, changes, message):
        with pytest.raises(ValueError, match=message):
            convert(**changes)


def draw(path, size=(8, 8), mode="RGB", seed=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    pixels = rng.integers(0, 256, (*size, channels), np.uint8)
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(path, **options)
    return pixels


def make_folder(root, splits=("train", "test"), n=6, suffix="png", **options):
    """{relative path: pixels} of n images of each of two classes in each split."""
    made = {}
    for split in splits:
        for label in ("cat", "dog"):
            for i in range(n):
                path = root / split / label / f"{i}.{suffix}"
                made[str(path.relative_to(root))] = draw(path, seed=len(made), **options)
    return made


class TestFromFolder:
    def test_reads_every_image_once_with_its_class(self, tmp_path):
        made = make_folder(tmp_path)
        found = data.from_folder(tmp_path, validation=4)
        assert [len(split) for split in found] == [8, 4, 12]
        for splits, which in ((found[:2], "train"), (found[2:], "test")):
            images = np.concatenate([x.images for x in splits])
            labels = np.concatenate([x.labels for x in splits])
            names = {path: pixels for path, pixels in made.items() if path.startswith(which)}
            assert len(names) == len(images) == 12
            for path, pixels in names.items():
                (row,) = np.flatnonzero((images == pixels).all((1, 2, 3)))
                assert ("cat", "dog")[labels[row]] == path.split("/")[1]
        assert found.train.label_names == ("cat", "dog")
        assert found.train.notes == ()

    def test_hidden_files_are_left_out(self, tmp_path):
        make_folder(tmp_path)
        (tmp_path / "train" / "cat" / "._0.png").write_bytes(b"of macOS")
        found = data.from_folder(tmp_path)
        assert len(found.train) + len(found.validation) == 12

    def test_files_of_other_kinds_are_named(self, tmp_path):
        make_folder(tmp_path, n=2)
        assert data.from_folder(tmp_path).test.notes == ()
        for name in ("cat/a.bmp", "dog/b.WEBP", "dog/c.tif", "dog/d.gif", "dog/Thumbs.db"):
            (tmp_path / "train" / name).write_bytes(b"?")
        (tmp_path / "train" / "cat" / ".DS_Store").write_bytes(b"?")
        assert data.from_folder(tmp_path).test.notes == (
            "4 files are no PNG or JPEG and left out: train/cat/a.bmp, train/dog/b.WEBP, "
            "train/dog/c.tif, ...",
        )

    def test_copied_files_are_said(self, tmp_path):
        make_folder(tmp_path)
        for source, target in (("train/cat/0", "test/cat/x"), ("train/cat/1", "train/dog/y")):
            content = (tmp_path / f"{source}.png").read_bytes()
            (tmp_path / f"{target}.png").write_bytes(content)
        assert data.from_folder(tmp_path).test.notes == (
            "1 of 13 test images are also training images",
            "1 of 13 training images are copies of others",
        )

    def test_the_first_rows_are_a_fair_sample(self, tmp_path):
        make_folder(tmp_path, n=30)
        labels = data.from_folder(tmp_path).test.labels
        assert 4 <= labels[:20].sum() <= 16

    def test_a_folder_without_splits_holds_out_what_is_asked_for(self, tmp_path):
        make_folder(tmp_path, splits=[""], n=20)
        found = data.from_folder(tmp_path, test=0.25)
        assert len(found.test) == 10
        assert found.test.notes == ("10 of its 40 images are the test set: it has no split 'test'",)
        assert data.from_folder(tmp_path).test is None

    def test_splits_are_known_in_capitals_and_by_other_names(self, tmp_path):
        make_folder(tmp_path / "a", splits=("Train", "TEST"), n=4)
        make_folder(tmp_path / "b", splits=("training", "testing"), n=4)
        for name in ("a", "b"):
            found = data.from_folder(tmp_path / name)
            assert [len(x) for x in found] == [7, 1, 8]
            assert found.train.label_names == ("cat", "dog")
        make_folder(tmp_path / "b", splits=("Test",), n=4)
        with pytest.raises(ValueError, match="has a split twice: Test, testing, training"):
            data.from_folder(tmp_path / "b")

    def test_val_is_the_validation_set_beside_test_and_the_test_set_without(self, tmp_path):
        make_folder(tmp_path / "three", splits=("train", "val", "test"), n=4)
        assert [len(x) for x in data.from_folder(tmp_path / "three")] == [8, 8, 8]
        assert [len(x) for x in data.from_folder(tmp_path / "three", validation=2)] == [6, 2, 8]
        make_folder(tmp_path / "two", splits=("train", "val"), n=4)
        found = data.from_folder(tmp_path / "two", validation=2)
        assert [len(x) for x in found] == [6, 2, 8]
        assert found.test.notes == ("its split 'val' is the test set: it has no split 'test'",)

    def test_tiny_imagenet_as_it_is_published(self, tmp_path):
        lines = []
        for i in range(8):
            label = ("n01", "n02")[i % 2]
            draw(tmp_path / "train" / label / "images" / f"{label}_{i}.JPEG", seed=i)
            draw(tmp_path / "val" / "images" / f"val_{i}.JPEG", seed=50 + i)
            draw(tmp_path / "test" / "images" / f"test_{i}.JPEG", seed=100 + i)
            lines.append(f"val_{i}.JPEG\t{label}\t0\t0\t62\t62\n")
        annotations = tmp_path / "val" / "val_annotations.txt"
        annotations.write_text("".join(lines))
        found = data.from_folder(tmp_path)
        assert (len(found.train) + len(found.validation), len(found.test)) == (8, 8)
        assert found.test.labels.sum() == 4
        assert "its folder test/ has no labels and is left out" in found.test.notes
        annotations.write_text(lines[0].replace("val_0", "val_9"))
        with pytest.raises(ValueError, match=r"names val_9.JPEG, and there is no "):
            data.from_folder(tmp_path)

    def test_sizes(self, tmp_path):
        make_folder(tmp_path)
        draw(tmp_path / "train" / "cat" / "wide.jpg", size=(12, 20))
        with pytest.raises(ValueError, match=r"images of 2 sizes.*8x8 and wide.jpg of 12x20"):
            data.from_folder(tmp_path)
        found = data.from_folder(tmp_path, size=(4, 6))
        assert found.train.images.shape[1:] == (4, 6, 3)
        assert found.train.notes[0].startswith("its images are scaled to cover 4x6 (Pillow's")

    def test_kinds_of_images_are_mixed_and_it_is_said(self, tmp_path):
        make_folder(tmp_path)
        grey = draw(tmp_path / "test" / "cat" / "grey.png", mode="L", seed=99)
        clear = draw(tmp_path / "test" / "dog" / "clear.png", mode="RGBA", seed=98)
        test = data.from_folder(tmp_path).test
        for pixels in (np.repeat(grey, 3, -1), clear[..., :3]):
            assert (test.images == pixels).all((1, 2, 3)).sum() == 1
        assert test.notes == (
            "1 of its 26 images are grey: three equal channels",
            "1 of its images have transparency, which is dropped",
        )

    def test_grey_images_alone_have_one_channel(self, tmp_path):
        make_folder(tmp_path, mode="L")
        assert data.from_folder(tmp_path).train.images.shape[1:] == (8, 8, 1)

    def test_images_on_disk_equal_images_in_memory(self, tmp_path):
        make_folder(tmp_path)
        memory, disk = (
            data.from_folder(tmp_path, size=5, in_memory=m).train for m in (True, False)
        )
        assert isinstance(disk.images, data.Encoded)
        assert np.array_equal(disk.images[:], memory.images)
        assert np.array_equal(disk.labels, memory.labels)

    def test_what_is_too_large_stays_on_disk(self, tmp_path, monkeypatch):
        make_folder(tmp_path)
        monkeypatch.setattr(arrays, "IN_MEMORY", 12 * 8 * 8 * 3 - 1)
        assert isinstance(data.from_folder(tmp_path).test.images, data.Encoded)

    def test_a_folder_that_changed_is_read_again(self, tmp_path):
        make_folder(tmp_path)
        assert len(data.from_folder(tmp_path).test) == 12
        draw(tmp_path / "test" / "cat" / "new.png")
        assert len(data.from_folder(tmp_path).test) == 13

    def test_damaged_images_are_named(self, tmp_path):
        make_folder(tmp_path)
        path = tmp_path / "train" / "cat" / "0.png"
        sound = path.read_bytes()
        path.write_bytes(b"<html>404</html>")
        with pytest.raises(ValueError, match=f"^{path}: no PNG or JPEG image$"):
            data.from_folder(tmp_path)
        path.write_bytes(sound[: len(sound) // 2])
        with pytest.raises(ValueError, match=f"^{path}: damaged image: "):
            data.from_folder(tmp_path)
        disk = data.from_folder(tmp_path, validation=0.5, in_memory=False)
        with pytest.raises(ValueError, match=f"^{path}: damaged image: "):
            _ = [split.images[:] for split in disk]
        Image.fromarray(np.zeros((8, 8), np.uint16)).save(path)
        with pytest.raises(ValueError, match=f"{path}: images must have 8 bits"):
            data.from_folder(tmp_path)

    def test_wrong_layouts_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match=f"there is no folder {tmp_path}/none"):
            data.from_folder(tmp_path / "none")
        with pytest.raises(ValueError, match="expected as split/class/file or class/file"):
            data.from_folder(tmp_path)
        make_folder(tmp_path, splits=["test"])
        with pytest.raises(ValueError, match="has the splits test and no split train"):
            data.from_folder(tmp_path)
        make_folder(tmp_path)
        (tmp_path / "train" / "empty").mkdir()
        with pytest.raises(ValueError, match=r"empty holds no \.png"):
            data.from_folder(tmp_path)
        (tmp_path / "train" / "empty").rmdir()
        draw(tmp_path / "test" / "cow" / "0.png")
        with pytest.raises(ValueError, match="class 'cow' of split 'test' is not in train"):
            data.from_folder(tmp_path)


@pytest.mark.parametrize("size", [0, (1, 2, 3), "64", 2.5, (8, -1)])
def test_sizes_that_are_none_are_refused(size):
    with pytest.raises(ValueError, match="size must be pixels"):
        decoding.parse_size(size)


def test_a_palette_with_transparency_is_decoded():
    file = io.BytesIO()
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(file, "PNG", transparency=bytes([0, 128]))
    assert decoding.decode(file.getvalue(), (4, 4, 3))[0, 0].tolist() == [10, 20, 30]


def write_tfds(data_dir, name="my_set", config=None, version="1.0.0", splits=None, **features):
    """A set as TFDS prepares it: `splits` are {split: examples}."""
    shown = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(names=["cat", "dog"]),
    }

    class OfTest(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []
        url_infos = None

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features or shown),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(rows) for split, rows in splits.items()}

        def _generate_examples(self, rows):
            yield from enumerate(rows)

    OfTest.name = name
    builder = OfTest(data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
    return builder.data_path


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()  # a file would be empty when it is read again


def examples(n, size=(6, 5), seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (n, *size, 3), np.uint8)
    return [{"image": png(x), "label": i % 2} for i, x in enumerate(pixels)], pixels


def as_tfrecord(folder):
    """Rewrites a prepared set as TFRecord, as TFDS does by default."""
    builder = tfds.builder_from_directory(folder)
    raw = prepared.tfds_decode.DeserializeMethod.RAW_BYTES
    for split in builder.info.splits:
        records = list(builder.as_data_source(split, deserialize_method=raw))
        (path,) = builder.info.splits[split].filepaths
        target = folder / path.name.replace("array_record", "tfrecord")
        with open(target, "wb") as file:
            for record in records:
                length = struct.pack("<Q", len(record))
                for part in (length, record):
                    file.write(part + crc32c.masked([part]).tobytes())
        path.unlink()
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))


class TestPrepared:
    @pytest.mark.parametrize("kind", ["array_record", "tfrecord"])
    def test_any_image_set_of_tfds_is_read(self, kind, tmp_path):
        rows, pixels = examples(20)
        folder = write_tfds(tmp_path, splits={"train": rows[:15], "test": rows[15:]})
        if kind == "tfrecord":
            as_tfrecord(folder)
        test = data.load("my_set", "test", data_dir=tmp_path, size=(6, 5))
        assert {x.tobytes() for x in test.images} == {x.tobytes() for x in pixels[15:]}
        for image, label in zip(test.images, test.labels):
            (row,) = np.flatnonzero((pixels == image).all((1, 2, 3)))
            assert label == row % 2
        assert test.label_names == ("cat", "dog")
        assert len(data.load("my_set", "train", data_dir=tmp_path, size=8, validation=3)) == 12
        disk = data.load("my_set", "test", data_dir=tmp_path, size=(6, 5), in_memory=False)
        assert np.array_equal(disk.images[:], test.images)
        assert data.names(tmp_path).count("my_set") == 1

    def test_the_checksum_is_that_of_tfrecord(self):
        # CRC-32C of 32 zero bytes is 8a9136aa (RFC 3720), which TFRecord rotates and shifts.
        crc = 0x8A9136AA
        masked = (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
        assert crc32c.masked([bytes(32)]).tolist() == [masked]

    @pytest.mark.parametrize("lengths", [(4, 9, 511, 512, 513, 2000), (4,), (600, 4)])
    def test_checksums_of_many_are_those_of_each_byte_by_byte(self, lengths, monkeypatch):
        monkeypatch.setattr(crc32c, "_AT_ONCE", 3000)  # some are divided
        rng = np.random.default_rng(0)
        contents = [rng.bytes(length) for length in lengths]
        for content, found in zip(contents, crc32c.masked(contents).tolist(), strict=True):
            crc = 0xFFFFFFFF
            for byte in content:
                crc ^= byte
                for _ in range(8):
                    crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
            crc ^= 0xFFFFFFFF
            assert found == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda x: x[:-6], "is cut short"),
            (lambda x: b"\x05" + x[1:], "is damaged at byte 0"),
            (lambda x: x[:20] + bytes([x[20] ^ 1]) + x[21:], "is damaged at byte 12"),
        ],
    )
    def test_damaged_tfrecords_are_named(self, damage, message, tmp_path):
        folder = write_tfds(tmp_path, splits={"train": examples(8)[0]})
        as_tfrecord(folder)
        (path,) = folder.glob("*.tfrecord*")
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(ValueError, match=f"{path} {message}.*; remove {folder}, and"):
            data.load("my_set", "train", data_dir=tmp_path, size=6)

    def test_versions_configs_and_names(self, tmp_path):
        for version, n in (("1.2.0", 8), ("1.10.0", 9)):
            write_tfds(tmp_path, version=version, splits={"train": examples(n)[0]})
        options = {"data_dir": tmp_path, "size": 6, "validation": 0}
        assert len(data.load("my_set", "train", **options)) == 9  # the newest
        assert len(data.load("my_set:1.2.0", "train", **options)) == 8
        for config in ("small", "large"):
            write_tfds(tmp_path, "two", config, splits={"train": examples(8)[0]})
        with pytest.raises(ValueError, match="several configs, name one: two/large, two/small"):
            data.load("two", "train", **options)
        assert data.load("two/small", "train", **options).name == "two/small"
        with pytest.raises(ValueError, match="unknown data set 'my_sett'; nearest: my_set"):
            data.load("my_sett", "train", **options)
        with pytest.raises(ValueError, match=r"eurosat is not prepared .*prepare_data.py"):
            data.load("eurosat", "train", **options)

    def test_splits(self, tmp_path):
        rows, _ = examples(20)
        write_tfds(tmp_path, "one", splits={"train": rows})
        options = {"data_dir": tmp_path, "size": 6}
        with pytest.raises(
            ValueError, match=r"one has no test images; hold some out with test=0.2"
        ):
            data.load("one", "test", **options)
        sizes = [len(data.load("one", split, test=0.2, **options)) for split in arrays.SPLITS]
        assert sizes == [14, 2, 4]
        write_tfds(tmp_path, "none", splits={"full": rows})
        with pytest.raises(ValueError, match="none has no split 'train', only full"):
            data.load("none", "train", **options)
        write_tfds(tmp_path, "both", splits={"train": rows, "test": rows})
        with pytest.raises(ValueError, match="both has test images, its split 'test'"):
            data.load("both", "test", test=0.2, **options)

    def test_sets_that_are_no_image_classification_say_what_they_hold(self, tmp_path):
        text = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(num_classes=2)}
        write_tfds(tmp_path, splits={"train": [{"text": "x", "label": 0}]}, **text)
        with pytest.raises(
            ValueError, match=r"needs one image .* label \(ClassLabel\), text \(Text\)"
        ):
            data.load("my_set", "train", data_dir=tmp_path)
        (tmp_path / "my_set" / "1.0.0" / "features.json").write_text("{")
        datasets._open_prepared.cache_clear()
        with pytest.raises(ValueError, match="my_set: TFDS cannot read"):
            data.load("my_set", "train", data_dir=tmp_path)


def small_config(dataset, **train_options):
    return {
        "dataset": dataset,
        "model": {"name": "cnn", "width": 0.125},
        "threat": {"norm": "linf", "eps": 0.03},
        "defense": {"name": "pgd_at", "steps": 1},
        "train": {
            "length": "2s",
            "batch_size": 4,
            "optimizer": {"name": "sgd", "lr": 0.01},
            "steps_per_dispatch": 2,
            "validate_every": "2s",
            "checkpoint_every": "2s",
            **train_options,
        },
        "validation": {"name": "pgd", "steps": 1},
        "evaluation": {
            "batch_size": 4,
            "attacks": {"fgsm": {"name": "fgsm"}},
            "audit": {"steps": 1, "restarts": 1, "stages": [], "queries": 2},
        },
    }


class TestConfigs:
    def test_a_folder_and_a_file_give_the_same_run(self, tmp_path):
        made = make_folder(tmp_path / "pets")
        by_folder = runs.build(small_config({"folder": str(tmp_path / "pets"), "validation": 4}))
        assert by_folder.name == "pgd_at-folder"
        splits = [by_folder.arrays(split) for split in arrays.SPLITS]
        whole = [
            np.concatenate([getattr(x, what) for x in splits[:2]]) for what in ("images", "labels")
        ]
        path = tmp_path / "pets.npz"
        test = {"test_images": splits[2].images, "test_labels": splits[2].labels}
        np.savez(path, images=whole[0], labels=whole[1], label_names=["cat", "dog"], **test)
        dataset = {"name": "arrays", "file": str(path), "validation": 4, "limit": 8}
        by_file = runs.build(small_config(dataset))
        assert np.array_equal(by_file.arrays("test").images, splits[2].images[:8])
        assert by_file.arrays("test").label_names == ("cat", "dog")
        assert len(by_file.arrays("train")) + len(by_file.arrays("validation")) == 12
        assert len(made) == 24

    def test_whether_there_are_test_images_is_known_without_reading_them(self, tmp_path):
        make_folder(tmp_path / "two", n=1)
        make_folder(tmp_path / "one", splits=["train"], n=1)
        assert data.has_test({"folder": str(tmp_path / "two")})
        section = {"folder": str(tmp_path / "one"), "test": None}
        assert not data.has_test(section)
        assert data.has_test({**section, "test": 0.5})

    @pytest.mark.parametrize(
        ("dataset", "message"),
        [
            ({"name": "folder"}, r"needs its path: --config.dataset.folder=PATH"),
            ({"name": "arrays", "file": None}, r"needs its path: --config.dataset.file=PATH"),
            ({"name": "folder", "folder": "nowhere"}, "there is no folder nowhere"),
            ({"name": "arrays", "file": "no.npz"}, "no.npz is no .npz file that can be read"),
            (
                {"name": "folder", "fodler": "x"},
                "unknown option of dataset 'fodler'; nearest: folder",
            ),
            ({"name": "digits", "folder": "x"}, "unknown option of dataset 'folder'"),
            ({"name": "digitz"}, "unknown data set 'digitz'; nearest: digits"),
        ],
    )
    def test_wrong_sections_are_refused_before_anything_is_compiled(self, dataset, message):
        with pytest.raises(ValueError, match=message):
            runs.build(small_config(dataset))

    def test_wrong_files_are_refused(self, tmp_path):
        path = tmp_path / "x.npz"
        for held, message in (
            ({"image": COLOUR, "labels": LABELS}, "unknown array in .* nearest: images"),
            ({"images": COLOUR}, "needs the arrays images and labels; it holds images"),
            (
                {"images": COLOUR, "labels": LABELS, "test_images": COLOUR},
                "needs the arrays test_images and test_labels",
            ),
            ({"images": COLOUR, "labels": np.array([{}] * 40)}, "no .npz file that can be read"),
        ):
            np.savez(path, **held)
            with pytest.raises(ValueError, match=message):
                data.load_section({"name": "arrays", "file": str(path)}, "train")
        one = tmp_path / "one.npy"
        np.save(one, COLOUR)
        with pytest.raises(ValueError, match=r"one\.npy holds one array.*savez\('one\.npz'"):
            data.load_section({"name": "arrays", "file": str(one)}, "train")
        path.write_bytes(b"PK")
        with pytest.raises(ValueError, match=r"no \.npz file that can be read"):
            data.load_section({"name": "arrays", "file": str(path)}, "train")


@pytest.mark.slow
def test_photographs_of_224_pixels_run_through_train_autoattack_and_audit(
    tmp_path, capsys, monkeypatch
):
    """Read from disk while training, as a set larger than memory is."""
    make_folder(tmp_path / "photos", n=4, suffix="jpg", size=(230, 250))
    dataset = {
        "name": "folder",
        "folder": str(tmp_path / "photos"),
        "size": 224,
        "in_memory": False,
    }
    config = small_config({**dataset, "validation": 2}, augment="crop_flip")
    train(config, tmp_path / "run", progress=False)
    assert "its images are scaled to cover 224x224" in capsys.readouterr().err
    run, variables, meta = runs.restore(tmp_path / "run", kind="last")
    assert run.arrays("test").images.shape == (8, 224, 224, 3)
    stages = [
        cascade.Stage("apgd-ce", attacks.apgd(run.threat, steps=2), 3, 2),
        cascade.Stage("square", attacks.square(run.threat, queries=3), 4, 0),
    ]
    monkeypatch.setattr(cascade, "stages", lambda *arguments, **options: stages)
    record = protocols.autoattack(run, variables, training=meta)
    assert record["results"]["classifier"]["autoattack"]["n"] == 8
    audit = protocols.audit(run, variables, training=meta, examples=4)
    for found in (record, audit):
        assert found["dataset"]["notes"] == list(run.arrays("test").notes)
        assert json.dumps(found)


def test_large_images_are_judged_in_smaller_batches(tmp_path):
    make_folder(tmp_path)
    run = runs.build(small_config({"folder": str(tmp_path), "validation": 4}))
    assert run.judging_batch((9, 64, 64, 3)) == 512
    assert run.judging_batch((9, 224, 224, 3)) == 4  # the config's own
    run.config["evaluation"].pop("batch_size")
    assert run.judging_batch((9, 224, 224, 3)) == 41
    assert run.judging_batch((9, 4000, 4000, 3)) == 8
