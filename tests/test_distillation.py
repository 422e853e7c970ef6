"""Teachers: what a student is taught, where gradients go, and networks given by their workdir."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import test_train

from jaxdefense import data, defenses, losses, models, runs, threat, train
from jaxdefense.defenses import _teachers, base
from jaxdefense.runs import run
from jaxdefense.train import loop
from jaxdefense.train.step import State, make_step

pytestmark = pytest.mark.usefixtures("autodiff_convolutions")

KEY = jax.random.key(0)
IMAGES = np.asarray(jax.random.uniform(jax.random.key(1), (4, 8, 8, 1), minval=0.3, maxval=0.7))
LABELS = np.arange(4, dtype=np.int32)
BALL = threat.Linf(0.1)
STUDENT = models.make("cnn", 4, width=0.25)
DISTILLING = ("adaad", "add", "ard", "defensive_distillation", "iad")


@functools.cache
def teacher():
    """Another architecture than the student's, with sharp and wrong opinions."""
    net = models.make("cnn", 4, width=0.5)
    variables = jax.jit(net.init)(jax.random.key(7), IMAGES)
    return base.Trained(net, jax.tree.map(lambda w: 2 * w, variables["params"]), {}, "here")


def batch(epoch=1.0):
    step = {"step": jnp.int32(3), "epoch": jnp.float32(epoch)}
    return {"image": IMAGES, "label": LABELS, "id": jnp.arange(4), **step}


def on_axis(function, *args):
    mapped = jax.vmap(lambda _, a: function(*a), in_axes=(0, None), axis_name=base.AXIS)
    return jax.tree.map(lambda leaf: leaf[0], jax.jit(mapped)(jnp.zeros(1), args))


def one_step(defense, phase=-1):
    """The states before and after one step of SGD."""
    phase = defense.phases[phase]
    params, carry = defense.init(KEY, IMAGES[:1])
    txs = {role: optax.sgd(0.1) for update in phase.updates for role in update.roles}
    opt = {role: tx.init(params[role]) for role, tx in txs.items()}
    step = make_step(phase, txs, lambda key, x: {"image": x}, seed=0, per_epoch=4)
    before = State(jnp.int32(0), params, carry, opt)
    given = {"image": IMAGES, "label": LABELS, "id": jnp.arange(4)}
    return before, *on_axis(step, before, given)


class TestLoss:
    t = jax.random.normal(jax.random.key(2), (6, 5)) * 4
    s = jax.random.normal(jax.random.key(3), (6, 5)) * 4

    def test_against_numpy(self):
        p, q = (scipy.special.softmax(np.asarray(z, np.float64) / 3, -1) for z in (self.t, self.s))
        got = losses.distillation(self.t, self.s, temperature=3.0)
        np.testing.assert_allclose(got, 9 * scipy.special.rel_entr(p, q).sum(-1), rtol=1e-4)

    def test_temperature_one_is_the_kl(self):
        np.testing.assert_array_equal(
            losses.distillation(self.t, self.s), losses.kl(self.t, self.s)
        )
        np.testing.assert_allclose(
            losses.distillation(self.t, self.t, temperature=9.0), 0, atol=1e-4
        )

    def test_a_high_temperature_matches_centred_logits(self):
        """Hinton et al., eq. 4: the gradient tends to (s - t) / K, means taken off."""
        gradient = jax.grad(lambda s: losses.distillation(self.t, s, temperature=1e3).sum())(self.s)
        difference = self.s - self.t
        centred = difference - difference.mean(-1, keepdims=True)
        np.testing.assert_allclose(gradient, centred / 5, rtol=0.02, atol=5e-3)

    def test_classes_of_no_probability_change_nothing(self):
        wide = [jnp.pad(z, ((0, 0), (0, 95)), constant_values=-1e5) for z in (self.t, self.s)]
        for tau in (1.0, 30.0):
            np.testing.assert_allclose(
                losses.distillation(*wide, temperature=tau),
                losses.distillation(self.t, self.s, temperature=tau),
                rtol=1e-4,
            )

    def test_half_precision_is_computed_in_float32(self):
        half = losses.distillation(self.t.astype(jnp.bfloat16), self.s.astype(jnp.bfloat16))
        assert half.dtype == jnp.float32


def answers(name, epoch=1.0, **options):
    """(loss, crafted batch, {who saw what: logits}) of the student's phase."""
    defense = defenses.make(name, STUDENT, BALL, teacher=teacher(), **options)
    update = defense.phases[-1].updates[0]

    def all_of_it(params, carry):
        crafted = update.craft(params, carry, batch(epoch), KEY)
        value, _ = update.loss(params, carry, crafted, KEY)
        seen = {"clean": IMAGES, "moved": crafted["adversarial"]}
        logits = {
            f"{who} {what}": defense.predictors[role](params, carry)(x)
            for who, role in (("S", "classifier"), ("T", "teacher"))
            for what, x in seen.items()
        }
        return value, crafted, logits

    return on_axis(all_of_it, *defense.init(KEY, IMAGES[:1]))


class TestWhatIsTaught:
    """Each loss again from the logits of student and teacher (a student without BatchNorm)."""

    attack = dict(steps=2, step_size=0.05)  # noqa: RUF012

    def close(self, value, expected):
        np.testing.assert_allclose(value, expected.mean(), rtol=1e-4)

    def test_add(self):
        weights = dict(robust_weight=0.5, clean_weight=0.25, scale=0.1, temperature=2.0)
        value, _, z = answers("add", **weights, **self.attack)
        d = functools.partial(losses.distillation, z["T clean"], temperature=2.0)
        self.close(value, 0.1 * (0.5 * d(z["S moved"]) + 0.25 * d(z["S clean"])))
        assert (d(z["S moved"]) > d(z["S clean"])).all()  # the inner maximum is one

    def test_ard(self):
        value, _, z = answers("ard", alpha=0.7, temperature=30.0, scale=0.1, **self.attack)
        taught = losses.distillation(z["T clean"], z["S moved"], temperature=30.0)
        self.close(value, 0.07 * taught + 0.3 * losses.cross_entropy(z["S clean"], LABELS))

    @pytest.mark.parametrize("epoch", [1.0, 3.0])
    def test_iad(self, epoch):
        value, _, z = answers("iad", epoch, begin_epochs=2.0, beta=0.5, **self.attack)
        trust = scipy.special.softmax(z["T moved"], -1)[np.arange(4), LABELS] ** 0.5
        trust = trust if epoch >= 2 else 1.0
        own = losses.kl(z["S clean"], z["S moved"])
        self.close(value, losses.kl(z["T clean"], z["S moved"]) + (1 - trust) * own)

    def test_adaad(self):
        value, _, z = answers("adaad", alpha=0.7, **self.attack)
        robust = losses.kl(z["T moved"], z["S moved"])
        self.close(value, 0.7 * robust + 0.3 * losses.kl(z["T clean"], z["S clean"]))

    def test_defensive_distillation(self):
        options = dict(temperature=5.0, teacher=teacher())
        defense = defenses.make("defensive_distillation", STUDENT, BALL, **options)
        assert len(defense.phases) == 1  # the teacher is there already
        params, carry = defense.init(KEY, IMAGES[:1])
        update = defense.phases[0].updates[0]
        value = on_axis(lambda p, c: update.loss(p, c, batch(), KEY)[0], params, carry)
        s, t = (defense.predictors[n](params, carry)(IMAGES) for n in ("classifier", "teacher"))
        self.close(value, losses.cross_entropy(s / 5, jax.nn.softmax(t / 5)))


class TestGradients:
    @pytest.mark.parametrize("name", DISTILLING)
    def test_none_to_the_teacher_and_some_to_the_student(self, name):
        defense = defenses.make(name, STUDENT, BALL, teacher=teacher())
        (update,) = defense.phases[-1].updates
        assert update.roles == ("classifier",)
        params, carry = defense.init(KEY, IMAGES[:1])

        def gradient(params, carry):
            crafted = update.craft(params, carry, batch(), KEY)
            crafted = jax.lax.stop_gradient(crafted)
            return jax.grad(lambda p: update.loss(p, carry, crafted, KEY)[0])(params)

        found = on_axis(gradient, params, carry)
        assert not any(jax.tree.leaves(jax.tree.map(jnp.any, found["teacher"])))
        assert all(jax.tree.leaves(jax.tree.map(jnp.any, found["classifier"])))

    def test_adaads_attack_climbs_through_the_teacher_too(self):
        """Its one step from x is along the sign of finite differences of KL(T(z) || S(z))."""
        step = dict(steps=1, step_size=0.01, noise=0.0)
        defense = defenses.make("adaad", STUDENT, BALL, teacher=teacher(), **step)
        params, carry = defense.init(KEY, IMAGES[:1])
        craft = defense.phases[-1].updates[0].craft
        moved = on_axis(lambda p, c: craft(p, c, batch(), KEY)["adversarial"], params, carry)
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), params)
            x = jnp.asarray(IMAGES, jnp.float64)

            def apply(module, role, z):  # the module itself computes in float32
                p = wide[role]
                for name in ("conv1", "conv2"):
                    pads = ((1, 1), (1, 1))
                    layout = ("NHWC", "HWIO", "NHWC")
                    z = jax.lax.conv_general_dilated(
                        z, p[name]["kernel"], (2, 2), pads, dimension_numbers=layout
                    )
                    z = jax.nn.relu(z + p[name]["bias"].reshape(1, 1, 1, -1))
                z = z.reshape(len(z), -1)
                z = jax.nn.relu(z @ p["fc1"]["kernel"] + p["fc1"]["bias"][None])
                return z @ p["head"]["kernel"] + p["head"]["bias"][None]

            def disagreement(z):
                return losses.kl(apply(None, "teacher", z), apply(None, "classifier", z))

            def difference(pixel):
                e = 1e-5 * pixel.reshape(1, 8, 8, 1)
                return (disagreement(x + e) - disagreement(x - e)) / 2e-5

            slopes = jax.jit(jax.vmap(difference))(jnp.eye(64)).T.reshape(x.shape)
            still = jax.lax.stop_gradient(apply(None, "teacher", x))
            student_only = jax.jit(
                jax.grad(lambda z: losses.kl(still, apply(None, "classifier", z)).sum())
            )(x)
        clear = np.abs(slopes) > 1e-3 * np.abs(slopes).max()
        np.testing.assert_array_equal(np.sign(moved - IMAGES)[clear], np.sign(slopes)[clear])
        assert np.mean(np.sign(student_only)[clear] != np.sign(slopes)[clear]) > 0.05


class TestTeachers:
    def test_a_step_leaves_a_given_teacher_alone(self):
        defense = defenses.make("add", STUDENT, BALL, teacher=teacher(), steps=1)
        before, after, _ = one_step(defense)
        jax.tree.map(
            np.testing.assert_array_equal, before.params["teacher"], after.params["teacher"]
        )
        alone = base.Net(STUDENT).init(KEY, IMAGES[:1])[0]["classifier"]
        jax.tree.map(np.testing.assert_array_equal, before.params["classifier"], alone)

    def test_a_teacher_in_the_run_is_trained_first_by_any_defence_of_one_phase(self):
        spec = dict(name="pgd_at", steps=2, model=dict(name="cnn", width=0.5), length="30%")
        defense = defenses.make("add", STUDENT, BALL, teacher=spec, steps=2)
        assert [(p.name, p.length) for p in defense.phases] == [
            ("teacher", "30%"),
            ("distill", None),
        ]
        before, after, metrics = one_step(defense, 0)
        jax.tree.map(
            np.testing.assert_array_equal, before.params["classifier"], after.params["classifier"]
        )
        # The same step as the defence's own on a network of those weights.
        wide = models.make("cnn", 4, width=0.5)
        own = defenses.make("pgd_at", wide, BALL, steps=2)
        init = lambda key, x: ({"classifier": before.params["teacher"]}, {"classifier": {}})  # noqa: E731
        _, alone, told = one_step(dataclasses.replace(own, init=init))
        np.testing.assert_array_equal(metrics["loss"][0], told["loss"][0])
        jax.tree.map(
            np.testing.assert_array_equal, after.params["teacher"], alone.params["classifier"]
        )
        assert defense.predictors["teacher"](after.params, after.carry)(IMAGES).shape == (4, 4)

    def test_its_running_averages_are_what_teaches(self):
        spec = dict(name="standard", transforms=dict(ema=dict(decay=0.9)))
        defense = defenses.make("add", STUDENT, BALL, teacher=spec, steps=1)
        before, after, _ = one_step(defense, 0)
        averaged = after.carry["teacher_ema"]["params"]["classifier"]
        moved = jax.tree.map(
            lambda a, b: not np.array_equal(a, b), averaged, before.params["teacher"]
        )
        assert all(jax.tree.leaves(moved))
        expected = jax.jit(STUDENT.apply)({"params": averaged}, IMAGES)
        got = jax.jit(defense.predictors["teacher"](after.params, after.carry))(IMAGES)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)

    def test_averages_of_a_student_leave_a_given_teacher_out(self):
        options = dict(teacher=teacher(), steps=1, transforms=dict(ema=dict(decay=0.9)))
        defense = defenses.make("add", STUDENT, BALL, **options)
        assert set(defense.pretrained) == {"teacher"}
        _, after, _ = one_step(defense)
        assert set(after.carry["ema"]["params"]) == {"classifier"}
        for name in ("classifier", "teacher", "raw_classifier"):
            assert defense.predictors[name](after.params, after.carry)(IMAGES).shape == (4, 4)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            (dict(teacher=dict(workdir="runs/x")), "runs.load_classifier"),
            (dict(teacher=dict(name="ipg")), "train it in a run of its own"),
            (dict(teacher=dict(name="pgd_ta")), "nearest: pgd_at"),
            (dict(teacher=dict(model=dict(name="cnm"))), "nearest: cnn"),
            (dict(temperature=0.0), "temperature must be positive, got 0.0"),
            (dict(scale=-1.0), "scale must be positive, got -1.0"),
            (dict(robust_weight=-1.0), "robust_weight"),
            (dict(steps=0), "steps"),
            (dict(noise=-1.0), "noise"),
        ],
    )
    def test_errors(self, options, match):
        with pytest.raises(ValueError, match=match):
            defenses.make("add", STUDENT, BALL, **options)

    @pytest.mark.parametrize(
        ("name", "options", "match"),
        [
            ("ard", dict(alpha=1.5), r"alpha must be in \[0, 1\], got 1.5"),
            ("adaad", dict(alpha=-0.5), r"alpha must be in \[0, 1\], got -0.5"),
            ("iad", dict(beta=-1.0), "beta"),
            ("defensive_distillation", dict(temperature=-20.0), "temperature"),
            ("defensive_distillation", dict(teacher=dict(name="standard")), "trained network"),
        ],
    )
    def test_errors_of_the_others(self, name, options, match):
        with pytest.raises(ValueError, match=match):
            defenses.make(name, STUDENT, BALL, **options)


class TestSoftLabels:
    def labelled(self, name, options=None, **soft):
        transforms = {"soft_labels": {"teacher": teacher(), **soft}}
        return defenses.make(name, STUDENT, BALL, transforms=transforms, **options or {})

    def test_the_target_is_a_mixture(self):
        defense = self.labelled("standard", temperature=3.0, weight=0.75)
        params, carry = defense.init(KEY, IMAGES[:1])
        update = defense.phases[0].updates[0]
        crafted = update.craft(params, carry, batch(), KEY)
        logits = teacher().module.apply({"params": teacher().params}, IMAGES)
        expected = 0.75 * scipy.special.softmax(logits / 3, -1) + 0.25 * np.eye(4)
        np.testing.assert_allclose(crafted["target"], expected, rtol=1e-5)
        value = on_axis(lambda p, c: update.loss(p, c, crafted, KEY)[0], params, carry)
        student = defense.predictors["classifier"](params, carry)(IMAGES)
        np.testing.assert_allclose(
            value, losses.cross_entropy(student, crafted["target"]).mean(), rtol=1e-5
        )

    @pytest.mark.parametrize("name", ["pgd_at", "m2at"])
    def test_any_defence_learns_from_them(self, name):
        before, after, metrics = one_step(self.labelled(name, {"steps": 2}))
        plain = one_step(defenses.make(name, STUDENT, BALL, steps=2))[2]
        assert np.isfinite(metrics["loss"][0])
        assert metrics["loss"][0] != plain["loss"][0]
        jax.tree.map(
            np.testing.assert_array_equal, before.params["soft_labels"], after.params["soft_labels"]
        )

    def test_errors(self):
        for soft in (dict(teacher=None), dict(temperature=0.0), dict(weight=2.0)):
            with pytest.raises(ValueError, match=r"teacher|temperature"):
                self.labelled("standard", **soft)


def config(tfds_dir, **defense):
    """A run of seconds on digits."""
    changes = {
        "defense": defense,
        "dataset.limit": 64,
        "train.length": "6s",
        "train.batch_size": 16,
        "train.optimizer": {"name": "sgd", "lr": 0.1},
        "train.validate_every": "3s",
        "train.steps_per_dispatch": 1,
    }
    return test_train.config(tfds_dir, **changes)


@pytest.fixture(scope="module")
def taught(tmp_path_factory, tfds_dir):
    """The workdir of a trained teacher, and a student's config that names it."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    values = config(tfds_dir, name="standard", transforms={"ema": {"decay": 0.5}})
    train.train({**values, "model": {"name": "cnn", "width": 0.5}}, folder, progress=False)
    spec = {"workdir": str(folder), "checkpoint": "best"}
    return folder, config(tfds_dir, name="add", steps=2, teacher=spec)


def arrays_of(workdir):
    model = runs.restore(workdir, kind="last")[1]
    return [np.asarray(leaf) for leaf in jax.tree.leaves(model)]


class TestGivenByTheirWorkdir:
    @pytest.mark.slow
    def test_a_run_resumes_and_is_evaluated_without_the_original(
        self, taught, tmp_path, monkeypatch
    ):
        folder, values = taught
        moved = tmp_path / "teacher"
        shutil.copytree(folder, moved)
        values = json.loads(json.dumps(values).replace(str(folder), str(moved)))
        summary = train.train(values, tmp_path / "whole", progress=False)

        report = loop.Trainer._report

        def stop(self, log, bar, segment, step, sums):
            report(self, log, bar, segment, step, sums)
            if step == 5:
                raise KeyboardInterrupt

        monkeypatch.setattr(loop.Trainer, "_report", stop)
        with pytest.raises(KeyboardInterrupt):
            train.train(values, tmp_path / "killed", progress=False)
        monkeypatch.setattr(loop.Trainer, "_report", report)
        network = runs.load_classifier(moved)
        shutil.rmtree(moved)
        again = train.train(values, tmp_path / "killed", progress=False)
        for a, b in zip(arrays_of(tmp_path / "whole"), arrays_of(tmp_path / "killed"), strict=True):
            np.testing.assert_array_equal(a, b)

        # What is known of the teacher is measured once and kept with each checkpoint.
        scores = summary["given"]["teacher"]
        assert scores["source"] == f"{moved}/best"
        assert 0 <= scores["validation_robust"] <= scores["validation_clean"] <= 100
        assert again["given"] == summary["given"]
        built, model, meta = runs.restore(tmp_path / "killed")
        assert meta["given"] == summary["given"]
        images = data.to_float(built.arrays("validation").images)
        expected = jax.jit(network.module.apply)({"params": network.params}, images)
        got = jax.jit(built.apply("teacher"))(model, images)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        hits = np.argmax(expected, -1) == built.arrays("validation").labels
        assert scores["validation_clean"] == pytest.approx(100 * hits.mean())

        # The checkpoint itself holds the student only.
        own = built.defense.without_pretrained(jax.eval_shape(built.init, images)[0])
        assert set(own) == {"classifier"}
        assert len(list((tmp_path / "killed" / "given").iterdir())) == 1

    def test_running_averages_are_the_network(self, taught):
        _, model, _ = runs.restore(taught[0])
        averaged = model["carry"]["ema"]["params"]["classifier"]
        jax.tree.map(
            np.testing.assert_array_equal, runs.load_classifier(taught[0]).params, averaged
        )

    def test_everywhere_in_the_options(self, taught, tfds_dir):
        spec = taught[1]["defense"]["teacher"]
        inner = {"soft_labels": {"teacher": spec, "temperature": 2.0}}
        parts = {"standard": {"weight": 0.5, "transforms": inner}, "add": {"teacher": spec}}
        built = run.build(config(tfds_dir, name="combine", parts=parts))
        assert set(built.sources) == {
            "parts.add.teacher",
            "parts.standard.transforms.soft_labels.teacher",
        }
        assert set(built.defense.pretrained) == {"teacher", "soft_labels"}
        assert isinstance(built.config["defense"]["parts"]["add"]["teacher"], dict)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (dict(name="mnist"), "trained on digits, and this run is of mnist"),
            (dict(num_classes=11, label_names=("k",) * 11), "10 classes, not 11"),
            (dict(images=np.zeros((64, 12, 12, 1), np.uint8)), "cannot be used"),
        ],
    )
    def test_of_other_data(self, taught, change, match):
        source = run.Source(taught[0], "best")
        arrays = run.build(taught[1]).arrays("validation")
        with pytest.raises(ValueError, match=rf"defense\.teacher .*{match}"):
            run._load_source("teacher", source, dataclasses.replace(arrays, **change))

    def test_missing_damaged_and_misspelt(self, taught, tmp_path):
        folder, values = taught

        def built(**spec):
            return run.build({**values, "defense": {**values["defense"], "teacher": spec}})

        with pytest.raises(ValueError, match=r"defense\.teacher .*holds no run"):
            built(workdir=str(tmp_path / "nowhere"))
        with pytest.raises(ValueError, match="nearest: checkpoint"):
            built(workdir=str(folder), checkpoints="best")
        with pytest.raises(ValueError, match="known: best, last"):
            built(workdir=str(folder), checkpoint="first")
        copy = tmp_path / "damaged"
        shutil.copytree(folder, copy)
        for file in (copy / "best").rglob("*"):
            if file.is_file() and "model" in file.parts:
                file.write_bytes(b"damaged")
        with pytest.raises(ValueError, match=r"defense\.teacher .*damaged"):
            train.train(
                {**values, "defense": {**values["defense"], "teacher": {"workdir": str(copy)}}},
                tmp_path / "student",
                progress=False,
            )
        assert not (tmp_path / "student").exists()


def test_a_teacher_is_a_value_of_its_own_role():
    guide = _teachers.make_teacher(teacher(), STUDENT, BALL)
    params, carry = guide.init(KEY, IMAGES)
    assert (set(params), set(carry)) == ({"teacher"}, {"teacher"})
    expected = jax.jit(teacher().module.apply)({"params": teacher().params}, IMAGES)
    np.testing.assert_allclose(
        jax.jit(guide.predict(params, carry))(IMAGES), expected, rtol=1e-5, atol=1e-6
    )
