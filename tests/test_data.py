import subprocess
import sys

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from jaxdefense import data
from jaxdefense.data import datasets, order, pipeline, prepare, prepared


@pytest.fixture(scope="module")
def train(tfds_dir):
    return data.load("digits", "train", data_dir=tfds_dir)


def tiny(n, size=2, classes=3):
    """n images whose pixels and ids say which row they are."""
    rows = np.arange(n, dtype=np.int32)
    images = np.broadcast_to(rows[:, None, None, None], (n, size, size, 1)).astype(np.uint8)
    names = tuple("abc"[:classes])
    return data.Arrays(images, rows % classes, rows, classes, "tiny", names)


def ids(batches, step, n=1):
    """The ids of n global steps: (n, batch), devices' slices joined."""
    gather = jax.pmap(lambda r, c: jax.lax.map(lambda item: batches.gather(r, item)["id"], c))
    chunk = np.asarray(gather(batches.resident, batches.chunk(step, n)))
    return chunk.transpose(1, 0, 2).reshape(n, -1)


class TestOrder:
    def test_a_seed_means_the_same_order_on_every_machine(self):
        assert order.permutation(8, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
        assert order.permutation(8, 1, 2).tolist() == [4, 2, 0, 6, 1, 5, 7, 3]

    def test_is_a_permutation_that_depends_on_seed_and_stream(self):
        a, b, c = order.permutation(999, 3), order.permutation(999, 4), order.permutation(999, 3, 1)
        assert np.array_equal(np.sort(a), np.arange(999))
        assert (a != b).mean() > 0.9
        assert (a != c).mean() > 0.9

    def test_stratified_gives_each_class_its_share(self):
        labels = np.repeat(np.arange(4), (100, 200, 300, 400))
        rows = order.stratified(labels, 50, seed=0)
        assert np.array_equal(np.bincount(labels[rows]), [5, 10, 15, 20])
        assert np.array_equal(rows, np.unique(rows))
        assert not np.array_equal(rows, order.stratified(labels, 50, seed=1))

    def test_rejects_what_cannot_be(self):
        with pytest.raises(ValueError, match="seed"):
            order.permutation(5, -1)
        with pytest.raises(ValueError, match="cannot choose 6 of 5"):
            order.stratified(np.zeros(5, np.int32), 6, 0)


class TestLoad:
    def test_digits_are_scikit_learns_scans(self, tfds_dir):
        scans = load_digits()
        seen = []
        for split, n in (("train", 1167), ("validation", 130), ("test", 500)):
            arrays = data.load("digits", split, data_dir=tfds_dir)
            assert arrays.images.shape == (n, 8, 8, 1)
            assert np.array_equal(arrays.labels, scans.target[arrays.ids])
            pixels = np.round(scans.images[arrays.ids] * 255 / 16)
            assert np.array_equal(arrays.images[..., 0], pixels)
            assert np.ptp(np.bincount(arrays.labels, minlength=10) / n) < 0.02
            assert np.all(np.diff(arrays.ids) > 0)
            seen.append(arrays.ids)
        assert np.array_equal(np.sort(np.concatenate(seen)), np.arange(1797))

    @pytest.mark.parametrize(("validation", "n"), [(1, 1), (100, 100), (0.5, 648), (None, 130)])
    def test_train_and_validation_never_overlap(self, tfds_dir, validation, n):
        def split(name):
            options = {"data_dir": tfds_dir, "validation": validation, "seed": 7}
            return data.load("digits", name, **options).ids

        assert len(split("validation")) == n
        assert not np.intersect1d(split("train"), split("validation")).size
        assert len(split("train")) + n == 1297
        assert np.array_equal(split("validation"), split("validation"))

    def test_the_validation_split_depends_on_the_seed(self, tfds_dir):
        a, b = (data.load("digits", "validation", data_dir=tfds_dir, seed=s).ids for s in (0, 1))
        assert not np.array_equal(a, b)

    def test_no_validation(self, tfds_dir):
        assert len(data.load("digits", "train", data_dir=tfds_dir, validation=0)) == 1297
        for validation in (0, 0.0, 1297, 1.0, -1):
            with pytest.raises(ValueError, match=r"validation=.* of 1297"):
                data.load("digits", "validation", data_dir=tfds_dir, validation=validation)

    def test_unknown_names_list_the_nearest(self, tfds_dir):
        with pytest.raises(ValueError, match=r"unknown data set 'cifar'; nearest: cifar10"):
            data.load("cifar", "train", data_dir=tfds_dir)
        with pytest.raises(ValueError, match="unknown split 'valid'; nearest: validation"):
            data.load("digits", "valid", data_dir=tfds_dir)

    def test_what_is_not_prepared_says_how_to(self, tmp_path):
        command = f"experiments/prepare_data.py --data_dir {tmp_path} cifar10"
        with pytest.raises(ValueError, match=command):
            data.load("cifar10", "train", data_dir=tmp_path)

    def test_images_on_disk_equal_images_in_memory(self, tfds_dir, train):
        on_disk = data.load("digits", "train", data_dir=tfds_dir, in_memory=False)
        assert isinstance(on_disk.images, data.Encoded)
        rows = np.array([700, 3, 3, 1166])
        for chosen in (slice(5, 40, 3), rows):
            assert np.array_equal(on_disk.images[chosen], train.images[chosen])
        assert np.array_equal(on_disk.take(rows).images[:], train.take(rows).images)
        assert np.array_equal(on_disk.ids, train.ids)
        floats = data.to_float(on_disk.take(slice(40)).images)
        assert np.array_equal(floats, data.to_float(train.images[:40]))

    def test_loaded_arrays_cannot_be_changed(self, tfds_dir):
        test = data.load("digits", "test", data_dir=tfds_dir)
        with pytest.raises(ValueError, match="read-only"):
            test.images[0] = 0

    def test_the_data_dir_of_the_environment(self, tfds_dir, monkeypatch):
        monkeypatch.setenv("TFDS_DATA_DIR", tfds_dir)
        assert len(data.load("digits", "test")) == 500
        monkeypatch.delenv("TFDS_DATA_DIR")
        assert prepare.default_data_dir().name == "tensorflow_datasets"

    def test_never_imports_tensorflow(self, tfds_dir):
        code = (
            "import sys; from jaxdefense import data;"
            f"data.load('digits', 'train', data_dir={tfds_dir!r}, in_memory=False).images[:2];"
            "sys.exit('tensorflow' in sys.modules)"
        )
        subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


class TestDecodedCopy:
    """The decoded images beside the data set."""

    @pytest.fixture
    def copy(self, tmp_path, train):
        def load():
            datasets._open_prepared.cache_clear()
            prepared._decoded.cache_clear()
            arrays = data.load("digits", "train", data_dir=tmp_path)
            assert np.array_equal(arrays.images, train.images)
            assert np.array_equal(arrays.ids, train.ids)

        load()
        path = tmp_path / "digits" / "1.0.0-train.decoded.npz"
        assert path.is_file()
        return path, load

    def test_is_read_instead_of_the_records(self, copy, monkeypatch):
        _, load = copy
        monkeypatch.setattr(prepared, "_encoded", None)
        load()

    @pytest.mark.parametrize("position", [0, 100, 40_000, 80_000, -1000, -100, -20, -1])
    def test_may_be_damaged_anywhere(self, copy, position):
        path, load = copy
        damaged = bytearray(path.read_bytes())
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        load()

    def test_is_replaced_when_damaged(self, copy):
        path, load = copy
        sound = path.read_bytes()
        path.write_bytes(sound[:5000] + bytes([sound[5000] ^ 1]) + sound[5001:])
        load()
        assert path.read_bytes() == sound

    def test_is_replaced_when_cut_short(self, copy):
        path, load = copy
        sound = path.read_bytes()
        path.write_bytes(sound[:1000])
        load()
        assert path.read_bytes() == sound

    def test_is_replaced_when_the_records_changed(self, copy):
        path, load = copy
        before = path.read_bytes()
        next(path.parent.glob("1.0.0/*train*")).touch()
        load()
        assert path.read_bytes() != before

    def test_is_optional(self, copy):
        path, load = copy
        path.unlink()
        path.mkdir()  # cannot be read, nor replaced by a file
        load()
        assert sorted(p.name for p in path.parent.iterdir()) == [
            "1.0.0",
            "1.0.0-train.decoded.npz",
        ]


class TestArrays:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"images": np.zeros((4, 2, 2, 1), np.float32)}, "images must be uint8"),
            ({"images": np.zeros((4, 2, 2), np.uint8)}, r"images must be .*\(4, 2, 2\)"),
            ({"labels": np.zeros(3, np.int32)}, "labels must be int32"),
            ({"labels": np.zeros(4, np.int64)}, "labels must be int32"),
            ({"ids": np.zeros((4, 1), np.int32)}, "ids must be int32"),
            ({"labels": np.array([0, 1, 2, 3], np.int32)}, r"labels must be in \[0, 3\), got 0..3"),
            ({"labels": np.array([0, 1, 2, -1], np.int32)}, r"got -1..2"),
            ({"label_names": ("a",)}, "1 label names for 3 classes"),
        ],
    )
    def test_rejects(self, change, message):
        with pytest.raises(ValueError, match=message):
            data.Arrays(**(vars(tiny(4)) | change))

    def test_take_keeps_the_order_given(self):
        taken = tiny(9).take([7, 0, 7])
        assert taken.ids.tolist() == [7, 0, 7]
        assert taken.images[:, 0, 0, 0].tolist() == [7, 0, 7]
        assert taken.labels.tolist() == [1, 0, 1]
        assert len(tiny(9).take(slice(4))) == 4


class TestToFloat:
    def test_is_correctly_rounded_in_numpy_and_in_jit(self):
        values = np.arange(256, dtype=np.uint8)
        exact = (values / 255.0).astype(np.float32)
        for converted in (
            data.to_float(values),
            data.to_float(jax.numpy.asarray(values)),
            jax.jit(data.to_float)(values),
            jax.jit(lambda x: data.to_float(x) * 1)(values),
        ):
            assert converted.dtype == np.float32
            assert np.array_equal(converted, exact)

    def test_rejects_floats(self):
        with pytest.raises(ValueError, match="need uint8 images, got float32"):
            data.to_float(np.zeros(3, np.float32))


BOTH = pytest.mark.parametrize("kind", [data.OnDevice, data.Streaming])


@BOTH
class TestBatches:
    def test_an_epoch_has_every_example_once(self, kind):
        batches = kind(tiny(24), batch_size=8, seed=0)
        assert (batches.steps_per_epoch, batches.batch_size, batches.num_classes) == (3, 8, 3)
        epochs = ids(batches, 0, 6).reshape(2, 24)
        assert np.array_equal(np.sort(epochs), [np.arange(24)] * 2)
        assert not np.array_equal(*epochs)

    def test_what_is_dropped_differs_by_epoch(self, kind):
        batches = kind(tiny(27), batch_size=8, seed=0)
        assert batches.steps_per_epoch == 3
        epochs = ids(batches, 0, 30).reshape(10, 24)
        assert all(len(np.unique(epoch)) == 24 for epoch in epochs)
        assert len(np.unique(epochs)) == 27

    def test_fill_leaves_nobody_out(self, kind):
        batches = kind(tiny(27), batch_size=8, seed=0, remainder="fill")
        assert batches.steps_per_epoch == 4
        first = ids(batches, 0, 4).reshape(-1)
        assert np.array_equal(np.unique(first), np.arange(27))
        assert np.array_equal(first[27:], first[:5])

    def test_a_chunk_does_not_depend_on_what_was_asked_before(self, kind):
        fresh = kind(tiny(20), batch_size=4, seed=5)
        used = kind(tiny(20), batch_size=4, seed=5)
        for step, n in ((0, 2), (7, 3), (3, 4), (3, 1), (40, 2)):
            used.chunk(step, n)
        jax.tree.map(np.testing.assert_array_equal, fresh.chunk(3, 9), used.chunk(3, 9))

    def test_a_chunk_is_its_steps_in_order(self, kind):
        batches = kind(tiny(20), batch_size=4, seed=5)
        together = ids(batches, 3, 4)  # crosses the end of the first epoch
        assert np.array_equal(together, np.concatenate([ids(batches, s) for s in range(3, 7)]))

    def test_the_order_depends_on_the_seed(self, kind):
        a, b = (ids(kind(tiny(100), batch_size=100, seed=seed), 0) for seed in (0, 1))
        assert not np.array_equal(a, b)

    def test_gather_gives_floats_labels_and_ids_that_belong_together(self, kind, train):
        batches = kind(train, batch_size=64, seed=0)
        devices = jax.local_device_count()
        step = jax.pmap(lambda r, c: batches.gather(r, jax.tree.map(lambda x: x[1], c)))
        batch = step(batches.resident, batches.chunk(10, 2))
        assert batch["image"].shape == (devices, 64 // devices, 8, 8, 1)
        assert batch["image"].dtype == np.float32
        assert batch["label"].dtype == batch["id"].dtype == np.int32
        rows = np.searchsorted(train.ids, np.asarray(batch["id"]))
        assert np.array_equal(batch["label"], train.labels[rows])
        assert np.array_equal(batch["image"], train.images[rows] / np.float32(255))

    def test_processes_share_a_global_batch(self, kind, monkeypatch):
        device = jax.local_devices()[:1]
        options = {"batch_size": 8, "seed": 3, "devices": device}
        step = kind(tiny(24), **options)._schedule.local(4).reshape(-1)
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        parts = []
        for process in (0, 1):
            monkeypatch.setattr(jax, "process_index", lambda process=process: process)
            parts.append(kind(tiny(24), **options)._schedule.local(4))
        assert parts[0].shape == (1, 4)
        assert np.array_equal(np.concatenate(parts).reshape(-1), step)

    @pytest.mark.parametrize(
        ("n", "options", "message"),
        [
            (0, {}, "no examples to train on"),
            (7, {}, r"batch_size must be in 1..7 .* got 8"),
            (8, {"batch_size": 0}, r"batch_size must be in 1..8"),
            (8, {"seed": -1}, "seed must not be negative"),
            (8, {"remainder": "keep"}, "unknown remainder 'keep'"),
        ],
    )
    def test_rejects(self, kind, n, options, message):
        with pytest.raises(ValueError, match=message):
            kind(tiny(n), **({"batch_size": 8, "seed": 0} | options))

    def test_rejects_a_batch_that_does_not_divide(self, kind, monkeypatch):
        monkeypatch.setattr(jax, "process_count", lambda: 3)
        with pytest.raises(ValueError, match=r"batch_size 8 does not divide over \d+ devices"):
            kind(tiny(8), batch_size=8, seed=0)

    def test_rejects_steps_that_are_none(self, kind):
        batches = kind(tiny(8), batch_size=8, seed=0)
        for step, n in ((-1, 1), (0, 0)):
            with pytest.raises(ValueError, match="need a step of at least 0"):
                batches.chunk(step, n)


@pytest.mark.parametrize("remainder", ["drop", "fill"])
def test_streaming_and_on_device_batches_are_equal(tfds_dir, train, remainder):
    on_disk = data.load("digits", "train", data_dir=tfds_dir, in_memory=False)
    options = {"batch_size": 200, "seed": 11, "remainder": remainder}
    results = []
    for batches in (data.OnDevice(train, **options), data.Streaming(on_disk, **options)):
        gather = jax.pmap(lambda r, c, b=batches: jax.lax.map(lambda item: b.gather(r, item), c))
        results.append(gather(batches.resident, batches.chunk(4, 3)))
    jax.tree.map(np.testing.assert_array_equal, *results)


class TestTestBatches:
    @pytest.mark.parametrize("batch_size", [1, 4, 5, 10, 64])
    def test_every_example_counts_once_in_equal_shapes(self, batch_size):
        arrays = tiny(10)
        batches = list(pipeline.test_batches(arrays, batch_size))
        assert all(b["image"].shape == (batch_size, 2, 2, 1) for b in batches)
        whole = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
        kept = {k: v[whole["mask"]] for k, v in whole.items()}
        assert np.array_equal(kept["id"], arrays.ids)
        assert np.array_equal(kept["label"], arrays.labels)
        assert np.array_equal(kept["image"], data.to_float(arrays.images))
        assert np.all(whole["id"][~whole["mask"]] == 9)

    def test_rejects_at_the_call(self):
        for arrays, batch_size in ((tiny(0), 4), (tiny(4), 0)):
            with pytest.raises(ValueError, match="need examples and a positive batch size"):
                pipeline.test_batches(arrays, batch_size)
