"""The cross-table: who is first, what it cost, what is open."""

import numpy as np
import pytest
import study_grid as grid
import study_pages

from jaxdefense.evaluation import records


def measured(accuracies, n):
    """Results of ten classes: each attack's accuracy, the last class the worst.

    The images that are answered rightly stand last, so that the first ones have another accuracy.
    """
    return {
        name: {
            "accuracy": value,
            "per_class": [value] * 9 + [value - 5.0],
            "n": n,
            "bits": records.pack_bits(np.arange(n) >= n * (1 - value / 100)),
        }
        for name, value in accuracies.items()
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of records of two MNIST rows: trades, then pgd_at with two seeds."""
    monkeypatch.setattr(study_pages, "ROOT", tmp_path)

    def add(name, seed, robust, seconds, memory, flags=()):
        row = grid.Row(name, "mnist", seed)
        config = grid.settings(row)
        training = {"step": 6000, "steps": 12000, "seconds": seconds, "memory": memory}
        for protocol, accuracies, n in (
            ("configured", {"clean": 98.0, "fgsm": 95.0, "pgd10": 92.0, "pgd40": 91.0}, 1000),
            ("autoattack", {"clean": 98.5, "autoattack": robust}, 500),
        ):
            results = {"classifier": measured(accuracies, n)}
            told = [{"predictor": "classifier", "name": flag} for flag in flags]
            more = {"training": training, "protocol": protocol, "cascade": {"flags": told}}
            made = records.make(config["name"], config, results, seed=seed, seconds=1.0, **more)
            path = tmp_path / study_pages.STUDY / row.folder / protocol / f"{row.name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            records.save(made, path)

    add("trades", 0, 88.0, seconds=120.0, memory=2e9)
    add("pgd_at", 0, 90.0, seconds=60.0, memory=1e9)
    add("pgd_at", 1, 91.0, seconds=72.0, memory=1.5e9, flags=["masked gradients"] * 2)
    return "mnist"


def cells(table, name):
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {name} ")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_most_robust_is_first_with_its_costs(folder):
    table = study_pages.cross_table(folder)
    header = table.splitlines()[0]
    assert [cell.strip() for cell in header.strip("|").split("|")][4:6] == ["pgd40", "autoattack"]
    assert table.index("pgd_at-mnist") < table.index("trades-mnist")
    found = cells(table, "trades-mnist")
    # 120 s until step 6000 of 12000: half of twelve epochs. PGD-40 fools 90 images of the 1,000,
    # the first ones, hence 90 of the 500 that AutoAttack met.
    assert found[3:] == ["98.50", "82.00", "88.00", "83.00", "20", "2.00", "–", "–"]
    found = cells(table, "pgd_at-mnist")
    assert found[5:9] == ["90.50 ± 0.71 (2)", "85.50 ± 0.71 (2)", "11", "1.50"]
    assert found[-1] == "masked gradients"


def test_the_top_shows_the_first_rows_and_their_records_alone(folder, monkeypatch):
    monkeypatch.setattr(study_pages, "TOP", 1)
    table = study_pages.top_table(folder)
    assert "pgd_at-mnist" in table
    assert "trades-mnist" not in table
    assert "2 records;" in table
    assert "Open" not in table


def test_what_is_open_has_the_command_of_its_grid(folder):
    (told,) = [line for line in study_pages.cross_table(folder).splitlines() if "Open" in line]
    assert "m2at-mnist," in told
    assert "pgd_at-mnist" not in told
    assert "trades-mnist" not in told
    assert told.endswith("`python experiments/study.py --grid=cpu`.")
    with pytest.raises(ValueError, match="unknown folder of the study 'mnst'; nearest: mnist"):
        study_pages.cross_table("mnst")
    reduced = study_pages.cross_table("cifar10_cpu")
    everything = [row for row in grid.rows("cpu") if row.folder == "cifar10_cpu"]
    assert reduced.startswith(f"Open, {len(everything)} rows: ")
    assert "pgd_at-cifar10_cpu (seeds 0, 1, 2)," in reduced
    assert "best1_awp-cifar10_cpu," in reduced
    both = study_pages.cross_table("cifar10")
    assert "`python experiments/study.py --grid=gpu`" in both
    assert "--grid=cpu" in both


def test_a_row_without_autoattack_is_open_and_not_measured_by_pgd(folder, tmp_path):
    def table():
        lines = study_pages.document_table("add").splitlines()
        return next(line for line in lines if line.startswith("| PGD-AT (the teacher), MNIST |"))

    assert "autoattack 90.50" in table()
    for path in (tmp_path / study_pages.STUDY / "mnist/autoattack").iterdir():
        path.unlink()
    assert "open: `python experiments/study.py --rows='pgd_at-mnist-*'`" in table()
    assert "clean" not in table()


class TestVerdict:
    """By hand: nine and one images apart have p = 2 (1 + 10) / 1024 = .0215, eight and two .109."""

    claim = study_pages.Claim("a is better.", "a-digits", "b-digits", "records", "pgd20")

    @pytest.fixture
    def compared(self, tmp_path, monkeypatch):
        monkeypatch.setattr(study_pages, "ROOT", tmp_path)

        def verdict(a, b, seeds=1):
            """Of rows that answer rightly what a and b hold, of 20 images."""
            for name, right in {"a": a, "b": b}.items():
                bits = np.isin(np.arange(20), list(right))
                result = {"accuracy": 100 * bits.mean(), "n": 20, "bits": records.pack_bits(bits)}
                for seed in range(seeds):
                    config = {"dataset": {"name": "digits"}}
                    results = {"classifier": {"pgd20": result}}
                    made = records.make(f"{name}-digits", config, results, seed=seed, seconds=1.0)
                    (tmp_path / "records").mkdir(exist_ok=True)
                    records.save(made, tmp_path / "records" / f"{name}-{seed}.json")
            return study_pages.verdict(self.claim)

        return verdict

    def test_one_seed_is_tested_over_its_images(self, compared):
        told = (
            "holds in one seed: +40.00 points; of 20 images 9 and 1 are right in one alone, p .0215"
        )
        assert compared(range(10, 19), {0}) == told
        assert compared({0}, range(10, 19)).startswith("does not hold in one seed: -40.00 points")
        found = compared(range(10, 18), {0, 1})
        assert found.startswith("not decided in one seed: +30.00 points")
        assert found.endswith("p .109")

    def test_what_cannot_be_tested_says_so(self, compared):
        assert compared({1}, {1}) == "nothing to test: both are right on the same images"
        told = "not tested: +40.00 points in 3 pairs that differ alike"
        assert compared(range(10, 19), {0}, seeds=3) == told
