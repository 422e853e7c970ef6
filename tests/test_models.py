"""One contract for every file of `models/`, and what is particular to each network."""

import dataclasses
import functools
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdefense import models
from jaxdefense.models import layers

# The smallest variants that still have every layer; a model without an entry is built as it is.
SMALL = {
    "cnn": {"width": 0.25},
    "lenet": {"width": 0.5},
    "mnist_net": {"width": 4, "bn": True},
    "mobilenet": {"width": 0.25, "stages": [[1, 16, 1, 1], [6, 24, 2, 2]]},
    "resnet": {"width": 4},
    "preact_resnet": {"width": 4},
    "vgg": {"width": 4},
    "wide_resnet": {"depth": 10, "width": 1},
}
NAMES = models.names()
CLASSES = 5
KEY = jax.random.key(1, impl="rbg")  # initialisers compile several times faster than threefry's


def images(shape=(4, 16, 16, 3), seed=0):
    return jax.random.uniform(jax.random.key(seed), shape)


def small(name, **kwargs):
    return models.make(name, CLASSES, **{**SMALL.get(name, {}), **kwargs})


@functools.cache
def built(name):
    """(model, variables) of the small variant."""
    model = small(name)
    return model, jax.jit(model.init)(KEY, images())


@functools.cache
def applied(name):
    """Everything a model can be asked, as one compiled function of (variables, x)."""
    model = small(name)

    @jax.jit
    def ask(variables, x):
        evaluated = model.apply(variables, x, features=True, mutable=["batch_stats"])
        trained = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return {
            "logits": model.apply(variables, x),
            "logits, features": evaluated[0],
            "statistics": evaluated[1].get("batch_stats", {}),
            "train logits": trained[0],
            "train statistics": trained[1].get("batch_stats", {}),
        }

    return ask


@functools.cache
def lenet():
    """(model, variables) of LeNet as published, on 28x28x1."""
    model = models.make("lenet", 10)
    return model, jax.jit(model.init)(KEY, images((1, 28, 28, 1)))


def shapes(model, shape, **kwargs):
    """What the model would return for images of `shape`; traces only."""
    return jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, **kwargs)[0],
        jax.ShapeDtypeStruct(shape, jnp.float32),
    )


def count(name, shape, classes=10, **kwargs):
    model = models.make(name, classes, **kwargs)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
    return sum(p.size for p in jax.tree.leaves(variables["params"]))


def test_names_are_the_files():
    assert {"cnn", "lenet", "preact_resnet", "resnet"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
class TestEveryModel:
    def test_logits_and_features(self, name):
        _, variables = built(name)
        answer = applied(name)(variables, images())
        logits, features = answer["logits, features"]
        assert logits.shape == answer["logits"].shape == (4, CLASSES)
        assert features.ndim == 2
        assert len(features) == 4
        assert logits.dtype == features.dtype == answer["logits"].dtype == jnp.float32
        head = variables["params"]["head"]
        np.testing.assert_allclose(
            logits, features @ head["kernel"] + head["bias"][None], rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(answer["logits"], logits, rtol=1e-4, atol=1e-5)

    def test_bfloat16(self, name):
        if name == "wide_resnet" and jax.__version__.startswith(("0.11.", "0.12.")):
            pytest.xfail("NaN from XLA:CPU, with lax's own convolutions too; not without jit")
        _, variables = built(name)
        half = small(name, dtype="bfloat16")
        initial = jax.eval_shape(half.init, jax.random.key(0), images())
        assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(initial))
        logits = jax.jit(half.apply)(variables, images())
        exact = applied(name)(variables, images())["logits"]
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, exact, atol=0.1 * float(jnp.abs(exact).max()) + 0.02)
        assert half == small(name, dtype=jnp.bfloat16)

    def test_evaluation_treats_images_one_by_one(self, name):
        _, variables = built(name)
        x = images()
        other = images(seed=1).at[1].set(x[1])
        np.testing.assert_allclose(
            applied(name)(variables, other)["logits"][1],
            applied(name)(variables, x)["logits"][1],
            rtol=1e-4,
            atol=1e-5,
        )

    def test_train_flag(self, name):
        """Training changes the running statistics, if there are any; evaluation cannot."""
        _, variables = built(name)
        statistics = variables.get("batch_stats", {})
        answer = applied(name)(variables, images())
        jax.tree.map(np.testing.assert_array_equal, answer["statistics"], statistics)
        assert answer["train logits"].shape == (4, CLASSES)
        moved = jax.tree.map(
            lambda a, b: not np.array_equal(a, b), statistics, answer["train statistics"]
        )
        assert all(jax.tree.leaves(moved))

    def test_new_weights_do_not_recompile(self, name):
        _, variables = built(name)
        ask = applied(name)
        ask(variables, images())
        ask(jax.tree.map(lambda p: p + 0.1, variables), images(seed=1))
        assert ask._cache_size() == 1

    def test_gradients_reach_every_parameter_and_the_image(self, name):
        model, variables = built(name)

        def loss(params, x):
            logits, _ = model.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
            return jnp.sum(jnp.square(logits))

        params, x = jax.jit(jax.grad(loss, (0, 1)))(variables["params"], images())
        for leaf in jax.tree.leaves((params, x)):
            assert np.all(np.isfinite(leaf))
            assert np.any(leaf)

    def test_normalisation_is_inside(self, name):
        mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
        _, variables = built(name)
        inside = small(name, mean=mean, std=std)
        x = images()
        outside = (x - jnp.array(mean).reshape(1, 1, 1, 3)) / jnp.array(std).reshape(1, 1, 1, 3)
        np.testing.assert_allclose(
            jax.jit(inside.apply)(variables, x),
            applied(name)(variables, outside)["logits"],
            rtol=1e-4,
            atol=1e-5,
        )

    def test_fields_are_plain(self, name):
        """A config's lists do not make a module unhashable, and equal fields make equal modules."""
        model, same = (small(name, mean=[0.5] * 3, std=[0.25] * 3) for _ in range(2))
        assert model == same
        assert hash(model) == hash(same)
        assert model.mean == (0.5, 0.5, 0.5)

    def test_call_signature(self, name):
        call = inspect.signature(type(models.make(name, CLASSES)).__call__).parameters
        fields = [field.name for field in dataclasses.fields(models.make(name, CLASSES))]
        sets = ["bn_set"] if "bn_sets" in fields else []
        assert list(call) == ["self", "x", "train", "features", *sets]
        for flag in ("train", "features", *sets):
            assert call[flag].kind is inspect.Parameter.KEYWORD_ONLY
            assert call[flag].default is (0 if flag == "bn_set" else False)

    def test_batch_norm_sets(self, name):
        """A set sees its own inputs only; the first has the names it has alone."""
        if "bn_sets" not in [field.name for field in dataclasses.fields(models.make(name, 3))]:
            pytest.skip("no BatchNorm sets")
        one, two = small(name), small(name, bn_sets=2)
        x = images()
        variables = jax.jit(two.init)(KEY, x)
        alone = jax.tree.leaves_with_path(jax.eval_shape(one.init, KEY, x))
        assert {jax.tree_util.keystr(p) for p, _ in alone} < {
            jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(variables)
        }
        train = functools.partial(two.apply, train=True, bn_set=1, mutable=["batch_stats"])
        _, new = jax.jit(train)(variables, x)
        before = jax.tree.leaves_with_path(variables["batch_stats"])
        after = jax.tree.leaves(new["batch_stats"])
        for (path, was), now in zip(before, after, strict=True):
            assert np.array_equal(was, now) == ("_set1" not in jax.tree_util.keystr(path))
        with pytest.raises(ValueError, match="bn_set"):
            one.apply(variables, x, bn_set=1)

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (np.zeros((16, 16, 3), np.float32), "need images"),
            (np.zeros((4, 16, 16, 3), np.uint8), "divide by 255"),
        ],
    )
    def test_bad_images(self, name, x, message):
        model, variables = built(name)
        with pytest.raises(ValueError, match=message):
            model.apply(variables, x)

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"mean": (0.5,)}, "mean .* does not fit 3 channels"),
            ({"std": (0.5, 0.0, 0.5)}, r"std\[1\] must be larger than 0"),
        ],
    )
    def test_bad_normalisation(self, name, kwargs, message):
        with pytest.raises(ValueError, match=message):
            shapes(small(name, **kwargs), (4, 16, 16, 3))

    def test_bad_arguments(self, name):
        with pytest.raises(ValueError, match="at least 2"):
            models.make(name, 1)
        with pytest.raises(ValueError, match=r"widht.*nearest: width.*known: .*dtype"):
            models.make(name, CLASSES, widht=2)
        with pytest.raises(ValueError, match="float32, bfloat16"):
            models.make(name, CLASSES, dtype="int8")


def test_unknown_model():
    with pytest.raises(ValueError, match=r"unknown model 'resnet18'; nearest: .*resnet"):
        models.make("resnet18", 10)


@pytest.mark.parametrize(
    ("name", "shape", "kwargs", "parameters"),
    [
        ("lenet", (1, 28, 28, 1), {}, 61_706),
        ("lenet", (1, 32, 32, 3), {}, 62_006),
        ("lenet", (1, 28, 28, 1), {"padding": 2}, 61_706),
        ("cnn", (1, 28, 28, 1), {}, 166_406),
        ("mnist_net", (1, 28, 28, 1), {}, 3_274_634),
        ("mnist_net", (1, 28, 28, 1), {"bn": True, "bn_sets": 2}, 3_275_754 + 2 * (32 + 64 + 1024)),
        ("vgg", (1, 32, 32, 3), {}, 1_148_874),
        ("resnet", (1, 32, 32, 3), {}, 11_173_962),
        ("resnet", (1, 32, 32, 3), {"depth": 34}, 21_282_122),
        ("resnet", (1, 32, 32, 3), {"depth": 50}, 23_520_842),
        ("preact_resnet", (1, 32, 32, 3), {}, 11_172_170),
        ("preact_resnet", (1, 32, 32, 3), {"final_norm": False}, 11_171_146),
        ("wide_resnet", (1, 32, 32, 3), {"depth": 28}, 36_479_194),
        ("wide_resnet", (1, 32, 32, 3), {"depth": 34}, 46_160_474),
        ("mobilenet", (1, 32, 32, 3), {}, 2_296_922),
    ],
)
def test_parameter_counts(name, shape, kwargs, parameters):
    assert count(name, shape, **kwargs) == parameters


def test_lenet_layers():
    """The published network by hand, from the parameters' names."""
    x = images((2, 28, 28, 1))
    model, variables = lenet()
    p = variables["params"]
    assert list(p) == ["conv1", "conv2", "fc1", "fc2", "head"]

    def conv(x, layer, pad):
        y = jax.lax.conv_general_dilated(
            x, layer["kernel"], (1, 1), [(pad, pad)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return nn.relu(y + layer["bias"].reshape(1, 1, 1, -1))

    def dense(x, layer):
        return x @ layer["kernel"] + layer["bias"][None]

    y = nn.max_pool(conv(x, p["conv1"], 2), (2, 2), (2, 2))
    y = nn.max_pool(conv(y, p["conv2"], 0), (2, 2), (2, 2)).reshape(2, 400)
    y = dense(nn.relu(dense(nn.relu(dense(y, p["fc1"])), p["fc2"])), p["head"])
    np.testing.assert_allclose(jax.jit(model.apply)(variables, x), y, rtol=1e-4, atol=1e-5)


def test_image_sizes():
    """LeNet keeps 5x5x16 on both published sizes; the small CNN takes 8x8 digits too."""
    for shape in ((2, 28, 28, 1), (2, 32, 32, 3)):
        assert shapes(models.make("lenet", 10), shape, features=True)[1].shape == (2, 84)
    for shape in ((2, 28, 28, 1), (2, 8, 8, 1), (2, 4, 4, 3)):
        assert shapes(models.make("cnn", 10), shape, features=True)[1].shape == (2, 100)
    with pytest.raises(ValueError, match="16x16 pixels after padding"):
        shapes(models.make("lenet", 10), (2, 8, 8, 1))
    with pytest.raises(ValueError, match="at least 4x4"):
        shapes(models.make("cnn", 10), (2, 3, 3, 1))


def test_resnet_depths():
    model = models.make("resnet", CLASSES, depth=50, width=2)
    assert shapes(model, (1, 8, 8, 3), features=True)[1].shape == (1, 2 * 8 * 4)
    with pytest.raises(ValueError, match="unknown depth 20; allowed: 18, 34, 50"):
        shapes(models.make("resnet", CLASSES, depth=20), (1, 8, 8, 3))


def test_wide_resnet_depths_and_initialisation():
    with pytest.raises(ValueError, match=r"depth must be 6 n \+ 4 .* got 30"):
        shapes(models.make("wide_resnet", CLASSES, depth=30), (1, 8, 8, 3))
    params = built("wide_resnet")[1]["params"]
    kernel = params["stage3_block1"]["conv2"]["kernel"]  # 3x3, 64 -> 64
    assert np.std(kernel) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)


@pytest.mark.parametrize("name", ["resnet", "preact_resnet"])
def test_bn_axis_averages_over_devices(name):
    """Two halves of a batch on two mapped rows give the whole batch's training-mode logits."""
    _, variables = built(name)
    across = small(name, bn_axis="batch")

    def logits(x):
        return across.apply(variables, x, train=True, mutable=["batch_stats"])[0]

    halves = jax.jit(jax.vmap(logits, axis_name="batch"))(images().reshape(2, 2, 16, 16, 3))
    whole = applied(name)(variables, images())["train logits"]
    np.testing.assert_allclose(halves.reshape(4, CLASSES), whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(2, 6, 8, 3), (2, 7, 5, 3)])
def test_max_pool2(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    w = jax.random.normal(jax.random.key(1), (2, shape[1] // 2, shape[2] // 2, 3))
    ours, theirs = (
        jax.jit(jax.value_and_grad(lambda x, pool=pool: jnp.sum(w * pool(x))))(x)
        for pool in (layers.max_pool2, lambda x: nn.max_pool(x, (2, 2), (2, 2)))
    )
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-6)


def test_of_equal_pixels_the_first_gets_the_gradient_of_max_pool2():
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(layers.max_pool2(x))))(jnp.zeros((1, 4, 2, 2)))
    expected = np.zeros((1, 4, 2, 2))
    expected[:, ::2, 0] = 1
    np.testing.assert_array_equal(gradient, expected)


@pytest.mark.parametrize("options", [{}, {"bn": True}])
def test_a_network_without_batch_norm_has_no_sets_of_it(options):
    net = models.make("mnist_net", CLASSES, width=2, **options)
    assert layers.has_bn_sets(net) == bool(options)
    assert not layers.has_bn_sets(models.make("cnn", CLASSES))


def test_initialisation_is_pytorchs():
    """Every weight and bias from U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    params = lenet()[1]["params"]
    for layer in params.values():
        bound = np.prod(layer["kernel"].shape[:-1]) ** -0.5
        for leaf in (layer["kernel"], layer["bias"]):
            assert jnp.abs(leaf).max() <= bound
        assert np.std(layer["kernel"]) == pytest.approx(bound / 3**0.5, rel=0.15)
        assert np.std(layer["bias"]) > 0
