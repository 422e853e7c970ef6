"""Names to things: a file's name is its registry key, and an unknown name lists the nearest."""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from types import ModuleType
from typing import NoReturn


def raise_unknown(kind: str, name: object, known: Iterable[str]) -> NoReturn:
    """Raises the ValueError for an unknown name: what was asked, the nearest, all known ones."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
    hint = f"nearest: {', '.join(near)}; " if near else ""
    raise ValueError(f"unknown {kind} {name!r}; {hint}known: {', '.join(known)}")


def names(package: ModuleType, *, needs: str = "make") -> list[str]:
    """The modules of `package` that define a function called `needs`, sorted."""
    found = []
    for info in pkgutil.iter_modules(package.__path__):
        if hasattr(importlib.import_module(f"{package.__name__}.{info.name}"), needs):
            found.append(info.name)
    return sorted(found)


def load(package: ModuleType, name: str, kind: str, *, needs: str = "make") -> ModuleType:
    """The module `name` of `package`.

    Raises:
      ValueError: `name` is not one of the package's files that define `needs`.
    """
    known = names(package, needs=needs)
    if name not in known:
        raise_unknown(kind, name, known)
    return importlib.import_module(f"{package.__name__}.{name}")
