"""The study: its grid, order, budget, how it goes on, what fails, rows side by side.

Most runs are of FAKE_STEP, which answers as train.py and evaluate.py do, without JAX.
"""

import contextlib
import copy
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import configs
import numpy as np
import pytest
import quickstart_board as board
import rich.console
import study_choose
import study_grid as grid
from conftest import ROOT, import_script

from jaxdefense import checksums, data, files, runs

study = import_script("study")

FAKE_STEP = """
import json, os, pathlib, signal, sys, time

script, *words = sys.argv[1:]
options = dict(word[2:].split("=", 1) for word in words)
workdir = pathlib.Path(options["workdir"])
told = json.loads(pathlib.Path(os.environ["FAKE"]).read_text())[workdir.name]
name = pathlib.Path(script).stem
cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
lines = workdir / "ran.jsonl"

def note(**more):
    found = {"script": name, "options": options, "cores": cores, "at": time.time(), **more}
    with lines.open("a") as file:
        file.write(json.dumps(found) + "\\n")

def save(*_):
    note(saved=True)
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
note()
if told["behaviour"] == "fail":
    sys.exit("error: the loss is not finite")
if told["behaviour"] == "kill":
    os.kill(os.getpid(), 9)
time.sleep(told.get("seconds", 0.0))
note(ended=True)
(workdir / "config.json").write_text("{}")
if "config.defense.teacher.workdir" in options:
    (workdir / "teacher").write_text(options["config.defense.teacher.workdir"])
if name == "evaluate":
    if (workdir / "teacher").exists():
        told["config"]["defense"]["teacher"]["workdir"] = (workdir / "teacher").read_text()
    protocol = options["protocol"]
    accuracy = {"clean": 90.0, "pgd20": 50.0} if protocol == "configured" else {}
    accuracy |= {"autoattack": told["accuracy"]} if protocol == "autoattack" else {}
    results = {"classifier": {k: {"accuracy": v} for k, v in accuracy.items()}}
    record = {"config": told["config"], "results": results, "seconds": 2.0,
              "training": {"seconds": 3.0}}
    pathlib.Path(options["record"]).write_text(json.dumps(record))
"""

PGD_AT, TRADES, ADD = (grid.Row(name, "cifar10_cpu") for name in ("pgd_at", "trades", "add"))


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Runs the study on some rows with the fake step; returns the exit code."""
    script = tmp_path / "fake_step.py"
    script.write_text(FAKE_STEP)
    monkeypatch.setattr(study, "RUN", (sys.executable, str(script)))
    monkeypatch.setattr(study, "PAUSE", 0.02)
    monkeypatch.setenv("FAKE", str(tmp_path / "fake.json"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest's own stays

    def run(rows, told=None, **values):
        told = told or {}
        plans = {}
        for row in rows:
            config = grid.settings(row.resolved(grid.ROBUST))
            asked = told.get(row.name, {})
            plans[row.name] = {"behaviour": "work", "accuracy": 25.0, "config": config, **asked}
        (tmp_path / "fake.json").write_text(json.dumps(plans))
        monkeypatch.setattr(study.grid, "rows", lambda *_: list(rows))
        defaults = dict(
            hours=None, grid="cpu", rows=["*"], again=False, list=False, side_by_side=1,
            workdir=str(tmp_path / "runs"), records=str(tmp_path / "records"), renew=False,
            progress=True,
        )  # fmt: skip
        for name, value in {**defaults, **values}.items():
            monkeypatch.setattr(study, name.upper(), types.SimpleNamespace(value=value))
        return study.run()

    return run


def ran(tmp_path, row):
    """What the steps of a row noted, in order."""
    path = tmp_path / "runs" / row.name / "ran.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def scripts(tmp_path, row, **more):
    return [one["script"] for one in ran(tmp_path, row) if more.items() <= one.items()]


@pytest.mark.parametrize("name", ["cpu", "gpu", "full", "debug"])
def test_each_row_of_a_grid_has_its_own_name_and_a_config(name):
    rows = grid.rows(name)
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        config = grid.settings(row.resolved(grid.ROBUST))
        assert config["seed"] == row.seed
        assert grid.expected_seconds(row, "cpu") > 0
        assert grid.expected_seconds(row, "gpu") > 0


def test_a_gpu_takes_five_times_the_seconds_that_its_operations_or_bytes_need(
    tmp_path, monkeypatch
):
    """By hand: four chips' 495e9 operations are 4 ms, their 6.7 GB 8 ms; the longer counts."""
    config = grid.settings(grid.Row("trades", "cifar10"))
    program = {"times": 1000, "images": 128, "flops": 495e9, "moved": 6.7e9}
    row = {"row": "trades:cifar10", "dtype": "float32", "kind": "train", "config": config}
    record = {"topology": "v5e:2x2", "rows": [row | {"programs": [program]}]}
    half = row | {"dtype": "bfloat16", "programs": [program | {"moved": 1.0, "flops": 1.0}]}
    longer = [program | {"flops": 2 * 990e9}]
    steps = [program | {"images": 100, "moved": 670e9}]
    record["rows"] += [
        half,
        row | {"row": "pgd_at:cifar10", "programs": longer},
        row | {"row": "attack pgd10", "kind": "attack", "programs": steps},
    ]
    (tmp_path / "v5e.json").write_text(json.dumps(record))
    monkeypatch.setattr(grid, "ACCELERATORS", tmp_path / "v5e.json")
    speed = grid.gpu_speed.__wrapped__  # not what was found before
    work = grid.training_passes(config) * grid.forward_cost(config)
    assert work / speed("trades:cifar10") == pytest.approx(5 * 8)
    assert work / speed("pgd_at:cifar10") == pytest.approx(5 * 16)
    assert speed("m2at:cifar10") == speed("pgd_at:cifar10")  # is not there
    # Ten steps of two passes, and one more, on 100 images, in five times .8 s.
    once = 100 * grid.forward_cost(config)
    assert speed("attack pgd10") == pytest.approx(21 * once / (5 * 0.8))


def test_the_grid_holds_what_the_study_promises():
    rows = grid.rows("cpu")
    reduced = [row for row in rows if row.variant.startswith("cifar10_cpu")]
    everything = set(configs.names())
    assert {row.config for row in reduced} >= everything
    for name in (*grid.BASELINES, *grid.SEVEN):
        assert {r.seed for r in reduced if (r.config, r.variant) == (name, "cifar10_cpu")} == {
            0,
            1,
            2,
        }
    pairs = {(row.config, row.seed) for row in rows if row.variant == "mnist_small"}
    assert pairs == {(name, seed) for name in ("gssl", "gssl_baseline") for seed in range(5)}
    assert {row.best for row in rows if row.best} == {
        (place, name) for place in (1, 2) for name in ("awp", "ema")
    }
    for row in rows:
        assert ("audit" in row.protocols) == (row.config in grid.PURIFIERS)
        for protocol in row.protocols:
            words = grid.judging_words(row, protocol, pathlib.Path("run"), pathlib.Path("record"))
            assert (ROOT / "experiments" / words[0]).exists()
            own = protocol in grid.OF_PAPERS
            assert own != (f"--protocol={protocol}" in words)
    literal = {row.name for row in rows if "literal" in row.protocols}
    assert literal >= {"claf-cifar10_cpu-0", "claf-cifar10_cpu_literal-0"}


def test_teachers_come_before_their_students_and_few_rows_are_worth_most():
    rows = grid.rows("cpu")
    assert [row.config for row in rows[:3]] == ["pgd_at", "standard", "trades"]
    firsts = {row.config for row in rows[:15] if not row.seed}
    assert set(grid.SEVEN) <= firsts
    student = next(i for i, row in enumerate(rows) if row.needs_teacher)
    assert set(grid.ROBUST) <= {row.config for row in rows[:student]}


def test_an_unknown_row_names_the_nearest():
    named = grid.rows("cpu", ["standard-mnist-0", "trades-cifar10_cpu-?"])
    assert [row.name for row in named] == [
        *(f"trades-cifar10_cpu-{seed}" for seed in range(3)),
        "standard-mnist-0",
    ]
    for asked, message in (
        (["standard-*", "trade-cifar10_cpu-0"], "nearest: trades-cifar10_cpu-0"),
        (["standard-*", ""], "the name of a row of the grid cpu is empty"),
        ([], "no row of the grid cpu is named"),
    ):
        with pytest.raises(ValueError, match=message):
            grid.rows("cpu", asked)


def fake_splits(name, classes=10, side=32, channels=3):
    """(train, validation, test) of noise."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, side, side, channels), dtype=np.uint8)
    labels = np.arange(30) % classes
    return data.from_arrays(images, labels, num_classes=classes, test=0.3, validation=0.3)


REDUCED = sorted(
    {
        (row.config, row.variant)
        for row in (row.resolved(grid.ROBUST) for row in grid.rows("cpu"))
        if "_cpu" in row.variant
    }
)


@pytest.mark.parametrize(("name", "variant"), REDUCED)
def test_the_reduced_rows_build(name, variant):
    """On noise in place of CIFAR; a student teaches itself."""
    config = copy.deepcopy(grid.settings(grid.Row(name, variant)))
    del config["dataset"]
    if "workdir" in config["defense"].get("teacher", {}):
        config["defense"]["teacher"] = dict(name="pgd_at", steps=1, length="50%")
    classes = 100 if variant.startswith("cifar100") else 10
    run = runs.build(config, data=fake_splits(variant, classes))
    assert run.defense.predictors
    assert run.threat.eps == 8 / 255
    assert config["defense"].get("steps", 2) == 2
    if name not in grid.STUDENTS:
        assert config["model"]["width"] == configs.recipes.REDUCED_MODEL["width"]


def test_the_forward_cost_is_that_of_the_network():
    import jax

    from jaxdefense import models

    options = dict(name="resnet", width=8)
    module = models.make(num_classes=10, **options)
    images = jax.ShapeDtypeStruct((4, 32, 32, 3), "float32")
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    measured = jax.jit(module.apply).lower(variables, images).cost_analysis()["flops"] / 4
    config = dict(model=options, dataset=dict(name="cifar10"))
    assert grid.forward_cost(config) == pytest.approx(measured, rel=0.3)


def test_rows_run_in_order_and_never_twice(start, tmp_path, capsys):
    rows = [PGD_AT, TRADES]
    assert start(rows) == 0
    for row in rows:
        assert scripts(tmp_path, row, ended=True) == ["train", "evaluate", "evaluate"]
        for protocol in row.protocols:
            assert (tmp_path / "records/cifar10_cpu" / protocol / f"{row.name}.json").exists()
    assert ran(tmp_path, PGD_AT)[-1]["at"] <= ran(tmp_path, TRADES)[0]["at"]
    assert "autoattack 25.00 %" in capsys.readouterr().out
    assert start(rows) == 0
    assert "2 done, 0 failed, 0 open" in capsys.readouterr().out
    assert len(scripts(tmp_path, PGD_AT, ended=True)) == 3
    # On another machine, where only the records are.
    assert start(rows, workdir=str(tmp_path / "elsewhere")) == 0
    assert not (tmp_path / "elsewhere" / PGD_AT.name).exists()


def test_the_best_robust_row_teaches_and_is_strengthened(start, tmp_path):
    best = grid.Row("", "cifar10_cpu", best=(1, "awp"))
    told = {PGD_AT.name: {"accuracy": 24.0}, TRADES.name: {"accuracy": 26.0}}
    assert start([ADD, best, PGD_AT, TRADES], told, side_by_side=2) == 0
    (first, *_) = ran(tmp_path, ADD)
    assert first["options"]["config.defense.teacher.workdir"].endswith(f"/runs/{TRADES.name}")
    assert first["at"] >= ran(tmp_path, TRADES)[-1]["at"]
    assert ran(tmp_path, best)[0]["options"]["config"] == "trades:cifar10_cpu_awp"
    # Kept: a run that goes on later has the same teacher.
    for row in (ADD, best):
        kept = json.loads((tmp_path / "runs" / row.name / "study.json").read_text())["ranking"]
        assert kept == ["trades", "pgd_at"]


def test_a_student_without_a_teacher_fails_with_the_reason(start, tmp_path, capsys):
    assert start([ADD]) == 1
    said = capsys.readouterr().out
    assert f"no robust row of cifar10_cpu has a record in {tmp_path / 'records'}" in said
    assert "add e.g. pgd_at-cifar10_cpu-0 to --rows" in said
    assert start([PGD_AT, ADD], again=True) == 0


def test_a_teacher_whose_run_is_elsewhere_is_trained_once_before_its_students(start, tmp_path):
    assert start([PGD_AT, TRADES], {TRADES.name: {"accuracy": 26.0}}) == 0
    students = [grid.Row(name, "cifar10_cpu") for name in ("add", "ard", "iad")]
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    told = {TRADES.name: {"seconds": 0.5}}
    assert start([*students, TRADES], told, side_by_side=2) == 0
    (taught,) = [one for one in ran(tmp_path, TRADES) if "ended" in one]
    assert taught["script"] == "train"
    for row in students:
        first = ran(tmp_path, row)[0]
        assert first["options"]["config.defense.teacher.workdir"].endswith(f"/runs/{TRADES.name}")
        assert first["at"] >= taught["at"]
    # A better one comes later: the next student has the teacher of the others all the same.
    mart, adaad = (grid.Row(name, "cifar10_cpu") for name in ("mart", "adaad"))
    assert start([mart, adaad], {mart.name: {"accuracy": 40.0}}) == 0
    (first, *_) = ran(tmp_path, adaad)
    assert first["options"]["config.defense.teacher.workdir"].endswith(f"/runs/{TRADES.name}")


def test_a_failure_is_kept_and_not_tried_before_it_is_asked(start, tmp_path, capsys):
    rows = [PGD_AT, TRADES]
    assert start(rows, {PGD_AT.name: {"behaviour": "fail"}}) == 1
    said = capsys.readouterr().out
    assert f"failed: {PGD_AT.name}: training: the loss is not finite" in said
    assert "1 done, 1 failed, 0 open" in said
    assert "--again" in said
    assert start(rows) == 1  # it would work now, but is left out
    assert len(scripts(tmp_path, PGD_AT)) == 1
    assert "training: the loss is not finite" in capsys.readouterr().out
    assert start(rows, again=True) == 0
    assert scripts(tmp_path, PGD_AT, ended=True) == ["train", "evaluate", "evaluate"]


def test_a_killed_step_says_the_signal(start, capsys):
    assert start([PGD_AT], {PGD_AT.name: {"behaviour": "kill"}}) == 1
    assert "training: killed by SIGKILL (out of memory?)" in capsys.readouterr().out


def test_out_of_time_it_saves_and_goes_on_without_what_is_done(start, tmp_path, capsys):
    rows = [PGD_AT, TRADES]
    assert start(rows, {TRADES.name: {"seconds": 60.0}}, hours=4 / 3600) == 0
    said = capsys.readouterr().out
    assert "1 done, 0 failed, 1 open" in said
    assert "this goes on:" in said
    assert scripts(tmp_path, TRADES, saved=True) == ["train"]
    # Interrupted once more after training: that is not run again.
    state = study.Entry(TRADES.name, {}, tmp_path / "runs" / TRADES.name, row=TRADES)
    state.write_state(seconds={"training": 1.0})
    assert start(rows) == 0
    assert scripts(tmp_path, TRADES, ended=True) == ["evaluate", "evaluate"]


@pytest.mark.skipif(len(study.available_cores()) < 2, reason="one core")
def test_two_rows_side_by_side_share_the_cores(start, tmp_path):
    rows = [PGD_AT, TRADES]
    told = {row.name: {"seconds": 0.5} for row in rows}
    assert start(rows, told, side_by_side=2) == 0
    one, two = (ran(tmp_path, row) for row in rows)
    assert two[0]["at"] < one[-1]["at"]
    assert one[0]["at"] < two[-1]["at"]
    assert not set(one[0]["cores"]) & set(two[0]["cores"])
    # A run that goes on has as many devices as it began with.
    assert study.read_object(tmp_path / "runs" / PGD_AT.name / "study.json")["devices"] == len(
        one[0]["cores"]
    )


def test_devices_share_a_batch():
    assert study.count_devices(16, 128) == 8
    assert study.count_devices(8, 172) == 4
    assert study.count_devices(2, 7) == 1


def test_a_record_of_another_config_or_that_was_edited_is_refused(start, tmp_path, capsys):
    rows = [PGD_AT, TRADES]
    assert start(rows) == 0
    path = tmp_path / "records/cifar10_cpu/configured" / f"{PGD_AT.name}.json"
    record = json.loads(path.read_text())
    other = copy.deepcopy(record)
    other["config"]["train"]["length"] = "1e"
    edited = checksums.seal(record)
    edited["results"]["classifier"]["clean"]["accuracy"] = 99.0
    bare = {key: value for key, value in record.items() if key != "results"}
    for text, reason in (
        (json.dumps(other), f"{path} is of another config than the row's now: train differ"),
        ("{", f"{path} is damaged"),
        (json.dumps(edited), f"{path} is damaged or was edited: its checksum differs"),
        (json.dumps(bare), f"{path} is damaged or was edited: it has no results"),
    ):
        path.write_text(text)
        capsys.readouterr()
        for listed in (False, True):
            assert start(rows, list=listed) == int(not listed)
            said = capsys.readouterr().out
            assert f"{PGD_AT.name}: failed: {reason}" in said or f"failed: {PGD_AT.name}" in said
            assert reason in said
            assert "1 done" in said or "1 of 2 done" in said  # the other row
    path.write_text(json.dumps(checksums.seal(record)))
    assert start(rows) == 0


def test_the_list_says_what_runs(start, tmp_path, capsys):
    assert start([PGD_AT]) == 0
    state = study.Entry(TRADES.name, {}, tmp_path / "runs" / TRADES.name, row=TRADES)
    state.write_state(running="autoattack")  # as in a study, and after one that was killed
    for held, told in ((True, "autoattack"), (False, "waiting")):
        capsys.readouterr()
        lock = tmp_path / "runs/study.lock"
        with files.locked(lock, "study") if held else contextlib.nullcontext():
            assert start([PGD_AT, TRADES], list=True) == 0
        assert f"{TRADES.name}: {told}, about" in capsys.readouterr().out


def test_the_list_says_what_is_done_and_what_that_takes(start, tmp_path, capsys):
    assert start([PGD_AT]) == 0
    capsys.readouterr()
    assert start([PGD_AT, TRADES], list=True) == 0
    done, waiting, last = capsys.readouterr().out.splitlines()
    assert "pgd_at-cifar10_cpu-0: done, took 0.1 min; configured, autoattack;" in done
    assert "trades-cifar10_cpu-0: waiting, about" in waiting
    assert "python experiments/train.py --config=trades:cifar10_cpu" in waiting
    assert last.startswith("1 of 2 done; the rest takes about")


def test_the_table_shows_the_attack_that_it_is_asked_for():
    entry = study.Entry("a", {}, pathlib.Path("a"), state="done", row=PGD_AT)
    entry.results = {"clean": 90.0, "autoattack": 26.5}
    table = board.draw([entry], "title", 100, 20, "autoattack")
    console = rich.console.Console(width=100, file=io.StringIO(), record=True)
    console.print(table)
    text = console.export_text()
    assert "autoattack, %" in text
    assert "26.50" in text


def test_what_its_parent_leaves_behind_ends_by_itself(tmp_path):
    """A killed study closes the pipe: the step is asked to end as by SIGTERM."""
    script = tmp_path / "waits.py"
    script.write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "print(sys.argv[1], flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, str(ROOT / "experiments/study_step.py"), str(script), "--a=b"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "--a=b\n"
    process.stdin.close()
    assert process.wait(timeout=30) == 143
    process.stdout.close()


@pytest.mark.slow
def test_the_script_trains_and_judges_a_row(tmp_path, tfds_dir):
    environment = os.environ | {"TFDS_DATA_DIR": tfds_dir, "PYTHONPATH": str(ROOT)}
    command = [
        *(sys.executable, str(ROOT / "experiments/study.py"), "--grid=debug", "--norenew"),
        *("--rows=standard-*", f"--workdir={tmp_path / 'runs'}", f"--records={tmp_path / 'r'}"),
    ]
    began = time.monotonic()
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=environment, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 done, 0 failed, 0 open" in result.stdout
    path = tmp_path / "r/digits/configured/standard-digits_debug-0.json"
    record = json.loads(path.read_text())
    assert record["name"] == "standard-digits-debug"
    assert record["training"]["seconds"] < time.monotonic() - began


@pytest.mark.parametrize("candidate", study_choose.CANDIDATES, ids=lambda found: found.name)
def test_candidates_of_the_reduced_recipe_build(candidate):
    config = candidate.config(100)
    del config["dataset"]
    run = runs.build(config, data=fake_splits("cifar10"))
    assert run.train["length"] == "100s"
    assert run.config["model"]["name"] == candidate.model["name"]
    # What the recipe of the grid needs: some epochs in eight minutes.
    assert 2 < candidate.epochs(480) < 20


def test_candidates_are_measured_one_after_another(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study_choose.cli, "enable_cache", lambda: None)
    monkeypatch.setattr(study_choose.cli, "spread_over_cores", lambda: None)

    def measured(candidate, folder, seconds):
        assert seconds == 480
        accuracy = {"clean": 50.0, "aa-fast": 26.0, "autoattack": 25.0}
        results = {"classifier": {k: {"accuracy": v} for k, v in accuracy.items()}}
        record = {"results": results, "seconds": 600.0}
        return {"epochs": 3.0, "step_ms": 400.0, "training": 470.0, "record": record}

    assert (
        study_choose.main(tmp_path, 480, [study_choose.CANDIDATES[0].name], measured=measured) == 0
    )
    said = capsys.readouterr().out
    assert "| resnet8-pgd2 | 17.3 | 400 | 3.0 | 50.0 | 26.0 | 25.0 | 7.8 | 10.0 |" in said


def test_candidates_are_named_where_none_is_meant(tmp_path):
    with pytest.raises(ValueError, match=r"unknown candidate .resnet8-pgd3.*resnet8-pgd2"):
        study_choose.main(tmp_path, 480, ["resnet8-pgd3"])
