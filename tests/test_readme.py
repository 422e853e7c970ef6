"""The README's examples run, and its tables are what the committed records say."""

import pathlib
import re

import pytest
import tables

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["x_adv"].shape == (32, 8, 8, 1)
    assert float(namespace["robust_loss"](namespace["weights"], namespace["jax"].random.key(0))) > 0


def test_tables_are_renewed():
    """`python experiments/tables.py --into=README.md` changes nothing."""
    marked = re.findall(r"<!-- (?:table|protected|benchmark) (\S+) -->", README)
    assert marked
    for path in marked:
        if not (ROOT / path).exists():
            pytest.fail(f"README.md shows {path}, which is not committed")
    assert tables.renew(README) == README


def test_every_committed_record_says_where_it_comes_from():
    from jaxdefense.evaluation import records

    for record in records.load_all([ROOT / "experiments" / "records"]):
        assert record["versions"]["jax"]
        assert record["device"]["kind"]
        assert record["date"]
        for results in record["results"].values():
            for name, result in results.items():
                bits = records.unpack_bits(result["bits"], result["n"])
                assert 100 * bits.mean() == pytest.approx(result["accuracy"]), name
