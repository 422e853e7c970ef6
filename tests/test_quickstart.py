"""quickstart: what it chooses, foretells and shows, and its processes, with a worker that pretends.

The worker of FAKE_WORKER answers as quickstart_worker.py does, without JAX.
"""

import io
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import types

import configs
import pytest
import quickstart_board as board
import quickstart_plan as plan
import rich.console
from conftest import ROOT, import_script

from jaxdefense import files
from jaxdefense.evaluation import records

quickstart = import_script("quickstart")

FAKE_WORKER = """
import json, os, pathlib, sys, time

RECORD = json.loads(os.environ["FAKE_RECORD"])
print(json.dumps({"event": "ready"}), flush=True)
for line in sys.stdin:
    task = json.loads(line)
    workdir = pathlib.Path(task["workdir"])
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(task["config"]))
    begun = workdir / "begun"
    begun.write_text(f"{begun.read_text()}x" if begun.exists() else "x")
    if task["name"] == "cse":
        print(json.dumps({"event": "failed", "reason": "the loss was\\nnot finite"}), flush=True)
    elif task["name"] == "claf":
        (workdir / "log.txt").write_text("first\\nno memory left\\n")
        os.kill(os.getpid(), 9)
    elif task["name"] == "gssl":
        time.sleep(60)
    else:
        print(json.dumps({"event": "evaluating"}), flush=True)
        record = {**RECORD, "name": task["name"], "config": task["config"]}
        (workdir / "configured.json").write_text(json.dumps(record))
        print(json.dumps({"event": "done"}), flush=True)
"""


def record_of(accuracy):
    bits = {"accuracy": accuracy, "per_class": [accuracy], "n": 4, "bits": ""}
    results = {"classifier": {"clean": bits, "pgd20": bits}}
    threat = {"norm": "linf", "eps": 0.1}
    config = {"threat": threat, "dataset": {"name": "digits"}}
    training = {"seconds": 2.0, "step": 3}
    return records.make("x", config, results, seed=0, seconds=1.0, training=training)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function of the flags that runs quickstart with the pretending worker, without a page."""
    worker = tmp_path / "worker.py"
    worker.write_text(FAKE_WORKER)
    monkeypatch.setattr(quickstart, "WORKER", (sys.executable, str(worker)))
    monkeypatch.setattr(quickstart, "build_page", lambda rows: " ".join(r.state for r in rows))
    monkeypatch.setenv("FAKE_RECORD", json.dumps(record_of(50.0)))
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(**flags):
        values = dict(systems="", variant="digits_debug", workdir=str(tmp_path / "runs"))
        values |= dict(records=None, processes=2, progress=True) | flags
        for name, value in values.items():
            monkeypatch.setattr(quickstart, name.upper(), types.SimpleNamespace(value=value))
        arguments = [f"--{name}={value}" for name, value in flags.items()]
        monkeypatch.setattr(sys, "argv", ["quickstart.py", *arguments])
        return quickstart.run()

    return run


# What is chosen, in what order, and how long it takes.


def test_the_default_is_the_seven_their_rivals_and_the_baselines():
    names = plan.select("")
    assert len(names) == len(set(names)) == 17
    assert set(names) <= set(configs.names())
    assert plan.select("all") == configs.names()
    assert plan.select("claf, m2at,claf") == ["claf", "m2at"]
    assert plan.select("m2at,all") == configs.names()


@pytest.mark.parametrize("systems", [",", " ", " , ,"])
def test_commas_and_blanks_are_no_systems(systems):
    with pytest.raises(ValueError, match=rf"--systems='{systems}' names no system; names: .*m2at"):
        plan.select(systems)


def test_an_unknown_system_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown system 'm2ta'; nearest: m2at"):
        plan.select("m2ta,claf")


def test_a_baseline_and_the_longest_begin():
    clock = plan.Clock({"a": 3.0, "b": 9.0, "c": 1.0, "d": 5.0, "standard": 2.0, "trades": 4.0})
    assert plan.order(["a", "b", "c", "d"], clock) == ["c", "b", "d", "a"]
    names = ["trades", "a", "b", "c", "d", "standard"]
    assert plan.order(names, clock) == ["standard", "b", "trades", "d", "a", "c"]
    assert plan.order(["a"], clock) == ["a"]


def test_time_left_is_that_of_the_longest_process_on_this_machine():
    clock = plan.Clock({"a": 2.0, "b": 10.0, "c": 6.0})
    assert clock.left({"b": 4.0}, ["c", "a"], workers=2) == 8.0  # 6 of b, then a; c beside
    clock.measured("a", 4.0)  # twice as long as foretold
    assert clock.expected("b") == 20.0
    assert clock.expected("unknown") == pytest.approx((4 + 20 + 12) / 3)
    assert clock.left({"b": 4.0}, ["c"], workers=2) == 16.0
    assert clock.left({"b": 99.0}, [], workers=2) == 1.0


def test_without_records_no_time_is_told():
    clock = plan.Clock({})
    assert math.isnan(clock.left({"a": 1.0}, ["b"], workers=2))
    assert "about – min left" in board.header([board.Row("b", {}, pathlib.Path())], math.nan, 0)
    clock.measured("a", 4.0)
    assert clock.left({}, ["b"], workers=1) == 4.0


def test_committed_records_give_their_seconds(tmp_path):
    records.save(record_of(1.0), tmp_path / "a.json")
    assert plan.committed_seconds(tmp_path) == {"a": 3.0}
    assert plan.committed_seconds(tmp_path / "missing") == {}
    assert set(plan.select("")) <= set(plan.committed_seconds())


def test_a_missing_package_is_said_with_the_extra_that_brings_it():
    assert quickstart.missing_extras() == ""
    line = quickstart.missing_extras({"train": ["json", "no_such_module"], "plots": ["nor_this"]})
    assert line.startswith("this script needs no_such_module, nor_this: pip install ")
    assert line.endswith("'jaxdefense[train,plots]'")


# What is shown.


def row(tmp_path, name="a", length="4e", **values):
    return board.Row(name, {"train": {"length": length}}, tmp_path, **values)


def test_the_share_of_training_is_that_of_the_last_whole_line(tmp_path):
    epochs, steps = row(tmp_path), row(tmp_path, length="10s", state="training")
    assert epochs.trained() == 0.0
    lines = '{"step": 2, "epoch": 1.0}\n{"step": 4, "epoch": 2.0}\n{"step": 6, "ep'
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert epochs.trained() == 0.5
    assert steps.describe() == "training 40 %"
    (tmp_path / "metrics.jsonl").write_bytes(lines.encode() + b'och\xff\n[8]\n{"step": 8}\n')
    assert epochs.trained() == 0.5
    assert steps.describe() == "training 80 %"
    (tmp_path / "metrics.jsonl").write_text('{"st\n')
    assert steps.describe() == "training 0 %"


def test_the_table_fits_the_terminal_and_says_what_runs(tmp_path):
    rows = [row(tmp_path, f"done{i}", state="done", results={"clean": 97.5}) for i in range(20)]
    rows.append(row(tmp_path, "late", state="evaluating", began=time.monotonic()))
    rows.append(row(tmp_path, "bad", state="failed", reason="no memory"))
    rows.append(row(tmp_path, "next"))
    console = rich.console.Console(file=io.StringIO(), width=100, height=16)
    title = board.header(rows, 65.0, 130.0)
    console.print(board.draw(rows, title, *console.size))
    shown = console.file.getvalue()
    assert len(shown.splitlines()) <= 16
    assert "21 of 23 done, 2:10 min, about 1:05 min left; next: next" in shown
    for text in ("late", "evaluating", "failed: no memory", "done0", "97.50", "and 14 more"):
        assert text in shown


@pytest.mark.parametrize(
    ("width", "shown", "hidden"),
    [(100, "clean, % pgd20, % seconds", ""), (56, "seconds", "pgd20"), (40, "", "clean pgd20")],
)
def test_in_a_narrow_terminal_names_are_whole_and_numbers_are_left_out(
    tmp_path, width, shown, hidden
):
    rows = [row(tmp_path, "standard", state="done", results={"clean": 97.5, "pgd20": 12.25})]
    rows += [row(tmp_path, "gssl_baseline"), row(tmp_path, "trades", state="training")]
    console = rich.console.Console(file=io.StringIO(), width=width, height=20)
    console.print(board.draw(rows, "title", *console.size))
    text = console.file.getvalue()
    assert all(f" {known.name} " in text for known in rows)
    assert "…" not in text
    assert "training 0 %" in text
    assert all(name in text for name in shown.split())
    assert not any(name in text for name in hidden.split())


def test_in_a_pipe_each_event_is_a_line_of_plain_text(tmp_path, capsys):
    told = [row(tmp_path, "a", state="training"), row(tmp_path, "b")]
    for lines in (board.Lines(), board.Lines(only_rows=True)):
        told[0].state = "training"
        lines.update(told, 60.0, 1.0)
        lines.update(told, 59.0, 2.0)
        told[0].finish({"results": {"main": {"clean": {"accuracy": 97.5}}}}, 9.0)
        lines.update(told, 58.0, 3.0)
    done = "a: clean 97.50 %; 9 s (1 of 2 done, 0:03 min, about 0:58 min left; next: b)"
    assert capsys.readouterr().out.splitlines() == ["a: training", done, done]
    assert isinstance(board.make(progress=True), board.Lines)  # standard output is no terminal


# The processes.


def test_rows_follow_as_they_are_done_and_a_failure_is_not_the_end(start, tmp_path, capsys):
    names = ["cse", "claf", "standard", "trades", "pgd_at"]
    assert start(systems=",".join(names), records=str(tmp_path / "kept")) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "cse: failed: the loss was\n" in out
    assert "claf: failed: the process was killed by SIGKILL (out of memory?): no memory left" in out
    for name in names[2:]:
        assert f"{name}: clean 50.00, pgd20 50.00 %" in out
        assert f"| {name} |" in out
        assert records.load(tmp_path / "kept" / f"{name}.json")["name"] == name
    assert f"to try again, without what is done: {sys.executable} quickstart.py --systems=" in out
    page = (tmp_path / "runs" / "report.html").read_text().split()
    assert sorted(page) == ["done", "done", "done", "failed", "failed"]


def test_finished_systems_are_not_run_again(start, tmp_path, capsys):
    assert start(systems="standard") == 0
    assert start(systems="standard,trades") == 0
    out = capsys.readouterr().out
    assert out.count("trades: training") == 1
    begun = {name: (tmp_path / "runs" / name / "begun") for name in ("standard", "trades")}
    assert {name: path.read_text() for name, path in begun.items()} == {
        "standard": "x",
        "trades": "x",
    }


def test_a_workdir_of_another_config_is_refused_before_anything_runs(start, tmp_path):
    assert start(systems="standard") == 0
    with pytest.raises(ValueError, match=r"standard holds a run of another config; remove it"):
        start(systems="standard,trades", variant="digits")
    assert not (tmp_path / "runs" / "trades").exists()


DYING_WORKER = """
import os, pathlib, sys

died = pathlib.Path(os.environ["DIED"])
died.write_text(f"{died.read_text()}x" if died.exists() else "x")
if len(died.read_text()) <= int(os.environ["DEATHS"]):
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(("deaths", "code", "starts"), [(1, 0, 2), (2, 1, 3)])
def test_a_worker_killed_before_it_is_ready_is_started_once_more(
    start, tmp_path, monkeypatch, capsys, deaths, code, starts
):
    worker = tmp_path / "dying.py"
    worker.write_text(DYING_WORKER + FAKE_WORKER)
    monkeypatch.setattr(quickstart, "WORKER", (sys.executable, str(worker)))
    monkeypatch.setenv("DIED", str(tmp_path / "died"))
    monkeypatch.setenv("DEATHS", str(deaths))
    assert start(systems="standard,trades", processes=1) == code
    assert (tmp_path / "died").read_text() == starts * "x"
    out = capsys.readouterr().out
    failed = re.findall(r"(\w+): failed: the process was killed by SIGKILL", out)
    assert len(set(failed)) == code
    for name in {"standard", "trades"} - set(failed):
        assert f"| {name} |" in out
    assert "log.txt" not in out  # there is none


def test_a_worker_that_cannot_start_ends_all(start, tmp_path, monkeypatch):
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_module")
    monkeypatch.setattr(quickstart, "WORKER", (sys.executable, str(broken)))
    with pytest.raises(ValueError, match=r"cannot start: .* code 1: .*no_such_module"):
        start(systems="standard,trades")


def test_a_page_that_cannot_be_made_ends_all(start, monkeypatch):
    def build(rows):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(quickstart, "build_page", build)
    with pytest.raises(ValueError, match="the page cannot be made: no fonts"):
        start(systems="gssl")


def wait_until(holds):
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_page_that_fails_once_is_made_again(tmp_path, monkeypatch):
    answers = [OSError("disk full"), "first", OSError("disk full"), "second"]

    def build(rows):
        if isinstance(answer := answers.pop(0), OSError):
            raise answer
        return answer

    monkeypatch.setattr(quickstart, "build_page", build)
    page = quickstart.Page(tmp_path / "page.html", [])
    wait_until(lambda: page.error)
    page.renew()
    wait_until(lambda: page.written)
    assert page.error is None
    page.renew()
    wait_until(lambda: page.error)
    assert page.path.read_text() == "first"
    page.close()
    assert page.error is None
    assert page.path.read_text() == "second"


def test_a_folder_that_cannot_be_written_is_said(start, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=f"--workdir must be a folder, and {tmp_path}/file is a f"):
        start(systems="standard", workdir=str(tmp_path / "file" / "runs"))
    with pytest.raises(ValueError, match=f"--records must be a folder, and {tmp_path}/file is a f"):
        start(systems="standard", records=str(tmp_path / "file" / "kept"))
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ValueError, match=f"cannot write to {tmp_path}/file/runs"):
        quickstart.check_writable(tmp_path / "file" / "runs")


def test_records_that_cannot_be_kept_do_not_end_what_runs(start, tmp_path, capsys):
    (tmp_path / "kept" / "standard.json").mkdir(parents=True)
    assert start(systems="standard,trades", records=str(tmp_path / "kept")) == 1
    out = capsys.readouterr().out
    assert f"the record of standard is not in {tmp_path / 'kept'}: " in out
    assert records.load(tmp_path / "kept" / "trades.json")["name"] == "trades"
    assert "standard: clean 50.00" in out


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("configured.json", '{"con', "Unterminated string"),
        ("configured.json", '{"config": {}, "seconds": 1}', "lacks results, training"),
        ("config.json", "", "Expecting value"),
        ("config.json", "[]", "not a JSON object"),
    ],
)
def test_a_damaged_file_is_named_with_the_way_out(start, tmp_path, name, text, why):
    path = tmp_path / "runs" / "standard" / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path} is damaged .{why}.*; remove it and run") as found:
        start(systems="standard")
    assert "\n" not in str(found.value)
    path.unlink()
    assert start(systems="standard") == 0


def test_a_second_quickstart_in_the_same_folder_is_refused(start, tmp_path):
    pytest.importorskip("fcntl")
    (tmp_path / "runs").mkdir()
    hold = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        'print(\'{"user": "quickstart", "pid": 1234}\', file=file, flush=True)\n'
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / "runs" / "quickstart.lock")]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        message = f"{tmp_path / 'runs'} is in use by another quickstart: process 1234 on "
        with pytest.raises(ValueError, match=message):
            start(systems="standard")
        assert not (tmp_path / "runs" / "standard").exists()
        other.stdin.close()
    assert start(systems="standard") == 0  # the lock went with its process
    assert not (tmp_path / "runs" / "quickstart.lock").exists()
    with (
        files.locked(tmp_path / "runs" / "quickstart.lock", "quickstart"),
        pytest.raises(ValueError, match=f"process {os.getpid()} on "),
    ):
        start(systems="standard")


def test_the_exit_code_says_that_a_row_is_red(start):
    assert start(systems="cse,standard") == 1
    with pytest.raises(SystemExit) as ended:
        quickstart.main(["quickstart.py"])
    assert ended.value.code == 1


def test_where_nobody_reads_it_ends_quietly_with_its_workers(tmp_path):
    (tmp_path / "worker.py").write_text(FAKE_WORKER)
    (tmp_path / "main.py").write_text(
        "import quickstart, sys\n"
        "quickstart.WORKER = (sys.executable, 'worker.py')\n"
        "quickstart.build_page = lambda rows: ''\n"
        "begin, seen = quickstart.Worker.begin, []\n"
        "quickstart.Worker.begin = lambda worker, row: (seen.append(worker), begin(worker, row))\n"
        "try:\n"
        "    quickstart.app.run(quickstart.main)\n"
        "finally:\n"
        "    assert [worker._process.poll() is None for worker in seen] == [False, False]\n"
    )
    command = [sys.executable, "main.py", "--systems=gssl,standard", "--processes=2"]
    paths = os.pathsep.join([str(ROOT / "experiments"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "FAKE_RECORD": json.dumps(record_of(50.0))}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes) as process:
        assert process.stdout.readline().startswith("page: ")
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


@pytest.mark.parametrize("error", [RuntimeError("no backend\n..."), AssertionError()])
def test_a_worker_without_its_device_says_so_in_a_line(monkeypatch, error):
    worker = import_script("quickstart_worker")

    def devices():
        raise error

    monkeypatch.setattr(worker.jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(SystemExit, match=r"^JAX_PLATFORMS=cuda: no such device here; unset it"):
        worker.check_device()


def test_interrupted_it_ends_its_workers_and_says_what_goes_on(start, monkeypatch, capsys):
    seen = []

    class Impatient(board.Lines):
        def update(self, rows, left, elapsed):
            super().update(rows, left, elapsed)
            if any(row.state == "done" for row in rows):
                raise KeyboardInterrupt

    begin = quickstart.Worker.begin

    def noting(worker, row):
        seen.append(worker)
        begin(worker, row)

    monkeypatch.setattr(quickstart.Worker, "begin", noting)
    monkeypatch.setattr(board, "make", lambda **_: Impatient())
    assert start(systems="gssl,standard") == 130
    assert "this goes on from here: " in (out := capsys.readouterr().out)
    assert "quickstart.py --systems=gssl,standard" in out
    assert all(worker._process.poll() is not None for worker in seen)


def test_little_memory_leaves_one_process(start, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "available_memory", lambda: 1.5e9)
    monkeypatch.setattr(quickstart, "available_cores", lambda: [0, 1])
    assert start(systems="standard,trades", processes=None) == 0
    assert "1.5 GB of memory are free: 1 process at a time" in capsys.readouterr().out


def test_the_page_shows_what_is_done_what_failed_and_what_waits(tmp_path):
    rows = [
        board.Row("trades", {"name": "trades-digits"}, tmp_path / "trades", state="done"),
        board.Row(
            "cse", {"name": "cse-digits"}, tmp_path / "cse", state="failed", reason="no memory"
        ),
        board.Row("gssl", {"name": "gssl-digits"}, tmp_path / "gssl"),
    ]
    records.save(record_of(61.25), rows[0].record_path)
    (tmp_path / "trades" / "metrics.jsonl").write_text('{"step": 1, "epoch": 1, "loss": 1.0}\n')
    page = quickstart.build_page(rows)
    for text in ("61.25", "cse", "no memory", "gssl"):
        assert text in page


def run_script(folder, *arguments, **environment):
    command = [sys.executable, str(ROOT / "experiments" / "quickstart.py"), *arguments]
    cache = str(ROOT / ".cache" / "xla")
    return subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": cache, **environment},
    )


def test_the_worker_trains_evaluates_and_tells(tmp_path, tfds_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", tfds_dir)
    worker = import_script("quickstart_worker")
    config = json.loads(configs.load("standard", "debug").to_json())
    told = []
    worker.run_system(config, tmp_path, lambda **message: told.append(message))
    assert told == [{"event": "evaluating"}]
    record = records.load(tmp_path / "configured.json")
    assert record["training"]["xla_flags"] == os.environ["XLA_FLAGS"]
    done = board.Row("standard", config, tmp_path)
    done.finish(record, 1.0)
    assert set(done.results) == {"clean", "fgsm", "pgd20"}
    assert done.trained() == 1.0


@pytest.mark.slow
def test_the_script_runs_is_interrupted_and_goes_on(tmp_path, tfds_dir):
    arguments = ("--systems=standard,cse,trades", "--variant=digits_debug", "--processes=2")
    with run_script(tmp_path, *arguments, TFDS_DATA_DIR=tfds_dir) as process:
        for line in process.stdout:
            if line.startswith("standard: clean"):
                break
        process.send_signal(signal.SIGTERM)
        assert "this goes on from here: " in process.stdout.read()
    assert process.returncode == 130
    with run_script(tmp_path, *arguments, TFDS_DATA_DIR=tfds_dir) as process:
        out = process.stdout.read()
    assert process.returncode == 0, out
    assert "standard: training" not in out
    page = (tmp_path / "runs" / "quickstart" / "report.html").read_text()
    for name in ("standard", "cse", "trades"):
        assert f"| {name}-digits-debug |" in out
        assert f"{name}-digits-debug" in page
        assert (tmp_path / "runs" / "quickstart" / name / "log.txt").exists()
