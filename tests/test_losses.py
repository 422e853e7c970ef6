"""Every loss against an independent NumPy version, and its identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxdefense import losses

LOGITS = jax.random.normal(jax.random.key(0), (7, 5)) * 4
OTHER = jax.random.normal(jax.random.key(1), (7, 5)) * 4
LABELS = jnp.asarray([0, 1, 2, 3, 4, 0, 1])
Z, Q, Y = (np.asarray(a, np.float64) for a in (LOGITS, OTHER, LABELS))
ROWS, Y = np.arange(7), np.asarray(LABELS)


def test_cross_entropy():
    expected = -scipy.special.log_softmax(Z, -1)[ROWS, Y]
    np.testing.assert_allclose(losses.cross_entropy(LOGITS, LABELS), expected, rtol=1e-5)
    hot = losses.one_hot(LABELS, 5)
    np.testing.assert_allclose(losses.cross_entropy(LOGITS, hot), expected, rtol=1e-5)


def test_cross_entropy_of_soft_and_smoothed_targets():
    target = scipy.special.softmax(Q, -1)
    expected = -np.sum(target * scipy.special.log_softmax(Z, -1), -1)
    np.testing.assert_allclose(
        losses.cross_entropy(LOGITS, jnp.asarray(target)), expected, rtol=1e-5
    )
    smooth = losses.one_hot(LABELS, 5, smoothing=0.1)
    np.testing.assert_allclose(smooth[0], [0.92, 0.02, 0.02, 0.02, 0.02], rtol=1e-6)


def test_kl():
    p, q = scipy.special.softmax(Z, -1), scipy.special.softmax(Q, -1)
    np.testing.assert_allclose(
        losses.kl(LOGITS, OTHER), scipy.special.rel_entr(p, q).sum(-1), rtol=1e-4
    )
    np.testing.assert_allclose(losses.kl(LOGITS, LOGITS), 0, atol=1e-6)


def test_kl_does_not_depend_on_classes_of_no_probability():
    padded = [jnp.pad(z, ((0, 0), (0, 3)), constant_values=-1e4) for z in (LOGITS, OTHER)]
    np.testing.assert_allclose(losses.kl(*padded), losses.kl(LOGITS, OTHER), rtol=1e-5)


def test_margin_and_dlr():
    others = np.where(np.eye(5, dtype=bool)[Y], -np.inf, Z)
    margin = others.max(-1) - Z[ROWS, Y]
    np.testing.assert_allclose(losses.margin(LOGITS, LABELS), margin, rtol=1e-5)
    top = np.sort(Z, -1)[:, ::-1]
    np.testing.assert_allclose(
        losses.dlr(LOGITS, LABELS), margin / (top[:, 0] - top[:, 2]), rtol=1e-5
    )
    wrong = np.asarray(losses.margin(LOGITS, LABELS)) > 0
    np.testing.assert_array_equal(wrong, Z.argmax(-1) != Y)


def test_targeted_dlr():
    targets = (LABELS + 2) % 5
    top = np.sort(Z, -1)[:, ::-1]
    scale = top[:, 0] - (top[:, 2] + top[:, 3]) / 2
    expected = (Z[ROWS, np.asarray(targets)] - Z[ROWS, Y]) / scale
    np.testing.assert_allclose(losses.dlr_targeted(LOGITS, LABELS, targets), expected, rtol=1e-4)


@pytest.mark.parametrize("loss", [losses.dlr, losses.margin])
def test_shift_invariance(loss):
    np.testing.assert_allclose(loss(LOGITS + 7, LABELS), loss(LOGITS, LABELS), rtol=1e-4)


def test_dlr_is_scale_invariant():
    np.testing.assert_allclose(
        losses.dlr(LOGITS * 9, LABELS), losses.dlr(LOGITS, LABELS), rtol=1e-5
    )


def mart(clean, moved, y, weight):
    """Wang et al.'s sum with probabilities, as the paper writes it."""
    p, q = scipy.special.softmax(clean, -1), scipy.special.softmax(moved, -1)
    rest = np.where(np.eye(clean.shape[-1], dtype=bool)[y], 0, q).max(-1)
    boosted = -np.log(q[ROWS, y]) - np.log(1 - rest)
    return boosted + weight * scipy.special.rel_entr(p, q).sum(-1) * (1 - p[ROWS, y])


def test_mart():
    found = losses.mart(LOGITS, OTHER, LABELS, weight=5.0)
    np.testing.assert_allclose(found, mart(Z, Q, Y, 5.0), rtol=1e-4)
    hot = losses.one_hot(LABELS, 5)
    soft = 0.8 * hot + 0.04
    np.testing.assert_allclose(
        losses.mart(LOGITS, OTHER, LABELS, weight=5.0, targets=hot), found, rtol=1e-6
    )
    change = losses.cross_entropy(OTHER, soft) - losses.cross_entropy(OTHER, hot)
    softened = losses.mart(LOGITS, OTHER, LABELS, weight=5.0, targets=soft)
    np.testing.assert_allclose(softened - found, change, rtol=1e-3, atol=1e-4)


def test_mart_is_finite_where_a_probability_is_one():
    sure = jnp.zeros((7, 5)).at[:, 2].set(300.0)  # the label of row 2, wrong in the others
    value, grad = jax.value_and_grad(lambda z: losses.mart(z, z, LABELS, weight=5.0).sum())(sure)
    # -log q_y = 300 and -log(1 - q_2) = 300 - log 4 in six rows, and nothing in row 2
    np.testing.assert_allclose(value, 6 * (600 - np.log(4)), rtol=1e-6)
    assert np.all(np.isfinite(grad))
    assert np.all(np.asarray(grad)[[0, 1, 3, 4, 5, 6], 2] > 0)


def test_half_precision_is_computed_in_float32():
    half = LOGITS.astype(jnp.bfloat16)
    for value in (
        losses.cross_entropy(half, LABELS),
        losses.kl(half, half),
        losses.dlr(half, LABELS),
        losses.mart(half, half, LABELS, weight=1.0),
    ):
        assert value.dtype == jnp.float32


def test_too_few_classes_and_bad_shapes():
    with pytest.raises(ValueError, match="3 classes"):
        losses.dlr(LOGITS[:, :2], LABELS % 2)
    with pytest.raises(ValueError, match="4 classes"):
        losses.dlr_targeted(LOGITS[:, :3], LABELS % 3, LABELS % 3)
    with pytest.raises(ValueError, match="floating"):
        losses.cross_entropy(LABELS[None], LABELS)
    with pytest.raises(ValueError, match="nearest: margin"):
        losses.make("margins")
