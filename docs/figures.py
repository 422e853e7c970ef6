"""Draws the figures of README and docs into docs/images, as SVG.

    python docs/figures.py

quickstart.svg is drawn from committed records, the others show how the library is built. Each has
a background of its own, so that it is readable on a dark page, and tells things apart by shape as
well as by colour.
"""

import pathlib
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from jaxdefense import files
from jaxdefense.evaluation import records, tables

ROOT = pathlib.Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
RECORDS = ROOT / "experiments" / "records"

# Okabe and Ito's colours, told apart by colour-blind readers.
BLUE, ORANGE, GREEN, INK, PALE = "#0072B2", "#D55E00", "#009E73", "#222222", "#EEF3F8"

# The rows of quickstart.svg: the seven systems, then two baselines to compare with.
SYSTEMS = ("m2at", "claf", "csa", "cse", "gssl", "ipg", "add")
BASELINES = ("pgd_at", "standard")


class Drawing:
    """An SVG picture that is drawn part by part.

    Args:
      width: in pixels.
      height: in pixels.
      title: what a reader who cannot see it is told.
    """

    def __init__(self, width: int, height: int, title: str):
        self.size = (width, height)
        self.title = title
        self.parts: list[str] = []

    def add(self, tag: str, content: str = "", **attributes: object) -> None:
        """An element; underscores in the names of attributes stand for hyphens."""
        named = "".join(f' {k.replace("_", "-")}="{v}"' for k, v in attributes.items())
        self.parts.append(f"<{tag}{named}>{content}</{tag}>" if content else f"<{tag}{named}/>")

    def text(self, x: float, y: float, text: str, size: int = 14, **attributes: object) -> None:
        """A line of text with its baseline at y."""
        chosen = {"fill": INK, "font_size": size, **attributes}
        self.add("text", escape(text), x=x, y=y, **chosen)

    def box(self, x: float, y: float, width: float, lines: Sequence[str], fill: str = PALE) -> None:
        """A box with a bold first line and further ones below it."""
        self.add(
            "rect", x=x, y=y, width=width, height=box_height(lines), rx=6, fill=fill, stroke=BLUE
        )
        for i, line in enumerate(lines):
            bold = {"font_weight": "bold"} if i == 0 else {}
            self.text(x + width / 2, y + 22 + 18 * i, line, 13, text_anchor="middle", **bold)

    def arrow(
        self, start: tuple[float, float], end: tuple[float, float], colour: str = INK
    ) -> None:
        """A straight arrow."""
        (x0, y0), (x1, y1) = start, end
        self.add(
            "line", x1=x0, y1=y0, x2=x1, y2=y1, stroke=INK, stroke_width=1.5,
            marker_end="url(#head)",
        )  # fmt: skip

    def svg(self) -> str:
        """The file's text."""
        width, height = self.size
        head = (
            '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"'
            f' orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker>'
        )
        parts = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" role="img" font-family="system-ui, sans-serif">\n'
            f"<title>{escape(self.title)}</title>\n<defs>{head}</defs>\n"
            f'<rect width="{width}" height="{height}" rx="8" fill="#FFFFFF"/>\n{parts}\n</svg>\n'
        )


def box_height(lines: Sequence[str]) -> float:
    """The height of `Drawing.box` with these lines."""
    return 16 + 18 * len(lines)


def chain(
    drawing: Drawing, x: float, y: float, width: float, boxes: Sequence[Sequence[str]]
) -> list[tuple[float, float]]:
    """Boxes one below the other, joined by arrows.

    Returns:
      (top, bottom) of each box.
    """
    places: list[tuple[float, float]] = []
    for lines in boxes:
        if places:
            middle = x + width / 2
            drawing.arrow((middle, places[-1][1]), (middle, places[-1][1] + 22))
            y = places[-1][1] + 24
        drawing.box(x, y, width, lines)
        places.append((y, y + box_height(lines)))
    return places


def measured() -> list[dict[str, Any]]:
    """The rows of quickstart.svg: name, clean accuracy, the lowest under attack, the audit's."""
    found = {
        record["config"]["defense"]["name"]: record
        for record in records.load_all([RECORDS / "quickstart"])
        if record["name"] in [f"{name}-digits" for name in SYSTEMS + BASELINES]
    }
    audits = {
        record["config"]["defense"]["name"]: record
        for record in records.load_all([RECORDS / "purifiers_digits"])
    }
    rows = []
    for name in SYSTEMS + BASELINES:
        if name not in found:
            continue
        deployed = next(iter(found[name]["results"].values()))
        attacked = {k: v["accuracy"] for k, v in deployed.items() if k != "clean"}
        row: dict[str, Any] = {"name": name, "clean": deployed["clean"]["accuracy"]}
        row["attacked"] = min(attacked.values())
        if name in SYSTEMS and name in audits:
            row["audit"] = next(iter(audits[name]["results"].values()))["worst"]["accuracy"]
        rows.append(row)
    return rows


def quickstart() -> str:
    """Clean accuracy, and what attacks leave of it, of the networks of `make quickstart`."""
    rows = measured()
    found = records.load_all([RECORDS / "quickstart"])
    results = [result for r in found for of in r["results"].values() for result in of.values()]
    threats = ", ".join(dict.fromkeys(map(tables.format_threat, found)))
    conditions = f"{threats}, n {tables.format_count(results)}"
    left, right, top, step = 120, 720, 92, 40
    height = top + step * len(rows) + 52
    drawing = Drawing(
        760, height, "Clean accuracy and accuracy under attack of seven defences on digits"
    )

    def place(value: float) -> float:
        return left + (right - left) * value / 100

    drawing.text(24, 34, "Seven defences and two baselines on digits", 17, font_weight="bold")
    drawing.text(24, 54, f"accuracy in %, {conditions}, seed 0; more attacks leave less", 12)
    keys = (
        (24, "clean", lambda x: circle(drawing, x, 72, BLUE)),
        (110, "hardest attack of the quickstart", lambda x: square(drawing, x, 72, ORANGE)),
        (350, "whole audit, where there is one", lambda x: diamond(drawing, x, 72, GREEN)),
    )
    for x, label, mark in keys:
        mark(x + 6)
        drawing.text(x + 18, 76, label, 12)
    bottom = top + step * len(rows)
    for value in range(0, 101, 20):
        x = place(value)
        drawing.add("line", x1=x, y1=top, x2=x, y2=bottom, stroke="#D8D8D8")
        drawing.text(x, bottom + 18, str(value), 12, text_anchor="middle")
    drawing.text((left + right) / 2, bottom + 38, "accuracy, %", 12, text_anchor="middle")
    for i, row in enumerate(rows):
        y = top + step * (i + 0.5)
        drawing.text(left - 12, y + 5, row["name"], text_anchor="end")
        low = min(row["attacked"], row.get("audit", 100.0))
        line = {"stroke": "#9AA5B1", "stroke_width": 2}
        drawing.add("line", x1=place(low), y1=y, x2=place(row["clean"]), y2=y, **line)
        circle(drawing, place(row["clean"]), y, BLUE)
        square(drawing, place(row["attacked"]), y, ORANGE)
        if "audit" in row:
            diamond(drawing, place(row["audit"]), y, GREEN)
        for value in (row["clean"], low):
            drawing.text(place(value), y - 11, f"{value:.1f}", 11, text_anchor="middle")
    return drawing.svg()


def circle(drawing: Drawing, x: float, y: float, colour: str) -> None:
    """A round mark."""
    drawing.add("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=6, fill=colour)


def square(drawing: Drawing, x: float, y: float, colour: str) -> None:
    """A square mark."""
    drawing.add("rect", x=f"{x - 5.5:.1f}", y=f"{y - 5.5:.1f}", width=11, height=11, fill=colour)


def diamond(drawing: Drawing, x: float, y: float, colour: str) -> None:
    """A square mark on its corner."""
    corners = f"{x:.1f},{y - 8:.1f} {x + 8:.1f},{y:.1f} {x:.1f},{y + 8:.1f} {x - 8:.1f},{y:.1f}"
    drawing.add("polygon", points=corners, fill=colour)


def floors() -> str:
    """Which package may import which: only what lies below it."""
    levels = (
        ("experiments", "scripts, configs, records, papers, benchmark"),
        ("train", "the loop, the step, optimisers"),
        ("evaluation", "cascade, audit, flags, records, tables"),
        ("runs", "a config becomes a Run; checkpoints"),
        ("defenses", "one file each"),
        ("attacks · data", "neither imports the other"),
        ("types · threat · losses · mixing · models", "files, registry, extras"),
    )
    drawing = Drawing(640, 40 + 54 * len(levels), "The floors of jaxdefense: imports point down")
    for i, (name, text) in enumerate(levels):
        drawing.box(40, 20 + 54 * i, 500, (name, text))
    drawing.arrow((590, 30), (590, 20 + 54 * len(levels) - 16))
    drawing.text(
        606, 30 + 27 * len(levels), "imports", 13, text_anchor="middle",
        transform=f"rotate(90 606 {30 + 27 * len(levels)})",
    )  # fmt: skip
    return drawing.svg()


def defense() -> str:
    """What a Defense holds, and how the train step runs it."""
    drawing = Drawing(760, 430, "A Defense holds init, phases of updates, and predictors")
    drawing.box(30, 24, 200, ("Defense.init", "key, images ->", "params, carry"))
    drawing.box(280, 24, 200, ("Defense.phases", "run in order;", "a Phase may come again"))
    drawing.box(530, 24, 200, ("Defense.predictors", "params, carry -> predict", "first: deployed"))
    drawing.arrow((380, 94), (380, 126))
    drawing.box(
        230, 128, 300,
        ("Phase", "updates · length · optimisers · view", "applied to every batch, in order"),
    )  # fmt: skip
    drawing.arrow((380, 198), (380, 230))
    drawing.add("rect", x=30, y=232, width=700, height=176, rx=6, fill="none", stroke=BLUE)
    drawing.text(46, 254, "Update, once per batch", 13, font_weight="bold")
    steps = (
        ("craft", "inner maximum:", "batch + adversarial"),
        ("loss", "scalar, carry,", "metrics"),
        ("gradient", "of the roles that", "the update trains"),
        ("mean", "lax.pmean over", "the devices"),
        ("optimiser", "one state for", "each role"),
    )
    for i, lines in enumerate(steps):
        x = 46 + 137 * i
        drawing.box(x, 268, 121, lines)
        if i:
            drawing.arrow((x - 16, 303), (x - 1, 303))
    drawing.text(46, 366, "params: {role: parameters}, which the roles' optimisers move", 13)
    drawing.text(
        46, 388, "carry: {role: BatchNorm statistics, averages, ...}, which the loss returns", 13
    )
    return drawing.svg()


def run() -> str:
    """From a config to a table."""
    boxes = (
        ("config", "plain values: NAME:VARIANT and --config.key=value"),
        ("runs.build -> Run", "data, model, threat, defence and attacks; everything is checked"),
        ("train", "phases become segments; one compiled step, mapped over the devices"),
        ("workdir", "config.json · metrics.jsonl · checkpoints last and best"),
        ("runs.restore", "the run again, with the weights of a checkpoint"),
        ("evaluation.protocols", "configured attacks, AutoAttack or the audit"),
        ("record (JSON)", "config, seed, versions, device, one bit per image and attack"),
        ("tables.py", "tables, figures and pages; they only read records"),
    )
    drawing = Drawing(760, 632, "The life of a run, from its config to a table")
    places = chain(drawing, 60, 24, 520, boxes)
    begin, end = places[3], places[2]
    y = (begin[0] + begin[1]) / 2
    drawing.add(
        "path", d=f"M580 {y} H660 V{(end[0] + end[1]) / 2} H582", fill="none", stroke=INK,
        stroke_width=1.5, marker_end="url(#head)",
    )  # fmt: skip
    drawing.text(660, y + 22, "killed? the same", 12, text_anchor="middle")
    drawing.text(660, y + 38, "command goes on", 12, text_anchor="middle")
    return drawing.svg()


def verdict() -> str:
    """From a model to a verdict."""
    boxes = (
        ("model, images, labels, threat", "predict: images -> logits"),
        ("refused", "random, dependent on the batch, probabilities, wrong range: ValueError"),
        ("examine", "gradients, ties, loops: what makes a number doubtful becomes a flag"),
        ("cascade", "APGD-CE -> APGD-T -> FAB-T -> Square, each on the images still right"),
        ("check again", "in the ball, in the box, finite, and wrong by a plain forward pass"),
        ("bits", "one per image and attack; a killed verdict goes on from its journal"),
        ("Verdict", "robust accuracy, flags, adversarial images"),
    )
    drawing = Drawing(640, 556, "The life of a verdict, from a model to robust accuracy and flags")
    chain(drawing, 40, 24, 560, boxes)
    return drawing.svg()


FIGURES: dict[str, Callable[[], str]] = {
    "quickstart": quickstart,
    "floors": floors,
    "defense": defense,
    "run": run,
    "verdict": verdict,
}

if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        files.write_text(IMAGES / f"{name}.svg", draw())
        print(IMAGES / f"{name}.svg")
