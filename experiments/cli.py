"""What the scripts share: config flags with short names, and errors without a traceback."""

import os
import pathlib
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging
from ml_collections import config_flags

CONFIGS = pathlib.Path(__file__).parent / "configs"
CACHE = pathlib.Path(__file__).parents[1] / ".cache" / "xla"


def define_config() -> flags.FlagHolder:
    """The flag --config=NAME:VARIANT, e.g. --config=trades:mnist, or a path instead of NAME."""
    return config_flags.DEFINE_config_file(
        "config",
        None,
        f"NAME:VARIANT, e.g. trades:mnist or trades:mnist_debug. Names: {', '.join(catalogue())}; "
        "or the path of a config file. Values are changed by --config.train.length=5e and so on.",
    )


def catalogue() -> list[str]:
    """The configs' names."""
    return sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "recipes")


def expand(argv: Sequence[str]) -> list[str]:
    """argv with --config=NAME:VARIANT written as the path of the config file.

    Raises:
      ValueError: no config of that name; the nearest are named.
    """
    from jaxdefense import registry

    expanded = list(argv)
    for i, word in enumerate(expanded):
        if word in ("--config", "-config") and i + 1 < len(expanded):
            expanded[i + 1] = _path(expanded[i + 1], registry)
        elif word.startswith(("--config=", "-config=")):
            flag, _, value = word.partition("=")
            expanded[i] = f"{flag}={_path(value, registry)}"
    return expanded


def _path(value, registry):
    name, colon, variant = value.partition(":")
    if name.endswith(".py") or "/" in name:
        if not pathlib.Path(name).exists():
            raise ValueError(f"no config file {name}; names: {', '.join(catalogue())}")
        return value
    if name not in catalogue():
        registry.unknown("config", name, catalogue())
    return f"{CONFIGS / name}.py{colon}{variant}"


def enable_cache() -> None:
    """Keeps compiled programs between processes, in the checkout's .cache."""
    import jax

    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_CACHE_DIR", str(CACHE)))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def run(main: Callable[[Sequence[str]], None]) -> None:
    """absl's app.run; a ValueError is an answer to the user, not a traceback."""
    from jaxdefense.train.loop import Diverged, Interrupted

    def guarded(argv):
        enable_cache()
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # orbax tells of every file it writes
        try:
            main(argv)
        except (ValueError, Diverged) as error:
            sys.exit(f"error: {error}")
        except Interrupted as error:
            print(error, file=sys.stderr)
            sys.exit(143)

    try:
        argv = expand(sys.argv)
    except ValueError as error:
        sys.exit(f"error: {error}")
    app.run(guarded, argv=argv)
