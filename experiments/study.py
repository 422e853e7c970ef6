"""Fills a grid of rows (system, data set, network, seed, protocol), the most valuable first.

    python experiments/study.py --list                  # the rows, what is done, expected minutes
    python experiments/study.py --hours=3 --grid=cpu
    python experiments/study.py --hours=0.15 --grid=gpu  # a slice of nine minutes
    python experiments/study.py --rows='m2at-*,trades-*'
    python experiments/study.py --again                  # what failed is tried once more
    python experiments/study.py --choose                 # measures candidates of the reduced recipe

A row trains in WORKDIR/ROW and leaves its records in RECORDS; a row whose records are there is
done. A student's teacher is trained first, where its run is not in WORKDIR. Interrupted, killed or
out of time, the same command goes on where it was: training and AutoAttack in the middle of a row
too. A row that fails is kept with its reason and left out until --again. ROW's output is in
WORKDIR/ROW/log.txt. As rows finish, the tables of docs and WORKDIR/report.html are renewed.
"""

import dataclasses
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO

import quickstart_board as board
import quickstart_plan as plan
import study_grid as grid
from absl import app, flags
from unattended import available_cores, check_writable, exit_code, interrupt_on_signals, parse_flags

from jaxdefense import checksums, files, interrupts, streams

HERE = pathlib.Path(__file__).parent
HOURS = flags.DEFINE_float("hours", None, "Stop after so long; default when all is done.", 0.0)
GRID = flags.DEFINE_enum("grid", "cpu", grid.GRIDS, "Which rows; debug takes minutes.")
ROWS = flags.DEFINE_list("rows", ["*"], "Only rows or candidates so named, with * and ?.")
AGAIN = flags.DEFINE_bool("again", False, "Try again what has failed.")
LIST = flags.DEFINE_bool("list", False, "Print the rows with their minutes, and run nothing.")
CHOOSE = flags.DEFINE_bool("choose", False, "Measure candidates of the reduced recipe instead.")
MINUTES = flags.DEFINE_float("minutes", 8.0, "Of training for each candidate of --choose.", 0.0)
SIDE_BY_SIDE = flags.DEFINE_integer(
    "side_by_side", 1, "Rows at a time, each on its share of the cores.", lower_bound=1
)
WORKDIR = flags.DEFINE_string("workdir", "runs/study", "Folder of the runs.")
RECORDS = flags.DEFINE_string("records", str(HERE / "records" / "study"), "Folder of the records.")
RENEW = flags.DEFINE_bool("renew", True, "Renew docs and the report as rows finish.")
PROGRESS = flags.DEFINE_bool("progress", True, "Show what runs; without, only finished rows.")

RUN = (sys.executable, str(HERE / "study_step.py"))
RENEWAL = (sys.executable, str(HERE / "tables.py"))
WAIT = 120.0  # seconds that a step has for saving, once it is asked to end
PAUSE = 0.2  # seconds between two looks at the processes
MOST_DEVICES = 8
TEACHING = "training its teacher"


@dataclasses.dataclass(frozen=True)
class Step:
    """A command of a row.

    Attributes:
      state: what is shown while it runs: "training", `TEACHING` or a protocol.
      words: script and arguments.
      record: that it leaves; none for training.
      teacher: that it trains, if it does.
    """

    state: str
    words: tuple[str, ...]
    record: pathlib.Path | None = None
    teacher: "Entry | None" = None


@dataclasses.dataclass
class Entry(board.Row):
    """A row of the grid and how far it is; states beside those of `board.Row` are the protocols.

    Attributes:
      row: of the grid.
      records: {protocol: path}.
    """

    row: grid.Row = dataclasses.field(default_factory=lambda: grid.Row("", ""))
    records: Mapping[str, pathlib.Path] = dataclasses.field(default_factory=dict)

    @property
    def running(self) -> bool:
        """Whether a process is at it."""
        return self.state not in ("waiting", "done", "failed")

    @property
    def state_path(self) -> pathlib.Path:
        """What is known of it: seconds of each step, devices, ranking, what runs, why it failed."""
        return self.workdir / "study.json"

    def read_state(self) -> dict[str, Any]:
        """What is known of it; empty for a row that never began.

        Raises:
          ValueError: the file is damaged.
        """
        return read_object(self.state_path) if self.state_path.exists() else {}

    def write_state(self, **changes: Any) -> None:
        """Changes what is known of it.

        Args:
          **changes: keys and values; None removes a key.
        """
        state = {**self.read_state(), **changes}
        state = {key: value for key, value in state.items() if value is not None}
        self.workdir.mkdir(parents=True, exist_ok=True)
        files.write_text(self.state_path, json.dumps(state, indent=1) + "\n")

    @property
    def trained(self) -> bool:
        """Whether its training has ended."""
        return "training" in self.read_state().get("seconds", {})

    def open_steps(self, teacher: "Entry | None" = None) -> list[Step]:
        """What is still to be run, in order; nothing for a row whose records are all there.

        Args:
          teacher: that it learns from, where it does.
        """
        open_records = {name: path for name, path in self.records.items() if not path.exists()}
        if not open_records:
            return []
        found = []
        if not self.trained:
            if teacher and not teacher.trained:
                words = grid.training_words(teacher.row, teacher.workdir)
                found.append(Step(TEACHING, words, teacher=teacher))
            words = grid.training_words(self.row, self.workdir, teacher and teacher.workdir)
            found.append(Step("training", words))
        for protocol, path in open_records.items():
            words = grid.judging_words(self.row, protocol, self.workdir, path)
            found.append(Step(protocol, words, path))
        return found

    def take_records(self) -> None:
        """Takes accuracies and seconds from its records: it is done.

        Raises:
          ValueError: one of them is damaged or was edited.
        """
        found = {name: read_record(path) for name, path in self.records.items()}
        self.results = {}
        for protocol, record in found.items():
            if protocol not in grid.OF_PAPERS:
                primary = next(iter(record["results"].values()))
                self.results |= {name: result["accuracy"] for name, result in primary.items()}
        training = next(iter(found.values())).get("training", {}).get("seconds", 0.0)
        self.seconds = training + sum(record["seconds"] for record in found.values())
        self.state = "done"


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
      path: of the file.

    Raises:
      ValueError: it is damaged; names it.
    """
    try:
        return checksums.read_object(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and run this again") from error


def read_record(path: pathlib.Path) -> dict[str, Any]:
    """Reads a record, as `jaxdefense.evaluation.records.load` does, which needs JAX.

    Args:
      path: of the file.

    Raises:
      ValueError: it is damaged or was edited; names it.
    """
    sealed = read_object(path)
    try:
        record = checksums.unseal(sealed)
        if lacking := [key for key in ("config", "results", "seconds") if not record.get(key)]:
            raise ValueError(f"it has no {', no '.join(lacking)}")
    except ValueError as error:
        message = f"{path} is damaged or was edited: {error}; remove it and run this again"
        raise ValueError(message) from error
    return record


def without_places(value: Any) -> Any:
    """A config without the paths of other runs, which say where a thing lies, not what it is.

    Args:
      value: plain.
    """
    if isinstance(value, Mapping):
        return {k: without_places(inner) for k, inner in value.items() if k != "workdir"}
    return [without_places(inner) for inner in value] if isinstance(value, list) else value


def make_entries(
    rows: Iterable[grid.Row], workdir: pathlib.Path, records: pathlib.Path, *, again: bool = False
) -> list[Entry]:
    """The rows' entries: done, failed or waiting, as the files say.

    Args:
      rows: of the grid.
      workdir: folder of the runs.
      records: folder of the records.
      again: what has failed waits once more.
    """
    entries = []
    for row in rows:
        folder = records / row.folder
        paths = {protocol: folder / protocol / f"{row.name}.json" for protocol in row.protocols}
        config = grid.settings(row.resolved(grid.ROBUST))
        entry = Entry(row.name, config, workdir / row.name, row=row, records=paths)
        try:
            _read_entry(entry, again)
        except ValueError as error:  # the other rows go on
            entry.state, entry.reason = "failed", str(error)
        entries.append(entry)
    return entries


def _read_entry(entry: Entry, again: bool) -> None:
    """Finds out whether a row is done, failed or waits.

    Raises:
      ValueError: a record of another config, as after a change of the recipe, or a damaged file.
    """
    for path in entry.records.values():
        if path.exists() and entry.row.best is None:
            check_config(path, entry.config)
    if all(path.exists() for path in entry.records.values()):
        entry.take_records()
    elif "failed" in (state := entry.read_state()):
        if again:
            entry.write_state(failed=None)
        else:
            entry.state, entry.reason = "failed", state["failed"]


def check_config(path: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Refuses a record that is not of a row's config.

    Args:
      path: of the record.
      config: plain values.

    Raises:
      ValueError: it is of another one; names the sections that differ.
    """
    found, now = without_places(read_record(path)["config"]), without_places(config)
    if found != now:
        differ = [key for key in now if not isinstance(found, dict) or found.get(key) != now[key]]
        raise ValueError(
            f"{path} is of another config than the row's now: {', '.join(differ)} differ; remove "
            f"the record, or choose another --records"
        )


class Ranking:
    """The robust rows of a variant, the best first: teachers, and what the transforms are tried on.

    Args:
      entries: of all rows that are looked at.
      records: folder of the records.
    """

    def __init__(self, entries: Sequence[Entry], records: pathlib.Path):
        self._entries, self._records = entries, records

    def ready(self, variant: str) -> bool:
        """Whether no robust row of the variant waits or runs any more.

        Args:
          variant: of the rows.
        """
        rivals = [
            entry
            for entry in self._entries
            if entry.row.config in grid.ROBUST
            and entry.row.variant == variant
            and entry.row.seed == 0
        ]
        return all(entry.state in ("done", "failed") for entry in rivals)

    def of(self, row: grid.Row) -> list[str]:
        """The configs by AutoAttack's accuracy of seed 0; for a student its teacher first.

        All students of a variant have one teacher: that of those which have a record.

        Args:
          row: whose variant it is.

        Raises:
          ValueError: no robust row has a record, or one is damaged.
        """
        accuracies, row_of = {}, {name: grid.Row(name, row.variant) for name in grid.ROBUST}
        for name, rival in row_of.items():
            if (path := self._find(rival)).exists():
                primary = next(iter(read_record(path)["results"].values()))
                accuracies[name] = primary["autoattack"]["accuracy"]
        found = grid.rank(accuracies)
        if row.needs_teacher:
            runs = {rival.name: name for name, rival in row_of.items()}
            taught = [runs[name] for name in self._teachers(row.variant) if name in runs]
            found = [*taught[:1], *(name for name in found if name not in taught[:1])]
        if not found:
            raise ValueError(
                f"no robust row of {row.variant} has a record in {self._records}: add e.g. "
                f"{row_of[grid.ROBUST[0]].name} to --rows"
            )
        return found

    def _teachers(self, variant: str) -> list[str]:
        """The names of the runs that taught the variant's students."""
        students = [grid.Row(name, variant) for name in grid.STUDENTS]
        known = [path for student in students if (path := self._find(student)).exists()]
        defenses = [read_record(path)["config"]["defense"] for path in known]
        return [pathlib.PurePath(defense["teacher"]["workdir"]).name for defense in defenses]

    def _find(self, row: grid.Row) -> pathlib.Path:
        return self._records / row.folder / "autoattack" / f"{row.name}.json"


@dataclasses.dataclass
class Slot:
    """A share of the cores and what runs on it.

    Attributes:
      cores: that its processes are kept to; none is any.
      entry: that it is at.
      steps: of the entry, the running one first.
      process: of the first step.
      began: time.monotonic() at that step's start.
    """

    cores: Sequence[int]
    entry: Entry | None = None
    steps: list[Step] = dataclasses.field(default_factory=list)
    process: subprocess.Popen | None = None
    began: float = 0.0

    def free(self) -> None:
        """Lets go of an entry whose process has ended."""
        self.entry, self.steps, self.process = None, [], None


def share_cores(count: int) -> list[list[int]]:
    """The cores of each of so many slots; empty for any core.

    Args:
      count: of slots.
    """
    if count == 1 or not hasattr(os, "sched_setaffinity"):
        return [[] for _ in range(count)]
    cores = available_cores()
    return [cores[i::count] or cores for i in range(count)]


def count_devices(cores: int, batch_size: int) -> int:
    """How many devices of JAX a training has: at most one a core, and equal shares of a batch.

    Args:
      cores: that it may use.
      batch_size: of the training.
    """
    most = min(cores, MOST_DEVICES)
    return next(count for count in range(most, 0, -1) if batch_size % count == 0)


def start_process(
    words: Sequence[str], cores: Sequence[int], devices: int, log: BinaryIO
) -> subprocess.Popen:
    """Starts a command whose output goes to a file, in a session of its own.

    Args:
      words: of the command.
      cores: that it is kept to; none is any.
      devices: of JAX that the CPU is divided into, where it is the CPU.
      log: of its output.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment.setdefault("JAX_NUM_CPU_DEVICES", str(devices))
    before = os.sched_getaffinity(0) if cores else None
    if before:
        os.sched_setaffinity(0, cores)  # the child inherits it, so XLA starts as many threads
    try:
        return subprocess.Popen(
            words,
            stdin=subprocess.PIPE,  # closed by our end, however we end
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C goes to the parent alone
        )
    finally:
        if before:
            os.sched_setaffinity(0, before)


class Renewal:
    """Renews the tables of docs and the report beside the rows, one process at a time.

    Args:
      words: of the command; none renews nothing.
      log: of its output.
    """

    def __init__(self, words: Sequence[str], log: pathlib.Path):
        self._words, self._log = words, log
        self._process: subprocess.Popen | None = None
        self._asked = False

    def ask(self) -> None:
        """A row has finished."""
        self._asked = bool(self._words)
        self.look()

    def look(self) -> None:
        """Starts the command if it is asked for and does not run already."""
        if self._process is not None and self._process.poll() is not None:
            if self._process.returncode:
                print(f"the tables could not be renewed, see {self._log}", flush=True)
            self._process = None
        if self._asked and self._process is None:
            self._asked = False
            with self._log.open("wb") as log:
                self._process = start_process(self._words, (), 1, log)

    def finish(self) -> None:
        """Waits until the tables show everything."""
        while self._asked or self._process is not None:
            self.look()
            time.sleep(PAUSE)

    def stop(self) -> None:
        """Ends it, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class Study:
    """Runs rows until all are over or the time is.

    Args:
      entries: in the order in which they begin.
      ranking: of the robust rows.
      clock: that foretells seconds.
      slots: of rows side by side.
      renewal: of the tables.
      deadline: time.monotonic() at which what runs is asked to save and end.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        ranking: Ranking,
        clock: plan.Clock,
        slots: Sequence[Slot],
        renewal: Renewal,
        deadline: float = float("inf"),
    ):
        self.entries, self.ranking, self.clock, self.slots = entries, ranking, clock, slots
        self.renewal, self.deadline = renewal, deadline
        self._began = time.monotonic()

    def run(self, display: board.Lines | board.Table) -> None:
        """Runs the rows.

        Args:
          display: shows them.
        """
        while time.monotonic() < self.deadline:
            for slot in self.slots:
                self._look(slot)
            for slot in self.slots:
                if slot.entry is None:
                    self._begin_next(slot)
            self.renewal.look()
            self._show(display)
            if not any(slot.entry for slot in self.slots):
                return  # what still waits cannot begin
            time.sleep(PAUSE)
        self.stop()
        self._show(display)

    def _show(self, display: board.Lines | board.Table) -> None:
        now = time.monotonic()
        running = {entry.name: now - entry.began for entry in self.entries if entry.running}
        waiting = [entry.name for entry in self.entries if entry.state == "waiting"]
        left = self.clock.left(running, waiting, len(self.slots))
        display.update(self.entries, left, now - self._began)

    def _begin_next(self, slot: Slot) -> None:
        """Begins the first waiting row that can begin."""
        for entry in self.entries:
            if entry.state != "waiting":
                continue
            chosen = entry.row.best or entry.row.needs_teacher
            if chosen and not self.ranking.ready(entry.row.variant):
                continue
            if entry.row.needs_teacher and self._teaching(entry.row.variant):
                continue
            try:
                self._begin(slot, entry)
            except ValueError as error:
                self._fail(entry, str(error))
                continue
            return

    def _teaching(self, variant: str) -> bool:
        """Whether a teacher of the variant is in training."""
        running = [slot for slot in self.slots if slot.steps]
        return any(slot.steps[0].teacher and slot.entry.row.variant == variant for slot in running)

    def _begin(self, slot: Slot, entry: Entry) -> None:
        """Begins a row.

        Raises:
          ValueError: there is no robust row that it could learn from or build on.
        """
        row, teacher = entry.row, None
        if row.best or row.needs_teacher:
            # Kept: a run that goes on has the same teacher, whatever was measured meanwhile.
            ranking = entry.read_state().get("ranking") or self.ranking.of(row)
            if row.needs_teacher:
                found = grid.Row(ranking[0], row.variant)
                workdir = entry.workdir.parent / found.name
                teacher = Entry(found.name, grid.settings(found), workdir, row=found)
            entry.row = row.resolved(ranking)
            entry.config = grid.settings(entry.row)
            entry.write_state(ranking=ranking)
        steps = entry.open_steps(teacher)
        cores = len(slot.cores) or len(available_cores())
        for one in (entry, teacher) if teacher else (entry,):
            # As many devices as it began with: a run that goes on with others has other bits.
            devices = count_devices(cores, one.config["train"]["batch_size"])
            one.write_state(devices=one.read_state().get("devices", devices))
        entry.began = time.monotonic()
        slot.entry, slot.steps = entry, steps
        self._start(slot)

    def _start(self, slot: Slot) -> None:
        """Starts the slot's first step."""
        entry, step = slot.entry, slot.steps[0]
        script, *arguments = step.words
        entry.state, slot.began = step.state, time.monotonic()
        entry.write_state(running=step.state)
        devices = (step.teacher or entry).read_state()["devices"]
        if step.record:
            step.record.parent.mkdir(parents=True, exist_ok=True)
        with (entry.workdir / "log.txt").open("ab") as log:
            log.write(f"$ {shlex.join(step.words)}\n".encode())
            log.flush()
            words = (*RUN, str(HERE / script), *arguments)
            slot.process = start_process(words, slot.cores, devices, log)

    def _look(self, slot: Slot) -> None:
        """Goes on with a slot whose process has ended."""
        if slot.process is None or slot.process.poll() is None:
            return
        entry, step = slot.entry, slot.steps[0]
        if not self._take_step(slot):
            reason = why_ended(slot.process.returncode, entry.workdir / "log.txt")
            slot.free()
            self._fail(entry, reason, step.state)
        elif slot.steps:
            self._start(slot)
        else:
            slot.free()

    def _take_step(self, slot: Slot) -> bool:
        """Notes a step whose process has ended; whether it did what it was to do."""
        entry, step = slot.entry, slot.steps[0]
        slot.process.stdin.close()
        if slot.process.returncode != 0 or (step.record and not step.record.exists()):
            return False
        owner, name = (step.teacher, "training") if step.teacher else (entry, step.state)
        seconds = {**owner.read_state().get("seconds", {}), name: time.monotonic() - slot.began}
        owner.write_state(seconds=seconds)
        entry.write_state(running=None)
        del slot.steps[0]
        if not slot.steps:
            entry.take_records()
            self.clock.measured(entry.name, entry.seconds)
            self.renewal.ask()
        return True

    def _fail(self, entry: Entry, reason: str, state: str = "") -> None:
        entry.state, entry.reason = "failed", f"{state}: {reason}" if state else reason
        entry.write_state(failed=entry.reason, running=None)

    def stop(self) -> None:
        """Asks what runs to save and to end, and waits for it; its rows wait again."""
        running = [slot for slot in self.slots if slot.process is not None]
        for slot in running:
            slot.process.terminate()
        last = time.monotonic() + WAIT
        for slot in running:
            try:
                slot.process.wait(max(last - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                slot.process.kill()
                slot.process.wait()
            entry = slot.entry
            self._take_step(slot)  # it may have ended by itself meanwhile
            slot.free()
            if entry.state != "done":
                entry.state = "waiting"
                entry.write_state(running=None)

    def kill(self) -> None:
        """Ends all processes at once."""
        for slot in self.slots:
            if slot.process is not None:
                slot.process.kill()
                slot.process.wait()
        self.renewal.stop()


def why_ended(code: int, log: pathlib.Path) -> str:
    """Why a step ended: the last line that it wrote, or the signal.

    Args:
      code: of the process.
      log: of its output.
    """
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    last = lines[-1].removeprefix("error: ") if lines else ""
    return last if last and not last.startswith("$ ") else f"ended with code {code}"


def describe_hours(seconds: float) -> str:
    """Hours and minutes, e.g. 2:05 h.

    Args:
      seconds: rounded to minutes.
    """
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d} h"


def print_list(entries: Sequence[Entry], clock: plan.Clock) -> None:
    """Prints the rows in order, with the minutes that each took or should take.

    Args:
      entries: of the rows.
      clock: that foretells seconds.
    """
    left = 0.0
    for i, entry in enumerate(entries, 1):
        seconds = entry.seconds if entry.state == "done" else clock.expected(entry.name)
        left += 0.0 if entry.state in ("done", "failed") else seconds
        script, *words = grid.training_words(entry.row.resolved(grid.ROBUST), entry.workdir)
        command = shlex.join(["python", f"experiments/{script}", *words])
        if entry.row.best:
            command = f"the robust row in place {entry.row.best[0]}, with {entry.row.best[1]}"
        told = f"failed: {entry.reason}" if entry.state == "failed" else entry.state
        known = "took" if entry.state == "done" else "about"
        print(
            f"{i:4d} {entry.name}: {told}, {known} {seconds / 60:.1f} min; "
            f"{', '.join(entry.records)}; {command}"
        )
    done = sum(entry.state == "done" for entry in entries)
    print(f"{done} of {len(entries)} done; the rest takes about {describe_hours(left)}")


def print_open(entries: Sequence[Entry], clock: plan.Clock, slots: int) -> None:
    """Prints what is over, what failed, what is open, and how to go on.

    Args:
      entries: of the rows.
      clock: that foretells seconds.
      slots: rows side by side.
    """
    failed = [entry for entry in entries if entry.state == "failed"]
    waiting = [entry.name for entry in entries if entry.state == "waiting"]
    done = sum(entry.state == "done" for entry in entries)
    print(f"\n{done} done, {len(failed)} failed, {len(waiting)} open")
    for entry in failed:
        log = entry.workdir / "log.txt"
        print(f"failed: {entry.name}: {entry.reason}" + (f"; see {log}" if log.exists() else ""))
    command = [word for word in sys.argv if word not in ("--again", "--again=true")]
    again = shlex.join([sys.executable, *command])
    if waiting:
        left = clock.left({}, waiting, slots)
        print(f"open rows take about {describe_hours(left)}; this goes on: {again}")
    if failed:
        print(f"to try again what failed: {again} --again")


def make_clock(entries: Sequence[Entry], machine: str) -> plan.Clock:
    """The clock that knows what each row should take and what the done ones took.

    Args:
      entries: of the rows.
      machine: "cpu" or "gpu".
    """
    clock = plan.Clock({e.name: grid.expected_seconds(e.row, machine) for e in entries})
    for entry in entries:
        if entry.state == "done":
            clock.measured(entry.name, entry.seconds)
    return clock


def is_in_use(lock: pathlib.Path) -> bool:
    """Whether a process holds a lock.

    Args:
      lock: its file, which a killed process leaves behind.
    """
    if not lock.exists():
        return False
    try:
        with files.locked(lock, "study"):
            return False
    except ValueError:
        return True


def run() -> int:
    """Runs what the flags ask for; returns the exit code.

    Raises:
      ValueError: no row has such a name, or a folder cannot be written or is in use.
    """
    rows = grid.rows(GRID.value, ROWS.value)
    workdir, records = pathlib.Path(WORKDIR.value), pathlib.Path(RECORDS.value)
    machine = "gpu" if GRID.value == "gpu" else "cpu"
    if LIST.value:
        entries = make_entries(rows, workdir, records)
        if is_in_use(workdir / "study.lock"):
            for entry in entries:
                if entry.state == "waiting":
                    entry.state = entry.read_state().get("running", "waiting")
        print_list(entries, make_clock(entries, machine))
        return 0
    for path in (workdir, records):
        check_writable(path)
    with files.locked(workdir / "study.lock", "study"):
        files.remove_leftovers(workdir)
        entries = make_entries(rows, workdir, records, again=AGAIN.value)
        return run_entries(entries, workdir, records, machine)


def run_entries(
    entries: Sequence[Entry], workdir: pathlib.Path, records: pathlib.Path, machine: str
) -> int:
    """Runs rows in a folder that is kept for this process; returns the exit code.

    Args:
      entries: of the rows.
      workdir: folder of the runs.
      records: folder of the records.
      machine: "cpu" or "gpu".
    """
    if machine == "cpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    clock = make_clock(entries, machine)
    slots = [Slot(cores) for cores in share_cores(SIDE_BY_SIDE.value)]
    words = (*RENEWAL, "--renew", f"--html={workdir / 'report.html'}", str(records))
    renewal = Renewal(words if RENEW.value else (), workdir / "renewal.txt")
    deadline = float("inf") if HOURS.value is None else time.monotonic() + 3600 * HOURS.value
    study = Study(entries, Ranking(entries, records), clock, slots, renewal, deadline)
    interrupt_on_signals()
    code = 0
    try:
        with board.make(progress=PROGRESS.value, attack="autoattack") as display:
            study.run(display)
        renewal.finish()
    except KeyboardInterrupt as error:
        print("\ninterrupted: saving; Ctrl-C again ends at once", flush=True)
        study.stop()
        code = exit_code(error)
    finally:
        study.kill()
    print_open(entries, clock, len(slots))
    return code or int(any(entry.state == "failed" for entry in entries))


def main(argv):
    if len(argv) > 1:
        sys.exit(f"error: unexpected arguments: {argv[1:]}")
    try:
        if CHOOSE.value:
            if LIST.value:
                raise ValueError("--choose has no --list: it measures its candidates")
            import study_choose

            folder = pathlib.Path(WORKDIR.value) / "choose"
            with interrupts.one_line_endings(interrupts.Ending("the same command goes on")):
                code = study_choose.main(folder, 60 * MINUTES.value, ROWS.value)
        else:
            with streams.outliving_readers():
                code = run()
    except ValueError as error:
        sys.exit(f"error: {error}")
    sys.exit(code)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
