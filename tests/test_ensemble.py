"""The worst case of several attacks, AutoAttack, and what every attack of the family keeps to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import NORMS, attacked, distances, images, linear

from jaxdefense import attacks, threat
from jaxdefense.attacks import ensemble, outcome
from jaxdefense.types import example_keys, per_example

KEY = jax.random.key(0)
EPS = {"linf": 0.1, "l2": 0.8, "l1": 3.0}
FAMILY = {
    "apgd": dict(steps=10, restarts=2),
    "apgd_targeted": dict(steps=8, targets=2),
    "fab": dict(steps=5, restarts=2),
    "fab_targeted": dict(steps=5, targets=2),
    "square": dict(queries=30),
    "fmn": dict(steps=20),
    "deepfool": dict(steps=5),
    "ddn": dict(steps=20),
    "cw": dict(steps=20, searches=3, learning_rate=0.05),
}
# One for each loop: `apgd` is `apgd_targeted`'s and `fab` is `fab_targeted`'s.
LOOPS = [name for name in FAMILY if name not in ("apgd", "fab_targeted")]
PAIRS = [
    (name, norm) for name in LOOPS for norm in (NORMS if name not in ("ddn", "cw") else ("l2",))
]
NET = (
    jax.random.normal(jax.random.key(0), (64, 32)),
    jax.random.normal(jax.random.key(1), (32, 10)),
)


def net(x):
    first, second = (w.astype(x.dtype) for w in NET)
    return jnp.tanh(x.reshape(x.shape[0], -1) @ first / 4) @ second


def make(name, norm, **more):
    return attacks.make(name, threat.make(norm, EPS[norm]), **(FAMILY[name] | more))


def valid(x_adv, x, norm):
    assert np.min(x_adv) >= 0
    assert np.max(x_adv) <= 1
    distance = threat.make(norm, EPS[norm]).distance(x_adv, x)
    assert float(distance.max()) <= EPS[norm] * (1 + 1e-5)


@pytest.mark.parametrize(("name", "norm"), PAIRS)
def test_an_examples_result_does_not_depend_on_its_batch(name, norm):
    """The same five examples among easy companions, which end at once, and in another order."""
    attack = make(name, norm)
    x = images(12)
    labels = jnp.argmax(net(x), -1)
    labels = labels.at[8:].set((labels[8:] + 1) % 10)  # misclassified already
    keys = example_keys(jax.random.key(3), 12)
    run = jax.jit(lambda k, x, y: attack(net, k, x, y))
    first, second = jnp.arange(8), jnp.array([9, 4, 8, 3, 2, 10, 1, 0])
    here = run(keys[first], x[first], labels[first])
    there = run(keys[second], x[second], labels[second])
    for place, example in enumerate(np.asarray(second)):
        if example < 8:
            np.testing.assert_allclose(there[place], here[example], atol=1e-5)
        else:
            np.testing.assert_array_equal(there[place], x[example])
    valid(here, x[:8], norm)
    assert float(attacks.fooled(net(here), labels[:8]).mean()) >= 0.5


@pytest.mark.parametrize("name", ["apgd", "fmn", "square"])
def test_eager_is_jitted(name):
    x = images(4)
    labels = jnp.argmax(net(x), -1)
    attack = make(name, "l2")
    np.testing.assert_allclose(
        attack(net, KEY, x, labels), attacked(attack, net, KEY, x, labels), atol=1e-5
    )


@pytest.mark.parametrize("name", LOOPS)
def test_bf16_models_and_float64_images(name):
    attack = make(name, "l2")
    x = images(6)
    labels = jnp.argmax(net(x), -1)
    x_adv = attacked(attack, lambda z: net(z.astype(jnp.bfloat16)), KEY, x, labels)
    assert x_adv.dtype == jnp.float32
    valid(x_adv, x, "l2")
    assert float(attacks.fooled(net(x_adv), labels).mean()) >= 0.5
    with jax.enable_x64(True):
        wide = attacked(attack, net, KEY, x.astype(jnp.float64), labels)
        assert wide.dtype == jnp.float64
        valid(wide, x.astype(jnp.float64), "l2")
        assert float(attacks.fooled(net(wide), labels).mean()) >= 0.5


@pytest.mark.parametrize("name", ["apgd_targeted", "ddn", "fab", "fmn", "square"])
def test_one_program_for_a_grid_of_eps(name):
    """eps is traced, one per example; a larger ball is at least as bad for the model."""
    x = images(6)
    labels = jnp.argmax(net(x), -1)

    @jax.jit
    def accuracy(eps):
        ball = threat.L2(jnp.full(6, eps))
        x_adv = attacks.make(name, ball, **FAMILY[name])(net, KEY, x, labels)
        return (~attacks.fooled(net(x_adv), labels)).mean(), ball.distance(x_adv, x).max()

    found = [accuracy(eps) for eps in (1e-4, 0.2, 3.0)]
    assert [float(a) for a, _ in found] == sorted((float(a) for a, _ in found), reverse=True)
    assert float(found[0][0]) == 1
    assert float(found[2][0]) < 0.5
    assert all(float(d) <= e * (1 + 1e-5) + 1e-6 for (_, d), e in zip(found, (1e-4, 0.2, 3.0)))


def test_worst_case_keeps_the_first_success_of_each_example():
    """Three attacks that write a constant into the images they know how to fool."""

    def predict(x):
        return jnp.stack([jnp.full(x.shape[0], 0.5), x[:, 0, 0, 0]], -1)

    def writer(value, able):
        def attack(predict, key, x, labels):
            strong = jnp.asarray(able)
            return jnp.where(per_example(strong, x) > 0, value, x + value / 100)

        return attack

    x, labels = jnp.zeros((4, 2, 2, 1)), jnp.zeros(4, jnp.int32)
    x = x.at[3].set(0.9)  # misclassified already
    attack = attacks.worst_case(
        writer(0.7, [1, 0, 0, 1]), writer(0.8, [1, 1, 0, 1]), writer(0.6, [0, 0, 0, 0])
    )
    got = attacked(attack, predict, KEY, x, labels)[:, 0, 0, 0]
    np.testing.assert_allclose(got, [0.7, 0.8, 0.006, 0.9], rtol=1e-6)
    with pytest.raises(ValueError, match="at least one"):
        attacks.worst_case()


def test_worst_case_skips_what_is_left_when_all_are_fooled():
    calls = []

    def late(predict, key, x, labels):
        jax.debug.callback(lambda: calls.append(1))
        return x

    x = images(3)
    labels = jnp.argmax(net(x), -1)
    easy, hard = (attacks.apgd(threat.Linf(eps), steps=5) for eps in (0.9, 1e-5))
    for first, expected in ((easy, 0), (hard, 1)):
        calls.clear()
        attacked(attacks.worst_case(first, late), net, KEY, x, labels).block_until_ready()
        jax.effects_barrier()
        assert len(calls) == expected


def test_stages_are_the_references():
    def listed(norm, version, classes=10):
        ball = threat.make(norm, EPS[norm])
        found = ensemble.stages(ball, version, classes)
        return {stage.name: tuple(stage.passes) for stage in found}

    standard = listed("linf", "standard")
    assert standard == {
        "apgd-ce": (102, 101),
        "apgd-t": (910, 909),
        "fab-t": (1806, 900),
        "square": (5002, 0),
    }
    assert listed("l2", "standard") == standard
    assert listed("l1", "standard")["apgd-ce"] == (516, 515)
    assert listed("l1", "standard")["apgd-t"] == (516, 515)
    plus = listed("linf", "plus")
    assert list(plus) == ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
    assert plus["apgd-ce"] == plus["apgd-dlr"] == (506, 505)
    assert plus["fab"] == (1006, 4500)
    assert list(listed("l2", "rand")) == ["apgd-ce", "apgd-dlr"]


def test_few_classes_are_noted():
    ball = threat.Linf(0.1)

    def notes(version, classes):
        found = ensemble.stages(ball, version, classes)
        return [stage.note for stage in found if stage.note]

    assert notes("standard", 10) == []
    three = notes("standard", 3)
    assert len(three) == 2
    assert "targeted DLR" in three[0]
    assert "2 of 9 targets" in three[1]
    assert any("margin replaces" in note for note in notes("plus", 2))
    budgets = {stage.name: stage.passes for stage in ensemble.stages(ball, "standard", 3)}
    assert budgets["fab-t"].backward == 200
    with pytest.raises(ValueError, match="nearest: standard"):
        ensemble.stages(ball, "standart")
    with pytest.raises(ValueError, match="nearest: standard"):
        attacks.autoattack(ball, version="standart")


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "classes"), [("linf", 10), ("l2", 3), ("l1", 2)])
def test_autoattack_finds_the_exact_robust_accuracy(norm, classes):
    predict, weights = linear(classes)
    x = images(10)
    right = jnp.argmax(predict(x), -1)
    labels = right.at[0].set((right[0] + 1) % classes)
    exact = distances(norm, x, labels, weights)
    order = np.sort(exact)
    eps = float((order[5] + order[6]) / 2)
    ball = threat.make(norm, eps)
    x_adv = attacked(attacks.autoattack(ball), predict, KEY, x, labels)
    np.testing.assert_array_equal(attacks.fooled(predict(x_adv), labels), exact < eps)
    np.testing.assert_array_equal(x_adv[0], x[0])
    assert float(ball.distance(x_adv, x).max()) <= eps * (1 + 1e-5)


def test_runs_at_once_are_the_runs_one_after_another():
    """Of a table of scores: the first infinite one, else the largest, of equal ones the first."""
    rng = np.random.default_rng(0)
    odd = [-np.inf, np.nan, np.inf, 1.0, 1.0]
    for batch, runs in ((1, 4), (5, 3), (8, 9), (8, 1)):
        scores = rng.uniform(size=(runs, batch))
        scores = np.where(
            rng.uniform(size=scores.shape) < 0.3, rng.choice(odd, scores.shape), scores
        )
        done = rng.uniform(size=batch) < 0.3
        want = np.full(batch, -1.0)
        for row in np.flatnonzero(~done):
            best = -np.inf
            for number in range(runs):
                if scores[number, row] > best:
                    want[row], best = 100 * number + row, scores[number, row]
                if best == np.inf:
                    break

        def run(numbers, rows, idle, scores=scores):
            points = jnp.where(idle, np.nan, 100.0 * numbers + rows)
            return points[:, None], jnp.where(idle, np.inf, jnp.asarray(scores)[numbers, rows])

        kept = jax.jit(outcome.best_of_runs, static_argnums=(0, 3))(
            run, -jnp.ones((batch, 1)), jnp.asarray(done), runs
        )
        np.testing.assert_array_equal(kept[:, 0], want)


def test_places_of_finished_examples_take_the_next_runs():
    """Two of eight examples with nine runs each fill three batches of eight, not nine."""
    rounds = []

    def run(numbers, rows, idle):
        rounds.append(int(jnp.sum(~idle)))
        return jnp.zeros((8, 1)), jnp.zeros(8)

    with jax.disable_jit():
        outcome.best_of_runs(run, jnp.zeros((8, 1)), jnp.arange(8) >= 2, 9)
    assert rounds == [8, 8, 2]
