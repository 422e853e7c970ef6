"""Compiles what users run for a TPU that is not there: does it compile, fit, how long will it take?

    make tpu-check                                    # every row: an hour or two on two cores
    make tpu-check ARGS="--rows=m2at,pgd_at --dtypes=bfloat16"
    python experiments/accelerators --list

A row is a config's training at its CIFAR-10 recipe, or an attack or a stage of AutoAttack on
pgd_at:cifar10's network, in one dtype. Each is compiled in a process of its own for four chips of a
TPU v5e, and written to the record as soon as it is done; rows that are in the record are skipped. A
row that does not compile is in the record with its reason. `--again` does those anew.

Needs the package libtpu, of the version that this jax names, in --libtpu (the Makefile puts it
there); no TPU. The times are lower limits by arithmetic and memory traffic (docs/accelerators.md).
"""

import concurrent.futures
import contextlib
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # the scripts' folder

import cli
import jax
import unattended

from accelerators import costs, programs, tables
from jaxdefense import registry
from jaxdefense.evaluation import records

ROOT = pathlib.Path(__file__).parents[2]
RECORD = flags.DEFINE_string(
    "record", "experiments/records/accelerators/v5e.json", "Where the rows are kept."
)
ROWS = flags.DEFINE_list("rows", [], "Only rows whose name holds one of these words.")
DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "In this order.")
WIDTH = flags.DEFINE_integer("width", None, "Of the networks: 8 is quick, for what fails at all.")
LEVEL = flags.DEFINE_enum(
    "level", "O0", ["O0", "O1", "O2", "O3", "UNKNOWN"], "XLA's optimisation; UNKNOWN: its default."
)
LIMIT = flags.DEFINE_integer("limit", 3600, "Seconds for a row.")
AGAIN = flags.DEFINE_bool("again", False, "Compile again what failed.")
JOBS = flags.DEFINE_integer(
    "jobs", len(unattended.available_cores()), "Rows at a time, each of 1 to 2 GB.", lower_bound=1
)
LIST = flags.DEFINE_bool("list", False, "Print the rows' names and end.")
LIBTPU = flags.DEFINE_string("libtpu", str(ROOT / ".venv" / "libtpu"), "The folder of libtpu.")
ONE = flags.DEFINE_string("one", None, "Used by the script itself: one row, its answer on stdout.")

TOPOLOGY = "v5e:2x2"
LIMITS = {"flops": 197e12, "bandwidth": 819e9, "memory": 16e9}  # of one chip, docs/accelerators.md
BATCH = 512  # images of an attack, over all chips, as `Evaluator` has by default
RUNNING = set()  # processes that compile a row
NETWORK = "pgd_at:cifar10"  # that is attacked

SYSTEMS = ("pgd_at", "m2at", "add", "csa", "cse", "gssl", "claf", "ipg")
RIVALS = (
    "trades",
    "mart",
    "avmixup",
    "iat",
    "fgsm_at",
    "standard",
    "ard",
    "iad",
    "adaad",
    "frl",
    "acl",
    "rocl",
    "supcon",
    "advprop",
    "gssl_baseline",
    "anti_adversary",
    "ape_gan",
    "hgd",
    "zhang_evans",
    "defensive_distillation",
    "cse_at",
    "m2at_shuffle",
)


def training_rows(names):
    """NAME:cifar10 of those configs that have the variant."""
    return [f"{name}:cifar10" for name in names if "cifar10" in programs.configs.variants(name)]


def row_names():
    """All rows in the order of their worth: systems, attacks, rivals."""
    judged = [f"attack {name}" for name in programs.attack_rows()]
    return [*training_rows(SYSTEMS), *judged, *training_rows(RIVALS)]


def compile_row(name, dtype):
    """The row's record, in a process that has libtpu."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices
    model = {} if WIDTH.value is None else {"width": WIDTH.value}
    with tempfile.TemporaryDirectory() as folder, programs.traced_for("tpu"):
        is_attack = name.startswith("attack ")
        config = programs.load_config(NETWORK if is_attack else name, dtype, model)
        run = programs.build_run(config, pathlib.Path(folder))
        if is_attack:
            label = name.removeprefix("attack ")
            attack, rounds = programs.attack_rows()[label]
            found = [programs.judging(run, label, attack, devices, batch_size=BATCH, rounds=rounds)]
        else:
            found = list(programs.training(run, devices))
        return {
            "kind": "attack" if is_attack else "train",
            "config": config,
            "programs": [compile_program(program, devices) for program in found],
        }


def compile_program(program, devices):
    """Compiles a program; what it costs and holds."""
    began = time.monotonic()
    compiled = program.mapped.lower(*program.arguments).compile()
    seconds = time.monotonic() - began
    memory = compiled.memory_analysis()
    held = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "reused": memory.alias_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    jaxpr = jax.make_jaxpr(program.body, axis_env=[program.axis])(*program.inputs)
    found = compiled.cost_analysis()
    xla = costs.Cost(found["flops"], found["bytes accessed"])
    total = costs.cost(xla, compiled.as_text(), jaxpr.jaxpr, program.rounds)
    return {
        "name": program.name,
        "times": program.times,
        "images": program.images,
        "seconds": round(seconds, 1),
        "memory": sum(held.values()) - 2 * held["reused"],
        "held": held,
        "flops": total.flops,
        "moved": total.moved,
        "products": costs.products(jaxpr.jaxpr, program.rounds),
    }


def run_row(name, dtype):
    """The row, compiled in another process: one that aborts leaves the script going."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": os.pathsep.join([LIBTPU.value, os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, __file__, f"--one={name}", f"--dtypes={dtype}"]
    command += [f"--level={LEVEL.value}"]
    command += [] if WIDTH.value is None else [f"--width={WIDTH.value}"]
    began = time.monotonic()
    row = {"row": name, "dtype": dtype, "level": LEVEL.value}
    try:
        done = _run(command, environment)
    except subprocess.TimeoutExpired:
        return {**row, "failed": f"not compiled after {LIMIT.value} s", "seconds": LIMIT.value}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    answer = json.loads(lines[-1]) if lines else {"failed": _last_line(done)}
    return {**row, **answer, "seconds": round(time.monotonic() - began, 1)}


def _run(command, environment):
    """The finished process, which `_end_all` may end before."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, env=environment, **pipes) as process:
        RUNNING.add(process)
        try:
            out, err = process.communicate(timeout=LIMIT.value)
        finally:
            process.kill()
            RUNNING.discard(process)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _end_all(pool):
    """Ends what runs and what waits: nobody is there any more to write it down."""
    pool.shutdown(wait=False, cancel_futures=True)
    for process in list(RUNNING):
        process.kill()


def libtpu_version():
    """The version of the package in --libtpu, "unknown" where it does not say."""
    found = importlib.metadata.distributions(path=[LIBTPU.value])
    return next((d.version for d in found if d.name == "libtpu"), "unknown")


def _in_order(rows):
    """As listed, each in float32 first; then what is listed no more."""
    places = {name: place for place, name in enumerate(row_names())}
    return sorted(
        rows, key=lambda row: (places.get(row["row"], len(places)), row["dtype"] != "float32")
    )


def _told(row):
    said = row.get("failed", "compiles")
    return f"{row['row']}, {row['dtype']}: {said} ({row['seconds']:.0f} s)"


def _last_line(done):
    lines = done.stderr.strip().splitlines()
    return f"exit code {done.returncode}: {lines[-1] if lines else 'nothing said'}"


def answer_one(name, dtype):
    """Prints a row, or why there is none, as one line of JSON."""
    try:
        answer = compile_row(name, dtype)
    except Exception as error:
        traceback.print_exc()
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        answer = {"failed": reason[:400]}
    print(json.dumps(answer), flush=True)


def main(argv):
    if ONE.value:
        jax.config.update("jax_optimization_level", LEVEL.value)
        answer_one(ONE.value, *DTYPES.value)
        return
    names = [n for n in row_names() if not ROWS.value or any(word in n for word in ROWS.value)]
    if not names:
        registry.check_known("row", ROWS.value, row_names())
    if LIST.value:
        print("\n".join(names))
        return
    if not pathlib.Path(LIBTPU.value, "libtpu").is_dir():
        raise ValueError(f"no package libtpu in {LIBTPU.value}; make tpu-check puts it there")
    path = pathlib.Path(RECORD.value)
    rows = records.load(path)["rows"] if path.exists() else []
    if AGAIN.value:
        rows = [row for row in rows if "failed" not in row]
    todo = [(name, dtype) for dtype in DTYPES.value for name in names]
    todo = [one for one in todo if one not in [(row["row"], row["dtype"]) for row in rows]]
    cli.ending.told = f"finished rows are in {path}: the same command goes on"
    print(f"{len(todo)} rows, {JOBS.value} at a time, each some minutes ...", flush=True)
    began = time.monotonic()
    pool = concurrent.futures.ThreadPoolExecutor(JOBS.value)
    with contextlib.ExitStack() as stack:
        stack.callback(_end_all, pool)  # also at Ctrl-C
        started = [pool.submit(run_row, *one) for one in todo]
        for i, row in enumerate(concurrent.futures.as_completed(started), 1):
            rows = _in_order([*rows, row.result()])
            print(f"{i} of {len(todo)}: {_told(row.result())}", flush=True)
            more = dict(rows=rows, limits=LIMITS, topology=TOPOLOGY, libtpu=libtpu_version())
            spent = time.monotonic() - began
            record = records.make("accelerators", {}, {}, seed=0, seconds=spent, **more)
            records.save(record, path)
    print(tables.summary(rows))


if __name__ == "__main__":
    cli.run(main)
