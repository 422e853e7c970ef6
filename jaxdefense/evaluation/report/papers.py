"""The paper of a defence, read from its docstring's Reference: it cannot drift from the code."""

import ast
import functools
import pathlib
import re
from typing import NamedTuple

import jaxdefense
from jaxdefense.evaluation.records import Record

_REFERENCE = re.compile(r"^Reference: (.*?)(?:\n\n|\n(?=\S)|\Z)", re.DOTALL | re.MULTILINE)
_ARXIV = re.compile(r"arXiv\s+(\d{4}\.\d{4,5})")
# Where the citation ends and remarks begin; initials ("X. W.") end nothing.
_SENTENCE = re.compile(r"(?:(?<=[\w)]{2})|(?<=\d))\. (?=[A-Z`])")


class Paper(NamedTuple):
    """What a defence is taken from.

    Attributes:
      authors: e.g. "Zhang et al.".
      citation: the whole of it.
      arxiv: its number there, "" without one.
    """

    authors: str
    citation: str
    arxiv: str


def find_paper(record: Record) -> Paper | None:
    """The paper of a record's defence; None for an unknown defence or one without a Reference.

    Args:
      record: whose config names the defence.
    """
    return _read(str(record.get("config", {}).get("defense", {}).get("name", "")))


@functools.cache
def _read(defense: str) -> Paper | None:
    # The file is read and not imported: a page needs no Flax.
    path = pathlib.Path(jaxdefense.__file__).parent / "defenses" / f"{defense}.py"
    if not defense.isidentifier() or not path.exists():
        return None
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == "make":
            text = ast.get_docstring(node) or ""
            found = _REFERENCE.search(text)
            return _parse(" ".join(found[1].split())) if found else None
    return None


def _parse(reference: str) -> Paper:
    citation = _SENTENCE.split(reference)[0].rstrip(".")
    found = _ARXIV.search(citation)
    before, several, _ = citation.partition(" et al.")
    authors = before + several if several else _leading_names(citation)
    return Paper(authors, citation, found[1] if found else "")


def _leading_names(citation: str) -> str:
    """The names before the title: short, and without small letters at their beginning."""
    names = []
    for part in citation.split(", "):
        if len(part.split()) > 3 or not part[:1].isupper():
            break
        names.append(part)
    return ", ".join(names)
