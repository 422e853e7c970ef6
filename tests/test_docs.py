"""The site: it builds without a network, leaves out nothing public, and its figures are current."""

import importlib
import inspect
import os
import pathlib
import re
import runpy
import subprocess
import sys

import pytest
import yaml
from test_docstrings import MEMBERS, PACKAGES

from jaxdefense import defenses, runs
from jaxdefense.defenses import base
from jaxdefense.train import train

ROOT = pathlib.Path(__file__).parents[1]
FIGURES = runpy.run_path(str(ROOT / "docs" / "figures.py"))["FIGURES"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site; its builder's warnings are errors."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    result = subprocess.run(
        [*command, "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def exported():
    """{a name in a package's __all__: where its object is defined}."""
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            home = getattr(value, "__module__", package)
            yield f"{package}.{name}", f"{home}.{getattr(value, '__name__', name)}"


def is_public(name):
    return not any(part.startswith("_") for part in name.split("."))


def test_nothing_public_is_missing(site):
    pages = (site / "api").glob("*.html")
    shown = {
        name for page in pages for name in re.findall(r'id="(jaxdefense[^"]*)"', page.read_text())
    }
    homes = dict(exported())
    for name, home in homes.items():
        assert name in shown or home in shown, name
    others = {home: name for name, home in homes.items()}
    members = [name for name in MEMBERS if is_public(name)]
    assert len(members) > 200
    for name in members:
        owner = max(
            (home for home in others if f"{name}.".startswith(f"{home}.")), key=len, default=""
        )
        short = others[owner] + name.removeprefix(owner) if owner else name
        assert name in shown or short in shown, name


def test_every_package_has_a_page():
    hooks = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
    paths = (ROOT / "jaxdefense").iterdir()
    found = {
        path.stem
        for path in paths
        if not path.name.startswith(("_", ".")) and (path.suffix == ".py" or any(path.glob("*.py")))
    }
    assert set(hooks["PAGES"]) == found


def test_every_page_is_in_the_navigation():
    def leaves(node):
        if isinstance(node, str):
            return [node]
        inner = node.values() if isinstance(node, dict) else node
        return [leaf for child in inner for leaf in leaves(child)]

    text = (ROOT / "mkdocs.yml").read_text()
    listed = {name for name in leaves(yaml.safe_load(text)["nav"]) if not name.startswith("api/")}
    docs = ROOT / "docs"
    assert listed == {str(path.relative_to(docs)) for path in docs.rglob("*.md")}


def test_pages_load_nothing_from_elsewhere(site):
    loads = re.compile(
        r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?((?:https?:)?//[^\"'\s>]+)"
        r"|<link\b[^>]*\bhref=[\"']?((?:https?:)?//[^\"'\s>]+)"
    )
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        found = [a or b for a, b in loads.findall(page.read_text())]
        assert not found, (page.name, found)
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//[^)]*", sheet.read_text())


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_current(name):
    """`python docs/figures.py` changes nothing."""
    drawn = FIGURES[name]()
    assert (ROOT / "docs" / "images" / f"{name}.svg").read_text() == drawn
    assert "<title>" in drawn
    assert 'fill="#FFFFFF"' in drawn  # readable on a dark page


def test_every_image_is_drawn():
    images = {path.stem for path in (ROOT / "docs" / "images").glob("*.svg")}
    assert images == set(FIGURES)


def test_the_quickstart_s_figure_shows_the_records():
    from jaxdefense.evaluation import records

    folder = ROOT / "experiments" / "records" / "quickstart"
    picture = FIGURES["quickstart"]()
    (record,) = [one for one in records.load_all([folder]) if one["name"] == "csa-digits"]
    results = next(iter(record["results"].values()))
    lowest = min(found["accuracy"] for name, found in results.items() if name != "clean")
    for value in (results["clean"]["accuracy"], lowest):
        assert f">{value:.1f}</text>" in picture


def test_a_defence_is_added_as_the_page_says(tmp_path, tfds_dir, monkeypatch):
    """The page's two files make a defence that the contract tests accept and that trains."""
    import test_defenses

    page = (ROOT / "docs" / "add_a_defence.md").read_text()
    files = dict(
        re.findall(
            r"`((?:jaxdefense|experiments)/\w+/\w+\.py)`.*?```python\n(.*?)```", page, re.DOTALL
        )
    )
    for path, text in files.items():
        target = tmp_path / path
        target.parent.mkdir(parents=True)
        target.write_text(text)
    monkeypatch.setenv("TFDS_DATA_DIR", tfds_dir)
    monkeypatch.setattr(
        defenses, "__path__", [*defenses.__path__, str(tmp_path / "jaxdefense/defenses")]
    )
    assert "alp" in defenses.names()
    test_defenses.test_contract("alp")
    test_defenses.test_crafting_leaves_statistics_alone_and_training_moves_them("alp")
    make = importlib.import_module("jaxdefense.defenses.alp").make
    assert "Args:" in inspect.getdoc(make)
    config = runpy.run_path(str(tmp_path / "experiments/configs/alp.py"))["get_config"](
        "digits_debug"
    )
    assert isinstance(runs.build(config.to_dict()).defense, base.Defense)
    assert train(config.to_dict(), tmp_path / "run", progress=False)["steps"] == 6
