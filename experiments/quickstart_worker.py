"""A process of quickstart: trains and evaluates the systems that its parent names, one by one.

Reads {"name", "config", "workdir"} as JSON lines from stdin. Answers {"event": "ready"} first, then
for each system {"event": "evaluating"} and {"event": "done"} or {"event": "failed", "reason"} on
stdout. What a system prints goes to log.txt in its workdir. Where stdin ends, so does the process,
after saving what it trains.
"""

import gc
import json
import os
import pathlib
import queue
import signal
import sys
import threading
import traceback

import cli
import configs
import jax

from jaxdefense import runs
from jaxdefense.evaluation import protocols, records
from jaxdefense.train import train
from jaxdefense.train.loop import Interrupted

# Above so many bytes, compiled programs are dropped after a system: they fill gigabytes. Below,
# they are kept, since systems share many small ones.
MEMORY = 700e6


def resident_bytes() -> float:
    """The memory of this process; infinite where the system does not tell."""
    try:
        pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return float("inf")
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def read_tasks() -> queue.Queue:
    """A queue that the lines of stdin are put in; at its end the process is asked to end.

    A parent that was killed so takes its workers with it.
    """
    tasks: queue.Queue = queue.Queue()

    def read():
        # Unbuffered: a thread that waits inside a buffered file stops the interpreter from ending.
        with open(0, "rb", buffering=0, closefd=False) as lines:
            for line in lines:
                tasks.put(json.loads(line))
        os.kill(os.getpid(), signal.SIGTERM)  # in training: save, then end

    threading.Thread(target=read, daemon=True).start()
    return tasks


def check_device():
    """Ends the process, with one line, where JAX finds no device of JAX_PLATFORMS."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError):  # the second for cuda where its plugin is missing
        platforms = os.environ.get("JAX_PLATFORMS", "")
        sys.exit(f"JAX_PLATFORMS={platforms}: no such device here; unset it to run on the CPU")


def run_system(config, workdir, tell):
    """Trains and evaluates one system; its record is WORKDIR/configured.json.

    Args:
      config: plain values.
      workdir: its own folder.
      tell: is called with what the parent is told.
    """
    train(config, workdir, progress=False)
    tell(event="evaluating")
    run, variables, meta = runs.restore(workdir)
    training = {"checkpoint": "best", **meta, "xla_flags": os.environ.get("XLA_FLAGS", "")}
    record = protocols.configured(run, variables, training=training)
    record["command"] = configs.commands(config)
    records.save(record, workdir / "configured.json")


def main():
    parent = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # nothing that a library prints is taken for a message

    def tell(**message):
        parent.write(json.dumps(message) + "\n")

    cli.enable_cache()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    check_device()
    tasks = read_tasks()
    tell(event="ready")
    while True:
        task = tasks.get()
        workdir = pathlib.Path(task["workdir"])
        workdir.mkdir(parents=True, exist_ok=True)
        with (workdir / "log.txt").open("a", buffering=1) as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        try:
            run_system(task["config"], workdir, tell)
        except Interrupted as error:
            print(error, file=sys.stderr)
            sys.exit(143)
        except Exception as error:
            traceback.print_exc()
            tell(event="failed", reason=str(error) or type(error).__name__)
        else:
            tell(event="done")
        if resident_bytes() > MEMORY:
            jax.clear_caches()
            gc.collect()


if __name__ == "__main__":
    main()
