"""Compares two rows seed by seed: mean difference, its standard error, a paired t-test.

    python experiments/paired.py gssl-mnist_small gssl_baseline-mnist_small \
        experiments/records/study/mnist/configured

The rows are names of records, or NAME[PREDICTOR]; then come records, or folders searched for
*.json. Only seeds that both rows have are compared, on the same number of images of one data set;
the rows' threats stand below the table, and may differ. A small p says that the difference is not
the seeds' doing, under a normal law of the differences; it says nothing of other settings, and
choosing among many comparisons makes it too small.
"""

import pathlib

import cli
import comparisons
from absl import flags

from jaxdefense.evaluation import records, tables

COLUMNS = flags.DEFINE_list("columns", None, "Attacks to compare; default all that both have.")

ROOT = pathlib.Path(__file__).parents[1]


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
    rows = [comparisons.find_row(found, label)[1] for label in (first, second)]
    seeds = sorted(set(rows[0]) & set(rows[1]))
    if len(seeds) < 2:
        raise ValueError(
            f"a paired comparison needs two seeds that both rows have, got {sorted(rows[0])} "
            f"and {sorted(rows[1])}"
        )
    lines = []
    for pair in comparisons.compare(found, first, second, columns):
        found_test = pair.test()  # not defined for equal differences
        test = [f"{found_test[0]:.2f}", f"{found_test[1]:.3f}"] if found_test else ["–", "–"]
        cells = [
            tables.format_mean(pair.first),
            tables.format_mean(pair.second),
            f"{pair.difference:+.3f}",
            f"{pair.error:.3f}",
            *test,
        ]
        lines.append([pair.column, pair.count, *cells])
    header = ["accuracy, %", "n", first, second, "difference", "standard error", "t", "p"]
    threats = [tables.format_threat(row[seeds[0]]) for row in rows]
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
