"""Evaluates a trained run on its whole test set and writes a record.

    python experiments/evaluate.py --workdir=runs/trades-mnist
    python experiments/evaluate.py --workdir=runs/trades-mnist --record=experiments/records/x.json

    python experiments/evaluate.py --workdir=runs/trades-mnist --protocol=autoattack
    python experiments/evaluate.py --workdir=runs/ipg-mnist --protocol=audit --examples=1000

    python experiments/evaluate.py --pretrained=pgd_at-mnist-linf --examples=500
    python experiments/evaluate.py --pretrained=mine.safetensors --protocol=autoattack

The protocol `configured` runs the config's own attacks, `autoattack` AutoAttack; a killed
`autoattack` goes on where it was, and its flags are printed (docs/flags.md). `audit` asks what each
kind of knowledge breaks, oblivious to black box, and draws a page beside its record. Print tables
from records with experiments/tables.py. A pretrained run is one that comes with the package, or a
file of experiments/export.py.

--save_images=DIR keeps the adversarial images: DIR/PREDICTOR/*.png of 8 bits, a CSV of what is said
of each before and after rounding, an npz of the floats; under AutoAttack also robustbench.json, the
record in the form of RobustBench's leaderboard. --distributed joins several processes, which share
the images: docs/devices.md.
"""

import json
import logging
import pathlib
import shutil
import sys

import cli
import configs
from absl import flags

from jaxdefense import data, distributed, files, runs, validate
from jaxdefense.attacks import checks
from jaxdefense.evaluation import images, journal, protocols, records, robustbench, tables
from jaxdefense.models import zoo

PROTOCOLS = {
    "configured": protocols.configured,
    "autoattack": protocols.autoattack,
    "audit": protocols.audit,
}

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a trained run.")
PRETRAINED = flags.DEFINE_string(
    "pretrained", None, "Instead: a run that comes with the package, or a *.safetensors file."
)
KIND = flags.DEFINE_enum("checkpoint", "best", ["best", "last"], "Which checkpoint.")
PROTOCOL = flags.DEFINE_enum("protocol", "configured", list(PROTOCOLS), "Which attacks.")
RECORD = flags.DEFINE_string(
    "record",
    None,
    "Where to write it; default WORKDIR/PROTOCOL[-last][-EXAMPLES].json, where WORKDIR is "
    "runs/pretrained/NAME for a pretrained run.",
)
SAVE_IMAGES = flags.DEFINE_string("save_images", None, "Keep adversarial images in this folder.")
EXAMPLES = flags.DEFINE_integer("examples", None, "Only the first so many test examples.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, cli.DISTRIBUTED_HELP)
PROGRESS = flags.DEFINE_bool("progress", None, cli.PROGRESS_HELP)


def find_run():
    """Where the trained run is, and the folder that its record goes to.

    Raises:
      ValueError: none is named, or two are, or an unknown one.
    """
    if bool(WORKDIR.value) == bool(PRETRAINED.value):
        known = ", ".join(zoo.pretrained())
        raise ValueError(f"give --workdir=FOLDER or --pretrained=NAME or FILE; names: {known}")
    if WORKDIR.value:
        return WORKDIR.value, pathlib.Path(WORKDIR.value)
    name = PRETRAINED.value
    path = pathlib.Path(name) if name.endswith(".safetensors") else zoo.pretrained_path(name)
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    return path, pathlib.Path("runs", "pretrained", path.stem)


def keep_images(predictor, evaluator, variables, arrays, x_adv):
    """Writes one predictor's adversarial images; see `protocols.Keep`."""
    rows = images.save_images(
        pathlib.Path(SAVE_IMAGES.value) / predictor,
        evaluator.apply,
        data.to_float(arrays.images),
        arrays.labels,
        x_adv,
        evaluator.threat,
        variables=variables,
        ids=arrays.ids,
    )
    fooled, rounded = (sum(row[key] for row in rows) for key in ("fooled", "fooled_8bit"))
    if distributed.is_writer():
        print(f"{predictor}: {fooled} of {len(rows)} fooled, {rounded} after rounding to 8 bits")


def architecture(module):
    """A network's name as leaderboards write it: "WideResNet-34-10", "ResNet-18", "CNN"."""
    fields = ("depth", "width") if type(module).__name__ == "WideResNet" else ("depth",)
    numbers = [str(getattr(module, field)) for field in fields if getattr(module, field, None)]
    return "-".join([type(module).__name__, *numbers])


def print_stages():
    """Writes a line on stderr for each attack of AutoAttack that is finished."""
    journal.LOG.addHandler(logging.StreamHandler())
    journal.LOG.setLevel(logging.INFO)
    journal.LOG.propagate = False


def main(argv):
    if len(argv) > 1:
        raise ValueError(f"unexpected arguments: {argv[1:]}")
    chosen = {f"--{flag.name}": flag.value for flag in (PROTOCOL, KIND, EXAMPLES)}
    distributed.check_same_values("command", {**chosen, "--save_images": bool(SAVE_IMAGES.value)})
    source, workdir = find_run()
    if EXAMPLES.value is not None:
        checks.check_count("--examples", EXAMPLES.value)
    if SAVE_IMAGES.value:
        images.check_folder(SAVE_IMAGES.value)  # said before the hours
    if RECORD.value:
        validate.check_file("--record", RECORD.value)
    parts = [PROTOCOL.value, *(["last"] if KIND.value == "last" else [])]
    parts += [str(EXAMPLES.value)] if EXAMPLES.value else []
    path = pathlib.Path(RECORD.value or workdir / f"{'-'.join(parts)}.json")
    if not RECORD.value and not distributed.from_writer(lambda: files.is_writable(workdir)):
        raise ValueError(f"{workdir} cannot be written to: give --record=FILE in another folder")
    lock = path.with_name(f"{path.name}.lock")
    with distributed.claimed(lock, "evaluation", path.parent):
        evaluate(source, workdir, path)


def find_folder(workdir, path):
    """Where what is finished is kept: in the workdir, or beside the record if it is read-only.

    Args:
      workdir: of the run.
      path: of the record.
    """
    name = f"{PROTOCOL.value}-{KIND.value}-{EXAMPLES.value or 'all'}"
    if distributed.from_writer(lambda: files.is_writable(workdir / name)):
        return workdir / name
    folder = path.with_name(f"{path.stem}-{name}")
    if distributed.is_writer():
        told = f"note: {workdir} cannot be written to: what is finished is kept in {folder}"
        print(told, file=sys.stderr)
    return folder


def evaluate(source, workdir, path):
    """Judges a run and writes its record.

    Args:
      source: of the run, as `runs.restore` takes it.
      workdir: for what is kept of an evaluation that is not finished.
      path: of the record.
    """
    if PROTOCOL.value == "audit":
        from jaxdefense.evaluation import report  # needs an extra: said before the hours
    progress = cli.shows_progress(PROGRESS.value)
    if not progress and distributed.is_writer():
        print_stages()
    run, variables, meta = runs.restore(source, kind=KIND.value)
    options = {
        "training": {"checkpoint": KIND.value, **meta},
        "examples": EXAMPLES.value,
        "progress": progress,
        "keep": keep_images if SAVE_IMAGES.value else None,
    }
    folder = find_folder(workdir, path)
    cli.ending.told = f"the same command goes on from what is in {folder}"
    record = PROTOCOLS[PROTOCOL.value](run, variables, folder=folder, **options)
    if not distributed.is_writer():
        return
    record["command"] = configs.commands(run.config, protocol=PROTOCOL.value, checkpoint=KIND.value)
    records.save(record, path)
    if PROTOCOL.value != "autoattack":  # whose folder is small, and gives its verdict again
        shutil.rmtree(folder)
    if SAVE_IMAGES.value and PROTOCOL.value == "autoattack" and len(record["results"]) == 1:
        entry = robustbench.entry(record, architecture(run.module))
        target = pathlib.Path(SAVE_IMAGES.value) / "robustbench.json"
        files.write_text(target, json.dumps(entry, indent=2) + "\n")
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
    for warned in record["training"].get("warnings", ()):
        print("in training: {name}: {evidence}".format(**warned))
    print(f"record: {path}")


if __name__ == "__main__":
    cli.ending.told = "there is no record, and the same command begins anew"
    cli.ending.outlives_readers = True
    cli.run(main, spread=True)
