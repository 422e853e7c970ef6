"""AutoAttack against the verdicts of torch's, kept by experiments/benchmark --golden.

Each file holds a network's weights, its verdicts here, in the authors' code and in torchattacks on
the same images, and the first images; the library must still come to the same verdicts on those.
"""

import concurrent.futures
import multiprocessing
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdefense import evaluation, models, threat

FILES = sorted((pathlib.Path(__file__).parent / "golden").glob("*.npz"))
STAGES = ("apgd-ce", "apgd-t", "fab-t", "square")


def read(path):
    with np.load(path) as file:
        return dict(file)


def predictor(golden):
    """The network with the file's weights."""
    name, width = str(golden["model"]), golden["width"].item()
    variables = {}
    for path, weights in golden.items():
        if path.startswith("variables/"):
            *folders, leaf = path.split("/")[1:]
            node = variables
            for folder in folders:
                node = node.setdefault(folder, {})
            node[leaf] = jnp.asarray(weights, jnp.float32)
    net = models.make(name, 10, width=width)
    return lambda x: net.apply(variables, x)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_torchs_verdicts_are_within_two_tenths_of_a_point(path):
    golden = read(path)
    assert len(golden["labels"]) >= 500
    for peer in ("reference", "torchattacks"):
        ours, theirs = golden["ours square"].mean(), golden[f"{peer} square"].mean()
        assert abs(ours - theirs) <= 0.002 + 1e-9, (peer, ours, theirs)


def chosen(golden, count):
    """Indices of images that AutoAttack turns and of others, at most so many of each."""
    robust = golden["ours square"][: len(golden["images"])].astype(bool)
    return np.sort(
        np.concatenate([np.flatnonzero(~robust)[:count], np.flatnonzero(robust)[:count]])
    )


def judge(path, stages, count):
    """(indices, AutoAttack's verdict) of some of the file's images."""
    golden = read(path)
    which = chosen(golden, count)
    verdict = evaluation.autoattack(
        predictor(golden),
        golden["images"][which].astype(np.float32) / 255,
        golden["labels"][which],
        threat.make(str(golden["norm"]), golden["eps"].item()),
        attacks=stages,
        ids=which,
        batch_size=len(which),
    )
    return which, verdict


def check(path, stages, which, verdict):
    """Another machine's rounding may turn one image."""
    golden = read(path)
    np.testing.assert_array_equal(verdict.clean, golden["clean"][which])
    for stage in stages:
        differ = np.flatnonzero(verdict.by_attack[stage] != golden[f"ours {stage}"][which])
        assert len(differ) <= 1, (stage, which[differ])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_verdicts_on_some_images_are_still_those(path):
    """All stages for the MNIST network; a residual network's later ones take minutes."""
    stages = STAGES[:1] if "cifar10" in path.stem else STAGES
    which, verdict = judge(path, stages, 6)
    assert 0 < verdict.robust.sum() < len(which)
    check(path, stages, which, verdict)


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_all_verdicts_are_still_those(path, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")  # so much computing pays for a process with optimised code
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        which, verdict = pool.submit(judge, path, STAGES, 64).result()
    assert len(which) == 64
    check(path, STAGES, which, verdict)


def test_there_are_golden_files():
    assert FILES
