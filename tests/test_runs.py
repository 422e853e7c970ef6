"""A config becomes a run: what it checks, what it is called, what is read back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdefense import runs, train
from jaxdefense.defenses import base, transforms
from jaxdefense.runs import checkpoint, run


def config(tfds_dir, **changes):
    return {
        "dataset": {"name": "digits", "data_dir": tfds_dir, "limit": 64},
        "model": {"name": "cnn", "width": 0.25},
        "threat": {"norm": "linf", "eps": 0.1},
        "defense": {"name": "standard"},
        "train": {"length": "2s", "batch_size": 32, "optimizer": {"name": "sgd", "lr": 0.1}},
        "validation": {"name": "pgd", "steps": 1},
        "evaluation": {"attacks": {"fgsm": {"name": "fgsm"}}},
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(evaluation={}), r"needs a section 'evaluation\.attacks'"),
        (dict(evaluation=dict(attacks={}, batchsize=1)), "nearest: batch_size"),
        (dict(threat=dict(norm="linf")), "threat needs 'eps'"),
        (dict(threat=dict(norm="linf", epsilon=0.1)), "nearest: eps"),
        (dict(datasets={}), "nearest: dataset"),
    ],
)
def test_bad_configs(tfds_dir, changes, match):
    with pytest.raises(ValueError, match=match):
        runs.build(config(tfds_dir, **changes))


def test_a_run_without_a_name_is_called_by_its_defence_and_data(tfds_dir):
    assert runs.build(config(tfds_dir)).name == "standard-digits"
    assert runs.build(config(tfds_dir, name="mine")).name == "mine"


def test_numpy_s_numbers_in_a_config_are_python_s(tfds_dir):
    own = config(tfds_dir, seed=np.int64(3), reported={"pgd": {"value": np.float32(0.5)}})
    run = runs.build(own)
    assert run.seed == 3
    assert json.loads(json.dumps(run.config)) == run.config
    assert type(own["seed"]) is np.int64  # what was given stays


def test_a_config_that_cannot_be_trained_claims_no_workdir(tfds_dir, tmp_path):
    right = config(tfds_dir)
    for option, message in (
        ({"optimizer": {"name": "adamm", "lr": 0.1}}, "unknown optimizer 'adamm'"),
        ({"augment": "crops"}, "'crops'"),
        ({"validate_every": "often"}, "validate_every"),
        ({"checkpoint_every": "-1e"}, "checkpoint_every"),
        ({"steps_per_dispatch": "many"}, "steps_per_dispatch"),
        ({"steps_per_dispatch": 0}, "steps_per_dispatch"),
    ):
        wrong = {**right, "train": {**right["train"], **option}}
        with pytest.raises(ValueError, match=message):
            train.train(wrong, tmp_path / "run", progress=False)
        assert not (tmp_path / "run" / "config.json").exists()
    train.train(right, tmp_path / "run", progress=False)
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == right


def test_a_stack_s_teacher_is_read_back_once_for_each_member(tfds_dir, tmp_path):
    built = runs.build(config(tfds_dir))
    images = jnp.zeros((1, 8, 8, 1))
    params, carry = built.init(images)
    teacher = base.Trained(built.module, params["classifier"], carry["classifier"])
    taught = transforms.with_soft_labels(built.defense, teacher=teacher)
    stack = transforms.apply(taught, "stacked", members=2)
    params, carry = stack.init(jax.random.key(0), images)
    own = stack.without_pretrained
    store = checkpoint.Store(tmp_path / "last")
    store.save(1, {"model": {"params": own(params), "carry": own(carry)}}, {})
    read = run.read_model(store, stack, params, carry)
    store.close()
    jax.tree.map(np.testing.assert_array_equal, read, {"params": params, "carry": carry})
    for member in ("member0", "member1"):
        assert stack.predictors[member](read["params"], read["carry"])(images).shape == (1, 10)


def test_the_averages_of_a_network_given_before_are_not_asked_for(tfds_dir, tmp_path):
    """A transform's averages leave pretrained roles out; the classifier may be one of them."""
    built = runs.build(config(tfds_dir))
    params, carry = built.init(jnp.zeros((1, 8, 8, 1)))
    network = base.Trained(built.module, params["classifier"], carry["classifier"])
    defense = base.Defense(
        lambda key, images: network.init("classifier"),
        (),
        built.defense.predictors,
        pretrained={"classifier": network},
    )
    averaged = transforms.with_ema(defense)
    params, carry = averaged.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    deployed, _ = averaged.deployed(params, carry)
    jax.tree.map(np.testing.assert_array_equal, deployed["classifier"], network.params)
