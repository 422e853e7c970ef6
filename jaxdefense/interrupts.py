"""How a run is asked to end, and how a script ends: signals and errors of the disk.

The signals are Ctrl-C, SIGTERM, and SIGHUP of a terminal that is closed.

`Requests` collects the first signal, so that a run may save before it ends; the second one ends the
process as it would anywhere. `one_line_endings` is for scripts: one line instead of a traceback.
"""

import contextlib
import dataclasses
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from jaxdefense import distributed, files, streams

# SIGTERM, and where the system has it SIGHUP: both end a run in the same way.
_ENDS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
_SIGNALS = (signal.SIGINT, *_ENDS)

# A terminal, make or srun may send one request twice: what follows within so many seconds is no
# second one.
_TWICE = 0.5


class Interrupted(RuntimeError):
    """The process was asked to end by SIGTERM or SIGHUP; what is done was saved.

    Args:
      told: what was saved.
      number: of the signal.
    """

    def __init__(self, told: str = "", number: int = signal.SIGTERM):
        super().__init__(*([told] if told else []))
        self.number = number


class Requests:
    """A context in which the first SIGTERM, SIGHUP or Ctrl-C is only noted.

    A second one does what it would have done before. Outside the main thread, where Python takes no
    signals, nothing is ever asked; a signal that the process ignores (a job in the background,
    nohup) stays ignored.
    """

    def __init__(self) -> None:
        self._received: list[int] = []
        self._first = 0.0  # when
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Requests":
        self._received.clear()
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # None: not Python's
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        if not self._received:
            self._first = time.monotonic()
            self._received.append(number)
        elif time.monotonic() - self._first > _TWICE:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()

    def asked(self) -> bool:
        """Whether a signal has come, to any process of the run: the one place where it is read.

        The processes of one run ask equally often, at the same places.
        """
        return distributed.any_process(bool(self._received))

    def stop(self, told: str) -> NoReturn:
        """Ends the run, after it was `asked` to and has saved.

        Args:
          told: what is kept, and what goes on from there.

        Raises:
          KeyboardInterrupt: after Ctrl-C.
          Interrupted: after SIGTERM or SIGHUP.
        """
        if not self._received:
            raise Interrupted(f"another process was asked to end; {told}")
        number = self._received[0]
        if number == signal.SIGINT:
            raise KeyboardInterrupt(f"interrupted; {told}")
        raise Interrupted(f"{signal.Signals(number).name}; {told}", number)


@dataclasses.dataclass
class Ending:
    """How a script ends where the user or the system ends it; a script may change it as it goes.

    Args:
      told: said after a signal: what is kept, and what goes on from there.
      grace: seconds that the main thread has to end by itself after a signal, while a program on
        the device keeps it from seeing it; None for any time, where it saves.
      prefix: of the line of an error.
      watched: whether a second signal ends the process at once; not where the script has started
        others, which it ends itself.
      outlives_readers: whether the script goes on where nobody reads its standard output any more;
        else it then ends quietly.
    """

    told: str = "nothing was written"
    grace: float | None = 3.0
    prefix: str = "error"
    watched: bool = True
    outlives_readers: bool = False

    def end_now(self, number: int) -> NoReturn:
        """Ends the process from any thread, whatever the main one does.

        Args:
          number: of the signal.
        """
        sys.stdout.flush()
        print(f"\ninterrupted; {self.told}", file=sys.stderr, flush=True)
        os._exit(128 + number)


@contextlib.contextmanager
def one_line_endings(ending: Ending) -> Iterator[None]:
    """A script's block: a signal or an error of the disk ends it with one line, no traceback.

    Exit code 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, 1 after an error of the disk.
    The second signal ends the process at once, also while JAX compiles or computes. It changes
    nothing outside the main thread.

    Args:
      ending: what is said.
    """
    with streams.outliving_readers(unread=ending.outlives_readers), _one_line(ending):
        yield


@contextlib.contextmanager
def _one_line(ending: Ending) -> Iterator[None]:
    """`one_line_endings`, whose lines may go nowhere."""
    try:
        with _watched(ending):
            yield
        sys.stdout.flush()  # or what follows this block would meet a reader that is gone
    except KeyboardInterrupt as error:
        print(f"\n{error}" if error.args else f"\ninterrupted; {ending.told}", file=sys.stderr)
        distributed.leave_computing(128 + signal.SIGINT)
    except Interrupted as error:
        name = signal.Signals(error.number).name
        print(error if error.args else f"{name}; {ending.told}", file=sys.stderr)
        distributed.leave_computing(128 + error.number)
    except BrokenPipeError:  # `script | head -1`: nobody reads what this prints any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        sys.exit(f"{ending.prefix}: {files.explain(error)}")


def _raise_interrupted(number: int, _: FrameType | None) -> NoReturn:
    raise Interrupted(number=number)


@contextlib.contextmanager
def _watched(ending: Ending) -> Iterator[None]:
    """`_ENDS` raise `Interrupted`; a thread sees signals that the main thread cannot see yet.

    Python's handlers run between two of the main thread's instructions, and a program of JAX is one
    instruction. The system's own handler writes each signal's number to a socket at once, where a
    thread reads it.
    """
    if threading.current_thread() is not threading.main_thread() or not ending.watched:
        yield
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    done = threading.Event()
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def end_now(number: int, _: FrameType | None) -> None:
        ending.end_now(number)

    if ending.grace is None:
        # Where it saves, `Requests` takes the signal; before that there is nothing to save, and an
        # exception could be lost: JAX and orbax call Python where nobody passes it on.
        handlers: dict[int, Any] = dict.fromkeys(_SIGNALS, end_now)
    else:
        handlers = dict.fromkeys(_ENDS, _raise_interrupted)
        handlers[signal.SIGINT] = signal.default_int_handler
    taken = [number for number in _SIGNALS if before[number] not in (signal.SIG_IGN, None)]
    for number in taken:
        signal.signal(number, handlers[number])
    descriptor = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(ours, done, ending), daemon=True)
    watcher.start()
    sys.unraisablehook, hook = _ends_lost_signals(ending, sys.unraisablehook), sys.unraisablehook
    try:
        yield
    finally:
        done.set()
        sys.unraisablehook = hook
        signal.set_wakeup_fd(descriptor)
        for number in taken:
            signal.signal(number, before[number])
        theirs.close()  # ends the thread
        watcher.join()
        ours.close()


def _ends_lost_signals(ending: Ending, hook: Callable[[Any], object]) -> Callable[[Any], object]:
    """A hook that ends the process where a signal's exception would be printed and forgotten.

    That is so in a finaliser and in a callback of the garbage collector; JAX has one.
    """

    def ends(unraisable: Any) -> None:
        if unraisable.exc_type in (KeyboardInterrupt, Interrupted):
            ending.end_now(getattr(unraisable.exc_value, "number", signal.SIGINT))
        hook(unraisable)

    return ends


def _watch(ours: socket.socket, done: threading.Event, ending: Ending) -> None:
    """Reads signals' numbers; ends the process at the second one, or after the grace."""

    def next_number(timeout: float | None) -> int | None:
        """The next of `_SIGNALS`; None where the block ends or the time is over."""
        ours.settimeout(timeout)
        while True:
            try:
                read = ours.recv(1)
            except TimeoutError:
                return None
            if not read or read[0] in _SIGNALS:
                return read[0] if read else None

    first = next_number(None)
    if first is None or done.wait(_TWICE):
        return
    ours.settimeout(0)
    with contextlib.suppress(BlockingIOError):
        ours.recv(4096)  # the first one again
    second = next_number(ending.grace)
    if not done.is_set():
        ending.end_now(second or first)
