"""What scripts share that run for long with nobody beside them: flags, cores, folders, signals.

Nothing here imports JAX.
"""

import os
import pathlib
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import flags


def available_cores() -> list[int]:
    """The cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return sorted(affinity(0)) if affinity else list(range(os.cpu_count() or 1))


def one_line(error: Exception) -> str:
    """An error's text without its line breaks.

    Args:
      error: of any kind.
    """
    return " ".join(str(error).split())


def refuse_flags(message: str) -> NoReturn:
    """Ends the script with one line and exit code 2.

    Args:
      message: what is wrong with its flags.
    """
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def parse_flags(argv: Sequence[str], explain: Callable[[Exception], str] = one_line) -> list[str]:
    """absl's parser of flags, whose errors end the script with one line and exit code 2.

    Args:
      argv: of the script, its name first.
      explain: words an error.

    Returns:
      The words that are no flags.
    """
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        refuse_flags(explain(error))


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
    """SIGTERM or SIGHUP, which end a script as Ctrl-C does, but for the exit code."""


def _interrupt_main(number: int, frame: Any) -> None:
    """A signal's handler: as Ctrl-C."""
    raise Terminated(number)


def interrupt_on_signals() -> None:
    """SIGTERM, and SIGHUP of a closed terminal, raise `Terminated`, but where they are ignored."""
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no second one
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt_main)


def exit_code(error: KeyboardInterrupt) -> int:
    """128 and the signal's number, as shells have it.

    Args:
      error: that ended the script.
    """
    return 128 + (error.args[0] if isinstance(error, Terminated) else signal.SIGINT)
