"""The charts of a page as Vega-Lite specifications, each with a description in words.

Colours are Okabe and Ito's, which the colour-blind tell apart; what matters differs in shape or
dash too. A number that is missing is no mark at all.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxdefense import extras
from jaxdefense.evaluation.report.rows import AUDITED, STRONG, WEAK, Row, pareto_front
from jaxdefense.evaluation.tables import MIN_PER_CLASS

with extras.required("plots", __name__):
    import altair as alt

BLUE, ORANGE, GREEN, PINK, SKY, RED = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
)
GREY = "#888888"
PALETTE = [BLUE, ORANGE, GREEN, PINK, SKY, RED]
_DASHES = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3]]
_SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]
_PERCENT = alt.Scale(domain=[0, 100])


class Chart(NamedTuple):
    """A figure of a page.

    Attributes:
      spec: of Vega-Lite; the page's script sets its width.
      caption: what it shows, and what it does not.
      shape: "tall" or "wide" where it takes two places of the page's grid.
    """

    spec: dict[str, Any]
    caption: str
    shape: str = ""


_DATA = alt.NamedData("rows")  # what a specification is filled with


def _filled(
    spec: Mapping[str, Any], values: Sequence[Mapping[str, Any]], caption: str, words: str
) -> Chart:
    """The chart of a specification and its data, with a text alternative.

    Specifications are made once, since Altair checks each for a fifth of a second.
    """
    filled = {**spec, "data": {"values": list(values)}, "description": words}
    filled.pop("config", None)  # the page's script gives the theme
    return Chart(filled, caption)


def _series(
    kinds: Sequence[str], title: str | None = None, colors: Sequence[str] = PALETTE
) -> dict[str, Any]:
    """Colour, dash and shape of the field "kind", in this order."""
    legend = alt.Legend(title=title, orient="top", columns=2, labelLimit=260)

    def cycle(values: Sequence[Any]) -> list[Any]:
        return [values[i % len(values)] for i in range(len(kinds))]

    def scale(values: Sequence[Any]) -> alt.Scale:
        return alt.Scale(domain=list(kinds), range=cycle(values))

    # The dash changes where the colours begin anew.
    dashes = [_DASHES[(i + i // len(PALETTE)) % len(_DASHES)] for i in range(len(kinds))]
    return {
        "color": alt.Color("kind:N", scale=scale(colors), legend=legend),
        "strokeDash": alt.StrokeDash("kind:N", scale=scale(dashes), legend=legend),
        "shape": alt.Shape("kind:N", scale=scale(_SHAPES), legend=legend),
    }


@functools.cache
def _trade_off() -> dict[str, Any]:
    x = alt.X("clean:Q", title="clean accuracy, %", scale=alt.Scale(zero=False, padding=18))
    scale = alt.Scale(domainMin=0, nice=True)
    y = alt.Y("robust:Q", title="accuracy under the hardest attack, %", scale=scale)
    look = _series((STRONG, AUDITED, WEAK), "judged by", [BLUE, GREEN, ORANGE])
    tooltip = [f"{key}:N" for key in ("system", "clean", "robust", "attack", "images")]
    base = alt.Chart().encode(x, y)
    dots = base.mark_point(size=70, filled=True, opacity=0.85).encode(
        color=look["color"], shape=look["shape"], tooltip=tooltip
    )
    on_front = base.transform_filter("datum.front")
    line = on_front.mark_line(
        interpolate="step-before", strokeWidth=1.2, opacity=0.6, color=GREY
    ).encode(order="clean:Q")
    names = base.transform_filter("datum.named").mark_text(dy=-10, fontSize=11)
    names = names.encode(text="system:N")
    layers = alt.layer(line, dots, names, data=_DATA)
    return layers.properties(width="container", height=320).to_dict()


def trade_off(rows: Sequence[Row]) -> Chart | None:
    """Clean against robust accuracy, with the Pareto front; None without two rows to compare.

    Args:
      rows: of one data set and threat.
    """
    shown = [row for row in rows if row.main and row.hardest and "clean" in row.numbers]
    if len(shown) < 2:
        return None
    points = [(row.numbers["clean"].mean, row.numbers[str(row.hardest)].mean) for row in shown]
    sound = [i for i, row in enumerate(shown) if row.is_sound]
    front = [sound[k] for k in pareto_front([points[i] for i in sound])]
    named = _apart(points, front)
    values = [
        {
            "system": row.label,
            "clean": round(clean, 2),
            "robust": round(robust, 2),
            "attack": row.hardest,
            "images": row.numbers[str(row.hardest)].images,
            "kind": row.strength,
            "front": i in front,
            "named": i in named,
        }
        for i, (row, (clean, robust)) in enumerate(zip(shown, points, strict=True))
    ]
    best = ", ".join(shown[i].label for i in front) or "none"
    caption = (
        "Each point is a system; the line is the Pareto front, without doubtful numbers and with "
        "the names that fit; point at one for its numbers. A system judged by weaker attacks alone "
        "stands higher than it would under AutoAttack."
    )
    words = f"Scatter plot of {len(values)} systems. On the Pareto front: {best}."
    return _filled(_trade_off(), values, caption, words)


def _apart(points: Sequence[tuple[float, float]], places: Sequence[int]) -> list[int]:
    """Those of the places whose points stand far enough apart for a name at each."""
    reach = [max(max(axis) - min(axis), 1e-9) for axis in zip(*points, strict=True)]
    kept: list[int] = []
    for i in sorted(places, key=lambda i: -points[i][1]):
        near = [
            abs(points[i][0] - points[k][0]) < 0.25 * reach[0]
            and abs(points[i][1] - points[k][1]) < 0.07 * reach[1]
            for k in kept
        ]
        if not any(near):
            kept.append(i)
    return kept


@functools.cache
def _classes() -> dict[str, Any]:
    legend = alt.Legend(title="%", orient="top", gradientLength=160)
    chart = (
        alt.Chart(_DATA)
        .mark_rect()
        .encode(
            alt.X("class:O", title="class", axis=alt.Axis(labelAngle=0)),
            alt.Y("system:N", title=None, sort=None, axis=alt.Axis(labelLimit=170)),
            alt.Color(
                "accuracy:Q", scale=alt.Scale(scheme="cividis", domain=[0, 100]), legend=legend
            ),
            tooltip=["system:N", "class:O", "accuracy:Q", "attack:N"],
        )
    )
    return chart.properties(width="container").to_dict()


def classes(rows: Sequence[Row]) -> Chart | None:
    """Systems x classes, accuracy under each system's hardest attack; None without any.

    Args:
      rows: of one data set.
    """
    values: list[dict[str, Any]] = [
        {"system": row.label, "class": k, "accuracy": round(v, 1), "attack": row.hardest}
        for row in rows
        if row.main
        for k, v in row.classes.items()
    ]
    if not values:
        return None
    lowest = min(values, key=lambda value: value["accuracy"])
    caption = (
        "Accuracy of each class under the system's hardest attack, the brighter the higher. Only "
        f"classes with {MIN_PER_CLASS} images or more are shown."
    )
    systems = len({value["system"] for value in values})
    words = (
        f"Heat map of {systems} systems by class. The lowest is {lowest['accuracy']} % for class "
        f"{lowest['class']} of {lowest['system']}."
    )
    spec = {**_classes(), "height": 17 * systems}
    return _filled(spec, values, caption, words)._replace(shape="tall")


@functools.cache
def _over_eps(kinds: tuple[str, ...]) -> dict[str, Any]:
    look = _series(kinds)
    base = alt.Chart().encode(
        alt.X("eps:Q", title="eps"),
        alt.Y("accuracy:Q", title="accuracy, %", scale=_PERCENT),
        color=look["color"],
        tooltip=["kind:N", "eps:Q", "accuracy:Q"],
    )
    lines = base.mark_line().encode(strokeDash=look["strokeDash"])
    points = base.mark_point(filled=True, size=45).encode(shape=look["shape"])
    rule = alt.Chart().mark_rule(strokeDash=[3, 3], color=GREY).encode(x="own:Q")
    layers = alt.layer(lines, points, rule, data=_DATA)
    return layers.properties(width="container", height=240).to_dict()


def over_eps(curves: Mapping[str, Sequence[Sequence[float]]], eps: float | None) -> Chart | None:
    """Accuracy over eps, a line for each name; None without points.

    Args:
      curves: {name: [(eps, accuracy in percent)]}.
      eps: the threat's own, a dashed rule; None: unknown.
    """
    values: list[dict[str, Any]] = [
        {"kind": name, "eps": radius, "accuracy": value}
        for name, curve in curves.items()
        for radius, value in curve
    ]
    if not values:
        return None
    if eps is not None:
        values[0]["own"] = eps  # one row has it, so that one rule is drawn
    ends = [f"{name}: {c[0][1]:.1f} % to {c[-1][1]:.1f} %" for name, c in curves.items() if c]
    caption = "Accuracy under PGD through the whole defence; the dashed rule is the threat's eps."
    words = f"Lines of accuracy over eps. {'; '.join(ends)}."
    return _filled(_over_eps(tuple(curves)), values, caption, words)


@functools.cache
def _training() -> dict[str, Any]:
    look = _series(("clean", "robust"))
    base = alt.Chart().encode(
        alt.X("epoch:Q", title=None, axis=alt.Axis(tickCount=4)),
        alt.Y("accuracy:Q", title=None, scale=_PERCENT, axis=alt.Axis(tickCount=3)),
        color=look["color"],
        tooltip=["system:N", "kind:N", "epoch:Q", "accuracy:Q"],
    )
    lines = base.mark_line().encode(strokeDash=look["strokeDash"])
    points = base.mark_point(size=14, filled=True).encode(shape=look["shape"])
    return _panels(alt.layer(lines, points), "system", height=90)


def training(rows: Sequence[Row]) -> Chart | None:
    """Validation accuracy over epochs, a panel for each row; None where no record has the curve.

    Args:
      rows: any; of several seeds the first is drawn.
    """
    values, told = [], []
    for row in rows:
        for seed, curve in list(row.validation.items())[:1] if row.main else ():
            name = f"{row.label}, seed {seed}"
            told.append(f"{name} ends at {curve[-1][1]:.1f} % clean, {curve[-1][2]:.1f} % robust")
            for epoch, *accuracies in curve:
                for kind, value in zip(("clean", "robust"), accuracies, strict=True):
                    values.append({"system": name, "kind": kind, "epoch": epoch, "accuracy": value})
    if not values:
        return None
    caption = (
        "Validation accuracy in percent over epochs, clean and under the config's validation "
        "attack. The x axes differ."
    )
    words = f"Training curves of {len(told)} runs. {'; '.join(told)}."
    chart = _filled(_training(), values, caption, words)
    return chart._replace(shape="wide") if len(told) > 1 else chart


def _panels(layers: Any, field: str, height: int) -> dict[str, Any]:
    """Small multiples; the page's script fits columns and widths to the page."""
    header = alt.Header(title=None, labelLimit=190, labelFontSize=11, labelPadding=3)
    facet = alt.Facet(f"{field}:N", sort=None, header=header)
    panels = layers.properties(width=150, height=height).facet(facet, columns=4, data=_DATA)
    return panels.properties(spacing=14).resolve_scale(x="independent").to_dict()


@functools.cache
def _row_classes(kinds: tuple[str, ...]) -> dict[str, Any]:
    look = _series(kinds)
    base = alt.Chart().encode(
        alt.X("class:O", title="class", axis=alt.Axis(labelAngle=0)),
        alt.Y("accuracy:Q", title="accuracy, %", scale=_PERCENT),
        color=look["color"],
        tooltip=["kind:N", "class:O", "accuracy:Q"],
    )
    lines = base.mark_line(opacity=0.8).encode(strokeDash=look["strokeDash"])
    points = base.mark_point(filled=True, size=60).encode(shape=look["shape"])
    return alt.layer(lines, points, data=_DATA).properties(width="container", height=200).to_dict()


def row_classes(row: Row) -> Chart | None:
    """A row's accuracy per class, clean and under its hardest attack; None without any.

    Args:
      row: any.
    """
    columns = [str(column) for column in ("clean", row.hardest) if column in row.results]
    values = [
        {"kind": column, "class": k, "accuracy": round(v, 2)}
        for column in columns
        for k, v in row.class_means(column).items()
    ]
    if not values:
        return None
    words = "; ".join(f"class {v['class']} {v['kind']} {v['accuracy']} %" for v in values)
    caption = "Accuracy per class, mean over seeds."
    return _filled(_row_classes(tuple(columns)), values, caption, f"{caption} {words}.")


@functools.cache
def _histograms(kinds: tuple[str, ...]) -> dict[str, Any]:
    look = _series(kinds)
    base = alt.Chart().encode(
        alt.X("weight:Q", title="weight", axis=alt.Axis(tickCount=4)),
        alt.Y("share:Q", title="share", scale=alt.Scale(type="log"), axis=alt.Axis(tickCount=3)),
        color=look["color"],
        tooltip=["kind:N", "weight:Q", "share:Q"],
    )
    lines = base.mark_line(interpolate="step").encode(strokeDash=look["strokeDash"])
    points = base.mark_point(size=12, filled=True).encode(shape=look["shape"])
    return _panels(alt.layer(lines, points), "layer", height=140)


def histograms(row: Row) -> Chart | None:
    """How a row's weights are spread, a panel for each layer; None where no record says so.

    Args:
      row: any; of several seeds the first is drawn.
    """
    values = []
    for when, layer, told in row.histograms:
        total = sum(told["counts"]) or 1
        edges = zip(told["edges"], told["edges"][1:], strict=False)
        for (low, high), count in zip(edges, told["counts"], strict=True):
            if count:  # an empty bin has no share to show on a logarithmic axis
                place = {"weight": round((low + high) / 2, 5), "share": round(count / total, 6)}
                values.append({"kind": when, "layer": layer, **place})
    if not values:
        return None
    kinds = tuple(dict.fromkeys(value["kind"] for value in values))
    layers = dict.fromkeys(value["layer"] for value in values)
    caption = "Shares of each layer's weights, on a logarithmic axis; empty bins are left out."
    words = f"Histograms of the weights of {', '.join(layers)}, {' and '.join(kinds)} training."
    return _filled(_histograms(kinds), values, caption, words)
