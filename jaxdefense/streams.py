"""Standard output and error of a script that works for hours, when their readers end before it.

The other end of a pipe (`| head -1`, a `tee` that died) or a terminal may be gone long before the
work is done. Nothing here imports JAX.
"""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any


class _Output(io.FileIO):
    """A descriptor's output, which goes nowhere once its reader is gone.

    Args:
      descriptor: of the stream; it stays open.
      lost: is called with the error when the reader is gone, and may raise it.
    """

    def __init__(self, descriptor: int, lost: Any):
        super().__init__(descriptor, "w", closefd=False)
        self._gone = {errno.EPIPE, errno.EIO} if os.isatty(descriptor) else {errno.EPIPE}
        self._lost = lost

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in self._gone:  # a full disk, say
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # for whoever else writes there
            os.close(nowhere)
            self._lost(error)
            return memoryview(data).nbytes


@contextlib.contextmanager
def outliving_readers(*, unread: bool = True) -> Iterator[None]:
    """A block whose prints cannot fail because nobody reads them any more; says so once on stderr.

    It changes nothing where `sys.stdout` and `sys.stderr` were replaced, as tests do.

    Args:
      unread: whether to go on where a pipe's reader of standard output is gone; without, the print
        raises as it would anywhere.

    Raises:
      BrokenPipeError: only without `unread`.

    >>> from jaxdefense import streams
    >>> with streams.outliving_readers():
    ...     print("read or not")
    read or not
    """

    def lost(error: OSError) -> None:
        if error.errno == errno.EPIPE and not unread:
            raise error
        print(
            "note: nobody reads standard output any more: going on without it",
            file=sys.stderr,
            flush=True,
        )

    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    for name, of_its_loss in (("stdout", lost), ("stderr", lambda error: None)):
        stream = before[name]
        if stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            stream.flush()
            raw = _Output(stream.fileno(), of_its_loss)
            setattr(sys, name, _like(stream, raw))
    try:
        yield
        sys.stdout.flush()
    finally:
        for name, stream in before.items():
            with contextlib.suppress(OSError):  # said by then, or the block ends by it
                getattr(sys, name).flush()
            setattr(sys, name, stream)


def _like(stream: io.TextIOWrapper, raw: io.FileIO) -> io.TextIOWrapper:
    """A text stream over `raw`, buffered and encoded as another one is."""
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),  # type: ignore[arg-type]
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
