"""FAB: exact projections onto hyperplanes in the box, and the exact distance on linear models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import NORMS, attacked, distance_to_plane, distances, images, linear
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdefense import attacks, threat
from jaxdefense.attacks.apgd import passes as apgd_passes
from jaxdefense.attacks.fab import passes, refine
from jaxdefense.attacks.square import passes as square_passes

KEY = jax.random.key(0)


@pytest.mark.parametrize("norm", NORMS)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), gap=st.floats(-30, 30), scale=st.sampled_from([1e-20, 1.0, 1e6]))
def test_reach_is_the_shortest_step_onto_a_hyperplane_in_the_box(norm, seed, gap, scale):
    rng = np.random.default_rng(seed)
    x = rng.uniform(size=(2, 4, 4, 1)).astype(np.float32)
    x[rng.uniform(size=x.shape) < 0.2] = 0
    normal = rng.normal(size=x.shape).astype(np.float32)
    normal[rng.uniform(size=x.shape) < 0.2] = 0
    ball = threat.make(norm, 0.1)
    gaps = jnp.full(2, gap * scale)
    step = np.asarray(REACH[norm](x, normal * np.float32(scale), gaps), np.float64)
    assert np.all((x + step >= -1e-6) & (x + step <= 1 + 1e-6))
    for i in range(2):
        a, direction = normal[i].ravel().astype(np.float64), np.sign(gap)
        here = x[i].ravel().astype(np.float64)
        gained = float(a @ step[i].ravel())
        most = np.sum(np.abs(a) * np.where(a * direction > 0, 1 - here, here)) if gap else 0
        assert gained == pytest.approx(np.clip(gap, -most, most), rel=1e-4, abs=1e-4)
        if 1e-3 < abs(gap) < most * 0.999:
            exact = distance_to_plane(norm, direction * a, abs(gap), here)
            length = ball.distance(jnp.asarray(step[i : i + 1]), jnp.zeros((1, 4, 4, 1)))
            assert float(length[0]) == pytest.approx(exact, rel=1e-4)


REACH = {norm: jax.jit(threat.make(norm, 0.1).step_to_hyperplane) for norm in NORMS}


@pytest.mark.parametrize("norm", NORMS)
def test_reach_without_a_normal_stays(norm):
    x = images(2)
    np.testing.assert_array_equal(REACH[norm](x, jnp.zeros_like(x), jnp.ones(2)), 0)


@pytest.mark.parametrize("norm", NORMS)
def test_dual_is_the_gain_of_the_steepest_unit_step(norm):
    ball = threat.make(norm, 0.1)
    grad = jax.random.normal(KEY, (3, 8, 8, 1))
    middle = jnp.full_like(grad, 0.5)
    step = ball.ascent(grad, middle, 0.4)
    gain = jnp.sum(grad * step, (1, 2, 3)) / 0.4
    np.testing.assert_allclose(ball.dual_norm(grad), gain, rtol=1e-5)


@pytest.mark.parametrize(
    ("classes", "batch", "targeted"),
    [(2, 3, False), (3, 1, False), (10, 8, False), (3, 3, True), (10, 8, True)],
)
@pytest.mark.parametrize("norm", NORMS)
def test_finds_the_exact_distance(norm, classes, batch, targeted):
    """Random weights and images at the box: the nearest class and the box both matter."""
    predict, weights = linear(classes)
    x = images(batch)
    labels = jnp.argmax(predict(x), -1)
    ball = threat.make(norm, 0.01)
    attack = attacks.fab(ball, steps=15, minimal=True)
    if targeted:
        attack = attacks.fab_targeted(ball, targets=classes - 1, steps=15, minimal=True)
    x_adv = attacked(attack, predict, KEY, x, labels)
    assert bool(attacks.fooled(predict(x_adv), labels).all())
    assert np.min(x_adv) >= 0
    assert np.max(x_adv) <= 1
    share = np.asarray(ball.distance(x_adv, x)) / distances(norm, x, labels, weights)
    assert share.min() > 1 - 1e-4
    assert share.max() < 1.02


@pytest.mark.parametrize("norm", NORMS)
def test_keeps_what_is_inside_the_ball_and_else_the_image(norm):
    predict, weights = linear(3)
    x = images(8)
    labels = jnp.argmax(predict(x), -1)
    exact = distances(norm, x, labels, weights)
    eps = float(np.sort(exact)[4] * 1.03)  # half of them are within reach
    ball = threat.make(norm, eps)
    x_adv = attacked(attacks.fab_targeted(ball, targets=2, steps=20), predict, KEY, x, labels)
    fooled = np.asarray(attacks.fooled(predict(x_adv), labels))
    np.testing.assert_array_equal(fooled, exact < eps)
    np.testing.assert_array_equal(np.asarray(x_adv)[~fooled], np.asarray(x)[~fooled])
    assert float(ball.distance(x_adv, x).max()) <= eps


def test_restarts_help_where_the_gradient_at_the_image_is_dead():
    def predict(x):
        """The plateau of radius .05 around the middle gives no gradient."""
        z = jnp.sum(jnp.maximum(jnp.abs(x - 0.5) - 0.05, 0), (1, 2, 3))
        return jnp.stack([jnp.full_like(z, 1.0), z], -1)

    x, labels = jnp.full((3, 8, 8, 1), 0.5), jnp.zeros(3, jnp.int32)
    ball = threat.Linf(0.3)
    once = attacked(attacks.fab(ball, steps=10), predict, KEY, x, labels)
    np.testing.assert_array_equal(once, x)
    again = attacked(attacks.fab(ball, steps=10, restarts=2), predict, KEY, x, labels)
    assert bool(attacks.fooled(predict(again), labels).all())


def test_refine_only_comes_nearer_and_stays_fooling():
    predict, _ = linear(3)
    x, far = images(12), images(12, seed=7)
    labels = jnp.argmax(predict(x), -1)
    near = jax.jit(lambda x, far: refine(predict, x, labels, far, steps=6))(x, far)
    before = np.asarray(attacks.fooled(predict(far), labels))
    assert 3 <= before.sum() < 12
    np.testing.assert_array_equal(attacks.fooled(predict(near), labels), before)
    ball = threat.L2(1.0)
    moved = np.asarray(ball.distance(near, x) < 0.99 * ball.distance(far, x))
    np.testing.assert_array_equal(moved, before)


@pytest.mark.slow
def test_passes_are_the_calls_of_the_model():
    """Counted by hand for 2 steps: the image, two forward a step, the search."""
    calls = {"forward": 0, "backward": 0}

    @jax.custom_vjp
    def counted(x):
        return x

    def forward(x):
        return x, None

    def backward(_, g):
        jax.debug.callback(lambda: calls.update(backward=calls["backward"] + 1))
        return (g,)

    counted.defvjp(forward, backward)
    predict, _ = linear(4)

    def watched(x):
        jax.debug.callback(lambda: calls.update(forward=calls["forward"] + 1))
        return predict(counted(x))

    x = images(2)
    labels = jnp.argmax(predict(x), -1)
    ball = threat.Linf(1e-4)
    for attack, budget in (
        (attacks.fab(ball, steps=2), passes(steps=2, num_classes=4)),
        (attacks.fab_targeted(ball, steps=2, targets=3), passes(steps=2, targets=3)),
        (
            attacks.apgd(ball, steps=4, restarts=2),
            apgd_passes(steps=4, restarts=2),
        ),
        (attacks.square(ball, queries=5), square_passes(queries=5)),
    ):
        calls.update(forward=0, backward=0)
        jax.block_until_ready(attack(watched, KEY, x, labels))
        jax.effects_barrier()
        assert (calls["forward"], calls["backward"]) == tuple(budget)


@pytest.mark.parametrize(
    "options", [dict(steps=0), dict(eta=0.5), dict(beta=2.0), dict(alpha_max=-1.0)]
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        attacks.fab(threat.Linf(0.1), **options)
