"""Damaged files: each ends in one line that names the file, or in exactly the right result."""

import functools
import json
import os
import pathlib
import random
import shutil
import time

import damages
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image
from test_train import config

from jaxdefense import checksums, data, models, runs, train
from jaxdefense.data import prepare
from jaxdefense.evaluation import journal, records
from jaxdefense.models import zoo
from jaxdefense.runs import checkpoint, sources, start
from jaxdefense.runs.run import read_log

ZOO = zoo.FOLDER

# Arrays that are still being read when another one fails report to a closed event loop.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module", autouse=True)
def _await_readers():
    """The last of them have reported before another file's tests begin."""
    yield
    time.sleep(0.2)


@pytest.fixture(scope="module")
def trained(tfds_dir, tmp_path_factory):
    """A finished run whose best checkpoint is older than its last one."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    values = config(tfds_dir, **{"train.optimizer": {"name": "sgd", "lr": 0.05}})
    train.train(values, workdir, progress=False)
    return workdir, values


@pytest.fixture
def workdir(trained, tmp_path):
    """A copy of the run, to be damaged."""
    return pathlib.Path(shutil.copytree(trained[0], tmp_path / "run"))


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_equal(one, two):
    for a, b in zip(leaves(one), leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


def outcome(function):
    """(The one line of the ValueError that a call raises, None) or (None, what it returns)."""
    try:
        return None, function()
    except ValueError as error:
        (line,) = str(error).splitlines()
        return line, None


def read(folder):
    """Everything that a checkpoint of `last` or `best` holds."""
    store = checkpoint.Store(folder)
    try:
        trees = ("model", "optimizer") if folder.name == "last" else ("model",)
        return store.meta(), {name: store.restore_as_saved(name) for name in trees}
    finally:
        store.close()


@pytest.mark.parametrize("kind", ["best", "last"])
@pytest.mark.parametrize("damage", damages.KINDS)
def test_each_file_of_a_checkpoint(trained, tmp_path, kind, damage):
    """A damaged file is found, or is one that no array uses: the reader does not tell which."""
    meta, trees = read(trained[0] / kind)
    rng, refused = random.Random(0), 0
    for file in damages.files_in(trained[0] / kind):
        copy = pathlib.Path(shutil.copytree(trained[0] / kind, tmp_path / kind))
        told = damages.damage(copy / file.relative_to(trained[0] / kind), damage, rng)
        error, found = outcome(lambda copy=copy: read(copy))
        if error is None:
            assert found[0] == meta, told
            assert_equal(found[1], trees)
        else:
            refused += 1
            assert str(copy) in error, told
        shutil.rmtree(copy)
    assert refused >= 3  # the metadata, and files of arrays


def flip_weights(folder):
    """Flips one bit of the file that holds the arrays' values: the largest."""
    file = max(damages.files_in(folder), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 4] ^= 1
    file.write_bytes(content)


def train_again(trained, workdir):
    return outcome(lambda: train.train(trained[1], workdir, progress=False))


def test_a_damaged_checkpoint_offers_the_other_one(workdir, trained):
    flip_weights(workdir / "best")
    error, _ = outcome(lambda: runs.restore(workdir))
    assert f"{workdir}/best/12 is damaged: the checksum of model/params/classifier" in error
    assert error.endswith(
        "the checkpoint 'last' of step 12 is whole: --checkpoint=last (kind='last')"
    )
    assert_equal(runs.restore(workdir, kind="last").variables, runs.restore(trained[0]).variables)
    error, _ = outcome(
        lambda: start.load_start({"workdir": str(workdir), "checkpoint": "best"}),
    )
    assert error.endswith("the checkpoint of step 12 is whole: 'last'")
    error, _ = outcome(lambda: runs.load_classifier(workdir))
    assert "--checkpoint=last" in error
    shutil.rmtree(workdir / "last")
    assert outcome(lambda: runs.restore(workdir))[0].endswith("train the run again")


def test_a_missing_best_offers_the_last(workdir):
    shutil.rmtree(workdir / "best")
    error, _ = outcome(lambda: runs.restore(workdir))
    assert error.startswith(f"{workdir} has no checkpoint 'best'; the checkpoint 'last' of step 12")
    (workdir / "best").mkdir()
    assert "there is no checkpoint in" in outcome(lambda: runs.restore(workdir))[0]


def test_a_renamed_step_is_found(workdir):
    (workdir / "best" / "12").rename(workdir / "best" / "13")
    error, _ = outcome(lambda: runs.restore(workdir))
    assert f"{workdir}/best/13 is the checkpoint of step 12 under another name" in error


def test_a_damaged_last_offers_a_new_start(workdir, trained):
    flip_weights(workdir / "last")
    error, _ = train_again(trained, workdir)
    begins = f"remove {workdir}/last, and the same command begins again at the first step"
    assert f"{begins}; or start a new run from its best, of step 12: --init_from={workdir}" in error
    flip_weights(workdir / "best")
    assert train_again(trained, workdir)[0].endswith(begins)


def test_a_newer_step_that_is_none_leaves_the_whole_one(workdir, trained):
    (workdir / "last" / "99").mkdir()
    error, _ = train_again(trained, workdir)
    assert f"remove what is newer than {workdir}/last/12, which is whole" in error


def test_metadata_that_are_no_object_are_damaged(workdir):
    (workdir / "last" / "12" / "meta" / "metadata").write_text("[]")
    error, _ = outcome(lambda: runs.restore(workdir, kind="last"))
    assert f"{workdir}/last/12/meta is damaged (ValueError: it is [], no object)" in error
    assert "the checkpoint 'best' of step 12 is whole" in error


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("metrics.jsonl", "is a folder, where a run has a file: remove it"),
        ("config.json", "is a folder, where a run has a file: remove it"),
        ("train.lock", "is a folder, where a lock has a file: remove it"),
        ("best", "is no folder of checkpoints: remove it"),
    ],
)
def test_a_folder_in_a_file_s_place_or_a_file_in_a_folder_s(workdir, trained, name, said):
    path = workdir / name
    if path.is_dir():
        shutil.rmtree(path)
        path.write_text("x")
    else:
        path.unlink(missing_ok=True)
        path.mkdir()
    assert train_again(trained, workdir)[0] == f"{path} {said}"


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "config.json.sha256"])
def test_a_run_with_a_folder_in_a_file_s_place_is_not_restored(workdir, name):
    (workdir / name).unlink()
    (workdir / name).mkdir()
    error, _ = outcome(lambda: runs.restore(workdir))
    assert error == f"{workdir / name} is a folder, where a run has a file: remove it"


def test_what_restore_is_given(workdir):
    error, _ = outcome(lambda: runs.restore(workdir, kind="first"))
    assert error == "unknown kind of checkpoint 'first'; nearest: last, best; known: best, last"
    error, _ = outcome(lambda: runs.restore(5))
    assert error == "workdir must be the path of a run or a file, got 5"


def test_a_config_with_a_wrong_section_is_named(workdir):
    path = workdir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "trian": {}}))
    (workdir / "config.json.sha256").unlink()
    error, _ = outcome(lambda: runs.restore(workdir))
    assert error.startswith(f"{path}: unknown config section 'trian'; nearest: train")


def test_a_lost_log_is_said(workdir, trained, capsys):
    (workdir / "metrics.jsonl").unlink()
    train_again(trained, workdir)
    told = f"note: {workdir}/metrics.jsonl is gone: the log begins again at step 12"
    assert told in capsys.readouterr().err


def test_what_older_versions_saved_is_read_unchecked(tmp_path):
    tree, meta = {"w": np.arange(3.0, dtype=np.float32)}, {"best": {}, "seconds": 1.0}
    manager = ocp.CheckpointManager(tmp_path / "best")
    args = {"model": ocp.args.StandardSave(tree), "meta": ocp.args.JsonSave(meta)}
    manager.save(3, args=ocp.args.Composite(**args))
    manager.close()
    found, trees = read(tmp_path / "best")
    assert found == {**meta, "step": 3}
    assert_equal(trees["model"], tree)


def rewind(workdir, step, best):
    """Makes a run one that was killed at `step`, whose best step was `best`, and is now lost."""
    meta, trees = read(workdir / "last")
    shutil.rmtree(workdir / "last")
    shutil.rmtree(workdir / "best")
    store = checkpoint.Store(workdir / "last")
    store.save(step, trees, {**meta, "best": {**meta["best"], "step": best}})
    store.close()


def test_a_lost_best_is_written_again_from_a_last_of_its_step(workdir, trained, capsys):
    shutil.rmtree(workdir / "best")
    _, summary = train_again(trained, workdir)
    assert summary["best"]["step"] == 12
    assert_equal(runs.restore(workdir).variables, runs.restore(trained[0]).variables)
    told = capsys.readouterr().err
    assert "note: the best checkpoint, of step 12, is lost" in told
    assert "written again from `last`" in told


def test_a_lost_best_of_a_finished_run_is_said(workdir, trained, capsys):
    rewind(workdir, 12, 6)
    _, summary = train_again(trained, workdir)
    assert summary["best"] == {}
    assert "of step 6, is lost" in (told := capsys.readouterr().err)
    assert "evaluate with --checkpoint=last" in told


def test_a_lost_best_is_made_anew_by_the_next_validation(workdir, trained, capsys):
    rewind(workdir, 9, 6)
    _, summary = train_again(trained, workdir)
    assert "of step 6, is lost" in (told := capsys.readouterr().err)
    assert "the next validation makes a new one" in told
    assert summary["best"]["step"] == runs.restore(workdir).meta["step"] == 12


def test_a_run_without_its_last_begins_again(workdir, trained, capsys):
    shutil.rmtree(workdir / "last")
    _, summary = train_again(trained, workdir)
    assert f"note: {workdir}/last holds no checkpoint" in capsys.readouterr().err
    assert summary["best"]["step"] == 12
    assert_equal(runs.restore(workdir).variables, runs.restore(trained[0]).variables)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is damaged"),
        (b"[]", "it holds no JSON object"),
        (b"\xff\xfe{", "is damaged"),
        (b'{"seed": 0', "is damaged"),
        (b'{"seed": 0}', "its SHA-256 is not the one in config.json.sha256"),
    ],
)
def test_a_damaged_config(workdir, trained, content, why):
    path = workdir / "config.json"
    path.write_bytes(content)
    for error, _ in (outcome(lambda: runs.restore(workdir)), train_again(trained, workdir)):
        assert error.startswith(f"{path} is damaged")
        assert why in error
        assert f"remove {path} and train.py with the run's own --config writes it again" in error
    path.unlink()
    assert train_again(trained, workdir)[0] is None  # the way out
    assert_equal(runs.restore(workdir).variables, runs.restore(trained[0]).variables)


@pytest.mark.parametrize("kind", ["last", "best"])
def test_a_lost_config_is_compared_with_the_checkpoints(workdir, trained, capsys, kind):
    (workdir / "config.json").unlink()
    if kind == "best":
        shutil.rmtree(workdir / "last")
    else:
        told = (
            f"{workdir}/config.json is gone: train.py with the run's own --config writes it again"
        )
        assert outcome(lambda: runs.restore(workdir))[0] == told
    before = sorted(workdir.rglob("*"))
    for section, key, value in (("threat", "eps", 0.25), ("dataset", "validation", 90)):
        changed = {**trained[1], section: {**trained[1][section], key: value}}
        error, _ = outcome(lambda changed=changed: train.train(changed, workdir, progress=False))
        told = f"{section}.{key}: {trained[1][section].get(key)} there, {value} here"
        assert error.startswith(f"{workdir} holds a run of another config (it differs in {told})")
    assert sorted(workdir.rglob("*")) == before
    if kind == "last":
        for name in ("last", "best"):  # as older versions wrote them
            store = checkpoint.Store(workdir / name)
            meta = store.meta()
            store.replace_meta({k: v for k, v in meta.items() if k not in ("config", "step")})
            store.close()
        assert train_again(trained, workdir)[0] is None
        assert f"note: {workdir}/config.json is gone, and the" in capsys.readouterr().err


def test_an_edited_config_is_taken_without_its_checksum(workdir):
    path = workdir / "config.json"
    values = json.loads(path.read_text())
    values["evaluation"]["attacks"]["pgd2"]["steps"] = 3
    path.write_text(json.dumps(values))
    error, _ = outcome(lambda: runs.restore(workdir))
    assert error.endswith("or remove config.json.sha256 if it was you who edited it")
    (workdir / "config.json.sha256").unlink()
    assert runs.restore(workdir).run.attacks["pgd2"].options["steps"] == 3


def test_torn_lines_of_the_log_are_dropped_and_said(workdir, trained, capsys):
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + bytes(40) + b"\n" + b"".join(lines[1:]) + b'{"step": 12, "lo')
    assert train_again(trained, workdir)[0] is None
    assert path.read_bytes() == b"".join(lines)
    assert f"note: {path}: 2 damaged lines dropped, {len(lines)} kept" in capsys.readouterr().err
    assert not read_log(workdir / "nothing.jsonl")


def test_a_damaged_teacher_offers_what_is_whole(workdir, trained, tmp_path):
    teacher = {"workdir": str(workdir), "checkpoint": "best"}
    values = {**trained[1], "defense": {"name": "ard", "steps": 1, "teacher": teacher}}
    student = tmp_path / "student"
    built = runs.build(values)
    sources.copy_sources(built.sources, student)
    flip_weights(student / "given" / "teacher" / "best")
    error, _ = outcome(lambda: runs.build(values, workdir=student))
    assert error.startswith("defense.teacher (")
    assert error.endswith(f"; remove {student}/given/teacher, and {workdir} is copied again")
    flip_weights(workdir / "best")
    error, _ = outcome(lambda: runs.build(values))
    assert error.endswith("; its checkpoint of step 12 is whole: defense.teacher.checkpoint=last")
    assert "copied again" not in outcome(lambda: runs.build(values, workdir=student))[0]


# Many damages at random.


@pytest.mark.parametrize("seed", range(12))
def test_any_file_of_a_workdir(workdir, trained, seed):
    """Of what is computed from the log, the validation curve, a changed digit stays unnoticed."""
    rng = random.Random(seed)
    told = damages.damage(rng.choice(damages.files_in(workdir)), rng.choice(damages.KINDS), rng)
    kind = rng.choice(["best", "last"])
    error, found = outcome(lambda: runs.restore(workdir, kind=kind))
    if error is None:
        good = runs.restore(trained[0], kind=kind)
        assert found.run.config == good.run.config, told
        assert_equal(found.variables, good.variables)
        assert {**found.meta, "validation": None} == {**good.meta, "validation": None}, told
    else:
        assert str(workdir) in error, told


def judge(folder, seed=0):
    """An evaluation whose dispatches are arithmetic: what its journal gives back."""
    logits = np.eye(10, dtype=np.float32)
    description = {"threat": "linf", "seed": seed}
    kept = journal.Journal(folder, description, logits)

    def packs(rows):
        return (rows[i : i + 10] for i in range(0, len(rows), 10))

    found = kept.replay_and_run("pgd", np.arange(50), packs, lambda rows: {"bits": rows % 3 == 0})
    bits = np.zeros(50, bool)
    for done in found:
        bits[done["asked"]] = done["bits"]
    return bits


@pytest.mark.parametrize("kind", damages.KINDS)
def test_any_file_of_a_journal(tmp_path, capsys, kind):
    judge(tmp_path / "whole")
    rng = random.Random(0)
    for file in damages.files_in(tmp_path / "whole"):
        for _ in range(5):
            folder = pathlib.Path(shutil.copytree(tmp_path / "whole", tmp_path / "copy"))
            told = damages.damage(folder / file.name, kind, rng)
            np.testing.assert_array_equal(judge(folder), np.arange(50) % 3 == 0, err_msg=told)
            lines = capsys.readouterr().err.splitlines()
            assert all(line.startswith(f"note: {folder / file.name} is damaged") for line in lines)
            assert len(lines) <= 1, told
            shutil.rmtree(folder)


def test_a_journal_without_its_head_keeps_what_is_its_own(tmp_path, capsys):
    judge(tmp_path)
    (tmp_path / "journal.json").unlink()
    judge(tmp_path)
    assert not capsys.readouterr().err
    (tmp_path / "journal.json").unlink()
    judge(tmp_path, seed=1)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 6
    assert all(line.endswith("is of another evaluation: computed again") for line in told)


RECORD = {"pgd": {"accuracy": 50.0, "per_class": [50.0], "n": 2, "bits": "gA=="}}


@pytest.mark.parametrize("kind", damages.KINDS)
def test_any_damage_to_a_record(tmp_path, kind):
    path = tmp_path / "record.json"
    made = records.make("tiny", {"seed": 0}, {"classifier": RECORD}, seed=0, seconds=1.0)
    rng = random.Random(0)
    for _ in range(40):
        records.save(made, path)
        told = damages.damage(path, kind, rng)
        error, found = outcome(lambda: records.load(path))
        if error is None:
            assert {key: found[key] for key in made} == made, told
        else:
            assert str(path) in error, told
    assert outcome(lambda: records.load_all([path]))[0]


def test_records_without_a_checksum_are_read_and_wrong_ones_named(tmp_path):
    path = tmp_path / "record.json"
    made = records.make("tiny", {"seed": 0}, {"classifier": RECORD}, seed=0, seconds=1.0)
    path.write_text(json.dumps(made))
    assert records.load(path) == made
    path.write_text(json.dumps({"format": 1, "name": "tiny"}))
    assert outcome(lambda: records.load(path))[0].startswith(f"{path} is damaged: it has no seed")
    (tmp_path / "record.json").write_bytes(b'\xff{"format": 1')
    assert outcome(lambda: records.load_all([tmp_path]))[0].startswith(f"{path} is not a record")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"results": "97 %"}, "record.results must be a mapping, got '97 %'"),
        ({"results": {"main": []}}, "results.main must be a mapping, got []"),
        ({"results": {"main": {"pgd": 5}}}, "results.main.pgd must be a mapping, got 5"),
        ({"name": 5}, "record.name must be a text, got 5"),
        ({"training": []}, "record.training must be a mapping, got []"),
    ],
)
def test_a_record_edited_by_hand(tmp_path, changed, said):
    path = tmp_path / "record.json"
    made = records.make("tiny", {}, {"classifier": RECORD}, seed=0, seconds=1.0, training={})
    path.write_text(json.dumps({**made, **changed}))
    error, _ = outcome(lambda: records.load(path))
    assert error == f"{path} is damaged or was edited: {said}; evaluate again"


@pytest.mark.parametrize("kind", damages.KINDS)
def test_any_damage_to_the_zoo(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(zoo, "FOLDER", tmp_path / "zoo")
    (name,), rng = ["pgd_at-mnist-linf"], random.Random(0)
    good = zoo.read(ZOO / f"{name}.safetensors")[0]
    whole = tmp_path / "whole"
    whole.mkdir()
    carried = [shutil.copy(ZOO / f"{name}.{kind}", whole) for kind in ("json", "safetensors")]
    (whole / checksums.LISTING).write_text(checksums.list_files(map(pathlib.Path, carried)))
    for file in damages.files_in(whole):
        shutil.copytree(whole, tmp_path / "zoo")
        told = damages.damage(tmp_path / "zoo" / file.name, kind, rng)
        error, path = outcome(lambda: zoo.pretrained_path(name))
        if error is None:
            assert file.name == "SHA256SUMS", told
            assert kind in ("delete", "empty"), told
            assert_equal(zoo.read(path)[0], good)
        else:
            assert str(tmp_path) in error or "unknown pretrained network" in error, told
        shutil.rmtree(tmp_path / "zoo")


@pytest.mark.parametrize("seed", range(8))
def test_any_damage_to_a_network_s_file(tmp_path, seed):
    module = models.make("cnn", 10, width=0.25)
    variables = module.init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
    path, rng = tmp_path / "net.safetensors", random.Random(seed)
    for kind in damages.KINDS:
        models.save(path, module, variables, {"image_shape": (8, 8, 1)})
        told = damages.damage(path, kind, rng)
        error, found = outcome(lambda: models.load(path))
        if error is None:
            assert_equal(found.variables, variables)
        else:
            assert str(path) in error, told


@pytest.fixture(scope="module")
def prepared_digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    prepare.prepare_digits(folder)
    return folder


@pytest.mark.parametrize("kind", damages.KINDS)
def test_any_file_of_a_prepared_set(prepared_digits, tfds_dir, tmp_path, kind):
    rng = random.Random(0)
    for file in damages.files_in(prepared_digits / "digits" / "1.0.0"):
        if kind == "delete" and file.name == "dataset_info.json":
            continue  # is prepared anew first, which takes seconds; in `tests/test_prepare.py`
        data_dir = tmp_path / file.name
        shutil.copytree(file.parent, data_dir / "digits" / "1.0.0")
        told = damages.damage(data_dir / "digits" / "1.0.0" / file.name, kind, rng)
        for split in ("train", "test"):
            good = data.load("digits", split, data_dir=tfds_dir)
            load = functools.partial(data.load, "digits", split, data_dir=data_dir)
            error, found = outcome(load)
            if error is None:
                np.testing.assert_array_equal(found.images, good.images, err_msg=told)
                np.testing.assert_array_equal(found.labels, good.labels, err_msg=told)
                assert found.label_names == good.label_names, told
            else:
                assert str(data_dir) in error, told
                assert error.endswith("and it is prepared anew when it is next read"), told


def test_a_flipped_bit_in_the_names_of_shards(prepared_digits, tmp_path):
    folder = tmp_path / "digits" / "1.0.0"
    shutil.copytree(prepared_digits / "digits" / "1.0.0", folder)
    (folder / checksums.LISTING).unlink()  # TFDS itself writes none
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("{DATASET}", "{DATASEU}"))
    error, _ = outcome(lambda: data.load("digits", "train", data_dir=tmp_path))
    assert error.startswith(f"digits: TFDS cannot read {folder} (")
    assert error.endswith(f"; remove {folder}, and it is prepared anew when it is next read")


@pytest.mark.parametrize("kind", damages.KINDS)
def test_any_image_of_a_folder(tmp_path, kind):
    rng = random.Random(0)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    for trial in range(10):
        root = tmp_path / str(trial)
        for i in range(20):
            path = root / ("cat", "dog")[i % 2] / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels + np.uint8(i)).save(path)
        good = data.from_folder(root, test=0.2)
        path = rng.choice(damages.files_in(root))
        # Bytes of a file whose time is the same are not read again in one process.
        told = damages.damage(path, kind, rng)
        os.utime(path.parent if kind == "delete" else path)
        error, found = outcome(functools.partial(data.from_folder, root, test=0.2))
        if error is None and kind != "delete":
            np.testing.assert_array_equal(found.train.images, good.train.images, err_msg=told)
            np.testing.assert_array_equal(found.test.images, good.test.images, err_msg=told)
        elif error is not None:
            assert str(path) in error, told
