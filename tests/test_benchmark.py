"""The benchmark: its tables, its peers' processes, and one small run of its suites."""

import json
import types

import configs
import jax
import numpy as np
import pytest
from benchmark import peers, pgd, rewritten, tables, training, verdicts

from jaxdefense import models, threat
from jaxdefense.train import loop

WEIGHTS = {"params": {"head": {"bias": np.arange(3.0)}}}
FLAG = {"name": "unconfirmed wins", "severity": "note", "evidence": "3 wins"}


def verdict(survivors, passes, most, flags=()):
    """What a row keeps of a verdict."""
    return {
        "survivors": survivors,
        "passes": passes,
        "most_passes": most,
        "seconds": 12.4,
        "flags": list(flags),
    }


def row(suite, verdicts):
    """A row in which the first verdict leaves no image alone and the second leaves 7."""
    first, second = verdicts
    return {"suite": suite, "what": "a", "verdicts": verdicts, "only": {first: [], second: [7]}}


class TestTables:
    def test_fast(self):
        standard = verdict({"clean": 9, "apgd-ce": 8}, {"apgd-ce": [6_000_000, 4_000_000]}, [10, 5])
        fast = verdict({"clean": 9, "apgd-pm": 8}, {"apgd-pm": [900_000, 100_000]}, [1, 1])
        table = tables.verdict_table(
            {"rows": [row("fast", {"standard": standard, "fast": fast})]}
        ).splitlines()
        expected = "| a | 9 | apgd-ce 8 | apgd-pm 8 | 1 (fast alone 1) | 10.00 / 1.00 | "
        assert table[2] == expected + "10.0% / 20.0% | 12 / 12 |"

    def test_half(self):
        wide = verdict({"clean": 9, "apgd-ce": 8}, {}, [1, 1])
        narrow = verdict({"clean": 9, "apgd-ce": 7}, {}, [1, 1], [FLAG])
        table = tables.verdict_table(
            {"rows": [row("half", {"float32": wide, "bfloat16": narrow})]}
        ).splitlines()
        told = "1 (bfloat16 alone 1) | – / 3 wins | 12 / 12 |"
        assert table[2] == f"| a | 9 / 9 | 8 / 7 | {told}"

    def test_targeted(self):
        one = {"suite": "targeted", "what": "a", "peer": "b", "hits": [3, 2], "seconds": [1.0, 2.0]}
        cw = {**one, "only": {"ours": [4], "peer": []}, "distances": [0.5, None], "hit_by_both": 2}
        alone = {**one, "peer": None, "hits": [3], "seconds": [1.0]}
        table = tables.verdict_table({"rows": [cw, alone]}).splitlines()
        assert table[2] == "| a | b | 3 / 2 | 1 (ours alone 1) | 0.500 / – (n 2) | 1.0 / 2.0 |"
        assert table[3] == "| a | – | 3 | – | – | 1.0 |"

    def test_each_suite_has_its_table_and_none_stands_twice(self):
        verdicts = {"float32": verdict({"clean": 1}, {}, [1, 1])} | {
            "bfloat16": verdict({"clean": 1}, {}, [1, 1])
        }
        timed = {"what": "t", "peer": "p", "ours_ms": 1.0, "peer_ms": 2.0, "ratio": 2.0}
        record = {"rows": [timed, row("half", verdicts)]}
        assert len(tables.time_table(record).splitlines()) == 3
        assert len(tables.verdict_table(record).splitlines()) == 3
        assert tables.verdict_table({"rows": [timed]}) == ""


@pytest.mark.slow
def test_pgd_times_each_peer_or_says_that_it_is_missing(monkeypatch):
    monkeypatch.setattr(pgd, "CASES", [("cnn", 2, 1)])
    monkeypatch.setattr(pgd.importlib.util, "find_spec", lambda peer: peer == "foolbox")
    missing, timed = pgd.rows(repeats=1)
    assert missing == {
        "what": "PGD-1, cnn, batch 2",
        "peer": "torchattacks (not installed)",
    }
    assert timed["ratio"] == pytest.approx(timed["peer_ms"] / timed["ours_ms"])


@pytest.mark.slow
def test_a_network_of_each_library_is_timed_beside_itself(monkeypatch):
    """The networks have one set of weights; their logits are compared before they are timed."""
    monkeypatch.setattr(rewritten, "PGD_STEPS", 1)
    monkeypatch.setattr(rewritten.importlib.util, "find_spec", lambda name: None)
    net = models.make("cnn", 10, width=0.125)
    x = np.full((2, 28, 28, 1), 0.5, np.float32)
    params = jax.tree.map(np.asarray, jax.jit(net.init)(jax.random.key(0), x)["params"])
    rows = list(rewritten.pgd_rows(params, x, np.zeros(2, int), threat.Linf(0.3), repeats=1))
    timed = {row["what"]: row["peer"] for row in rows if "ratio" in row}
    libraries = [f"PGD-1, {name}, batch 2" for name in rewritten.NETWORKS if name != "equinox"]
    assert timed == dict.fromkeys(
        [*libraries, "PGD-1, linen with pooling, batch 2"], "the same network as it stands"
    )
    missing = [row["peer"] for row in rows if "ratio" not in row]
    assert sorted(missing) == ["equinox (not installed)", *["torchattacks (not installed)"] * 3]


@pytest.mark.slow
def test_training_on_all_devices_is_timed_beside_one(monkeypatch):
    monkeypatch.setattr(training, "CASES", [("cnn", {"width": 0.125}, 8, 1, 2)])
    (row,) = training.rows(repeats=1)
    assert row["what"] == "2 steps of PGD-1 training, cnn of width 0.125, batch 8"
    assert row["ratio"] == pytest.approx(row["peer_ms"] / row["ours_ms"])


class TestPeers:
    """What goes to torch's process and comes back; a script of NumPy stands in its place."""

    @pytest.fixture
    def stand_in(self, tmp_path, monkeypatch):
        def install(source):
            path = tmp_path / "stand_in.py"
            path.write_text(f"import sys\nimport numpy as np\n{source}")
            monkeypatch.setattr(peers, "_SCRIPT", path)

        return install

    def test_pgd_runs_once_per_call(self, stand_in):
        stand_in("for _ in sys.stdin:\n    print('done', flush=True)")
        with peers.pgd_in_torch(WEIGHTS, name="cnn", steps=3) as run:
            run()
            run()

    def test_a_process_that_failed_is_an_error(self, stand_in):
        stand_in("sys.stdin.readline()")
        with (
            peers.pgd_in_torch(WEIGHTS, name="cnn") as run,
            pytest.raises(ValueError, match="the torch process failed"),
        ):
            run()

    def test_an_answer(self, stand_in):
        stand_in(
            "command, problem, answer, *words = sys.argv[1:]\n"
            "np.savez(answer, command=command, words=words, **np.load(problem))"
        )
        run = types.SimpleNamespace(config={"model": {"name": "cnn", "width": 0.5}})
        given = (run, threat.Linf(0.25), WEIGHTS, np.zeros((1, 2, 2, 1)), np.zeros(1))
        answer = peers.answer_of_torch("targeted", *given, "pgd", "cw", alpha=0.1)
        assert (answer["command"], list(answer["words"])) == ("targeted", ["pgd", "cw"])
        told = {key: answer[key].item() for key in ("name", "width", "norm", "eps", "alpha")}
        assert told == {"name": "cnn", "width": 0.5, "norm": "linf", "eps": 0.25, "alpha": 0.1}
        np.testing.assert_array_equal(answer["variables/params/head/bias"], np.arange(3.0))
        assert answer["images"].shape == (1, 2, 2, 1)


@pytest.mark.slow
def test_suites_on_a_trained_run(tmp_path, tfds_dir, monkeypatch):
    """A defence whose deployed predictor is not its plain network, and a journal to go on from."""
    monkeypatch.setenv("TFDS_DATA_DIR", tfds_dir)
    config = json.loads(configs.load("anti_adversary", "digits_debug").to_json())
    loop.train(config, tmp_path / "run", progress=False)
    given = verdicts.problem(str(tmp_path / "run"), 6, journal=tmp_path / "journal")
    found = verdicts.fast(given)
    assert set(found["verdicts"]) == {"standard", "fast"}
    assert found["verdicts"]["standard"]["most_passes"][1] > 4 * 0.9 * 400
    again = verdicts.fast(given)
    assert again == found  # seconds too: nothing was attacked again
    stages = verdicts.cascade.stages
    monkeypatch.setattr(verdicts.cascade, "stages", lambda *a, **kw: stages(*a, **kw)[:1])
    half = verdicts.half(given)
    assert half["verdicts"]["bfloat16"]["survivors"].keys() == {"clean", "apgd-ce"}
    rows = list(verdicts.targeted(given._replace(journal=None)))
    assert {row["what"].rpartition(": ")[2] for row in rows} == {
        "pgd",
        "cw, in L2 without eps",
        "apgd-ce",
        "autoattack",
    }
    assert all(max(row["hits"]) <= 6 for row in rows)
    assert json.dumps([half, *rows])
