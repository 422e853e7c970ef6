"""The log of a run: metrics.jsonl, and the same numbers as TensorBoard events."""

import json
import os
import pathlib
import socket
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tensorboardX import record_writer, summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tqdm import tqdm

from jaxdefense import checksums, distributed, files
from jaxdefense.runs.run import read_log
from jaxdefense.train import recovery

# Keys of the lines that a validation writes.
_OF_VALIDATION = {"validation_clean", "warning"}


class Log:
    """Scalars as JSON lines and TensorBoard events; a resumed run goes on where it was.

    Of several processes the first alone writes.

    Args:
      workdir: of the run.
      step: that the run starts from; what a killed run wrote of later ones is dropped.
      unfinished: what the run has begun at that step: of a validation that is due again, what was
        written is dropped too.
      checksum: of `hash_log` at that step, where it is known.

    Raises:
      OSError: the disk is full or read-only; the log is as it was.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        step: int,
        unfinished: Mapping[str, Any] | None = None,
        checksum: str = "",
    ):
        self._writes = distributed.is_writer()
        if not self._writes:
            return
        self._path = workdir / "metrics.jsonl"
        again = bool((unfinished or {}).get("validation"))
        if self._path.exists():  # what a killed run wrote after its last checkpoint
            torn = recovery.note_torn_lines(self._path)
            dropped = {"devices", *(_OF_VALIDATION if again else ())}  # written again
            kept = [
                line
                for line in read_log(self._path)
                if line["step"] < step or (line["step"] == step and dropped.isdisjoint(line))
            ]
            files.write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
            if checksum and not torn and hash_log(workdir) != checksum:
                recovery.note(
                    f"{self._path} was changed since it was written: a curve may be wrong"
                )
        elif checksum:
            recovery.note(f"{self._path} is gone: the log begins again at step {step}")
        with files.naming(self._path):
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._board: Board | None = None
        try:
            self._board = Board(workdir / "tensorboard", step)
        except OSError as error:
            self._give_up_board(error)

    def write(self, step: int, values: Mapping[str, float], **more: Any) -> None:
        """Writes one line at once, whole or not at all.

        Args:
          step: of the run.
          values: scalars by name.
          **more: further values of the line, which TensorBoard does not get.

        Raises:
          OSError: the disk is full; the line is not there.
        """
        if not self._writes:
            return
        line = json.dumps({"step": step, **more, **values}) + "\n"
        _append(self._file, line.encode(), self._path)
        if self._board:
            try:
                self._board.write(step, values)
            except OSError as error:
                self._give_up_board(error)

    def _give_up_board(self, error: OSError) -> None:
        """Says that TensorBoard gets no more; metrics.jsonl holds the same numbers."""
        if self._board:
            self._board.close()
        self._board = None
        tqdm.write(f"no more TensorBoard events: {files.explain(error)}", file=sys.stderr)

    def close(self) -> None:
        """Closes both files, everything written."""
        if not self._writes:
            return
        os.close(self._file)
        if self._board:
            self._board.close()


def hash_log(workdir: pathlib.Path) -> str:
    """The SHA-256 of a run's log as it is.

    Args:
      workdir: of the run.
    """
    path = workdir / "metrics.jsonl"
    return checksums.hash_file(path) if path.exists() else ""


class Board:
    """A file of TensorBoard events, written at once: errors are not lost in a thread.

    Args:
      folder: made if it is not there.
      step: that the run starts from; TensorBoard hides later ones of older files.
    """

    def __init__(self, folder: pathlib.Path, step: int):
        # A second file of the same second and process would be the same file.
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{step}"
        self._path = folder / name
        with files.naming(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        version = "brain.Event:2"
        first = Event(step=step, file_version=version)
        try:
            self._add([first, Event(step=step, session_log=SessionLog(status=SessionLog.START))])
        except OSError:
            self.close()
            raise

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars.

        Args:
          step: of the run.
          values: by name.

        Raises:
          OSError: the disk is full; none of them is there.
        """
        self._add([Event(step=step, summary=summary.scalar(n, v)) for n, v in values.items()])

    def _add(self, events: Sequence[Event]) -> None:
        """Appends events in the form of TFRecord: each with its length and sums of both."""
        parts = []
        for event in events:
            event.wall_time = time.time()
            data = event.SerializeToString()
            length = struct.pack("<Q", len(data))
            for part in (length, data):
                parts += [part, struct.pack("<I", record_writer.masked_crc32c(part))]
        _append(self._file, b"".join(parts), self._path)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


def _append(descriptor: int, data: bytes, path: pathlib.Path) -> None:
    """Appends to a file, all or nothing.

    Raises:
      OSError: the disk is full; the file is as it was.
    """
    before = os.fstat(descriptor).st_size
    with files.naming(path):
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(descriptor, left) :]
        except OSError:
            os.ftruncate(descriptor, before)
            raise
