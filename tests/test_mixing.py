"""Masks and mixtures against NumPy and against what can be counted exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxdefense import mixing

KEY = jax.random.key(0)


def masks(n, size=32, alpha=1.0, key=KEY, **options):
    shape = jnp.zeros((n, size, size, 1))
    return np.asarray(jax.jit(lambda k: mixing.box_mask(k, shape, alpha=alpha, **options))(key))


def weights(n, key=KEY, **options):
    return np.asarray(jax.jit(lambda k: mixing.weights(k, n, **options))(key))


def expected(size):
    """(mean area, share of empty boxes) of CutMix's law at alpha 1, by counting every box."""
    total, empty = 0.0, 0.0
    centres = np.arange(size)
    for side in range(size):
        chance = ((side + 1) / size) ** 2 - (side / size) ** 2  # floor(size sqrt(v)) = side
        half = side // 2
        lengths = np.clip(centres + half, 0, size) - np.clip(centres - half, 0, size)
        total += chance * (lengths.mean() / size) ** 2
        empty += chance * (half == 0)
    return total, empty


@pytest.mark.parametrize("size", [8, 32])
def test_boxes_have_the_area_that_the_law_says(size):
    area, empty = expected(size)
    found = masks(20_000, size).mean((1, 2, 3))
    assert found.mean() == pytest.approx(area, abs=4 * float(found.std()) / 20_000**0.5)
    assert (found == 0).mean() == pytest.approx(empty, abs=4 * (empty / 20_000) ** 0.5)
    if size == 32:
        assert area == pytest.approx(0.30, abs=0.005)
        assert empty == pytest.approx(1 / 256)


def test_boxes_are_boxes_of_even_sides_cut_at_the_edges():
    mask = masks(500, 16)
    assert set(np.unique(mask)) == {0.0, 1.0}
    inner = 0
    for plane in mask[..., 0]:
        rows, columns = plane.any(1), plane.any(0)
        np.testing.assert_array_equal(plane, np.outer(rows, columns))
        for line in (rows, columns):
            assert np.sum(np.diff(np.pad(line.astype(int), 1)) == 1) <= 1  # one interval
        if rows.any() and not (rows[[0, -1]].any() or columns[[0, -1]].any()):
            inner += 1
            assert rows.sum() == columns.sum()
            assert rows.sum() % 2 == 0
    assert inner > 20
    np.testing.assert_allclose(mixing.area(jnp.asarray(mask)), mask.mean((1, 2, 3)), rtol=1e-6)


def test_boxes_of_other_laws_and_shapes():
    wide = jax.jit(lambda k: mixing.box_mask(k, jnp.zeros((300, 8, 24, 3))))(KEY)
    assert wide.shape == (300, 8, 24, 1)
    assert np.asarray(wide).any((0, 1, 3)).all()  # every row and column is met
    assert np.asarray(wide).any((0, 2, 3)).all()
    sure = masks(300, 32, alpha=200.0)  # u near 1/2: sides near 32 / sqrt(2)
    inner = ~(sure[:, [0, -1]].any((1, 2, 3)) | sure[:, :, [0, -1]].any((1, 2, 3)))
    assert inner.sum() > 10
    sides = np.sqrt(sure[inner].sum((1, 2, 3)))
    assert np.all(np.abs(sides - 22) <= 4)


def test_one_draw_for_the_batch():
    mask = masks(16, 16, per_sample=False)
    assert np.all(mask == mask[:1])
    assert not np.all(masks(16, 16) == masks(16, 16)[:1])
    assert np.ptp(weights(16, per_sample=False)) == 0
    assert np.ptp(weights(16)) > 0.3


def test_draws_do_not_depend_on_the_batch():
    keys = jax.random.split(KEY, 8)
    whole = masks(8, 16, key=keys)
    np.testing.assert_array_equal(whole[5:], masks(3, 16, key=keys[5:]))
    np.testing.assert_array_equal(weights(8, key=keys)[2:4], weights(2, key=keys[2:4]))


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_weights_follow_the_beta_law(alpha):
    assert (
        scipy.stats.kstest(weights(4000, alpha=alpha), scipy.stats.beta(alpha, alpha).cdf).pvalue
        > 1e-3
    )


def test_perturb_and_mix():
    x, x_adv = np.random.default_rng(0).random((2, 4, 6, 6, 1), np.float32)
    mask = masks(4, 6)
    perturb = jax.jit(lambda strength: mixing.perturb(x, x_adv, strength, (0.0, 1.0)))
    np.testing.assert_allclose(perturb(np.ones_like(mask)), x_adv, atol=1e-6)
    np.testing.assert_allclose(perturb(mask), np.where(mask > 0, x_adv, x), atol=1e-6)
    vertex = np.clip(x + 2 * (x_adv - x), 0, 1)
    np.testing.assert_allclose(perturb(2 * np.ones_like(mask)), vertex, atol=1e-6)
    weight = np.float32([0.0, 0.25, 0.5, 1.0])
    share = weight[:, None, None, None]
    mixed = jax.jit(mixing.mix)(weight, x, x_adv)
    np.testing.assert_allclose(mixed, share * x + (1 - share) * x_adv, rtol=1e-6)


def test_smoothing_keeps_the_share_and_the_sum():
    hot = jax.nn.one_hot(jnp.asarray([0, 2, 4]), 5)
    share = jnp.asarray([1.0, 0.6, 0.2])
    smooth = jax.jit(mixing.smooth)
    found = smooth(hot, share)
    np.testing.assert_allclose(found[0], hot[0])
    np.testing.assert_allclose(found[1], [0.1, 0.1, 0.6, 0.1, 0.1], rtol=1e-6)
    np.testing.assert_allclose(found[2], np.full(5, 0.2), rtol=1e-6)
    soft = jax.nn.softmax(jax.random.normal(KEY, (7, 5)))
    np.testing.assert_allclose(smooth(soft, 0.3).sum(-1), 1, rtol=1e-6)


def test_soft_labels_are_the_mixture_of_two_smoothings():
    soft = jax.nn.softmax(jax.random.normal(KEY, (6, 4)))
    t, s = np.asarray(soft, np.float64), np.linspace(0, 1, 6)[:, None]

    def smooth(q):
        return q * t + (1 - q) / 3 * (1 - t)

    found = jax.jit(mixing.soften)(soft, jnp.linspace(0, 1, 6), 1.0, 0.55)
    np.testing.assert_allclose(found, (1 - s) * smooth(1.0) + s * smooth(0.55), rtol=1e-5)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_rejects_laws_that_are_none(alpha):
    with pytest.raises(ValueError, match="alpha must be positive and finite"):
        mixing.weights(KEY, 4, alpha=alpha)
    with pytest.raises(ValueError, match="alpha must be positive and finite"):
        mixing.box_mask(KEY, jnp.zeros((4, 8, 8, 1)), alpha=alpha)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_rejects_shares_outside_the_unit_interval(share):
    with pytest.raises(ValueError, match=r"l2 must be in \[0, 1\]"):
        mixing.check_share("l2", share)
