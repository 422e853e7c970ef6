"""The floors: an import points down, or to the same floor; models and attacks know nothing of each
other."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FLOORS = (
    ("types", "extras", "files", "registry", "threat", "losses", "mixing", "models"),
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


def room(parts):
    """The room of a module's dotted name; None for others than ours."""
    if parts[0] == "experiments":
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
