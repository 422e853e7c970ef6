"""The floors: an import points down, or to the same floor; models and attacks know nothing of each
other; what serves one paper or the benchmark stays in its folder."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FLOORS = (
    (
        *("types", "extras", "files", "checksums", "distributed", "interrupts", "registry"),
        *("streams", "validate", "threat", "losses", "mixing", "conv", "rewrite", "models"),
    ),
    ("attacks", "data"),
    ("defenses",),
    ("runs",),
    ("evaluation",),
    ("train",),
    ("experiments",),
)
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
APART = ({"models", "attacks"}, {"attacks", "data"})
FILES = [*sorted(ROOT.glob("jaxdefense/**/*.py")), *sorted(ROOT.glob("experiments/**/*.py"))]

# What `import NAME` finds in experiments/, whose scripts put that folder on the path.
SCRIPTS = {
    path.relative_to(ROOT / "experiments").with_suffix("").parts[0]
    for path in ROOT.glob("experiments/**/*.py")
}
# Folders of experiments/, and the scripts outside a folder that may import from it.
FOLDERS = {folder: {"tables.py"} for folder in ("benchmark", "accelerators")}
FOLDERS["papers"] = {"tables.py", "study_pages.py"}
GENERIC = ("runs", "evaluation", "train")
# Defences that serve every paper as baselines or parts, and "add", which is a word.
COMMON = {"base", "transforms", "combine", "standard", "pgd_at", "fgsm_at", "trades", "add"}


def room(parts):
    """The room of a module's dotted name; None for others than ours."""
    if parts[0] == "experiments" or parts[0] in SCRIPTS:
        return "experiments"
    return parts[1] if parts[0] == "jaxdefense" and len(parts) > 1 else None


def imported(path):
    """The dotted names that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_room_has_a_floor():
    rooms = {room(path.relative_to(ROOT).with_suffix("").parts) for path in FILES}
    assert rooms - {None, "__init__"} == set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    here = room(path.relative_to(ROOT).with_suffix("").parts)
    for name in imported(path):
        there = room(name.split("."))
        if here in FLOOR and there in FLOOR:
            assert FLOOR[there] <= FLOOR[here], f"{path.name} imports {name}, which lies above it"
            assert {here, there} not in APART, f"{path.name} imports {name}"


def test_scripts_are_known_by_the_names_that_they_import():
    assert {"cli", "configs", "tables", "papers", "benchmark"} <= SCRIPTS
    assert room(["papers", "metric_i"]) == "experiments"
    assert room(["jaxdefense", "evaluation", "tables"]) == "evaluation"


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_of_experiments_serves_itself(folder):
    """The benchmark and the papers do not know each other, and only tables print from them."""
    home = ROOT / "experiments" / folder
    users = {
        str(path.relative_to(ROOT / "experiments"))
        for path in FILES
        if home not in path.parents and folder in {name.split(".")[0] for name in imported(path)}
    }
    assert users == FOLDERS[folder]


@pytest.mark.parametrize("generic", GENERIC)
def test_no_generic_file_names_the_system_of_one_paper(generic):
    """A system is a defence's file; "protect" and "metric I" are those of one paper."""
    files = ROOT.glob("jaxdefense/defenses/[!_]*.py")
    systems = {path.stem for path in files} - COMMON
    assert {"cse", "gssl", "m2at"} <= systems
    names = sorted(name.replace("_", "[_ -]?") for name in systems)
    named = re.compile(rf"\b(protect\w*|metric[_ ]I|{'|'.join(names)})\b", re.IGNORECASE)
    for path in ROOT.glob(f"jaxdefense/{generic}/**/*.py"):
        found = {match.group() for match in named.finditer(path.read_text("utf-8"))}
        assert not found, f"{path.name} names {sorted(found)}"
