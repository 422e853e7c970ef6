"""Users' own networks behind the call of this package's networks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdefense.models import layers
from jaxdefense.models.adapt import adapt

KEY = jax.random.key(0)
IMAGES = np.random.default_rng(0).uniform(size=(4, 8, 8, 1)).astype(np.float32)


class Linen(nn.Module):
    """A net as users write them: BatchNorm, pooling, and a head that is not called so."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.max_pool(x, (2, 2), (2, 2)).reshape(len(x), -1)
        return nn.Dense(3)(nn.relu(nn.Dense(8)(x)))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(4, rngs=rngs)
        self.tail = nnx.Sequential(
            nnx.Linear(256, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 3, rngs=rngs)
        )

    def __call__(self, x):
        x = nnx.relu(self.bn(self.conv(x)))
        return self.tail(x.reshape(len(x), -1))


def init(key, images):
    return {"w": jax.random.normal(key, (images[0].size, 3)), "b": jnp.zeros(3)}


def apply(params, x):
    return x.reshape(len(x), -1) @ params["w"] + params["b"][None]


MODELS = {
    "linen": (lambda: Linen(), True, True),
    "nnx": (lambda: Net(nnx.Rngs(0)), True, True),
    "nnx class": (lambda: Net, True, True),
    "pair": (lambda: (init, apply), False, False),
}


@pytest.mark.parametrize("name", MODELS)
def test_call(name):
    make, bn, features = MODELS[name]
    net = adapt(make(), IMAGES, 3)
    variables = net.init(KEY, IMAGES[:1])
    assert layers.has_bn_sets(net) is bn
    logits = jax.jit(net.apply)(variables, IMAGES)
    assert logits.shape == (4, 3)
    trained, new = net.apply(variables, IMAGES, train=True, mutable=["batch_stats"])
    same = jax.tree.map(np.array_equal, new["batch_stats"], variables["batch_stats"])
    assert jax.tree.structure(same) == jax.tree.structure(
        variables["batch_stats"],
    )
    assert not any(jax.tree.leaves(same))
    assert np.array_equal(trained, logits) is not bn
    if features:
        again, h = net.apply(variables, IMAGES, features=True)
        head = variables["params"]["head"]
        assert h.shape == (4, 8)
        np.testing.assert_allclose(
            h @ head["kernel"] + head["bias"][None], logits, rtol=1e-5, atol=1e-6
        )
        np.testing.assert_array_equal(again, logits)
    else:
        with pytest.raises(ValueError, match="no features"):
            net.apply(variables, IMAGES, features=True)


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_batch_norm_sets_are_apart(name):
    """Set 1 starts as set 0 and follows its own batches alone."""
    net = adapt(MODELS[name][0](), IMAGES, 3).clone(bn_sets=2)
    variables = net.init(KEY, IMAGES[:1])
    before = variables["batch_stats"]
    _, new = net.apply(variables, IMAGES, train=True, bn_set=1, mutable=["batch_stats"])
    after = new["batch_stats"]
    zero = {k: v for k, v in before.items() if k != "bn_set1"}
    assert jax.tree.all(jax.tree.map(np.array_equal, zero, {k: after[k] for k in zero}))
    same = jax.tree.map(np.array_equal, before["bn_set1"], after["bn_set1"])
    assert not any(jax.tree.leaves(same))
    moved = {"params": variables["params"], "batch_stats": after}
    logits = [net.apply(moved, IMAGES, bn_set=k) for k in (0, 1)]
    assert not np.array_equal(*logits)

    def loss(params, which):
        return net.apply({**moved, "params": params}, IMAGES, bn_set=which)[:, 0].sum()

    grads = jax.grad(loss)(variables["params"], 1)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(grads["bn_set1"]))
    grads = jax.grad(loss)(variables["params"], 0)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads["bn_set1"]))


def test_a_given_network_starts_from_its_weights():
    module = Net(nnx.Rngs(7))
    net = adapt(module, IMAGES, 3)
    variables = net.init(KEY, IMAGES[:1])
    np.testing.assert_array_equal(variables["params"]["conv"]["kernel"], module.conv.kernel[...])
    module.eval()
    np.testing.assert_allclose(net.apply(variables, IMAGES), module(IMAGES), rtol=1e-6)
    one, two = (adapt(Net, IMAGES, 3).init(jax.random.key(k), IMAGES[:1]) for k in (0, 1))
    assert not np.array_equal(one["params"]["head"]["kernel"], two["params"]["head"]["kernel"])


def test_statistics_of_a_pair():
    def init(key, images):
        return {"params": {"w": jnp.ones((64, 3))}, "batch_stats": {"mean": jnp.zeros(64)}}

    def apply(variables, x, train=False):
        x = x.reshape(len(x), -1)
        mean = x.mean(0) if train else variables["batch_stats"]["mean"]
        logits = (x - mean[None]) @ variables["params"]["w"]
        return (logits, {"mean": mean}) if train else logits

    net = adapt((init, apply), IMAGES, 3)
    variables = net.init(KEY, IMAGES[:1])
    _, new = net.apply(variables, IMAGES, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(new["batch_stats"]["mean"], IMAGES.reshape(4, -1).mean(0), rtol=1e-6)


class Tied(nn.Module):
    """The last layer is used twice, and given its input by name."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(3)
        x = nn.Dense(3)(x.reshape(len(x), -1))
        return layer(inputs=nn.relu(layer(x)))


class TiedNNX(nnx.Module):
    """Looks at its own layers while it is called."""

    def __init__(self, rngs):
        self.first, self.layers = (
            nnx.Linear(64, 3, rngs=rngs),
            nnx.List([nnx.Linear(3, 3, rngs=rngs)]),
        )

    def __call__(self, x):
        assert isinstance(self.layers[0], nnx.Linear)
        x = self.first(x.reshape(len(x), -1)) * self.first.kernel.sum()
        return self.layers[0](nnx.relu(self.layers[0](x)))


class Scanned(nnx.Module):
    """Layers under vmap, called by scan."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return nnx.Linear(64, 64, rngs=rngs)

        self.hidden, self.out = make(rngs), nnx.Linear(64, 3, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return nnx.relu(layer(x))

        return self.out(run(x.reshape(len(x), -1), self.hidden))


@pytest.mark.parametrize("model", [Tied(), TiedNNX, Scanned])
def test_features_are_what_the_last_call_of_the_last_layer_gets(model):
    net = adapt(model, IMAGES, 3)
    variables = net.init(KEY, IMAGES[:1])
    logits, h = jax.jit(lambda v, x: net.apply(v, x, features=True))(variables, IMAGES)
    head = variables["params"]["head"]
    np.testing.assert_allclose(
        h @ head["kernel"] + head["bias"][None], logits, rtol=1e-5, atol=1e-6
    )


class Dropping(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dropout(0.5, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(3)(x)


class Fixed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(x)
        return nn.Dense(3)(x.reshape(len(x), -1))


class Caching(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.variable("cache", "seen", jnp.zeros, ())
        return nn.Dense(3)(x.reshape(len(x), -1))


class DroppingNNX(nnx.Module):
    def __init__(self, rngs):
        self.drop = nnx.Dropout(0.5, rngs=rngs)


class Wide(nnx.Module):
    def __init__(self, features, rngs):
        self.out = nnx.Linear(64, features, rngs=rngs)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Linen(), "must give .1, 5. logits for one image, gives .1, 3."),
        (Dropping(), "Dropping.. draws random numbers in training"),
        (Fixed(), "needs an argument 'train'"),
        (Caching(), "neither parameters nor BatchNorm's statistics: cache"),
        (DroppingNNX, "draws random numbers in training .dropout 'drop'"),
        (lambda rngs: 3, "must make an NNX module, made int"),
        (Linen, "Linen is a Flax linen class: give an instance of it, Linen.."),
        ("resnet", "or a pair .init, apply., got str"),
        ((init,), "or a pair .init, apply., got tuple"),
        (
            lambda x: x,
            "does not take .rngs=....: missing .* 'x'; model must be a",
        ),
        (Wide, "Wide.__init__ does not take .rngs=....: missing .* 'features'; model must be a"),
        ((init, lambda params, key, x: x), "does not take .params, images.: missing .* 'x'"),
        ((lambda key: key, apply), "does not take .key, images.: too many positional arguments"),
        ((apply, init), "^.apply, init. must be .init, apply., in this order$"),
    ],
)
def test_what_cannot_be_trained_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        adapt(model, IMAGES, 5)


def test_what_a_users_functions_raise_is_not_hidden():
    def failing(key, images):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        adapt((failing, apply), IMAGES, 3)
