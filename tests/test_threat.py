"""The three norms against closed forms, and projections against their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxdefense import threat

NORMS = {"linf": threat.Linf, "l2": threat.L2, "l1": threat.L1}
EPS = {"linf": 0.1, "l2": 0.7, "l1": 3.0}

project = jax.jit(lambda ball, v, x: ball.project(v, x))

pixels = hnp.arrays(np.float32, (2, 3, 2, 1), elements=st.floats(0, 1, width=32))
anywhere = hnp.arrays(np.float32, (2, 3, 2, 1), elements=st.floats(-2, 3, width=32))


def _threats():
    return [pytest.param(cls(EPS[norm]), id=norm) for norm, cls in NORMS.items()]


@pytest.mark.parametrize("ball", _threats())
@settings(max_examples=60, deadline=None)
@given(x=pixels, v=anywhere)
def test_projection_is_inside_and_idempotent(ball, x, v):
    x = jnp.asarray(x)
    p = project(ball, jnp.asarray(v), x)
    assert p.min() >= 0
    assert p.max() <= 1
    # Sums of six distances of up to 3 are rounded at 2e-6, and so is what L1's are cut by.
    assert np.all(np.asarray(ball.distance(p, x)) <= EPS[ball.norm] * (1 + 2e-6) + 1e-6)
    np.testing.assert_allclose(project(ball, p, x), p, atol=2e-7)


@pytest.mark.parametrize("ball", _threats())
@settings(max_examples=60, deadline=None)
@given(x=pixels, v=anywhere, w=anywhere)
def test_projection_is_the_nearest_point(ball, x, v, w):
    """<v - p, q - p> <= 0 for every q of a convex set, exactly when p is v's projection."""
    x, v = jnp.asarray(x), jnp.asarray(v)
    p = project(ball, v, x)
    for q in (project(ball, jnp.asarray(w), x), x, project(ball, x + 5 * (v - x), x)):
        angle = jnp.sum(((v - p) * (q - p)).reshape(2, -1), -1)
        assert float(angle.max()) <= 2e-5


@pytest.mark.parametrize("ball", _threats())
def test_projection_leaves_inner_points_alone(ball):
    x = jnp.full((1, 4, 4, 1), 0.5)
    v = x + 0.01
    np.testing.assert_array_equal(ball.project(v, x), v)


def test_projections_in_closed_form():
    x = jnp.full((1, 1, 2, 1), 0.5)
    v = x + jnp.asarray([0.3, 0.1]).reshape(1, 1, 2, 1)

    def moved(ball, target):
        return np.asarray(ball.project(target, x) - x).ravel()

    np.testing.assert_allclose(moved(threat.Linf(0.2), v), [0.2, 0.1], atol=1e-7)
    np.testing.assert_allclose(moved(threat.L2(0.1), v), np.array([3, 1]) / 10**1.5, atol=1e-7)
    np.testing.assert_allclose(moved(threat.L1(0.2), v), [0.2, 0.0], atol=1e-7)
    np.testing.assert_allclose(moved(threat.L1(0.3), v), [0.25, 0.05], atol=1e-7)
    # The box cuts the first pixel at +.5; what is left of the budget goes to the second.
    far = x + jnp.asarray([4.0, 3.0]).reshape(1, 1, 2, 1)
    np.testing.assert_allclose(moved(threat.L2(0.65), far), [0.5, 0.1725**0.5], atol=1e-6)
    np.testing.assert_allclose(moved(threat.L1(0.7), far), [0.5, 0.2], atol=1e-6)


@pytest.mark.parametrize("ball", _threats())
def test_samples_are_inside_and_depend_on_their_own_key_only(ball):
    x = jax.random.uniform(jax.random.key(0), (6, 4, 4, 1))
    keys = jax.random.split(jax.random.key(1), 6)
    samples = ball.sample(keys, x)
    assert np.all(np.asarray(ball.distance(samples, x)) <= EPS[ball.norm] + 1e-6)
    np.testing.assert_array_equal(ball.sample(keys[3:5], x[3:5]), samples[3:5])


@pytest.mark.parametrize("ball", _threats())
def test_samples_are_uniform(ball):
    """P(||u|| <= r eps) = r^D for the uniform law of a D-dimensional ball."""
    x = jnp.full((4000, 1, 3, 1), 0.5)
    small = ball.scaled(0.1)
    radius = np.asarray(small.distance(small.sample(jax.random.key(0), x), x)) / small.eps
    np.testing.assert_allclose(np.mean(radius <= 0.8), 0.8**3, atol=0.03)
    np.testing.assert_allclose(np.mean(radius <= 0.5), 0.5**3, atol=0.03)


@pytest.mark.parametrize("ball", _threats())
def test_ascent_is_the_longest_step_up(ball):
    """No step of that length raises <g, .> more; its length is the step size."""
    key = jax.random.key(0)
    g = jax.random.normal(key, (5, 4, 4, 1))
    x = jnp.full(g.shape, 0.5)
    step = ball.ascent(g, x, 0.2)
    np.testing.assert_allclose(ball.distance(x + step, x), 0.2, rtol=1e-5)
    gain = jnp.sum((g * step).reshape(5, -1), -1)
    rival = type(ball)(0.2).project(x + jax.random.normal(jax.random.key(1), x.shape), x) - x
    assert np.all(np.asarray(gain) >= np.asarray(jnp.sum((g * rival).reshape(5, -1), -1)))
    dual = {"linf": 1, "l2": 2, "l1": np.inf}[ball.norm]
    flat = np.asarray(g).reshape(5, -1)
    np.testing.assert_allclose(gain, 0.2 * np.linalg.norm(flat, dual, axis=-1), rtol=1e-5)


def test_l1_ascent_spends_what_the_box_leaves():
    x = jnp.asarray([0.9, 0.5, 0.5]).reshape(1, 1, 3, 1)
    g = jnp.asarray([3.0, -2.0, 1.0]).reshape(1, 1, 3, 1)
    step = threat.L1(1.0).ascent(g, x, 0.5)
    np.testing.assert_allclose(np.asarray(step).ravel(), [0.1, -0.4, 0.0], atol=1e-6)


@pytest.mark.parametrize("ball", _threats())
def test_zero_and_tiny_gradients_give_finite_steps(ball):
    x = jnp.full((2, 2, 2, 1), 0.5)
    assert np.all(np.asarray(ball.ascent(jnp.zeros_like(x), x, 0.1)) == 0)
    tiny = ball.ascent(jnp.full_like(x, 1e-30), x, 0.1)
    np.testing.assert_allclose(ball.distance(x + tiny, x), 0.1, rtol=1e-5)


@pytest.mark.parametrize("norm", sorted(NORMS))
def test_eps_per_example_and_traced(norm):
    x = jnp.full((3, 2, 2, 1), 0.5)
    v = x + jnp.asarray([0.4, -0.3, 0.2]).reshape(3, 1, 1, 1)
    eps = jnp.asarray([0.05, 0.1, 0.0])
    together = NORMS[norm](eps).project(v, x)
    for i, e in enumerate([0.05, 0.1, 0.0]):
        alone = NORMS[norm](e).project(v[i : i + 1], x[i : i + 1])
        np.testing.assert_allclose(together[i : i + 1], alone, atol=1e-7)
    grid = jax.jit(lambda e: NORMS[norm](e).project(v, x))
    np.testing.assert_allclose(grid(eps), together, atol=1e-7)


def test_norms_are_different_trees():
    """One jitted function is compiled for each norm; equal trees would share one program."""
    trees = [jax.tree.structure(cls(0.1)) for cls in NORMS.values()]
    for i, tree in enumerate(trees):
        assert [tree == other for other in trees] == [i == j for j in range(len(trees))]
    assert jax.tree.structure(threat.L1(0.2)) == jax.tree.structure(threat.L1(0.1))
    assert jax.tree.structure(threat.L1(0.1, (-1, 1))) != jax.tree.structure(threat.L1(0.1))


@pytest.mark.parametrize("eps", [8, -0.1, float("nan"), "8/255", [[0.1]]])
def test_bad_eps(eps):
    with pytest.raises(ValueError, match="eps"):
        threat.Linf(eps)


def test_bad_bounds_and_names():
    with pytest.raises(ValueError, match="low < high"):
        threat.L2(0.5, (1.0, 0.0))
    with pytest.raises(ValueError, match="nearest: linf"):
        threat.make("linff", 0.1)
    assert threat.make("l1", 2.0) == threat.L1(2.0)
