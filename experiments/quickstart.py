"""Trains and evaluates every system on the embedded digits, prints the table, writes a report.

    python experiments/quickstart.py                 # runs/quickstart/report.html
    python experiments/quickstart.py --workdir=/tmp/q

A run that was interrupted goes on where it was.
"""

import json
import pathlib

import cli
import configs
from absl import flags

from jaxdefense import files, runs
from jaxdefense.evaluation import protocols, records, tables
from jaxdefense.train import train

with cli.needed("plots"):
    from jaxdefense.evaluation import report

WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Folder of the runs and the report.")
RECORDS = flags.DEFINE_string("records", None, "Keep the records in this folder too.")
PROGRESS = flags.DEFINE_bool("progress", True, "Show progress bars.")


def main(argv):
    if len(argv) > 1:
        raise ValueError(f"unexpected arguments: {argv[1:]}")
    folder = pathlib.Path(WORKDIR.value)
    found = []
    names = configs.names()
    for i, name in enumerate(names, 1):
        workdir = folder / name
        print(f"[{i}/{len(names)}] {name}", flush=True)
        config = json.loads(configs.load(name, "digits").to_json())
        train(config, workdir, progress=PROGRESS.value)
        run, variables, meta = runs.restore(workdir)
        training = {"checkpoint": "best", **meta}
        record = protocols.configured(run, variables, training=training, progress=PROGRESS.value)
        record["command"] = configs.commands(config)
        records.save(record, workdir / "configured.json")
        if RECORDS.value:
            records.save(record, pathlib.Path(RECORDS.value) / f"{name}.json")
        found.append(record)
    table, source = tables.accuracy_table(found), tables.provenance(found)
    page = report.leaderboard(found, title="jaxdefense on digits")
    files.write_text(folder / "report.html", page)
    print(f"\n{table}\n\n{source}\nreport: {folder / 'report.html'}")


if __name__ == "__main__":
    cli.run(main)
