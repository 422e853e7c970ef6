"""Markdown tables of the accelerator check's records: will it fit, how long will it take."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdefense.evaluation.records import Record
from jaxdefense.evaluation.tables import markdown

GIGA = 1e9
HEADER = (
    "what",
    "dtype",
    "GB a device",
    "fits",
    "GFLOP",
    "products",
    "GB moved",
    "bound by",
    "ms, at least",
    "times",
    "minutes, at least",
)


def roofline(flops: float, moved: float, device: Mapping[str, float]) -> tuple[float, str]:
    """(seconds, "arithmetic" or "memory"): the least time that the device's two limits allow.

    Args:
      flops: of one device.
      moved: bytes that it reads and writes.
      device: {"flops", "bandwidth"} a second.
    """
    times = {"arithmetic": flops / device["flops"], "memory": moved / device["bandwidth"]}
    limit = max(times, key=times.__getitem__)
    return times[limit], limit


def render(record: Record) -> str:
    """A line for each program of each row; a row that failed says why.

    Args:
      record: of `__main__`, or of folding.py.
    """
    if record["name"] == "folding":
        return _folding(record["rows"])
    lines = []
    for row in record["rows"]:
        lines += _failed(row) if "failed" in row else _programs(row, record["limits"])
    return markdown(HEADER, lines)


def _folding(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each network: CPU seconds of PGD-10, medians, and the median of the ratios."""
    lines = []
    for row in rows:
        times = [f"{statistics.median(row[side]):.2f}" for side in ("plain", "folded")]
        name = f"ResNet-18, width {row['width']}, {row['batch']} images"
        lines.append([name, str(len(row["plain"])), *times, f"{row['ratio']:.2f}"])
    return markdown(["PGD-10", "pairs", "plain, CPU s", "folded, CPU s", "folded / plain"], lines)


def _failed(row: Mapping[str, Any]) -> list[list[str]]:
    reason = row["failed"].replace("|", "/")
    return [[row["row"], row["dtype"], reason, *["–"] * (len(HEADER) - 3)]]


def _programs(row: Mapping[str, Any], limits: Mapping[str, float]) -> list[list[str]]:
    lines: list[list[str]] = []
    minutes = 0.0
    for program in row["programs"]:
        seconds, limit = roofline(program["flops"], program["moved"], limits)
        minutes += seconds * program["times"] / 60
        lines.append(
            [
                f"{row['row']}, {program['name']}" if row["kind"] == "train" else row["row"],
                row["dtype"],
                f"{program['memory'] / GIGA:.2f}",
                "yes" if program["memory"] <= limits["memory"] else "NO",
                f"{program['flops'] / GIGA:.0f}",
                f"{program['products'] / program['flops']:.1%}",
                f"{program['moved'] / GIGA:.1f}",
                limit,
                f"{1e3 * seconds:.2f}",
                f"{program['times']:,}",
                f"{seconds * program['times'] / 60:.2f}",
            ]
        )
    if len(lines) > 1:
        whole = [f"{row['row']}, whole run", row["dtype"], *["–"] * (len(HEADER) - 3)]
        lines.append([*whole, f"{minutes:.2f}"])
    return lines


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """ "12 rows compile, 1 does not: NAME dtype"."""
    failed = [f"{row['row']} {row['dtype']}" for row in rows if "failed" in row]
    told = f"{len(rows) - len(failed)} rows compile"
    return f"{told}, {len(failed)} do not: {', '.join(failed)}" if failed else told
