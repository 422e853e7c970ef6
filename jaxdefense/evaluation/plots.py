"""Figures from records and logs; needs matplotlib (the extra `plots`). Each returns a Figure."""

import json
import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxdefense.evaluation.records import Record
from jaxdefense.evaluation.tables import columns, group


def _axes(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel("%")
    axes.grid(axis="y", alpha=0.3)
    return figure, axes


def accuracy_bars(records: Sequence[Record]) -> Figure:
    """Accuracy of each row's deployed predictor: a group of bars per row, a bar per attack."""
    rows: dict[str, tuple[str, list[Record]]] = {}
    for (name, predictor), same in group(records).items():
        rows.setdefault(name, (predictor, same))
    names = columns(records)
    figure, axes = _axes(1.5 + 1.1 * len(rows), 3.2, "accuracy, clean and under attack")
    width = 0.8 / len(names)
    for i, column in enumerate(names):
        heights, errors = [], []
        for predictor, same in rows.values():
            found = [r["results"][predictor].get(column) for r in same]
            values = [f["accuracy"] for f in found if f]
            heights.append(statistics.fmean(values) if values else 0.0)
            errors.append(statistics.stdev(values) if len(values) > 1 else 0.0)
        places = [j + width * (i - (len(names) - 1) / 2) for j in range(len(rows))]
        axes.bar(places, heights, width, label=column, yerr=errors if any(errors) else None)
    axes.set_xticks(range(len(rows)), list(rows), rotation=20, ha="right")
    axes.set_ylim(0, 100)
    axes.legend(fontsize=8, ncols=len(names), frameon=False)
    return figure


def class_bars(records: Sequence[Record], column: str) -> Figure:
    """Accuracy per class under one attack, a line per row's deployed predictor."""
    figure, axes = _axes(6.5, 3.2, f"accuracy per class, {column}")
    seen = set()
    for (name, predictor), same in group(records).items():
        lists = [r["results"][predictor].get(column, {}).get("per_class") for r in same]
        lists = [values for values in lists if values]
        if name in seen or not lists:
            continue
        seen.add(name)
        means = [
            statistics.fmean([v for v in values if v is not None] or [0.0])
            for values in zip(*lists, strict=True)
        ]
        axes.plot(range(len(means)), means, "o-", label=name, markersize=4)
        axes.set_xticks(range(len(means)))
    axes.set_xlabel("class")
    axes.set_ylim(0, 102)
    axes.legend(fontsize=8, frameon=False)
    return figure


def training_curves(workdirs: Mapping[str, str | os.PathLike]) -> Figure:
    """Validation accuracy over epochs from each run's metrics.jsonl: clean dashed, robust solid."""
    figure, axes = _axes(6.5, 3.2, "validation accuracy (clean dashed, robust solid)")
    for i, (name, workdir) in enumerate(workdirs.items()):
        lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if "validation_clean" in row]
        epochs = [row["epoch"] for row in rows]
        axes.plot(epochs, [row["validation_clean"] for row in rows], f"C{i}--", alpha=0.6)
        axes.plot(epochs, [row["validation_robust"] for row in rows], f"C{i}-", label=name)
    axes.set_xlabel("epoch")
    axes.set_ylim(0, 102)
    axes.legend(fontsize=8, frameon=False)
    return figure
