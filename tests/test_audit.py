"""Each check of the audit: a tiny model that trips it, and an honest one that does not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdefense import attacks, threat
from jaxdefense.evaluation import Evaluator, audit, curves
from jaxdefense.evaluation.flags import has_loop

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(0.2, 0.8, size=(48, 6, 6, 1)).astype(np.float32)
WEIGHTS = jnp.asarray(RNG.normal(size=(36, 4)), jnp.float32)
BALL = threat.Linf(0.05)
WIDE = threat.Linf(8 / 255, bounds=(0.0, 255.0))
QUICK = {"steps": 10, "restarts": 2, "queries": 150, "batch_size": 128}


def honest(x):
    return (x - 0.5).reshape(x.shape[0], -1) @ WEIGHTS


LABELS = np.array(jnp.argmax(honest(jnp.asarray(IMAGES)), -1))
LABELS[::6] = (LABELS[::6] + 1) % 4  # an honest model is wrong sometimes


@functools.cache
def judge(predict, **options):
    """(report, its checks by name); a model that trips two checks is audited once."""
    report = audit(predict, IMAGES, LABELS, BALL, **{**QUICK, **options})
    return report, {check.name: check for check in report.checks}


@pytest.fixture(scope="module")
def fair():
    return judge(honest)


def test_an_honest_model_passes_every_check(fair):
    report, found = fair
    assert report.passed, [c for c in report.checks if not c.passed]
    assert len(found) == 18
    clean = np.asarray(honest(jnp.asarray(IMAGES))).argmax(-1) == LABELS
    np.testing.assert_array_equal(report.tiers["clean"], clean)
    assert report.worst.sum() < clean.sum()
    np.testing.assert_array_equal(report.worst, np.all(list(report.tiers.values()), axis=0))
    fooled = clean & ~report.worst
    assert np.all(
        np.asarray(honest(jnp.asarray(report.x_adv))).argmax(-1)[fooled] != LABELS[fooled]
    )
    assert np.all(np.abs(report.x_adv - IMAGES) <= 0.05 + 1e-5)


def test_the_report_prints_and_stores(fair):
    report, _ = fair
    text = report.markdown()
    assert "| worst case per example |" in text
    assert "| deterministic | pass |" in text
    record = report.record(LABELS, 4)
    assert record["tiers"]["worst"]["accuracy"] == pytest.approx(100 * report.worst.mean())
    assert [c["passed"] for c in record["checks"]] == [True] * 18


def reversed_gradient(x):
    """Right forward, wrong way backward: gradients lead uphill to safety."""

    @jax.custom_vjp
    def turn(z):
        return z

    turn.defvjp(lambda z: (z, None), lambda _, g: (-g,))
    return honest(turn(x))


def zero_gradient(x):
    return honest(jax.lax.stop_gradient(x))


def broken_gradient(x):
    """The root of a negative number is left out of the value, and stays in the gradient."""
    return honest(x) + jnp.sum(jnp.where(x > 2, jnp.sqrt(x - 2), 0.0), (1, 2, 3))[:, None]


def random_output(x):
    return honest(x) + np.random.default_rng().normal(size=(x.shape[0], 4)) * 1e-3


def optimising(x):
    """Follows its own logits for three steps before it answers."""

    def step(_, z):
        grad = jax.grad(lambda z: jnp.sum(jax.nn.logsumexp(honest(z), -1)))(z)
        return jnp.clip(z + 1e-3 * grad, 0, 1)

    return honest(jax.lax.fori_loop(0, 3, step, x))


def softmax(x):
    return jax.nn.softmax(honest(x))


def batch_norm(x):
    z = honest(x)
    return (z - z.mean(0, keepdims=True)) / z.std(0, keepdims=True)


def nan_logits(x):
    return honest(x) * jnp.nan


def rippled(x):
    """A fine ripple on the logits: the gradient at a point says little of its neighbourhood."""
    return honest(x) + 40 * honest(0.5 + 0.01 * jnp.sin(400 * x))


@pytest.mark.parametrize(
    ("predict", "name"),
    [
        (random_output, "deterministic"),
        (nan_logits, "finite logits"),
        (softmax, "logits, not probabilities"),
        (batch_norm, "independent of the batch"),
        (optimising, "no loop in the forward pass"),
        (zero_gradient, "gradients are there"),
        (broken_gradient, "gradients are finite"),
        (reversed_gradient, "gradients lead uphill"),
        (reversed_gradient, "robust accuracy is not above clean"),
        (zero_gradient, "black box does not beat white box"),
        (reversed_gradient, "accuracy falls to 0 at eps 0.5"),
        (rippled, "more steps and restarts are not much stronger"),
        (rippled, "accuracy falls with eps"),
    ],
)
def test_each_check_is_tripped_by_a_model(predict, name):
    report, found = judge(predict)
    assert not report.passed
    assert not found[name].passed, report.markdown()
    assert found[name].evidence


@pytest.mark.parametrize(
    ("predict", "images", "labels", "ball", "name"),
    [
        (honest, IMAGES, (LABELS + 1) % 4, BALL, "better than chance"),
        (lambda x: jnp.round(honest(x)), IMAGES, LABELS, BALL, "one logit is the largest"),
        (
            lambda x: honest(x).at[:, 2].add(99),
            IMAGES,
            LABELS,
            BALL,
            "more than one class is answered",
        ),
        (
            lambda x: honest(x / 255),
            255 * IMAGES,
            LABELS,
            WIDE,
            "images and eps have the bounds' scale",
        ),
        (honest, IMAGES[:2].repeat(24, 0), LABELS[:2].repeat(24), BALL, "images are different"),
    ],
)
def test_the_flags_of_autoattack_are_checks(predict, images, labels, ball, name):
    report = audit(predict, images, labels, ball, steps=2, restarts=1, stages=(), queries=5)
    found = {check.name: check for check in report.checks}
    assert not found[name].passed, report.markdown()


def test_another_base_is_told():
    def purify(x):
        return jnp.round(x * 16) / 16

    quick = dict(steps=2, restarts=1, stages=(), queries=5, purify=purify)
    for base, passed in ((honest, True), (lambda x: -honest(x), False)):
        report = audit(lambda x: honest(purify(x)), IMAGES, LABELS, BALL, base=base, **quick)
        found = {check.name: check for check in report.checks}
        assert found["predict is base(purify)"].passed is passed


def test_loops_are_found_inside_calls():
    x = jnp.asarray(IMAGES[:2])
    assert has_loop(jax.jit(optimising), x)
    assert has_loop(lambda z: jax.lax.cond(True, optimising, honest, z), x)
    assert not has_loop(jax.jit(honest), x)


def test_a_purifier_is_judged_in_all_tiers():
    """Rounding hides the gradient; BPDA and Square see through it."""

    def purify(x):
        return jnp.round(x * 16) / 16

    report, found = judge(
        lambda x: honest(purify(x)), base=honest, purify=purify, sources=(lambda x: honest(x) * 2,)
    )
    names = set(report.tiers)
    assert {"T1 apgd-t", "T2 bpda pgd", "T3 square", "T3 transfer"} <= names
    assert [name for name in names if name.startswith("T0")] == ["T0 oblivious pgd (not white-box)"]
    t1 = report.tiers["T1 pgd"].mean()
    assert report.tiers["T2 bpda pgd"].mean() < t1 - 0.1
    assert not found["gradients are there"].passed
    assert report.worst.mean() <= report.tiers["T2 bpda pgd"].mean()
    with pytest.raises(ValueError, match="purify needs base"):
        audit(honest, IMAGES, LABELS, BALL, purify=purify)


@pytest.mark.slow
def test_a_random_defence_is_averaged():
    def noisy(key, x):
        return honest(x + 0.02 * jax.random.normal(key, x.shape))

    report, found = judge(honest, random=noisy, samples=4)
    assert found["deterministic"].passed
    assert report.tiers["T1 pgd"].mean() < report.tiers["clean"].mean()


class TestCurves:
    evaluator = Evaluator(lambda _, x: honest(x), BALL, batch_size=128)

    def test_grid(self):
        eps = [0.0, 0.02, 0.05, 0.5]
        made = lambda ball: attacks.pgd(ball, steps=20, random_start=False)  # noqa: E731
        survives = curves.survival_over_eps(self.evaluator, (), IMAGES, LABELS, eps, made)
        alone = self.evaluator.bits((), IMAGES, LABELS, np.arange(48), {"pgd": made(BALL)})
        np.testing.assert_array_equal(survives[0], alone["clean"])
        np.testing.assert_array_equal(survives[2], alone["pgd"])
        assert list(survives.sum(-1)) == sorted(survives.sum(-1), reverse=True)
        assert not survives[3].any()
        with pytest.raises(ValueError, match="8/255"):
            curves.survival_over_eps(self.evaluator, (), IMAGES, LABELS, [8], made)

    def test_one_minimal_norm_run_gives_the_whole_curve(self):
        """On a linear model the exact distance is known: margin over the dual norm."""
        attack = attacks.fab(BALL, steps=30, minimal=True)
        found = curves.minimal_distances(self.evaluator, (), IMAGES, LABELS, attack)
        logits = np.asarray(honest(jnp.asarray(IMAGES)))
        w = np.asarray(WEIGHTS)
        exact = np.full(48, np.inf)
        for k in range(4):
            gap = logits[np.arange(48), LABELS] - logits[:, k]
            size = np.abs(w[:, LABELS] - w[:, [k]]).sum(0)
            other = np.where(k == LABELS, np.inf, gap / np.maximum(size, 1e-9))
            exact = np.minimum(exact, other)
        exact = np.maximum(exact, 0)
        np.testing.assert_allclose(found, exact, rtol=0.02, atol=1e-4)
        eps = [0.0, 0.01, 0.03, 0.05]
        curve = curves.curve_from_distances(found, eps)
        expected = [(exact > e).mean() for e in eps]
        np.testing.assert_allclose(curve, expected, atol=2 / 48)
