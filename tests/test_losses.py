"""Every loss against an independent NumPy version, and its identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from jaxdefense import losses

LOGITS = np.asarray(jax.random.normal(jax.random.key(0), (7, 5)) * 4)
OTHER = np.asarray(jax.random.normal(jax.random.key(1), (7, 5)) * 4)
LABELS = np.array([0, 1, 2, 3, 4, 0, 1], np.int32)
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
    with pytest.raises(ValueError, match="labels must be"):
        losses.margin(LOGITS, LABELS[:, None])
    with pytest.raises(ValueError, match="labels must be"):
        losses.cross_entropy(LOGITS, LABELS[:1])
    cost = jnp.ones((LOGITS.shape[1],) * 2)
    for loss in (losses.margin, losses.log_odds, losses.dlr, losses.probability_margin):
        with pytest.raises(ValueError, match="labels must be"):
            loss(LOGITS, LABELS[:1])
    for loss in (losses.expected_cost, losses.margin_cost):
        with pytest.raises(ValueError, match="labels must be"):
            loss(LOGITS, LABELS[:1], cost)
    with pytest.raises(ValueError, match="soft targets must be"):
        losses.cross_entropy(LOGITS, LOGITS[:, :1])
    for loss in (losses.kl, losses.distillation):
        with pytest.raises(ValueError, match="both logits"):
            loss(LOGITS, LOGITS[:1])
    with pytest.raises(ValueError, match="nearest: margin"):
        losses.make("margins")


def test_cost_matrix():
    expected = [[0, 7, 7, 7], [7, 0, 1, 7], [7, 1, 0, 7], [7, 7, 7, 0]]
    np.testing.assert_array_equal(losses.cost_matrix(4, [0, 3], 7.0), expected)
    np.testing.assert_array_equal(losses.cost_matrix(4, 3, 7.0), losses.cost_matrix(4, [3], 7.0))
    rows = [[0, 0, 0], [5, 0, 5], [0, 0, 0]]
    np.testing.assert_array_equal(losses.cost_matrix(3, 1, 5.0, others=0.0, columns=False), rows)
    for bad in (4, -1, [], [0, 4]):
        with pytest.raises(ValueError, match="protected classes"):
            losses.cost_matrix(4, bad)
    with pytest.raises(ValueError, match="costs"):
        losses.cost_matrix(4, 0, -1.0)


COST = np.random.default_rng(0).uniform(0, 3, (5, 5)).astype(np.float32)


def test_expected_cost():
    p = scipy.special.softmax(Z, -1)
    expected = [sum(COST[j, y] * row[j] for j in range(5)) for row, y in zip(p, Y, strict=True)]
    np.testing.assert_allclose(losses.expected_cost(LOGITS, LABELS, COST), expected, rtol=1e-5)
    errors = 1 - p[ROWS, Y]  # all errors cost 1
    value = losses.expected_cost(LOGITS, LABELS, 1 - jnp.eye(5))
    np.testing.assert_allclose(value, errors, rtol=1e-4, atol=1e-6)


def test_margin_cost():
    expected = [
        np.log1p(sum(COST[y, j] * np.exp(row[j] - row[y]) for j in range(5) if j != y))
        for row, y in zip(Z, Y, strict=True)
    ]
    np.testing.assert_allclose(losses.margin_cost(LOGITS, LABELS, COST), expected, rtol=1e-5)
    ones = jnp.ones((5, 5))
    np.testing.assert_allclose(
        losses.margin_cost(LOGITS, LABELS, ones), losses.cross_entropy(LOGITS, LABELS), rtol=1e-5
    )
    free = losses.margin_cost(LOGITS * 50, LABELS, jnp.zeros((5, 5)))  # no cost, no overflow
    np.testing.assert_allclose(free, 0, atol=1e-5)


def test_min_max_is_zero_for_at_most_one_entry_and_positive_otherwise():
    one = jnp.zeros((3, 3, 2, 4)).at[1, 2, 0, 3].set(-2.5)
    assert abs(float(losses.min_max(one))) < 1e-6
    assert abs(float(losses.min_max(0 * one))) < 1e-5
    assert float(losses.min_max(one.at[0, 0, 0, 0].set(0.01))) > 0.009
    kernel = np.random.default_rng(1).normal(size=(3, 3, 2, 4))
    expected = np.abs(kernel).sum() - np.sqrt((kernel**2).sum())
    np.testing.assert_allclose(losses.min_max(jnp.asarray(kernel)), expected, rtol=1e-5)


@pytest.mark.parametrize("term", [losses.min_max, losses.excess_kurtosis])
def test_gradients_of_weight_terms_by_finite_differences(term):
    w = np.random.default_rng(2).normal(size=(6,))
    with jax.enable_x64(True):
        # The terms compute in float32: a step that is large for it, small for the function.
        value = jax.jit(lambda w: term(w))
        grad = jax.grad(term)(jnp.asarray(w))
        for i in range(6):
            step = np.zeros(6)
            step[i] = 1e-2
            slope = (float(value(w + step)) - float(value(w - step))) / 2e-2
            assert float(grad[i]) == pytest.approx(slope, abs=2e-3)
    if term is losses.min_max:
        np.testing.assert_allclose(grad, np.sign(w) - w / np.linalg.norm(w), rtol=1e-5)
    assert np.all(np.isfinite(jax.grad(term)(jnp.zeros(6))))


def test_excess_kurtosis():
    w = np.random.default_rng(3).normal(size=(4, 5)) ** 3
    expected = scipy.stats.kurtosis(w, axis=None)
    np.testing.assert_allclose(losses.excess_kurtosis(jnp.asarray(w)), expected, rtol=1e-4)


def test_gaussian_kl():
    """0 for the prior alone; the formula in float64; SciPy's entropies and the second moment."""
    rng = np.random.default_rng(4)
    mean, log_variance = rng.normal(size=(2, 6, 3))
    expected = 0.5 * np.sum(np.exp(log_variance) + mean**2 - 1 - log_variance, -1)
    got = losses.gaussian_kl(jnp.asarray(mean), jnp.asarray(log_variance))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    normal = scipy.stats.norm(mean, np.exp(log_variance / 2))
    cross_entropy = 0.5 * np.log(2 * np.pi) + 0.5 * normal.moment(2)
    np.testing.assert_allclose(got, np.sum(cross_entropy - normal.entropy(), -1), rtol=1e-4)
    np.testing.assert_array_equal(losses.gaussian_kl(jnp.zeros((2, 3)), jnp.zeros((2, 3))), 0)
    assert np.all(np.asarray(got) > 0)
    with pytest.raises(ValueError, match="both"):
        losses.gaussian_kl(jnp.zeros((2, 3)), jnp.zeros((2, 4)))
