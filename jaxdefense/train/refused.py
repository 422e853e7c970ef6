"""A training that is refused leaves nothing behind, so that the corrected command just works."""

import functools
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from jaxdefense import distributed

P = ParamSpec("P")
Result = TypeVar("Result")


def leaves_nothing(train: Callable[P, Result]) -> Callable[P, Result]:
    """A decorator of a training: after a ValueError or TypeError, a new workdir is as it was.

    Most of what is wrong is said before anything is written. The rest (a network that needs larger
    images) shows when the first state is made. A run that has a checkpoint, and files that were in
    the folder before, are left as they are.

    Args:
      train: takes a run and a workdir first; no other process uses that workdir meanwhile.
    """

    @functools.wraps(train)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> Result:
        given: Any = kwargs.get("workdir", args[1] if len(args) > 1 else None)
        workdir, existed = pathlib.Path(given), pathlib.Path(given).exists()
        before = {path.name for path in workdir.glob("*")}
        try:
            return train(*args, **kwargs)
        except (ValueError, TypeError):
            if "config.json" not in before and distributed.is_writer():
                _remove_new(workdir, before)
                if not existed and workdir.is_dir() and not any(workdir.iterdir()):
                    workdir.rmdir()
            raise

    return guarded


def has_checkpoint(workdir: pathlib.Path) -> bool:
    """Whether a workdir holds a state of a training, whole or not.

    Args:
      workdir: of a run, or nothing yet.
    """
    return any(path.name.isdigit() for path in workdir.glob("*/*"))


def _remove_new(workdir: pathlib.Path, before: set[str]) -> None:
    """Removes what is in a workdir and was not before, unless it holds a checkpoint."""
    if has_checkpoint(workdir):
        return
    for path in workdir.glob("*"):
        if path.name not in before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
