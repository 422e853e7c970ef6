"""Trains and evaluates the systems on the embedded digits; the table and a page grow row by row.

    python experiments/quickstart.py                      # seven systems, their rivals, baselines
    python experiments/quickstart.py --systems=m2at,claf
    python experiments/quickstart.py --systems=all --workdir=/tmp/q

The page is runs/quickstart/report.html. Systems run in a process for each core, each with its
output in WORKDIR/SYSTEM/log.txt; one that fails is a red row. Interrupted (Ctrl-C), the same
command goes on where it was, and finished systems are not run again.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import app, flags

from jaxdefense import checksums, extras, files, interrupts, validate

# What the scripts import, by the extra that brings it.
NEEDED = {name: extras.MODULES[name] for name in ("train", "plots")} | {"digits": {"sklearn"}}


def missing_extras(needed: Mapping[str, Iterable[str]] = NEEDED) -> str:
    """One line that names the modules that are not installed and the command that installs them.

    Args:
      needed: {extra: modules}.

    Returns:
      The line; empty if all are there.
    """
    lacking = {
        extra: names
        for extra, modules in needed.items()
        if (names := [name for name in sorted(modules) if not _is_installed(name)])
    }
    if not lacking:
        return ""
    modules = ", ".join(dict.fromkeys(name for names in lacking.values() for name in names))
    return f"this script needs {modules}: pip install 'jaxdefense[{','.join(lacking)}]'"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # an import hook may raise instead
        return False


if missing := missing_extras():
    sys.exit(f"error: {missing}")
else:
    import configs
    import quickstart_board as board
    import quickstart_plan as plan
    from unattended import (
        available_cores,
        check_writable,
        exit_code,
        interrupt_on_signals,
        parse_flags,
    )

SYSTEMS = flags.DEFINE_string(
    "systems", "", "Names with commas between; all; default the seven, their rivals, baselines."
)
VARIANT = flags.DEFINE_string("variant", "digits", "Of each config; digits_debug takes seconds.")
WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Folder of the runs and the report.")
RECORDS = flags.DEFINE_string("records", None, "Keep the records in this folder too.")
PROCESSES = flags.DEFINE_integer("processes", None, "Default one a core, at most 4.", lower_bound=1)
PROGRESS = flags.DEFINE_bool("progress", True, "Show what runs; without, only finished rows.")

WORKER = (sys.executable, str(pathlib.Path(__file__).parent / "quickstart_worker.py"))
RECORD_KEYS = ("config", "results", "seconds", "training")
MEMORY = 1.2e9  # bytes that a process may need
ENDING = interrupts.Ending("the same command goes on from here", watched=False)
PAUSE = 5.0  # between two pages, as a multiple of what one takes


def quick_compilation() -> str:
    """XLA's flags that compile in half the time what then runs a little slower.

    On so small networks compilation is most of the time, and the steps are little of it.
    """
    xla_flags = "--xla_backend_optimization_level=1 --xla_cpu_parallel_codegen_split_count=1"
    if importlib.metadata.version("jax").startswith("0.10."):  # later ones know no such flag
        xla_flags += " --xla_cpu_use_fusion_emitters=false"
    return xla_flags


def worker_environment() -> dict[str, str]:
    """The environment of the workers: the CPU and quick compilation, unless the user says other."""
    environment = {"JAX_PLATFORMS": "cpu", **os.environ}
    if environment["JAX_PLATFORMS"] == "cpu":
        environment.setdefault("XLA_FLAGS", quick_compilation())
    return environment


def available_memory() -> float:
    """Bytes that are free for new processes; infinite where the system does not tell."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    sizes = dict(line.split(":") for line in lines)
    return 1024 * float(sizes["MemAvailable"].split()[0])


def count_processes(systems: int) -> int:
    """How many processes run the systems: one a core, as far as the memory reaches.

    Args:
      systems: how many there are.
    """
    if PROCESSES.value:
        return min(PROCESSES.value, systems)
    if worker_environment()["JAX_PLATFORMS"] != "cpu":
        return 1  # two do not share an accelerator's memory
    count = min(len(available_cores()), 4, systems)
    if (fit := int(available_memory() // MEMORY)) < count:
        count = max(fit, 1)
        print(f"{available_memory() / 1e9:.1f} GB of memory are free: {count} process at a time")
    return count


class Worker:
    """A process that runs one system at a time, and a thread that reads what it says.

    Args:
      number: of the worker.
      cores: that it is kept to; none is any.
      events: gets (worker, message); the message is None when the process has ended.
      folder: where its output before its first system goes.
    """

    def __init__(
        self, number: int, cores: Sequence[int], events: queue.Queue, folder: pathlib.Path
    ):
        self.number, self.cores = number, cores
        self.row: board.Row | None = None
        self.ready = self.resumed = False
        self._log = folder / f"worker-{number}.txt"
        before = os.sched_getaffinity(0) if cores else None
        if before:
            os.sched_setaffinity(0, cores)  # the child inherits it, so XLA starts as many threads
        try:
            with self._log.open("w") as log:
                self._process = subprocess.Popen(
                    WORKER,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=worker_environment(),
                    start_new_session=True,  # Ctrl-C goes to the parent alone
                )
        finally:
            if before:
                os.sched_setaffinity(0, before)
        self._reader = threading.Thread(target=self._read, args=(events,), daemon=True)
        self._reader.start()

    def _read(self, events: queue.Queue) -> None:
        # Closes the pipes and waits for the end; a task that nobody read is no matter.
        with contextlib.suppress(BrokenPipeError), self._process:
            for line in self._process.stdout:
                events.put((self, json.loads(line)))
        events.put((self, None))

    def begin(self, row: board.Row) -> None:
        """Gives it a system.

        Args:
          row: of the system.
        """
        self.row = row
        self.resumed = (row.workdir / "config.json").exists()
        row.state, row.began = "training", time.monotonic()
        task = {"name": row.name, "config": row.config, "workdir": str(row.workdir)}
        with contextlib.suppress(BrokenPipeError, ValueError):  # just died, as `_read` will say
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()

    @property
    def killed(self) -> bool:
        """Whether a signal ended the process, as where the memory runs out."""
        return self._process.returncode is not None and self._process.returncode < 0

    def why_ended(self) -> str:
        """How the process ended, and the last line that it wrote."""
        code = self._process.returncode
        ended = f"the process ended with code {code}"
        if code < 0:
            ended = f"the process was killed by {signal.Signals(-code).name}"
            ended += " (out of memory?)" if -code == signal.SIGKILL else ""
        log = self.row.workdir / "log.txt" if self.ready and self.row else self._log
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        return f"{ended}: {lines[-1]}" if lines else ended

    def stop(self) -> None:
        """Asks it to save what it trains and to end."""
        self._process.terminate()

    def wait(self) -> None:
        """Waits until it has ended."""
        self._reader.join()

    def kill(self) -> None:
        """Ends it at once."""
        self._process.kill()
        self.wait()


def build_page(rows: Sequence[board.Row]) -> str:
    """The page of what is done, what failed and what waits, in HTML.

    Args:
      rows: of all systems.
    """
    # Imported when the workers run already: they bring JAX.
    from jaxdefense.evaluation import records, report

    return report.leaderboard(
        [records.load(row.record_path) for row in rows if row.state == "done"],
        title="jaxdefense on digits",
        waiting=[row.config["name"] for row in rows if row.state not in ("done", "failed")],
        failed={row.config["name"]: row.reason for row in rows if row.state == "failed"},
    )


class Page:
    """Writes the page in a thread, seldom enough to leave the cores to the workers.

    Args:
      path: of the page.
      rows: of all systems.

    Attributes:
      error: of the latest page, or None where it was written.
      written: whether there is a page.
    """

    def __init__(self, path: pathlib.Path, rows: Sequence[board.Row]):
        self.path, self._rows = path, rows
        self.error: Exception | None = None
        self.written = False
        self._closing = False
        self._asked = threading.Event()
        self._asked.set()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def renew(self) -> None:
        """Asks for a page with the rows as they are now."""
        self._asked.set()

    def close(self) -> None:
        """Writes the last page."""
        self._closing = True
        self._asked.set()
        self._thread.join()

    def _run(self) -> None:
        last = False
        while not last:
            self._asked.wait()
            self._asked.clear()
            last = self._closing  # before the page is built: it then shows everything
            began = time.monotonic()
            try:
                files.write_text(self.path, build_page(self._rows))
            except Exception as error:  # said by the main thread; the next renewal tries again
                self.error = error
            else:
                self.error, self.written = None, True
            pause = began + (1 + PAUSE) * (time.monotonic() - began)
            while not self._closing and time.monotonic() < pause:
                time.sleep(0.1)


class Quickstart:
    """Runs the systems in workers until each is done or has failed.

    Args:
      rows: of all systems, in the order in which they begin; done ones are left as they are.
      clock: that foretells their seconds.
      page: is renewed after each row.
      folder: of the workers' own output.
      processes: how many workers.
    """

    def __init__(
        self,
        rows: Sequence[board.Row],
        clock: plan.Clock,
        page: Page,
        folder: pathlib.Path,
        processes: int,
    ):
        self.rows, self.clock, self.page, self.folder = rows, clock, page, folder
        self.processes = processes
        self.events: queue.Queue = queue.Queue()
        self.workers: list[Worker] = []
        self._retried: set[str] = set()
        self._began = time.monotonic()

    def waiting(self) -> list[board.Row]:
        """The rows that nobody has begun, in order."""
        return [row for row in self.rows if row.state == "waiting"]

    def run(self, display: board.Lines | board.Table) -> None:
        """Runs all.

        Args:
          display: shows the rows.

        Raises:
          ValueError: workers cannot start, or the page cannot be written.
        """
        while self.waiting() or any(row.running for row in self.rows):
            self._give_work()
            with contextlib.suppress(queue.Empty):  # the clock has moved all the same
                self._handle(*self.events.get(timeout=0.5))
            if self.page.error and not self.page.written:
                raise ValueError(f"the page cannot be made: {self.page.error}")
            self._show(display)
        self._show(display)

    def _show(self, display: board.Lines | board.Table) -> None:
        now = time.monotonic()
        running = {row.name: now - row.began for row in self.rows if row.running}
        names = [row.name for row in self.waiting()]
        left = self.clock.left(running, names, self.processes)
        display.update(self.rows, left, now - self._began)

    def _give_work(self) -> None:
        """Each idle worker begins a row; workers that are missing are started."""
        idle = [worker for worker in self.workers if worker.row is None]
        numbers = set(range(self.processes)) - {worker.number for worker in self.workers}
        for row in self.waiting():
            if idle:
                worker = idle.pop()
            elif numbers:
                number = min(numbers)
                numbers.remove(number)
                worker = Worker(number, self._cores(number), self.events, self.folder)
                self.workers.append(worker)
            else:
                return
            worker.begin(row)

    def _cores(self, number: int) -> list[int]:
        """A worker's share of the cores; none where it may use all or cannot be kept to some."""
        if not hasattr(os, "sched_setaffinity") or self.processes == 1:
            return []
        cores = available_cores()
        return cores[number :: self.processes] or cores

    def _handle(self, worker: Worker, message: Mapping[str, Any] | None) -> None:
        """What a worker says changes its row."""
        row = worker.row
        if message is None:
            self.workers.remove(worker)
            if not worker.ready and not worker.killed:  # every other would end in the same way
                raise ValueError(f"a worker cannot start: {worker.why_ended()}")
            if not worker.ready and row.name not in self._retried:
                self._retried.add(row.name)
                row.state = "waiting"
            elif row is not None:
                self._fail(row, worker.why_ended())
            return
        event = message["event"]
        if event == "ready":
            worker.ready = True
            return
        if event == "evaluating":
            row.state = "evaluating"
            return
        worker.row = None
        if event == "failed":
            self._fail(row, message["reason"])
            return
        seconds = time.monotonic() - row.began
        row.finish(json.loads(row.record_path.read_text()), seconds)
        if not worker.resumed:
            self.clock.measured(row.name, seconds)
        keep(row)
        self.page.renew()

    def _fail(self, row: board.Row, reason: str) -> None:
        row.seconds = time.monotonic() - row.began
        row.state, row.reason = "failed", reason.strip().splitlines()[0]
        self.page.renew()

    def interrupt(self) -> None:
        """Lets the workers save what they train; a second Ctrl-C ends them at once."""
        try:
            for worker in self.workers:
                worker.stop()
            for worker in self.workers:
                worker.wait()
        except KeyboardInterrupt:
            self.kill()

    def kill(self) -> None:
        """Ends all workers at once."""
        for worker in self.workers:
            worker.kill()


def keep(row: board.Row) -> None:
    """Copies a row's record to --records, where that is given.

    Args:
      row: that is done.
    """
    if RECORDS.value:
        path = pathlib.Path(RECORDS.value) / f"{row.name}.json"
        try:
            files.write_text(path, row.record_path.read_text())
        except OSError as error:  # said at the end: what still trains is not lost by it
            row.unkept = str(error)


def read_object(path: pathlib.Path, keys: Sequence[str] = ()) -> dict[str, Any]:
    """Reads a file of a workdir.

    Args:
      path: of a JSON file.
      keys: that it must have.

    Raises:
      ValueError: it cannot be read, is no JSON object or lacks a key; says the way out.
    """
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
        found = checksums.unseal(found)
        if lacking := [key for key in keys if key not in found]:
            raise ValueError(f"lacks {', '.join(lacking)}")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and run this again") from error
    return found


def make_rows(names: Sequence[str], folder: pathlib.Path) -> list[board.Row]:
    """The systems' rows; those whose record is there are done.

    Args:
      names: of the systems.
      folder: of their workdirs.

    Raises:
      ValueError: a workdir of another config, or a damaged file there.
    """
    rows = []
    for name in names:
        config = json.loads(configs.load(name, VARIANT.value).to_json())
        row = board.Row(name, config, folder / name)
        path = row.workdir / "config.json"
        record = read_object(row.record_path, RECORD_KEYS) if row.record_path.exists() else None
        before = read_object(path) if path.exists() else config
        if before != config or (record and record["config"] != config):
            raise ValueError(
                f"{row.workdir} holds a run of another config; remove it, or choose another "
                f"--workdir"
            )
        if record:
            row.finish(record, record["seconds"] + record["training"]["seconds"])
            keep(row)
        rows.append(row)
    return rows


def command() -> str:
    """This command: given again, it goes on, and runs what has failed anew."""
    return shlex.join([sys.executable, *sys.argv])


def print_results(rows: Sequence[board.Row]) -> None:
    """Prints the table and where its numbers come from.

    Args:
      rows: of all systems.
    """
    from jaxdefense.evaluation import records, tables

    found = [records.load(row.record_path) for row in rows if row.state == "done"]
    if found:
        print(f"\n{tables.accuracy_table(found)}\n\n{tables.provenance(found)}")


def run() -> int:
    """Runs what the flags ask for; returns the exit code.

    Raises:
      ValueError: an unknown system or variant, a workdir of another config, one that is damaged,
        not writable or in use by another quickstart.
    """
    names = plan.select(SYSTEMS.value)
    for name in names:
        configs.load(name, VARIANT.value)  # an unknown variant is said before a folder is made
    for option, path in (("--workdir", WORKDIR.value), ("--records", RECORDS.value or ".")):
        validate.check_folder(option, path)
    folder = pathlib.Path(WORKDIR.value)
    for path in [folder, *([pathlib.Path(RECORDS.value)] if RECORDS.value else [])]:
        check_writable(path)
    with files.locked(folder / "quickstart.lock", "quickstart"):
        files.remove_leftovers(folder)
        return run_systems(names, folder)


def run_systems(names: Sequence[str], folder: pathlib.Path) -> int:
    """Runs systems in a folder that is kept for this process; returns the exit code.

    Args:
      names: of the systems.
      folder: of the runs.

    Raises:
      ValueError: an unknown variant, or a workdir of another config or with a damaged file.
    """
    began = time.monotonic()
    clock = plan.Clock(plan.committed_seconds())
    rows = make_rows(plan.order(names, clock), folder)
    waiting = sum(row.state == "waiting" for row in rows)
    processes = count_processes(max(waiting, 1))
    print(f"page: {folder / 'report.html'}", flush=True)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # this process draws pages, and no more
    interrupt_on_signals()
    page = Page(folder / "report.html", rows)
    work = Quickstart(rows, clock, page, folder, processes)
    try:
        with board.make(progress=PROGRESS.value) as display:
            work.run(display)
        page.close()
    except KeyboardInterrupt as error:
        print("\ninterrupted: saving; Ctrl-C again ends at once", flush=True)
        work.interrupt()
        print(f"this goes on from here: {command()}")
        return exit_code(error)
    except BrokenPipeError:  # nobody reads what this prints any more
        work.interrupt()
        raise
    finally:
        work.kill()
    print_results(rows)
    failed = [row.name for row in rows if row.state == "failed"]
    for name in failed:
        log = folder / name / "log.txt"  # none where the process ended before it began
        print(f"failed: {name}" + (f", see {log}" if log.exists() else ""))
    if failed:
        print(f"to try again, without what is done: {command()}")
    unkept = [row for row in rows if row.unkept]
    for row in unkept:
        print(f"the record of {row.name} is not in {RECORDS.value}: {row.unkept}")
    if page.error:
        print(f"the page could not be made: {page.error}")
    print(f"\npage: {page.path}\n{board.describe_seconds(time.monotonic() - began)} min in all")
    return 1 if failed or unkept or page.error else 0


def main(argv):
    if len(argv) > 1:
        sys.exit(f"error: unexpected arguments: {argv[1:]}")
    try:
        with interrupts.one_line_endings(ENDING):
            code = run()
            sys.stdout.flush()
    except ValueError as error:
        sys.exit(f"error: {error}")
    sys.exit(code)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
