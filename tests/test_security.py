"""What files of strangers cannot do: run code, write elsewhere, or put elements into a page."""

import ast
import hashlib
import io
import json
import os
import pathlib
import pickle
import re
import shutil
import sys
import tarfile
import zipfile
from html.parser import HTMLParser

import cli
import configs
import numpy as np
import pytest
import quickstart
import quickstart_board
import quickstart_plan
import tables as script
from safetensors.numpy import save as to_safetensors
from test_report import READY, browser, measured, of_protocol, rich_record  # noqa: F401

from jaxdefense import attacks, data, defenses, files, models, registry, runs
from jaxdefense.data import convert, originals, prepare
from jaxdefense.evaluation import records, report, tables
from jaxdefense.evaluation.journal import Journal
from jaxdefense.models import zoo
from jaxdefense.runs import checkpoint, sources

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = [p for d in ("jaxdefense", "experiments", "examples") for p in (ROOT / d).rglob("*.py")]

PICKLING = {"pickle", "cloudpickle", "jsonpickle", "marshal", "shelve", "dill", "joblib", "runpy"}
RUNNING = {"eval", "exec", "compile", "__import__"}
UNSAFE = {
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "pd.read_pickle",
    "yaml.load",
    "yaml.full_load",
    "yaml.unsafe_load",
    "importlib.util.module_from_spec",
}
# A registry imports files of its own package, and no others, see `TestNames`.
IMPORTING = {"jaxdefense/registry.py", "experiments/configs/__init__.py", "experiments/soak.py"}
# Scripts that run others of their own folder, and processes of one run, which tell each other
# values over the connection that their computation has anyway. Neither reads a file so.
ALLOWED = {
    "experiments/soak.py": {"imports runpy"},
    "experiments/study_step.py": {"imports runpy"},
    "jaxdefense/distributed.py": {"imports pickle"},
}


def complaints(tree, importing=False):
    """What a module does that may run another's code."""
    found, zips = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.withitem) and ast.unparse(node.context_expr).startswith(
            "zipfile.ZipFile("
        ):
            zips.add(ast.unparse(node.optional_vars))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            named = {(node.module or "").split(".")[0]}
        else:
            named = set()
        found += [f"imports {name}" for name in named & PICKLING]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        words = {word.arg: ast.unparse(word.value) for word in node.keywords}
        last = name.rpartition(".")[2]
        wrong = name in RUNNING | UNSAFE
        literal = len(node.args) == 1 and isinstance(node.args[0], ast.Constant)
        wrong |= last == "import_module" and not (importing or literal)
        wrong |= name in ("np.load", "numpy.load") and words.get("allow_pickle", "False") != "False"
        wrong |= name == "torch.load" and words.get("weights_only") != "True"
        wrong |= last in ("extractall", "extract") and (
            name.rpartition(".")[0] not in zips and words.get("filter") != "'data'"
        )
        wrong |= words.get("shell", "False") != "False"
        found += [f"line {node.lineno}: {ast.unparse(node)}"] * wrong
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_it_reads(path):
    name = str(path.relative_to(ROOT))
    found = complaints(ast.parse(path.read_text("utf-8")), name in IMPORTING)
    assert set(found) == ALLOWED.get(name, set())


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "import dill.settings",
        "eval(text)",
        "exec(text)",
        "compile(text, 'name', 'exec')",
        "importlib.import_module(name)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "torch.load(path)",
        "yaml.load(text)",
        "packed.extractall(folder)",
        "packed.extractall(folder, filter='fully_trusted')",
        "subprocess.run(line, shell=True)",
        "os.system(line)",
    ],
)
def test_the_walk_finds_each_of_them(line):
    assert len(complaints(ast.parse(line))) == 1


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.fixture
def marker(tmp_path):
    """The file that a trap writes: it must not be there at the end."""
    path = tmp_path / "marker"
    yield path
    assert not path.exists()


@pytest.fixture
def trap(marker):
    """An array that runs code when it is unpickled."""
    return np.array([Trap(marker)], dtype=object)


@pytest.fixture
def module(marker, tmp_path, monkeypatch):
    """The name of a module that can be imported, and writes the marker when it is."""
    folder = tmp_path / "path"
    folder.mkdir()
    (folder / "hostile_module.py").write_text(f"open({str(marker)!r}, 'w')\nclass Image: pass\n")
    monkeypatch.syspath_prepend(folder)
    yield "hostile_module"
    assert "hostile_module" not in sys.modules


@pytest.fixture
def digits(tmp_path, tfds_dir):
    """A folder of TFDS that holds a copy of the digits."""
    folder = tmp_path / "tfds"
    shutil.copytree(pathlib.Path(tfds_dir) / "digits", folder / "digits")
    for kept in (*folder.glob("digits/*.npz"), *folder.glob("digits/*/SHA256SUMS")):
        kept.unlink()  # a stranger's set brings neither
    return folder


def test_the_traps_are_armed(tmp_path):
    marker = tmp_path / "sprung"
    np.savez(tmp_path / "a.npz", x=np.array([Trap(marker)], dtype=object))
    with np.load(tmp_path / "a.npz", allow_pickle=True) as file:
        file["x"][0].close()
    assert marker.exists()


class TestFiles:
    """A file with code in it is a ValueError or plain data."""

    def test_arrays(self, tmp_path, trap):
        path = tmp_path / "own.npz"
        np.savez(path, images=trap, labels=np.zeros(1, int))
        with pytest.raises(ValueError, match=r"own\.npz"):
            convert.read_file(path, 2)
        with pytest.raises(ValueError, match=r"own\.npz"):
            data.load_section({"name": "arrays", "file": str(path), "num_classes": 2}, "train")

    def test_a_journal(self, tmp_path, trap, capsys):
        folder, logits = tmp_path / "journal", np.zeros((1, 2), np.float32)
        kept = Journal(folder, {"seed": 0}, logits)
        np.savez(folder / "pgd-00000.npz", asked=trap)
        (done,) = kept.replay_and_run("pgd", np.arange(1), lambda rows: [rows], lambda rows: {})
        assert done["asked"].tolist() == [0]
        assert "pgd-00000.npz is damaged" in capsys.readouterr().err  # and was computed again
        np.savez(folder / "clean.npz", logits=trap)
        Journal(folder, {"seed": 0}, logits)
        assert "clean.npz is damaged" in capsys.readouterr().err

    def test_decoded_images(self, digits, tmp_path, trap):
        before = data.load("digits", "test", data_dir=digits)
        (cached,) = digits.glob("digits/*-test.decoded.npz")
        with np.load(cached) as file:
            arrays = dict(file)
        other = tmp_path / "other"
        shutil.copytree(digits, other)
        path = other / cached.relative_to(digits)
        np.savez(path, **arrays | {"images": trap})
        after = data.load("digits", "test", data_dir=other)
        np.testing.assert_array_equal(after.images, before.images)
        with np.load(path) as file:  # the trap was found, and replaced
            np.testing.assert_array_equal(file["images"], arrays["images"])

    @pytest.mark.parametrize("name", ["net.npz", "net.pt", "net.pkl"])
    def test_weights(self, tmp_path, trap, name):
        path = tmp_path / name
        with open(path, "wb") as file:
            np.savez(file, weight=trap) if name == "net.npz" else pickle.dump(trap, file)
        with pytest.raises(ValueError, match=re.escape(name)):
            models.from_torch("cnn", str(path), num_classes=10)

    @pytest.mark.parametrize(
        ("length", "header"),
        [
            (1 << 63, b"{}"),
            (1 << 60, b"{}"),
            (2, b"[]"),
            (9, b'{"a":[[[}'),
            (54, b'{"x":{"dtype":"O","shape":[1],"data_offsets":[0, 64]}}' + bytes(64)),
        ],
        ids=["endless", "too long", "a list", "no JSON", "objects"],
    )
    def test_a_strange_safetensors_header(self, tmp_path, length, header):
        path = tmp_path / "net.safetensors"
        path.write_bytes(length.to_bytes(8, "little") + header)
        with pytest.raises(ValueError, match="is damaged or no safetensors file"):
            models.load(path)

    @pytest.mark.parametrize("name", ["hostile_module", "../cnn", "os", "", None, ["cnn"]])
    def test_a_safetensors_file_of_no_network(self, tmp_path, module, name):
        path = tmp_path / "net.safetensors"
        header = {
            "format": 1,
            "holds": "classifier",
            "model": {"name": name, "num_classes": 10, "__class__": f"{module}.Image"},
            "meta": {"image_shape": [8, 8, 1], "py/object": f"{module}.Image"},
            "sha256": {},
        }
        text = json.dumps(header)
        path.write_bytes(to_safetensors({}, {"jaxdefense": f"{zoo._digest(text.encode())} {text}"}))
        with pytest.raises(ValueError, match="unknown model"):
            models.load(path)

    def test_a_record(self, tmp_path, module):
        held = {
            "format": records.FORMAT,
            "name": "a",
            "seed": 0,
            "__class__": f"{module}.Image",
            "results": {f"{module}.Image": {"py/reduce": {"py/type": module}}},
            "config": {"__reduce__": ["os.system", ["true"]], "!!python/object": module},
        }
        path = tmp_path / "record.json"
        path.write_text(json.dumps(held))
        assert records.load(path) == held
        path.write_text('{"format":' + "[" * 100_000)
        with pytest.raises(ValueError, match=r"record\.json is not a record"):
            records.load(path)

    def test_a_checkpoint(self, tmp_path, module):
        store = checkpoint.Store(tmp_path / "last")
        tree = {"classifier": {"kernel": np.arange(3.0)}}
        store.save(1, {"model": tree}, {"class": f"{module}.Image", "py/object": module})
        store.close()
        changed = 0
        for path in (tmp_path / "last").rglob("_*METADATA*"):
            text = path.read_text()
            named = re.sub(r'"(orbax|jax|numpy)\.[\w.]+"', f'"{module}.Image"', text)
            named = re.sub(r'"(np\.ndarray|jax\.Array)"', f'"{module}.Image"', named)
            changed += named != text
            path.write_text(named)
        assert changed
        store = checkpoint.Store(tmp_path / "last")
        assert store.meta() == {"class": f"{module}.Image", "py/object": module, "step": 1}
        restored = store.restore("model", tree)
        np.testing.assert_array_equal(restored["classifier"]["kernel"], np.arange(3.0))
        store.close()

    @pytest.mark.parametrize("kind", ["class", "original name", "legacy", "nested"])
    def test_a_data_set_that_names_its_classes(self, digits, module, kind):
        """TFDS imports the modules of the classes that features.json names."""
        path = digits / "digits" / "1.0.0" / "features.json"
        held = json.loads(path.read_text())
        name = f"{module}.Image"
        image = held["featuresDict"]["features"]["image"]
        if kind == "class":
            image["pythonClassName"] = name
        elif kind == "original name":
            image["python_class_name"] = name
            del image["pythonClassName"]
        elif kind == "legacy":
            held = {"type": name, "content": {}}
        else:
            sequence = "tensorflow_datasets.core.features.sequence_feature.Sequence"
            inner = json.dumps({"feature": {"type": name, "content": {}}, "length": 1})
            image = {"pythonClassName": sequence, "jsonFeature": {"json": inner}}
            held["featuresDict"]["features"]["image"] = image
        path.write_text(json.dumps(held))
        with pytest.raises(ValueError, match=f"names the class {name}, which is not one of TFDS"):
            data.load("digits", "test", data_dir=digits)

    def test_a_data_set_that_names_its_module(self, digits, module):
        path = digits / "digits" / "1.0.0" / "dataset_info.json"
        held = json.loads(path.read_text())
        path.write_text(json.dumps(held | {"moduleName": module}))
        assert len(data.load("digits", "test", data_dir=digits)) == 500

    @pytest.mark.parametrize(
        "template", ["../elsewhere-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}", "{SPLIT}/{SHARD_X_OF_Y}"]
    )
    def test_a_data_set_that_names_files_elsewhere(self, digits, template):
        path = digits / "digits" / "1.0.0" / "dataset_info.json"
        held = json.loads(path.read_text())
        for split in held["splits"]:
            split["filepathTemplate"] = template
        path.write_text(json.dumps(held))
        with pytest.raises(ValueError, match=r"dataset_info\.json names a file elsewhere"):
            data.load("digits", "test", data_dir=digits)

    def test_a_data_set_whose_split_is_a_path(self, digits):
        path = digits / "digits" / "1.0.0" / "dataset_info.json"
        held = json.loads(path.read_text())
        held["splits"][0]["name"] = "/../../outside"
        path.write_text(json.dumps(held))
        with pytest.raises(ValueError, match="digits"):
            data.load("digits", "test", data_dir=digits)

    def test_a_workdir(self, tmp_path, module):
        config = plain_config() | {"defense": {"name": module}}
        (tmp_path / "best").mkdir()
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="unknown defense"):
            runs.restore(tmp_path)


def plain_config():
    return {
        "dataset": {"name": "digits"},
        "model": {"name": "cnn", "width": 0.25},
        "threat": {"norm": "linf", "eps": 0.1},
        "defense": {"name": "standard"},
        "train": {"optimizer": {"name": "sgd", "lr": 0.1}},
        "validation": {"name": "pgd", "steps": 2},
        "evaluation": {"attacks": {"pgd": {"name": "pgd", "steps": 2}}},
    }


NO_NAMES = [
    "../cnn",
    "../../x",
    "os",
    "jaxdefense.attacks.pgd",
    "a/b",
    "",
    ".",
    "..",
    "/etc/passwd",
    "__init__",
    "hostile_module",
]


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize("name", NO_NAMES)
class TestNames:
    """What is no file of the package is refused, and not imported."""

    def test_of_a_registry(self, name):
        for package in (models, defenses, configs):
            with pytest.raises(ValueError, match="unknown thing"):
                registry.load(package, name, "thing")

    def test_of_models(self, name):
        with pytest.raises(ValueError, match="unknown"):
            models.make(name, 10)
        with pytest.raises(ValueError, match="unknown"):
            models.generator(name, 1)

    def test_of_attacks_and_defences(self, name):
        from jaxdefense import threat

        with pytest.raises(ValueError, match="unknown"):
            attacks.make(name, threat.Linf(0.1))
        with pytest.raises(ValueError, match="unknown"):
            defenses.make(name, None, threat.Linf(0.1))

    def test_of_pretrained_networks(self, name):
        with pytest.raises(ValueError, match="unknown pretrained network"):
            models.load_pretrained(name)

    def test_of_configs(self, name):
        with pytest.raises(ValueError, match="unknown config"):
            configs.load(name, "digits")
        asked = name.replace("/etc/passwd", "/etc/nothing")  # a file that is there is the user's
        with pytest.raises(ValueError, match="config"):
            cli.expand_config_flag(["train.py", f"--config={asked}:digits"])

    def test_of_systems(self, name):
        if name:  # none is the default
            with pytest.raises(ValueError, match="unknown system"):
                quickstart_plan.select(name)

    def test_of_data_sets(self, name, tmp_path):
        for load in (data.load_section, lambda s, split: data.load(s["name"], split)):
            with pytest.raises(ValueError, match="unknown data set"):
                load({"name": name}, "train")
        with pytest.raises(ValueError, match="unknown data set"):
            prepare.prepare(name, data_dir=tmp_path)


def snapshot(folder):
    """All that is below a folder, with the contents of files."""
    found = {}
    for path in sorted(folder.rglob("*")):
        text = path.read_bytes() if path.is_file() else ""
        found[str(path.relative_to(folder))] = os.readlink(path) if path.is_symlink() else text
    return found


class TestPaths:
    """Nothing is read or written outside the folder that the user named."""

    @pytest.mark.parametrize("name", ["../outside", "digits/../../outside", "/{}/outside", "./x"])
    def test_a_data_set_outside_tfds_s_folder(self, name, digits, tmp_path):
        shutil.copytree(digits / "digits", tmp_path / "outside")
        before = snapshot(tmp_path)
        for asked in (name.format(tmp_path), f"{name.format(tmp_path)}:1.0.0"):
            with pytest.raises(ValueError, match="unknown data set"):
                data.load_section({"name": asked, "data_dir": str(digits)}, "test")
            with pytest.raises(ValueError, match="unknown data set"):
                prepare.prepare(asked, data_dir=digits)
        assert snapshot(tmp_path) == before

    @pytest.mark.parametrize("name", ["a/b", "../a", "..", ".", "", "a\\b", "a\0b", None, 3])
    def test_a_name_that_becomes_a_file_s(self, name, tmp_path):
        with pytest.raises(ValueError, match="cannot name a file"):
            files.check_name("it", name)
        with pytest.raises(ValueError, match=r"the config's name .* cannot name a file"):
            runs.build(plain_config() | {"name": name})
        if name is not None and name != 3:
            folder = tmp_path / "kept" / "journal"
            with pytest.raises(ValueError, match=r"attack .* cannot name a file"):
                Journal(folder, {"stages": {name: "pgd"}}, np.zeros((1, 2)))
            with pytest.raises(ValueError, match=r"option of defense .* cannot name a file"):
                sources.locate_source(name, {"workdir": "x"}, tmp_path)
        assert snapshot(tmp_path) == {}

    def test_every_config_s_name_is_a_file_s(self):
        for name in configs.names():
            for variant in configs.variants(name):
                files.check_name("config", configs.load(name, variant).name)

    def test_an_option_that_is_a_path_is_not_copied(self, tmp_path):
        """given/OPTION is the copy of the run that the option names."""
        config = plain_config()
        config["defense"] = {"name": "standard", "../../x": {"workdir": str(tmp_path / "teacher")}}
        with pytest.raises(ValueError, match=r"option of defense '\.\./\.\./x' cannot name a file"):
            runs.build(config, workdir=tmp_path / "runs" / "mine")
        assert snapshot(tmp_path) == {}

    def test_validation_images_outside_their_folder(self, tmp_path):
        (tmp_path / "val").mkdir()
        (tmp_path / "val" / "val_annotations.txt").write_text("../../secret.JPEG\tn01\t0\n")
        with pytest.raises(ValueError, match=r"image '\.\./\.\./secret\.JPEG' cannot name a file"):
            originals.ORIGINALS["tiny_imagenet"].read("tiny_imagenet", tmp_path)


def tar_of(*members):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as file:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type = kind
            if kind == tarfile.REGTYPE:
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
            else:
                member.linkname = content
                file.addfile(member)
    return packed.getvalue()


def zip_of(*members):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        for name, mode, content in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            file.writestr(info, content)
    return packed.getvalue()


FILE, LINK, HARD = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE


class TestArchives:
    """An archive writes below its folder, or is refused."""

    @pytest.fixture
    def unpack(self, tmp_path, monkeypatch):
        """Unpacks bytes as an archive of `tiny_imagenet` whose sum is right."""
        folder = tmp_path / "a" / "into"
        folder.mkdir(parents=True)
        (tmp_path / "a" / "secret").write_text("before")

        def run(name, content):
            archive = folder / name
            archive.write_bytes(content)
            sums = {name: ("md5", hashlib.md5(content, usedforsecurity=False).hexdigest())}
            monkeypatch.setattr(originals.ORIGINALS["tiny_imagenet"], "archive_sums", sums)
            originals._extract("tiny_imagenet", archive, folder)

        frozen = originals.ORIGINALS["tiny_imagenet"]
        monkeypatch.setitem(originals.ORIGINALS, "tiny_imagenet", Thawed(frozen))
        yield run
        above = {k: v for k, v in snapshot(tmp_path).items() if not k.startswith("a/into")}
        assert above == {"a": "", "a/secret": b"before"}

    @pytest.mark.parametrize(
        "members",
        [
            [("../evil", FILE, b"x")],
            [("a/../../../evil", FILE, b"x")],
            [("link", LINK, "../secret"), ("link", FILE, b"x")],
            [("up", LINK, ".."), ("up/evil", FILE, b"x")],
            [("abs", LINK, "/etc/passwd")],
            [("hard", HARD, "../secret")],
            [("pipe", tarfile.FIFOTYPE, "")],
        ],
        ids=["parent", "deep parent", "link to a file", "link up", "absolute", "hard link", "pipe"],
    )
    def test_a_tar_is_refused(self, unpack, members):
        with pytest.raises(ValueError, match=r"tiny_imagenet: cannot unpack x\.tgz"):
            unpack("x.tgz", tar_of(*members))

    def test_an_absolute_name_in_a_tar_is_taken_as_a_relative_one(self, unpack, tmp_path):
        unpack("x.tgz", tar_of((f"{tmp_path}/evil", FILE, b"x")))

    def test_a_zip_stays_below(self, unpack, tmp_path):
        members = [("../evil", 0, "x"), ("a/../../evil", 0, "x"), (f"{tmp_path}/evil", 0, "x")]
        unpack("x.zip", zip_of(*members, ("up", 0o120777, ".."), ("ok/in", 0, "x")))
        assert (tmp_path / "a" / "into" / "ok" / "in").read_text() == "x"
        assert not (tmp_path / "a" / "into" / "up").is_symlink()

    def test_no_archive(self, unpack):
        for name in ("x.tgz", "x.zip"):
            with pytest.raises(ValueError, match="cannot unpack"):
                unpack(name, b"no archive")


class Thawed:
    """A copy of a frozen `Original` whose fields can be changed."""

    def __init__(self, frozen):
        self.__dict__ |= vars(frozen)


PLAIN = "plain"
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</script><script>alert(1)</script>",
    "' onmouseover='alert(1)",
    "</template></title></style><svg onload=alert(1)><!--",
    "javascript:alert(1)",
    "{{ 7 * 7 }}{% raw %}",
]


def rich_of(text, name=""):
    """A record that says `text` wherever a record may say a word."""
    found = rich_record()
    results = {"clean": measured(90.0), text: measured(20.0), f"pgd {text}": measured(40.0)}
    found["config"]["defense"] = {"name": text, text: text}
    found["config"]["dataset"]["name"] = text
    found["config"]["model"] = {"name": text, "width": text}
    found["config"][text] = {text: [text]}
    found["threat"] = {"norm": text, "eps": 0.3, "note": text}
    found["dataset"] = {"name": text, "notes": [text], "label_names": [text, text]}
    found["reported"] = {
        text: {"value": 41.5, "status": text},
        f"r {text}": {"value": 1, "status": text},
    }
    found["attacks"] = {text: text}
    found["training"] |= {"checkpoint": text}
    found["weights"] = {text: {text: found["weights"]["before"]["conv1"]}}
    found["examples"] |= {"attack": text, "labels": [text], "said": [text]}
    found["command"] = [text]
    found["versions"] = {"jax": text, "python": text}
    found["device"] = {"kind": text, "count": text, "host": text}
    found |= {"git": text, "date": text, "name": f"{name}{text}", "notes": [text], "seed": text}
    found["results"] = {f"main {text}": results, text: {"clean": measured(80.0)}}
    flags = [
        {"severity": s, "predictor": f"main {text}", "name": text, "evidence": text}
        for s in ("error", "warning", text)
    ]
    found["cascade"] = {"flags": flags}
    return found


def audit_of(text):
    """An audit's record that says `text` wherever it may say a word."""
    found = rich_of(text)
    checks = [
        {"name": text, "passed": False, "evidence": text},
        {"name": text, "passed": True, "evidence": text},
    ]
    report = {
        "checks": checks,
        "curve": [[0.0, 90.0], [0.3, 30.0]],
        "attacks": {text: text},
        "examples": found["examples"],
    }
    results = {"clean": measured(90.0), f"T1 {text}": measured(30.0), "worst": measured(20.0)}
    found |= {"protocol": "audit", "results": {f"main {text}": results}}
    found["config"]["evaluation"]["audit"] = {text: text, "list": [text]}
    return found | {"audit": {f"main {text}": report}}


class Elements(HTMLParser):
    """The elements of a page with their attributes' names, and the text of its data."""

    def __init__(self, page):
        super().__init__()
        self.found, self.addresses, self.specs, self._in_specs = [], [], "", False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, *(name for name, _ in attrs)))
        self.addresses += [value for name, value in attrs if name in ("href", "src")]
        self._in_specs = ("id", "charts") in attrs

    def handle_endtag(self, tag):
        self.found.append((f"/{tag}",))
        self._in_specs = False

    def handle_data(self, text):
        self.specs += text if self._in_specs else ""


def leaderboard_of(text):
    return report.leaderboard(
        [rich_of(text), rich_of(text, "b "), audit_of(f"c {text}")],
        title=text,
        waiting=[text],
        failed={text: f"Failed: {text}"},
    )


def audit_page_of(text):
    return report.audit_page(audit_of(text))


def quickstart_page_of(text, folder):
    """Quickstart's own page of a system that is done, one that failed and one that waits."""
    rows = []
    for i, state in enumerate(("done", "failed", "waiting")):
        row = quickstart_board.Row(f"r{i}", {"name": f"{i} {text}"}, folder / f"r{i}", state)
        row.reason = text
        records.save(rich_of(text) | {"format": records.FORMAT}, row.record_path)
        rows.append(row)
    return quickstart.build_page(rows)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return {
        "leaderboard": Elements(leaderboard_of(PLAIN)),
        "audit": Elements(audit_page_of(PLAIN)),
        "quickstart": Elements(quickstart_page_of(PLAIN, folder)),
    }


class TestPages:
    """What records say is text: a hostile page has the elements of a plain one, and no more."""

    @pytest.mark.parametrize("text", HOSTILE)
    def test_a_hostile_record_adds_no_element(self, text, plain, tmp_path):
        pages = {
            "leaderboard": leaderboard_of(text),
            "audit": audit_page_of(text),
            "quickstart": quickstart_page_of(text, tmp_path),
        }
        for kind, page in pages.items():
            found = Elements(page)
            assert found.found == plain[kind].found, kind
            assert not [at for at in found.addresses if "alert" in at], kind
            if set(text) & set("<>\"'"):
                assert text not in page, kind
            assert not set("<>&") & set(found.specs), kind
            assert text in json.dumps(json.loads(found.specs), ensure_ascii=False).replace(
                '\\"', '"'
            ), kind

    def test_a_page_of_files_by_the_script(self, tmp_path):
        records.save(rich_of(HOSTILE[2]) | {"format": records.FORMAT}, tmp_path / "r" / "a.json")
        page = script.page([tmp_path / "r"], HOSTILE[2])
        plain = report.leaderboard([rich_of(PLAIN)], title=PLAIN)
        assert Elements(page).found == Elements(plain).found

    @pytest.mark.parametrize("text", [*HOSTILE, "a | b\n<!-- end -->"])
    def test_a_table_of_markdown_holds_no_html(self, text):
        """README.md and the pages of results are made of these."""
        one = rich_of(text)
        audited = audit_of(text)
        plain = rich_of(PLAIN)
        made = [tables.accuracy_table([one]), tables.class_table([one], text)]
        like = [tables.accuracy_table([plain]), tables.class_table([plain], PLAIN)]
        for table, other in zip(made, like, strict=True):
            cells, others = (
                [line.replace("\\|", "").count("|") for line in t.split("\n")]
                for t in (table, other)
            )
            assert cells == others
        predictor = f"main {text}"
        made += [tables.tier_table(audited, predictor), tables.check_table(audited, predictor)]
        for table in [*made, tables.provenance([one])]:
            assert not re.search(r"<[a-zA-Z/!?]", table)

    def test_a_command_is_one_line(self):
        """A config's key must not add a line to the commands that people copy."""
        config = json.loads(configs.load("trades", "mnist").to_json())
        config["x\nrm -rf ~"] = "$(rm -rf ~)\n"
        config["seed"] = "0; rm -rf ~"
        lines = configs.commands(config)
        assert not [line for line in lines if "\n" in line]
        assert '# not in the config file: "x\\nrm -rf ~" = "$(rm -rf ~)\\n"' in lines
        assert "--workdir='runs/trades-mnist-0; rm -rf ~'" in lines[0]


# Says what ran in the page in place of showing it; before all other scripts.
SPY = "<head><script>window.ran = []; window.alert = (said) => ran.push(said);</script>"
HOVER = """
for (const kind of ["pointerover", "pointermove", "mouseover", "mousemove"])
  arguments[0].dispatchEvent(new PointerEvent(kind, { bubbles: true }));
"""


@pytest.mark.parametrize("kind", ["leaderboard", "audit"])
def test_a_browser_runs_nothing_of_a_record(kind, browser, tmp_path):  # noqa: F811
    make = {"leaderboard": leaderboard_of, "audit": audit_page_of}[kind]
    path = tmp_path / "page.html"
    path.write_text(make("".join(HOSTILE)).replace("<head>", SPY, 1))
    browser.get(path.as_uri())
    browser.execute_async_script(READY)

    def find(selector):
        return browser.find_elements("css selector", selector)

    if kind == "leaderboard":  # its script makes a table, menus and details
        for button in [*find("button.open"), *find("button.dt-button")]:
            browser.execute_script("arguments[0].click()", button)
        assert "alert(1)" in find("div.dt-button-collection")[0].text  # the columns' names
        find("input[type=search]")[0].send_keys("alert")
    marks = find(".chart svg path[aria-label]")
    assert marks
    for mark in marks[:20]:
        browser.execute_script(HOVER, mark)
    browser.execute_async_script(READY)
    browser.execute_async_script("setTimeout(arguments[0], 200)")  # an image's error comes late
    assert browser.execute_script("return ran") == []
    added = "img[src=x], svg[onload], [onerror], [onload], [onmouseover], a[href^=javascript]"
    assert find(added) == []
