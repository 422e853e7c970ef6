"""The log of a run: metrics.jsonl, and the same numbers as TensorBoard events."""

import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

from tensorboardX import event_file_writer, summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tqdm import tqdm

from jaxdefense import files
from jaxdefense.runs.run import read_log


class Log:
    """Scalars as JSON lines and TensorBoard events; a resumed run goes on where it was.

    Args:
      workdir: of the run.
      step: that the run starts from; what a killed run wrote of later ones is dropped.
      unfinished: what the run has begun at that step: of a validation that is due again, what was
        written is dropped too.

    Raises:
      OSError: the disk is full or read-only; the log is as it was.
    """

    def __init__(
        self, workdir: pathlib.Path, step: int, unfinished: Mapping[str, Any] | None = None
    ):
        self._path = workdir / "metrics.jsonl"
        again = bool((unfinished or {}).get("validation"))
        if self._path.exists():  # what a killed run wrote after its last checkpoint
            kept = [
                line
                for line in read_log(self._path)
                if line["step"] <= step
                and not (again and line["step"] == step and "validation_clean" in line)
            ]
            files.write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
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
        line = (json.dumps({"step": step, **more, **values}) + "\n").encode()
        before = os.fstat(self._file).st_size
        with files.naming(self._path):
            try:
                left = memoryview(line)
                while left:
                    left = left[os.write(self._file, left) :]
            except OSError:
                os.ftruncate(self._file, before)  # no half of a line stays
                raise
        if self._board:
            try:
                self._board.write(step, values)
            except OSError as error:
                self._give_up_board(error)

    def _give_up_board(self, error: OSError) -> None:
        """Says that TensorBoard gets no more; metrics.jsonl holds the same numbers."""
        self._board = None
        tqdm.write(f"no more TensorBoard events: {files.explain(error)}", file=sys.stderr)

    def close(self) -> None:
        """Closes both files, everything written."""
        os.close(self._file)
        if self._board:
            self._board.close()


class Board:
    """A file of TensorBoard events, written at once: errors are not lost in a thread.

    Args:
      folder: made if it is not there.
      step: that the run starts from; TensorBoard hides later ones of older files.
    """

    def __init__(self, folder: pathlib.Path, step: int):
        with files.naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # A second file of the same second and host would replace the first.
            suffix = f".{os.getpid()}.{step}"
            self._writer = event_file_writer.EventsWriter(str(folder / "events"), suffix)
        self._folder = folder
        version = "brain.Event:2"
        self._add(Event(step=step, file_version=version))
        self._add(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
        self._flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars.

        Args:
          step: of the run.
          values: by name.
        """
        for name, value in values.items():
            self._add(Event(step=step, summary=summary.scalar(name, value)))
        self._flush()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        with files.naming(self._folder):
            self._writer.write_event(event)

    def _flush(self) -> None:
        with files.naming(self._folder):
            self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()
