"""Trains one config, or goes on with it where it was interrupted.

    python experiments/train.py --config=trades:mnist --workdir=runs/trades-mnist
    python experiments/train.py --config=trades:mnist --workdir=runs/s1 --config.seed=1

The workdir then holds config.json, metrics.jsonl, TensorBoard events and the checkpoints `last`
and `best`; experiments/evaluate.py reads it.
"""

import json

import cli
from absl import flags
from ml_collections import config_flags

from jaxdefense.train import train

CONFIG = config_flags.DEFINE_config_file("config", None, cli.CONFIG_HELP)
WORKDIR = flags.DEFINE_string("workdir", None, "The run's own folder.", required=True)
PROGRESS = flags.DEFINE_bool("progress", True, "Show a progress bar.")
flags.mark_flag_as_required("config")


def main(argv):
    if len(argv) > 1:
        raise ValueError(f"unexpected arguments: {argv[1:]}")
    summary = train(json.loads(CONFIG.value.to_json()), WORKDIR.value, progress=PROGRESS.value)
    best = {name: round(value, 2) for name, value in summary["best"].items()}
    print(f"{summary['steps']} steps in {summary['seconds']:.0f} s; best checkpoint: {best}")


if __name__ == "__main__":
    cli.run(main)
