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


def cases():
    """(file, stages): everything, but a residual network's later stages take minutes."""
    for path in FILES:
        long = "cifar10" in path.stem
        if long:
            yield pytest.param(path, STAGES[:1], id=f"{path.stem}-{STAGES[0]}")
        yield pytest.param(path, STAGES, id=path.stem, marks=[pytest.mark.slow] if long else [])


def judge(path, stages):
    """AutoAttack's verdict on the file's images."""
    golden = read(path)
    images = golden["images"].astype(np.float32) / 255
    return evaluation.autoattack(
        predictor(golden),
        images,
        golden["labels"][: len(images)],
        threat.make(str(golden["norm"]), golden["eps"].item()),
        attacks=stages,
    )


@pytest.mark.parametrize(("path", "stages"), [*cases()])
def test_the_verdicts_are_still_those(path, stages, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")  # so much computing pays for a process with optimised code
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        verdict = pool.submit(judge, path, stages).result()
    golden, n = read(path), len(verdict.clean)
    np.testing.assert_array_equal(verdict.clean, golden["clean"][:n])
    for stage in stages:  # another machine's rounding may turn one image
        differ = np.flatnonzero(verdict.by_attack[stage] != golden[f"ours {stage}"][:n])
        assert len(differ) <= 1, (stage, differ)


def test_there_are_golden_files():
    assert FILES
