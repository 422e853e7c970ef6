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


@pytest.mark.parametrize(
    ("source", "error"),
    [
        (RIGHT, None),
        (RIGHT.replace("steps=10", 'steps="ten"'), 'Argument "steps" to "pgd"'),
        (RIGHT.replace("steps=10", "step=10"), 'Unexpected keyword argument "step"'),
        (RIGHT.replace("threat.Linf(0.1)", "0.1"), 'Argument 1 to "pgd"'),
    ],
    ids=["right", "steps", "name", "threat"],
)
def test_mypy_reads_the_package_types(source, error, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(source)
    command = [sys.executable, "-m", "mypy", "--ignore-missing-imports", "--cache-dir"]
    found = subprocess.run(
        [*command, str(tmp_path.parent / "mypy"), str(path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(PACKAGE.parent)},  # mypy finds no editable install
        check=False,
    )
    mine = [line for line in found.stdout.splitlines() if line.startswith("mine.py")]
    if error is None:
        assert mine == []
    else:
        assert error in "\n".join(mine), found.stdout + found.stderr
