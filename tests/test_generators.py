"""One contract for every generator of `models/`, and what is particular to VAE and MAE."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdefense import models

# The smallest variants that still have every layer; one without an entry is built as it is.
SMALL = {
    "mae": {"width": 16, "depth": 2, "heads": 2, "patch": 2},
    "vae": {"width": 0.25, "latent": 6},
}
KEY = jax.random.key(1)


def images(shape=(4, 8, 8, 1), seed=0):
    return jax.random.uniform(jax.random.key(seed), shape)


def small(name, channels=1, **kwargs):
    return models.generator(name, channels, **{**SMALL.get(name, {}), **kwargs})


@functools.cache
def built(name):
    """(compiled apply, variables) of the small variant; other keyword arguments are static."""
    model = small(name)
    apply = jax.jit(model.apply, static_argnames=("train", "moments"))
    return apply, jax.jit(model.init)(KEY, images())


def shapes(model, shape):
    """The shape that the model would return for images of `shape`; traces only."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(lambda x: model.init_with_output(KEY, x)[0], x).shape


@pytest.mark.parametrize("name", models.generators())
class TestEveryGenerator:
    def test_images_to_images(self, name):
        apply, variables = built(name)
        x = images()
        y = apply(variables, x)
        assert y.shape == x.shape
        assert y.dtype == jnp.float32
        assert np.all(np.isfinite(y))
        np.testing.assert_array_equal(y, apply(variables, x))
        other = images(seed=1).at[1].set(x[1])
        np.testing.assert_allclose(apply(variables, other)[1], y[1], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("shape", [(2, 8, 8, 1), (2, 28, 28, 1), (2, 32, 32, 3)])
    def test_sizes(self, name, shape):
        assert shapes(small(name, shape[-1]), shape) == shape

    def test_is_no_classifier(self, name):
        assert name not in models.names()
        call = inspect.signature(type(small(name)).__call__).parameters
        assert list(call)[:3] == ["self", "x", "train"]
        assert call["train"].kind is inspect.Parameter.KEYWORD_ONLY
        assert call["train"].default is False

    def test_bad_arguments(self, name):
        with pytest.raises(ValueError, match="channels"):
            models.generator(name, 0)
        with pytest.raises(ValueError, match=r"dtpye.*nearest: dtype"):
            models.generator(name, 1, dtpye="float32")
        with pytest.raises(ValueError, match="float32, bfloat16"):
            models.generator(name, 1, dtype="int8")
        with pytest.raises(ValueError, match="need images"):
            shapes(small(name), (8, 8, 1))


def test_unknown_generator():
    with pytest.raises(ValueError, match=r"unknown generator 'va'; nearest: .*vae"):
        models.generator("va", 1)


@pytest.mark.parametrize("name", ["mae", "vae"])
def test_autoencoders_return_images_and_train_every_parameter(name):
    _, variables = built(name)
    model = small(name)

    def loss(params, x):
        y = model.apply({"params": params}, x, key=KEY)
        return jnp.sum(jnp.square(y - images(seed=2))), y

    (params, x), y = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables["params"], images())
    assert 0 < y.min() < y.max() < 1
    for path, leaf in jax.tree.leaves_with_path((params, x)):
        # Attention does not see a key's bias: it moves all scores of a query alike.
        if "key" not in jax.tree_util.keystr(path) or "bias" not in jax.tree_util.keystr(path):
            assert np.any(leaf), path


@pytest.mark.parametrize(
    ("name", "shape", "kwargs", "parameters"),
    [
        ("vae", (1, 28, 28, 1), {}, 2_520_484),
        ("vae", (1, 32, 32, 3), {}, 3_262_060),
        ("mae", (1, 28, 28, 1), {}, 904_976),
        ("mae", (1, 8, 8, 1), {"patch": 2}, 902_660),
    ],
)
def test_parameter_counts(name, shape, kwargs, parameters):
    model = models.generator(name, shape[-1], **kwargs)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
    assert sum(p.size for p in jax.tree.leaves(variables["params"])) == parameters


class TestVAE:
    @pytest.mark.slow
    def test_moments_are_the_codes(self):
        """The code drawn with a key has the moments that the call returns."""
        apply, variables = built("vae")
        x = jnp.repeat(images((1, 8, 8, 1)), 4000, 0)
        plain, mean, log_variance = apply(variables, x, moments=True)
        assert mean.shape == log_variance.shape == (4000, 6)
        np.testing.assert_allclose(apply(variables, x), plain)
        # Widen the code to the pixels linearly: with tiny decoder weights the mean image is the
        # image of the mean code, which a drawn image scatters around.
        tiny = jax.tree.map(lambda p: p, variables)
        expand = tiny["params"]["expand"]
        tiny["params"]["expand"] = {
            "kernel": 1e-3 * expand["kernel"],
            "bias": jnp.ones_like(expand["bias"]),
        }
        drawn = apply(tiny, x, key=jax.random.key(3))
        spread = drawn.std(0)
        assert spread.max() > 0
        error = jnp.abs(drawn.mean(0) - apply(tiny, x)[0])
        assert bool(jnp.all(error < 5 * spread / 4000**0.5 + 1e-6))

    def test_size(self):
        with pytest.raises(ValueError, match="4 divides"):
            shapes(small("vae"), (2, 10, 8, 1))


class TestMAE:
    def test_hidden_patches_are_not_seen(self):
        """With a key, only the kept patches of an image can change what comes out."""
        model = small("mae", mask=0.75)
        _, variables = built("mae")

        def influence(x):
            y = model.apply(variables, x, key=KEY)
            return jnp.sum(jnp.square(y), (1, 2, 3)).sum()

        grad = jnp.abs(jax.jit(jax.grad(influence))(images()))
        patches = grad.reshape(4, 4, 2, 4, 2, 1).max((2, 4, 5)).reshape(4, 16)
        assert np.sum(patches > 0, 1).tolist() == [4, 4, 4, 4]
        assert len({tuple(row) for row in (np.asarray(patches) > 0).tolist()}) > 1

    def test_all_kept_is_the_plain_network(self):
        """A mask of share 0 hides nothing, in whatever order the patches are drawn."""
        _, variables = built("mae")
        model = small("mae", mask=0.0)
        plain, drawn = jax.jit(
            lambda x: (model.apply(variables, x), model.apply(variables, x, key=KEY))
        )(images())
        np.testing.assert_allclose(drawn, plain, rtol=1e-4, atol=1e-5)

    def test_bad_fields(self):
        with pytest.raises(ValueError, match=r"mask must be in \[0, 1\), got 1"):
            small("mae", mask=1.0)
        with pytest.raises(ValueError, match="width must be a multiple of 8"):
            small("mae", width=20)
        with pytest.raises(ValueError, match="patch must be larger than 0"):
            small("mae", patch=0)
        with pytest.raises(ValueError, match=r"patch \(4\) divides"):
            shapes(small("mae", patch=4), (2, 10, 8, 1))
