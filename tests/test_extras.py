"""What the plain install can do, and what it says where an extra is missing."""

import importlib.metadata
import pathlib
import subprocess
import sys

import pytest

from jaxdefense.evaluation import records

ROOT = pathlib.Path(__file__).parents[1]

# What the extras bring, made impossible to import.
WITHOUT = """
import sys

MISSING = {
    "PIL", "altair", "array_record", "flax", "grain", "itables", "jinja2", "matplotlib",
    "ml_collections", "orbax", "sklearn", "tensorboardX", "tensorflow_datasets", "tensorstore",
    "vl_convert",
}

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Nothing())
"""

PLAIN = """
import jax
import jax.numpy as jnp
import numpy as np
from jaxdefense import attacks, evaluation, losses, mixing, models, threat
from jaxdefense.evaluation import curves, records, tables

ball = threat.Linf(0.1)
w = jax.random.normal(jax.random.key(0), (3, 3, 1, 4))

def predict(x):
    z = models.conv(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return z.mean((1, 2))

x = np.random.default_rng(0).uniform(size=(8, 6, 6, 1)).astype(np.float32)
y = np.asarray(predict(jnp.asarray(x)).argmax(-1))
verdict = evaluation.autoattack(predict, x, y, ball, attacks=("apgd-ce",))
assert verdict.clean.all()
report = evaluation.audit(predict, x, y, ball, steps=2, restarts=1, stages=(), queries=5)
assert report.tiers
bits = {"clean": verdict.clean}
results = {"classifier": evaluation.summarize(bits, y, 4)}
record = records.make("mine", {}, results, seed=0, seconds=0.0)
assert "100.00" in tables.accuracy_table([record])
print("done")
"""


def test_a_record_lists_the_installed_packages_only(monkeypatch):
    def version(name):
        if name == "flax":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert set(records.environment()["versions"]) == {"python", *records.PACKAGES} - {"flax"}


def python(program):
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + program], capture_output=True, text=True, check=False
    )


def test_attacks_losses_and_verdicts_need_no_extra():
    found = python(PLAIN)
    assert found.stdout == "done\n", found.stderr


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import jaxdefense.data", "jaxdefense.data needs {}: pip install 'jaxdefense[train]'"),
        ("import jaxdefense.runs", "jaxdefense.runs needs {}: pip install 'jaxdefense[train]'"),
        ("import jaxdefense.train", "jaxdefense.data needs {}: pip install 'jaxdefense[train]'"),
        ("import jaxdefense.defenses", "jaxdefense.defenses needs {}: pip install 'jaxdef"),
        (
            "from jaxdefense import models; models.make('cnn', 10)",
            "jaxdefense.models needs flax: pip install 'jaxdefense[train]'",
        ),
        (
            "import jaxdefense.evaluation.report",
            "jaxdefense.evaluation.report needs {}: pip install 'jaxdefense[plots]'",
        ),
    ],
)
def test_a_missing_extra_is_named(program, said):
    last = python(program).stderr.strip().splitlines()[-1]
    before, _, after = said.partition("{}")
    assert last.startswith(f"jaxdefense.extras.MissingExtra: {before}"), last
    assert after in last


@pytest.mark.slow
def test_a_script_says_it_in_one_line():
    for name in ("train.py", "tables.py", "quickstart.py", "papers/claf_literal.py"):
        path = str(ROOT / "experiments" / name)
        program = f"import runpy; sys.path.insert(0, {str(ROOT / 'experiments')!r});"
        found = python(f"{program} sys.argv = [{path!r}]; runpy.run_path({path!r}, run_name='x')")
        assert found.returncode == 1
        assert found.stderr.startswith("error: this script needs "), found.stderr
        assert found.stderr.count("\n") == 1
