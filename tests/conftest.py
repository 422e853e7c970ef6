"""Two CPU devices, so that what is mapped is tested as mapped; a cache of compiled programs.

Compiling takes most of the tests' time, and LLVM's optimisations and XLA:CPU's newer fusion
emitters three quarters of that: they are off unless XLA_FLAGS is given, which also shows what hangs
on one compiler's rounding (XLA_FLAGS=--xla_backend_optimization_level=3 make test).
"""

import ctypes
import gc
import importlib
import importlib.metadata
import json
import os
import pathlib
import re
import sys
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


RIVALS = (
    "acl|adaad|advprop|anti_adversary|ape_gan|ard|avmixup|cse_at|defensive_distillation|fgsm_at|frl"
    "|gssl_baseline|hgd|iad|iat|m2at_shuffle|mart|rocl|supcon|zhang_evans"
)
# Contracts with many cases: the costliest are slow tests, the others run each time.
SLOW_CASES = {
    "test_apgd.py::test_more_restarts_never_lower_the_loss": "l1|l2",
    "test_apgd.py::test_reaches_the_exact_maximum": ".*-(3-1|2-3)",
    "test_audit.py::test_each_check_is_tripped_by_a_model": "optimising.*|rippled.*",
    "test_augment.py::TestContract::test_runs_inside_scan_and_pmap": "(?!all).*",
    "test_cascade.py::test_any_batch_size": "1|256",
    "test_contrastive.py::TestRivals::test_the_head_phase_moves_the_head_only": "acl|rocl",
    "test_contrastive.py::TestClaf::test_a_refresh_moves_the_head_and_not.*": "eval",
    "test_cost_sensitive.py::test_a_warm_start_is_computed_once_for_all_members": "True",
    "test_damage.py::test_each_file_of_a_checkpoint": "(empty|truncate|zero).*",
    "test_data.py::TestDecodedCopy::test_may_be_damaged_anywhere": "-?[1-9]0*0",
    "test_defenses.py::test_contract": RIVALS,
    "test_defenses.py::test_crafting_leaves_statistics_alone_and_training_moves_them": RIVALS,
    "test_defenses.py::test_transforms_keep_the_contract": "ema|soft_labels|stacked",
    "test_distillation.py::TestSoftLabels::test_any_defence_learns_from_them": "m2at",
    "test_docstrings.py::test_the_example_runs_as_it_stands": (
        r".*\.(apgd|apgd_targeted|audit|box_mask|eot|fab|fab_targeted|leaderboard|minimal_distances)"
        r"|.*\.(square|steps_of|worst_case|ensemble\.autoattack)"
    ),
    "test_endings.py::TestTraining::test_it_saves_and_ends_with_the_same_bits": "_validate_at-2.*",
    "test_ensemble.py::test_an_examples_result_does_not_depend_on_its_batch": ".*-(l1|l2)",
    "test_ensemble.py::test_bf16_models_and_float64_images": "(?!fmn).*",
    "test_ensemble.py::test_eager_is_jitted": "apgd|square",
    "test_ensemble.py::test_one_program_for_a_grid_of_eps": "apgd_targeted|fab",
    "test_fab.py::test_finds_the_exact_distance": ".*-(3-1|2-3)-.*",
    "test_generators.py::TestEveryGenerator::test_images_to_images": "mae",
    "test_generators.py::test_autoencoders_return_images_and_train_every_parameter": "mae",
    "test_golden.py::test_the_verdicts_on_some_images_are_still_those": "pgd_at-cifar10-linf",
    "test_gradient.py::test_contract": "(?!pgd).*-(l1|l2)|autoattack.*",
    "test_gssl.py::test_ablations_trace": "options2.*",
    "test_judge.py::TestARandomModelProperly::test_the_verdict_is_what_fresh_draws_say": "1e-06",
    "test_judge.py::TestGrid::test_results_are_images_of_8_bits_in_the_ball": "l1|l2",
    "test_judge.py::TestHalfPrecision::test_a_win_that_a_plain_pass_does_not_confirm.*": "fab",
    "test_judge.py::TestNonFiniteGradients::test_every_attack_goes_on": ".*_targeted",
    "test_judge.py::TestOtherBounds::test_equal_problems_have_equal_verdicts": "(?!apgd-linf).*",
    "test_judge.py::TestTargets::test_of_three_classes_it_is_the_target_that_is_hit": "(?!apgd).*",
    "test_judge.py::TestTargets::test_the_nearest_point_of_a_target.*": ".*-(l1|l2)",
    "test_judge.py::TestWhatIsGiven::test_channels_first_is_the_same_problem": "l2",
    "test_judge.py::TestWhatIsGiven::test_square_takes_vectors": "l1|l2",
    "test_minimal.py::test_finds_the_exact_distance": ".*-(3-1|2-3)",
    "test_models.py::(TestEveryModel::)?test_.*": ".*(preact_resnet|vgg|wide_resnet)(?!-shape).*",
    "test_readme.py::test_examples_run": "docs/(judge|train|your_model|your_weights).md",
    "test_square.py::test_fools_without_gradients": "l1|l2",
    "test_square.py::test_more_queries_never_lower_the_margin": "l1|l2",
    "test_square.py::test_small_and_oblong_images": "shape0-l[12]|shape1-l(1|inf)|shape2-l(2|inf)",
}


@pytest.hookimpl(tryfirst=True)  # before the slow ones are left out
def pytest_collection_modifyitems(items):
    """Long files begin; `--no-loadscope-reorder` keeps the order among several workers."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    slow = [re.compile(rf"{test}\[({cases})\]") for test, cases in SLOW_CASES.items()]
    for item in items:
        name = item.nodeid.removeprefix("tests/")
        if any(pattern.fullmatch(name) for pattern in slow):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish():
    """What was imported stays: the garbage collector need not look at it again."""
    gc.freeze()


def pytest_addoption(parser):
    parser.addoption("--results", help="write each test's outcome and seconds to this JSON file")


@pytest.fixture(scope="module", autouse=True)
def _release_programs():
    """What one file of tests compiled is of little use to the next, and fills gigabytes."""
    yield
    if resident_bytes() > 1.4e9:
        jax.clear_caches()
        gc.collect()
        if sys.platform == "linux":  # glibc keeps what was freed
            ctypes.CDLL("libc.so.6").malloc_trim(0)


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
    path = config.getoption("--results")
    if not path or hasattr(config, "workerinput"):  # a worker knows its own tests alone
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
            sys.modules.pop(module, None)  # imported again, it defines them again
    return importlib.import_module(name)


@pytest.fixture(scope="session")
def tfds_dir():
    """Where tests keep prepared data sets, between sessions."""
    return str(PREPARED)
