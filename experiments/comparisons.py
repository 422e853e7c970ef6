"""Two rows of records compared: over seeds by a paired t-test, over the images in one seed.

The second is McNemar's exact test of the images that one row answers rightly and the other does
not; both are two-sided. It says which of two trained networks is better, and nothing of other
seeds.
"""

import dataclasses
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats

from jaxdefense.evaluation import records, tables
from jaxdefense.evaluation.records import Record

Seeds = Mapping[int, Mapping[str, Any]]  # {seed: record}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One attack's accuracies of two rows, percent.

    Attributes:
      column: the attack.
      count: of images, as a table shows it.
      first: accuracies by seed.
      second: likewise, of the same seeds.
      apart: (images that only the first answers rightly, only the second), of each seed whose
        records have bits.
    """

    column: str
    count: str
    first: list[float]
    second: list[float]
    apart: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    @property
    def difference(self) -> float:
        """The mean of first - second, points."""
        return statistics.fmean(self._differences)

    @property
    def error(self) -> float:
        """The standard error of the difference; 0 for equal differences, NaN for a single pair."""
        if len(self.first) < 2:
            return math.nan
        return statistics.stdev(self._differences) / math.sqrt(len(self.first))

    @property
    def _differences(self) -> list[float]:
        return [x - y for x, y in zip(self.first, self.second, strict=True)]

    def test(self) -> tuple[float, float] | None:
        """(t, p); None where the test is not defined: a single pair, or equal differences."""
        if not self.error > 0:
            return None
        found = stats.ttest_rel(self.first, self.second)
        return float(found.statistic), float(found.pvalue)

    def test_of_images(self) -> float | None:
        """McNemar's exact p of a single pair; None for several, without bits or without images."""
        if len(self.first) > 1 or not self.apart or not sum(self.apart[0]):
            return None
        return float(stats.binomtest(self.apart[0][0], sum(self.apart[0])).pvalue)


def count_apart(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[int, int] | None:
    """Images that only the first answers rightly, and only the second; None without bits.

    Args:
      first: a result of a record, with "bits" and "n".
      second: likewise, of the same images in the same order.
    """
    if "bits" not in first or "bits" not in second:
        return None
    a, b = (records.unpack_bits(result["bits"], result["n"]) for result in (first, second))
    return int((a & ~b).sum()), int((b & ~a).sum())


def find_row(found: Sequence[Record], label: str) -> tuple[str, Seeds]:
    """A row of records.

    Args:
      found: records.
      label: NAME or NAME[PREDICTOR].

    Returns:
      (predictor, {seed: record}).

    Raises:
      ValueError: no such row; the known ones are named.
    """
    name, predictor = re.fullmatch(r"([^\[\]]*)(?:\[(.*)\])?", label).groups()
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


def compare(
    found: Sequence[Record], first: str, second: str, columns: Sequence[str] | None = None
) -> list[Comparison]:
    """The comparisons of two rows over the seeds that both have, one for each attack.

    Args:
      found: records.
      first: NAME or NAME[PREDICTOR].
      second: likewise.
      columns: attacks; None for all that every compared record has.

    Raises:
      ValueError: an unknown row or column, no seed in common, or rows that were measured on
        different images.
    """
    rows = [find_row(found, label) for label in (first, second)]
    seeds = sorted(set(rows[0][1]) & set(rows[1][1]))
    if not seeds:
        raise ValueError(f"{first} and {second} have no seed in common")
    one, two = ({s: same[s]["results"][predictor] for s in seeds} for predictor, same in rows)
    shared = [c for c in one[seeds[0]] if all(c in row[s] for row in (one, two) for s in seeds)]
    for column in columns or ():
        if column not in shared:
            raise ValueError(f"no column {column!r}; both have {', '.join(shared)}")
    names = [same[seeds[0]].get("config", {}).get("dataset", {}).get("name") for _, same in rows]
    comparisons = []
    for column in columns or shared:
        counts = [tables.format_count(row[s][column] for s in seeds) for row in (one, two)]
        for what, values in (("data set", names), ("number of images", counts)):
            if values[0] != values[1]:
                raise ValueError(
                    f"{first} and {second} make no pairs: the {what} is {values[0]} and {values[1]}"
                )
        for s in seeds:
            classes = [row[s][column].get("per_class_n") for row in (one, two)]
            if None not in classes and classes[0] != classes[1]:
                raise ValueError(f"{first} and {second} make no pairs: their images differ")
        a, b = ([row[s][column]["accuracy"] for s in seeds] for row in (one, two))
        apart = [found for s in seeds if (found := count_apart(one[s][column], two[s][column]))]
        comparisons.append(Comparison(column, counts[0], a, b, apart))
    return comparisons
