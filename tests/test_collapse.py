"""Training says when it collapses; a second attack chooses among the best few checkpoints."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import config

from jaxdefense import data, runs, train
from jaxdefense.evaluation.report import rows
from jaxdefense.train import candidates, collapse, loop


def names(*accuracies, n=1000, end=False, every=1.0, **last):
    """The warnings of the last of some validations (clean, robust), `every` epochs apart."""
    history = [
        collapse.Validation(100 * i, every * i, clean, robust)
        for i, (clean, robust) in enumerate(accuracies, 1)
    ]
    history[-1] = collapse.dataclasses.replace(history[-1], **last)
    found = collapse.find_warnings(history, n=n, num_classes=10, is_end=end)
    return [warned.name for warned in found]


class TestFindWarnings:
    def test_robust_accuracy_that_falls_while_clean_stays(self):
        assert names((80, 45), (88, 0.5)) == [collapse.OVERFITTING]
        assert names((80, 45), (88, 21)) == [collapse.OVERFITTING]
        assert names((80, 45), (88, 0.5), (88, 0.4)) == []  # told already
        assert names((80, 45), (88, 30)) == []
        # Five validations an epoch: it falls in steps, none of which halves it.
        slow = [(80, 45), (82, 38), (84, 30), (86, 24), (88, 19)]
        assert names(*slow, every=0.2) == [collapse.OVERFITTING]
        assert names(*slow, every=1.0) == []

    def test_a_fall_that_few_images_explain_is_none(self):
        assert names((80, 30), (85, 14)) == [collapse.OVERFITTING]
        assert names((80, 30), (85, 14), n=40) == []

    def test_early_training_is_no_collapse(self):
        assert names((10, 10)) == []
        assert names((10, 10), (90, 1)) == []  # it answered one class before
        assert names((10, 10), (11, 9)) == []
        assert names((60, 0), (90, 0), end=True) == []  # nobody trains for robustness here

    def test_clean_accuracy_that_falls_too_is_another_fault(self):
        assert names((80, 45), (12, 0)) == [collapse.CHANCE]
        assert names((80, 45), (10, 10), one_class=3) == [collapse.ONE_CLASS]
        assert names((80, 45), (11, 10), (10, 10)) == []  # told already

    def test_what_is_told_at_the_end(self):
        assert names((10, 10), end=True) == [collapse.CHANCE]
        assert names((10, 10), end=True, one_class=3) == [collapse.ONE_CLASS]
        assert names((90, 0), end=True, crafted=95.0) == [collapse.OVERFITTING]
        assert names((90, 0), end=True, crafted=9.0) == [collapse.NO_ROBUSTNESS]
        assert names((90, 0), crafted=9.0) == []  # eps may still grow
        assert names((90, 40), end=True, crafted=95.0) == []

    def test_crafted_images_that_are_easier_than_clean_ones(self):
        assert names((80, 30), crafted=99.0, plain=80.0) == [collapse.ROBUST_ABOVE_CLEAN]
        assert names((80, 30), crafted=82.0, plain=80.0) == []
        assert names((80, 70), crafted=99.0, plain=80.0) == []

    def test_a_message_is_one_line_with_evidence_and_advice(self):
        history = [
            collapse.Validation(100, 1.0, 80.0, 45.0),
            collapse.Validation(200, 2.0, 88.0, 0.5),
        ]
        (warned,) = collapse.find_warnings(history, n=1000, num_classes=10, is_end=False)
        for part in ("45.0 % (epoch 1) to 0.5 %", "1000 validation images", "more steps"):
            assert part in str(warned)
        assert "\n" not in str(warned)


class TestParts:
    labels = np.arange(100) % 10

    def test_constant_answer(self):
        right = self.labels == 4
        assert collapse.constant_answer(right, self.labels) == 4
        right = right.copy()
        right[0] = True  # nearly all
        assert collapse.constant_answer(right, self.labels) == 4
        right[:30] = True
        assert collapse.constant_answer(right, self.labels) is None
        assert collapse.constant_answer(np.zeros(100, bool), self.labels) is None
        assert collapse.constant_answer(np.ones(9, bool), np.zeros(9, int)) is None

    def test_training_accuracies(self):
        metrics = {"update0_accuracy": 0.5, "update1_robust_accuracy": 0.25, "update1_loss": 2.0}
        assert collapse.training_accuracies(metrics) == {"plain": 50.0, "crafted": 25.0}
        assert collapse.training_accuracies({"mixed_accuracy": 0.5}) == {}

    def test_a_watch_goes_on_where_it_was(self):
        watches = [collapse.Watch(1000, 10) for _ in range(2)]
        scores = [{"validation_clean": 80.0, "validation_robust": r} for r in (45.0, 1.0)]
        watches[0].note_metrics({"robust_accuracy": 0.5})
        watches[0].add(100, 1.0, scores[0], None, False)
        meta = {"watch": watches[0].state(), "warnings": watches[0].told()}
        watches[1].restore(json.loads(json.dumps(meta)))
        for watch in watches:
            assert len(watch.add(200, 2.0, scores[1], None, False)) == 1
        assert watches[0].state() == watches[1].state()

    def test_a_row_of_the_report_tells_it_once(self):
        told = {"step": 9, "epoch": 1.0, "name": "one class", "evidence": "class 3"}
        record = {
            "name": "a", "seed": 5, "config": {}, "results": {"classifier": {}},
            "training": {"warnings": [told]},
        }  # fmt: skip
        row = rows.Row("a", "classifier", [record, {**record, "protocol": "autoattack"}])
        assert row.flags == ["seed 5, in training: one class: class 3"]


def test_fgsm_at_a_hopeless_eps_warns_in_summary_log_and_record(tmp_path, tfds_dir, capsys):
    """fgsm_at:digits at eps .5, where no accuracy can be robust."""
    values = config(tfds_dir, **{"threat.eps": 0.5, "train.length": "60s"})
    values["defense"] = {"name": "fgsm_at"}
    values["dataset"].update(validation=200, limit=None)
    values["train"].update(validate_every="60s", checkpoint_every="60s", steps_per_dispatch=60)
    values["train"]["optimizer"] = {"name": "adam", "lr": 3e-3}
    summary = train.train(values, tmp_path, progress=False)
    (told,) = summary["warnings"]
    assert told["name"] in (collapse.NO_ROBUSTNESS, collapse.OVERFITTING)
    assert told["step"] == 60
    assert f"warning: {told['name']}: " in capsys.readouterr().err
    lines = runs.run.read_log(tmp_path / "metrics.jsonl")
    assert [line["warning"] for line in lines if "warning" in line] == [told["name"]]
    meta = runs.restore(tmp_path).meta
    assert meta["warnings"] == summary["warnings"]
    assert len(meta["validation"]) == 1
    again = train.train(values, tmp_path, progress=False)
    assert again["warnings"] == summary["warnings"]


def toy_images(n, seed):
    """Two classes: pixel 0 tells 80 % of them apart by much, pixel 1 all of them by a little."""
    chance = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    sign = 2 * labels - 1
    honest = np.where(chance.uniform(size=n) < 0.8, sign, -sign)
    images = np.full((n, 2, 2, 1), 0.5)
    images[:, 0, 0, 0] += 0.4 * honest
    images[:, 0, 1, 0] += 0.02 * sign
    return np.rint(255 * images).astype(np.uint8), labels


def toy_init(key, images):
    return {"w": jnp.array([0.5, 0.0])}


def toy_apply(params, images):
    pixels = (images[:, 0, :, 0] - 0.5) * jnp.array([[1.0, 50.0]])
    lead = pixels @ params["w"]
    return jnp.stack([-lead, lead], -1)


def toy_train(workdir, **select_with):
    """The network leans on pixel 0 at first, and in the end on pixel 1, which eps .1 can turn.

    The validation attack sees nothing of that: its step is too short.
    """
    values = config("", **{"train.length": "12s", "train.validate_every": "2s"})
    del values["model"], values["dataset"]
    values["defense"] = {"name": "standard"}
    values["validation"] = {"name": "fgsm", "step_size": 1e-6}
    values["train"]["optimizer"] = {"name": "sgd", "lr": 0.01, "momentum": 0.9}
    values["train"]["checkpoint_every"] = "4s"
    if select_with:
        values["train"]["select_with"] = select_with
    splits = data.from_arrays(*toy_images(400, 0), test=100, validation=100)
    model = (toy_init, toy_apply)
    summary = train.train(values, workdir, model=model, data=splits, progress=False)
    return summary, runs.restore(workdir, model=model, data=splits)


APGD = {"name": "apgd", "steps": 3, "best_of": 3}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody killed: its folder, summary and what is restored from it."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *toy_train(folder, **APGD)


class TestSecondAttack:
    pgd = {"name": "pgd", "steps": 3, "best_of": 6}  # noqa: RUF012

    @pytest.mark.slow
    def test_it_turns_down_what_the_first_attack_prefers(self, tmp_path, capsys):
        first, _ = toy_train(tmp_path / "first")
        assert first["best"]["step"] == 12
        assert first["best"]["validation_robust"] == 100.0
        second, (_, variables, meta) = toy_train(tmp_path / "second", **self.pgd)
        best = second["best"]
        assert best["step"] < 12
        told = {one["step"]: one["validation_second"] for one in meta["candidates"]}
        assert sorted(told) == [2, 4, 6, 8, 10, 12]
        assert told[12] < 10 < 60 < told[best["step"]] == max(told.values())
        assert meta["best"] == best
        assert meta["step"] == best["step"]
        assert float(variables["params"]["classifier"]["w"][1]) < 0.2
        assert f"step {best['step']}" in capsys.readouterr().err
        assert not (tmp_path / "second" / "candidates").exists()

    @pytest.mark.parametrize(
        ("owner", "method", "call"),
        [
            (candidates.Candidates, "save", 3),  # in training
            (loop.Trainer, "score_network", 9),  # the candidates are being scored
            (candidates.Candidates, "clear", 1),  # the winner is written
        ],
    )
    @pytest.mark.slow
    def test_killed_anywhere_it_ends_with_the_same_bits(
        self, tmp_path, monkeypatch, whole, owner, method, call
    ):
        folder, summary, (_, variables, meta) = whole
        original, calls = getattr(owner, method), []

        def killed(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                raise KeyboardInterrupt
            return original(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, method, killed)
            with pytest.raises(KeyboardInterrupt):
                toy_train(tmp_path, **APGD)
        again, (_, resumed, meta_again) = toy_train(tmp_path, **APGD)
        assert again["best"] == summary["best"]
        assert meta_again["candidates"] == meta["candidates"]
        assert len(meta["candidates"]) == 3
        for a, b in zip(jax.tree.leaves(variables), jax.tree.leaves(resumed), strict=True):
            np.testing.assert_array_equal(a, b)
        logs = [(path / "metrics.jsonl").read_text() for path in (folder, tmp_path)]
        assert logs[0] == logs[1]
        assert not (tmp_path / "candidates").exists()

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"select_with": {"name": "apgdd"}}, "nearest: apgd"),
            ({"select_with": {"name": "apgd", "best_of": 0}}, "best_of"),
            ({"select_with": {"name": "apgd", "step": 3}}, "nearest: steps"),
            ({"select_with": "apgd"}, "select_with must be a mapping"),
            ({"select_with": {"name": "apgd"}, "select": "clean"}, "select is 'clean'"),
        ],
    )
    def test_wrong_options(self, tfds_dir, change, match):
        values = config(tfds_dir)
        values["train"] |= change
        with pytest.raises(ValueError, match=match):
            runs.run.build(values)
