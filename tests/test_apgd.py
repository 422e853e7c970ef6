"""APGD: the exact maximum on linear models, the paper's loop in NumPy, few classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import NORMS, attacked, images, largest_gain, linear

from jaxdefense import attacks, losses, threat
from jaxdefense.attacks import apgd as apgd_factory
from jaxdefense.attacks.apgd import _Halving, _Plan, _rule, passes
from jaxdefense.types import example_keys, fold_in

KEY = jax.random.key(0)
EPS = {"linf": 0.1, "l2": 0.8, "l1": 3.0}
WEIGHTS = (
    jax.random.normal(jax.random.key(0), (64, 32)),
    jax.random.normal(jax.random.key(1), (32, 10)),
)


def net(x):
    return jnp.tanh(x.reshape(x.shape[0], -1) @ WEIGHTS[0] / 4) @ WEIGHTS[1]


def away(logits, labels):
    """-z_y, a linear loss."""
    return -jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]


@pytest.mark.parametrize(("classes", "batch"), [(2, 3), (3, 1), (10, 8)])
@pytest.mark.parametrize("norm", NORMS)
def test_reaches_the_exact_maximum(norm, classes, batch):
    predict, weights = linear(classes)
    x = images(batch)
    labels = jnp.argmax(predict(x), -1)
    ball = threat.make(norm, EPS[norm])
    attack = attacks.apgd(ball, loss=away, early_stop=False)
    x_adv = attacked(attack, predict, KEY, x, labels)
    # L1's step never falls below eps / 10, so it circles the maximum a little outside.
    share = 0.99 if norm == "l1" else 0.9999
    for i in range(batch):
        direction = -weights[:, int(labels[i])]
        gain = np.asarray(x_adv - x, np.float64)[i].ravel() @ direction
        exact = largest_gain(norm, EPS[norm], direction, np.asarray(x, np.float64)[i].ravel())
        assert share * exact <= gain <= exact * (1 + 1e-5)
    assert float(ball.distance(x_adv, x).max()) <= EPS[norm] * (1 + 1e-5)


def test_is_the_papers_loop():
    """Algorithm 1 in NumPy, L_inf: momentum, checkpoints, both conditions for halving.

    In float64: 100 steps along signs take a rounding error far.
    """
    with jax.enable_x64(True):
        _papers_loop(0.08, 100, np.asarray(images(6), np.float64))


def _papers_loop(eps, steps, x):
    ball = threat.Linf(eps)
    labels = jnp.argmax(net(x), -1)
    grad = jax.jit(jax.value_and_grad(lambda z: jnp.sum(losses.dlr(net(z), labels))))
    value = jax.jit(lambda z: losses.dlr(net(z), labels))

    def look(z):
        return np.asarray(value(z)), np.asarray(grad(z)[1])

    def inside(z):
        return np.clip(np.clip(z, x - eps, x + eps), 0, 1)

    p = [0.0, 0.22]
    while p[-1] < 1:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    checkpoints = [round(share * steps) for share in p]

    z = np.asarray(ball.project(ball.sample(fold_in(example_keys(KEY, 6), 0), jnp.asarray(x)), x))
    old, (f, g) = z, look(z)
    best, best_z, best_g = f, z, g
    step, rises = np.full(6, 2 * eps), np.zeros(6)
    halved, best_before, start = np.ones(6, bool), best, 0
    wide = (slice(None), None, None, None)
    for n in range(1, steps + 1):
        ahead = inside(z + step[wide] * np.sign(g))
        share = 1.0 if n == 1 else 0.75
        z, old = inside(z + share * (ahead - z) + (1 - share) * (z - old)), z
        before, (f, g) = f, look(z)
        rises += f > before
        better = f > best
        best = np.where(better, f, best)
        best_z, best_g = np.where(better[wide], z, best_z), np.where(better[wide], g, best_g)
        if n in checkpoints:
            halve = (rises <= 0.75 * (n - start)) | (~halved & (best <= best_before))
            step = np.where(halve, step / 2, step)
            z, g = np.where(halve[wide], best_z, z), np.where(halve[wide], best_g, g)
            halved, best_before, rises, start = halve, best, np.zeros(6), n
    attack = attacks.apgd(ball, steps=steps, loss="dlr", early_stop=False)
    got = attacked(attack, net, KEY, jnp.asarray(x), labels)
    assert step.min() < 2 * eps / 4  # the halvings took place
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, best_z, atol=1e-9)


def test_checkpoints_of_a_hundred_steps():
    windows = _Halving(0.75, 0.75).windows(100)
    assert np.flatnonzero(windows).tolist() == [22, 41, 57, 70, 80, 87, 93, 99]
    assert windows[[22, 41, 99]].tolist() == [22, 19, 6]


def test_warm_eps_ends_in_the_ball_and_counts_only_there():
    ball = threat.L1(3.0)
    plan = _Plan.make(_rule(ball, 0.75, 0.75), 100, True)
    assert plan.factor.tolist() == [3.0] * 31 + [2.0] * 31 + [1.0] * 41
    assert np.array_equal(plan.counts, plan.factor == 1)
    assert len(plan.factor) == passes(steps=100, warm_eps=True).backward
    x = images(6)
    labels = jnp.argmax(net(x), -1)
    x_adv = attacked(
        attacks.apgd(ball, steps=30, warm_eps=True, early_stop=False), net, KEY, x, labels
    )
    assert float(ball.distance(x_adv, x).max()) <= 3.0 * (1 + 1e-5)
    gain = losses.cross_entropy(net(x_adv), labels) - losses.cross_entropy(net(x), labels)
    assert float(gain.min()) > 0


@pytest.mark.parametrize("norm", NORMS)
def test_more_restarts_never_lower_the_loss(norm):
    x = images(6)
    labels = jnp.argmax(net(x), -1)

    def loss(restarts):
        attack = attacks.apgd(
            threat.make(norm, EPS[norm] / 2), steps=8, restarts=restarts, early_stop=False
        )
        x_adv = attacked(attack, net, KEY, x, labels)
        return np.asarray(losses.cross_entropy(net(x_adv), labels))

    one, four = loss(1), loss(4)
    assert np.all(four >= one - 1e-6)
    assert np.any(four > one + 1e-4)


def test_stops_at_the_first_fooling_point_and_leaves_the_misclassified():
    x = images(8)
    right = jnp.argmax(net(x), -1)
    labels = jnp.where(jnp.arange(8) < 4, right, (right + 1) % 10)
    x_adv = attacked(attacks.apgd(threat.Linf(0.1), steps=20), net, KEY, x, labels)
    np.testing.assert_array_equal(x_adv[4:], x[4:])
    assert bool(attacks.fooled(net(x_adv), labels).all())
    # One long after the first would be far beyond the boundary.
    far = attacked(attacks.apgd(threat.Linf(0.1), steps=20, early_stop=False), net, KEY, x, labels)
    first, last = (np.asarray(losses.margin(net(z), labels))[:4] for z in (x_adv, far))
    assert np.all(first < last)


def test_targets_find_what_the_likeliest_class_hides():
    """Up one pixel, the likeliest class comes near; only down it the other one gets ahead."""

    def predict(x):
        p = x[:, 0, 0, 0] - 0.5
        zero = jnp.zeros_like(p)
        return jnp.stack([zero, -0.9 + 4 * p, -2 - 10.5 * p, zero - 9, zero - 9], -1)

    x, labels = jnp.full((8, 2, 2, 1), 0.5), jnp.zeros(8, jnp.int32)
    ball = threat.Linf(0.2)
    one = attacked(attacks.apgd(ball, steps=10, loss="dlr"), predict, KEY, x, labels)
    assert 0 < int(attacks.fooled(predict(one), labels).sum()) < 8
    with pytest.warns(attacks.FewClassesWarning, match="4 are tried"):
        all_ = attacked(attacks.apgd_targeted(ball, steps=10), predict, KEY, x, labels)
    assert bool(attacks.fooled(predict(all_), labels).all())


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_fall_back_and_say_so(classes):
    predict, _ = linear(classes)
    x = images(4)
    labels = jnp.argmax(predict(x), -1)
    ball = threat.Linf(0.4)
    attack = attacks.apgd_targeted(ball, targets=classes - 1, steps=10)
    with pytest.warns(attacks.FewClassesWarning, match="targeted DLR"):
        x_adv = attacked(attack, predict, KEY, x, labels)
    assert bool(attacks.fooled(predict(x_adv), labels).all())
    if classes == 2:
        with pytest.warns(attacks.FewClassesWarning, match="margin"):
            x_adv = attacked(attacks.apgd(ball, steps=10, loss="dlr"), predict, KEY, x, labels)
        assert bool(attacks.fooled(predict(x_adv), labels).all())


def test_a_dead_gradient_leaves_valid_images():
    x = images(3)
    attack, labels = attacks.apgd(threat.L2(0.5), steps=5), jnp.argmax(net(x), -1)
    x_adv = attacked(attack, lambda z: jax.lax.stop_gradient(net(z)), KEY, x, labels)
    assert np.isfinite(x_adv).all()
    assert float(threat.L2(0.5).distance(x_adv, x).max()) <= 0.5 * (1 + 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(steps=0), "steps"),
        (dict(restarts=0), "restarts"),
        (dict(rho=2.0), "rho"),
        (dict(momentum=-1.0), "momentum"),
        (dict(loss="dlrr"), "nearest: dlr"),
        (dict(steps=4, warm_eps=True), "warm_eps"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        apgd_factory(threat.Linf(0.1), **options)


def test_unknown_targeted_loss():
    with pytest.raises(ValueError, match="dlr_targeted"):
        attacks.apgd_targeted(threat.Linf(0.1), loss="dlr")
