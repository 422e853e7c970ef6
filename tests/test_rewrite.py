"""Models of other libraries get convolutions and max-poolings that are fast in reverse.

Compared with what they compute themselves: logits, input and weight gradients equal to rounding;
what is not known passes through to the bit.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxdefense import attacks, evaluation, models, rewrite, threat
from jaxdefense.defenses import base
from jaxdefense.rewrite import fast_convolutions

KEY = jax.random.key(0)
SMALL = dict(deadline=None, max_examples=12, derandomize=True)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def program(function, *args):
    return str(jax.make_jaxpr(function)(*args))


def assert_replaced(function, *args):
    """The function's program has explicit gradients in it, as it stands it has not."""
    assert not any(word in program(function, *args) for word in ("_conv", "custom_vjp"))
    assert "custom_vjp" in program(fast_convolutions(function), *args)


def assert_untouched(function, *args):
    assert program(fast_convolutions(function), *args) == program(function, *args)


def assert_close(found, wanted):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2e-4, atol=2e-4
        ),
        found,
        wanted,
    )


def assert_equal(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def assert_same_gradients(function, *args):
    """Outputs, and gradients with respect to every argument, of both forms."""

    def outputs_and_gradients(f):
        def total(*args):
            out = f(*args)
            waves = (jnp.sum(jnp.sin(y.astype(jnp.float32))) for y in jax.tree.leaves(out))
            return sum(waves), out

        every = tuple(range(len(args)))
        return jax.jit(jax.grad(total, every, has_aux=True))(*args)

    assert_close(*map(outputs_and_gradients, (fast_convolutions(function), function)))


class Net(nn.Module):
    """Convolutions with all of Flax's paddings, a stride, poolings, BatchNorm, a residual."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        y = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3), padding=1)(x))
        x = nn.relu(x + y)
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        x = nn.relu(nn.Conv(6, (3, 3), (2, 2), "VALID")(x))
        return nn.Dense(3)(x.reshape(len(x), -1))


@pytest.fixture(scope="module")
def linen():
    net, x = Net(), jax.random.uniform(KEY, (2, 12, 12, 1))
    return net, jax.jit(net.init)(KEY, x), x


def images_to_logits(net, variables):
    return lambda x: net.apply(variables, x)


class TestLibraries:
    def test_linen(self, linen):
        net, variables, x = linen
        assert_replaced(net.apply, variables, x)
        assert_same_gradients(net.apply, variables, x)

    def test_keywords_and_two_results(self, linen):
        net, variables, x = linen
        train = functools.partial(net.apply, train=True, mutable=["batch_stats"])
        assert_replaced(train, variables, x)
        found, wanted = (jax.jit(f)(variables, x) for f in (fast_convolutions(train), train))
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        assert_close(found, wanted)

    def test_nnx(self):
        class Own(nnx.Module):
            def __init__(self, rngs):
                self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
                self.norm = nnx.BatchNorm(4, rngs=rngs)
                self.head = nnx.Linear(64, 3, rngs=rngs)

            def __call__(self, x):
                x = nnx.max_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), (2, 2))
                return self.head(x.reshape(len(x), -1))

        net = Own(nnx.Rngs(0))
        net.eval()
        x = jax.random.uniform(KEY, (2, 8, 8, 1))
        assert_replaced(lambda x: net(x), x)
        assert_same_gradients(lambda x: net(x), x)
        definition, state = nnx.split(net)
        assert_same_gradients(lambda s, x: nnx.merge(definition, s)(x), state, x)

    def test_equinox(self):
        eqx = pytest.importorskip("equinox")

        class Own(eqx.Module):
            conv: eqx.nn.Conv2d
            pool: eqx.nn.MaxPool2d
            head: eqx.nn.Linear

            def __call__(self, x):
                return self.head(self.pool(jax.nn.relu(self.conv(x))).ravel())

        net = Own(
            eqx.nn.Conv2d(1, 4, 3, padding=1, key=KEY),
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Linear(64, 3, key=KEY),
        )
        arrays, static = eqx.partition(net, eqx.is_array)
        x = jax.random.uniform(KEY, (2, 1, 8, 8))

        def apply(arrays, x):
            return jax.vmap(eqx.combine(arrays, static))(x)

        assert_replaced(apply, arrays, x)
        assert_same_gradients(apply, arrays, x)

    def test_layout_of_torch(self):
        """As torchax writes them: images NCHW, kernels OIHW."""

        def apply(weights, x):
            for w in weights:
                x = jax.nn.relu(lax.conv_general_dilated(x, w, (1, 1), [(1, 1), (1, 1)]))
                window = ((1, 1, 2, 2), (1, 1, 2, 2), "VALID")
                x = lax.reduce_window(x, -jnp.inf, lax.max, *window)
            return x.reshape(len(x), -1)

        weights, x = [normal(4, 2, 3, 3), normal(5, 4, 3, 3)], normal(2, 2, 8, 8, seed=1)
        assert_replaced(apply, weights, x)
        assert_same_gradients(apply, weights, x)


@settings(**SMALL)
@given(
    images=st.permutations("NHWC"),
    kernel=st.permutations("HWIO"),
    result=st.permutations("NHWC"),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    window=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.one_of(
        st.sampled_from(["SAME", "VALID"]), st.tuples(*[st.tuples(*[st.integers(0, 2)] * 2)] * 2)
    ),
    depthwise=st.booleans(),
)
def test_any_convolution(images, kernel, result, strides, window, padding, depthwise):
    channels, features = (3, 3) if depthwise else (2, 4)
    sizes = dict(zip("NHWC", (2, 6, 7, channels)))
    inner = 1 if depthwise else channels
    kernel_sizes = dict(zip("HWIO", (*window, inner, features)))
    x, w = normal(*map(sizes.get, images)), normal(*map(kernel_sizes.get, kernel), seed=1)
    layout = ("".join(images), "".join(kernel), "".join(result))

    def apply(w, x):
        groups = channels if depthwise else 1
        return lax.conv_general_dilated(
            x, w, strides, padding, dimension_numbers=layout, feature_group_count=groups
        )

    assert_replaced(apply, w, x)
    assert_same_gradients(apply, w, x)


@settings(**SMALL)
@given(
    layout=st.sampled_from(["NHWC", "NCHW"]),
    window=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.sampled_from(["SAME", "VALID"]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_any_pooling(layout, window, strides, padding, dtype):
    """Of small integers, most of which tie: the gradients are equal to the bit."""
    sizes = dict(zip("NHWC", (2, 6, 7, 3)))
    x = jax.random.randint(KEY, [sizes[name] for name in layout], 0, 3).astype(dtype)
    spread = [dict(zip("NHWC", (1, *pair, 1))) for pair in (window, strides)]
    dims = [tuple(one[name] for name in layout) for one in spread]

    def apply(x):
        return lax.reduce_window(x, jnp.array(-jnp.inf, x.dtype), lax.max, *dims, padding)

    fast = fast_convolutions(apply)
    if max(window) > 1:
        assert "reduce_window_max" not in program(fast, x)
    y = apply(x)
    assert_equal(fast(x), y)
    cotangent = jax.random.randint(jax.random.key(1), y.shape, 1, 9).astype(dtype)
    assert_equal(*(jax.vjp(f, x)[1](cotangent)[0] for f in (fast, apply)))


def test_pooling_of_nan_is_nan():
    x = jnp.zeros((1, 4, 4, 1)).at[0, [0, 3], [1, 2]].set(jnp.nan)
    pool = fast_convolutions(lambda x: nn.max_pool(x, (2, 2), (2, 2)))
    np.testing.assert_array_equal(pool(x)[0, :, :, 0], [[np.nan, 0], [0, np.nan]])


def conv(x, w, **kwargs):
    options = {"padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC"), **kwargs}
    return lax.conv_general_dilated(x, w, (1, 1), **options)


def half(*arrays):
    return [array.astype(jnp.bfloat16) for array in arrays]


X, W = normal(2, 6, 6, 3), normal(3, 3, 3, 3, seed=1)


class TestPassesThrough:
    @pytest.mark.parametrize(
        "function",
        [
            lambda x, w: x @ w[0, 0],
            functools.partial(conv, rhs_dilation=(2, 2)),
            functools.partial(conv, lhs_dilation=(2, 2), padding=[(1, 1), (1, 1)]),
            lambda x, w: conv(*half(x, w), preferred_element_type=jnp.float32),
            lambda x, w: conv(jnp.tile(x, 2), jnp.tile(w, 2), feature_group_count=2),
            lambda x, w: conv(x, jnp.tile(w, 2), batch_group_count=2),
            lambda x, w: lax.conv_general_dilated(x[0, :, :3], w[0], (1,), "SAME"),
            lambda x, w: lax.conv_general_dilated(x[:, :3, None], w[..., None], (1,) * 3, "SAME"),
            lambda x, w: nn.max_pool(x, (5, 5), (2, 2)),
            lambda x, w: nn.avg_pool(x, (2, 2), (2, 2)),
            lambda x, w: nn.max_pool((9 * x).astype(int), (2, 2), (2, 2)),
            lambda x, w: models.conv(
                x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            ),
        ],
    )
    def test_the_program_is_the_same(self, function):
        assert_untouched(function, X, W)

    def test_a_model_of_this_library(self):
        net = models.make("lenet", 10)
        x = jnp.zeros((2, 28, 28, 1))
        assert_untouched(net.apply, net.init(KEY, x), x)

    def test_the_switch(self):
        with models.explicit_gradients(False):
            assert_untouched(conv, X, W)
        assert_replaced(conv, X, W)

    def test_functions_with_derivatives_of_their_own(self):
        @jax.custom_vjp
        def straight(x, w):
            return conv(x, w)

        straight.defvjp(lambda x, w: (conv(x, w), w), lambda w, dy: (7 * dy, w))
        assert_untouched(straight, X, W)

        def beside(x, w):
            return straight(x, w) + conv(x, w)

        assert "_conv" in program(fast_convolutions(beside), X, W)
        assert_same_gradients(beside, X, W)

        @jax.custom_jvp
        def doubled(x, w):
            return conv(x, w)

        doubled.defjvp(lambda p, t: (conv(*p), 2 * conv(t[0], p[1])))
        assert_same_gradients(lambda x, w: doubled(x, w) + conv(x, w), X, W)


class TestInside:
    """Calls, loops and branches that hold a convolution; transformations around the function."""

    @pytest.mark.parametrize(
        "function",
        [
            jax.jit(conv),
            jax.checkpoint(conv),
            jax.checkpoint(jax.jit(conv), policy=jax.checkpoint_policies.dots_saveable),
            lambda x, w: lax.scan(lambda x, w: (conv(x, w), x.sum()), x, jnp.stack([w, w])),
            lambda x, w: lax.cond(x[0, 0, 0, 0] < w[0, 0, 0, 0], conv, lambda x, w: 2 * x, x, w),
            lambda x, w: lax.fori_loop(0, 2, lambda i, x: jnp.sin(jax.jit(conv)(x, w)), x),
            lambda x, w: jax.vmap(lambda x: conv(x[None], w)[0])(x),
        ],
    )
    def test_gradients_inside(self, function):
        assert_replaced(function, X, W)
        assert_same_gradients(function, X, W)

    def test_while(self):
        def grow(x, w):
            def more(y):
                return jnp.abs(nn.max_pool(y, (2, 2), (1, 1), "SAME")).max() < 1e3

            return lax.while_loop(more, lambda y: 2 * conv(y, w), x)

        fast = fast_convolutions(grow)
        assert "_conv" in program(fast, X, W)
        assert "reduce_window" not in program(fast, X, W)
        np.testing.assert_allclose(fast(X, W), grow(X, W), rtol=1e-4, atol=0.1)

    @pytest.mark.parametrize(
        ("around", "axes"),
        [
            (lambda f, axes: jax.jit(f), None),
            (jax.vmap, (None, 0)),
            (jax.vmap, (0, 0)),
            (lambda f, axes: jax.pmap(f, in_axes=axes), (None, 0)),
        ],
        ids=["jit", "vmap over images", "vmap over weights", "pmap"],
    )
    def test_a_model_that_closes_over_tracers_in_a_loop(self, around, axes):
        def gradient(rewrite, w, x):
            def model(x):
                return nn.max_pool(conv(x, w), (2, 2), (1, 1), "SAME")

            predict = rewrite(model)

            def step(x, _):
                return jax.grad(lambda x: jnp.sum(jnp.tanh(predict(x) / 9)))(x), predict(x)

            return lax.scan(step, x, None, 2)

        args = [jnp.stack([a, -a]) if axes and axes[i] == 0 else a for i, a in enumerate((W, X))]
        found, wanted = (
            around(functools.partial(gradient, rewrite), axes)(*args)
            for rewrite in (fast_convolutions, lambda f: f)
        )
        assert_close(found, wanted)

    def test_means_over_devices(self):
        def model(x, w):
            return conv(x, w) - lax.pmean(x.mean(), "batch")

        both = jnp.stack([X, 2 * X])
        found, wanted = (
            jax.pmap(f, "batch", in_axes=(0, None))(both, W)
            for f in (fast_convolutions(model), model)
        )
        assert_close(found, wanted)

    def test_effects_happen_once_a_call(self):
        seen = []

        def told(x, w):
            jax.debug.callback(lambda y: seen.append(y.shape), x)
            return conv(x, w)

        jax.block_until_ready(jax.jit(fast_convolutions(told))(X, W))
        jax.effects_barrier()
        assert seen == [X.shape]

    def test_half_precision(self):
        found, wanted = (f(*half(X, W)) for f in (fast_convolutions(conv), conv))
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            *(np.asarray(y, np.float32) for y in (found, wanted)), rtol=0.02, atol=0.02
        )

    @pytest.mark.slow
    def test_second_derivatives_in_reverse(self):
        def value(f):
            return lambda x: jnp.sum(jnp.sin(f(x, W)))

        x = X[:1, :3, :3]
        found, wanted = (jax.jacrev(jax.grad(value(f)))(x) for f in (fast_convolutions(conv), conv))
        assert_close(found, wanted)
        with models.explicit_gradients(False):
            assert_close(jax.hessian(value(fast_convolutions(conv)))(x), wanted)


def test_a_function_is_wrapped_once():
    fast = fast_convolutions(conv)
    assert fast_convolutions(fast) is fast
    part = functools.partial(fast, X)
    assert fast_convolutions(part) is part
    assert fast.__name__ == "conv"


class TestWhereModelsEnter:
    """Each door hands the model's convolutions on in their fast form."""

    @pytest.fixture
    def seen(self, monkeypatch):
        """The kernels' shapes of the convolutions that were replaced."""
        shapes = []
        replace = rewrite._convolution

        def spy(params, images, kernel):
            shapes.append(kernel.shape)
            return replace(params, images, kernel)

        monkeypatch.setattr(rewrite, "_convolution", spy)
        return shapes

    @pytest.fixture
    def problem(self, linen):
        net, variables, x = linen
        labels = net.apply(variables, x).argmax(-1)
        return net, variables, x, labels

    attack = attacks.pgd(threat.Linf(0.125), steps=2)

    def test_a_bare_attack(self, problem, seen):
        net, variables, x, labels = problem
        found = self.attack(images_to_logits(net, variables), KEY, x, labels)
        assert seen
        with models.explicit_gradients(False):
            np.testing.assert_allclose(
                found, self.attack(images_to_logits(net, variables), KEY, x, labels), atol=1e-5
            )

    def test_jitted_a_function_of_ones_own(self, problem, seen):
        net, variables, x, labels = problem

        def own(predict, key, images, labels):
            return images + 0.1 * jnp.sign(jax.grad(lambda z: predict(z).sum())(images))

        attacks.jitted(own, net.apply)(variables, KEY, x, labels)
        assert seen

    def test_an_attack_with_forward_mode_derivatives_gets_the_plain_model(self, problem):
        net, variables, x, labels = problem

        def own(predict, key, images, labels):
            return images + 0.1 * jax.jvp(predict, (images,), (images,))[1].mean()

        found = attacks.jitted(own, net.apply)(variables, KEY, x, labels)
        wanted = own(images_to_logits(net, variables), KEY, x, labels)
        np.testing.assert_allclose(found, wanted, rtol=1e-5)

    def test_other_errors_of_an_attack_are_its_own(self, problem):
        net, variables, x, labels = problem

        def own(predict, key, images, labels):
            raise TypeError("mine")

        with pytest.raises(TypeError, match="mine"):
            attacks.jitted(own, net.apply)(variables, KEY, x, labels)

    def test_the_evaluator(self, problem, seen):
        net, variables, x, _ = problem
        evaluator = evaluation.Evaluator(net.apply, threat.Linf(0.125), batch_size=2)
        found = evaluator.logits(variables, np.asarray(x))
        assert len(seen) == 3
        np.testing.assert_allclose(found, net.apply(variables, x), atol=1e-5)

    def test_the_networks_of_defences(self, problem, seen):
        net, variables, x, _ = problem
        role = base.Net(net)
        params = {"classifier": variables["params"]}
        carry = {"classifier": variables["batch_stats"]}
        role.predict(params, carry)(x)
        assert len(seen) == 3
        role.train(params, carry, x)
        assert len(seen) == 6


def test_a_function_that_returns_more_than_arrays_is_left_alone():
    def function(x):
        kernel = jnp.ones((3, 3, 1, 2))
        dims = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)
        return y, "a name"

    y, name = rewrite.fast_convolutions(function)(jnp.ones((1, 4, 4, 1)))
    assert name == "a name"
    np.testing.assert_array_equal(y, function(jnp.ones((1, 4, 4, 1)))[0])
