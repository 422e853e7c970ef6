"""Measures candidates of the reduced recipe: how far PGD-AT comes in so many minutes of training.

    python experiments/study.py --choose --minutes=8
    python experiments/study.py --choose --rows='resnet8-*'    # some of them

Each candidate is timed over a few steps, trained for as many as fit into the time, and judged by
AutoAttack on the first 1,000 test images. Run it on a quiet machine, then write the best one into
the REDUCED constants of configs/recipes.py: at least 45 % clean and 24 % under AA-fast, and the
shorter its AutoAttack the shorter the whole grid. Killed, it goes on where it was.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cli
import study_grid as grid

from jaxdefense import files, runs
from jaxdefense.evaluation import protocols, records, tables
from jaxdefense.train import train

PROBES = (20, 80)  # steps of the two runs whose difference is the time of the steps alone


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A network and an attack for the reduced recipe.

    Attributes:
      name: of the row that is printed.
      model: the config's section.
      steps: of PGD in training.
      step_size: of PGD, in units of 1/255.
      batch_size: of training.
      lr: its peak; of SGD, or of Adam for a network without BatchNorm.
      optimizer: "sgd" or "adam".
    """

    name: str
    model: Mapping[str, Any]
    steps: int
    step_size: float
    batch_size: int = 128
    lr: float = 0.2
    optimizer: str = "sgd"

    def config(self, steps: int) -> dict[str, Any]:
        """The config of PGD-AT with it.

        Args:
          steps: of the optimiser in all.
        """
        config = json.loads(json.dumps(grid.settings(grid.Row("pgd_at", "cifar10_cpu"))))
        config["name"] = f"pgd_at-{self.name}"
        config["model"] = dict(self.model)
        config["defense"] |= dict(steps=self.steps, step_size=self.step_size / 255)
        optimizer = config["train"]["optimizer"]
        if self.optimizer == "adam":
            optimizer = dict(name="adam", schedule=optimizer["schedule"])
        config["train"] |= dict(
            length=f"{steps}s",
            batch_size=self.batch_size,
            optimizer={**optimizer, "lr": self.lr},
            steps_per_dispatch=20,
            validate_every="50%",
        )
        return config

    @property
    def operations(self) -> float:
        """Operations of an epoch over 49,000 images: PGD's passes and the update's three."""
        return 49000 * (2 * self.steps + 3) * grid.forward_cost(self.config(1))

    def epochs(self, seconds: float) -> float:
        """The epochs that should fit at `grid.CPU_SPEED`.

        Args:
          seconds: of training.
        """
        return seconds * grid.CPU_SPEED / self.operations


def _resnet(width: int) -> dict[str, Any]:
    return dict(name="resnet", depth=18, width=width, dtype="float32")


def _vgg(width: int) -> dict[str, Any]:
    return dict(name="vgg", width=width, dtype="float32")


# By cost of a forward pass, in millions of operations: 17 (ResNet), 19, 11 and 5 (VGG), 8 (CNN).
# A committed record speaks for the first two: ResNet of this width, one step, three epochs, kept
# 51 % clean and 30 % under PGD-10 (records/claf_literal). The narrower VGGs trade width for epochs
# and make AutoAttack, which costs most of a row, up to four times shorter.
CANDIDATES = (
    Candidate("resnet8-pgd2", _resnet(8), 2, 6),
    Candidate("resnet8-pgd1", _resnet(8), 1, 10),
    Candidate("vgg8-pgd2", _vgg(8), 2, 6),
    Candidate("vgg8-pgd3", _vgg(8), 3, 4),
    Candidate("vgg12-pgd2", _vgg(12), 2, 6),
    Candidate("vgg16-pgd2", _vgg(16), 2, 6),
    Candidate("cnn2-pgd3", dict(name="cnn", width=2.0), 3, 4, lr=3e-3, optimizer="adam"),
)


def measure_step(candidate: Candidate, folder: pathlib.Path) -> float:
    """Seconds of a training step, without compilation, start and validation.

    Args:
      candidate: to be timed.
      folder: of the runs.
    """
    seconds = []
    # The first run compiles for those that follow, as far as a cache can.
    for i, steps in enumerate((PROBES[0], *PROBES)):
        summary = train(candidate.config(steps), folder / f"probe-{i}", progress=False)
        seconds.append(summary["seconds"])
    return (seconds[2] - seconds[1]) / (PROBES[1] - PROBES[0])


def measure(candidate: Candidate, folder: pathlib.Path, seconds: float) -> dict[str, Any]:
    """Trains and judges a candidate, or reads what was found before.

    Args:
      candidate: to be measured.
      folder: its own.
      seconds: of training.

    Returns:
      {"epochs", "step_ms", "training", "record"}: the times of a step and of training, and the
      record of AutoAttack.

    Raises:
      ValueError: the steps could not be timed, on a machine that is too busy.
    """
    path = folder / "step.json"
    if not path.exists():
        step = measure_step(candidate, folder)
        if step <= 0:
            raise ValueError(f"{candidate.name}: steps cannot be timed, the machine is too busy")
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(path, json.dumps({"step": step, "steps": max(int(seconds / step), 2)}))
    probe = json.loads(path.read_text())
    record_path, progress = folder / "autoattack.json", cli.shows_progress(None)
    if not record_path.exists():
        train(candidate.config(probe["steps"]), folder / "run", progress=progress)
        run, variables, meta = runs.restore(folder / "run")
        record = protocols.autoattack(
            run,
            variables,
            training={"checkpoint": "best", **meta},
            examples=grid.EXAMPLES,
            folder=folder / "autoattack",
            progress=progress,
        )
        records.save(record, record_path)
    record = records.load(record_path)
    return {
        "epochs": probe["steps"] * candidate.batch_size / 49000,
        "step_ms": 1000 * probe["step"],
        "training": record["training"]["seconds"],
        "record": record,
    }


def line(candidate: Candidate, found: Mapping[str, Any]) -> list[str]:
    """A candidate's cells in the table.

    Args:
      candidate: that was measured.
      found: see `measure`.
    """
    record = found["record"]
    results = next(iter(record["results"].values()))
    accuracies = [f"{results[c]['accuracy']:.1f}" for c in ("clean", "aa-fast", "autoattack")]
    return [
        candidate.name,
        f"{grid.forward_cost(candidate.config(1)) / 1e6:.1f}",
        f"{found['step_ms']:.0f}",
        f"{found['epochs']:.1f}",
        *accuracies,
        f"{found['training'] / 60:.1f}",
        f"{record['seconds'] / 60:.1f}",
    ]


def main(
    folder: pathlib.Path,
    seconds: float,
    patterns: Sequence[str] = ("*",),
    candidates: tuple[Candidate, ...] = CANDIDATES,
    measured: Callable[..., dict[str, Any]] = measure,
) -> int:
    """Measures candidates and prints their table; returns the exit code.

    Args:
      folder: of the runs.
      seconds: of training, for each.
      patterns: of the names of those that are measured, with * and ?.
      candidates: that there are.
      measured: as `measure`.

    Raises:
      ValueError: no candidate has such a name; the nearest are named.
    """
    chosen = grid.matching("candidate", candidates, patterns)
    cli.quiet_logs()
    cli.enable_cache()
    cli.spread_over_cores()
    header = ["candidate", "million operations forward", "ms a step", "epochs", "clean, %"]
    header += ["aa-fast, %", "autoattack, %", "training, min", "AutoAttack, min"]
    lines = []
    for candidate in chosen:
        print(f"{candidate.name}: {candidate.epochs(seconds):.1f} epochs should fit", flush=True)
        lines.append(line(candidate, measured(candidate, folder / candidate.name, seconds)))
        print(tables.markdown(header, lines), flush=True)
    return 0
