"""The package tells type checkers of its types: a wrong argument fails in a user's own file."""

import os
import pathlib
import subprocess
import sys

import pytest

import jaxdefense

PACKAGE = pathlib.Path(jaxdefense.__file__).parent

RIGHT = "from jaxdefense import attacks, threat\n\nattacks.pgd(threat.Linf(0.1), steps=10)\n"


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").exists()


CASES = {
    "right": (RIGHT, None),
    "steps": (RIGHT.replace("steps=10", 'steps="ten"'), 'Argument "steps" to "pgd"'),
    "name": (RIGHT.replace("steps=10", "step=10"), 'Unexpected keyword argument "step"'),
    "threat": (RIGHT.replace("threat.Linf(0.1)", "0.1"), 'Argument 1 to "pgd"'),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What mypy says of all the users' files, in one process."""
    folder = tmp_path_factory.mktemp("typing")
    for name, (source, _) in CASES.items():
        (folder / f"{name}.py").write_text(source)
    command = [sys.executable, "-m", "mypy", "--ignore-missing-imports", "--cache-dir=cache"]
    found = subprocess.run(
        [*command, *(f"{name}.py" for name in CASES)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "MYPYPATH": str(PACKAGE.parent)},  # mypy finds no editable install
        check=False,
    )
    return found.stdout + found.stderr


@pytest.mark.parametrize("name", CASES)
def test_mypy_reads_the_package_types(name, told):
    mine = [line for line in told.splitlines() if line.startswith(f"{name}.py")]
    error = CASES[name][1]
    if error is None:
        assert mine == [], told
    else:
        assert error in "\n".join(mine), told
