"""Several processes over gloo: the bits of one process with as many devices, one of them killed."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import test_train

from jaxdefense import data, distributed, runs, train
from jaxdefense.evaluation import Evaluator, cascade
from jaxdefense.train import devices

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = 130  # more than one batch of two devices, less than one of four

# Trains, restores and evaluates as scripts do; process 1 dies after the step DIE_AT, if it is set.
WORKER = f"""
import json, os, pathlib, signal, sys
import jax
jax.config.update("jax_compilation_cache_dir", {str(ROOT / ".cache" / "xla")!r})
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)
from jaxdefense import data, distributed, evaluation, runs, train
from jaxdefense.evaluation import protocols, records
from jaxdefense.train import loop

if "JAX_NUM_PROCESSES" in os.environ:
    distributed.initialize()
values, workdir = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
report = loop.Trainer._report
def die(self, log, bar, segment, step, sums):
    report(self, log, bar, segment, step, sums)
    if jax.process_index() == 1 and step == int(os.environ["DIE_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
if "DIE_AT" in os.environ:
    loop.Trainer._report = die
train.train(values, workdir, progress=False)
run, variables, meta = runs.restore(workdir, kind="last")
record = protocols.configured(run, variables, training=meta, examples={EXAMPLES})
arrays = run.arrays("test").take(slice({EXAMPLES}))
verdict = evaluation.autoattack(
    run.apply(run.defense.primary), data.to_float(arrays.images), arrays.labels, run.threat,
    variables=variables, attacks=("apgd-ce",), ids=arrays.ids, folder=workdir / "cascade",
)
print(json.dumps(dict(robust=verdict.robust.tolist(), x_adv=float(verdict.x_adv.sum()))))
if distributed.is_writer():
    records.save(record, workdir / "configured.json")
"""

LOST = """
import os, signal
from jaxdefense import distributed
distributed.initialize()
distributed.tell("go on from step 7")
if distributed.is_writer():
    os.kill(os.getpid(), signal.SIGKILL)
distributed.barrier("never")
"""

# Trains, then begins to evaluate, each with what this process was given.
DIFFERENT = """
import json, sys
import numpy as np
from jaxdefense import distributed, train
from jaxdefense.evaluation import journal
distributed.initialize()
values, folder, seed = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
description = dict(threat="linf", seed=seed, stages={})
for attempt in (
    lambda: train.train(values, folder, progress=False),
    lambda: journal.Journal(folder, description, np.zeros((1, 2))),
):
    try:
        attempt()
    except ValueError as error:
        print(error, file=sys.stderr)
distributed.leave(1)
"""


def config(tfds_dir):
    changes = {
        "defense.steps": 1,
        "train.length": "9s",
        "train.steps_per_dispatch": 3,
        "validation": {"name": "fgsm"},
        "evaluation.attacks": {"fgsm": {"name": "fgsm"}},
    }
    return test_train.config(tfds_dir, **changes)


def environment(count, **more):
    """This process's, with another number of devices; of no other process."""
    flags = re.sub(r"(device_count)=\d+", rf"\1={count}", os.environ["XLA_FLAGS"])
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), **more}


def start(code, *words, env):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", code, *words], cwd=ROOT, env=env, **pipes)


def finish(*processes):
    """(exit code, stdout, stderr) of each; none outlives the test."""
    try:
        ends = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *end) for p, end in zip(processes, ends, strict=True)]


def pair(code, words, **more):
    """Two processes with two devices each; `words` has each one's own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    told = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", **more}
    return [
        start(code, *own, env=environment(2, JAX_PROCESS_ID=str(i), **told))
        for i, own in enumerate(words)
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tfds_dir):
    """Workdirs: `single` of one process with four devices, `killed` and `pair` of two processes.

    The second process is given a folder that no other sees: the first one's is enough.
    """
    root = tmp_path_factory.mktemp("distributed")
    values = json.dumps(config(tfds_dir))
    words = [(values, str(root / name)) for name in ("pair", "elsewhere")]
    began = time.monotonic()
    dying = pair(WORKER, words, DIE_AT="6")
    dying[1].wait(timeout=240)
    died = time.monotonic()
    killed = finish(*dying)
    seconds = time.monotonic() - died
    assert died - began < 240
    assert (root / "pair" / "last" / "3").is_dir(), killed
    shutil.copytree(root / "pair", root / "killed")
    single = start(WORKER, values, str(root / "single"), env=environment(4))
    ends = {"killed": killed, "pair": finish(*pair(WORKER, words)), "single": finish(single)}
    return root, ends, seconds


def leaves(workdir):
    _, model, meta = runs.restore(workdir, kind="last")
    return jax.tree.leaves(model), meta


class TestTwoProcesses:
    def test_one_killed_ends_the_other_with_a_line(self, folders):
        root, ends, seconds = folders
        (code, _, said), (victim, *_) = ends["killed"]
        assert victim == -signal.SIGKILL
        assert code not in (0, None)
        assert seconds < 60
        assert "process 0 of 2" in said
        assert f"the last checkpoint in {root / 'pair'} is that of step 3" in said
        assert sorted(p.name for p in (root / "killed" / "last").glob("[0-9]*")) == ["3"]

    def test_gone_on_with_they_end_with_the_bits_of_one_process(self, folders):
        root, ends, _ = folders
        for name in ("pair", "single"):
            for code, _, said in ends[name]:
                assert code == 0, said
        (ours, meta), (theirs, _) = leaves(root / "pair"), leaves(root / "single")
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)
        assert meta["step"] == 9
        assert meta["devices"] == [{"step": 0, "devices": 4, "processes": 2}]

    def test_files_are_written_once_by_the_first(self, folders, tfds_dir):
        root, *_ = folders
        assert not (root / "elsewhere").exists()
        assert [p.name for p in (root / "pair" / "last").glob("[0-9]*")] == ["9"]
        written = json.loads((root / "pair" / "config.json").read_text())
        assert written["dataset"] == config(tfds_dir)["dataset"]
        assert len(list((root / "pair" / "cascade").glob("apgd-ce-*.npz"))) == 1
        logs = [(root / name / "metrics.jsonl").read_text() for name in ("pair", "single")]
        assert logs[0] == logs[1]

    def test_verdicts_are_those_of_one_device(self, folders):
        root, ends, _ = folders
        # gloo writes to stdout too
        told = [json.loads(out.splitlines()[-1]) for _, out, _ in (*ends["pair"], *ends["single"])]
        assert told[0] == told[1] == told[2]
        run, variables, _ = runs.restore(root / "pair", kind="last")
        arrays = run.arrays("test").take(slice(EXAMPLES))
        apply, images = run.apply(run.defense.primary), data.to_float(arrays.images)
        one = Evaluator(apply, run.threat, devices=jax.local_devices()[:1])
        stages = cascade.stages(run.threat, 10, attacks=("apgd-ce",))
        verdict = cascade.run_stages(one, variables, images, arrays.labels, stages, ids=arrays.ids)
        assert verdict.robust.tolist() == told[0]["robust"]
        records = [
            json.loads((root / n / "configured.json").read_text()) for n in ("pair", "single")
        ]
        assert records[0]["results"] == records[1]["results"]
        bits = one.bits(variables, images, arrays.labels, arrays.ids, run.attacks, seed=run.seed)
        found = records[0]["results"][run.defense.primary]
        assert found["fgsm"]["accuracy"] == 100 * bits["fgsm"].mean()
        assert records[0]["training"]["devices"][-1]["processes"] == 2

    def test_another_number_of_devices_is_said_and_recorded(
        self, folders, tmp_path, tfds_dir, capsys
    ):
        root, *_ = folders
        shutil.copytree(root / "killed", tmp_path / "resumed")
        train.train(config(tfds_dir), tmp_path / "resumed", progress=False)
        (line,) = [x for x in capsys.readouterr().err.splitlines() if "devices" in x]
        assert "4 devices of 2 processes until step 3, goes on with 2 devices of 1 process" in line
        log = (tmp_path / "resumed" / "metrics.jsonl").read_text().splitlines()
        changes = [json.loads(line) for line in log if "devices" in line]
        assert changes == [{"step": 3, "devices": 2, "processes": 1}]
        meta = runs.restore(tmp_path / "resumed", kind="last").meta
        assert [count["devices"] for count in meta["devices"]] == [4, 2]
        assert [point[0] for point in meta["validation"]] == [1.0, 1.5]

    def test_the_first_one_killed_leaves_a_line_of_the_other(self):
        (first, *_), (second, _, said) = finish(*pair(LOST, [(), ()]))
        assert first == -signal.SIGKILL
        assert second not in (0, None)
        assert "process 1 of 2" in said
        assert "go on from step 7" in said

    def test_different_configs_are_refused_in_both(self, tmp_path, tfds_dir):
        values = config(tfds_dir)
        others = {**values, "threat": {**values["threat"], "eps": 0.2}}
        folder = tmp_path / "run"
        words = [(json.dumps(v), str(folder), str(i)) for i, v in enumerate((values, others))]
        eps = values["threat"]["eps"]
        for code, _, said in finish(*pair(DIFFERENT, words)):
            assert code == 1
            for what, changed in (
                ("config", f"threat.eps: {eps} in process 0, 0.2 in process 1"),
                ("evaluation", "seed: 0 in process 0, 1 in process 1"),
            ):
                line = f"the processes differ in their {what} ({changed}): every process needs the"
                assert line in said
        assert not folder.exists()


class TestOneProcess:
    def test_everything_is_the_identity(self):
        tree = {"a": np.arange(3)}
        assert distributed.broadcast(tree) is tree
        assert distributed.from_writer(lambda: tree) is tree
        assert distributed.is_writer()
        assert [distributed.any_process(flag) for flag in (True, False)] == [True, False]
        distributed.check_same("images", np.arange(3))
        distributed.check_same_values("config", {"seed": 0})
        with pytest.raises(SystemExit, match="3"):
            distributed.leave(3)

    def test_nothing_that_says_who_the_others_are(self, monkeypatch):
        monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
        with pytest.raises(ValueError, match="JAX_NUM_PROCESSES must be an integer, got 'two'"):
            distributed.initialize()

    def test_a_count_that_stays_is_kept_once(self):
        now = devices.count()
        assert devices.history([], 0) == [{"step": 0, **now}]
        assert devices.history([{"step": 0, **now}], 5) == [{"step": 0, **now}]
        before = [{"step": 0, "devices": 7, "processes": 3}]
        assert devices.history(before, 5) == [*before, {"step": 5, **now}]
