"""Signals, locks and full disks: one line, nothing half-written, and the same command goes on."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import unattended
from absl import flags
from conftest import ROOT, import_script
from test_cascade import run
from test_train import config, leaves

from jaxdefense import files, interrupts, train
from jaxdefense.runs import checkpoint
from jaxdefense.train import log as logs
from jaxdefense.train import loop, pace


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tfds_dir):
    """An undisturbed run, which all interrupted ones must equal."""
    workdir = tmp_path_factory.mktemp("whole")
    train.train(values(tfds_dir), workdir, progress=False)
    return workdir


@pytest.fixture(autouse=True)
def heard():
    """Ctrl-C is heard, also where these tests run in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def values(tfds_dir):
    return config(tfds_dir, **{"train.steps_per_dispatch": 3})


def assert_equal_runs(workdir, whole):
    for kind in ("last", "best"):
        one, other = (checkpoint.Store(folder / kind) for folder in (workdir, whole))
        metas = [store.meta() for store in (one, other)]
        for meta in metas:
            del meta["seconds"], meta["memory"]
        assert metas[0] == metas[1]
    for a, b in zip(leaves(workdir)[0], leaves(whole)[0], strict=True):
        np.testing.assert_array_equal(a, b)
    texts = [(folder / "metrics.jsonl").read_text() for folder in (workdir, whole)]
    assert texts[0] == texts[1]
    assert not list(workdir.rglob("*tmp*"))
    assert not (workdir / "train.lock").exists()


class Counted:
    """Sends a signal at the n-th call of a method; nothing later."""

    def __init__(self, monkeypatch, owner, name, n, number):
        method, self.calls = getattr(owner, name), 0

        def counted(*args, **options):
            self.calls += 1
            if self.calls == n:
                os.kill(os.getpid(), number)
            return method(*args, **options)

        monkeypatch.setattr(owner, name, counted)


class TestTraining:
    @pytest.mark.parametrize(
        ("name", "n", "number", "step"),
        [
            ("_padded_items", 5, signal.SIGTERM, 5),  # inside the second dispatch
            ("_validate_at", 1, signal.SIGINT, 6),  # the first validation
            ("_validate_at", 2, signal.SIGTERM, 12),  # the last one
        ],
    )
    def test_it_saves_and_ends_with_the_same_bits(
        self, tmp_path, tfds_dir, whole, monkeypatch, name, n, number, step
    ):
        monkeypatch.setattr(pace, "SECONDS", 0.0)  # each step is a piece of its own
        before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
        with monkeypatch.context() as patch:
            Counted(patch, loop.Trainer, name, n, number)
            raised = KeyboardInterrupt if number == signal.SIGINT else loop.Interrupted
            with pytest.raises(raised, match=rf"; step {step} is saved in {tmp_path}: the same"):
                train.train(values(tfds_dir), tmp_path, progress=False)
        assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before
        meta = checkpoint.Store(tmp_path / "last").meta()
        assert meta["step"] == step
        assert set(meta["unfinished"]) == ({"dispatch"} if step == 5 else {"validation"})
        train.train(values(tfds_dir), tmp_path, progress=False)
        assert_equal_runs(tmp_path, whole)

    @pytest.mark.slow
    def test_a_validation_that_is_left_twice_is_logged_once(
        self, tmp_path, tfds_dir, whole, monkeypatch
    ):
        for _ in range(2):
            with monkeypatch.context() as patch:
                Counted(patch, loop.Trainer, "_validate_at", 1, signal.SIGTERM)
                with pytest.raises(loop.Interrupted, match="; step 6 is saved"):
                    train.train(values(tfds_dir), tmp_path, progress=False)
        with monkeypatch.context() as patch:  # killed when it has validated, before it says so

            def kill(*_):
                raise KeyError("killed")

            patch.setattr(checkpoint.Store, "replace_meta", kill)
            with pytest.raises(KeyError):
                train.train(values(tfds_dir), tmp_path, progress=False)
        train.train(values(tfds_dir), tmp_path, progress=False)
        assert_equal_runs(tmp_path, whole)

    def test_a_second_trainer_is_refused_before_it_does_anything(self, tmp_path, tfds_dir):
        workdir = tmp_path / "run"
        with (
            files.locked(workdir / "train.lock", "training"),
            pytest.raises(
                ValueError, match=f"run is in use by another training: process {os.getpid()}"
            ),
        ):
            train.train(values(tfds_dir), workdir, progress=False)
        assert not workdir.exists()

    def test_a_disk_that_fills_up_leaves_the_last_checkpoint(
        self, tmp_path, tfds_dir, whole, monkeypatch
    ):
        saved = []

        def save(store, step, *args, **options):
            saved.append(step)
            if len(saved) == 3:
                half = store.directory / f"{step}.orbax-checkpoint-tmp"
                half.mkdir()
                raise ValueError("RESOURCE_EXHAUSTED: No space left [os_error_code='28']")
            return real(store, step, *args, **options)

        real = checkpoint.ocp.CheckpointManager.save
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.ocp.CheckpointManager, "save", save)
            with pytest.raises(OSError, match="No space left on device") as found:
                train.train(values(tfds_dir), tmp_path, progress=False)
        assert found.value.filename == str(tmp_path / "last" / "6")
        assert "free some space, then run" in files.explain(found.value)
        assert checkpoint.Store(tmp_path / "last").steps() == [3]
        (tmp_path / "last" / "6.orbax-checkpoint-tmp").mkdir()  # a killed process leaves it
        (tmp_path / f".config.json.{files._host()}.999999999.abc.tmp").write_text("half")
        train.train(values(tfds_dir), tmp_path, progress=False)
        assert_equal_runs(tmp_path, whole)


def test_a_read_only_workdir_is_judged_beside_its_record(tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "evaluate", raising=False)  # its flags may have given way
    evaluate = import_script("evaluate")
    flags.FLAGS(["evaluate.py", "--protocol=audit", "--examples=20"])
    workdir, path = tmp_path / "run", tmp_path / "elsewhere" / "x.json"
    workdir.mkdir()
    assert evaluate.find_folder(workdir, path) == workdir / "audit-best-20"
    may = os.access
    monkeypatch.setattr(os, "access", lambda where, how: where != workdir and may(where, how))
    folder = path.with_name("x-audit-best-20")
    assert evaluate.find_folder(workdir, path) == folder
    told = f"note: {workdir} cannot be written to: what is finished is kept in {folder}\n"
    assert capsys.readouterr().err == told
    flags.FLAGS(["evaluate.py", f"--workdir={workdir}"])
    with pytest.raises(ValueError, match=r"run cannot be written to: give --record=FILE in"):
        evaluate.main(["evaluate.py"])


class TestLog:
    def test_a_full_disk_tears_no_line(self, tmp_path, monkeypatch):
        log = logs.Log(tmp_path, 0)
        log.write(1, {"loss": 1.0})
        real = os.write

        def write(descriptor, data):
            if len(data) > 10:
                return real(descriptor, data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write)
            with pytest.raises(OSError, match=r"metrics\.jsonl"):
                log.write(2, {"loss": 0.5})
        log.close()
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'

    def test_tensorboard_reads_the_events(self, tmp_path):
        log = logs.Log(tmp_path, 7)
        log.write(8, {"loss": 0.5, "clean": 1.0}, epoch=1)
        log.close()
        (path,) = (tmp_path / "tensorboard").iterdir()
        content, events = path.read_bytes(), []
        while content:  # length, its sum, the event, its sum
            size = int.from_bytes(content[:8], "little")
            events.append(logs.Event.FromString(content[12 : 12 + size]))
            content = content[16 + size :]
        assert [event.step for event in events] == [7, 7, 8, 8]
        assert events[0].file_version == "brain.Event:2"
        found = {v.tag: v.simple_value for event in events for v in event.summary.value}
        assert found == {"loss": 0.5, "clean": 1.0}

    def test_without_tensorboard_the_log_goes_on_and_says_so(self, tmp_path, monkeypatch, capsys):
        log = logs.Log(tmp_path, 0)
        append = logs._append

        def full(descriptor, data, path):
            if "tfevents" in path.name:
                raise OSError(errno.EDQUOT, "Disk quota exceeded", str(path))
            append(descriptor, data, path)

        monkeypatch.setattr(logs, "_append", full)
        for step in (1, 2):
            log.write(step, {"loss": 1.0})
        log.close()
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"no more TensorBoard events: {tmp_path}/tensorboard/")
        assert "Disk quota exceeded; free some space, or ask for a larger quota" in line


class TestLock:
    def test_a_lock_of_a_process_that_has_ended_is_taken_over(self, tmp_path, monkeypatch):
        path = tmp_path / "a" / "lock"
        path.parent.mkdir()
        dead = {"user": "training", "host": files._host(), "pid": 999999999, "since": "then"}
        for locker in (files.fcntl, None):  # a disk that locks, and one that does not
            monkeypatch.setattr(files, "fcntl", locker)
            path.write_text(json.dumps(dead))
            with files.locked(path, "training"):
                assert json.loads(path.read_text())["pid"] == os.getpid()
                with pytest.raises(ValueError, match=f"process {os.getpid()} on {files._host()}"):
                    files.locked(path, "training").__enter__()
            assert not path.exists()

    def test_one_of_another_machine_says_what_to_remove(self, tmp_path, monkeypatch):
        monkeypatch.setattr(files, "fcntl", None)
        path = tmp_path / "lock"
        path.write_text('{"user": "training", "host": "elsewhere", "pid": 7, "since": "then"}')
        message = f"training: process 7 on elsewhere since then; .*no such process.*remove {path}$"
        with pytest.raises(ValueError, match=message), files.locked(path, "training"):
            raise AssertionError("never here")
        assert path.exists()

    def test_an_evaluation_folder_is_locked(self, tmp_path):
        with (
            files.locked(tmp_path / "evaluation.lock", "evaluation"),
            pytest.raises(ValueError, match=f"{tmp_path} is in use by another evaluation"),
        ):
            run(folder=tmp_path)


@pytest.fixture
def hangups():
    """SIGHUP as a terminal's process has it; as it was, afterwards."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


class TestHangups:
    def test_a_run_is_asked_to_end(self, hangups):
        with interrupts.Requests() as requests:
            os.kill(os.getpid(), signal.SIGHUP)
            assert requests.asked()
            with pytest.raises(interrupts.Interrupted, match="SIGHUP; saved") as raised:
                requests.stop("saved")
        assert raised.value.number == signal.SIGHUP

    def test_one_that_is_ignored_is_not_heard(self, hangups):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with interrupts.Requests() as requests:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not requests.asked()

    def test_unattended_scripts_end_as_by_ctrl_c(self, hangups):
        before = signal.getsignal(signal.SIGTERM)
        try:
            unattended.interrupt_on_signals()
            with pytest.raises(KeyboardInterrupt) as raised:
                os.kill(os.getpid(), signal.SIGHUP)
            assert unattended.exit_code(raised.value) == 129
        finally:
            signal.signal(signal.SIGTERM, before)


class TestScripts:
    """`one_line_endings` in processes that import no JAX."""

    def start(self, block, options="grace=0.2"):
        script = (
            "import ctypes, os, signal, sys, time\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # heard in the background
            "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # and under nohup
            "from jaxdefense import interrupts\n"
            f"with interrupts.one_line_endings(interrupts.Ending('goes on', {options})):\n"
            f"    {block}\n"
        )
        command = [sys.executable, "-c", script]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen(command, cwd=ROOT, text=True, **pipes)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_a_signal_is_one_line(self, number):
        process = self.start(f"os.kill(os.getpid(), {int(number)}); time.sleep(60)")
        _, said = process.communicate(timeout=240)
        assert process.returncode == 128 + number
        assert said.strip().endswith("; goes on")
        assert len(said.strip().splitlines()) == 1

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_in_the_garbage_collector_is_one_line(self, number):
        """Python prints and forgets what is raised there; JAX has such a callback."""
        process = self.start(
            f"import gc; gc.callbacks.append(lambda *_: os.kill(os.getpid(), {int(number)})); "
            "gc.collect(); time.sleep(60)",
            "grace=200",
        )
        _, said = process.communicate(timeout=240)
        assert process.returncode == 128 + number
        assert said.strip() == "interrupted; goes on"

    def test_python_s_own_end_is_left_out(self):
        """It would crash where a thread of XLA still computes."""
        process = self.start(
            "import atexit; atexit.register(print, 'finalised'); "
            "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)"
        )
        assert process.communicate(timeout=240)[0] == ""
        assert process.returncode == 128 + signal.SIGTERM

    @pytest.mark.parametrize("grace", ["0.2", "None"])
    def test_a_program_that_does_not_return_is_ended(self, grace):
        """A sleep in C, whose thread takes no signals, stands for a program on the device."""
        process = self.start(
            "print('in', flush=True); signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]); "
            "ctypes.CDLL(None).sleep(600)",
            f"grace={grace}",
        )
        assert process.stdout.readline() == "in\n"
        process.send_signal(signal.SIGINT)
        while grace == "None" and process.poll() is None:  # the second one ends it at once
            time.sleep(interrupts._TWICE + 0.1)
            process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=240)
        assert process.returncode == 130
        assert said.strip() == "interrupted; goes on"

    def test_nohup_stays_deaf(self):
        process = self.start(
            "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
            "    with interrupts.one_line_endings(interrupts.Ending()):\n"
            "        os.kill(os.getpid(), signal.SIGHUP); print('still here')"
        )
        assert process.communicate(timeout=240) == ("still here\n", "")
        assert process.returncode == 0

    @pytest.mark.parametrize("outlives", [True, False])
    def test_its_reader_ends(self, tmp_path, outlives):
        """Long work goes on, and says so once; a table, say, ends quietly."""
        process = self.start(
            "print('first', flush=True); input(); [print(i, flush=True) for i in range(9)]; "
            f"open({str(tmp_path / 'done')!r}, 'w').close()",
            f"outlives_readers={outlives}",
        )
        assert process.stdout.readline() == "first\n"
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        said = process.stderr.read()
        process.stderr.close()
        assert process.wait(timeout=240) == (0 if outlives else 1)
        note = "note: nobody reads standard output any more: going on without it\n"
        assert said == (note if outlives else "")
        assert (tmp_path / "done").exists() == outlives

    def test_nobody_reads_its_errors_either(self, tmp_path):
        process = self.start(
            "input(); print('a note', file=sys.stderr); os.kill(os.getpid(), signal.SIGHUP); "
            "time.sleep(60)"
        )
        process.stderr.close()
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert process.wait(timeout=240) == 129

    def test_a_full_disk_is_one_line(self):
        process = self.start("open('/dev/full', 'w').write('a' * 100000)")
        _, said = process.communicate(timeout=240)
        assert process.returncode == 1
        assert "No space left on device; free some space" in said
        assert len(said.splitlines()) == 1

    def test_ctrl_c_during_imports_is_one_line(self, tmp_path):
        """Importing JAX takes seconds; a stand-in is interrupted there."""
        (tmp_path / "jax.py").write_text(
            "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
        )
        heard = (  # a process in the background ignores Ctrl-C, and what it starts does too
            "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
        )
        done = subprocess.run(
            [sys.executable, "-c", heard, str(ROOT / "experiments" / "train.py")],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 130
        assert done.stderr == "\ninterrupted; nothing was written\n"
