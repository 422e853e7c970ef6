"""Markdown tables from records: mean ± std (n) over seeds, reported beside measured."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxdefense.evaluation.records import Record

Cell = list[float]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns but the first are right-aligned."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(values: Cell) -> str:
    """ "97.31", or "97.31 ± 0.12 (3)": mean, sample standard deviation, number of seeds."""
    if not values:
        return "–"
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.2f}"
    return f"{mean:.2f} ± {statistics.stdev(values):.2f} ({len(values)})"


def group(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """{(record name, predictor): records over seeds}, in order of appearance.

    Raises:
      ValueError: two records of the same name, predictor and seed.
    """
    rows: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        for predictor in record["results"]:
            same = rows.setdefault((record["name"], predictor), [])
            if record["seed"] in [other["seed"] for other in same]:
                raise ValueError(f"two records of {record['name']} with seed {record['seed']}")
            same.append(record)
    return rows


def columns(records: Iterable[Record]) -> list[str]:
    """The attacks that any record holds, in order of appearance."""
    seen: dict[str, None] = {}
    for record in records:
        for attacks in record["results"].values():
            seen |= dict.fromkeys(attacks)
    return list(seen)


def _measured(records: Iterable[Record], predictor: str, column: str) -> Cell:
    found = [record["results"][predictor].get(column) for record in records]
    return [result["accuracy"] for result in found if result is not None]


def _reported(record: Record, column: str) -> str:
    """A paper's number with its status, e.g. "92.81 (FOUND)"; nothing unless the record has one."""
    entry: Mapping[str, Any] | None = record.get("reported", {}).get(column)
    return f"{entry['value']:.2f} ({entry['status']})" if entry else ""


def accuracy_table(records: Sequence[Record]) -> str:
    """A row per record name and predictor, a column per attack, percent.

    A cell is the measured mean ± std (seeds), behind it the reported number where one is known.
    """
    names = columns(records)
    rows = []
    for (name, predictor), same in group(records).items():
        label = name if predictor == next(iter(same[0]["results"])) else f"{name} [{predictor}]"
        cells = []
        for column in names:
            reported = _reported(same[0], column)
            cell = number(_measured(same, predictor, column))
            cells.append(f"{cell}; reported {reported}" if reported else cell)
        rows.append([label, *cells])
    return markdown(["accuracy, %", *names], rows)


def class_table(records: Sequence[Record], column: str) -> str:
    """A row per record name and predictor, a column per class, percent under one attack."""
    rows, classes = [], 0
    for (name, predictor), same in group(records).items():
        lists = [
            r["results"][predictor][column]["per_class"]
            for r in same
            if column in r["results"][predictor]
        ]
        if not lists:
            continue
        classes = max(classes, len(lists[0]))
        cells = [[v for v in values if v is not None] for values in zip(*lists, strict=True)]
        rows.append([f"{name} [{predictor}]", *map(number, cells)])
    return markdown([f"{column}, %", *map(str, range(classes))], rows)


def protected(record: Record, *, prefix: str = "protect") -> dict[str, float]:
    """Metric I: {column: mean over classes i of class i's accuracy by the model that protects i}.

    Args:
      record: its predictors `<prefix>i` protect class i; without such ones, its first predictor
        stands for every class.
      prefix: of those predictors' names.

    Reference: Shen et al., Adversarial learning with cost-sensitive classes, arXiv 2101.12372.
    """
    results = record["results"]
    first = next(iter(results.values()))
    means = {}
    for column, result in first.items():
        values = []
        for i in range(len(result["per_class"])):
            own = results.get(f"{prefix}{i}") if f"{prefix}0" in results else first
            if own is not None and own[column]["per_class"][i] is not None:
                values.append(own[column]["per_class"][i])
        means[column] = statistics.fmean(values)
    return means


def protected_table(records: Sequence[Record]) -> str:
    """A row per record name, a column per attack: metric I, percent, mean ± std (seeds)."""
    names = columns(records)
    seeds: dict[str, list[dict[str, float]]] = {}
    for (name, _), same in group(records).items():
        if name not in seeds:  # a stack has one row per predictor there
            seeds[name] = [protected(record) for record in same]
    rows = [
        [name, *(number([one[c] for one in means if c in one]) for c in names)]
        for name, means in seeds.items()
    ]
    return markdown(["metric I, %", *names], rows)


def tier_table(record: Record, predictor: str) -> str:
    """A row per tier of an audit: accuracy, and the class that suffers most, percent."""
    rows = []
    for name, found in record["results"][predictor].items():
        classes = {k: v for k, v in enumerate(found["per_class"]) if v is not None}
        worst = min(classes, key=classes.__getitem__)
        label = "worst case per example, T0 left out" if name == "worst" else name
        rows.append([label, f"{found['accuracy']:.2f}", f"{classes[worst]:.2f} (class {worst})"])
    return markdown([f"{predictor}, accuracy, %", "all", "worst class"], rows)


def check_table(record: Record, predictor: str) -> str:
    """A row per check of an audit: its answer and what that rests on."""
    checks = record["audit"][predictor]["checks"]
    rows = [[c["name"], "pass" if c["passed"] else "FAIL", c["evidence"]] for c in checks]
    return markdown(["check", "answer", "evidence"], rows)


def benchmark_table(record: Record) -> str:
    """A row per comparison of experiments/benchmark.py: medians in ms, and peer over ours."""
    rows = []
    for row in record["rows"]:
        if "survivors" in row:
            continue  # has a table of its own
        numbers = [f"{row[k]:.1f}" if k in row else "–" for k in ("ours_ms", "peer_ms")]
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else "–"
        rows.append([row["what"], row["peer"], *numbers, ratio])
    return markdown(["what", "peer", "ours, ms", "peer, ms", "peer / ours"], rows)


def verdict_table(record: Record) -> str:
    """A row per AutoAttack comparison: ours / the peer's, and on how many images they disagree.

    Survivors after each stage; millions of passes, forward and backward, ours being the most that
    can have been spent; seconds, the first with compilation. "" where there are none.
    """
    rows, stages = [], []
    for row in record["rows"]:
        if "survivors" not in row:
            continue
        stages = list(row["survivors"])
        counts = [row["clean"], *row["survivors"].values()]
        passes = [sum(map(sum, column)) for column in zip(*row["passes"].values(), strict=True)]
        rows.append(
            [
                f"{row['what']}; {row['peer']}",
                *(f"{ours} / {peer}" for ours, peer in counts),
                str(len(row["differ"])),
                " / ".join(f"{n / 1e6:.2f}" for n in passes),
                f"{row['first_ms'] / 1e3:.0f}, {row['ours_ms'] / 1e3:.0f} / "
                f"{row['peer_ms'] / 1e3:.0f}",
                f"{row['matrix_rate_share']:.0%}",
            ]
        )
    header = ["ours / peer", "clean", *stages, "differ", "passes, M", "seconds", "of matrix rate"]
    return markdown(header, rows) if rows else ""


def provenance(records: Sequence[Record]) -> str:
    """Where the numbers come from: devices, versions, revisions, dates, seeds."""

    def distinct(read):
        return ", ".join(dict.fromkeys(read(record) for record in records))

    device = distinct(
        lambda r: f"{r['device']['count']} x {r['device']['kind']} ({r['device']['host']})"
    )
    versions = distinct(lambda r: f"jax {r['versions']['jax']} on Python {r['versions']['python']}")
    dates = sorted(r["date"][:10] for r in records)
    seeds = ", ".join(map(str, sorted({r["seed"] for r in records})))
    return (
        f"{len(records)} records; {device}; {versions}; git {distinct(lambda r: r['git'])}; "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}; seeds {seeds}."
    )
