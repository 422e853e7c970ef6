"""What the scripts share: config flags with short names, and errors without a traceback."""

import contextlib
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence

import jax
from absl import app, flags, logging

from jaxdefense import extras, registry


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

    from jaxdefense.train.loop import Diverged, Interrupted

HERE = pathlib.Path(__file__).parent
CONFIGS = HERE / "configs"
# Beside the scripts in a checkout; where they are installed, in the current folder.
CACHE = (HERE.parent if (HERE.parent / "setup.cfg").exists() else pathlib.Path()) / ".cache" / "xla"


CONFIG_HELP = (
    "NAME:VARIANT, e.g. trades:mnist or trades:mnist_debug, or the path of a config file instead "
    f"of NAME. Names: {', '.join(configs.names())}. Values are changed by "
    "--config.train.length=5e and so on."
)


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
        if not pathlib.Path(name).exists():
            raise ValueError(f"no config file {name}; names: {', '.join(configs.names())}")
        return value
    if name not in configs.names():
        registry.raise_unknown("config", name, configs.names())
    configs.load(name, variant)  # an unknown variant is said here, without absl's traceback
    return f"{CONFIGS / name}.py{colon}{variant}"


def enable_cache() -> None:
    """Keeps compiled programs between processes, in the checkout's .cache."""
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_CACHE_DIR", str(CACHE)))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def spread_over_cores() -> None:
    """Makes up to eight of the CPU's cores a JAX device each, before JAX finds its devices.

    Attacks on a small network take 1.7 times longer on one device of two cores than on two devices:
    its element-wise operations run on one core. Verdicts are the same on any number.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    if "device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", min(cores, 8))


def run(main: Callable[[Sequence[str]], None], *, spread: bool = False) -> None:
    """absl's app.run; a ValueError is an answer to the user, not a traceback.

    Args:
      main: the script, a function of the words that are no flags.
      spread: over the CPU's cores; for scripts that evaluate and do not train.
    """

    def guarded(argv):
        enable_cache()
        if spread:
            spread_over_cores()
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # orbax logs every file that it writes
        try:
            main(argv)
        except (ValueError, Diverged, extras.MissingExtra) as error:
            sys.exit(f"error: {error}")
        except Interrupted as error:
            print(error, file=sys.stderr)
            sys.exit(143)

    try:
        argv = expand_config_flag(sys.argv)
    except ValueError as error:
        sys.exit(f"error: {error}")
    app.run(guarded, argv=argv)
