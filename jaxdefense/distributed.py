"""Several processes that compute together: who writes, what all are told, how a lost one is said.

All processes run the same program on the same images, and meet wherever their devices exchange
numbers. So a decision that hangs on a file, a clock or a signal must be one for all of them: the
first process, the writer, reads and writes files and tells the others (`from_writer`), and a signal
to one is a signal to all (`any_process`). In one process every function here is the identity.
"""

import atexit
import contextlib
import functools
import json
import os
import pathlib
import pickle
import subprocess
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from jaxdefense import files, validate
from jaxdefense.types import Array, PyTree

Result = TypeVar("Result")

# A process that sends no sign of life for so long is lost: JAX then ends the others.
HEARTBEAT_SECONDS = 30
_END_SECONDS = 60  # that processes wait for each other at a normal end
_PIECE = 2**26  # bytes that are broadcast at once

# JAX ends a process whose peers are lost from inside C++, where Python can say nothing any more. So
# a small process of its own waits for the end of this one, and says what was last written to it.
_WATCHER = """
import sys
last = ""
for last in sys.stdin:
    pass
if last.strip() != "done":
    sys.stderr.write(last)
"""


class _Process:
    """This process as one of several: what is to be said should it, or another, be lost."""

    def __init__(self, number: int | None, of: int | None):
        self.name = "this process" if number is None else f"process {number}"
        self.name += "" if of is None else f" of {of}"
        self.advice = "nothing was saved yet: the same command, in every process, starts anew"
        self._watcher = subprocess.Popen(
            [sys.executable, "-S", "-c", _WATCHER],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a signal to the whole group is not for it
        )
        atexit.register(self.release)

    def tell(self, advice: str) -> None:
        """Keeps what a user can do after a loss."""
        self.advice = advice
        self._write(
            f"error: {self.name} was killed, or was ended by JAX because another process is "
            f"gone; {advice}"
        )

    def release(self) -> None:
        """Lets the watcher end; it has nothing to say."""
        self._write("done")
        if self._watcher.stdin is not None:
            self._watcher.stdin.close()
        self._watcher.wait(timeout=_END_SECONDS)

    def _write(self, line: str) -> None:
        if self._watcher.stdin is not None and not self._watcher.stdin.closed:
            self._watcher.stdin.write(line + "\n")
            self._watcher.stdin.flush()


_this: _Process | None = None


def initialize(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Joins the other processes; before anything asks JAX for its devices.

    What is not given is read from the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, or found by JAX itself: under SLURM, Open MPI and Kubernetes, and on TPU pods.

    Args:
      coordinator: HOST:PORT of the first process, where it listens for the others.
      processes: how many there are.
      process: which of them this is, from 0.

    Raises:
      ValueError: a variable that is no integer, or nothing that says who the others are.

    >>> from jaxdefense import distributed
    >>> distributed.initialize("localhost:1234", processes=2, process=0)  # doctest: +SKIP
    """
    global _this
    processes = _integer("JAX_NUM_PROCESSES") if processes is None else processes
    process = _integer("JAX_PROCESS_ID") if process is None else process
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM for itself; the training loop saves and ends by it.
    jax.config.update("jax_enable_preemption_service", False)
    _this = _Process(process, processes)
    _this.tell("while the processes looked for each other: is each of them started?")
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_END_SECONDS,
        )
    except (ValueError, TypeError) as error:
        _this.release()
        _this = None
        raise ValueError(
            f"several processes need JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and "
            f"JAX_PROCESS_ID, or SLURM, Open MPI or a TPU pod, where JAX finds them ({error})"
        ) from error
    _this.name = f"process {jax.process_index()} of {jax.process_count()}"
    _this.tell("nothing was saved yet: the same command, in every process, starts anew")
    sys.excepthook = _report_and_leave
    _connect()


def _connect() -> None:
    """Makes the connections that collectives use, while all processes are here.

    Gloo's are made at a first use, for which it waits half a minute; later uses wait as they must.
    """
    any_process(False)
    ones = np.ones(jax.local_device_count(), np.float32)
    jax.block_until_ready(jax.pmap(lambda x: jax.lax.psum(x, "all"), axis_name="all")(ones))


def _integer(variable: str) -> int | None:
    """An environment variable as an integer; None where it is not set."""
    value = os.environ.get(variable)
    try:
        return None if value is None else int(value)
    except ValueError:
        raise ValueError(f"{variable} must be an integer, got {value!r}") from None


def several() -> bool:
    """Whether this process is one of several."""
    return jax.process_count() > 1


def is_writer() -> bool:
    """Whether this process is the one that reads and writes files: the first."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether the flag is up in any process; all must ask.

    Args:
      flag: of this process.
    """
    if not several():
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def barrier(name: str) -> None:
    """Waits until all processes are here.

    Args:
      name: of the place; another one in another process is an error.
    """
    if several():
        multihost_utils.sync_global_devices(name)


def broadcast(value: Any) -> Any:
    """The writer's value in every process, to the bit: arrays come as NumPy's.

    Args:
      value: plain values, and any pytree of arrays; that of the other processes does not count.
    """
    if not several():
        return value
    arrays = jax.tree.map(lambda x: np.asarray(x) if isinstance(x, jax.Array) else x, value)
    # The bytes come from a process of this very computation, so unpickling them is safe. They are
    # summed with the others' zeros as integers: as floats, -0.0 would become 0.0.
    data = pickle.dumps(arrays) if is_writer() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.uint32(len(data))))
    received = []
    for start in range(0, size, _PIECE):
        length = min(_PIECE, size - start)
        padded = np.zeros(1 << (length - 1).bit_length(), np.uint8)  # few shapes: few programs
        if is_writer():
            padded[:length] = np.frombuffer(data, np.uint8, length, start)
        piece = np.asarray(multihost_utils.broadcast_one_to_all(padded))
        received.append(piece[:length].tobytes())
    return pickle.loads(b"".join(received))


def from_writer(function: Callable[[], Result]) -> Result:
    """What a function returns or raises in the writer, in every process; the others do not call it.

    Args:
      function: reads or writes files, say; it must not wait for other processes.

    Raises:
      ValueError: raised by the function.
      OSError: likewise; another of its exceptions is a RuntimeError in the other processes.

    >>> from jaxdefense import distributed
    >>> distributed.from_writer(lambda: 1 + 1)
    2
    """
    if not several():
        return function()
    told: tuple[Any, Exception | None] = (None, None)
    raised: Exception | None = None
    if is_writer():
        try:
            told = (function(), None)
        except (ValueError, OSError) as error:  # which callers tell apart
            raised = error
            told = (None, type(error)(*error.args))
        except Exception as error:
            raised = error
            told = (None, RuntimeError(f"in process 0: {type(error).__name__}: {error}"))
    value, failed = broadcast(told)
    if failed is not None:
        raise raised or failed
    return value


def read_by_writer(method: Callable[..., Result]) -> Callable[..., Result]:
    """A function that the writer alone runs; every process calls it and gets what it returned.

    Args:
      method: see `from_writer`.
    """

    @functools.wraps(method)
    def shared(*args: Any, **options: Any) -> Result:
        return from_writer(lambda: method(*args, **options))

    return shared


@contextlib.contextmanager
def claimed(path: str | os.PathLike, user: str, *folders: pathlib.Path) -> Iterator[None]:
    """Keeps a place for all processes of this run, see `files.locked`: the writer takes it.

    Args:
      path: of the lock's file.
      user: what this run does there.
      *folders: that are rid of what killed processes left half-written.

    Raises:
      ValueError: another run has the place.
    """
    with contextlib.ExitStack() as stack:

        def claim() -> None:
            stack.enter_context(files.locked(path, user))
            for folder in folders:
                files.remove_leftovers(folder)

        from_writer(claim)
        yield


def check_same(what: str, *arrays: Any) -> None:
    """All processes hold the same arrays.

    Args:
      what: they are, for the error: "images of mnist".
      *arrays: NumPy arrays.

    Raises:
      ValueError: one process has others than the first.
    """
    if not several():
        return
    check = 0
    for array in arrays:
        check = zlib.crc32(np.ascontiguousarray(array).tobytes(), check)
    found = np.asarray(multihost_utils.process_allgather(np.uint32(check))).reshape(-1)
    other = np.flatnonzero(found != found[0])
    if len(other):
        raise ValueError(
            f"the {what} in process {other[0]} differ from those in process 0: every process needs "
            f"the same data set"
        )


def check_same_values(what: str, values: Any) -> None:
    """All processes hold the same plain values.

    Args:
      what: they are, for the error: "config".
      values: what JSON can hold; anything else is compared by its `repr`.

    Raises:
      ValueError: one process has others than the first; names the keys that differ.

    >>> from jaxdefense import distributed
    >>> distributed.check_same_values("config", {"seed": 0})  # one process agrees with itself
    """
    if not several():
        return
    texts = _gather_texts(json.dumps(values, default=repr))
    for number, text in enumerate(texts):
        first, other = json.loads(texts[0]), json.loads(text)
        if text != texts[0] and first != other:
            places = ("in process 0", f"in process {number}")
            changed = ", ".join(validate.describe_differences(first, other, places))
            raise ValueError(
                f"the processes differ in their {what} ({changed}): every process needs the same"
            )


def _gather_texts(text: str) -> list[str]:
    """A text of each process, in every process."""
    data = text.encode()
    sizes = np.asarray(multihost_utils.process_allgather(np.uint32(len(data)))).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def spans_processes(sharding: NamedSharding) -> bool:
    """Whether a sharding has devices of other processes.

    Args:
      sharding: of arrays.
    """
    return not sharding.is_fully_addressable


def shard(array: Any, sharding: NamedSharding) -> Array:
    """An array on the devices of a sharding; every process holds all of it before.

    Args:
      array: NumPy's or JAX's; one that is spread over processes already stays as it is.
      sharding: where it goes.
    """
    if not spans_processes(sharding):
        return jax.device_put(array, sharding)
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return array
    host = np.asarray(array)
    host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype), copy=False)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def gather(tree: PyTree) -> PyTree:
    """Arrays of all devices' rows, as NumPy arrays in every process.

    Args:
      tree: of arrays whose rows are spread over devices.
    """

    def one(leaf: Array) -> np.ndarray:
        if leaf.is_fully_addressable:
            return np.asarray(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(one, tree)


def tell(advice: str) -> None:
    """Keeps what a user can do should a process be lost from now on; it ends the error's line.

    Args:
      advice: one line.
    """
    if _this is not None:
        _this.tell(advice)


def leave(code: int) -> NoReturn:
    """Ends this process after an error that it has said; the others then end within a minute.

    A normal end waits for the others, which may wait for this one themselves. In one process it is
    `sys.exit`.

    Args:
      code: of the exit, not 0.
    """
    if _this is None:
        sys.exit(code)
    _this.release()
    sys.stdout.flush()
    sys.stderr.flush()
    # An error of all processes is said by each of them before the first one's end ends the rest.
    time.sleep(2 if is_writer() else 1)
    os._exit(code)


def leave_computing(code: int) -> NoReturn:
    """Ends this process while its devices may compute, where Python's own end would crash.

    Args:
      code: of the exit; among several processes `leave` has to follow.
    """
    if _this is not None:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _report_and_leave(kind: Any, error: BaseException, trace: Any) -> None:
    """Ends a process by an exception: one line where it only says that another one is lost."""
    text = str(error)
    lost = ("Gloo", "NCCL", "UNAVAILABLE", "Connection", "coordination service")
    if (
        _this is not None
        and kind.__name__.endswith("RuntimeError")
        and any(w in text for w in lost)
    ):
        reason = " ".join(text.split())[:150]
        print(
            f"error: {_this.name} lost another process ({reason}); {_this.advice}",
            file=sys.stderr,
        )
    else:
        traceback.print_exception(kind, error, trace)
    leave(1)
