"""Every config, and the scripts as a person runs them."""

import json
import os
import pathlib
import subprocess
import sys

import configs
import numpy as np
import pytest

from jaxdefense.evaluation import records

ROOT = pathlib.Path(__file__).parents[1]


# Runs scripts in forks of one process that has imported what they need: starting takes seconds.
RUN_ALL = """
import json, os, runpy, sys, traceback
import flax.linen, jax, orbax.checkpoint, tensorflow_datasets, jaxdefense.train
import jaxdefense.evaluation.protocols, jaxdefense.evaluation.report

for number, command in enumerate(json.load(sys.stdin)):
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT), stream)
    sys.argv, code = command, 0
    if not os.path.isdir(command[0]):
        sys.path.insert(0, os.path.dirname(command[0]))
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as error:
        code = error.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
"""


def scripts(folder, commands, **environment):
    """[(exit code, stdout, stderr)] of commands (script, arguments), one after another."""
    paths = [[str(ROOT / "experiments" / name), *arguments] for name, *arguments in commands]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN_ALL],
        input=json.dumps(paths),
        env=os.environ | {"COLUMNS": "80"} | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=400,
    )
    codes = [int(line) for line in result.stdout.split()]
    assert len(codes) == len(commands), result.stderr
    texts = [
        [(folder / f"{i}.{name}").read_text() for name in ("out", "err")]
        for i in range(len(commands))
    ]
    return [(code, *text) for code, text in zip(codes, texts, strict=True)]


@pytest.mark.parametrize(
    ("name", "variant"), [(n, v) for n in configs.names() for v in configs.variants(n)]
)
def test_configs_are_plain_locked_and_documented(name, variant):
    config = configs.load(name, variant)
    assert config.is_locked
    values = json.loads(config.to_json())
    assert values["name"].startswith(name)
    assert values["threat"]["eps"] > 0
    module = sys.modules[f"configs.{name}"]
    assert f"--config={name}:" in module.__doc__
    assert "Expected" in module.__doc__


def test_unknown_names_list_the_nearest():
    with pytest.raises(ValueError, match="nearest: trades"):
        configs.load("trade", "digits")
    with pytest.raises(ValueError, match="nearest: mnist"):
        configs.load("trades", "mnst")


def test_train_evaluate_and_tables(tmp_path, tfds_dir):
    """The three commands of the README on the debug variant, and an override."""
    run = str(tmp_path / "run")
    trained, early, judged, table, per_class = scripts(
        tmp_path,
        [
            (
                "train.py", "--config=trades:digits_debug", f"--workdir={run}",
                "--config.train.optimizer.lr=0.002", "--progress",
            ),
            ("tables.py", run),
            ("evaluate.py", f"--workdir={run}"),
            ("tables.py", run),
            ("tables.py", "--per_class=pgd20", run),
        ],
        TFDS_DATA_DIR=tfds_dir,
        JAX_COMPILATION_CACHE_DIR=str(ROOT / ".cache" / "xla"),
    )  # fmt: skip
    code, out, err = trained
    assert code == 0, err
    assert "best checkpoint" in out
    assert "6/6" in err  # the progress bar's end
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["train"]["optimizer"]["lr"] == 0.002
    code, out, err = early
    assert code == 1
    assert f"run experiments/evaluate.py --workdir={run} first" in err
    code, out, err = judged
    assert code == 0, err
    assert "image/s" not in err  # stderr is no terminal: no bar
    record = records.load(tmp_path / "run" / "configured.json")
    assert record["results"]["classifier"]["clean"]["n"] == 256
    assert f"{record['results']['classifier']['pgd20']['accuracy']:.2f}" in out
    assert "| trades-digits-debug |" in table[1]
    assert "| pgd20, % | threat | n | 0 | 1 |" in per_class[1]


def test_scripts_answer_bad_input_without_a_traceback(tmp_path):
    mine = tmp_path / "mine.npz"
    np.savez(mine, images=np.full((40, 8, 8), 99, np.uint8), labels=np.arange(40) % 4)
    run = f"--workdir={tmp_path / 'run'}"
    commands = [
        ("evaluate.py",),
        ("evaluate.py", f"--workdir={tmp_path}"),
        ("tables.py", str(tmp_path / "nothing")),
        ("tables.py", str(tmp_path)),
        ("train.py", "--config=pgd_at:digits", f"--workdir={tmp_path}", "surplus"),
        ("train.py", "--config=trades:arrays_debug", run, f"--config.dataset.file={mine}"),
    ]
    results = scripts(tmp_path, commands)
    for command, (code, _, err) in zip(commands, results, strict=True):
        assert code == 1, command
        assert err.startswith("error: "), err
        assert "Traceback" not in err
    assert results[0][2].startswith("error: give --workdir=FOLDER or --pretrained=NAME or FILE; ")
    assert results[-1][2] == (
        "error: no test images: evaluate.py would have nothing to judge; add "
        "--config.dataset.test=0.2\n"
    )
    assert not (tmp_path / "last").exists()
    assert not (tmp_path / "run").exists()


def test_a_wrong_command_line_is_answered_in_one_line(tmp_path):
    train = ("train.py", "--config=trades:digits_debug", f"--workdir={tmp_path / 'run'}")
    answers = {
        ("train.py", train[1]): "--workdir is needed: The run's own folder.",
        ("train.py", train[2]): "--config is needed: NAME:VARIANT, ",
        ("train.py", "--config=trade:digits", train[2]): "unknown config 'trade'; nearest: trades",
        (*train, "--wokdir=x"): "unknown flag 'wokdir'; nearest: workdir; known: config, ",
        (*train, "--progress=maybe"): "--progress must be true or false, got 'maybe'",
        (*train, "--config.seed=one"): "--config.seed must be an integer, got 'one'",
        (
            *train,
            "--config.train.lenght=5e",
        ): "unknown key of config.train 'lenght'; nearest: length",
        (
            "evaluate.py",
            "--workdir=x",
            "--examples=ten",
        ): "--examples must be an integer, got 'ten'",
        ("evaluate.py", "--workdir=x", "--checkpoint=bset"): (
            "unknown value of --checkpoint 'bset'; nearest: best"
        ),
    }
    for (command, expected), (code, out, err) in zip(
        answers.items(), scripts(tmp_path, list(answers)), strict=True
    ):
        assert code == 2, (command, err)
        assert err.startswith(f"error: {expected}"), (command, err)
        assert err.count("\n") == 1, err
        assert out == ""
    assert not (tmp_path / "run").exists()


def test_help_is_readable(tmp_path):
    files = sorted((ROOT / "experiments").glob("*.py"))
    names = ["benchmark", *(file.name for file in files if "__main__" in file.read_text())]
    for worker in ("quickstart_worker.py", "study_step.py"):  # which scripts start, and no person
        names.remove(worker)
    names += ["papers/claf_literal.py", "papers/cost_sensitive.py"]
    results = scripts(tmp_path, [(name, "--help") for name in names])
    for name, (_, out, err) in zip(names, results, strict=True):
        assert f"python experiments/{name} " in out + err, (name, err)
        assert "Traceback" not in err, name
        assert len((out + err).splitlines()) < 60, name
