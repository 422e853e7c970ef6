"""docs/flags.md tells what each flag and each check means."""

import inspect
import pathlib

import pytest

from jaxdefense.evaluation import audit, flags
from jaxdefense.train import collapse

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "flags.md").read_text()


@pytest.mark.parametrize("name", flags.NAMES)
def test_every_flag_has_a_row(name):
    assert f"\n| {name} |" in PAGE


@pytest.mark.parametrize("name", collapse.NAMES)
def test_every_warning_of_training_has_a_row(name):
    section = PAGE.partition("## Warnings of training")[2].partition("\n## ")[0]
    assert f"\n| {name} |" in section


def test_every_severity_is_told():
    assert all(f"**{severity}**" in PAGE for severity in flags.SEVERITIES)


def test_every_fatal_check_is_named():
    module = inspect.getmodule(audit)
    told = " ".join(PAGE.split())
    assert all(f'"{name}"' in told for name in module._FATAL)
