"""Figures from records and logs; needs matplotlib (the extra `plots`). Each returns a Figure."""

import json
import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxdefense import extras
from jaxdefense.evaluation.records import Record, unpack_images
from jaxdefense.evaluation.tables import (
    attack_columns,
    format_conditions,
    group_by_row,
    record_threat,
)

with extras.required("plots", __name__):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _axes(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel("%")
    axes.grid(axis="y", alpha=0.3)
    return figure, axes


def accuracy_bars(records: Sequence[Record]) -> Figure:
    """Accuracy of each row's deployed predictor: a group of bars per row, a bar per attack.

    Args:
      records: several of one row are several seeds: mean and standard deviation.
    """
    rows: dict[str, tuple[str, list[Record]]] = {}
    for (name, predictor), same in group_by_row(records).items():
        rows.setdefault(name, (predictor, same))
    names = attack_columns(records)
    title = f"accuracy, clean and under attack\n{format_conditions(records)}"
    figure, axes = _axes(1.5 + 1.1 * len(rows), 3.2, title)
    width = 0.8 / len(names)
    for i, column in enumerate(names):
        heights, errors = [], []
        for predictor, same in rows.values():
            results = [r["results"][predictor].get(column) for r in same]
            values = [f["accuracy"] for f in results if f]
            heights.append(statistics.fmean(values) if values else 0.0)
            errors.append(statistics.stdev(values) if len(values) > 1 else 0.0)
        places = [j + width * (i - (len(names) - 1) / 2) for j in range(len(rows))]
        axes.bar(places, heights, width, label=column, yerr=errors if any(errors) else None)
    axes.set_xticks(range(len(rows)), list(rows), rotation=20, ha="right")
    axes.set_ylim(0, 100)
    axes.legend(fontsize=8, ncols=len(names), frameon=False)
    return figure


def class_bars(records: Sequence[Record], *names: str) -> Figure:
    """Accuracy per class, a line for each of the named attacks and row's deployed predictor.

    Args:
      records: several of one row are several seeds, of which the mean is drawn.
      *names: of attacks, "clean" among them.
    """
    title = f"accuracy per class, {', '.join(names)}\n{format_conditions(records)}"
    figure, axes = _axes(6.5, 3.2, title)
    seen = set()
    for (name, predictor), same in group_by_row(records).items():
        if name in seen:
            continue
        for column in names:
            lists = [r["results"][predictor].get(column, {}).get("per_class") for r in same]
            lists = [values for values in lists if values]
            if not lists:
                continue
            seen.add(name)
            means = [
                statistics.fmean([v for v in values if v is not None] or [0.0])
                for values in zip(*lists, strict=True)
            ]
            label = name if len(names) == 1 else f"{name}, {column}"
            axes.plot(range(len(means)), means, "o-", label=label, markersize=4)
            axes.set_xticks(range(len(means)))
    axes.set_xlabel("class")
    axes.set_ylim(0, 102)
    axes.legend(fontsize=8, frameon=False)
    return figure


def audit_curve(records: Sequence[Record]) -> Figure:
    """PGD's accuracy over eps of each audited predictor; dashed, the threat's own eps.

    Args:
      records: of the protocol 'audit'.
    """
    title = f"accuracy over eps, PGD through the whole defence\n{format_conditions(records)}"
    figure, axes = _axes(6.5, 3.2, title)
    eps = set()
    for record in records:
        for predictor, report in record["audit"].items():
            if report["curve"]:
                radii, values = zip(*report["curve"], strict=True)
                axes.plot(radii, values, "o-", label=f"{record['name']}, {predictor}", markersize=4)
                eps.add(record_threat(record)["eps"])
    for radius in eps:
        axes.axvline(radius, color="0.5", linestyle="--", linewidth=1)
    axes.set_xlabel("eps")
    axes.set_ylim(0, 102)
    axes.legend(fontsize=8, frameon=False)
    return figure


def gallery(examples: Mapping[str, Any]) -> Figure:
    """An audit's examples in columns: clean, adversarial, their difference, and purified.

    Above a column are its label and what the defence says of the adversarial image. In the
    difference, grey is none, black and white the largest of all.

    Args:
      examples: of an audit's record.
    """
    clean, moved = (unpack_images(examples[key]) for key in ("clean", "adversarial"))
    change = moved - clean
    largest = max(float(np.abs(change).max()), 1e-6)
    rows = {"clean": clean, "adversarial": moved, "difference": change / (2 * largest) + 0.5}
    if "cleaned" in examples:
        rows["cleaned"] = unpack_images(examples["cleaned"])
    count = len(clean)
    figure = Figure(figsize=(1.1 * count + 0.6, 1.15 * len(rows) + 0.3), layout="constrained")
    grid = figure.subplots(len(rows), count, squeeze=False)
    for axes, (name, images) in zip(grid, rows.items(), strict=True):
        for ax, image in zip(axes, images, strict=True):
            ax.imshow(image if image.shape[-1] == 3 else image[..., 0], cmap="gray", vmin=0, vmax=1)
            ax.set_xticks([])
            ax.set_yticks([])
        axes[0].set_ylabel(name, fontsize=8)
    for ax, label, said in zip(grid[0], examples["labels"], examples["said"], strict=True):
        ax.set_title(f"{label}, then {said}", fontsize=8)
    return figure


def training_curves(workdirs: Mapping[str, str | os.PathLike]) -> Figure:
    """Validation accuracy over epochs from each run's metrics.jsonl: clean dashed, robust solid.

    Args:
      workdirs: {name in the legend: a run's workdir}.
    """
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
