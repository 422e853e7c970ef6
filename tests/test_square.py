"""Square: no gradients, the schedule, the exact maximum where it is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import NORMS, attacked, images, largest_gain, linear

from jaxdefense import attacks, losses, threat
from jaxdefense.attacks.square import _PROPOSALS, _shares

KEY = jax.random.key(0)


@jax.custom_vjp
def _no_gradient(x):
    return x


def _raise(*_):
    raise AssertionError("square asked for a gradient")


_no_gradient.defvjp(_raise, _raise)


@pytest.mark.parametrize("norm", NORMS)
def test_fools_without_gradients(norm):
    predict, _ = linear(3)
    x = images(8)
    labels = jnp.argmax(predict(x), -1)
    eps = {"linf": 0.3, "l2": 2.5, "l1": 15.0}[norm]
    ball = threat.make(norm, eps)
    attack = attacks.square(ball, queries=1000)
    x_adv = attacked(attack, lambda z: predict(_no_gradient(z)), KEY, x, labels)
    assert bool(attacks.fooled(predict(x_adv), labels).all())
    assert np.min(x_adv) >= 0
    assert np.max(x_adv) <= 1
    assert float(ball.distance(x_adv, x).max()) <= eps * (1 + 1e-5)
    with pytest.raises(AssertionError, match="gradient"):
        attacks.fgsm(ball)(lambda z: predict(_no_gradient(z)), KEY, x, labels)


def test_reaches_the_exact_maximum_in_linf():
    """Single pixels are flipped in the end, so every pixel finds its sign."""
    predict, weights = linear(2)
    x = images(3)
    labels = jnp.argmax(predict(x), -1)
    eps = 1e-3
    attack = attacks.square(threat.Linf(eps), queries=3000)
    x_adv = attacked(attack, predict, KEY, x, labels)
    for i, label in enumerate(np.asarray(labels)):
        direction = weights[:, 1 - label] - weights[:, label]
        gain = np.asarray(x_adv - x, np.float64)[i].ravel() @ direction
        exact = largest_gain("linf", eps, direction, np.asarray(x, np.float64)[i].ravel())
        assert gain == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("norm", NORMS)
def test_more_queries_never_lower_the_margin(norm):
    predict, _ = linear(3, size=192)
    x = jax.random.uniform(jax.random.key(3), (4, 8, 8, 3))
    labels = jnp.argmax(predict(x), -1)
    ball = threat.make(norm, {"linf": 0.01, "l2": 0.1, "l1": 0.3}[norm])

    def margins(queries):
        attack = attacks.square(ball, queries=queries)
        x_adv = attacked(attack, predict, KEY, x, labels)
        return np.asarray(losses.margin(predict(x_adv), labels))

    few, many = margins(5), margins(200)
    assert np.all(many >= few)
    assert np.all(many > few + 1e-3)


def test_the_schedule_is_the_papers():
    shares = _shares(10_000, 0.8, False)
    for n, halvings in ((10, 0), (11, 1), (50, 1), (51, 2), (1000, 4), (8000, 8), (8001, 9)):
        assert shares[n] == 0.8 / 2**halvings
    np.testing.assert_array_equal(_shares(100, 0.8, True), shares[::100])
    assert [_PROPOSALS["linf"].side(p, 28, 28) for p in (0.8, 0.4, 1e-4)] == [25, 18, 1]
    assert [_PROPOSALS["l2"].side(p, 28, 28) for p in (0.8, 0.4, 1e-4)] == [25, 19, 3]


@pytest.mark.parametrize(("norm", "power"), [("l2", 2), ("l1", 1)])
@pytest.mark.parametrize("side", [1, 2, 3, 6, 11])
def test_bumps_have_norm_one_and_two_signs(norm, power, side):
    bump = _PROPOSALS[norm]._bump(side)
    assert np.sum(np.abs(bump) ** power) == pytest.approx(1)
    assert np.all(bump[: side // 2] > 0)
    assert np.all(bump[side // 2 :] < 0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(3, 3, 1), (4, 9, 2), (9, 4, 2)])
def test_small_and_oblong_images(norm, shape):
    predict, _ = linear(2, size=int(np.prod(shape)))
    x = jax.random.uniform(KEY, (2, *shape))
    labels = jnp.argmax(predict(x), -1)
    ball = threat.make(norm, 0.05)
    x_adv = attacked(attacks.square(ball, queries=20), predict, KEY, x, labels)
    assert float(ball.distance(x_adv, x).max()) <= 0.05 * (1 + 1e-5)
    assert np.all(losses.margin(predict(x_adv), labels) > losses.margin(predict(x), labels))


def test_bad_options_and_images():
    with pytest.raises(ValueError, match="queries"):
        attacks.square(threat.Linf(0.1), queries=0)
    with pytest.raises(ValueError, match="p_init"):
        attacks.square(threat.Linf(0.1), p_init=1.5)
    with pytest.raises(ValueError, match=r"\(B, H, W, C\)"):
        attacks.square(threat.Linf(0.1))(
            lambda x: x[:, 0, 0, 0, :2], KEY, jnp.zeros((2, 1, 1, 1, 5)), jnp.zeros(2, int)
        )
