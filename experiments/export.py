"""Writes a trained run to one file, which needs no workdir: config, weights, checksums; no pickle.

    python experiments/export.py --workdir=runs/trades-mnist --file=trades.safetensors
    python experiments/evaluate.py --pretrained=trades.safetensors

    python experiments/export.py --zoo=runs/quickstart     # every run in there, into jaxdefense/zoo
    python experiments/export.py --zoo=runs/study/m2at-mnist-0,runs/study/csa-mnist-0 \
        --record=experiments/records/study/mnist/configured

A record (by default WORKDIR/configured.json, where there is one; with --zoo, --record is a folder
of NAME.json) is copied beside the file, after a check that it is of this run and that the file
classifies the clean test images as it says.
"""

import pathlib
import tempfile

import cli
import numpy as np
from absl import flags

from jaxdefense import checksums, data, files, runs, validate
from jaxdefense.evaluation import Evaluator, records
from jaxdefense.models import zoo

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a trained run.")
FILE = flags.DEFINE_string("file", None, "Where to write it, *.safetensors.")
ZOO = flags.DEFINE_list("zoo", [], "Instead: workdirs with a record, or folders of such workdirs.")
INTO = flags.DEFINE_string("into", str(zoo.FOLDER), "Where --zoo writes NAME-NORM.safetensors.")
KIND = flags.DEFINE_enum("checkpoint", "best", ["best", "last"], "Which checkpoint.")
RECORD = flags.DEFINE_string(
    "record", None, "The run's record, or with --zoo their folder; default WORKDIR/configured.json."
)

CARRIED = (".json", ".safetensors")
ZOO_BYTES = 8_000_000  # the most that the package carries
ROUNDING = 0.1  # percent of the test images that another machine may see differently


def main(argv):
    if len(argv) > 1:
        raise ValueError(f"unexpected arguments: {argv[1:]}")
    if ZOO.value and (WORKDIR.value or FILE.value):
        raise ValueError("--zoo exports every run of a folder: leave out --workdir and --file")
    if ZOO.value:
        found = find_runs(ZOO.value, RECORD.value)
        for workdir, record in found.items():
            export(workdir, None, record)
        carried = (path for path in pathlib.Path(INTO.value).iterdir() if path.suffix in CARRIED)
        listing = pathlib.Path(INTO.value) / checksums.LISTING
        files.write_text(listing, checksums.list_files(sorted(carried)))
        size = sum(path.stat().st_size for path in pathlib.Path(INTO.value).iterdir())
        print(f"{INTO.value}: {size / 1e6:.1f} MB")
        if size > ZOO_BYTES:
            raise ValueError(f"{INTO.value} holds {size} bytes, more than {ZOO_BYTES}")
        return
    if not (WORKDIR.value and FILE.value):
        raise ValueError("give --workdir and --file, or --zoo; --help explains them")
    if validate.check_file("--file", FILE.value).suffix != ".safetensors":
        raise ValueError(f"--file must end in .safetensors, got {FILE.value}")
    default = pathlib.Path(WORKDIR.value) / "configured.json"
    record = pathlib.Path(RECORD.value) if RECORD.value else default
    export(WORKDIR.value, FILE.value, record if RECORD.value or record.exists() else None)


def find_runs(folders, records_folder):
    """{workdir: its record}, of workdirs and of folders of workdirs.

    Args:
      folders: both.
      records_folder: of WORKDIR's name with .json; None for WORKDIR/configured.json.

    Raises:
      ValueError: one of them has no run with a record.
    """
    found = {}
    for folder in map(pathlib.Path, folders):
        mine = {}
        for workdir in (folder, *sorted(folder.glob("*/"))):
            record = workdir / "configured.json"
            if records_folder:
                record = pathlib.Path(records_folder, f"{workdir.name}.json")
            if record.exists() and (workdir / "config.json").exists():
                mine[workdir] = record
        if not mine:
            where = f"of a record in {records_folder}" if records_folder else "with configured.json"
            raise ValueError(f"no workdir {where} in {folder}")
        found |= mine
    return found


def export(workdir, path, record_path):
    """Writes one run's file and, beside it, its record.

    Args:
      workdir: of the run.
      path: of the file; None for its name in the zoo.
      record_path: of its record, or None.
    """
    run, variables, meta = runs.restore(workdir, kind=KIND.value)
    if path is None:
        path = f"{INTO.value}/{run.name}-{run.config['threat']['norm']}.safetensors"
    path = pathlib.Path(path)
    with tempfile.TemporaryDirectory() as folder:
        written = pathlib.Path(folder) / path.name
        runs.export(written, run, variables, {"checkpoint": KIND.value, **meta})
        if record_path is not None:
            record = records.load(record_path)
            check(written, record, record_path)
            records.save(record, path.with_suffix(".json"))
        files.write_bytes(path, written.read_bytes())
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def check(path, record, record_path):
    """The record is of the run in the file.

    Raises:
      ValueError: another config, seed or step, or other answers to the clean test images.
    """
    run, variables, meta = runs.restore(path)
    for key in run.config.keys() | record["config"].keys():
        if key not in ("evaluation", "reported") and run.config.get(key) != record["config"].get(
            key
        ):
            raise ValueError(f"{record_path} is of another run: its config's {key} differs")
    if meta["step"] != (step := record["training"]["step"]):
        raise ValueError(f"{record_path} is of step {step}, and the file of {meta['step']}")
    primary = run.defense.primary
    said = next(iter(record["results"].values()))["clean"]
    arrays = run.arrays("test").take(slice(said["n"]))
    images = data.to_float(arrays.images)
    evaluator = Evaluator(run.apply(primary), run.threat)
    bits = evaluator.bits(variables, images, arrays.labels, arrays.ids, {}, seed=run.seed)
    differ = 100 * np.mean(bits["clean"] != records.unpack_bits(said["bits"], said["n"]))
    if differ > ROUNDING:
        raise ValueError(f"{record_path} says otherwise of {differ:.2f} % of the clean test images")


if __name__ == "__main__":
    cli.run(main)
