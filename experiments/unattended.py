"""What scripts share that run for long with nobody beside them: flags, cores, folders, signals.

Nothing here imports JAX.
"""

import os
import pathlib
import re
import signal
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, NoReturn

from absl import flags

from jaxdefense import registry


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


def explain(error: Exception) -> str:
    """One line of what is wrong with the flags, with the nearest name where one is unknown.

    Args:
      error: of absl, or a ValueError that says what is wrong.
    """
    message = one_line(error)
    if isinstance(error, flags.UnrecognizedFlagError):
        own = flags.FLAGS.get_flags_for_module(sys.argv[0])
        try:
            registry.raise_unknown("flag", error.flagname, [flag.name for flag in own])
        except ValueError as unknown:
            return f"{unknown}; --help explains them"
    # absl gives the flag and its value in the text alone: "flag --NAME=VALUE: what is wrong".
    if not (found := re.match(r"flag --([\w.]+)=(.*?): ", message)) or found[1] not in flags.FLAGS:
        return message
    name, value = found.groups()
    flag = flags.FLAGS[name]
    if message.endswith("must have a value other than None."):
        return f"--{name} is needed: {' '.join(flag.help.split())}"
    known = getattr(flag.parser, "enum_values", None)
    if known:
        try:
            registry.raise_unknown(f"value of --{name}", value, known)
        except ValueError as unknown:
            return str(unknown)
    kind = flag.flag_type()
    kind = flag.parser.syntactic_help or {"bool": "true or false"}.get(kind, kind)
    return f"--{name} must be {kind}, got {value!r}"


def parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's parser of flags, whose errors end the script with one line and exit code 2.

    Args:
      argv: of the script, its name first.

    Returns:
      The words that are no flags.
    """
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        refuse_flags(explain(error))
    for flag in flags.FLAGS.get_flags_for_module(argv[0]):
        if flag.value != flag.value:  # every bound lets NaN pass
            refuse_flags(f"--{flag.name} must be {flag.parser.syntactic_help}, got 'nan'")
    return rest


def check_writable(folder: pathlib.Path) -> None:
    """Makes a folder and tries to write there.

    Args:
      folder: of the runs or the records.

    Raises:
      ValueError: it cannot be made or written to.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
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
