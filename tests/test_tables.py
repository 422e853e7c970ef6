"""Tables: rows that belong together are averaged, others refused; threat and n stand in each."""

import copy
import pathlib
import re

import paired
import pytest
from conftest import import_script
from papers import metric_i

from jaxdefense.evaluation import records, report, tables

script = import_script("tables")

RECORDS = pathlib.Path(__file__).parents[1] / "experiments" / "records"
FOLDERS = sorted({str(path.parent.relative_to(RECORDS)) for path in RECORDS.rglob("*/*.json")})
PGD = "pgd(Linf(eps=0.3, bounds=(0.0, 1.0)), steps=40)"


def record(seed=0, name="a", accuracy=80.0, **more):
    """A record of a small config, two predictors and two attacks."""

    def result():
        return {"accuracy": accuracy, "per_class": [accuracy, None], "n": 500}

    results = {"main": {"clean": result(), "pgd": result()}, "teacher": {"clean": result()}}
    config = {
        "name": name,
        "seed": seed,
        "dataset": {"name": "mnist", "validation": 1000},
        "threat": {"norm": "linf", "eps": 0.3},
        "train": {"length": "12e", "betas": (0.5, 0.9)},
        "defense": {"teacher": {"workdir": f"runs/{seed}", "checkpoint": "best"}},
        "evaluation": {"attacks": {"pgd": {"name": "pgd", "steps": 40}}},
    }
    made = {
        "name": name,
        "seed": seed,
        "config": config,
        "results": results,
        "protocol": "configured",
    }
    return made | more


def changed(path, value, seed=1):
    """A record of another seed with the value at a dotted path replaced."""
    found = record(seed)
    *folders, key = path.split(".")
    inner = found
    for folder in folders:
        inner = inner[folder]
    inner[key] = value
    return found


def refusal(*found):
    with pytest.raises(ValueError, match="do not belong together") as caught:
        tables.group_by_row(found)
    message = str(caught.value)
    assert "\n" not in message
    return message


class TestGroup:
    def test_seeds_alone_are_averaged(self):
        table = tables.accuracy_table([record(0), record(1, accuracy=82.0)])
        assert "| a | L∞ 0.3 | 500 | 81.00 ± 1.41 (2) | 81.00 ± 1.41 (2) |" in table

    @pytest.mark.parametrize(
        ("path", "value", "told"),
        [
            ("config.train.length", "8e", "train.length is '12e' (seed 0) and '8e' (seed 1)"),
            ("config.train.extra", 1, "train.extra is absent (seed 0) and 1 (seed 1)"),
            ("config.dataset.name", "digits", "dataset.name is 'mnist' (seed 0) and 'digits'"),
            ("config.threat.eps", 0.1, "threat.eps is 0.3 (seed 0) and 0.1 (seed 1)"),
            ("config.threat.norm", "l2", "threat.norm is 'linf' (seed 0) and 'l2' (seed 1)"),
            (
                "config.evaluation.attacks.pgd.steps",
                10,
                "evaluation.attacks.pgd.steps is 40 (seed 0) and 10 (seed 1)",
            ),
            ("config.defense.teacher.checkpoint", "last", "defense.teacher.checkpoint is 'best'"),
            (
                "protocol",
                "autoattack",
                "record.protocol is 'configured' (seed 0) and 'autoattack' (seed 1)",
            ),
            (
                "threat",
                {"norm": "linf", "eps": 0.2},
                "together: record.threat.eps is 0.3 (seed 0) and 0.2",
            ),
            ("results.main.pgd.n", 100, "n of pgd is 500 (seed 0) and 100 (seed 1)"),
            ("results.teacher.clean.n", 9, "records of a [teacher] do not belong together: n of"),
        ],
    )
    def test_other_differences_are_refused(self, path, value, told):
        assert told in refusal(record(0), changed(path, value))

    def test_all_keys_that_differ_are_named(self):
        other = changed("config.threat.eps", 0.1)
        other["config"]["train"]["length"] = "8e"
        assert refusal(record(0), other) == (
            "records of a do not belong together: threat.eps is 0.3 (seed 0) and 0.1 (seed 1); "
            "train.length is '12e' and '8e'"
        )

    def test_equal_differences_are_told_once(self):
        other = record(1)
        for result in other["results"]["main"].values():
            result["n"] = 100
        assert "n of clean, n of pgd is 500 (seed 0) and 100 (seed 1)" in refusal(record(), other)

    def test_data_sets_and_checkpoints_that_both_records_tell(self):
        first, other = record(dataset={"name": "mnist", "hash": "x"}), record(1, dataset={})
        other["dataset"] = {"name": "mnist", "hash": "y"}
        assert "record.dataset.hash is 'x' (seed 0) and 'y'" in refusal(first, other)
        best, last = ({"checkpoint": kind} for kind in ("best", "last"))
        message = refusal(record(training=best), record(1, training=last))
        assert "record.checkpoint is 'best' (seed 0) and 'last' (seed 1)" in message

    def test_descriptions_of_attacks(self):
        first, same = record(0, attacks={"pgd": PGD}), record(1, attacks={"pgd": PGD})
        other = record(2, attacks={"pgd": PGD.replace("40", "10")})
        tables.group_by_row([first, same, record(2)])  # an older record says nothing
        assert f"attack pgd is {PGD!r} (seed 0) and" in refusal(first, other)
        message = refusal(record(1), first, other)  # not only the first record is compared
        assert "(seed 0)" in message
        assert "(seed 2)" in message

    def test_where_a_function_lies_in_memory_says_nothing(self):
        texts = [f"pgd(loss=<function margin at {place}>)" for place in ("0x7f01", "0x7f02")]
        tables.group_by_row([record(s, attacks={"pgd": text}) for s, text in enumerate(texts)])

    def test_where_a_teacher_lies_says_nothing(self):
        tables.group_by_row([record(0), record(1)])
        several = [record(seed) for seed in (0, 1)]
        for one in several:
            one["config"]["teachers"] = [{"workdir": f"/tmp/{one['seed']}", "weight": 1.0}]
        tables.group_by_row(several)
        several[1]["config"]["teachers"][0]["weight"] = 2.0
        assert "teachers.0.weight is 1.0 (seed 0) and 2.0 (seed 1)" in refusal(*several)

    def test_a_record_read_from_a_file_equals_one_in_memory(self, tmp_path):
        written = {**record(1), "format": records.FORMAT}
        records.save(written, tmp_path / "r.json")
        tables.group_by_row([record(0), records.load(tmp_path / "r.json")])

    def test_every_table_refuses(self):
        found = [record(0), changed("config.train.length", "8e")]
        for render in (
            tables.accuracy_table,
            metric_i.table,
            lambda some: tables.class_table(some, "pgd"),
        ):
            with pytest.raises(ValueError, match=r"train\.length is '12e' \(seed 0\) and '8e'"):
                render(found)


class TestConditions:
    @pytest.mark.parametrize(
        ("norm", "eps", "text"),
        [
            ("linf", 8 / 255, "L∞ 8/255"),
            ("linf", 0.3, "L∞ 0.3"),
            ("linf", 0.2, "L∞ 0.2"),  # 51/255 too
            ("linf", 0.09243, "L∞ 0.0924"),
            ("linf", 0.0, "L∞ 0"),
            ("l2", 128 / 255, "L2 128/255"),
            ("l2", 1.0, "L2 1"),
            ("l1", 12.0, "L1 12"),
            ("other", 2, "other 2"),
        ],
    )
    def test_threat(self, norm, eps, text):
        assert tables.format_threat({"config": {"threat": {"norm": norm, "eps": eps}}}) == text

    def test_a_record_s_own_threat_comes_first(self):
        own = record(threat={"norm": "linf", "eps": 0.2, "note": "normalised"})
        assert tables.format_threat(own) == "L∞ 0.2 (normalised)"
        assert "| a | L∞ 0.2 (normalised) | 500 |" in tables.accuracy_table([own])

    def test_no_threat_and_no_n_are_dashes(self):
        bare = record(config={})
        del bare["results"]["main"], bare["results"]["teacher"]["clean"]["n"]
        assert "| a | – | – | 80.00 |" in tables.accuracy_table([bare])

    def test_each_table_says_threat_and_n(self):
        found = record()
        for table in (
            tables.accuracy_table([found]),
            tables.class_table([found], "pgd"),
            metric_i.table([found]),
            tables.tier_table(found, "main"),
        ):
            header, _, *rows = table.splitlines()
            assert " | threat | n | " in header
            assert all(" | L∞ 0.3 | 500 | " in row for row in rows)

    def test_different_numbers_of_images_in_a_row(self):
        found = record()
        found["results"]["main"]["pgd"]["n"] = 100
        assert "| a | L∞ 0.3 | 100 to 500 |" in tables.accuracy_table([found])
        assert "| a [main] | L∞ 0.3 | 100 |" in tables.class_table([found], "pgd")

    def test_metric_i_counts_the_images_of_all_classes(self):
        def judged(n, *per_class):
            return {"clean": {"accuracy": 0.0, "per_class": list(per_class), "n": n}}

        own = {"protect0": judged(30, 90.0, None), "protect1": judged(20, None, 80.0)}
        assert "| a | L∞ 0.3 | 50 | 85.00 |" in metric_i.table([record(results=own)])
        whole = {"protect0": judged(50, 90.0, 1.0), "protect1": judged(50, 1.0, 80.0)}
        assert "| a | L∞ 0.3 | 50 | 85.00 |" in metric_i.table([record(results=whole)])

    def test_nothing_is_said_of_a_class_of_a_handful_of_images(self):
        result = {"accuracy": 50.0, "per_class": [0.0, 60.0, None], "n": 46}
        assert tables.class_accuracies(result) == {}  # 23 in the mean
        assert tables.class_accuracies(result | {"n": 80}) == {0: 0.0, 1: 60.0}
        assert tables.class_accuracies(result | {"per_class_n": [6, 40, 0]}) == {1: 60.0}
        few = record(results={"main": {"pgd": result}})
        assert "| pgd | L∞ 0.3 | 46 | 50.00 | – |" in tables.tier_table(few, "main")

    def test_what_is_no_robustness_is_never_the_hardest_attack(self):
        found = {"clean": 1.0, "T0 oblivious pgd (not white-box)": 2.0, "pgd40 (invalid)": 3.0}
        assert tables.hardest_attack(found) is None
        assert tables.hardest_attack(found | {"fgsm": 50.0, "cw20": 40.0}) == "cw20"
        broken = {"pgd": float("nan"), "apgd": float("-inf"), "fgsm": 50.0}
        assert tables.hardest_attack(broken) == "fgsm"

    def test_provenance_of_records_that_say_nothing(self):
        told = tables.provenance([{"name": "a"}, {"name": "b"}])
        assert told == "2 records; –; versions –; git –; –; seeds –."


class TestPaired:
    found = (
        *(record(seed, accuracy=80.0 + seed) for seed in (0, 1)),
        *(record(seed, "b", threat={"norm": "linf", "eps": 0.1}) for seed in (0, 1)),
    )

    def test_threats_and_n(self):
        table = paired.table(self.found, "a", "b")
        assert "| clean | 500 | 80.50 ± 0.71 (2) | 80.00 ± 0.00 (2) |" in table
        assert "a under L∞ 0.3, b under L∞ 0.1" in table

    def test_other_images_make_no_pairs(self):
        found = copy.deepcopy(self.found)
        for one in found[2:]:
            one["config"]["dataset"]["name"] = "digits"
        with pytest.raises(ValueError, match="no pairs: the data set is mnist and digits"):
            paired.table(found, "a", "b")
        found = copy.deepcopy(self.found)
        for one in found[2:]:
            one["results"]["main"]["pgd"]["n"] = 100
        with pytest.raises(ValueError, match="no pairs: the number of images is 500 and 100"):
            paired.table(found, "a", "b", ["pgd"])
        found = copy.deepcopy(self.found)
        for one, counts in zip(found, [[400, 100]] * 2 + [[100, 400]] * 2, strict=True):
            one["results"]["main"]["pgd"]["per_class_n"] = counts
        with pytest.raises(ValueError, match="no pairs: their images differ"):
            paired.table(found, "a", "b", ["pgd"])


class TestCommitted:
    @pytest.mark.parametrize("name", FOLDERS)
    def test_each_folder_prints(self, name):
        folder = RECORDS / name
        found = records.load_all([folder])
        for protected in (False, True):
            header, _, *rows = script.render([folder], protected=protected).splitlines()[:-2]
            assert " | threat | n" in header
            assert all(re.search(r" \| L∞ [^|]+ \| \d+ \| ", row) for row in rows)
        for column in tables.attack_columns(found):
            assert "| threat | n |" in script.render([folder], per_class=column)

    def test_what_attacks_outside_the_config_s_threat_say(self):
        """Those of Shen et al. are in normalised space; CLAF's literal ones are in no ball."""
        for folder in ("cost_sensitive", "cost_sensitive_fashion", "cost_sensitive_cifar10"):
            for one in records.load_all([RECORDS / folder]):
                assert one["threat"]["eps"] == one["eps"]
                assert "normalised" in tables.format_threat(one)
        for one in records.load_all([RECORDS / "claf_literal"]):
            assert tables.format_threat(one).startswith("L∞ 8/255 (literal: ")

    def test_an_audit_s_page_says_threat_and_n(self):
        (one,) = records.load_all([RECORDS / "purifiers" / "ipg-mnist.json"])
        page = report.audit_page(one)
        assert "of 200 images under L∞ 0.3." in page
