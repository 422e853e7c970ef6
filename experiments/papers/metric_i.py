"""Metric I: the mean over classes i of class i's accuracy by the model that protects i.

Reference: Shen et al., Adversarial learning with cost-sensitive classes, arXiv 2101.12372.
"""

import re
import statistics
from collections.abc import Sequence

from jaxdefense.evaluation import tables
from jaxdefense.evaluation.records import Record

_PREFIX = "protect"  # the predictor protect<i> is that of class i


def means(record: Record) -> dict[str, float]:
    """{column: metric I, percent}.

    Args:
      record: its predictors protect0, protect1, ... each protect a class; without such ones, its
        first predictor stands for every class.
    """
    results = record["results"]
    first = next(iter(results.values()))
    found = {}
    for column, result in first.items():
        values = []
        for i in range(len(result["per_class"])):
            own = results.get(f"{_PREFIX}{i}") if f"{_PREFIX}0" in results else first
            if own is not None and own[column]["per_class"][i] is not None:
                values.append(own[column]["per_class"][i])
        found[column] = statistics.fmean(values)
    return found


def count(record: Record) -> str:
    """The number of images behind metric I: all classes' together.

    Args:
      record: as in `means`.
    """
    results = record["results"]
    members = [found for name, found in results.items() if re.fullmatch(rf"{_PREFIX}\d+", name)]
    firsts = [next(iter(found.values())) for found in members]
    counted = all("n" in result for result in firsts)
    classes = [sum(v is not None for v in result["per_class"]) for result in firsts]
    if firsts and counted and max(classes) == 1:  # each member was judged on its own class alone
        return str(sum(result["n"] for result in firsts))
    return tables.format_count(next(iter(results.values())).values())


def table(records: Sequence[Record]) -> str:
    """A row per record name: threat, images, then metric I per attack, percent, mean ± std (seeds).

    Args:
      records: see `tables.group_by_row`.
    """
    names = tables.attack_columns(records)
    rows: dict[str, list[str]] = {}
    for (name, _), same in tables.group_by_row(records).items():
        if name in rows:  # a stack has one row per predictor there
            continue
        measured = [means(record) for record in same]
        cells = (
            tables.format_mean([one[column] for one in measured if column in one])
            for column in names
        )
        rows[name] = [name, tables.format_threat(same[0]), count(same[0]), *cells]
    return tables.markdown(["metric I, %", "threat", "n", *names], rows.values())
