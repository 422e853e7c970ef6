"""Trains one config, or goes on with it where it was interrupted.

    python experiments/train.py --config=trades:mnist --workdir=runs/trades-mnist
    python experiments/train.py --config=trades:mnist --workdir=runs/s1 --config.seed=1

    python experiments/train.py --config=pgd_at:mnist --workdir=runs/longer \\
        --init_from=runs/trades-mnist --config.train.length=4e

The last starts from the weights of another run; the schedule and the optimiser are the new run's,
from its first step. --new_head leaves out its last layer, for other classes; --frozen names what
stays as it starts, e.g. classifier/conv1. --select_with=apgd lets a second attack choose `best`
among the best few checkpoints; what training warns of is explained in docs/flags.md.

On the CPU each core is a device, as far as they share the batch evenly; JAX_NUM_CPU_DEVICES=1 keeps
to one. --distributed joins several processes, on one host or many: docs/devices.md.

The workdir then holds config.json, metrics.jsonl, TensorBoard events and the checkpoints `last`
and `best`; experiments/evaluate.py reads it.
"""

import json
import pathlib

import cli
from absl import flags
from ml_collections import config_flags

from jaxdefense import data, distributed
from jaxdefense.runs.run import TRAIN_DEFAULTS
from jaxdefense.train import train

CONFIG = config_flags.DEFINE_config_file("config", None, cli.CONFIG_HELP)
WORKDIR = flags.DEFINE_string("workdir", None, "The run's own folder.", required=True)
INIT_FROM = flags.DEFINE_string("init_from", None, "Workdir of a run, or a file, to start from.")
CHECKPOINT = flags.DEFINE_enum("init_checkpoint", "best", ["best", "last"], "Which of its weights.")
NEW_HEAD = flags.DEFINE_bool("new_head", False, "With --init_from: a new last layer.")
FROZEN = flags.DEFINE_list("frozen", [], "Roles, or parts of them, that stay as they start.")
SELECT_WITH = flags.DEFINE_string(
    "select_with", None, "A second attack that chooses `best` among the best three checkpoints."
)
DISTRIBUTED = flags.DEFINE_bool("distributed", False, cli.DISTRIBUTED_HELP)
PROGRESS = flags.DEFINE_bool("progress", None, cli.PROGRESS_HELP)
flags.mark_flag_as_required("config")


def batch_size():
    """The size of the config's batches, whatever stands there: `train` refuses a wrong one."""
    section = CONFIG.value.get("train") or {}
    return section.get("batch_size", TRAIN_DEFAULTS["batch_size"])


def main(argv):
    if len(argv) > 1:
        raise ValueError(f"unexpected arguments: {argv[1:]}")
    config = json.loads(CONFIG.value.to_json())
    if INIT_FROM.value:
        kind = "file" if pathlib.Path(INIT_FROM.value).is_file() else "workdir"
        start = {kind: INIT_FROM.value, "new_head": NEW_HEAD.value}
        if kind == "workdir":
            start["checkpoint"] = CHECKPOINT.value
        config["train"]["init_from"] = start
    elif NEW_HEAD.value:
        raise ValueError("--new_head needs --init_from=WORKDIR")
    elif CHECKPOINT.present:
        raise ValueError("--init_checkpoint needs --init_from=WORKDIR")
    if FROZEN.value:
        config["train"]["frozen"] = FROZEN.value
    if SELECT_WITH.value:
        given = config["train"].get("select_with", {})
        config["train"]["select_with"] = {**given, "name": SELECT_WITH.value}
    section = config.get("dataset")  # `train` says where it is missing
    if section and not data.has_test(section):
        # Said before the workdir is claimed: a run cannot be given other data afterwards.
        raise ValueError(
            "no test images: evaluate.py would have nothing to judge; add --config.dataset.test=0.2"
        )
    summary = train(config, WORKDIR.value, progress=cli.shows_progress(PROGRESS.value))
    if not distributed.is_writer():
        return
    best = {name: round(value, 2) for name, value in summary["best"].items()}
    told = f"{summary['steps']} steps in {summary['seconds']:.0f} s; best checkpoint: "
    told += str(best or "lost, evaluate with --checkpoint=last")
    if warnings := summary["warnings"]:
        names = ", ".join(dict.fromkeys(warned["name"] for warned in warnings))
        told += f"; {len(warnings)} warning{'s' * (len(warnings) > 1)}, see docs/flags.md: {names}"
    print(told)


if __name__ == "__main__":
    cli.ending.told = "the same command goes on from the last checkpoint"
    cli.ending.outlives_readers = True
    cli.run(main, spread=True, batch=batch_size, saves=True)
