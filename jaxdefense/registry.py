"""Names to modules: a file's name is its key in a config, and an unknown name lists the nearest."""

import difflib
import importlib
import pathlib
import re
from collections.abc import Iterable
from types import ModuleType
from typing import NoReturn

_LISTED = 60  # known names, at most, that an error lists


def raise_unknown(kind: str, name: object, known: Iterable[str]) -> NoReturn:
    """Raises the error for an unknown name.

    Args:
      kind: what is named, "model" say.
      name: what was asked for.
      known: the names that there are.

    Raises:
      ValueError: always; it says what was asked for, the nearest names and, where they are not
        too many for a line, all known ones.
    """
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
    hint = f"nearest: {', '.join(near)}; " if near else ""
    listed = ", ".join(known) if len(known) <= _LISTED else f"{len(known)} names"
    raise ValueError(f"unknown {kind} {name!r}; {hint}known: {listed}")


def check_known(kind: str, names: Iterable[object], known: Iterable[str]) -> None:
    """All names are known.

    Args:
      kind: what is named, "option of dataset" say.
      names: what was asked for.
      known: the names that there are.

    Raises:
      ValueError: as `raise_unknown`, for the first unknown name.
    """
    known = list(known)
    for name in names:
        if name not in known:
            raise_unknown(kind, name, known)


def names(package: ModuleType, *, needs: str = "make") -> list[str]:
    """The names of the files of `package` that define a function, sorted; nothing is imported.

    Files with a leading underscore do not count, whatever they define.

    Args:
      package: an imported package.
      needs: the function's name; it stands in the file as `def NAME(` at the top level.
    """
    defines = re.compile(rf"^def {needs}\(", re.MULTILINE)
    files = [path for folder in package.__path__ for path in pathlib.Path(folder).glob("[!_]*.py")]
    return sorted(path.stem for path in files if defines.search(path.read_text("utf-8")))


def load(package: ModuleType, name: str, kind: str, *, needs: str = "make") -> ModuleType:
    """The module `name` of `package`, the only one that is imported.

    Args:
      package: an imported package.
      name: one of `names(package, needs=needs)`.
      kind: what the package's modules are, for the error: "model".
      needs: the function that the module must define.

    Raises:
      ValueError: `name` is not one of the package's files that define `needs`.
    """
    check_known(kind, [name], names(package, needs=needs))
    return importlib.import_module(f"{package.__name__}.{name}")
