"""Runs that start from the weights of another: whole, with a new head, in other roles, frozen."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from jaxdefense import data, runs, train
from jaxdefense.evaluation import protocols
from jaxdefense.runs import start


def config(tfds_dir, defense="standard", **options):
    return {
        "dataset": {"name": "digits", "data_dir": tfds_dir, "limit": 64},
        "model": {"name": "cnn", "width": 0.25},
        "threat": {"norm": "linf", "eps": 0.1},
        "defense": {"name": defense},
        "train": {
            "length": "2s",
            "batch_size": 32,
            "optimizer": {"name": "sgd", "lr": 0.1},
            **options,
        },
        "validation": {"name": "pgd", "steps": 1},
        "evaluation": {"attacks": {"fgsm": {"name": "fgsm"}}},
    }


@pytest.fixture(scope="module")
def trained(tfds_dir, tmp_path_factory):
    """(workdir, its params) of a run of two steps."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    train.train(config(tfds_dir), workdir, progress=False)
    return workdir, runs.restore(workdir).variables["params"]["classifier"]


def initial(tfds_dir, tmp_path, **options):
    trainer = train.loop.Trainer(runs.build(config(tfds_dir, **options)), tmp_path / "new")
    return trainer.initial_state().params


def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_whole(tfds_dir, tmp_path, trained):
    workdir, params = trained
    found = initial(tfds_dir, tmp_path, init_from={"workdir": str(workdir)})
    assert same(found["classifier"], params)
    assert not same(initial(tfds_dir, tmp_path)["classifier"], params)


def test_a_new_head(tfds_dir, tmp_path, trained):
    workdir, params = trained
    found = initial(tfds_dir, tmp_path, init_from={"workdir": str(workdir), "new_head": True})
    fresh = initial(tfds_dir, tmp_path)["classifier"]
    assert same(found["classifier"]["head"], fresh["head"])
    assert {k for k in params if same(params[k], found["classifier"][k])} == set(params) - {"head"}


def test_the_roles_of_a_contrast_and_back(tfds_dir, trained):
    """A classifier becomes encoder and head; the projector, which it lacks, starts anew."""
    workdir, params = trained
    found = start.load_start({"workdir": workdir})
    run = runs.build(config(tfds_dir, "supcon"))
    images = np.zeros((1, 8, 8, 1), np.float32)
    own, carry = run.init(images)
    taken, _ = found.apply(own, carry)
    assert same({**taken["encoder"], "head": taken["head"]}, params)
    assert same(taken["projector"], own["projector"])
    contrast = start.Start(taken, carry, False, "memory")
    back, _ = contrast.apply(*runs.build(config(tfds_dir)).init(images))
    assert same(back["classifier"], params)


def test_frozen_parts_stay(tfds_dir, tmp_path, trained):
    workdir, params = trained
    options = {"init_from": {"workdir": str(workdir)}, "frozen": ["classifier/conv1"]}
    train.train(config(tfds_dir, **options), tmp_path / "run", progress=False)
    after = runs.restore(tmp_path / "run").variables["params"]["classifier"]
    assert {k for k in params if same(params[k], after[k])} == {"conv1"}


def test_a_run_goes_on_without_its_starting_point(tfds_dir, tmp_path, trained, monkeypatch):
    """Once there is a checkpoint, the other run is not needed."""
    options = {"init_from": {"workdir": str(trained[0])}}
    train.train(config(tfds_dir, **options), tmp_path / "run", progress=False)
    monkeypatch.setattr(start, "load_start", None)
    assert train.train(config(tfds_dir, **options), tmp_path / "run", progress=False)["steps"] == 2


def test_a_torn_line_of_the_log_is_dropped(tfds_dir, tmp_path):
    """A full disk writes one; the run goes on, and its curve is read."""
    workdir = tmp_path / "run"
    train.train(config(tfds_dir), workdir, progress=False)
    log = workdir / "metrics.jsonl"
    before = log.read_text()
    log.write_bytes(before.encode() + b'\x00\x00{"step": 3, "tra')
    train.train(config(tfds_dir), workdir, progress=False)
    assert log.read_text() == before
    assert len(runs.restore(workdir).meta["validation"]) == 1


class Frozen(nn.Module):
    """A net with BatchNorm, all of whose encoder is frozen."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(2, (3, 3), (2, 2), name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, name="bn")(x)
        return nn.Dense(10)(x.reshape(len(x), -1))


class Other(nn.Module):
    """Not the network that was trained."""


class Probable(nn.Module):
    """A net that ends in a softmax."""

    @nn.compact
    def __call__(self, x):
        return nn.softmax(nn.Dense(10)(x.reshape(len(x), -1)))


def test_own_network_that_returns_probabilities_is_refused_before_its_training(tfds_dir, tmp_path):
    own = config(tfds_dir)
    del own["model"]
    message = r"model Probable\(.*\): predict returned probabilities .*: leave out the softmax"
    with pytest.raises(ValueError, match=message):
        train.train(own, tmp_path / "run", model=Probable(), progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_own_network_is_given_again_and_frozen_statistics_stay(tfds_dir, tmp_path):
    own = config(tfds_dir, frozen=["classifier/conv", "classifier/bn"])
    del own["model"]
    train.train(own, tmp_path / "run", model=Frozen(), progress=False)
    with pytest.raises(ValueError, match=r"Frozen.*cannot rebuild.* model="):
        runs.restore(tmp_path / "run")
    run, variables, _ = runs.restore(tmp_path / "run", model=Frozen())
    params, carry = run.init(np.zeros((1, 8, 8, 1), np.float32))
    assert same(variables["carry"], carry)
    assert not same(variables["params"]["classifier"]["head"], params["classifier"]["head"])
    with pytest.raises(ValueError, match=r"trained on Frozen.* and model= is Other"):
        runs.restore(tmp_path / "run", model=Other())
    with pytest.raises(ValueError, match="another one was given as model="):
        train.train(config(tfds_dir), tmp_path / "other", model=Frozen(), progress=False)
    assert not (tmp_path / "other").exists()


def own_splits(seed=0, size=8):
    rng = np.random.default_rng(seed)
    return data.from_arrays(rng.random((60, size, size, 1)), [*range(10)] * 6, test=0.2)


def test_own_images_are_given_again(tfds_dir, tmp_path):
    own = config(tfds_dir)
    del own["dataset"]
    train.train(own, tmp_path / "run", data=own_splits(), progress=False)
    with pytest.raises(
        ValueError, match=r"images \[.*cannot rebuild.* give runs.restore .and train. data="
    ):
        runs.restore(tmp_path / "run")
    run, variables, _ = runs.restore(tmp_path / "run", data=own_splits())
    assert len(run.arrays("test")) == 12
    assert protocols.configured(run, variables, training={})["name"] == "standard-own"
    with pytest.raises(ValueError, match=r"not what the run was trained on.* differs in sha256"):
        runs.restore(tmp_path / "run", data=own_splits(seed=1))
    whole = data.from_arrays(np.ones((60, 8, 8, 1)), [0, 1] * 30)
    with pytest.raises(ValueError, match=r"no test images: make it with test=0\.2"):
        train.train(own, tmp_path / "x", data=whole, progress=False)
    with pytest.raises(ValueError, match="another one was given as data="):
        train.train(config(tfds_dir), tmp_path / "x", data=own_splits(), progress=False)
    with pytest.raises(ValueError, match=r"data must be .train, validation, test."):
        train.train(own, tmp_path / "x", data=(np.zeros((2, 8, 8, 1)),) * 3, progress=False)
    mixed = (*own_splits()[:2], own_splits(size=6)[2])
    with pytest.raises(ValueError, match="splits differ in height"):
        train.train(own, tmp_path / "x", data=mixed, progress=False)
    assert not (tmp_path / "x").exists()


def test_a_file_is_a_starting_point(tfds_dir, tmp_path, trained):
    workdir, params = trained
    runs.export(tmp_path / "x.safetensors", *runs.restore(workdir))
    found = initial(tfds_dir, tmp_path, init_from={"file": str(tmp_path / "x.safetensors")})
    assert same(found["classifier"], params)
    run, variables, meta = runs.restore(workdir)
    broken = {**variables, "params": jax.tree.map(lambda x: x * np.nan, variables["params"])}
    runs.export(tmp_path / "nan.safetensors", run, broken, meta)
    with pytest.raises(ValueError, match=r"nan\.safetensors holds values that are not finite: .*/"):
        initial(tfds_dir, tmp_path, init_from={"file": str(tmp_path / "nan.safetensors")})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_from": "runs/x"}, "train.init_from must be a mapping"),
        ({"init_from": {"workdr": "x"}}, "nearest: workdir"),
        ({"init_from": {}, "frozen": "head"}, "train.frozen must be a list"),
        ({"frozen": ["clasifier"]}, "nearest: classifier"),
        ({"frozen": ["classifier"]}, "train.frozen leaves nothing to train: classifier"),
        ({"frozen": ["classifier/conv3"]}, "nearest: classifier/conv"),
        ({"init_from": {"workdir": "nowhere"}}, "nowhere has no checkpoint 'best'"),
    ],
)
def test_bad_options(tfds_dir, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train.train(config(tfds_dir, **options), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "config.json").exists()


def test_other_shapes_are_named(tfds_dir, tmp_path, trained):
    wide = config(tfds_dir, init_from={"workdir": str(trained[0])})
    wide["model"] = {"name": "cnn", "width": 0.5}
    with pytest.raises(ValueError, match=r"does not fit this run: classifier/conv1.* is .* there"):
        train.train(wide, tmp_path / "run", progress=False)
    shapes = {"classifier": {"head": {"kernel": np.zeros((4, 10))}}}
    found = start.Start({"classifier": {"head": {"kernel": np.zeros((4, 7))}}}, {}, False, "x")
    with pytest.raises(ValueError, match="new_head=true"):
        found.apply(shapes, {})
