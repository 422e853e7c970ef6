"""Damaged files: each ends in one line that names the file, or in exactly the right result."""

import pathlib
import random
import shutil
import time

import damages
import jax
import numpy as np
import pytest
from test_train import config

from jaxdefense import train
from jaxdefense.runs import checkpoint

# Arrays that are still being read when another one fails report to a closed event loop.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module", autouse=True)
def _await_readers():
    """The last of them have reported before another file's tests begin."""
    yield
    time.sleep(0.2)


@pytest.fixture(scope="module")
def trained(tfds_dir, tmp_path_factory):
    """A finished run whose best checkpoint is older than its last one."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    values = config(tfds_dir, **{"train.optimizer": {"name": "sgd", "lr": 0.05}})
    train.train(values, workdir, progress=False)
    return workdir, values


@pytest.fixture
def workdir(trained, tmp_path):
    """A copy of the run, to be damaged."""
    return pathlib.Path(shutil.copytree(trained[0], tmp_path / "run"))


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_equal(one, two):
    for a, b in zip(leaves(one), leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


def outcome(function):
    """(The one line of the ValueError that a call raises, None) or (None, what it returns)."""
    try:
        return None, function()
    except ValueError as error:
        (line,) = str(error).splitlines()
        return line, None


def read(folder):
    """Everything that a checkpoint of `last` or `best` holds."""
    store = checkpoint.Store(folder)
    try:
        trees = ("model", "optimizer") if folder.name == "last" else ("model",)
        return store.meta(), {name: store.restore_as_saved(name) for name in trees}
    finally:
        store.close()


@pytest.mark.parametrize("kind", ["best", "last"])
@pytest.mark.parametrize("damage", damages.KINDS)
def test_each_file_of_a_checkpoint(trained, tmp_path, kind, damage):
    """A damaged file is found, or is one that no array uses: the reader does not tell which."""
    meta, trees = read(trained[0] / kind)
    rng, refused = random.Random(0), 0
    for file in damages.files_in(trained[0] / kind):
        copy = pathlib.Path(shutil.copytree(trained[0] / kind, tmp_path / kind))
        told = damages.damage(copy / file.relative_to(trained[0] / kind), damage, rng)
        error, found = outcome(lambda copy=copy: read(copy))
        if error is None:
            assert found[0] == meta, told
            assert_equal(found[1], trees)
        else:
            refused += 1
            assert str(copy) in error, told
        shutil.rmtree(copy)
    assert refused >= 3  # the metadata, and files of arrays


def flip_weights(folder):
    """Flips one bit of the file that holds the arrays' values: the largest."""
    file = max(damages.files_in(folder), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 4] ^= 1
    file.write_bytes(content)
