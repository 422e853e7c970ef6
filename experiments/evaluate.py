"""Evaluates a trained run on its whole test set and writes a record.

    python experiments/evaluate.py --workdir=runs/trades-mnist
    python experiments/evaluate.py --workdir=runs/trades-mnist --record=experiments/records/x.json

    python experiments/evaluate.py --workdir=runs/trades-mnist --protocol=autoattack
    python experiments/evaluate.py --workdir=runs/ipg-mnist --protocol=audit --examples=1000

The protocol `configured` runs the config's own attacks, `autoattack` AutoAttack; a killed
`autoattack` goes on where it was, and its flags are printed (docs/flags.md). `audit` asks what each
kind of knowledge breaks, oblivious to black box, and draws a page beside its record. Print tables
from records with experiments/tables.py.
"""

import pathlib

import cli
from absl import flags

from jaxdefense import files, runs
from jaxdefense.evaluation import protocols, records, tables

PROTOCOLS = {
    "configured": protocols.configured,
    "autoattack": protocols.autoattack,
    "audit": protocols.audit,
}

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a trained run.", required=True)
KIND = flags.DEFINE_enum("checkpoint", "best", ["best", "last"], "Which checkpoint.")
PROTOCOL = flags.DEFINE_enum("protocol", "configured", list(PROTOCOLS), "Which attacks.")
RECORD = flags.DEFINE_string(
    "record", None, "Where to write it; default WORKDIR/PROTOCOL[-last][-EXAMPLES].json."
)
EXAMPLES = flags.DEFINE_integer("examples", None, "Only the first so many test examples.")
PROGRESS = flags.DEFINE_bool("progress", True, "Show a progress bar.")


def main(argv):
    if len(argv) > 1:
        raise ValueError(f"unexpected arguments: {argv[1:]}")
    if PROTOCOL.value == "audit":
        from jaxdefense.evaluation import report  # needs matplotlib: said before the hours
    run, variables, meta = runs.restore(WORKDIR.value, kind=KIND.value)
    workdir = pathlib.Path(WORKDIR.value)
    parts = [PROTOCOL.value, *(["last"] if KIND.value == "last" else [])]
    parts += [str(EXAMPLES.value)] if EXAMPLES.value else []
    path = pathlib.Path(RECORD.value or workdir / f"{'-'.join(parts)}.json")
    options = {
        "training": {"checkpoint": KIND.value, **meta},
        "examples": EXAMPLES.value,
        "progress": PROGRESS.value,
    }
    if PROTOCOL.value == "autoattack":
        options["folder"] = workdir / f"autoattack-{KIND.value}-{EXAMPLES.value or 'all'}"
    record = PROTOCOLS[PROTOCOL.value](run, variables, **options)
    records.save(record, path)
    for note in record.get("dataset", {}).get("notes", ()):
        print(f"data: {note}")
    if PROTOCOL.value == "audit":
        for predictor in record["audit"]:
            print(tables.tier_table(record, predictor), "\n")
            print(tables.check_table(record, predictor), "\n")
        page = path.with_suffix(".html")
        files.write_text(page, report.audit_page(record))
        print(f"page: {page}")
    else:
        print(tables.accuracy_table([record]), "\n")
        for flag in record.get("cascade", {}).get("flags", ()):
            print("{severity}: {predictor}: {name}: {evidence}".format(**flag))
    print(f"record: {path}")


if __name__ == "__main__":
    cli.run(main, spread=True)
