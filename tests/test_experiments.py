"""Every config, and the scripts as a person runs them."""

import json
import os
import pathlib
import subprocess
import sys

import configs
import pytest

from jaxdefense.evaluation import records

ROOT = pathlib.Path(__file__).parents[1]


def script(name, *arguments, data=None):
    env = {**os.environ, "JAX_CACHE_DIR": str(ROOT / ".cache" / "xla"), "COLUMNS": "80"}
    if data:
        env["TFDS_DATA_DIR"] = data
    command = [sys.executable, str(ROOT / "experiments" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=400)


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
    result = script("train.py", "--config=trade:digits", "--workdir=nowhere")
    assert result.returncode == 1
    assert result.stderr.startswith("error: unknown config 'trade'; nearest: trades")


def test_train_evaluate_and_tables(tmp_path, tfds_dir):
    """The three commands of the README on the debug variant, and an override."""
    result = script(
        "train.py", "--config=trades:digits_debug", f"--workdir={tmp_path}/run",
        "--config.train.optimizer.lr=0.002", data=tfds_dir,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "best checkpoint" in result.stdout
    assert "6/6" in result.stderr  # the progress bar's end
    assert (
        json.loads((tmp_path / "run" / "config.json").read_text())["train"]["optimizer"]["lr"]
        == 0.002
    )
    result = script("evaluate.py", f"--workdir={tmp_path}/run", data=tfds_dir)
    assert result.returncode == 0, result.stderr
    record = records.load(tmp_path / "run" / "configured.json")
    assert record["results"]["classifier"]["clean"]["n"] == 256
    assert f"{record['results']['classifier']['pgd20']['accuracy']:.2f}" in result.stdout
    result = script("tables.py", str(tmp_path / "run"))
    assert "| trades-digits-debug |" in result.stdout
    result = script("tables.py", "--per_class=pgd20", str(tmp_path / "run"))
    assert "| pgd20, % | threat | n | 0 | 1 |" in result.stdout


def test_scripts_answer_bad_input_without_a_traceback(tmp_path):
    for arguments in (
        ("evaluate.py", f"--workdir={tmp_path}"),
        ("tables.py", str(tmp_path / "nothing")),
        ("tables.py", str(tmp_path)),
        ("train.py", f"--workdir={tmp_path}"),
        ("train.py", "--config=pgd_at:digits", f"--workdir={tmp_path}", "surplus"),
    ):
        result = script(*arguments)
        assert result.returncode == 1, arguments
        assert result.stderr.startswith("error: "), result.stderr
        assert "Traceback" not in result.stderr
        assert not (tmp_path / "last").exists()


@pytest.mark.parametrize(
    "name",
    [
        "benchmark",
        "evaluate.py",
        "paired.py",
        "prepare_data.py",
        "quickstart.py",
        "tables.py",
        "train.py",
    ],
)
def test_help_is_readable(name):
    result = script(name, "--help")
    text = result.stdout + result.stderr
    assert f"python experiments/{name} " in text
    assert len(text.splitlines()) < 60
