"""DeepFool, CW, DDN, FMN: the exact distance on linear models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import attacked, clear_images, distances, even, images, linear

from jaxdefense import attacks, threat

KEY = jax.random.key(0)
FACTORIES = {
    "deepfool": (attacks.deepfool, dict(overshoot=0.01), ("linf", "l2", "l1")),
    "fmn": (attacks.fmn, dict(steps=150), ("linf", "l2", "l1")),
    "ddn": (attacks.ddn, dict(steps=150), ("l2",)),
    "cw": (attacks.cw, dict(steps=300, searches=12), ("l2",)),
}
CASES = [(name, norm) for name, (_, _, norms) in FACTORIES.items() for norm in norms]


def run(name, norm, predict, x, labels, **options):
    factory, given, _ = FACTORIES[name]
    ball = threat.make(norm, options.pop("eps", 0.01))
    attack = factory(ball, **(given | options))
    return attacked(attack, predict, KEY, x, labels), ball


@pytest.mark.parametrize(
    ("make", "classes", "batch"), [(linear, 2, 3), (even, 3, 1), (even, 10, 8)]
)
@pytest.mark.parametrize(("name", "norm"), CASES)
def test_finds_the_exact_distance(name, norm, make, classes, batch):
    """Two classes with images at the box; more, with one rival ahead."""
    predict, weights = make(classes)
    x = images(batch) if make is linear else clear_images(batch, weights)
    labels = jnp.argmax(predict(x), -1)
    x_adv, ball = run(name, norm, predict, x, labels, minimal=True)
    assert bool(attacks.fooled(predict(x_adv), labels).all())
    assert np.min(x_adv) >= 0
    assert np.max(x_adv) <= 1
    share = np.asarray(ball.distance(x_adv, x)) / distances(norm, x, labels, weights)
    assert share.min() > 1 - 1e-4
    assert share.max() < 1.02


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_deepfool_finds_the_nearest_class_in_the_box(norm):
    """Random weights and ten classes: not always the largest logit."""
    predict, weights = linear(10)
    x = images(8)
    labels = jnp.argmax(predict(x), -1)
    x_adv, ball = run("deepfool", norm, predict, x, labels, minimal=True)
    share = np.asarray(ball.distance(x_adv, x)) / distances(norm, x, labels, weights)
    assert share.max() < 1.02


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_keeps_what_is_inside_the_ball_and_else_the_image(name, norm):
    predict, weights = linear(2)
    x = images(8)
    right = jnp.argmax(predict(x), -1)
    labels = right.at[0].set(1 - right[0])
    exact = distances(norm, x, labels, weights)
    eps = float(np.sort(exact)[4] * 1.03)
    x_adv, ball = run(name, norm, predict, x, labels, eps=eps)
    fooled = np.asarray(attacks.fooled(predict(x_adv), labels))
    np.testing.assert_array_equal(fooled, exact < eps)
    np.testing.assert_array_equal(np.asarray(x_adv)[~fooled], np.asarray(x)[~fooled])
    np.testing.assert_array_equal(x_adv[0], x[0])
    assert float(ball.distance(x_adv, x).max()) <= eps


def test_cw_confidence_is_a_margin_in_logits():
    predict, _ = linear(2)
    x = images(4)
    labels = jnp.argmax(predict(x), -1)
    x_adv, _ = run("cw", "l2", predict, x, labels, minimal=True, confidence=1.0)
    margins = np.asarray(jnp.abs(jnp.diff(predict(x_adv), axis=-1))[:, 0])
    assert bool(attacks.fooled(predict(x_adv), labels).all())
    assert np.all((margins > 1) & (margins < 1.2))


@pytest.mark.parametrize("name", ["ddn", "cw"])
def test_l2_attacks_refuse_other_norms(name):
    with pytest.raises(ValueError, match="L2 attack"):
        attacks.make(name, threat.Linf(0.1))


@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_bad_steps(name):
    with pytest.raises(ValueError, match="steps"):
        attacks.make(name, threat.L2(0.1), steps=0)
