"""Which optional dependencies a package needs, said in one line where they are missing."""

import contextlib
from collections.abc import Iterator

# The modules of the extras that packages need; `data.prepare` says itself when digits' is missing.
MODULES = {
    "train": {
        "PIL",
        "array_record",
        "flax",
        "grain",
        "ml_collections",
        "orbax",
        "rich",
        "safetensors",
        "tensorboardX",
        "tensorflow_datasets",
    },
    "plots": {"PIL", "altair", "itables", "jinja2", "matplotlib", "vl_convert"},
    "torch": {"torch"},
}


class MissingExtra(ImportError):
    """A module that an extra brings is not installed."""


@contextlib.contextmanager
def required(extra: str, package: str) -> Iterator[None]:
    """Turns a failing import inside the block into an error that names the extra to install.

    Args:
      extra: one of `MODULES`; a failing import of another module is left as it is.
      package: what the block belongs to, e.g. "jaxdefense.data".

    Raises:
      MissingExtra: a module of the extra is not installed.

    >>> from jaxdefense import extras
    >>> with extras.required("plots", "my_plots"):
    ...     raise ModuleNotFoundError(name="matplotlib")
    Traceback (most recent call last):
    jaxdefense.extras.MissingExtra: my_plots needs matplotlib: pip install 'jaxdefense[plots]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in MODULES[extra]:
            raise
        way = f"pip install 'jaxdefense[{extra}]'"
        raise MissingExtra(f"{package} needs {missing}: {way}") from error
