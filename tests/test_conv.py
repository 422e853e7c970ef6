"""The explicit gradients of convolutions against a reference written out tap by tap."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxdefense.models import conv, explicit_gradients

LAYOUT = ("NHWC", "HWIO", "NHWC")


def reference(x, w, strides, pads, dy=None):
    """The convolution and, at the cotangent `dy`, both gradients: sums over the kernel's taps.

    `jax.lax`'s own gradient is no reference: where a padding is as large as the kernel, XLA:CPU
    reads beyond the array (openxla/xla#48713).
    """
    if isinstance(pads, str):
        pads = lax.padtype_to_pads(x.shape[1:3], w.shape[:2], strides, pads)
    x, w = (np.asarray(a, np.float64) for a in (x, w))
    padded = np.pad(x, ((0, 0), *pads, (0, 0)))
    n, m = ((padded.shape[1 + i] - w.shape[i]) // strides[i] + 1 for i in (0, 1))
    y, dx, dw = np.zeros((len(x), n, m, w.shape[3])), np.zeros_like(padded), np.zeros_like(w)
    dy = cotangent(y.shape) if dy is None else np.asarray(dy, np.float64)
    for a, b in np.ndindex(*w.shape[:2]):
        seen = np.s_[:, a : a + n * strides[0] : strides[0], b : b + m * strides[1] : strides[1]]
        pixels = padded[seen][:, :n, :m]
        y += pixels @ w[a, b]
        dx[seen][:, :n, :m] += dy @ w[a, b].T
        dw[a, b] = np.tensordot(pixels, dy, ((0, 1, 2), (0, 1, 2)))
    (top, _), (left, _) = pads
    return y, dx[:, top : top + x.shape[1], left : left + x.shape[2]], dw


def cotangent(shape):
    return np.cos(np.arange(np.prod(shape))).reshape(shape)


def explicit(x, w, strides, pads):
    return conv(x, w, strides, pads, dimension_numbers=LAYOUT)


@functools.partial(jax.jit, static_argnums=(2, 3))
def gradients(x, w, strides, pads):
    y, vjp = jax.vjp(lambda x, w: explicit(x, w, strides, pads), x, w)
    return y, *vjp(jnp.asarray(cotangent(y.shape), y.dtype))


def operands(x_shape, w_shape, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=s), dtype) for s in (x_shape, w_shape))


def assert_agree(x, w, strides, pads, tolerance=1e-5):
    ours, theirs = gradients(x, w, strides, pads), reference(x, w, strides, pads)
    for name, a, b in zip(("y", "dx", "dw"), ours, theirs):
        assert a.shape == b.shape
        assert a.dtype == x.dtype
        bound = tolerance * max(1.0, np.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=bound, err_msg=name)


# Kernels that the stride divides and does not, smaller and larger than it; channels on both sides
# of the rules' bounds (4 for patches, 16 for several at once, 64 values for the overlapping add).
@pytest.mark.parametrize(
    ("strides", "window", "channels", "pads"),
    [
        *itertools.product([(1, 1)], [(1, 1), (3, 3)], [3, 9], ["SAME"]),
        *itertools.product([(1, 1)], [(5, 5), (4, 3)], [1, 4], ["VALID", ((2, 0), (1, 3))]),
        *itertools.product([(2, 2)], [(1, 1), (3, 3), (4, 4)], [3, 6, 9], [((1, 1), (1, 1))]),
        *itertools.product([(3, 3)], [(2, 2), (3, 3), (5, 4)], [3, 9], ["VALID"]),
        ((1, 1), (3, 3), 17, "SAME"),
        ((2, 2), (4, 4), 9, "SAME"),
        ((2, 2), (5, 5), 9, "SAME"),
        ((2, 1), (4, 3), 9, ((1, 2), (0, 1))),
        ((1, 3), (2, 6), 9, ((0, 1), (4, 0))),
        ((1, 1), (2, 2), 9, ((2, 0), (1, 3))),  # a padding as large as the kernel
        ((2, 2), (2, 2), 9, ((5, 4), (0, 3))),
        ((2, 2), (3, 3), 3, ((5, 4), (0, 3))),
    ],
)
def test_both_gradients(strides, window, channels, pads):
    assert_agree(*operands((2, 9, 8, channels), (*window, channels, 5)), strides, pads)


@pytest.mark.parametrize(
    ("strides", "window", "channels", "outputs", "pads"),
    [
        ((1, 1), (3, 3), 3, 5, "SAME"),
        ((1, 1), (3, 3), 3, 32, "SAME"),
        ((1, 1), (3, 3), 1, 32, "VALID"),
        ((1, 1), (4, 3), 17, 5, ((2, 0), (1, 3))),
        ((2, 2), (3, 3), 9, 5, "SAME"),
        ((2, 1), (4, 3), 9, 5, ((5, 4), (0, 3))),
    ],
)
def test_both_gradients_of_many_pixels(strides, window, channels, outputs, pads):
    """Where the weights' is a product for each of the kernel's pixels, or of patches."""
    assert_agree(*operands((2, 17, 16, channels), (*window, channels, outputs)), strides, pads)


@pytest.mark.parametrize(
    ("size", "window", "strides", "pads"),
    [
        ((1, 9), (1, 3), (4, 4), ((2, 0), (2, 2))),
        ((3, 1), (5, 3), (4, 4), ((5, 4), (4, 0))),
        ((1, 1), (3, 3), (3, 3), ((5, 5), (5, 5))),
    ],
)
def test_windows_that_see_nothing_but_padding(size, window, strides, pads):
    """A padding so large that what no window reaches is more than the image."""
    assert_agree(*operands((2, *size, 8), (*window, 8, 4)), strides, pads)


@pytest.mark.parametrize("outputs", [1, 2, 6, 16])
@pytest.mark.parametrize("channels", [1, 16])
def test_narrow_convolutions(channels, outputs):
    """Those that make several pixels at once: of rows that are a multiple of these, and are not."""
    for width in (16, 13):
        assert_agree(*operands((2, 5, width, channels), (3, 5, channels, outputs)), (1, 1), "SAME")


side = st.integers(1, 3)
pad = st.tuples(st.integers(0, 3), st.integers(0, 3))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    window=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    strides=st.tuples(side, side),
    pads=st.tuples(pad, pad),
    channels=st.sampled_from([1, 4, 5, 9]),
)
def test_any_shape(size, window, strides, pads, channels):
    assert_agree(*operands((2, *size, channels), (*window, channels, 3)), strides, pads)


@pytest.mark.parametrize(
    ("strides", "channels"), [((1, 1), 9), ((1, 1), 2), ((2, 2), 9), ((2, 2), 2)]
)
def test_gradient_of_gradient(strides, channels):
    """The gradient of an input-gradient penalty, against autodiff's."""
    x, w = operands((2, 6, 6, channels), (4, 4, channels, 3))

    def penalty(x, w):
        def inner(x):
            return jnp.sum(explicit(x, w, strides, ((1, 1), (1, 1))) ** 3)

        return jnp.sum(jax.grad(inner)(x) ** 2)

    found = []
    for on in (True, False):
        with explicit_gradients(on):
            found.append(jax.jit(jax.grad(penalty, (0, 1)))(x, w))
    for ours, theirs in zip(*found):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5 * jnp.abs(theirs).max())


@pytest.mark.parametrize(
    ("strides", "window", "channels"),
    [((1, 1), 3, 16), ((1, 1), 3, 4), ((2, 2), 4, 16), ((2, 2), 3, 16), ((2, 2), 4, 1)],
)
def test_bfloat16_sums_in_float32(strides, window, channels):
    """As near to the exact result as one rounding to bfloat16, of relative size 2^-8, allows."""
    x, w = operands((4, 8, 8, channels), (window, window, channels, 16), jnp.bfloat16)
    ours = gradients(x, w, strides, "SAME")
    dy = jnp.asarray(cotangent(ours[0].shape), jnp.bfloat16)
    for a, b in zip(ours, reference(x, w, strides, "SAME", dy)):
        assert a.dtype == jnp.bfloat16
        bound = 2**-7 * np.abs(b) + 1e-4 * np.abs(b).max()
        assert np.all(np.abs(np.asarray(a, np.float64) - b) <= bound)


def test_float64():
    with jax.enable_x64(True):
        x, w = operands((2, 7, 7, 9), (3, 3, 9, 4), jnp.float64)
        assert_agree(x, w, (2, 2), "SAME", tolerance=1e-12)
        assert_agree(x, w[:2, :2], (2, 2), "SAME", tolerance=1e-12)


@functools.partial(jax.jit, static_argnums=(2, 3))
def depthwise_gradients(x, w, strides, pads):
    def y(x, w):
        return conv(x, w, strides, pads, dimension_numbers=LAYOUT, feature_group_count=x.shape[-1])

    y, vjp = jax.vjp(y, x, w)
    return y, *vjp(jnp.asarray(cotangent(y.shape), y.dtype))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("strides", "window", "pads"),
    [
        ((1, 1), (3, 3), "SAME"),
        ((2, 2), (3, 3), ((1, 1), (1, 1))),
        ((2, 1), (4, 3), ((1, 2), (0, 3))),
        ((3, 3), (2, 2), "VALID"),
    ],
)
def test_depthwise(strides, window, pads, dtype):
    """Each channel is a convolution of its own, in C groups of one."""
    x, w = operands((2, 9, 8, 5), (*window, 1, 5), dtype)
    ours = depthwise_gradients(x, w, strides, pads)
    for c in range(5):
        one = np.s_[..., c : c + 1]
        dy = cotangent(ours[0].shape)[one]
        dy = np.asarray(jnp.asarray(dy, dtype), np.float64)
        for a, b in zip(ours, reference(x[one], w[one], strides, pads, dy)):
            assert a.dtype == dtype
            bound = 1e-5 if dtype == jnp.float32 else 2**-8
            np.testing.assert_allclose(np.asarray(a[one], np.float64), b, bound, 1e-5)


def test_depthwise_inside_scan_and_differentiated_again():
    x, w = operands((2, 6, 6, 5), (3, 3, 1, 5))

    def penalty(w):
        def y(x):
            y = conv(x, w, (2, 2), "SAME", dimension_numbers=LAYOUT, feature_group_count=5)
            return jnp.sum(y**3)

        step = lambda x, _: (x + 1e-3 * jax.grad(y)(x), None)  # noqa: E731
        return jnp.sum(lax.scan(step, x, length=3)[0] ** 2)

    found = []
    for on in (True, False):
        with explicit_gradients(on):
            found.append(jax.jit(jax.grad(penalty))(w))
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5 * float(jnp.abs(found[1]).max()))


def test_inside_scan():
    """A few steps of gradient ascent on the image, inside and outside a loop."""
    x, w = operands((2, 8, 8, 9), (4, 4, 9, 5))

    def step(x, _):
        g = jax.grad(lambda x: jnp.sum(explicit(x, w, (2, 2), "SAME") ** 2))(x)
        return x + 1e-3 * g, None

    looped = jax.jit(lambda x: lax.scan(step, x, length=3)[0])(x)
    unrolled = jax.jit(lambda x: functools.reduce(lambda x, _: step(x, None)[0], range(3), x))(x)
    np.testing.assert_allclose(looped, unrolled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [2, 9])
@pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (0, 0)])
def test_vmap(in_axes, channels):
    xs, ws = operands((3 * 2, 6, 6, channels), (3 * 4, 4, channels, 3))
    xs, ws = xs.reshape(3, 2, 6, 6, channels), ws.reshape(3, 4, 4, channels, 3)
    args = [a if axis == 0 else a[0] for a, axis in zip((xs, ws), in_axes)]

    def both(x, w):
        return jax.grad(lambda x, w: jnp.sum(explicit(x, w, (2, 2), "SAME") ** 2), (0, 1))(x, w)

    mapped = jax.jit(jax.vmap(both, in_axes))(*args)
    one = jax.jit(both)
    for i in range(3):
        single = one(*(a[i] if axis == 0 else a for a, axis in zip(args, in_axes)))
        for ours, theirs in zip(mapped, single):
            np.testing.assert_allclose(ours[i], theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "options"),
    [
        ((2, 6, 6, 4), (3, 3, 2, 4), {"feature_group_count": 2}),
        ((2, 6, 6, 4), (3, 3, 4, 4), {"rhs_dilation": (2, 2)}),
        ((2, 6, 6, 4), (3, 3, 4, 4), {"lhs_dilation": (2, 1), "padding": ((1, 1), (1, 1))}),
        ((4, 6, 6, 2), (3, 3, 2, 4), {"batch_group_count": 2}),
        ((2, 4, 6, 6), (4, 4, 3, 3), {"dimension_numbers": ("NCHW", "OIHW", "NCHW")}),
        ((2, 4, 6, 6), (4, 4, 3, 3), {"dimension_numbers": None}),
        ((2, 6, 4), (3, 4, 4), {"dimension_numbers": ("NHC", "HIO", "NHC")}),
        ((2, 6, 6, 4), (3, 3, 4, 4), {"padding": ((-1, 0), (0, 0))}),
        ((2, 2, 6, 4), (3, 3, 4, 4), {}),  # an empty result
        ((0, 6, 6, 4), (3, 3, 4, 4), {}),
        ((2, 6, 6, 4), (3, 3, 4, 0), {}),
    ],
)
def test_other_convolutions_are_jaxs(x_shape, w_shape, options):
    x, w = operands(x_shape, w_shape)
    options = {"padding": "VALID", "dimension_numbers": LAYOUT, **options}
    strides = (1,) * (len(x_shape) - 2)
    ours = jax.make_jaxpr(lambda x, w: conv(x, w, strides, **options))(x, w)
    theirs = jax.make_jaxpr(lambda x, w: lax.conv_general_dilated(x, w, strides, **options))(x, w)
    assert str(ours) == str(theirs)


@pytest.mark.parametrize(
    ("w_shape", "strides", "padding"),
    [
        ((3, 3, 4, 8), (1,), "SAME"),
        ((3, 3, 4, 8), (1, 1, 1), "VALID"),
        ((3, 3, 4, 8), (1, 1), ((0, 0),)),
        ((1, 1, 5, 8), (1, 1), "SAME"),
        ((3, 3, 5, 8), (1, 1), "SAME"),
    ],
)
def test_what_does_not_fit_is_refused_in_jaxs_words(w_shape, strides, padding):
    x, w = operands((2, 6, 6, 4), w_shape)
    told = []
    for convolve in (conv, lax.conv_general_dilated):
        with pytest.raises((TypeError, ValueError)) as refused:
            convolve(x, w, strides, padding, dimension_numbers=LAYOUT)
        told.append(str(refused.value))
    assert told[0] == told[1]


@pytest.mark.parametrize(("dtype", "preferred"), [(jnp.int32, None), (jnp.bfloat16, jnp.float32)])
def test_other_dtypes_are_jaxs(dtype, preferred):
    x, w = jnp.ones((1, 4, 4, 2), dtype), jnp.ones((3, 3, 2, 1), dtype)
    y = conv(x, w, (1, 1), "VALID", dimension_numbers=LAYOUT, preferred_element_type=preferred)
    assert y.dtype == (preferred or dtype)
    np.testing.assert_array_equal(y, jnp.full((1, 2, 2, 1), 18, y.dtype))


def test_choice_of_gradients():
    x, w = operands((1, 6, 6, 9), (3, 3, 9, 2))

    def is_explicit():
        jaxpr = jax.make_jaxpr(lambda x, w: explicit(x, w, (1, 1), "SAME"))(x, w)
        return "custom_vjp" in str(jaxpr)

    assert is_explicit() == (jax.default_backend() == "cpu")
    with explicit_gradients(False):
        assert not is_explicit()
        with explicit_gradients(True):
            assert is_explicit()
        with explicit_gradients(None):
            assert is_explicit() == (jax.default_backend() == "cpu")
        assert not is_explicit()


def test_forward_mode_needs_autodiffs_form():
    x, w = operands((1, 6, 6, 9), (3, 3, 9, 2))
    with explicit_gradients(True), pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: explicit(x, w, (1, 1), "SAME"), (x,), (x,))
    with explicit_gradients(False):
        jax.jvp(lambda x: explicit(x, w, (1, 1), "SAME"), (x,), (x,))


def test_weights_replicated_over_devices():
    """Under pmap, the mean of two devices' gradients is the whole batch's gradient."""
    if jax.local_device_count() < 2:
        pytest.skip("needs two devices")
    x, w = operands((4, 6, 6, 9), (3, 3, 9, 2))

    def gradient(w, x):
        return jax.grad(lambda w: jnp.mean(explicit(x, w, (2, 2), "SAME") ** 2))(w)

    split = jax.pmap(
        lambda w, x: lax.pmean(gradient(w, x), "batch"),
        "batch",
        in_axes=(None, 0),
        devices=jax.local_devices()[:2],
    )(w, x.reshape(2, 2, 6, 6, 9))
    np.testing.assert_allclose(split[0], jax.jit(gradient)(w, x), rtol=1e-4, atol=1e-6)
