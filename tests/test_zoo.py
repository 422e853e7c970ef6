"""Networks and runs as files: what is read back, what is refused, what comes with the package."""

import csv
import dataclasses
import json
import pathlib

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from jaxdefense import data, evaluation, models, runs, threat
from jaxdefense.evaluation import records
from jaxdefense.models import zoo
from jaxdefense.runs import sources

GOLDEN = pathlib.Path(__file__).parent / "golden" / "pgd_at-mnist-linf.npz"
META = {"image_shape": (8, 8, 1), "dataset": "digits"}


@pytest.fixture(scope="module")
def network():
    """(module, variables) with BatchNorm, one array in half precision."""
    module = models.make("mnist_net", 5, width=2, bn=True, mean=[0.5])
    image = np.zeros((1, 8, 8, 1), np.float32)
    variables = jax.jit(module.init)(jax.random.key(0), image)
    kernel = variables["params"]["fc1"]["kernel"].astype(jnp.bfloat16)
    params = {**variables["params"], "fc1": {"kernel": kernel}}
    return module, {**variables, "params": params}


@pytest.fixture
def saved(network, tmp_path):
    path = tmp_path / "mine.safetensors"
    models.save(path, *network, META)
    return path


def test_what_is_saved_is_loaded(network, saved):
    module, variables = network
    loaded = models.load(saved)
    assert loaded.module == module
    assert loaded.meta == {"image_shape": [8, 8, 1], "dataset": "digits"}
    assert jax.tree.structure(loaded.variables) == jax.tree.structure(dict(variables))
    for got, want in zip(jax.tree.leaves(loaded.variables), jax.tree.leaves(variables)):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    again = saved.with_name("again.safetensors")
    models.save(again, *loaded)
    assert again.read_bytes() == saved.read_bytes()


def rewritten(path, **changes):
    """The file with another header, its checksum right."""
    arrays, metadata = zoo.read_arrays(path)
    text = json.dumps({**json.loads(metadata["jaxdefense"].partition(" ")[2]), **changes})
    metadata = {"jaxdefense": f"{zoo._digest(text.encode())} {text}"}
    path.write_bytes(safetensors.numpy.save(arrays, metadata))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-5]), "is damaged or no safetensors file"),
        (lambda p: p.write_bytes(b"\x80\x04pickle"), "is damaged or no safetensors file"),
        (
            lambda p: p.write_bytes(p.read_bytes()[:-1] + bytes([p.read_bytes()[-1] ^ 1])),
            "is damaged: the checksum differs of ",
        ),
        (
            lambda p: p.write_bytes(p.read_bytes().replace(b"digits", b"dogits")),
            "is damaged: the checksum of its header differs",
        ),
        (
            lambda p: safetensors.numpy.save_file({"a": np.zeros(2)}, p),
            r"not written by jaxdefense\.models\.save; models\.from_torch",
        ),
        (lambda p: rewritten(p, format=2), "has format 2"),
        (lambda p: rewritten(p, extra=1), "the keys .*'extra'"),
        (lambda p: rewritten(p, model={"name": "cnnn", "num_classes": 5}), "nearest: cnn"),
        (lambda p: rewritten(p, model={"name": "mnist_net", "num_classes": 4}), "head/kernel has"),
        (lambda p: rewritten(p, holds="system"), "several networks"),
        (lambda p: p.unlink(), "no such file"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_named(saved, damage, match):
    damage(saved)
    with pytest.raises(ValueError, match=rf"mine\.safetensors.*{match}|{match}.*mine\.safetensors"):
        models.load(saved)


def test_what_cannot_be_saved(network, tmp_path):
    module, variables = network
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="needs 'image_shape'"):
        models.save(path, module, variables, {})
    with pytest.raises(ValueError, match=r"MNISTNet: missing: batch_stats/bn1/mean"):
        models.save(path, module, {"params": variables["params"]}, META)
    with pytest.raises(ValueError, match="must be plain values"):
        models.save(path, module, variables, {**META, "array": np.zeros(2)})
    own = type("Own", (type(module),), {"__module__": "mine"})(num_classes=5, width=2, bn=True)
    with pytest.raises(ValueError, match="Own is no registered network; known: cnn"):
        models.save(path, own, variables, META)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", models.pretrained())
def test_each_pretrained_network_has_its_record(name):
    header = zoo.read(zoo.pretrained_path(name))[1]
    record = records.load(zoo.pretrained_path(name).with_suffix(".json"))
    config = header["meta"]["config"]
    assert name == f"{config['name']}-{config['threat']['norm']}"
    assert {**record["config"], "evaluation": {}} == {**config, "evaluation": {}}
    assert record["training"]["step"] == header["meta"]["training"]["step"]
    assert set(dataclasses.asdict(zoo.build(name, header))) >= config["model"].keys() - {"name"}


def test_the_package_carries_less_than_8_megabytes():
    assert "pgd_at-mnist-linf" in models.pretrained()
    assert sum(path.stat().st_size for path in zoo.FOLDER.iterdir()) < 8e6
    with pytest.raises(ValueError, match="nearest: ipg-mnist-linf, pgd_at-mnist-linf,"):
        models.load_pretrained("pgd-mnist-linf")


def test_a_pretrained_network_classifies():
    net = models.load_pretrained("pgd_at-mnist-linf")
    with np.load(GOLDEN) as golden:  # the first MNIST test images
        images = golden["images"] / np.float32(255)
        labels = golden["labels"][: len(images)]
    clean = np.asarray(jax.jit(net.predict)(images)).argmax(-1) == labels
    assert 100 * clean.mean() > net.meta["record"]["results"]["classifier"]["clean"]["accuracy"] - 1


@pytest.mark.parametrize("name", ["pgd_at-digits-linf", "ipg-digits-linf"])
def test_a_pretrained_run_classifies_as_its_record_says(name, tfds_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", tfds_dir)
    path = zoo.pretrained_path(name)
    run, variables, _ = runs.restore(path)
    test, primary = run.arrays("test"), run.defense.primary
    said = records.load(path.with_suffix(".json"))["results"][primary]["clean"]
    logits = run.apply(primary)(variables, data.to_float(test.images[:64]))
    right = np.asarray(logits).argmax(-1) == test.labels[:64]
    assert np.sum(right != records.unpack_bits(said["bits"], said["n"])[:64]) <= 1  # by rounding


def config(tfds_dir, **defense):
    return {
        "name": "mine",
        "dataset": {"name": "digits", "data_dir": tfds_dir, "limit": 64},
        "model": {"name": "cnn", "width": 0.25},
        "threat": {"norm": "linf", "eps": 0.1},
        "defense": defense,
        "train": {"length": "1s", "optimizer": {"name": "sgd", "lr": 0.1}},
        "validation": {"name": "pgd", "steps": 1},
        "evaluation": {"attacks": {"fgsm": {"name": "fgsm"}}},
    }


@pytest.fixture(scope="module")
def untrained(tfds_dir):
    """{holds: (run, variables, images)}: a lone classifier, and one behind a loop."""
    made = {}
    for holds, defense in (("classifier", "standard"), ("system", "anti_adversary")):
        run = runs.build(config(tfds_dir, name=defense))
        images = run.arrays("validation").images / np.float32(255)
        params, carry = run.init(images)
        made[holds] = (run, {"params": params, "carry": carry}, images)
    return made


@pytest.mark.parametrize("holds", ["classifier", "system"])
def test_a_run_is_restored_from_one_file(untrained, tmp_path, holds):
    run, variables, images = untrained[holds]
    path = tmp_path / "run.safetensors"
    runs.export(path, run, variables, {"step": 3})
    assert zoo.read(path)[1]["holds"] == holds
    again, read, meta = runs.restore(path)
    assert (again.config, meta) == (run.config, {"step": 3})
    want = run.apply(run.defense.primary)(variables, images)
    np.testing.assert_array_equal(again.apply(again.defense.primary)(read, images), want)
    if holds == "classifier":
        np.testing.assert_allclose(models.load(path).predict(images), want, atol=1e-6)
    else:
        with pytest.raises(ValueError, match=r"several networks.*jaxdefense\.runs\.restore"):
            models.load(path)


@pytest.mark.parametrize("holds", ["classifier", "system"])
def test_a_file_is_a_teacher(untrained, tfds_dir, tmp_path, holds):
    path = tmp_path / "teacher.safetensors"
    run, variables, _ = untrained[holds]
    runs.export(path, run, variables, {"step": 3})
    options = config(tfds_dir, name="ard", teacher={"file": str(path)})
    student = runs.build(options)
    got = student.defense.pretrained["teacher"].params
    jax.tree.map(np.testing.assert_array_equal, got, variables["params"]["classifier"])
    sources.copy_sources(student.sources, tmp_path / "work")
    path.unlink()
    copied = runs.build(options, workdir=tmp_path / "work").sources["teacher"]
    assert copied.path == tmp_path / "work" / "given" / "teacher.safetensors"
    with pytest.raises(ValueError, match=r"defense\.teacher .*no such file"):
        runs.build(options)
    options["defense"]["teacher"]["checkpoint"] = "best"
    with pytest.raises(ValueError, match=r"unknown key of defense\.teacher 'checkpoint'"):
        runs.build(options)


def test_a_network_that_is_no_run_is_no_run_s(network, saved):
    with pytest.raises(ValueError, match="holds a network but no run"):
        runs.restore(saved)
    assert runs.load_classifier(saved).module == network[0]


def test_saved_images_lie_in_the_ball_and_the_table_says_what_rounding_undid(tmp_path):
    """The model turns at 100.4/255: an attack may win by less than a step of 8 bits."""
    ball, rng = threat.Linf(0.3), np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 4, 4, 3)) / np.float32(255)
    images[:3, 0, 0, 0] = np.float32([100, 60, 101]) / np.float32(255)
    x_adv = images.copy()
    x_adv[0, 0, 0, 0] = 100.45 / 255  # turned, and rounded back
    x_adv[1, 0, 0, 0] = 136.4 / 255  # turned; 136.4 is 76.4 steps away, within 76.5
    images[3:, 0, 0, 0], x_adv[3:, 0, 0, 0] = 0, 0

    def apply(scale, x):
        return scale * jnp.stack([x[:, 0, 0, 0] * 0, x[:, 0, 0, 0] - 100.4 / 255], 1)

    labels = np.array([0, 0, 0, 0, 0])
    folder = tmp_path / "images"
    rows = evaluation.save_images(
        folder, apply, images, labels, x_adv, ball, variables=2.0, ids=np.arange(7, 12)
    )
    with (folder / "images.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [{k: str(v) for k, v in row.items()} for row in rows] == table
    assert [row["file"] for row in table] == ["00007.png", "00008.png", "", "", ""]
    assert [(row["fooled"], row["fooled_8bit"]) for row in rows] == [
        (1, 0),
        (1, 1),
        (1, 1),
        (0, 0),
        (0, 0),
    ]
    pixels = np.asarray(Image.open(folder / "00008.png"))
    assert np.abs(pixels / 255 - images[1]).max() <= 0.3
    assert pixels[0, 0, 0] == 136
    with np.load(folder / "images.npz") as file:
        np.testing.assert_array_equal(file["x_adv"], x_adv.astype(np.float32))
        assert file["ids"].tolist() == list(range(7, 12))
    with pytest.raises(ValueError, match="is not empty"):
        evaluation.save_images(folder, apply, images, labels, x_adv, ball, variables=2.0)
    with pytest.raises(ValueError, match="steps of 1/255"):
        evaluation.save_images(tmp_path / "b", apply, images * 0.999, labels, x_adv, ball)


def test_scripts_export_and_judge_a_file(untrained, tmp_path, monkeypatch, capsys):
    """A file of the script is judged, and its images kept with RobustBench's form."""
    evaluate = conftest.import_script("evaluate")
    run, variables, _ = untrained["classifier"]
    path = tmp_path / "run.safetensors"
    runs.export(path, run, variables, {"checkpoint": "best", "step": 3})
    monkeypatch.chdir(tmp_path)
    flags = evaluate.flags.FLAGS
    words = ["evaluate", f"--pretrained={path}", "--noprogress", "--examples=20"]
    flags([*words, "--save_images=kept"])
    evaluate.main([""])
    said = capsys.readouterr().out
    assert "record: runs/pretrained/run/configured-20.json" in said
    record = records.load("runs/pretrained/run/configured-20.json")
    with open("kept/classifier/images.csv") as file:
        fooled = sum(int(row["fooled"]) for row in csv.DictReader(file))
    assert record["results"]["classifier"]["fgsm"]["accuracy"] == pytest.approx(100 - 5 * fooled)
    assert record["training"] == {"checkpoint": "best", "step": 3}
    with pytest.raises(ValueError, match="kept is not empty"):
        evaluate.main([""])
    flags([*words, "--save_images="])
    flags.pretrained = "pgd_at-mnist"
    with pytest.raises(ValueError, match="nearest: pgd_at-mnist-linf"):
        evaluate.main([""])
    flags.pretrained = None
    with pytest.raises(ValueError, match="give --workdir=FOLDER or --pretrained=NAME or FILE"):
        evaluate.main([""])


def test_the_zoo_finds_workdirs_by_their_records(tmp_path):
    export = conftest.import_script("export")
    for name in ("a-0", "b-0", "c-0"):
        (tmp_path / "study" / name).mkdir(parents=True)
        (tmp_path / "study" / name / "config.json").touch()
    (tmp_path / "records").mkdir()
    for name in ("a-0", "c-0", "d-0"):
        (tmp_path / "records" / f"{name}.json").touch()
    (tmp_path / "study" / "b-0" / "configured.json").touch()
    study, folder = tmp_path / "study", tmp_path / "records"
    assert export.find_runs([study], None) == {study / "b-0": study / "b-0" / "configured.json"}
    a, c = (folder / f"{name}.json" for name in ("a-0", "c-0"))
    assert export.find_runs([study], folder) == {study / "a-0": a, study / "c-0": c}
    assert export.find_runs([study / "c-0"], folder) == {study / "c-0": c}
    with pytest.raises(ValueError, match=r"no workdir of a record in .*records in .*b-0"):
        export.find_runs([study / "c-0", study / "b-0"], folder)
    with pytest.raises(ValueError, match=r"no workdir with configured\.json in .*a-0"):
        export.find_runs([study / "a-0"], None)
