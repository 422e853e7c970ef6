"""A training that is refused leaves nothing behind, so that the corrected command just works."""

import functools
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax

from jaxdefense import validate

P = ParamSpec("P")
Result = TypeVar("Result")


def leaves_nothing(train: Callable[P, Result]) -> Callable[P, Result]:
    """A decorator of `train`: after a ValueError or TypeError, a new workdir is as it was.

    Most of what is wrong is said before anything is written. The rest (a network that needs larger
    images) shows when the first state is made. A run that has a checkpoint, and files that were in
    the folder before, are left as they are.

    Args:
      train: takes a config and a workdir first.
    """

    @functools.wraps(train)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> Result:
        given: Any = kwargs.get("workdir", args[1] if len(args) > 1 else None)
        workdir = validate.check_folder("workdir", given)
        before = {path.name for path in workdir.glob("*")}
        existed = workdir.exists()
        try:
            return train(*args, **kwargs)
        except (ValueError, TypeError):
            if "config.json" not in before and jax.process_index() == 0:
                _remove_new(workdir, before, existed)
            raise

    return guarded


def _remove_new(workdir: pathlib.Path, before: set[str], existed: bool) -> None:
    """Removes what is in a workdir and was not before, unless it holds a checkpoint."""
    if any(path.name.isdigit() for path in workdir.glob("*/*")):
        return
    for path in workdir.glob("*"):
        if path.name not in before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not existed and workdir.is_dir():
        os.rmdir(workdir)
