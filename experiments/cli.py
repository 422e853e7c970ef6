"""What the scripts share: config flags with short names, and errors without a traceback."""

import contextlib
import os
import pathlib
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any


def _end_early(number, _):
    """Ctrl-C while Python imports, which takes seconds: one line; `run` takes over later."""
    os.write(2, b"\ninterrupted; nothing was written\n")
    os._exit(128 + number)


_OURS = pathlib.Path(sys.argv[0]).resolve().parent == pathlib.Path(__file__).resolve().parent
if _OURS and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end_early)

import jax  # noqa: E402
import unattended  # noqa: E402
from absl import app, flags, logging  # noqa: E402

from jaxdefense import distributed, extras, interrupts, registry  # noqa: E402


@contextlib.contextmanager
def needed(extra: str) -> Iterator[None]:
    """Ends the script with one line if an import in the block lacks what an extra brings.

    Args:
      extra: of `jaxdefense.extras`.
    """
    try:
        with extras.required(extra, "this script"):
            yield
    except extras.MissingExtra as error:
        sys.exit(f"error: {error}")


with needed("train"):
    import configs

    from jaxdefense.evaluation.memory import OutOfMemory
    from jaxdefense.train.loop import Diverged

HERE = pathlib.Path(__file__).parent
CONFIGS = HERE / "configs"
# Beside the scripts in a checkout; where they are installed, in the current folder.
CACHE = (HERE.parent if (HERE.parent / "setup.cfg").exists() else pathlib.Path()) / ".cache" / "xla"


CONFIG_HELP = (
    "NAME:VARIANT, e.g. trades:mnist or trades:mnist_debug, or the path of a config file instead "
    f"of NAME. Names: {', '.join(configs.names())}. Values are changed by "
    "--config.train.length=5e and so on."
)
DISTRIBUTED_HELP = (
    "This is one of several processes: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
    "JAX_PROCESS_ID say which, or SLURM, Open MPI or a TPU pod does (docs/devices.md)."
)
PROGRESS_HELP = "Show a progress bar; by default only on a terminal."


def shows_progress(asked: bool | None) -> bool:
    """Whether a script shows its bar: as asked, or else where stderr is a terminal.

    In a file, each renewal of a bar is a line of its own and hides what else is written.

    Args:
      asked: by --progress or --noprogress; None where neither is given.
    """
    return sys.stderr.isatty() if asked is None else asked


def quiet_logs() -> None:
    """No lines of information unless --verbosity asks: orbax logs every file that it writes."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)


def expand_config_flag(argv: Sequence[str]) -> list[str]:
    """argv with --config=NAME:VARIANT written as the path of the config file.

    Raises:
      ValueError: no config of that name; the nearest are named.
    """
    expanded = list(argv)
    for i, word in enumerate(expanded):
        if word in ("--config", "-config") and i + 1 < len(expanded):
            expanded[i + 1] = _config_path(expanded[i + 1])
        elif word.startswith(("--config=", "-config=")):
            flag, _, value = word.partition("=")
            expanded[i] = f"{flag}={_config_path(value)}"
    return expanded


def _config_path(value: str) -> str:
    """The path of the config file that NAME:VARIANT means, with its variant."""
    name, colon, variant = value.partition(":")
    if name.endswith(".py") or "/" in name:
        if not (name.endswith(".py") and pathlib.Path(name).is_file()):
            raise ValueError(f"no config file {name}; names: {', '.join(configs.names())}")
        return value
    if name not in configs.names():
        registry.raise_unknown("config", name, configs.names())
    configs.load(name, variant)  # an unknown variant is said here, without absl's traceback
    return f"{CONFIGS / name}.py{colon}{variant}"


def enable_cache() -> None:
    """Keeps compiled programs between processes: where JAX is told to, or in .cache."""
    if not jax.config.jax_compilation_cache_dir:  # JAX_COMPILATION_CACHE_DIR
        jax.config.update("jax_compilation_cache_dir", str(CACHE))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


_LEAST_PER_DEVICE = 32  # examples of a training batch


def spread_over_cores(batch: int | None = None) -> None:
    """Makes up to eight of the CPU's cores a JAX device each, before JAX finds its devices.

    Attacks on a small network take 1.7 times longer on one device of two cores than on two devices:
    its element-wise operations run on one core. Verdicts are the same on any number. A training
    batch is split evenly, and no device gets fewer than 32 examples: BatchNorm's statistics are of
    each device's own. Who sets the number by XLA_FLAGS or JAX_NUM_CPU_DEVICES has that one.

    Args:
      batch: size of a training batch; None for what has none.
    """
    asked = "device_count" in os.environ.get("XLA_FLAGS", "")
    if not asked and "JAX_NUM_CPU_DEVICES" not in os.environ:
        cores = min(len(unattended.available_cores()), 8)
        jax.config.update("jax_num_cpu_devices", _devices_for(cores, batch))


def _devices_for(cores: int, batch: int | None) -> int:
    """The most devices, one a core at most, that share a batch evenly and not too thinly."""
    if batch is None:
        return cores
    fitting = [n for n in range(1, cores + 1) if batch % n == 0 and batch // n >= _LEAST_PER_DEVICE]
    return max(fitting, default=1)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """`unattended.parse_flags` of a script whose --config may be wrong too.

    Args:
      argv: as there.
    """
    try:
        _check_overrides(argv)
        return unattended.parse_flags(argv)
    except ValueError as error:
        unattended.refuse_flags(unattended.explain(error))
    except Exception as error:  # of a config file of the user's own, or of a key that it has not
        told = f"{type(error).__name__}: {unattended.one_line(error)}"
        unattended.refuse_flags(f"--config: {told}")


def _check_overrides(argv: Sequence[str]) -> None:
    """Each --config.SECTION.KEY is a key of the config that --config names.

    Raises:
      ValueError: one that is not; the nearest are named.
    """
    words = [word.lstrip("-").split("=", 1) for word in argv[1:] if word.startswith("-")]
    chosen = [word[1] for word in words if word[0] == "config" and len(word) == 2]
    ours = rf"{re.escape(str(CONFIGS))}/(\w+)\.py:?(\w*)"
    if not chosen or not (match := re.fullmatch(ours, chosen[-1])):
        return  # a config file of the user's own is asked by ml_collections itself
    config = configs.load(*match.groups())
    for word in words:
        first, *path = word[0].split(".")
        if first != "config" or not path:
            continue
        section, done = config, "config"
        for key in path:
            if not hasattr(section, "keys"):
                raise ValueError(f"--{word[0]}: {done} is a value, {section!r}, without keys")
            registry.check_known(f"key of {done}", [key], list(section))
            section, done = section[key], f"{done}.{key}"
        if hasattr(section, "keys"):
            raise ValueError(f"--{word[0]} is a section: set its keys, {', '.join(section)}")


def _hide_closed_loops() -> None:
    """Leaves out what arrays that were still being read say when one of them could not be: each
    reports to an event loop that Orbax has closed, with a traceback."""
    before = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


# How the script ends at a signal; `run` sets it, and a script may change what it says.
ending = interrupts.Ending()


def run(
    main: Callable[[Sequence[str]], None],
    *,
    spread: bool = False,
    batch: Callable[[], Any] | None = None,
    saves: bool = False,
) -> None:
    """absl's app.run; a ValueError is an answer to the user, not a traceback or a page of usage.

    What is wrong with the command line ends with exit code 2, a signal with 128 and its number,
    anything else with 1.

    Args:
      main: the script, a function of the words that are no flags.
      spread: over the CPU's cores.
      batch: for a script that trains: the size of a batch, once flags are parsed.
      saves: whether it saves after a signal, for which it gets the time that it takes.
    """
    if saves:
        ending.grace = None

    def guarded(argv):
        enable_cache()
        _hide_closed_loops()
        among_others = "distributed" in flags.FLAGS and flags.FLAGS["distributed"].value
        if spread and not among_others:  # several processes may share a machine
            size = batch() if batch else None
            spread_over_cores(size if isinstance(size, int) else None)
        quiet_logs()
        try:
            with interrupts.one_line_endings(ending):
                if among_others:
                    distributed.initialize()
                main(argv)
        except (ValueError, Diverged, OutOfMemory, extras.MissingExtra) as error:
            print(f"error: {error}", file=sys.stderr)
            distributed.leave(1)
        except SystemExit as error:  # after a signal, or an error of the disk
            if not distributed.several() or not error.code:
                raise
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
            distributed.leave(error.code if isinstance(error.code, int) else 1)

    try:
        argv = expand_config_flag(sys.argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    app.run(guarded, argv=argv, flags_parser=parse_flags)
