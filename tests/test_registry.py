"""Names are read from files and one module is imported: a broken file breaks its own name alone."""

import importlib
import json
import subprocess
import sys

import pytest

from jaxdefense import defenses, models, registry


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of a good file, two broken ones, a helper and one of another kind."""
    folder = tmp_path / "registered"
    folder.mkdir()
    sources = {
        "__init__": "def make(): ...",
        "_shared": "def make(): ...",
        "good": "def make():\n    return 'made'",
        "broken": "raise RuntimeError('broken')\n\ndef make(): ...",
        "unreadable": "def make(:\n",
        "helper": "make_nothing = 1\n\nclass A:\n    def make(self): ...",
        "drawing": "def make_generator(): ...",
    }
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("registered")
    for name in [name for name in sys.modules if name.split(".")[0] == "registered"]:
        del sys.modules[name]


def test_names_are_files_that_define_the_function(package):
    assert registry.names(package) == ["broken", "good", "unreadable"]
    assert registry.names(package, needs="make_generator") == ["drawing"]
    assert "registered.good" not in sys.modules


def test_a_broken_file_breaks_its_own_name_alone(package):
    assert registry.load(package, "good", "thing").make() == "made"
    with pytest.raises(RuntimeError, match="broken"):
        registry.load(package, "broken", "thing")
    with pytest.raises(SyntaxError):
        registry.load(package, "unreadable", "thing")
    with pytest.raises(ValueError, match="unknown thing 'goods'; nearest: good; known: broken, "):
        registry.load(package, "goods", "thing")
    with pytest.raises(ValueError, match="unknown thing 'helper'"):
        registry.load(package, "helper", "thing")


def test_helpers_are_not_listed():
    assert not {"base", "transforms"} & set(defenses.names())
    helpers = {"layers", "conv", "projector"}
    assert not helpers & {*models.names(), *models.generators()}
    assert not set(models.names()) & set(models.generators())


def test_a_listed_module_defines_what_it_is_listed_for():
    for package, needs in ((defenses, "make"), (models, "make"), (models, "make_generator")):
        for name in registry.names(package, needs=needs):
            assert callable(getattr(registry.load(package, name, "module", needs=needs), needs))


def test_making_one_defence_imports_no_other():
    program = """
import json, sys
from jaxdefense import defenses, models, threat
assert "gssl" in defenses.names()
defenses.make("trades", models.make("cnn", 10), threat.Linf(0.1))
print(json.dumps([name for name in sys.modules if name.startswith("jaxdefense.")]))
"""
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    imported = json.loads(answer.stdout)
    assert "jaxdefense.defenses.trades" in imported
    own = {name.rpartition(".")[2] for name in imported if ".defenses." in name}
    assert own & set(defenses.names()) == {"trades"}
    assert {name.rpartition(".")[2] for name in imported if ".models." in name} & {
        *models.names(),
        *models.generators(),
    } == {"cnn"}


def test_many_known_names_are_counted_and_few_are_listed():
    with pytest.raises(ValueError, match=r"unknown row 'r7x'; nearest: r7, .*; known: 61 names$"):
        registry.raise_unknown("row", "r7x", [f"r{i}" for i in range(61)])
    with pytest.raises(ValueError, match=r"known: r0, r1, r2$"):
        registry.raise_unknown("row", "r7x", ["r0", "r1", "r2"])
