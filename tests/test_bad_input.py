"""Wrong input is answered in one line, before anything is compiled, and leaves nothing behind."""

import contextlib
import importlib.util
import io
import os
import pathlib
import re
import shlex
import sys
import warnings

import bad_input
import jax
import numpy as np
import pytest
from absl import flags
from conftest import import_script
from hypothesis import given, settings
from hypothesis import strategies as st
from test_experiments import scripts

from jaxdefense import attacks, defenses, losses, models, threat, validate
from jaxdefense.evaluation import evaluator
from jaxdefense.train import optim, refused

ROOT = pathlib.Path(__file__).parents[1]
GIVEN = {"a_file", "a_folder"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a file and an empty folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_text("text\n")
    (tmp_path / "a_folder").mkdir()
    return tmp_path


@pytest.fixture(scope="module")
def compiled():
    """The programs that XLA compiled since the module's first test, as a list that grows."""
    programs = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            programs.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield programs
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def train(folder, monkeypatch, tfds_dir):
    """experiments/train.py in this process: values of its config -> (exit code, stdout, stderr)."""
    monkeypatch.setenv("TFDS_DATA_DIR", tfds_dir)
    if "train" in sys.modules:  # its flags may have given way to another script's
        monkeypatch.delitem(sys.modules, "train")
    script = import_script("train")

    def run(*values):
        argv = ["train.py", "--config=pgd_at:digits_debug", "--workdir=run"]
        monkeypatch.setattr(sys, "argv", argv + [f"--config.{value}" for value in values])
        for name in [name for name in flags.FLAGS if name.startswith("config.")]:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(action="ignore"),  # ml_collections uses load_module
        ):
            try:
                script.cli.run(script.main)
            except SystemExit as error:
                code = error.code
        if isinstance(code, str):  # Python prints it where nothing catches it
            code = print(code, file=err) or 1
        return code or 0, out.getvalue(), err.getvalue()

    return run


def check_said(said, message):
    """`said` is one line: the message, or the message and the names that are known."""
    assert "\n" not in said
    assert said == message or said.startswith(message + "; "), said


def check_ended(answer, message):
    code, out, err = answer
    assert code in (1, 2), err
    assert out == ""
    assert err.endswith("\n")
    program, _, said = err[:-1].partition(": ")
    assert program in ("error", "prepare_data"), err
    check_said(said, message)


@pytest.mark.parametrize(("value", "message"), bad_input.SETTINGS)
def test_a_wrong_value_of_a_config(train, folder, compiled, value, message):
    before = len(compiled)
    check_ended(train(value), message)
    assert len(compiled) == before
    assert {path.name for path in folder.iterdir()} == GIVEN


def test_a_run_that_failed_at_its_start_takes_another_config(train, folder):
    """Its config.json and log are there, and no checkpoint."""
    code, _, err = train("train.optimizer.lr=1e300")
    assert code == 1
    assert "the loss was not finite at step 1" in err
    code, _, err = train("train.length=2s")
    assert code == 0, err
    assert "holds no checkpoint: it gets another config (train.length: " in err


def test_a_corrected_command_starts(train, folder, compiled):
    code, *_ = train("model.width=-1")
    assert code == 1
    before = len(compiled)
    code, out, err = train("train.length=4s")
    assert code == 0, err
    assert out.splitlines()[-1].startswith("4 steps in ")
    assert len(compiled) > before  # the counter of the other tests counts
    assert (folder / "run" / "config.json").exists()


@pytest.fixture(scope="module")
def answers(tmp_path_factory, tfds_dir):
    """({command: (exit code, stdout, stderr)}, names left behind) of all commands."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "a_file").write_text("text\n")
    (folder / "a_folder").mkdir()
    commands = [command for command, _ in bad_input.COMMANDS]
    found = scripts(folder, [shlex.split(command) for command in commands])
    left = {path.name for path in folder.iterdir() if path.suffix not in (".out", ".err")}
    return dict(zip(commands, found, strict=True)), left


@pytest.mark.parametrize(("command", "message"), bad_input.COMMANDS)
def test_a_wrong_command(answers, command, message):
    check_ended(answers[0][command], message)


def test_wrong_commands_leave_nothing_behind(answers):
    assert answers[1] == GIVEN


@pytest.mark.parametrize(("call", "message"), bad_input.CALLS)
def test_a_wrong_call(folder, call, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        eval(call, bad_input.namespace())
    check_said(str(error.value), message)
    assert {path.name for path in folder.iterdir()} == GIVEN


def test_the_page_lists_them():
    assert len(bad_input.SETTINGS + bad_input.COMMANDS + bad_input.CALLS) >= 100
    spec = importlib.util.spec_from_file_location("errors_page", ROOT / "docs" / "errors.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text() == script.page(), "run python docs/errors.py"


class TestRefused:
    """`train` after an error that shows only when the first state is made."""

    @staticmethod
    def claim(error, *names):
        @refused.leaves_nothing
        def train(config, workdir):
            os.makedirs(workdir, exist_ok=True)
            for name in names:
                (pathlib.Path(workdir) / name).parent.mkdir(exist_ok=True)
                (pathlib.Path(workdir) / name).write_text("{}")
            raise error

        return train

    @pytest.mark.parametrize("error", [ValueError("wrong"), TypeError("wrong")])
    def test_a_new_workdir_is_removed(self, tmp_path, error):
        with pytest.raises(type(error), match="wrong"):
            self.claim(error, "config.json", "events/x")({}, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_what_lay_there_stays(self, tmp_path):
        (tmp_path / "notes").write_text("mine")
        with pytest.raises(ValueError, match="wrong"):
            self.claim(ValueError("wrong"), "config.json")({}, workdir=tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["notes"]

    def test_a_checkpoint_stays(self, tmp_path):
        with pytest.raises(ValueError, match="wrong"):
            self.claim(ValueError("wrong"), "config.json", "last/12")({}, tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"config.json", "last"}

    def test_a_run_that_goes_on_stays(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(ValueError, match="wrong"):
            self.claim(ValueError("wrong"), "metrics.jsonl")({}, tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"config.json", "metrics.jsonl"}


# Anything that a config or a call may hold where a number or a name belongs.
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.floats(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
NOT_FINITE = st.sampled_from([float("nan"), float("inf"), -float("inf")])
QUICK = settings(max_examples=25, deadline=None)


def works_or_says_why(call):
    said = "works"
    try:
        call()
    except (ValueError, TypeError) as error:
        said = str(error)
    assert said
    assert "\n" not in said


@QUICK
@given(st.integers(max_value=-1) | st.integers(2**32) | st.floats() | st.booleans() | st.none())
def test_a_seed_has_32_bits(seed):
    message = r"^seed must be an integer in \[0, 4294967296\), got .*$"
    with pytest.raises(ValueError, match=message):
        validate.check_seed("seed", seed)
    with pytest.raises(ValueError, match=message):
        evaluator.attack_keys(seed, "pgd", np.arange(2))


def test_the_largest_seed_is_another_key():
    validate.check_seed("seed", 2**32 - 1)
    keys = [jax.random.key_data(jax.random.key(seed)) for seed in (0, 2**32 - 1)]
    assert not np.array_equal(*keys)


ATTACKS = ("pgd", "mi_fgsm", "apgd", "fab", "square", "cw", "ddn", "deepfool", "fmn")


def make_attack(name, **options):
    ball = (threat.L2 if name in ("cw", "ddn") else threat.Linf)(0.1)
    return attacks.make(name, ball, **options)


@QUICK
@given(ANYTHING, st.sampled_from(ATTACKS), st.data())
def test_any_option_of_an_attack_works_or_is_refused(value, name, data):
    option = data.draw(st.sampled_from(sorted(validate.declared(getattr(attacks, name)))))
    works_or_says_why(lambda: make_attack(name, **{option: value}))


FLOATS = [
    (name, option)
    for name in ATTACKS
    for option, wanted in validate.declared(getattr(attacks, name)).items()
    if wanted is float
]


@QUICK
@given(NOT_FINITE, st.sampled_from(FLOATS))
def test_a_number_of_an_attack_is_finite(value, where):
    name, option = where
    with pytest.raises(ValueError, match=rf"{option}\b.*got (nan|-?inf)"):
        make_attack(name, **{option: value})


@QUICK
@given(ANYTHING, st.sampled_from(["cnn", "resnet", "vgg", "mnist_net"]), st.data())
def test_any_field_of_a_network_works_or_is_refused(value, name, data):
    field = data.draw(st.sampled_from(["width", "dtype", "mean", "std", "depth", "bn_sets"]))
    works_or_says_why(lambda: models.make(name, 10, **{field: value}))


@QUICK
@given(ANYTHING, st.sampled_from(["steps", "step_size", "smoothing", "ramp_epochs", "attack_loss"]))
def test_any_option_of_a_defence_works_or_is_refused(value, option):
    net = models.make("cnn", 10)
    works_or_says_why(lambda: defenses.make("pgd_at", net, threat.Linf(0.1), **{option: value}))


@QUICK
@given(ANYTHING, st.sampled_from(["name", "lr", "momentum", "schedule", "clip_norm", "length"]))
def test_any_option_of_an_optimiser_works_or_is_refused(value, option):
    spec = {"name": "sgd", "lr": 0.1, option: value}
    works_or_says_why(lambda: optim.make(spec, total=10, per_epoch=5))


@QUICK
@given(ANYTHING)
def test_any_threat_or_smoothing_works_or_is_refused(value):
    works_or_says_why(lambda: threat.make("l2", value))
    works_or_says_why(lambda: threat.make("l2", 0.1, bounds=value))
    works_or_says_why(lambda: losses.one_hot(np.arange(2), 10, smoothing=value))
