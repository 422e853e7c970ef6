"""The soak run: its counts, and a few of each disturbance."""

import json
import os
import subprocess
import sys

import pytest
import tables
from conftest import ROOT, import_script

soak = import_script("soak")

TRIALS = {
    "kills": {"0": "well: train.py, SIGINT, code 130", "1": "evaluate.py: differs in ['last']"},
    "damages": {"0": "well: mended: config.json: emptied", "1": "well: refused: last/3: cut"},
    "disks": {"0": "well: error: no room"},
}


def test_what_is_lost_is_counted(tmp_path):
    (tmp_path / "trials.json").write_text(json.dumps(TRIALS))
    done = soak.Soak(tmp_path, 0)
    done.run({kind: len(trials) for kind, trials in TRIALS.items()})  # nothing is left to try
    counts = done.counts()
    assert [counts[kind]["well"] for kind in soak.KINDS] == [1, 2, 1]
    assert counts["kills"]["lost"] == 1
    assert counts["kills"]["losses"] == ["evaluate.py: differs in ['last']"]
    assert counts["damages"]["how"] == {"mended": 1, "refused": 1}
    record = {"counts": counts, "seed": 0, "date": "2026-01-02T03:04:05"}
    record |= {"versions": {"python": "3.11", "jax": "0.10"}, "device": {"host": "x86, 2 cores"}}
    text = tables.soak_table(record)
    assert "| a signal at a random moment | 2 | 1 | 1 |\n| a damaged file | 2 | 2 | 0 |" in text
    assert "2026-01-02, python 3.11, jax 0.10, x86, 2 cores; random seed 0." in text


@pytest.mark.slow
def test_a_few_of_each_end_well(tmp_path, tfds_dir):
    command = [sys.executable, str(ROOT / "experiments" / "soak.py"), "--kills=3", "--damages=3"]
    command += ["--disks=2", f"--work={tmp_path / 'work'}", f"--record={tmp_path / 'soak.json'}"]
    environment = {**os.environ, "TFDS_DATA_DIR": tfds_dir}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".cache" / "xla")
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            out, _ = process.communicate(timeout=1200)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert process.returncode == 0, out
    counts = json.loads((tmp_path / "soak.json").read_text())["counts"]
    assert {kind: found["tried"] for kind, found in counts.items()} == {
        "kills": 3,
        "damages": 3,
        "disks": 2,
    }
