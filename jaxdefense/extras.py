"""Which optional dependencies a package needs, said in one line where they are missing."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def required(extra: str, package: str) -> Iterator[None]:
    """Turns a failing import inside the block into an error that names the extra to install.

    Args:
      extra: of setup.cfg, e.g. "train".
      package: what the block belongs to, e.g. "jaxdefense.data".

    Raises:
      ImportError: an imported distribution is not installed.

    >>> from jaxdefense import extras
    >>> with extras.required("train", "jaxdefense.data"):
    ...     import no_such_module
    Traceback (most recent call last):
    ImportError: jaxdefense.data needs no_such_module: pip install 'jaxdefense[train]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "jaxdefense"):
            raise
        raise ImportError(
            f"{package} needs {missing}: pip install 'jaxdefense[{extra}]'"
        ) from error
