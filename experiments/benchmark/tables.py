"""Markdown tables of a benchmark's record: times and verdicts of two sides."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxdefense.evaluation.records import Record
from jaxdefense.evaluation.tables import markdown


def render(record: Record) -> str:
    """Those tables of a record that have rows."""
    made = (time_table(record), verdict_table(record))
    return "\n\n".join(table for table in made if table.count("\n") > 1)


def time_table(record: Record) -> str:
    """A row per timed comparison: medians in ms, and peer over ours."""
    rows = []
    for row in record["rows"]:
        if "survivors" in row or "suite" in row:
            continue  # has a table of its own
        numbers = [f"{row[k]:.1f}" if k in row else "–" for k in ("ours_ms", "peer_ms")]
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else "–"
        rows.append([row["what"], row["peer"], *numbers, ratio])
    return markdown(["what", "peer", "ours, ms", "peer, ms", "peer / ours"], rows)


def verdict_table(record: Record) -> str:
    """The tables of a benchmark's suites that compare verdicts, those that have rows; or ""."""
    suites: dict[str | None, list[Mapping[str, Any]]] = {}
    for row in record["rows"]:
        if "suite" in row or "survivors" in row:
            suites.setdefault(row.get("suite"), []).append(row)
    made = {None: _peer_table, "fast": _fast_table, "half": _half_table, "targeted": _target_table}
    return "\n\n".join(made[suite](rows) for suite, rows in suites.items())


def _slashed(values: Iterable[Any], form: str = "") -> str:
    """ "12 / 13": a cell of several values, "–" for None."""
    return " / ".join("–" if value is None else format(value, form) for value in values)


def _peer_table(found: Sequence[Mapping[str, Any]]) -> str:
    """A row per AutoAttack comparison: ours / the peer's, and on how many images they disagree.

    Survivors after each stage; millions of passes, forward and backward, ours being the most that
    can have been spent; seconds, the first with compilation.
    """
    rows = []
    for row in found:
        counts = [row["clean"], *row["survivors"].values()]
        passes = [sum(map(sum, column)) for column in zip(*row["passes"].values(), strict=True)]
        rows.append(
            [
                f"{row['what']}; {row['peer']}",
                *map(_slashed, counts),
                str(len(row["differ"])),
                _slashed([n / 1e6 for n in passes], ".2f"),
                f"{row['first_ms'] / 1e3:.0f}, {row['ours_ms'] / 1e3:.0f} / "
                f"{row['peer_ms'] / 1e3:.0f}",
                f"{row['matrix_rate_share']:.0%}",
            ]
        )
    stages = list(found[-1]["survivors"])
    header = ["ours / peer", "clean", *stages, "differ", "passes, M", "seconds", "of matrix rate"]
    return markdown(header, rows)


def _only(row: Mapping[str, Any]) -> str:
    """On how many images two verdicts differ, and which of them leaves (or hits) how many."""
    told = [f"{name} alone {len(rows)}" for name, rows in row["only"].items() if rows]
    count = sum(map(len, row["only"].values()))
    return f"{count} ({', '.join(told)})" if told else "0"


def _fast_table(found: Sequence[Mapping[str, Any]]) -> str:
    """A row per run: survivors of AutoAttack's versions standard and fast, and what they cost.

    Survivors after each stage; images that survive in one verdict alone; millions of passes,
    forward and backward, the most that can have been spent; fast's share of standard's most passes
    on an image that nothing fools; seconds without compilation.
    """
    rows = []
    for row in found:
        both = [row["verdicts"][version] for version in ("standard", "fast")]
        left = [list(one["survivors"].items()) for one in both]
        passes = [sum(map(sum, one["passes"].values())) / 1e6 for one in both]
        shares = [few / many for many, few in zip(*(v["most_passes"] for v in both), strict=True)]
        rows.append(
            [
                row["what"],
                str(left[0][0][1]),
                *(", ".join(f"{name} {count}" for name, count in one[1:]) for one in left),
                _only(row),
                _slashed(passes, ".2f"),
                _slashed(shares, ".1%"),
                _slashed([one["seconds"] for one in both], ".0f"),
            ]
        )
    header = ["standard / fast", "clean", "standard leaves", "fast leaves", "differ", "passes, M"]
    return markdown([*header, "share forward / backward", "seconds"], rows)


def accuracies(record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """{run: {version of AutoAttack: % of the images that it leaves}} of a record's suite `fast`."""
    rows = [row for row in record.get("rows", ()) if row["suite"] == "fast"]
    return {
        row["what"]: {
            version: 100 * list(one["survivors"].values())[-1] / row["examples"]
            for version, one in row["verdicts"].items()
        }
        for row in rows
    }


def _half_table(found: Sequence[Mapping[str, Any]]) -> str:
    """A row per run: survivors in float32 / bfloat16, wins that a plain pass did not confirm."""
    rows = []
    for row in found:
        both = [row["verdicts"][dtype] for dtype in ("float32", "bfloat16")]
        counts = zip(*(one["survivors"].values() for one in both), strict=True)
        told = [
            next((f["evidence"] for f in one["flags"] if f["name"] == "unconfirmed wins"), None)
            for one in both
        ]
        seconds = _slashed([one["seconds"] for one in both], ".0f")
        rows.append([row["what"], *map(_slashed, counts), _only(row), _slashed(told), seconds])
    stages = list(found[-1]["verdicts"]["float32"]["survivors"])
    header = ["float32 / bfloat16", *stages, "differ", "unconfirmed wins", "seconds"]
    return markdown(header, rows)


def _target_table(found: Sequence[Mapping[str, Any]]) -> str:
    """A row per targeted attack: targets hit by ours / the peer's, for CW the mean L2 distance.

    Distances are means over the images of which both hit the target.
    """
    rows = []
    for row in found:
        distances = _slashed(row["distances"], ".3f") if "distances" in row else "–"
        if "distances" in row:
            distances += f" (n {row['hit_by_both']})"
        only = _only(row) if "only" in row else "–"
        hits, seconds = _slashed(row["hits"]), _slashed(row["seconds"], ".1f")
        rows.append([row["what"], row["peer"] or "–", hits, only, distances, seconds])
    return markdown(["ours / peer", "peer", "targets hit", "differ", "mean L2", "seconds"], rows)
