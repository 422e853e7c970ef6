"""examples/: each runs from an empty folder, says what it claims, and opens as a notebook."""

import pathlib
import runpy

import jupytext
import matplotlib
import pytest

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}


@pytest.fixture
def run(tmp_path, tfds_dir, monkeypatch):
    """(name of an example) -> (its variables, the files it made)."""
    matplotlib.use("agg")
    monkeypatch.setenv("TFDS_DATA_DIR", tfds_dir)
    monkeypatch.chdir(tmp_path)

    def call(name):
        return runpy.run_path(str(EXAMPLES[name])), {path.name for path in tmp_path.iterdir()}

    return call


@pytest.mark.slow
def test_attack_my_model(run):
    found, made = run("attack_my_model")
    assert made == {"attack.png"}
    curve = list(found["curve"].values())
    assert curve == sorted(curve, reverse=True)
    assert curve[0] > 0.9
    assert found["accuracy"](found["x_adv"]) < 0.4


@pytest.mark.slow
def test_audit_a_purifier(run):
    """What looks robust to who does not know of it falls to who does."""
    found, made = run("audit_a_purifier")
    assert made == {"audit.png"}
    tiers = found["tiers"]
    assert tiers["T0 oblivious pgd (not white-box)"] > 80
    assert tiers["T1 pgd"] < 20
    assert tiers["worst case"] <= min(v for name, v in tiers.items() if not name.startswith("T0"))


@pytest.mark.slow
def test_write_a_defence(run):
    found, made = run("write_a_defence")
    assert made == {"defence.png"}
    results = found["results"]
    assert results["mine"]["pgd"] > results["standard"]["pgd"] + 10
    assert results["mine"]["clean"] > 70


@pytest.mark.parametrize("name", EXAMPLES)
def test_reads_as_a_notebook(name):
    cells = jupytext.read(EXAMPLES[name]).cells
    kinds = [cell.cell_type for cell in cells]
    assert kinds[0] == "markdown"
    assert cells[0].source.startswith("# ")
    assert kinds.count("markdown") >= 4
    assert kinds.count("code") >= 4
    assert f"python examples/{name}.py" in cells[0].source
