"""Training says when it collapses; a second attack chooses among the best few checkpoints."""

import json

import jax.numpy as jnp
import numpy as np
from test_train import config

from jaxdefense import data, runs, train
from jaxdefense.evaluation.report import rows
from jaxdefense.train import collapse


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
        watches[1].restore(json.loads(json.dumps(watches[0].state())))
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


class TestSecondAttack:
    """The network leans on pixel 0 at first and on pixel 1, which eps .1 hides, in the end."""

    def init(self, key, images):
        return {"w": jnp.array([0.5, 0.0])}

    def apply(self, variables, images):
        pixels = (images[:, 0, :, 0] - 0.5) * jnp.array([1.0, 50.0])
        lead = pixels @ variables["w"]
        return jnp.stack([-lead, lead], -1)

    def train(self, workdir, tmp_path, **select_with):
        values = config("", **{"train.length": "12s", "train.validate_every": "2s"})
        del values["model"], values["dataset"]
        values["defense"] = {"name": "standard"}
        # A first attack that sees nothing: its step is too short.
        values["validation"] = {"name": "fgsm", "step_size": 1e-6}
        values["train"]["optimizer"] = {"name": "sgd", "lr": 0.1}
        values["train"]["checkpoint_every"] = "4s"
        if select_with:
            values["train"]["select_with"] = select_with
        sets = [data.from_arrays(*toy_images(n, i), name="toy") for i, n in enumerate((256, 100))]
        splits = (sets[0][0], sets[1][0], sets[1][0])
        return train.train(
            values, workdir, model=(self.init, self.apply), data=splits, progress=False
        )
