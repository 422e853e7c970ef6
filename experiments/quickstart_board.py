"""What quickstart shows of its systems: a live table in a terminal, elsewhere a line an event."""

import contextlib
import dataclasses
import json
import math
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.live
import rich.table


@dataclasses.dataclass
class Row:
    """A system and how far it is.

    Attributes:
      name: of its config.
      config: plain values.
      workdir: of its run.
      state: "waiting", "training", "evaluating", "done" or "failed".
      began: time.monotonic() at its start.
      seconds: that it took.
      results: accuracies in percent of the deployed predictor, by attack.
      reason: why it failed.
      unkept: why its record is not in --records; empty where it is, or need not be.
    """

    name: str
    config: Mapping[str, Any]
    workdir: pathlib.Path
    state: str = "waiting"
    began: float = 0.0
    seconds: float = 0.0
    results: Mapping[str, float] = dataclasses.field(default_factory=dict)
    reason: str = ""
    unkept: str = ""

    @property
    def running(self) -> bool:
        """Whether a process is at it."""
        return self.state in ("training", "evaluating")

    @property
    def record_path(self) -> pathlib.Path:
        """Where its record is, once it is done."""
        return self.workdir / "configured.json"

    def finish(self, record: Mapping[str, Any], seconds: float) -> None:
        """Takes the accuracies of its record.

        Args:
          record: of the protocol "configured".
          seconds: that it took.
        """
        self.state, self.seconds = "done", seconds
        primary = next(iter(record["results"].values()))
        self.results = {attack: found["accuracy"] for attack, found in primary.items()}

    def trained(self) -> float:
        """The share of its training that is done, by the last whole line of its log."""
        length = self.config["train"]["length"]
        unit = {"e": "epoch", "s": "step"}[length[-1]]
        try:
            lines = (self.workdir / "metrics.jsonl").read_text(errors="replace").splitlines()
        except OSError:
            return 0.0
        for line in reversed(lines):
            # The last one may be half written, and after a crash one before it too.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                return json.loads(line)[unit] / float(length[:-1])
        return 0.0

    def describe(self) -> str:
        """Its state in words."""
        if self.state == "training":
            return f"training {100 * self.trained():.0f} %"
        return f"failed: {self.reason}" if self.state == "failed" else self.state


def describe_seconds(seconds: float) -> str:
    """Minutes and seconds, e.g. 2:05; a dash where they are not known.

    Args:
      seconds: or NaN.
    """
    if math.isnan(seconds):
        return "–"
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def header(rows: Sequence[Row], left: float, elapsed: float) -> str:
    """How many are done, the time and what is next.

    Args:
      rows: of all systems, in the order in which they begin.
      left: seconds until the last is done, or NaN.
      elapsed: seconds since the first began.
    """
    over = sum(row.state in ("done", "failed") for row in rows)
    waiting = [row.name for row in rows if row.state == "waiting"]
    text = f"{over} of {len(rows)} done, {describe_seconds(elapsed)} min"
    if over < len(rows):
        text += f", about {describe_seconds(left)} min left"
    return text + (f"; next: {', '.join(waiting[:3])}" if waiting else "")


class Lines:
    """A line for each event: for pipes and logs.

    Args:
      only_rows: no line where a system begins.
    """

    def __init__(self, *, only_rows: bool = False):
        self._only_rows = only_rows
        self._told: dict[str, str] = {}

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def update(self, rows: Sequence[Row], left: float, elapsed: float) -> None:
        """Prints a line for each row whose state is new.

        Args:
          rows: see `header`.
          left: see `header`.
          elapsed: see `header`.
        """
        for row in rows:
            if row.state == self._told.get(row.name, "waiting"):
                continue
            self._told[row.name] = row.state
            if row.state == "done":
                found = ", ".join(f"{name} {value:.2f}" for name, value in row.results.items())
                line = f"{row.name}: {found} %; {row.seconds:.0f} s ({header(rows, left, elapsed)})"
            elif row.state == "failed":
                line = f"{row.name}: {row.describe()}"
            elif self._only_rows:
                continue
            else:
                line = f"{row.name}: {row.state}"
            print(line, flush=True)


_COLOURS = {"done": "green", "failed": "red", "training": "yellow", "evaluating": "yellow"}


class Table:
    """A live table in a terminal.

    Args:
      console: of rich; default standard output.
      attack: whose accuracy is shown beside the clean one.
    """

    def __init__(self, console: rich.console.Console | None = None, attack: str = "pgd20"):
        self._attack = attack
        self._live = rich.live.Live(console=console, auto_refresh=False)

    def __enter__(self) -> "Table":
        self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._live.__exit__(*error)

    def update(self, rows: Sequence[Row], left: float, elapsed: float) -> None:
        """Draws the table anew.

        Args:
          rows: see `header`.
          left: see `header`.
          elapsed: see `header`.
        """
        self._live.update(
            draw(rows, header(rows, left, elapsed), *self._live.console.size, self._attack),
            refresh=True,
        )


def draw(
    rows: Sequence[Row], title: str, width: int, height: int, attack: str = "pgd20"
) -> rich.table.Table:
    """The table: what runs, what failed, what is done, the latest first; then what waits.

    Args:
      rows: of all systems.
      title: above the table.
      width: of the terminal, in characters; numbers that do not fit are left out.
      height: of the terminal, in lines; rows that do not fit are left out, waiting ones first.
      attack: whose accuracy is shown beside the clean one.
    """
    table = rich.table.Table(title=title, title_justify="left")
    longest = max((len(row.name) for row in rows), default=0)
    table.add_column("system", no_wrap=True, min_width=longest)
    table.add_column("state")
    # A cell has a space on each side and a border; the state needs room for "training 100 %".
    left = width - 1 - (longest + 3) - (14 + 3)
    robust = f"{attack}, %"
    numbers = ["clean, %", robust, "seconds"]
    while numbers and sum(len(name) + 3 for name in numbers) > left:
        numbers.remove(robust if robust in numbers else numbers[0])
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)

    def place(row):
        kinds = ("running", "failed", "done", "waiting")
        latest = -row.began if row.state == "done" else 0.0
        return kinds.index("running" if row.running else row.state), latest

    shown = sorted(rows, key=place)
    room = max(height - 7, 4)  # below the title, the head and the borders
    for row in shown[:room]:
        cells = {f"{name}, %": f"{value:.2f}" for name, value in row.results.items()}
        if row.state != "waiting":
            seconds = time.monotonic() - row.began if row.running else row.seconds
            cells["seconds"] = f"{seconds:.0f}"
        told = [cells.get(name, "") for name in numbers]
        table.add_row(row.name, row.describe(), *told, style=_COLOURS.get(row.state, "dim"))
    if len(shown) > room:
        table.caption = f"and {len(shown) - room} more"
    return table


def make(*, progress: bool, attack: str = "pgd20") -> Lines | Table:
    """The table in a terminal, else lines.

    Args:
      progress: show what runs, not only the finished rows.
      attack: whose accuracy the table shows beside the clean one.
    """
    if progress and sys.stdout.isatty():
        return Table(attack=attack)
    return Lines(only_rows=not progress)
