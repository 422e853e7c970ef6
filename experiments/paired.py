"""Compares two rows seed by seed: mean difference, its standard error, a paired t-test.

    python experiments/paired.py gssl-mnist_small gssl_baseline-mnist_small \
        experiments/records/gssl

The rows are names of records, or NAME[PREDICTOR]; then come records, or folders searched for
*.json. Only seeds that both rows have are compared. A small p says that the difference is not
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
    """{seed: {column: accuracy}} of the row NAME or NAME[PREDICTOR]."""
    name, predictor = re.fullmatch(r"([^\[\]]*)(?:\[(.*)\])?", label).groups()
    rows = {
        key: same
        for key, same in tables.group(found).items()
        if key[0] == name and key[1] == (predictor or next(iter(same[0]["results"])))
    }
    if not rows:
        known = sorted({f"{name}[{predictor}]" for name, predictor in tables.group(found)})
        raise ValueError(f"no row {label!r}; known: {', '.join(known)}")
    ((key, same),) = rows.items()
    return {
        record["seed"]: {c: r["accuracy"] for c, r in record["results"][key[1]].items()}
        for record in same
    }


def table(found, first, second, columns=None):
    """The Markdown table of two rows of records, a line per attack.

    Args:
      found: records.
      first, second: NAME or NAME[PREDICTOR]; the difference is first - second.
      columns: attacks; None for all that every compared record has.

    Raises:
      ValueError: an unknown row or column, or fewer than two seeds in common.
    """
    one, two = _row(found, first), _row(found, second)
    seeds = sorted(set(one) & set(two))
    if len(seeds) < 2:
        raise ValueError(
            f"a paired comparison needs two seeds that both rows have, got {sorted(one)} and "
            f"{sorted(two)}"
        )
    shared = [c for c in one[seeds[0]] if all(c in row[s] for row in (one, two) for s in seeds)]
    for column in columns or ():
        if column not in shared:
            raise ValueError(f"no column {column!r}; both have {', '.join(shared)}")
    lines = []
    for column in columns or shared:
        a, b = ([row[s][column] for s in seeds] for row in (one, two))
        differences = [x - y for x, y in zip(a, b, strict=True)]
        error = statistics.stdev(differences) / math.sqrt(len(seeds))
        if error > 0:
            t, p = stats.ttest_rel(a, b)
            test = [f"{t:.2f}", f"{p:.3f}"]
        else:
            test = ["–", "–"]  # equal differences: the test is not defined
        mean = statistics.fmean(differences)
        lines.append(
            [column, tables.number(a), tables.number(b), f"{mean:+.3f}", f"{error:.3f}", *test]
        )
    header = ["accuracy, %", first, second, "difference", "standard error", "t", "p"]
    return (
        f"{tables.markdown(header, lines)}\n\n{len(seeds)} pairs, seeds "
        f"{', '.join(map(str, seeds))}; two-sided paired t-test"
    )


def main(argv):
    if len(argv) < 3:
        raise ValueError("need two rows, e.g. gssl-mnist_small gssl_baseline-mnist_small")
    found = records.load_all(argv[3:] or [ROOT / "experiments" / "records"])
    print(table(found, argv[1], argv[2], COLUMNS.value))


if __name__ == "__main__":
    cli.run(main)
