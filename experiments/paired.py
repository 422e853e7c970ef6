"""Compares two rows seed by seed: mean difference, its standard error, a paired t-test.

    python experiments/paired.py gssl-mnist_small gssl_baseline-mnist_small \
        experiments/records/gssl

The rows are names of records, or NAME[PREDICTOR]; then come records, or folders searched for
*.json. Only seeds that both rows have are compared, on the same number of images of one data set;
the rows' threats stand below the table, and may differ. A small p says that the difference is not
the seeds' doing, under a normal law of the differences; it says nothing of other settings, and
choosing among many comparisons makes it too small.
"""

import math
import pathlib
import re
import statistics

import cli
from absl import flags
from scipy import stats

from jaxdefense.evaluation import records, tables

COLUMNS = flags.DEFINE_list("columns", None, "Attacks to compare; default all that both have.")

ROOT = pathlib.Path(__file__).parents[1]


def _row(found, label):
    """(predictor, {seed: record}) of the row NAME or NAME[PREDICTOR]."""
    if not (match := re.fullmatch(r"([^\[\]]*)(?:\[(.*)\])?", label)):
        raise ValueError(f"a row is NAME or NAME[PREDICTOR], got {label!r}")
    name, predictor = match.groups()
    rows = {
        key: same
        for key, same in tables.group_by_row(found).items()
        if key[0] == name and key[1] == (predictor or next(iter(same[0]["results"])))
    }
    if not rows:
        known = sorted({f"{name}[{predictor}]" for name, predictor in tables.group_by_row(found)})
        raise ValueError(f"no row {label!r}; known: {', '.join(known)}")
    ((key, same),) = rows.items()
    return key[1], {record["seed"]: record for record in same}


def _check_images(first, second, records, n):
    """Refuses rows of different images, whose seeds make no pairs."""
    names = [record.get("config", {}).get("dataset", {}).get("name") for record in records]
    for what, values in (("data set", names), ("number of images", n)):
        if values[0] != values[1]:
            raise ValueError(
                f"{first} and {second} make no pairs: the {what} is {values[0]} and {values[1]}"
            )


def table(found, first, second, columns=None):
    """The Markdown table of two rows of records, a line per attack.

    Args:
      found: records.
      first: NAME or NAME[PREDICTOR].
      second: likewise; the difference is first - second.
      columns: attacks; None for all that every compared record has.

    Raises:
      ValueError: an unknown row or column, fewer than two seeds in common, or rows that were
        measured on different images.
    """
    rows = [_row(found, label) for label in (first, second)]
    seeds = sorted(set(rows[0][1]) & set(rows[1][1]))
    if len(seeds) < 2:
        raise ValueError(
            f"a paired comparison needs two seeds that both rows have, got {sorted(rows[0][1])} "
            f"and {sorted(rows[1][1])}"
        )
    examples = [same[seeds[0]] for _, same in rows]
    one, two = ({s: same[s]["results"][predictor] for s in seeds} for predictor, same in rows)
    shared = [c for c in one[seeds[0]] if all(c in row[s] for row in (one, two) for s in seeds)]
    for column in columns or ():
        if column not in shared:
            raise ValueError(f"no column {column!r}; both have {', '.join(shared)}")
    lines = []
    for column in columns or shared:
        a, b = ([row[s][column]["accuracy"] for s in seeds] for row in (one, two))
        n = [tables.format_count(row[s][column] for s in seeds) for row in (one, two)]
        _check_images(first, second, examples, n)
        differences = [x - y for x, y in zip(a, b, strict=True)]
        error = statistics.stdev(differences) / math.sqrt(len(seeds))
        if error > 0:
            t, p = stats.ttest_rel(a, b)
            test = [f"{t:.2f}", f"{p:.3f}"]
        else:
            test = ["–", "–"]  # equal differences: the test is not defined
        mean = statistics.fmean(differences)
        cells = [
            tables.format_mean(a),
            tables.format_mean(b),
            f"{mean:+.3f}",
            f"{error:.3f}",
            *test,
        ]
        lines.append([column, n[0], *cells])
    header = ["accuracy, %", "n", first, second, "difference", "standard error", "t", "p"]
    threats = [tables.format_threat(record) for record in examples]
    return (
        f"{tables.markdown(header, lines)}\n\n{len(seeds)} pairs, seeds "
        f"{', '.join(map(str, seeds))}; {first} under {threats[0]}, {second} under {threats[1]}; "
        f"two-sided paired t-test"
    )


def main(argv):
    if len(argv) < 3:
        raise ValueError("need two rows, e.g. gssl-mnist_small gssl_baseline-mnist_small")
    found = records.load_all(argv[3:] or [ROOT / "experiments" / "records"])
    print(table(found, argv[1], argv[2], COLUMNS.value))


if __name__ == "__main__":
    cli.run(main)
