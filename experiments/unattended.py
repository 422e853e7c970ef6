"""What scripts share that run for long with nobody beside them: cores, folders, locks, signals.

Nothing here imports JAX.
"""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None


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


@contextlib.contextmanager
def locked(folder: pathlib.Path, script: str) -> Iterator[None]:
    """Keeps a folder for this process: two would write the same checkpoints.

    The system drops the lock of a process that has ended, however it ended. Where files cannot be
    locked (Windows, some network disks) nothing is checked.

    Args:
      folder: of the runs.
      script: the name of what runs them; two scripts do not keep each other out.

    Raises:
      ValueError: another process has it.
    """
    with (folder / f"{script}.lock").open("a+") as file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise ValueError(
                    f"{folder} is in use by another {script}, process {file.read().strip()}; "
                    f"wait for it, or choose another --workdir"
                ) from error
            except OSError as error:
                print(f"{folder} cannot be locked ({error}): start no second {script} there")
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def interrupt_main(number: int, frame: Any) -> None:
    """SIGTERM's handler: as Ctrl-C."""
    raise KeyboardInterrupt
