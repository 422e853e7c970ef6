"""The best few checkpoints of a run, kept until a second attack chooses among them.

The attack of the validations is the one that a masked network fools most cheaply, and the best of
many validations is the luckiest. `train.select_with` names a second attack of another loss; at the
run's end it scores the few checkpoints that the first one liked best, and the one that withstands
it best becomes `best`.
"""

import contextlib
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdefense import distributed
from jaxdefense.runs import checkpoint
from jaxdefense.types import PyTree


def _rank(scores: Mapping[str, float], step: int) -> tuple[float, float, int]:
    return scores["validation_robust"], scores["validation_clean"], step


class Candidates:
    """The best few checkpoints by validation, a folder each.

    A folder that is no longer among them goes when the checkpoint `last` is written without it:
    whatever a killed run goes on from, its candidates are there.

    Args:
      folder: for them.
      keep: how many.
    """

    def __init__(self, folder: pathlib.Path, *, keep: int):
        self._folder, self._keep = folder, keep
        self.scores: dict[str, dict[str, float]] = {}  # by step, as JSON has it

    def in_order(self) -> list[tuple[int, dict[str, float]]]:
        """(step, scores) of each, by step."""
        return sorted((int(step), scores) for step, scores in self.scores.items())

    def takes(self, step: int, scores: Mapping[str, float]) -> bool:
        """Whether a validated state is among the best, and then takes the worst one's place.

        Args:
          step: of the state.
          scores: {"validation_clean", "validation_robust"}, percent.
        """
        self.scores[str(step)] = dict(scores)
        if len(self.scores) > self._keep:
            worst = min(self.scores, key=lambda name: _rank(self.scores[name], int(name)))
            del self.scores[worst]
        return str(step) in self.scores

    def save(self, step: int, model: PyTree) -> None:
        """Keeps a state.

        Args:
          step: of the state, one that `takes` has said yes to.
          model: {"params", "carry"}.
        """
        with contextlib.closing(self.store(step)) as store:
            store.save(step, {"model": model}, self.scores[str(step)])

    def store(self, step: int) -> checkpoint.Store:
        """Where a state is kept.

        Args:
          step: of the state.
        """
        return checkpoint.Store(self._folder / str(step))

    def prune(self) -> None:
        """Removes the folders of states that are no longer among the best."""
        for folder in self._folder.glob("*") if distributed.is_writer() else ():
            if folder.name not in self.scores:
                shutil.rmtree(folder)

    def clear(self) -> None:
        """Removes all: the winner lies in `best`."""
        if distributed.is_writer() and self._folder.exists():
            shutil.rmtree(self._folder)


def choose_best(compared: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The candidate that withstands the second attack best.

    Ties go to the first attack's accuracy, then to clean accuracy, then to the later step.

    Args:
      compared: {"step", "validation_clean", "validation_robust", "validation_second"} of each.

    >>> from jaxdefense.train import candidates
    >>> masked = {"validation_clean": 90.0, "validation_robust": 80.0, "validation_second": 1.0}
    >>> sound = {"validation_clean": 85.0, "validation_robust": 50.0, "validation_second": 48.0}
    >>> candidates.choose_best([{"step": 10, **sound}, {"step": 20, **masked}])["step"]
    10
    """
    ranks = [(c["validation_second"], *_rank(c, c["step"])) for c in compared]
    return dict(compared[ranks.index(max(ranks))])
