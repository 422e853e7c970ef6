"""Two CPU devices, so that what is mapped is tested as mapped; a cache of compiled programs.

Compiling takes most of the tests' time, and LLVM's optimisations and XLA:CPU's newer fusion
emitters three quarters of that: they are off unless XLA_FLAGS is given, which also shows what hangs
on one compiler's rounding. `make test-slow` has them on.
"""

import gc
import importlib
import importlib.metadata
import json
import os
import pathlib
import time

if not os.environ.get("XLA_FLAGS"):
    os.environ["XLA_FLAGS"] = (
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        " --xla_cpu_parallel_codegen_split_count=1"
    )
    if importlib.metadata.version("jax").startswith("0.10."):  # later ones know no such flag
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=2"

import jax
import pytest
from absl import flags

from jaxdefense import models

ROOT = pathlib.Path(__file__).parents[1]

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)  # closures compile anew
gc.set_threshold(100_000, 50, 100)  # tracing makes many objects: collected often, 3 % of the time


PREPARED = ROOT / ".cache" / "tfds"


def pytest_configure(config):
    """The digits are prepared once, before there are several workers."""
    from jaxdefense.data import prepare

    if not hasattr(config, "workerinput"):
        PREPARED.mkdir(parents=True, exist_ok=True)
        prepare.prepare_digits(PREPARED)


# Files that take a minute or more, the longest first: none of them then runs alone at the end.
LONG = (
    "test_judge.py",
    "test_defenses.py",
    "test_gradient.py",
    "test_models.py",
    "test_train.py",
    "test_purifying.py",
    "test_golden.py",
    "test_experiments.py",
    "test_readme.py",
    "test_docs.py",
    "test_examples.py",
    "test_audit.py",
    "test_ensemble.py",
    "test_cascade.py",
    "test_cost_sensitive.py",
    "test_contrastive.py",
    "test_distillation.py",
)


def pytest_collection_modifyitems(items):
    """Long files begin; `--no-loadscope-reorder` keeps the order among several workers."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_addoption(parser):
    parser.addoption("--results", help="write each test's outcome and seconds to this JSON file")


@pytest.fixture(scope="module", autouse=True)
def _release_programs():
    """What one file of tests compiled is of little use to the next, and fills gigabytes."""
    yield
    if resident_bytes() > 1.2e9:
        jax.clear_caches()
        gc.collect()


def resident_bytes():
    """The memory of this process; infinite where the system does not tell."""
    try:
        pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return float("inf")
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def autodiff_convolutions():
    """For tests of what is computed with a network, not of the network: a third less to compile.

    The explicit gradients of `models.conv` are tested against these in test_conv.py, and whole runs
    (test_train.py, test_experiments.py, test_golden.py) use them.
    """
    with models.explicit_gradients(False):
        yield


def pytest_sessionstart(session):
    session.config.began = time.monotonic()


def pytest_terminal_summary(terminalreporter, config):
    """Writes --results: the last run of the slow tests is kept in the repository."""
    if not (path := config.getoption("--results")):
        return
    from jaxdefense import files
    from jaxdefense.evaluation import records

    tests = {
        report.nodeid: {"outcome": report.outcome, "seconds": round(report.duration, 1)}
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call" or getattr(report, "skipped", False)
    }
    found = {
        "command": "make test-slow",
        "tests": dict(sorted(tests.items())),
        "seconds": round(time.monotonic() - config.began),
        **records.environment(),
    }
    files.write_text(path, json.dumps(found, indent=1) + "\n")


def import_script(name):
    """A script of experiments/ as a module; the flags of those imported before give way."""
    for module, defined in list(flags.FLAGS.flags_by_module_dict().items()):
        if (ROOT / "experiments" / f"{module.replace('.', '/')}.py").exists():
            for flag in list(defined):
                delattr(flags.FLAGS, flag.name)
    return importlib.import_module(name)


@pytest.fixture(scope="session")
def tfds_dir():
    """Where tests keep prepared data sets, between sessions."""
    return str(PREPARED)
