"""What a resumed run says of what it lost, lines of its log or checkpoints, and the ways on."""

import contextlib
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from tqdm import tqdm

from jaxdefense import distributed
from jaxdefense.runs import checkpoint, config_file
from jaxdefense.runs.run import read_log


def say(line: str) -> None:
    """Writes one line to stderr, above a bar; of several processes the first does.

    Args:
      line: of text.
    """
    if distributed.is_writer():
        tqdm.write(line, file=sys.stderr)


def note(text: str) -> None:
    """Says what a user should know of, see `say`.

    Args:
      text: of one line.
    """
    say(f"note: {text}")


def note_torn_lines(path: pathlib.Path) -> int:
    """Says how many lines of a log are torn, and therefore dropped.

    Args:
      path: of an existing metrics.jsonl.

    Returns:
      How many.
    """
    written = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    if torn := len(written) - len(read_log(path)):
        note(f"{path}: {torn} damaged line{'s' * (torn > 1)} dropped, {len(written) - torn} kept")
    return torn


def note_lost_last(workdir: pathlib.Path) -> None:
    """Says that a run begins again, where its log tells that it was further.

    Args:
      workdir: of a run without a checkpoint `last`.
    """
    if read_log(workdir / "metrics.jsonl"):
        note(f"{workdir / 'last'} holds no checkpoint: the run begins again at its first step")


def config_of_checkpoints(workdir: pathlib.Path) -> dict[str, Any] | None:
    """The config of a run whose config.json is lost, as its checkpoints have it.

    Args:
      workdir: of the run.

    Returns:
      The config; None, with a note, where no checkpoint can tell it.
    """
    for kind in ("last", "best"):
        if not distributed.from_writer((workdir / kind).is_dir):
            continue
        with contextlib.closing(checkpoint.Store(workdir / kind)) as store:
            try:
                config = store.meta().get("config")
            except checkpoint.Damaged:  # said where the run is restored
                continue
        if config is not None:
            return config
    note(
        f"{workdir / config_file.NAME} is gone, and the checkpoints (damaged, or of an older "
        f"version) do not tell the config: the one that is given is taken for theirs, unchecked"
    )
    return None


@contextlib.contextmanager
def offering_best(workdir: pathlib.Path) -> Iterator[None]:
    """Adds the ways on to the error of a damaged `last`.

    Args:
      workdir: of the run.

    Raises:
      ValueError: in place of `checkpoint.Damaged`.
    """
    try:
        yield
    except checkpoint.Damaged as error:
        ways = f"remove {workdir / 'last'}, and the same command begins again at the first step"
        steps = checkpoint.whole_steps(workdir / "last")
        if steps:  # a later one is damaged, or is none
            ways = f"remove what is newer than {workdir / 'last' / str(steps[-1])}, which is whole"
        if other := checkpoint.find_other(workdir, "last"):
            ways += f"; or start a new run from its best, of step {other[1]}: --init_from={workdir}"
        raise ValueError(f"{error}; {ways}") from error


def explain_lost_best(store: checkpoint.Store, best: Mapping[str, Any]) -> str:
    """What became of the best checkpoint; nothing where it is there and whole.

    Args:
      store: of the best checkpoint.
      best: what the run knows of it, with its "step"; empty where there is none yet.
    """
    if not best:
        return ""
    try:
        found = store.check()
    except checkpoint.Damaged as error:
        return f"the best checkpoint, of step {best['step']}, is lost ({error})"
    if found < best["step"]:
        return f"the best checkpoint, of step {best['step']}, is lost ({store.folder} has {found})"
    return ""
