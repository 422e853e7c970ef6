"""Kills, damages and full disks at random; after each, the same command must end as if undisturbed.

    python experiments/soak.py                                  # 100 kills, 100 damages, 20 disks
    python experiments/soak.py --kills=5 --damages=5 --disks=2 --record=/tmp/soak.json

A kill is SIGKILL, SIGTERM or SIGINT at a random moment of a training or of an evaluation by
AutoAttack; the same command is given again. A damage changes one file of an interrupted run: the
command then ends as if undisturbed, or with one line that names the file. A full disk is a small
file system in memory (as root), elsewhere a limit of the files' size: the command ends with one
line, and goes on when there is room. "As if undisturbed" means equal parameters of both
checkpoints, an equal log and equal verdicts, bit for bit.

Interrupted, the same command goes on. Commands run in forks of this process, which has imported
what they need, with XLA's compiled programs kept in WORK/xla.
"""

import argparse
import collections
import contextlib
import importlib
import json
import os
import pathlib
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import damages

from jaxdefense import files, interrupts

HERE = pathlib.Path(__file__).parent
RECORD = HERE / "records" / "soak.json"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
KINDS = ("kills", "damages", "disks")
TIMEOUT = 600  # seconds; a command that takes longer hangs
ROOMY = "there was room"
ROOM = 64_000_000  # bytes that are more than enough for a run

# What the commands import; a fork has it at once.
IMPORTED = ("jaxdefense.train", "jaxdefense.evaluation.protocols", "jaxdefense.runs", "cli")

TRAIN = (
    "--config=pgd_at:digits_debug",
    "--config.train.length=60s",
    "--config.train.validate_every=10s",
    "--config.train.checkpoint_every=15s",
    "--config.train.steps_per_dispatch=4",
    "--config.model.width=0.25",
)
EVALUATE = ("--protocol=autoattack", "--examples=32")


class Command:
    """One of the scripts in a fork, with its output in a file.

    Args:
      script: its name.
      arguments: of it.
      output: gets what it prints.
      limit: the most bytes that a file may have; None for any.
    """

    def __init__(
        self, script: str, arguments: Sequence[str], output: pathlib.Path, limit: int | None = None
    ):
        self._output = output
        self._pid = os.fork()
        if not self._pid:
            _become(script, arguments, output, limit)

    def send(self, number: int) -> None:
        """Sends it a signal.

        Args:
          number: of the signal.
        """
        os.kill(self._pid, number)

    def wait(self, seconds: float = TIMEOUT) -> int | None:
        """Its exit code, negative for a signal; None where it still runs after some seconds.

        Args:
          seconds: to wait.
        """
        until = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > until:
                return None
            time.sleep(0.01)

    def end(self) -> int:
        """Its exit code; a command that hangs is killed.

        Raises:
          RuntimeError: it hangs.
        """
        code = self.wait()
        if code is None:
            self.send(signal.SIGKILL)
            self.wait()
            raise RuntimeError(f"hangs: {self.said()}")
        return code

    def said(self) -> str:
        """What it has printed."""
        return self._output.read_text(errors="replace")


def _become(script: str, arguments: Sequence[str], output: pathlib.Path, limit: int | None) -> None:
    """Runs a script in this process, a fork, and ends it."""
    code = 1
    try:
        with output.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        for number in SIGNALS[1:]:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        sys.argv = [str(HERE / script), *arguments]
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def in_fork(function: Callable[[], Any], output: pathlib.Path) -> Any:
    """What a function returns, called in a fork: this process itself starts no JAX.

    Args:
      function: returns plain values.
      output: a file for them.

    Raises:
      RuntimeError: it failed.
    """
    pid = os.fork()
    if not pid:
        code = 1
        try:
            output.write_text(json.dumps(function()))
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError(f"{output.name} failed")
    return json.loads(output.read_text())


def fingerprint(workdir: pathlib.Path) -> dict[str, Any]:
    """What two runs have in common that ended in the same way.

    Args:
      workdir: of a run; what it lacks is left out.

    Returns:
      Hashes of the checkpoints' parameters, what each says was chosen, the log's hash, and each
      record's verdicts.
    """
    from jaxdefense.evaluation.journal import hash_arrays
    from jaxdefense.models import zoo
    from jaxdefense.runs.checkpoint import Store
    from jaxdefense.train.log import hash_log

    found: dict[str, Any] = {}
    for kind in ("last", "best"):
        if (workdir / kind).is_dir():
            store = Store(workdir / kind)
            leaves = zoo.leaves_by_path(store.restore_as_saved("model"))
            meta = store.meta()
            own = {key: meta.get(key) for key in ("step", "unfinished")}
            found[kind] = [hash_arrays(*(leaves[name] for name in sorted(leaves))), own]
            found[f"chosen, says {kind}"] = meta.get("best")
            store.close()
    if log := hash_log(workdir):
        found["log"] = log
    for path in sorted(workdir.glob("*.json")):
        content = json.loads(path.read_text())
        if "results" in content:
            found[path.name] = content["results"]
    return found


class Soak:
    """The trials of a soak run, and where they are written down.

    Args:
      work: a folder for the runs; trials that are done are in its trials.json.
      seed: of the random moments and places.
    """

    def __init__(self, work: pathlib.Path, seed: int):
        self.work, self.seed = work, seed
        self.journal = work / "trials.json"
        self.trials: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
        if self.journal.exists():
            self.trials |= json.loads(self.journal.read_text())
        self.seconds: dict[str, float] = {}
        self.wanted: dict[str, dict[str, Any]] = {}

    def workdir(self, name: str, source: str | None = None) -> pathlib.Path:
        """A fresh workdir, empty or a copy of another.

        Args:
          name: of it.
          source: the name of the other.
        """
        path = self.work / name
        if os.path.ismount(path):  # of a soak run that was killed
            subprocess.run(["umount", str(path)], check=True)
        shutil.rmtree(path, ignore_errors=True)
        if source:
            shutil.copytree(self.work / source, path)
        return path

    def start(self, script: str, workdir: pathlib.Path, limit: int | None = None) -> Command:
        """Starts a script on a workdir.

        Args:
          script: train.py or evaluate.py.
          workdir: of the run.
          limit: see `Command`.
        """
        arguments = TRAIN if script == "train.py" else EVALUATE
        output = self.work / "output.txt"
        return Command(script, [*arguments, f"--workdir={workdir}"], output, limit)

    def prepare(self) -> None:
        """The undisturbed run: once to compile, once for its time; and an interrupted one."""
        for script in ("train.py", "evaluate.py"):
            for source in (None, None) if script == "train.py" else ("trained", "trained"):
                workdir = self.workdir("whole", source)
                began = time.monotonic()
                command = self.start(script, workdir)
                if command.end():
                    raise RuntimeError(f"the undisturbed run fails: {command.said()}")
                self.seconds[script] = time.monotonic() - began
            self.wanted[script] = self.fingerprint(workdir)
            if script == "train.py":
                self.workdir("trained", "whole")
        half = self.workdir("half")
        command = self.start("train.py", half)
        log = half / "metrics.jsonl"
        until = time.monotonic() + TIMEOUT
        while not (log.exists() and '"step": 40,' in log.read_text()):
            if time.monotonic() > until:
                raise RuntimeError(f"the run that is interrupted hangs: {command.said()}")
            time.sleep(0.01)
        command.send(signal.SIGTERM)
        if command.end() != 128 + signal.SIGTERM:
            raise RuntimeError(f"the interrupted run fails: {command.said()}")

    def fingerprint(self, workdir: pathlib.Path) -> dict[str, Any]:
        """`fingerprint`, in a fork."""
        return in_fork(lambda: fingerprint(workdir), self.work / "fingerprint.json")

    def goes_on(self, script: str, workdir: pathlib.Path) -> str:
        """Gives the command again: "well", or in what it differs from the undisturbed run."""
        command = self.start(script, workdir)
        if command.end():
            return f"the same command fails: {command.said()}"
        return self.compare(script, workdir)

    def compare(self, script: str, workdir: pathlib.Path, but: Sequence[str] = ()) -> str:
        """ "well" where a run ended as the undisturbed one; else in what it differs.

        Args:
          script: that ran.
          workdir: of the run.
          but: parts of its fingerprint that may differ.
        """
        found, wanted = self.fingerprint(workdir), self.wanted[script]
        keys = [key for key in {**wanted, **found} if key not in but]
        differs = [key for key in keys if found.get(key) != wanted.get(key)]
        left = [str(path) for path in workdir.rglob("*tmp*")]
        return f"differs in {differs}, leaves {left}" if differs or left else "well"

    def kill(self, chance: random.Random) -> str:
        """One kill at a random moment, and the same command again."""
        script = chance.choice(("train.py", "train.py", "evaluate.py"))
        number = chance.choice(SIGNALS)
        code: int | None = 0
        while code == 0:  # a moment after its end is none
            workdir = self.workdir("killed", None if script == "train.py" else "trained")
            command = self.start(script, workdir)
            code = command.wait(chance.uniform(0, self.seconds[script]))
        if code is None:
            command.send(number)
            code = command.end()
        text = command.said()
        expected = {0, 128 + number, -number}
        what = f"{script}, {signal.Signals(number).name}, code {code}"
        if code not in expected or "Traceback" in text:
            return f"{what}: {text}"
        outcome = self.goes_on(script, workdir)
        return f"well: {what}" if outcome == "well" else f"{what}: {outcome}"

    def damage(self, chance: random.Random) -> str:
        """One damaged file of an interrupted run, and the same command again."""
        workdir = self.workdir("damaged", "half")
        path = chance.choice(damages.files_in(workdir))
        told = damages.damage(path, chance.choice(damages.KINDS), chance)
        command = self.start("train.py", workdir)
        code, text = command.end(), command.said()
        told = str(told).replace(f"{workdir}/", "")
        if code == 0:
            # What is lost for good is said: a line of the log, and a best checkpoint that no later
            # validation equals.
            lost = ["log"] if f"note: {workdir / 'metrics.jsonl'}" in text else []
            if "note: the best checkpoint" in text and f"{workdir / 'best'}" in text:
                lost += ["best", "chosen, says best", "chosen, says last"]
            outcome = self.compare("train.py", workdir, but=lost)
            how = "said" if lost else "mended"
            return f"well: {how}: {told}" if outcome == "well" else f"{told}: {outcome}"
        lines = [line for line in text.splitlines() if line.startswith("error: ")]
        named = lines and str(workdir) in lines[0]
        if code == 1 and named and "Traceback" not in text:
            return f"well: refused: {told}"
        return f"{told}: code {code}: {text}"

    def fill(self, chance: random.Random) -> str:
        """One run on a full disk, and the same command again with room."""
        while (outcome := self.fill_once(chance)) == ROOMY:
            pass
        return outcome

    def fill_once(self, chance: random.Random) -> str:
        """`fill`, or `ROOMY` where the disk that was drawn was large enough."""
        workdir = self.workdir("full")
        with small_disk(workdir, chance) as (limit, free):
            command = self.start("train.py", workdir / "run", limit)
            code, text = command.end(), command.said()
            lines = [line for line in text.splitlines() if line.startswith("error: ")]
            if code == 0:
                outcome = self.compare("train.py", workdir / "run")
                return ROOMY if outcome == "well" else outcome
            if code != 1 or len(lines) != 1 or "Traceback" in text or str(workdir) not in lines[0]:
                return f"code {code}: {text}"
            free()
            outcome = self.goes_on("train.py", workdir / "run")
            return f"well: {lines[0]}" if outcome == "well" else f"{lines[0]}: {outcome}"

    def run(self, counts: Mapping[str, int]) -> None:
        """Runs the trials that are not done yet.

        Args:
          counts: how many of each of `KINDS`.
        """
        trial = {"kills": self.kill, "damages": self.damage, "disks": self.fill}
        if any(len(self.trials[kind]) < counts[kind] for kind in KINDS):
            self.prepare()
        for kind in KINDS:
            for number in range(counts[kind]):
                if str(number) in self.trials[kind]:
                    continue
                outcome = trial[kind](random.Random(f"{self.seed} {kind} {number}"))
                self.trials[kind][str(number)] = outcome
                files.write_text(self.journal, json.dumps(self.trials, indent=1) + "\n")
                print(f"{kind} {number}: {outcome.splitlines()[0]}", flush=True)

    def counts(self) -> dict[str, dict[str, Any]]:
        """For each kind how many trials were "tried", ended "well", were "lost", and these."""
        found = {}
        for kind, trials in self.trials.items():
            lost = [text for text in trials.values() if not text.startswith("well")]
            how = collections.Counter(
                re.split(r"[:,]", text)[1].strip() for text in trials.values() if text not in lost
            )
            found[kind] = {
                "tried": len(trials),
                "well": len(trials) - len(lost),
                "lost": len(lost),
                "losses": lost,
                "how": dict(how),
            }
        return found


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, chance: random.Random):
    """A folder with little room: a file system in memory where we may mount one.

    Args:
      folder: is made.
      chance: draws the room.

    Yields:
      The most bytes of a file, or None where the disk itself is small; and a function that makes
      room.
    """
    folder.mkdir(parents=True)
    size = int(2 ** chance.uniform(12, 20))
    mounted = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() == 0 and not subprocess.run(mounted, capture_output=True).returncode:
        larger = ["mount", "-o", f"remount,size={ROOM}", str(folder)]
        try:
            yield None, lambda: subprocess.run(larger, check=True)
        finally:
            subprocess.run(["umount", str(folder)], check=True)
    else:
        yield int(2 ** chance.uniform(8, 16)), lambda: None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the arguments ask for; 1 where something was lost.

    Args:
      argv: without the script's name.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="how many")
    parser.add_argument("--damages", type=int, default=100, help="how many")
    parser.add_argument("--disks", type=int, default=20, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and places")
    parser.add_argument("--work", type=pathlib.Path, default="runs/soak", help="folder of the runs")
    parser.add_argument("--record", type=pathlib.Path, default=RECORD, help="the counts, as JSON")
    args = parser.parse_args(argv)
    work = args.work.resolve()
    with files.locked(work / "soak.lock", "soak run"):
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(work / "xla"))
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        for name in IMPORTED:
            importlib.import_module(name)
        soak = Soak(work, args.seed)
        soak.run({kind: getattr(args, kind) for kind in KINDS})
        counts = soak.counts()
        environment = in_fork(_environment, work / "environment.json")
        record = {"what": "soak", "seed": args.seed, "counts": counts, **environment}
        files.write_text(args.record, json.dumps(record, indent=1) + "\n")
    for kind, found in counts.items():
        print(f"{kind}: {found['tried']} tried, {found['well']} ended well, {found['lost']} lost")
    return int(any(found["lost"] for found in counts.values()))


def _environment() -> dict[str, Any]:
    from jaxdefense.evaluation import records

    return records.environment()


if __name__ == "__main__":
    with interrupts.one_line_endings(interrupts.Ending("the same command goes on", grace=None)):
        code = main()
    sys.exit(code)
