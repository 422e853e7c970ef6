"""The cascade: survivors only, the same verdict for any batch size, order and device count."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import import_script

from jaxdefense import attacks, evaluation, models, threat
from jaxdefense.attacks import checks as attack_checks
from jaxdefense.evaluation import Evaluator, cascade, journal
from jaxdefense.evaluation.cascade import Stage

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(size=(300, 8, 8, 1)).astype(np.float32)
BALL = threat.Linf(0.03)
NET = models.make("cnn", 4, width=0.5)
VARIABLES = NET.init(jax.random.key(0), jnp.asarray(IMAGES[:1]))
VARIABLES = jax.tree.map(lambda w: 3 * w, VARIABLES)  # logits with some spread
LABELS = np.array(jnp.argmax(NET.apply(VARIABLES, jnp.asarray(IMAGES)), -1))
LABELS[::10] = (LABELS[::10] + 1) % 4
STAGES = [
    Stage("apgd-weak", attacks.pgd(BALL, steps=2, step_size=0.005, random_start=False), 6, 5),
    Stage("square", attacks.square(BALL, queries=60), 61, 0),
]


def run(rows=slice(None), *, batch_size=128, devices=None, stages=STAGES, **options):
    evaluator = Evaluator(NET.apply, BALL, batch_size=batch_size, devices=devices)
    ids = options.pop("ids", np.arange(len(IMAGES)))
    return cascade.run_stages(
        evaluator, VARIABLES, IMAGES[rows], LABELS[rows], stages, ids=ids[rows], **options
    )


def test_an_empty_name_of_a_folder_is_refused():
    """`pathlib` would take it for the current folder."""
    with pytest.raises(ValueError, match=r"^folder must be the path of a folder, got ''$"):
        cascade.autoattack(NET.apply, IMAGES, LABELS, BALL, variables=VARIABLES, folder="")


@pytest.fixture(scope="module")
def verdict():
    return run()


def test_each_attack_meets_the_survivors_of_those_before(verdict):
    assert 0 < verdict.robust.sum() < verdict.by_attack["apgd-weak"].sum() < verdict.clean.sum()
    np.testing.assert_array_equal(verdict.robust, verdict.by_attack["square"])
    np.testing.assert_array_equal(verdict.fast, verdict.by_attack["apgd-weak"])
    assert not np.any(verdict.by_attack["apgd-weak"] & ~verdict.clean)
    assert verdict.passes["apgd-weak"] == (6 * verdict.clean.sum(), 5 * verdict.clean.sum())
    assert verdict.passes["square"] == (61 * verdict.fast.sum(), 0)


def test_a_line_is_logged_for_each_stage_that_is_finished(verdict, capsys, monkeypatch):
    for name in ("handlers", "level", "propagate"):  # what the script sets
        monkeypatch.setattr(journal.LOG, name, getattr(journal.LOG, name))
    run(stages=STAGES[:1])
    assert capsys.readouterr().err == ""  # Python's own callers have asked for no line
    monkeypatch.setattr(journal.LOG, "handlers", [])
    import_script("evaluate").print_stages()
    run(stages=STAGES[:1])
    robust = verdict.by_attack["apgd-weak"].mean()
    assert re.fullmatch(rf"apgd-weak: {robust:.2%} robust, \d+ s\n", capsys.readouterr().err)


def test_x_adv_is_what_fools_the_model(verdict):
    wrong = np.asarray(NET.apply(VARIABLES, jnp.asarray(verdict.x_adv))).argmax(-1) != LABELS
    np.testing.assert_array_equal(wrong, ~verdict.robust)
    assert np.all(np.abs(verdict.x_adv - IMAGES) <= 0.03 + 1e-6)
    np.testing.assert_array_equal(verdict.x_adv[verdict.robust], IMAGES[verdict.robust])


def same(first, second, order=slice(None)):
    for name, left in first.by_attack.items():
        np.testing.assert_array_equal(left[order], second.by_attack[name], err_msg=name)
    np.testing.assert_array_equal(first.x_adv[order], second.x_adv)


@pytest.mark.parametrize("batch_size", [1, 256, 1000])
def test_any_batch_size(verdict, batch_size):
    same(verdict, run(batch_size=batch_size))


def test_any_order(verdict):
    order = RNG.permutation(len(IMAGES))
    same(verdict, run(order), order)


@pytest.mark.slow
def test_any_number_of_devices(verdict):
    same(verdict, run(devices=jax.local_devices()[:1]))
    assert len(jax.local_devices()) == 2


def test_compiles_once_per_attack_and_shape():
    shapes = []

    def counted(variables, x):
        shapes.append(x.shape[0])
        return NET.apply(variables, x)

    evaluator = Evaluator(counted, BALL, batch_size=128, devices=jax.local_devices()[:1])
    for rows in (300, 250, 129, 64, 3):
        cascade.run_stages(evaluator, VARIABLES, IMAGES[:rows], LABELS[:rows], STAGES[:1])
    compiled = [
        n for n in shapes if n >= evaluator.small
    ]  # smaller ones are traced for their shapes
    assert set(compiled) == {evaluator.small, evaluator.large}
    before = len(compiled)
    scaled = jax.tree.map(lambda w: 1.1 * w, VARIABLES)
    cascade.run_stages(evaluator, scaled, IMAGES[:200], LABELS[:200], STAGES[:1])
    assert len([n for n in shapes if n >= evaluator.small]) == before


def test_a_killed_evaluation_goes_on_without_losing_or_repeating(verdict, tmp_path, monkeypatch):
    calls = []
    real = Evaluator.attack

    def failing(self, name, *args, **kwargs):
        calls.append(name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, name, *args, **kwargs)

    monkeypatch.setattr(Evaluator, "attack", failing)
    with pytest.raises(KeyboardInterrupt):
        run(folder=tmp_path)
    finished = len(calls) - 1
    resumed = run(folder=tmp_path)
    same(verdict, resumed)
    total = len(calls) - 1  # the interrupted one ran twice
    monkeypatch.setattr(Evaluator, "attack", real)
    assert len(list(tmp_path.glob("*-*.npz"))) == total
    assert total > finished
    again = run(folder=tmp_path)
    same(verdict, again)
    assert again.seconds == resumed.seconds
    with pytest.raises(ValueError, match=r"another evaluation \(seed was 0, is 1\)"):
        run(folder=tmp_path, seed=1)


def test_flags_name_what_gradients_left():
    class Blind:
        """Finds nothing, as an attack on masked gradients does."""

        def __call__(self, predict, key, images, labels):
            return images

    found = run(stages=[Stage("apgd-ce", Blind(), 1, 1), STAGES[1]])
    (flag,) = [flag for flag in found.flags if flag.name == "masked gradients"]
    assert flag.severity in ("warning", "error")
    assert flag.evidence.startswith("square fooled")
    assert run(stages=STAGES[:1]).flags == ()


class LikeTorch:
    """What a PyTorch module is told by."""

    state_dict = named_parameters = None

    def __call__(self, images):
        raise AssertionError(images)


class TestAutoattack:
    def predict(self, x):
        return NET.apply(VARIABLES, x)

    @pytest.mark.slow
    def test_on_a_bare_function(self):
        found = evaluation.autoattack(
            self.predict, IMAGES[:20], LABELS[:20], threat.Linf(0.01), attacks=("apgd-ce", "apgd-t")
        )
        assert list(found.by_attack) == ["apgd-ce", "apgd-t"]
        assert found.clean.sum() == (LABELS[:20] == self.predict(IMAGES[:20]).argmax(-1)).sum()
        assert "few classes" in [flag.name for flag in found.flags]  # four have three targets

    @pytest.mark.parametrize(
        "model",
        [
            NET.apply,
            jax.jit(NET.apply),
            functools.partial(NET.apply, mutable=False),
            lambda weights, x: NET.apply(weights, x),
        ],
    )
    def test_forgotten_variables(self, model):
        with pytest.raises(ValueError, match=r"takes \(variables, images\): give v"):
            evaluation.autoattack(model, IMAGES, LABELS, BALL)

    def test_other_arguments_than_the_models(self):
        with pytest.raises(ValueError, match="predict is a Flax module: give its apply"):
            evaluation.autoattack(NET, IMAGES, LABELS, BALL)
        loaded = models.zoo.Loaded(NET, VARIABLES, {})
        with pytest.raises(ValueError, match="must be a function, got Loaded: give its predict"):
            evaluation.autoattack(loaded, IMAGES, LABELS, BALL)
        with pytest.raises(ValueError, match=r"a PyTorch module: give .*torch_bridge\.from_module"):
            evaluation.autoattack(LikeTorch(), IMAGES, LABELS, BALL)
        with pytest.raises(ValueError, match="leave out variables="):
            evaluation.autoattack(self.predict, IMAGES, LABELS, BALL, variables=VARIABLES)
        with pytest.raises(ValueError, match=r"random takes \(variables, key, images\)"):
            evaluation.autoattack(None, IMAGES, LABELS, BALL, random=lambda w, key, x: x)

    def test_signatures_that_say_little_pass(self):
        @functools.wraps(NET.apply)
        def wrapped(x):
            return NET.apply(VARIABLES, x)

        models = [wrapped, jax.jit(wrapped), lambda *given: given, NET.bind(VARIABLES)]
        for model in [*models, functools.partial(NET.apply, VARIABLES)]:
            attack_checks.check_takes("it", model, ("images",), variables=False, way="")
        assert attack_checks.takes(max, 1) in (True, None)

    def test_errors(self):
        with pytest.raises(ValueError, match="nearest: standard"):
            evaluation.autoattack(self.predict, IMAGES, LABELS, BALL, version="standart")
        with pytest.raises(ValueError, match="nearest: square"):
            evaluation.autoattack(self.predict, IMAGES, LABELS, BALL, attacks=("squares",))
        with pytest.raises(ValueError, match="probabilities"):
            evaluation.autoattack(
                lambda x: jax.nn.softmax(self.predict(x)), IMAGES[:9], LABELS[:9], BALL
            )
        with pytest.raises(ValueError, match="no images"):
            evaluation.autoattack(self.predict, IMAGES[:0], LABELS[:0], BALL)
