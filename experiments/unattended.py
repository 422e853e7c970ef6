"""What scripts share that run for long with nobody beside them: cores, folders, signals.

Nothing here imports JAX.
"""

import os
import pathlib
import signal
import tempfile
from typing import Any


def available_cores() -> list[int]:
    """The cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return sorted(affinity(0)) if affinity else list(range(os.cpu_count() or 1))


def check_writable(folder: pathlib.Path) -> None:
    """Makes a folder and tries to write there.

    Args:
      folder: of the runs or the records.

    Raises:
      ValueError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error}") from error


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a script as Ctrl-C does, but for the exit code."""


def interrupt_main(number: int, frame: Any) -> None:
    """SIGTERM's handler: as Ctrl-C."""
    raise Terminated


def exit_code(error: KeyboardInterrupt) -> int:
    """128 and the signal's number, as shells have it.

    Args:
      error: that ended the script.
    """
    return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)
