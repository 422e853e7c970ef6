"""The judge cannot be fooled: each case of a wrong number without an error, or of a late refusal.

Sections follow the cases; what a case asks for is in its test's name. Models are linear where the
answer is to be known by hand.
"""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_train
from closed_form import attacked, distances, linear

from jaxdefense import attacks, evaluation, losses, threat
from jaxdefense.attacks import ensemble
from jaxdefense.attacks.fab import boundary_distances
from jaxdefense.evaluation import Evaluator, Stage, cascade, flags, randomised
from jaxdefense.evaluation.crafting import with_margin_to_beat
from jaxdefense.runs.run import build

X = np.asarray(jax.random.uniform(jax.random.key(0), (64, 8, 8, 1)))
W = np.asarray(jax.random.normal(jax.random.key(1), (64, 10)) * 0.3)
T = threat.Linf(0.1)
KEY = jax.random.key(0)
IDS = np.arange(64)
AA = evaluation.autoattack
CE = ("apgd-ce",)


def apply(weights, x):
    return x.reshape(len(x), -1) @ weights


def predict(x):
    return apply(W, x)


Y = np.argmax(predict(X), -1)


def judge(model, *stages, images=X, labels=Y, ball=T, evaluator=None, variables=(), **options):
    """A cascade over a few cheap attacks."""
    evaluator = evaluator or Evaluator(lambda _, x: model(x), ball)
    stages = [
        Stage(f"{n}-{one.name}", one, 1, one.name != "square") for n, one in enumerate(stages)
    ]
    return cascade.run_stages(evaluator, variables, images, labels, stages, **options)


def bits(model, attack, *, images=X, labels=Y, ball=None, evaluator=None, **options):
    """(N,) who withstands one attack."""
    ball = attack.threat if ball is None else ball
    evaluator = evaluator or Evaluator(lambda _, x: model(x), ball)
    given = ((), images, labels, np.arange(len(images)), {"it": attack})
    return evaluator.bits(*given, **options)["it"]


def by_name(raised):
    """{flag: (severity, evidence)}."""
    return {flag.name: (flag.severity, flag.evidence) for flag in raised}


def named(found):
    """`by_name` of a verdict."""
    return by_name(found.flags)


# Case 1: an attack is a value that knows what it is.

WEAK = attacks.pgd(T, steps=1, step_size=1e-6, random_start=False)
STRONG = attacks.pgd(T, steps=20)
VALUES = [
    WEAK,
    attacks.pgd(threat.L2(0.5, bounds=(-1, 1)), loss=losses.margin, targeted=True),
    attacks.apgd(threat.L1(np.float32(0.3)), steps=7, warm_eps=True),
    attacks.apgd_targeted(T, targets=3, rank="distance"),
    attacks.square(T, queries=9, layout="NCHW"),
    attacks.cw(threat.L2(1)),
    attacks.autoattack(T, version="fast"),
    attacks.worst_case(WEAK, attacks.fgsm(T)),
]


class TestAnAttackIsAValue:
    def test_one_evaluator_runs_two_attacks_of_one_name(self):
        evaluator = Evaluator(apply, T)
        weak, strong = (
            evaluator.bits(W, X, Y, IDS, {"pgd": attack})["pgd"] for attack in (WEAK, STRONG)
        )
        assert weak.all()
        assert strong.mean() < 0.1
        again = Evaluator(apply, T).bits(W, X, Y, IDS, {"pgd": STRONG})["pgd"]
        np.testing.assert_array_equal(strong, again)

    def test_a_journal_of_a_weak_attack_refuses_a_strong_one(self, tmp_path):
        evaluator = Evaluator(apply, T)

        def run(attack):
            return cascade.run_stages(
                evaluator, W, X, Y, [Stage("pgd", attack, 1, 1)], folder=tmp_path
            )

        assert run(WEAK).robust.all()
        with pytest.raises(ValueError, match=r"stages was .*steps=1,.*, is .*steps=20,"):
            run(STRONG)
        assert run(attacks.pgd(T, steps=1, step_size=1e-6, random_start=False)).robust.all()

    def test_an_evaluator_refuses_an_attack_of_another_threat(self):
        other = attacks.pgd(threat.Linf(1e-4))
        with pytest.raises(ValueError, match=r"made for Linf\(eps=0\.0001.*is of Linf\(eps=0\.1"):
            bits(predict, other, ball=T)
        with pytest.raises(ValueError, match=r"made for Linf.*is of L2"):
            judge(predict, attacks.worst_case(WEAK), ball=threat.L2(0.1))
        with pytest.raises(ValueError, match=r"bounds=\(0.0, 255.0\)"):
            bits(predict, attacks.fgsm(threat.Linf(0.1, bounds=(0.0, 255.0))), ball=T)
        with pytest.raises(ValueError, match="made for"):
            evaluation.audit(predict, X, Y, T, extra={"own": other}, steps=1, queries=1)

    @pytest.mark.parametrize("attack", VALUES, ids=lambda attack: attack.name)
    def test_the_repr_is_the_call(self, attack):
        names = {**vars(attacks), **vars(threat), **vars(losses)}
        again = eval(repr(attack), names)
        assert again == attack
        assert hash(again) == hash(attack)
        assert repr(again) == repr(attack)

    def test_it_says_what_it_is(self):
        assert repr(STRONG) == "pgd(Linf(eps=0.1, bounds=(0.0, 1.0)), steps=20)"
        assert (STRONG.name, STRONG.__name__, STRONG.threat) == ("pgd", "pgd", T)
        assert STRONG.options["steps"] == 20
        assert STRONG.options["restarts"] == 1
        assert "threat" not in STRONG.options
        assert STRONG.__doc__ == attacks.pgd.__doc__
        assert "Madry" in STRONG.__doc__
        assert attacks.worst_case(WEAK, STRONG).threat == T
        with pytest.raises(dataclasses.FrozenInstanceError):
            STRONG.flatten_images = False

    def test_equal_calls_are_equal_and_others_are_not(self):
        assert len({STRONG, attacks.pgd(threat.Linf(0.1), steps=20)}) == 1
        assert STRONG not in (WEAK, attacks.bim(T, steps=20), STRONG.replace(threat=threat.L2(0.1)))
        first, second = (threat.Linf(np.linspace(0, top, 64)) for top in (0.1, 0.2))
        assert attacks.pgd(first) == attacks.pgd(first.with_eps(np.linspace(0, 0.1, 64)))
        assert attacks.pgd(first) != attacks.pgd(second)

        def scaled(factor):
            return lambda logits, labels: factor * losses.margin(logits, labels)

        twice, thrice = scaled(2), scaled(3)
        assert attacks.pgd(T, loss=twice) == attacks.pgd(T, loss=twice)
        assert attacks.pgd(T, loss=twice) != attacks.pgd(T, loss=thrice)

    @pytest.mark.parametrize("name", attacks.names())
    def test_every_option_is_in_the_description(self, name):
        attack = attacks.make(name, threat.L2(0.5))
        others = {
            "loss": "difference" if name == "apgd_targeted" else "margin",
            "rank": "distance",
            "accumulate": "direction",
            "version": "fast",
            "layout": "NHWC",
            "samples": 2,
            "step_size": 0.01,
            "init_norm": 0.5,
        }
        for option, value in attack.options.items():
            if isinstance(value, bool):
                other = not value
            elif isinstance(value, int):
                other = value + 1
            elif isinstance(value, float):
                other = value * 0.99 or 0.5
                other = max(other, 1.0) if option == "eta" else other
            else:
                other = others[option]
            changed = attack.replace(**{option: other})
            assert changed.description != attack.description, option
            assert changed != attack, option

    def test_bare_functions_are_welcome(self):
        def bare(predict, key, images, labels):
            return STRONG(predict, key, images, labels)

        found = cascade.run_stages(Evaluator(apply, T), W, X, Y, [Stage("pgd", bare, 1, 1)])
        same = Evaluator(apply, T).bits(W, X, Y, IDS, {"pgd": STRONG})["pgd"]
        np.testing.assert_array_equal(found.robust, same)
        assert named(found)["attack without its threat"][0] == "note"


# Case 2: each image has its own eps.

EPS = np.linspace(0.02, 0.2, 100).astype(np.float32) * (np.arange(100) % 2)
MANY = np.concatenate([X, X[::-1]])[:100]
LABELS = np.argmax(predict(MANY), -1)
LABELS[:40:2] = (LABELS[:40:2] + 1) % 10
OWN = threat.Linf(EPS)


class TestEachImageHasItsOwnEps:
    def check(self, found, eps=EPS, images=MANY, labels=LABELS):
        moved = np.abs(found.x_adv - images).reshape(len(images), -1).max(-1)
        assert np.all(moved <= eps + 1e-6)
        clean = np.argmax(predict(images), -1) == labels
        np.testing.assert_array_equal(found.robust[eps == 0], clean[eps == 0])
        assert found.robust[(eps > 0.1)].mean() < 0.1

    @pytest.mark.slow
    def test_in_a_cascade_of_any_batch_size_and_order(self):
        def run(rows, batch_size=None):
            ball = threat.Linf(EPS[rows])
            stages = (
                attacks.apgd(ball, steps=6),
                attacks.fab_targeted(ball, steps=3, targets=2, restarts=2),
                attacks.square(ball, queries=20),
            )
            found = judge(
                predict,
                *stages,
                images=MANY[rows],
                labels=LABELS[rows],
                ids=rows,
                evaluator=Evaluator(lambda _, x: predict(x), ball, batch_size=batch_size),
            )
            self.check(found, EPS[rows], MANY[rows], LABELS[rows])
            return found

        order = np.random.default_rng(0).permutation(100)
        first, other = run(np.arange(100)), run(order, 24)
        np.testing.assert_array_equal(first.robust[order], other.robust)

    def test_in_autoattack(self):
        self.check(AA(predict, MANY, LABELS, OWN, attacks=CE))

    def test_in_bits(self):
        evaluator = Evaluator(lambda _, x: predict(x), OWN)
        assert evaluator.large % 100
        given = {"pgd": attacks.pgd(OWN), "own step": attacks.pgd(OWN, step_size=EPS / 4)}
        found = evaluator.bits((), MANY, LABELS, np.arange(100), given)
        for name in given:
            np.testing.assert_array_equal(found[name][EPS == 0], found["clean"][EPS == 0])
            assert found[name][EPS > 0.1].mean() < 0.1

    def test_in_the_audit(self):
        found = evaluation.audit(
            predict, MANY, LABELS, OWN, steps=3, restarts=1, queries=10, stages=CE
        )
        clean = found.tiers["clean"]
        for right in found.tiers.values():
            np.testing.assert_array_equal(right[EPS == 0], clean[EPS == 0])
        moved = np.abs(found.x_adv - MANY).reshape(100, -1).max(-1)
        assert np.all(moved <= EPS + 1e-6)

    def test_in_distances(self):
        """64 images fill one device's batch: rows must not be taken for places in it."""
        ball = threat.Linf(np.where(IDS % 2, 0.5, 0.0))
        labels = np.where(IDS < 21, (Y + 1) % 10, Y)
        evaluator = Evaluator(lambda _, x: predict(x), ball, devices=jax.local_devices()[:1])
        found = evaluation.curves.minimal_distances(
            evaluator, (), X, labels, attacks.fmn(ball, steps=20)
        )
        np.testing.assert_array_equal(found[:21], 0)
        np.testing.assert_array_equal(np.isfinite(found[21:]), IDS[21:] % 2 == 1)

    def test_a_bare_function_is_refused(self):
        with pytest.raises(ValueError, match="bare function, which cannot be given each"):
            bits(predict, lambda predict, key, x, y: x, ball=OWN, images=MANY, labels=LABELS)

    def test_an_option_for_another_number_of_images_is_refused(self):
        with pytest.raises(ValueError, match="option of 3 values for 64 images"):
            bits(predict, attacks.pgd(T, step_size=np.ones(3, np.float32)))
        with pytest.raises(ValueError, match="eps has 100 entries for 64 images"):
            bits(predict, attacks.pgd(OWN))


# Case 3: gradient entries that are not finite count as 0.

BLACK = X.copy()
BLACK[:, :2, :2] = 0
WZ = np.where((np.arange(64) % 8 < 2) & (np.arange(64) < 16), 0, W.T).T


def root(x):
    """Its gradient is infinite at 0, and NaN where no class uses the pixel."""
    return apply(WZ, jnp.sqrt(x))


def safe_root(x):
    return apply(WZ, jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0))


YZ = np.argmax(safe_root(BLACK), -1)
FEW_STEPS = {
    "pgd": dict(steps=4),
    "mi_fgsm": dict(steps=4),
    "apgd": dict(steps=5),
    "apgd_targeted": dict(steps=4, targets=2),
    "fab": dict(steps=3),
    "fab_targeted": dict(steps=3, targets=2),
    "ddn": dict(steps=5),
    "fmn": dict(steps=5),
    "cw": dict(steps=5, learning_rate=0.3, initial_const=1.0),
    "deepfool": dict(steps=3, candidates=2),
}


class TestNonFiniteGradients:
    @pytest.mark.parametrize(
        "attack",
        [attacks.pgd(T), attacks.apgd(threat.L2(0.5), steps=10)],
        ids=["linf", "l2"],
    )
    def test_the_verdict_is_that_of_zeros(self, attack):
        found, right = (
            judge(model, attack, images=BLACK, labels=YZ, ball=attack.threat)
            for model in (root, safe_root)
        )
        assert right.robust.mean() < 0.5
        np.testing.assert_array_equal(found.robust, right.robust)
        np.testing.assert_allclose(found.x_adv, right.x_adv, atol=1e-5)
        assert "non-finite gradients" not in named(right)
        severity, evidence = named(found)["non-finite gradients"]
        assert severity == "warning"
        assert float(evidence.split("%")[0]) == pytest.approx(100 * 4 / 64, abs=1)
        assert "of the entries" in evidence

    @pytest.mark.parametrize("name", sorted(FEW_STEPS))
    def test_every_attack_goes_on(self, name):
        """As if the gradient were safe: both models in one program."""
        attack = attacks.make(name, threat.L2(2.0), **FEW_STEPS[name])
        x, y = jnp.asarray(BLACK[:8]), jnp.asarray(YZ[:8])

        @jax.jit
        def run(safe):
            return attack(lambda z: jax.lax.cond(safe, safe_root, root, z), KEY, x, y)

        found, right = run(False), run(True)
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found, right, atol=1e-5)
        assert np.any(found != x)


# Case 4: the cross-entropy does not saturate.


class TestSaturation:
    @pytest.mark.parametrize(
        ("name", "ball"),
        [
            ("apgd", threat.Linf(0.03)),
            ("apgd", threat.L2(0.2)),
            ("pgd", threat.Linf(0.03)),
            ("ddn", threat.L2(0.2)),
        ],
        ids=lambda value: getattr(value, "norm", value),
    )
    def test_large_logits_hide_nothing(self, name, ball):
        options = dict(steps=40 if name == "ddn" else 20)
        attack = attacks.make(name, ball, **options)
        evaluator = Evaluator(apply, ball)
        small, large = (
            evaluator.bits(s * W, X, Y, IDS, {"it": attack})["it"].sum() for s in (1, 1000)
        )
        assert 5 < small < 55
        assert large <= small + 1

    @pytest.mark.parametrize("name", ["apgd", "pgd", "ddn"])
    def test_two_classes_have_one_verdict_at_every_scale(self, name):
        """There the form is z_k - z_y, whose direction no scale changes."""
        attack = attacks.make(name, threat.L2(0.5), steps=40 if name == "ddn" else 10)
        y = np.argmax(X.reshape(64, -1) @ W[:, :2], -1)
        evaluator = Evaluator(apply, attack.threat)
        small, large = (
            evaluator.bits(s * W[:, :2], X, y, IDS, {"it": attack})["it"] for s in (1, 1000)
        )
        assert 5 < small.sum() < 60
        assert (small != large).sum() <= 1

    def test_log_odds_is_the_cross_entropy_before_it_saturates(self):
        logits = jax.random.normal(KEY, (50, 7)) * 3
        labels = jnp.arange(50) % 7
        np.testing.assert_allclose(
            jax.nn.softplus(losses.log_odds(logits, labels)),
            optax.softmax_cross_entropy_with_integer_labels(logits, labels),
            rtol=1e-5,
            atol=1e-6,
        )

        @functools.partial(jax.jit, static_argnums=0)
        def direction(loss, z, labels):
            grad = jax.grad(lambda z: jnp.sum(loss(z, labels)))(z)
            return grad / jnp.linalg.norm(grad, axis=-1, keepdims=True)

        both = [direction(loss, logits, labels) for loss in (losses.log_odds, losses.cross_entropy)]
        np.testing.assert_allclose(*both, atol=1e-4)
        sure = direction(losses.log_odds, jnp.array([[1000.0, 1.0, 2.0]]), jnp.array([0]))
        np.testing.assert_allclose(sure[0, 1:] / sure[0, :1], [-0.26894, -0.73106], rtol=1e-4)
        assert losses.make("log_odds") is losses.log_odds


# Cases 5 and 6: random models.


def by_place(x):
    return predict(x + 0.3 * jax.random.normal(KEY, x.shape))


STREAM = iter(jax.random.split(jax.random.key(5), 1000))


def by_next_key(x):
    with jax.ensure_compile_time_eval():
        return predict(x + 0.3 * jax.random.normal(next(STREAM), x.shape))


HOST = np.random.default_rng(0)


def by_numpy(x):
    return predict(x + 0.3 * HOST.normal(size=x.shape).astype(np.float32))


def by_callback(x):
    def draw(x):
        return HOST.normal(size=x.shape).astype(np.float32)

    noise = jax.pure_callback(draw, jax.ShapeDtypeStruct(x.shape, jnp.float32), x)
    return predict(x + 0.3 * jax.lax.stop_gradient(noise))


RANDOM = {
    by_place: ("independent of the batch", "its place in it"),
    by_next_key: ("deterministic", "draws numbers on the host"),
    by_numpy: ("deterministic", "draws numbers on the host"),
    by_callback: ("deterministic", "the same batch again differs"),
}


class TestRandomModels:
    @pytest.mark.parametrize("model", RANDOM, ids=lambda model: model.__name__)
    def test_are_refused(self, model):
        with pytest.raises(ValueError, match=r"random=predict.*predict\(key, images\)") as error:
            AA(model, X, Y, T, attacks=("square",))
        assert RANDOM[model][1] in str(error.value)
        with pytest.raises(ValueError, match="random=predict"):
            bits(model, attacks.square(T, queries=2))

    @pytest.mark.parametrize("model", RANDOM, ids=lambda model: model.__name__)
    def test_fail_the_audit(self, model):
        found = evaluation.audit(model, X, Y, T)
        (check,) = [one for one in found.checks if one.name == RANDOM[model][0]]
        assert not check.passed
        assert check.evidence
        assert found.tiers == {}  # no number of such a model


SMALL, FEW = X[:, :4, :4], W[:16, :5] * 2
YS = np.argmax(apply(FEW, SMALL), -1)


def noisy(key, x):
    return apply(FEW, x + 0.3 * jax.random.normal(key, x.shape))


@jax.jit
def truth(x):
    """How often `noisy` is right about each image, over 1,000 draws of its own."""
    keys = jax.random.split(jax.random.key(77), 1000)
    return jax.lax.map(lambda key: jnp.argmax(noisy(key, x), -1) == YS, keys).mean(0)


class TestARandomModelProperly:
    evaluator = Evaluator(lambda _, key, x: noisy(key, x), T)
    stages = (
        Stage("apgd", attacks.apgd(T, steps=4, samples=2), 1, 1),
        Stage("square", attacks.square(T, queries=5, samples=2), 1, 0),
    )

    def run(self, **options):
        return randomised.run_stages(
            self.evaluator, (), SMALL, YS, self.stages, 5, **(dict(draws=20) | options)
        )

    @pytest.mark.parametrize("eps", [1e-6, 0.1])
    def test_the_verdict_is_what_fresh_draws_say(self, eps):
        ball = threat.Linf(eps)
        found = AA(None, SMALL, YS, ball, random=noisy, samples=5, draws=100, attacks=CE)
        low, high = found.interval
        right = float(truth(jnp.asarray(found.x_adv)).mean())
        clean = float(truth(jnp.asarray(SMALL)).mean())
        assert low - 0.01 <= right <= high + 0.01
        assert found.accuracy == pytest.approx(right, abs=0.03)
        assert found.clean_share.mean() == pytest.approx(clean, abs=0.03)
        if eps == 0.1:
            assert found.accuracy < clean - 0.2
        else:  # no room: nothing but the noise decides
            assert low - 0.01 <= clean <= high + 0.01
        assert high - low < 0.05
        assert found.accuracy == pytest.approx(found.share.mean())
        assert found.fooled_in_majority == (found.share < 0.5).mean()
        np.testing.assert_array_equal(found.robust, found.share >= 0.5)
        assert found.draws == 100
        assert np.abs(found.x_adv - SMALL).max() <= eps + 1e-6

    def test_a_fixed_draw_is_no_randomised_model(self):
        """Noise that follows the image's bits gives an attack of no eps a choice among draws."""
        noisy = attacks.eot(lambda key, x: x, jax.random.key(0), samples=1)
        with pytest.raises(ValueError, match="give it as random=predict"):
            evaluation.autoattack(noisy, SMALL, np.zeros(len(SMALL), int), T, version="rand")

    def test_all_stages_take_draws(self):
        found = ensemble.stages(T, "rand", 5, samples=7)
        assert [stage.name for stage in found] == ["apgd-ce", "apgd-dlr", "square"]
        assert {stage.attack.samples for stage in found} == {7}
        assert found[0].passes == (1 + 7 * 101, 7 * 101)

    @pytest.mark.slow
    def test_seeds_reproduce(self):
        first, again, other = self.run(), self.run(), self.run(seed=1)
        np.testing.assert_array_equal(first.share, again.share)
        np.testing.assert_array_equal(first.x_adv, again.x_adv)
        assert np.any(first.share != other.share)
        assert first.interval[0] < first.accuracy < first.interval[1]

    @pytest.mark.slow
    def test_goes_on_from_a_folder(self, tmp_path, monkeypatch):
        whole, real, calls = self.run(), Evaluator.craft, []

        def failing(self, name, *args, **kwargs):
            calls.append(name)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return real(self, name, *args, **kwargs)

        monkeypatch.setattr(Evaluator, "craft", failing)
        with pytest.raises(KeyboardInterrupt):
            self.run(folder=tmp_path)
        found = self.run(folder=tmp_path)
        assert calls == ["apgd", "square", "square"]
        np.testing.assert_array_equal(found.share, whole.share)
        np.testing.assert_array_equal(found.x_adv, whole.x_adv)
        with pytest.raises(ValueError, match=r"another evaluation \(draws was 20, is 10\)"):
            self.run(folder=tmp_path, draws=10)

    def test_a_model_that_ignores_its_key_is_flagged(self):
        options = dict(random=lambda key, x: apply(FEW, x), samples=1, draws=2, attacks=CE)
        assert named(AA(None, SMALL, YS, T, **options))["not random"][0] == "warning"
        assert "not random" not in named(self.run())

    def test_needs_a_model_with_keys_and_labels(self):
        with pytest.raises(ValueError, match="random=predict"):
            AA(None, SMALL, YS, T)
        with pytest.raises(ValueError, match="random=predict"):
            AA(predict, SMALL, YS, T, random=noisy)
        with pytest.raises(ValueError, match="without targets or grid"):
            AA(None, SMALL, None, T, random=noisy)
        with pytest.raises(ValueError, match="draws"):
            AA(None, SMALL, YS, T, random=noisy, draws=0, attacks=CE)


# Case 7: no gradient at all.


def stopped(x):
    return predict(jax.lax.stop_gradient(x))


def rounded(x):
    return predict(jnp.round(x * 255) / 255)


class TestNoGradient:
    @pytest.mark.parametrize("model", [stopped, rounded])
    def test_is_an_error_among_the_flags(self, model):
        found = AA(model, X, None, T, attacks=CE)
        severity, evidence = named(found)["zero gradients"]
        assert severity == "error"
        assert "100.0% of the images" in evidence

    def test_fails_the_audit(self):
        found = evaluation.audit(
            rounded, X, Y, T, steps=1, restarts=1, queries=1, stages=CE, sources=[predict]
        )
        (check,) = [one for one in found.checks if one.name == "gradients are there"]
        assert not check.passed
        assert found.tiers["T3 transfer"].mean() < found.tiers["T1 apgd-ce"].mean() - 0.3

    def test_a_few_images_without_one_are_a_warning(self):
        shares = np.zeros((100, 3))
        assert flags.gradient_flags(shares) == []
        shares[:4, 0] = 1
        assert [flag.severity for flag in flags.gradient_flags(shares)] == ["warning"]
        shares[:5, 0] = 1
        assert [flag.severity for flag in flags.gradient_flags(shares)] == ["error"]


# Case 8: half precision.

FIRST = jax.random.normal(jax.random.key(3), (64, 32)) * 0.2
SECOND = jax.random.normal(jax.random.key(4), (32, 10)) * 0.4
LARGE = np.asarray(jax.random.uniform(jax.random.key(5), (512, 8, 8, 1)))


def network(weights, computed):
    """Of weights rounded to one type, computed in another."""
    first, second = (w.astype(weights).astype(computed) for w in (FIRST, SECOND))

    def forward(x):
        return jax.nn.relu(x.reshape(len(x), -1).astype(computed) @ first) @ second

    return forward


class TestHalfPrecision:
    @pytest.mark.parametrize(
        ("dtype", "eps"),
        [
            (jnp.bfloat16, 0.1),
            (jnp.float16, 0.02),
            (jnp.bfloat16, 0.02),
            (jnp.bfloat16, 0.04),
        ],
    )
    @pytest.mark.slow
    def test_the_verdict_is_that_of_float32(self, dtype, eps):
        """Within half a point on 512 images, after all of AutoAttack's stages."""
        wide = network(dtype, jnp.float32)
        labels = np.asarray(jax.jit(wide)(LARGE)).argmax(-1)
        full, half = (
            AA(model, LARGE, labels, threat.Linf(eps)).robust.sum()
            for model in (wide, network(dtype, dtype))
        )
        assert 20 < full < 450
        assert abs(int(full) - int(half)) <= 0.005 * 512

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_images_may_be_in_half_precision(self, dtype):
        x, weights = np.asarray(X.astype(dtype)), W.astype(dtype)
        found = judge(lambda x: apply(weights, x), STRONG, images=x, labels=None)
        assert found.x_adv.dtype == np.float32
        assert np.abs(found.x_adv - x.astype(np.float32)).max() <= 0.1 + 1e-6
        assert found.robust.mean() < 0.2
        wrong = apply(weights, jnp.asarray(found.x_adv, dtype)).argmax(-1) != apply(
            weights, jnp.asarray(x)
        ).argmax(-1)
        assert np.all(wrong[~found.robust])

    @pytest.mark.parametrize("name", ["fab", "fmn"])
    def test_a_win_that_a_plain_pass_does_not_confirm_is_attacked_again(self, name):
        """Here a plain pass sees class 0 ahead by so much more than the attack's program does."""
        ball, weights = threat.L2(0.6), W[:, :2]
        evaluator = Evaluator(apply, ball)
        program = evaluator.logits
        images = X[program(weights, X).argmax(-1) == 0]
        zeros = np.zeros(len(images), int)
        attack = attacks.make(name, ball, steps=100)

        def run(ahead):
            gap = np.array([ahead, 0], np.float32)
            evaluator.logits = lambda *given: program(*given) + gap
            return cascade.run_stages(
                evaluator, weights, images, zeros, [Stage("it", attack, 1, 1)]
            )

        honest = run(0.0)
        assert "unconfirmed wins" not in named(honest)
        found = run(0.05)
        logits = apply(weights, found.x_adv)
        assert np.all((logits[:, 1] - logits[:, 0])[~found.robust] > 0.05)
        assert (~found.robust).sum() >= (~honest.robust).sum() - 1 > 20
        assert "unconfirmed wins" in named(found)
        lost = run(1000.0)
        assert lost.robust.all()
        np.testing.assert_array_equal(lost.x_adv, images)
        severity, evidence = named(lost)["unconfirmed wins"]
        assert severity == "warning"
        assert evidence.endswith("0 were won")

    def test_a_handicap_is_a_lead_to_reach(self):
        """Who wins by less than it has a tie, the label in third place included."""

        def model(x):
            return x * jnp.array([[1.0, 2.0, 3.0]])

        x = jnp.array([[1.0, 1.0, 1.3], [1.0, 3.0, 1.0], [2.0, 1.0, 0.0], [0.5, 3.0, 2.2]])
        less = with_margin_to_beat(model, 2.0)
        for label in range(3):
            labels = jnp.full(4, label)
            ahead = losses.margin(model(x), labels) > 2.0
            np.testing.assert_array_equal(attacks.fooled(less(x), labels), ahead, str(label))
        weights = jnp.arange(12.0).reshape(4, 3)
        grads = [jax.grad(lambda x, f=f: jnp.sum(f(x) * weights))(x) for f in (model, less)]
        np.testing.assert_array_equal(*grads)


# Case 9: other bounds.

LENGTHS = {
    "fmn": dict(steps=30),
    "cw": dict(steps=40, searches=3, initial_const=1.0, learning_rate=0.05),
    "ddn": dict(steps=30),
    "fab": dict(steps=5),
    "deepfool": dict(steps=5),
    "apgd": dict(steps=10),
    "square": dict(queries=30),
    "pgd": dict(steps=5),
}
WIDE, SIGNED = (0.0, 255.0), (-1.0, 1.0)


class TestOtherBounds:
    @pytest.mark.parametrize(
        ("name", "norm", "bounds"),
        [
            *((name, "l2", WIDE) for name in LENGTHS),
            *((name, "l2", SIGNED) for name in ("fmn", "cw")),
            *((name, "linf", SIGNED) for name in ("fmn", "apgd", "square", "pgd")),
        ],
    )
    def test_equal_problems_have_equal_verdicts(self, name, norm, bounds):
        x, y = jnp.asarray(X[:24]), jnp.asarray(Y[:24])

        def verdict(low, high):
            eps = {"l2": 0.3, "linf": 0.05}[norm] * (high - low)
            ball = threat.make(norm, eps, bounds=(low, high))
            attack = attacks.make(name, ball, **LENGTHS[name])

            def model(z):
                return predict((z - low) / (high - low))

            found = attacked(attack, model, KEY, low + x * (high - low), y)
            return np.asarray(attacks.fooled(model(found), y))

        unit = verdict(0.0, 1.0)
        assert 2 < unit.sum() < 24
        np.testing.assert_array_equal(verdict(*bounds), unit)


# Case 10 and targets.

AIMS = (Y + 1) % 10
NEAREST = {
    "fab": (dict(steps=15), threat.names()),
    "fmn": (dict(steps=150), threat.names()),
    "ddn": (dict(steps=150), ("l2",)),
    "cw": (dict(steps=300, searches=12), ("l2",)),
}
INSIDE = {
    "apgd": dict(steps=20),
    "pgd": dict(steps=20),
    "square": dict(queries=100),
    **{name: options for name, (options, _) in NEAREST.items()},
    "cw": dict(steps=60, searches=4, initial_const=1.0, learning_rate=0.05),
}


class TestTargets:
    def test_a_targeted_attack_needs_targets(self):
        targeted = attacks.pgd(T, targeted=True)
        around = attacks.worst_case(targeted), attacks.transfer(targeted, [predict])
        for attack in (targeted, *around):
            with pytest.raises(ValueError, match="would take the labels for targets"):
                bits(predict, attack, ball=T)
        with pytest.raises(ValueError, match="would take the labels for targets"):
            judge(predict, targeted)
        with pytest.raises(ValueError, match="'targeted' needs targets="):
            AA(predict, X, Y, T, version="targeted")
        with pytest.raises(ValueError, match="version 'targeted', got 'fast'"):
            AA(predict, X, Y, T, version="fast", targets=AIMS)
        with pytest.raises(ValueError, match="would take the labels for targets"):
            evaluation.audit(predict, X, Y, T, extra={"own": targeted}, steps=1, queries=1)
        with pytest.raises(ValueError, match="on labels and on targets"):
            attacks.worst_case(targeted, WEAK)

    def test_a_curve_refuses_one(self):
        evaluator = Evaluator(apply, T)
        with pytest.raises(ValueError, match="targeted"):
            evaluation.curves.survival_over_eps(
                evaluator, W, X, Y, [0.0, 0.1], lambda ball: attacks.pgd(ball, targeted=True)
            )

    @pytest.mark.parametrize("section", ["validation", "evaluation"])
    def test_a_config_refuses_one(self, section, tfds_dir):
        targeted = {"name": "pgd", "targeted": True}
        plain = {"name": "pgd", "steps": 1}
        config = test_train.config(
            tfds_dir,
            **{
                "validation": targeted if section == "validation" else plain,
                "evaluation.attacks": {"mine": targeted if section == "evaluation" else plain},
            },
        )
        name = "validation" if section == "validation" else "mine"
        with pytest.raises(ValueError, match=f"{name}: pgd.*targeted=True.* is targeted"):
            build(config)

    def test_bad_targets(self):
        attack = attacks.fgsm(T, targeted=True)
        with pytest.raises(ValueError, match=r"targets are the labels at .*\(64 of 64\)"):
            bits(predict, attack, targets=Y)
        with pytest.raises(ValueError, match=r"targets must be in \[0, 10\)"):
            bits(predict, attack, targets=Y + 10)
        with pytest.raises(ValueError, match="targets must be"):
            bits(predict, attack, targets=AIMS[:5])
        with pytest.raises(ValueError, match="not targeted: make it with targeted=True"):
            bits(predict, WEAK, targets=AIMS)
        with pytest.raises(ValueError, match=r"targets are the labels at .*\(1 of \d+\)"):
            AA(predict, X, Y, T, targets=np.where(IDS == 7, Y, AIMS), attacks=CE)

    @pytest.mark.parametrize(
        ("name", "norm"), [(name, norm) for name, (_, norms) in NEAREST.items() for norm in norms]
    )
    def test_the_nearest_point_of_a_target_is_at_the_exact_distance(self, name, norm):
        model, weights = linear(2)
        x = jnp.asarray(X[:4])
        labels = jnp.argmax(model(x), -1)
        ball = threat.make(norm, 0.01)
        attack = attacks.make(name, ball, minimal=True, targeted=True, **NEAREST[name][0])
        x_adv = attacked(attack, model, KEY, x, 1 - labels)
        np.testing.assert_array_equal(jnp.argmax(model(x_adv), -1), 1 - labels)
        share = np.asarray(ball.distance(x_adv, x)) / distances(norm, x, labels, weights)
        assert share.min() > 1 - 1e-4
        assert share.max() < 1.02

    @pytest.mark.parametrize("name", ["apgd", "pgd"])
    def test_a_target_is_hit_exactly_where_it_is_in_the_ball(self, name):
        model, weights = linear(2)
        x = jnp.asarray(X[:16])
        labels = jnp.argmax(model(x), -1)
        exact = distances("linf", x, labels, weights)
        eps = float(np.sort(exact)[8] * 1.03)
        attack = attacks.make(name, threat.Linf(eps), targeted=True, steps=20)
        x_adv = attacked(attack, model, KEY, x, 1 - labels)
        np.testing.assert_array_equal(jnp.argmax(model(x_adv), -1) != labels, exact < eps)

    @pytest.mark.parametrize("name", sorted(INSIDE))
    def test_of_three_classes_it_is_the_target_that_is_hit(self, name):
        """The other wrong class is nearer for some, and counts for nothing."""
        model, _ = linear(3)
        x, ball = jnp.asarray(X[:24]), threat.L2(0.5)
        labels = jnp.argmax(model(x), -1)
        aims = (labels + 1) % 3
        attack = attacks.make(name, ball, targeted=True, **INSIDE[name])
        x_adv = attacked(attack, model, KEY, x, aims)
        hit = np.asarray(attacks.fooled(model(x_adv), aims, targeted=True))
        np.testing.assert_array_equal(hit, jnp.argmax(model(x_adv), -1) == aims)
        assert 2 < hit.sum() < 24
        assert float(ball.distance(x_adv, x).max()) <= 0.5 + 1e-5
        if name in NEAREST:
            np.testing.assert_array_equal(x_adv[~hit], x[~hit])
        possible = self.reachable()
        assert np.all(hit <= possible)
        assert name == "square" or hit.sum() >= possible.sum() - 1

    @staticmethod
    @functools.cache
    def reachable():
        """Where a long APGD hits the target."""
        model, _ = linear(3)
        x = jnp.asarray(X[:24])
        aims = (jnp.argmax(model(x), -1) + 1) % 3
        attack = attacks.apgd(threat.L2(0.5), steps=40, targeted=True)
        return np.asarray(jnp.argmax(model(attacked(attack, model, KEY, x, aims)), -1) == aims)

    def test_autoattacks_success_is_the_target_hit(self):
        labels = Y.copy()
        labels[:8] = (Y[:8] + 1) % 10
        aims = (labels + 1) % 10
        aims[:4] = Y[:4]  # the model answers so as it is
        found = AA(predict, X, labels, T, targets=aims, attacks=("apgd-ce", "fab"))
        assert list(found.by_attack) == ["apgd-ce", "fab"]
        hit = np.argmax(predict(found.x_adv), -1) == aims
        np.testing.assert_array_equal(~found.robust, hit)
        assert hit[:4].all()
        np.testing.assert_array_equal(found.x_adv[:4], X[:4])
        assert 0.1 < hit[8:].mean() < 0.9
        np.testing.assert_array_equal(found.clean, labels == Y)

    def test_bits_are_whether_the_target_was_missed(self):
        attack = attacks.pgd(T, targeted=True)
        missed = bits(predict, attack, targets=AIMS)
        strong = attacks.apgd(T, steps=20, targeted=True)
        exact = attacked(strong, predict, KEY, jnp.asarray(X), AIMS)
        hit = np.argmax(predict(exact), -1) == AIMS
        assert 0.1 < hit.mean() < 0.9
        assert np.all(~missed <= hit)
        assert (~missed).sum() >= hit.sum() - 2

    def test_the_targeted_version_is_what_targets_run(self):
        found = ensemble.stages(T, "targeted", 10)
        assert [stage.name for stage in found] == ["apgd-ce", "apgd-dlr", "fab", "square"]
        assert all(stage.attack.targeted for stage in found)
        assert attacks.autoattack(T, version="targeted").targeted
        assert not attacks.autoattack(T).targeted


# Cases 12 to 16, 20: refused before anything is paid, or at work.


class TestWhatIsGiven:
    def test_jitted_checks_the_bounds_of_the_threat(self):
        run = attacks.jitted(attacks.fgsm(threat.Linf(0.1, bounds=(-1, 1))), apply)
        x_adv = run(W, KEY, 2 * X - 1, Y)
        assert np.abs(x_adv - (2 * X - 1)).max() == pytest.approx(0.1, rel=1e-4)
        with pytest.raises(ValueError, match=r"must lie in \(-1, 1\), got"):
            run(W, KEY, 3 * X - 1, Y)

    def test_rounding_at_the_edge_is_clipped(self):
        x = X.copy()
        x[0, 0, 0, 0], x[1, 0, 0, 0] = -3e-8, 1 + 2e-7
        attack = attacks.fgsm(T)
        for found in (
            attack(predict, KEY, x, Y),
            attacks.jitted(attack, apply)(W, KEY, x, Y),
            judge(predict, attack, images=x).x_adv,
        ):
            assert np.min(found) >= 0
            assert np.max(found) <= 1
        x[0, 0, 0, 0] = -1e-3
        with pytest.raises(ValueError, match=r"must lie in \(0.0, 1.0\).*normalise inside the mod"):
            attacks.jitted(attack, apply)(W, KEY, x, Y)
        with pytest.raises(ValueError, match="must lie in"):
            judge(predict, attack, images=x)

    @pytest.mark.parametrize(
        ("output", "message"),
        [
            (lambda z: (z, 0), r"got a tuple: give e\.g\. predict\(x\)\[0\]"),
            (lambda z: {"logits": z}, r'got a dict: give e\.g\. .*predict\(x\)\["logits"\]'),
            (lambda z: z[:, 0], r"got one an image, \(\d+,\): give attacks\.binary\(predict\)"),
            (lambda z: z[:, :1], r"got one an image, \(\d+, 1\): give attacks\.binary"),
            (lambda z: z[None], r"must return logits \(\d+, K >= 2\), got \(1, "),
        ],
    )
    def test_a_model_without_logits_is_told_what_to_do(self, output, message):
        def model(x):
            return output(predict(x))

        attack = attacks.fgsm(T)
        with pytest.raises(ValueError, match=message):
            attacks.jitted(attack, lambda _, x: model(x))((), KEY, X, Y)
        with pytest.raises(ValueError, match=message):
            attack(model, KEY, X, Y)
        with pytest.raises(ValueError, match=message):
            AA(model, X, Y, T)
        with pytest.raises(ValueError, match=message):
            bits(model, attack)
        with pytest.raises(ValueError, match=message):
            evaluation.audit(model, X, Y, T)

    @pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
    def test_one_logit_is_two_classes(self, shape):
        difference = W[:, 1] - W[:, 0]
        model = attacks.binary(lambda x: (x.reshape(len(x), -1) @ difference).reshape(shape))
        logits = model(X[:9])
        assert logits.shape == (9, 2)
        both = apply(W[:, :2], X[:9])
        np.testing.assert_allclose(
            jax.nn.softmax(logits), jax.nn.softmax(both), rtol=1e-4, atol=1e-6
        )
        found = judge(model, attacks.fgsm(T), labels=None)
        assert found.clean.all()
        assert (~found.robust).mean() > 0.1

    def test_normalised_is_the_model_normalised_by_hand(self):
        x = np.random.default_rng(0).uniform(size=(5, 4, 4, 3)).astype(np.float32)
        mean, std = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)

        def model(x):
            return x.reshape(len(x), -1)[:, :7]

        hand = model((x - np.float32(mean)) / np.float32(std))
        np.testing.assert_allclose(attacks.normalised(model, mean, std)(x), hand, rtol=1e-6)
        np.testing.assert_allclose(
            attacks.normalised(model, 0.5, 0.25)(x), model((x - 0.5) / 0.25), rtol=1e-6
        )
        wide = tuple(255 * s for s in std)
        for bad in ((mean, wide), (wide, std), (mean, (0.2, 0.0, 0.2)), (0.5, -0.1)):
            with pytest.raises(ValueError, match="of pixels in"):
                attacks.normalised(model, *bad)

    @pytest.mark.parametrize("norm", threat.names())
    def test_square_takes_vectors(self, norm):
        """Of a length that is no square."""
        ball = threat.make(norm, {"linf": 0.1, "l2": 0.5, "l1": 3.0}[norm])
        vectors = X.reshape(64, 64)[:, :50]
        found = judge(
            lambda x: x @ W[:50],
            attacks.square(ball, queries=100),
            images=vectors,
            labels=np.argmax(vectors @ W[:50], -1),
            ball=ball,
        )
        assert found.x_adv.shape == (64, 50)
        assert found.robust.mean() < 0.9
        assert float(ball.distance(found.x_adv, vectors).max()) <= ball.eps * (1 + 1e-5)
        assert found.x_adv.min() >= 0
        assert found.x_adv.max() <= 1

    def test_what_square_cannot_take_is_said_first(self):
        asked = []

        def model(x):
            asked.append(x)
            return apply(W, x)

        with pytest.raises(ValueError, match="square needs images"):
            AA(model, X.reshape(64, 2, 4, 8, 1), Y, T)
        assert all(isinstance(x, jax.core.Tracer) for x in asked)
        first = np.zeros((4, 3, 32, 32), np.float32)
        with pytest.raises(ValueError, match=r"look like channels first.*layout='NCHW'"):
            AA(lambda x: x.reshape(len(x), -1)[:, :5], first, None, T)
        with pytest.raises(ValueError, match="look like channels first"):
            attacks.square(T)(lambda x: x.reshape(len(x), -1)[:, :5], KEY, first, np.zeros(4, int))
        with pytest.raises(ValueError, match="NCHW"):
            attacks.square(T, layout="CHW")

    @pytest.mark.parametrize("ball", [T, threat.L2(0.5)], ids=["linf", "l2"])
    def test_channels_first_is_the_same_problem(self, ball):
        x = jax.random.uniform(KEY, (8, 6, 6, 3))
        weights = jax.random.normal(KEY, (108, 5))

        def model(x):
            return x.reshape(len(x), -1) @ weights

        labels = jnp.argmax(model(x), -1)
        last = attacked(attacks.square(ball, queries=10), model, KEY, x, labels)
        first = attacked(
            attacks.square(ball, queries=10, layout="NCHW"),
            lambda z: model(jnp.moveaxis(z, 1, -1)),
            KEY,
            jnp.moveaxis(x, -1, 1),
            labels,
        )
        np.testing.assert_allclose(jnp.moveaxis(first, 1, -1), last, atol=1e-6)
        assert np.any(last != x)

    def test_autoattack_takes_a_layout(self):
        x = np.moveaxis(X.reshape(16, 8, 8, 4)[..., :3], -1, 1)
        attack = attacks.square(threat.L2(0.5), queries=5, layout="NCHW")
        found = judge(
            lambda x: x.reshape(len(x), -1)[:, :3],
            attack,
            images=x,
            labels=None,
            ball=attack.threat,
        )
        assert found.x_adv.shape == x.shape
        for version in ("standard", "fast", "plus", "targeted"):
            stages = ensemble.stages(T, version, 10, layout="NCHW")
            (square,) = [stage.attack for stage in stages if stage.name == "square"]
            assert square.options["layout"] == "NCHW"

    def test_a_bare_eps_is_no_threat(self):
        for factory in (attacks.pgd, attacks.cw, attacks.autoattack):
            with pytest.raises(ValueError, match=r"needs a threat first, e\.g\. .*, got 0\.1"):
                factory(0.1)
        with pytest.raises(ValueError, match="the threat must be a norm"):
            AA(predict, X, Y, 0.1)

    def test_an_equinox_module_is_variables(self):
        eqx = pytest.importorskip("equinox")
        net = eqx.nn.MLP(64, 10, 16, 1, key=KEY)

        def forward(net, x):
            return jax.vmap(net)(x.reshape(len(x), -1))

        labels = np.asarray(forward(net, X)).argmax(-1)
        attack = attacks.pgd(T, steps=3)
        run = attacks.jitted(attack, forward)
        x_adv = run(net, KEY, X, labels)
        bare = attacked(attack, lambda x: forward(net, x), KEY, jnp.asarray(X), labels)
        np.testing.assert_allclose(x_adv, bare, atol=1e-5)
        found = cascade.run_stages(
            Evaluator(forward, T), net, X, labels, [Stage("pgd", attack, 1, 1)]
        )
        assert found.clean.all()
        assert found.robust.mean() < 0.9

    def test_an_nnx_module_in_train_mode_is_refused(self):
        from flax import nnx

        net = nnx.Sequential(
            nnx.Linear(64, 10, rngs=nnx.Rngs(0)), nnx.BatchNorm(10, rngs=nnx.Rngs(0))
        )

        def model(x):
            return net(x.reshape(len(x), -1))

        with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
            AA(model, X, Y, T)
        with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
            attacks.jitted(STRONG, lambda _, x: model(x))((), KEY, X, Y)
        net.eval()
        assert judge(model, attacks.fgsm(T), labels=None).clean.all()


# Case 17: loops.


def looping(x):
    def once(carry):
        return carry[0] + 1, carry[1] * 1.01

    return jax.lax.while_loop(lambda carry: carry[0] < 3, once, (0, predict(x)))[1]


class TestLoops:
    def test_are_said_before_anything_runs(self, monkeypatch):
        monkeypatch.setattr(Evaluator, "attack", None)
        with pytest.raises(ValueError, match=r"cannot be taken.*attacks=\('square',\) needs none"):
            AA(looping, X, Y, T)

    def test_square_needs_no_gradient(self):
        found = AA(looping, X, Y, T, attacks=("square",))
        assert found.robust.mean() < 0.3
        assert named(found)["no gradients"][0] == "warning"
        assert named(found)["loop in the forward pass"][0] == "warning"

    def test_the_audit_goes_on_in_the_dark(self):
        found = evaluation.audit(looping, X, Y, T, queries=100, sources=[predict])
        failed = [check.name for check in found.checks if not check.passed]
        assert failed == [
            "no loop in the forward pass",
            "gradients are there",
            "gradients are finite",
        ]
        assert list(found.tiers) == ["clean", "T3 square", "T3 transfer"]
        assert found.worst.mean() < 0.2

    def test_a_models_callback_has_no_gradient_either(self):
        def host(x):
            shape = jax.ShapeDtypeStruct((len(x), 10), jnp.float32)
            return jax.pure_callback(lambda x: np.asarray(x).reshape(len(x), -1) @ W, shape, x)

        with pytest.raises(ValueError, match="cannot be taken"):
            AA(host, X, Y, T)
        found = judge(host, attacks.square(T, queries=3))
        assert "no gradients" in named(found)


# Case 18: a killed evaluation goes on elsewhere.

LONG = np.concatenate([X, X[:, ::-1], X[:, :, ::-1]])[:150]
LONG_LABELS = np.argmax(predict(LONG), -1)
STAGES = [
    Stage("pgd", attacks.pgd(T, steps=1, step_size=0.01), 1, 1),
    Stage("square", attacks.square(T, queries=9), 1, 0),
]

PLACES = {
    "two devices": Evaluator(apply, T, batch_size=64),
    "one device, larger batches": Evaluator(
        apply, T, batch_size=100, devices=jax.local_devices()[:1]
    ),
}


def long_run(name="two devices", images=LONG, labels=LONG_LABELS, weights=W, **options):
    return cascade.run_stages(PLACES[name], weights, images, labels, STAGES, **options)


@pytest.fixture(scope="module")
def whole():
    return long_run()


class TestJournal:
    @pytest.fixture
    def killed(self, tmp_path, monkeypatch):
        """(folder, what each later and finished dispatch was asked): killed at the third."""
        real, calls = Evaluator.attack, []

        def failing(self, name, attack, variables, examples, **options):
            if len(calls) == 2:
                raise KeyboardInterrupt
            return watched(self, name, attack, variables, examples, **options)

        def watched(self, name, attack, variables, examples, **options):
            calls.append((name, examples.ids))
            return real(self, name, attack, variables, examples, **options)

        monkeypatch.setattr(Evaluator, "attack", failing)
        with pytest.raises(KeyboardInterrupt):
            long_run(folder=tmp_path)
        monkeypatch.setattr(Evaluator, "attack", watched)
        return tmp_path, calls

    @pytest.mark.parametrize("name", sorted(PLACES))
    def test_goes_on_with_other_batches_and_devices(self, name, whole, killed):
        folder, calls = killed
        found = long_run(name, folder=folder)
        for stage, left in whole.by_attack.items():
            np.testing.assert_array_equal(found.by_attack[stage], left)
        np.testing.assert_allclose(found.x_adv, whole.x_adv, atol=1e-6)
        asked = {stage: [] for stage in whole.by_attack}
        for stage, ids in calls:
            asked[stage] += ids.tolist()
        assert sorted(asked["pgd"]) == list(range(150))  # none twice
        assert sorted(asked["square"]) == np.flatnonzero(whole.by_attack["pgd"]).tolist()
        assert 0 < whole.by_attack["square"].sum() < whole.by_attack["pgd"].sum() < 150
        before = len(calls)
        long_run(folder=folder)
        assert len(calls) == before

    def test_another_evaluation_is_refused_by_what_differs(self, killed):
        folder, _ = killed
        with pytest.raises(ValueError, match=r"another evaluation \(seed was 0, is 1\)"):
            long_run(folder=folder, seed=1)
        with pytest.raises(ValueError, match=r"another evaluation \(images was \w+, is \w+\)"):
            long_run(folder=folder, images=LONG[:, ::-1])
        with pytest.raises(ValueError, match=r"\(labels was \w+, is \w+\)"):
            long_run(folder=folder, labels=(LONG_LABELS + 1) % 10)
        with pytest.raises(ValueError, match=r"\(weights was \w+, is \w+\)"):
            long_run(folder=folder, weights=W * 1.1)
        ball = threat.Linf(0.2)
        stages = [Stage(s.name, s.attack.replace(threat=ball), 1, 1) for s in STAGES]
        with pytest.raises(ValueError, match=r"threat was .*Linf\(eps=0\.1.* is .*Linf\(eps=0\.2"):
            cascade.run_stages(Evaluator(apply, ball), W, LONG, LONG_LABELS, stages, folder=folder)

    @pytest.mark.parametrize("name", ["pgd-00001.npz", "clean.npz", "journal.json"])
    def test_a_damaged_file_is_computed_again(self, killed, capsys, whole, name):
        folder, _ = killed
        path = folder / name
        path.write_bytes(path.read_bytes()[:100])
        found = long_run(folder=folder)
        for stage, left in whole.by_attack.items():
            np.testing.assert_array_equal(found.by_attack[stage], left)
        (told,) = capsys.readouterr().err.splitlines()
        assert told.startswith(f"note: {path} is damaged (")
        assert told.endswith("): computed again")

    def test_a_file_of_another_evaluation_is_computed_again(self, killed, tmp_path, capsys):
        folder, _ = killed
        long_run(folder=tmp_path / "other", seed=1)
        (path,) = folder.glob("pgd-*1.npz")
        shutil.copy(tmp_path / "other" / path.name, path)
        long_run(folder=folder)
        assert f"note: {path} is of another evaluation: computed again" in capsys.readouterr().err

    def test_a_journal_needs_attacks_that_it_can_tell_apart(self, tmp_path):
        class Bare:
            def __call__(self, predict, key, x, y):
                return x

        with pytest.raises(ValueError, match="cannot be told from another in a later process"):
            cascade.run_stages(
                Evaluator(apply, T), W, X, Y, [Stage("bare", Bare(), 1, 1)], folder=tmp_path
            )


# Case 19: what is dispatched, and what lies where.


class TestMemory:
    def test_batches_are_no_larger_than_asked(self):
        sizes, traced = [], []

        def counted(weights, x):
            jax.debug.callback(lambda x: sizes.append(len(x)), x)
            if isinstance(weights, jax.core.Tracer):
                traced.append(x.shape)
            return apply(weights, x)

        found = AA(counted, X[:20], Y[:20], T, variables=W, attacks=CE, batch_size=8)
        assert len(found.robust) == 20
        assert max(sizes) <= 8
        assert {shape[0] for shape in traced} <= {1, 8 // len(jax.local_devices())}
        assert len(traced) < len(sizes)
        plain = AA(predict, X[:20], Y[:20], T, attacks=CE)
        np.testing.assert_array_equal(found.robust, plain.robust)

    def test_weights_are_arguments_of_the_programs(self):
        traced = []

        def counted(weights, x):
            if isinstance(weights, jax.core.Tracer) and len(x) > 1:  # one is traced to look at
                traced.append(x.shape)
            return apply(weights, x)

        evaluator = Evaluator(counted, T)
        given = (X, Y, IDS, {"pgd": STRONG})
        first = evaluator.bits(W, *given)["pgd"]
        before = len(traced)
        assert before
        second = evaluator.bits(np.ascontiguousarray(W[::-1]), *given)["pgd"]
        assert len(traced) == before
        np.testing.assert_array_equal(first, bits(predict, STRONG))
        assert np.any(first != second)

    def test_a_test_set_stays_on_the_host(self, monkeypatch):
        """No new array on a device is as large as the images at any dispatch."""
        images, labels = np.tile(X, (16, 1, 1, 1)), np.tile(Y, 16)
        before, largest, real = jax.live_arrays(), [], Evaluator.dispatch
        known = {id(array) for array in before}

        def watched(self, *args):
            result = real(self, *args)
            new = (array for array in jax.live_arrays() if id(array) not in known)
            largest.append(max((array.nbytes for array in new), default=0))
            return result

        monkeypatch.setattr(Evaluator, "dispatch", watched)
        judge(predict, WEAK, images=images, labels=labels)
        bits(predict, WEAK, images=images, labels=labels)
        assert max(largest) < images.nbytes / 4


# Images of 8 bits.

BYTES = np.rint(X * 255).astype(np.uint8)
X8 = BYTES / np.float32(255)


class TestGrid:
    @pytest.mark.parametrize(
        "ball",
        [threat.Linf(8 / 255), threat.L2(0.3), threat.L1(1.0)],
        ids=lambda ball: ball.norm,
    )
    def test_results_are_images_of_8_bits_in_the_ball(self, ball):
        found = judge(
            predict,
            attacks.apgd(ball, steps=10),
            images=X8,
            labels=None,
            evaluator=Evaluator(lambda _, x: predict(x), ball, grid=255),
        )
        steps = np.rint(found.x_adv * 255)
        np.testing.assert_array_equal(found.x_adv, steps.astype(np.uint8) / np.float32(255))
        exact = steps.astype(np.float64) / 255
        far = threat.make(ball.norm, ball.eps).distance(exact, BYTES / np.float64(255))
        assert np.max(far) <= ball.eps * (1 + 1e-6)
        wrong = np.argmax(predict(found.x_adv), -1) != np.argmax(predict(X8), -1)
        np.testing.assert_array_equal(wrong, ~found.robust)
        assert 0.2 < found.robust.mean() < 0.9

    def test_in_autoattack(self):
        found = AA(predict, X8, None, threat.Linf(8 / 255), grid=255, attacks=CE)
        moved = np.rint(found.x_adv * 255) - BYTES
        assert np.abs(moved).max() == 8
        np.testing.assert_allclose(found.x_adv * 255, np.rint(found.x_adv * 255), atol=1e-4)

    @pytest.mark.parametrize("bounds", [WIDE, SIGNED])
    def test_in_other_bounds(self, bounds):
        low, high = bounds
        ball = threat.Linf(8 * (high - low) / 255, bounds=bounds)
        x = (low + BYTES.astype(np.float64) / 255 * (high - low)).astype(np.float32)
        found = judge(
            None,
            attacks.fgsm(ball),
            images=x,
            labels=None,
            evaluator=Evaluator(lambda _, x: predict((x - low) / (high - low)), ball, grid=255),
        )
        steps = (found.x_adv.astype(np.float64) - low) / (high - low) * 255
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)
        assert np.abs(np.rint(steps) - BYTES).max() == 8

    def test_images_off_the_grid_are_refused(self):
        with pytest.raises(ValueError, match=r"grid=255 needs images in steps of 1/255"):
            AA(predict, X, None, T, grid=255)
        with pytest.raises(ValueError, match="grid must be an integer"):
            AA(predict, X8, None, T, grid=0)


# What is stronger for less.


class TestFast:
    @pytest.mark.parametrize("norm", threat.names())
    @pytest.mark.parametrize("classes", [2, 10, 100, 1000])
    def test_takes_a_quarter_of_the_passes(self, norm, classes):
        ball = threat.make(norm, 0.1)

        def passes(version):
            found = ensemble.stages(ball, version, classes)
            return np.sum([stage.passes for stage in found], 0)

        standard, fast = passes("standard"), passes("fast")
        assert fast.sum() <= standard.sum() / 4
        if classes == 10:
            assert np.all(fast <= standard / 4)

    def test_its_stages(self):
        first, second, third = ensemble.stages(T, "fast", 10)
        assert first.attack.options["loss"] == "probability_margin"
        assert second.attack.options["rank"] == "distance"
        assert second.attack.options["targets"] == 3
        assert third.attack.options["rescale"]

    def test_a_rank_by_distance_finds_the_nearest_class(self):
        """Class 1 has the next logit and a boundary far off; class 2 is the nearest."""
        weights = np.zeros((64, 5), np.float32)
        weights[:8, 1], weights[8:40, 2], weights[40:48, 3], weights[48:56, 4] = 0.05, 0.5, 0.3, 0.2
        bias = np.array([10.0, 9.5, 0.0, 0.0, 0.0], np.float32)

        def model(x):
            return x.reshape(len(x), -1) @ weights + (bias - 0.5 * weights.sum(0))[None]

        x, y = jnp.asarray(0.5 + 0.01 * X[:6]), jnp.zeros(6, jnp.int32)
        ball = threat.L2(4.0)
        logits = np.asarray(model(x), np.float64)
        candidates = np.argsort(-logits, -1)[:, 1:]
        assert np.all(candidates[:, 0] == 1)
        normal = np.linalg.norm(weights.astype(np.float64) - weights[:, :1], axis=0)
        exact = (logits[:, :1] - logits)[:, 1:] / normal[1:]
        found = boundary_distances(model, x, y, jnp.asarray(candidates), ball)
        np.testing.assert_allclose(found, np.take_along_axis(exact, candidates - 1, 1), rtol=1e-4)

    @pytest.mark.parametrize("rank", ["logit", "distance"])
    def test_that_class_is_the_one_attacked(self, rank):
        weights = np.zeros((64, 5), np.float32)
        weights[:2, 1], weights[8:, 2] = 0.1, 1.0
        bias = np.array([3.0, 2.0, 0.0, -1.0, -2.0], np.float32)

        def model(x):
            return (x.reshape(len(x), -1) - 0.5) @ weights + bias[None]

        x, y = jnp.asarray(0.5 + 0.01 * X[:6]), jnp.zeros(6, jnp.int32)
        attack = attacks.apgd_targeted(T, targets=1, steps=10, rank=rank)
        hit = attacks.fooled(model(attacked(attack, model, KEY, x, y)), y)
        assert bool(jnp.all(hit)) is (rank == "distance")

    def test_an_unknown_rank(self):
        with pytest.raises(ValueError, match=r"rank.*distance"):
            attacks.apgd_targeted(T, rank="distanc")

    def test_the_probability_margin(self):
        logits = jnp.log(jnp.array([[0.5, 0.2, 0.3], [0.1, 0.1, 0.8]]))
        for labels, expected in (([0, 0], [-0.2, 0.7]), ([2, 2], [0.2, -0.7])):
            found = losses.probability_margin(logits, jnp.array(labels))
            np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert losses.make("probability_margin") is losses.probability_margin
        bounded = losses.probability_margin(jnp.array([[1e4, 0.0]]), jnp.array([1]))
        np.testing.assert_allclose(bounded, 1)


# Flags are data.


def flagged(model, *stages, **options):
    return lambda: judge(model, *(stages or (WEAK,)), **options).flags


def bare(predict, key, x, y):
    return x


def named_blind():
    blind = Stage("apgd-ce", bare, 1, 1)
    stages = [blind, Stage("square", attacks.square(T, queries=100), 1, 0)]
    return cascade.run_stages(Evaluator(apply, T), W, X, Y, stages).flags


@jax.custom_vjp
def turned(x):
    return x


turned.defvjp(lambda x: (x, None), lambda _, grad: (-grad,))


def off_the_grid(x):
    """NaN for everything but images of 8 bits."""
    off = jnp.any(jnp.abs(x * 255 - jnp.rint(x * 255)) > 0.01, (1, 2, 3))
    return jnp.where(off[:, None], jnp.nan, predict(x))


RAISED = {
    "misleading gradients": (flagged(lambda x: predict(turned(x))), "error"),
    "undefined answers": (flagged(off_the_grid, images=X8), "error"),
    "zero gradients": (flagged(stopped), "error"),
    "non-finite gradients": (flagged(root, images=BLACK, labels=YZ), "warning"),
    "no gradients": (flagged(looping, attacks.square(T, queries=1)), "warning"),
    "loop in the forward pass": (
        flagged(lambda x: jax.lax.fori_loop(0, 2, lambda _, z: z * 1.1, predict(x))),
        "warning",
    ),
    "ties": (flagged(lambda x: jnp.round(predict(x))), "error"),
    "one class": (flagged(lambda x: predict(x) + 99 * (jnp.arange(10) == 3)[None]), "error"),
    "no better than chance": (flagged(predict, labels=(Y + 1) % 10), "error"),
    "masked gradients": (named_blind, "error"),
    "few classes": (
        lambda: AA(lambda x: apply(W[:, :3], x), X[:4], None, T, attacks=("fab-t",)).flags,
        "note",
    ),
    "another scale": (flagged(predict, images=0.01 * X), "warning"),
    "copies": (flagged(predict, images=X[:1].repeat(200, 0), labels=Y[:1].repeat(200)), "warning"),
    "own labels": (flagged(predict, labels=None), "note"),
    "attack without its threat": (named_blind, "note"),
    "small sample": (flagged(predict), "note"),
}
ELSEWHERE = {"unconfirmed wins", "not random"}  # raised by tests of their cases above


class TestFlags:
    def test_every_one_is_raised(self):
        assert {*RAISED, *ELSEWHERE} == set(flags.NAMES)

    @pytest.mark.parametrize("name", RAISED)
    def test_each_is_raised_with_its_severity(self, name):
        raise_it, severity = RAISED[name]
        found = next(flag for flag in raise_it() if flag.name == name)
        assert found.severity == severity
        assert any(letter.isdigit() for letter in found.evidence) or len(found.evidence) > 20
        assert str(found) == f"{severity}: {name}: {found.evidence}"

    def test_shifted_labels_are_told_with_their_shift(self):
        _, evidence = named(judge(predict, WEAK, labels=(Y + 3) % 10))["no better than chance"]
        assert "clean accuracy 0.0% of 64 images" in evidence
        assert "gives 10.0%" in evidence
        assert "(labels - 3) % 10 would give 100.0%" in evidence

    @pytest.mark.parametrize(
        ("classes", "n", "right", "told"),
        [
            (10, 19, 0, False),  # too few
            (10, 20, 0, True),
            (10, 30, 3, False),  # a weak model may have that luck
            (10, 1000, 100, True),
            (10, 1000, 101, False),
            (100, 100, 1, True),
            (2, 20, 10, False),
            (2, 40, 20, True),
            (2, 40, 21, False),
        ],
    )
    def test_chance_is_told_where_it_is_no_accident(self, classes, n, right, told):
        labels = np.arange(n) % classes
        answers = np.where(np.arange(n) < right, labels, (labels + 1) % classes)
        found = flags.chance_flags(np.eye(classes)[answers], labels)
        assert [flag.severity for flag in found] == ["error"] * told

    @pytest.mark.parametrize(
        ("images", "eps", "told"),
        [(255 * X, 8 / 255, "eps"), (X, 8.0, "fill"), (255 * X, 8.0, None)],
    )
    def test_images_and_eps_have_the_scale_of_the_bounds(self, images, eps, told):
        found = by_name(flags.image_flags(images, threat.Linf(eps, bounds=WIDE)))
        assert ("another scale" in found) is (told is not None)
        assert told is None or told in found["another scale"][1]

    @pytest.mark.parametrize("ball", [threat.L2(0.5), threat.L1(12.0), threat.Linf(0.001)])
    def test_usual_eps_are_no_other_scale(self, ball):
        images = np.random.default_rng(0).uniform(size=(2, 224, 224, 3)).astype(np.float32)
        assert "another scale" not in by_name(flags.image_flags(images, ball))

    def test_a_sample_of_copies_is_small(self):
        found = by_name(flags.image_flags(X[:2].repeat(100, 0), T))
        assert found["copies"][1] == "200 images, of which 2 are different"
        assert "2 images" in found["small sample"][1]

    @pytest.mark.parametrize(
        ("answers", "labels", "severity"),
        [
            ([3, 3], [3, 3], "warning"),
            ([3, 3], [3, 4], "error"),
            ([3, 3], [4, 4], None),
            ([3], [3], None),
        ],
    )
    def test_one_class_is_told_where_the_labels_agree_too(self, answers, labels, severity):
        found = by_name(flags.logit_flags(np.eye(10)[answers], np.asarray(labels)))
        assert found.get("one class", [None])[0] == severity

    def test_another_precision_is_no_other_model(self):
        evaluator = Evaluator(lambda _, x: predict(x), T)
        judge(predict, WEAK, evaluator=evaluator)
        half = judge(predict, WEAK, evaluator=evaluator, images=X.astype(np.float16))
        assert half.clean.mean() > 0.9

    def test_what_becomes_an_array_is_an_array(self):
        class Tensor:  # as PyTorch's
            dtype = "torch.float32"

            def __array__(self, dtype=None, copy=None):
                return X

        assert judge(predict, WEAK, images=Tensor()).clean.all()

    def test_images_of_one_class_have_no_chance(self):
        assert flags.chance_flags(np.eye(10)[np.arange(40) % 9 + 1], np.zeros(40, int)) == []

    def test_a_fair_model_has_none(self):
        assert judge(predict, attacks.fgsm(T), images=LONG, labels=LONG_LABELS).flags == ()

    def test_unknown_names_and_severities(self):
        with pytest.raises(ValueError, match="unknown flag 'zero'"):
            evaluation.Flag("zero", "note", "")
        with pytest.raises(ValueError, match="unknown severity 'fatal'; known: note, warning"):
            evaluation.Flag("ties", "fatal", "")
        with pytest.raises(dataclasses.FrozenInstanceError):
            evaluation.Flag("ties", "note", "").severity = "error"
