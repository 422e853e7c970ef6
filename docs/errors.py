"""Writes docs/errors.md: wrong inputs, and what is said of each.

python docs/errors.py
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))

import bad_input

from jaxdefense import files

PAGE = pathlib.Path(__file__).with_suffix(".md")
HEAD = """# What is said of a wrong input

A wrong value ends a script with one line, `error: ...`, before a network is compiled, and leaves
nothing behind: the corrected command just works. The exit code is 2 where a flag is wrong and 1
otherwise. In Python the line is the message of a `ValueError`. The lists of known names that end
some lines are left out below.

`python docs/errors.py` writes this page from `tests/bad_input.py`; `tests/test_bad_input.py` runs
every line of it.
"""


def _table(header: tuple[str, str], rows: tuple[tuple[str, str], ...]) -> str:
    def cell(text: str) -> str:
        return f"`{text}`".replace("|", "\\|")

    lines = [f"| {cell(given)} | {cell(said)} |" for given, said in rows]
    return "\n".join([f"| {header[0]} | {header[1]} |", "|---|---|", *lines])


def page() -> str:
    """The text of docs/errors.md."""
    settings = _table(("`--config.`", "what is said"), bad_input.SETTINGS)
    commands = _table(("`python experiments/`", "what is said"), bad_input.COMMANDS)
    calls = _table(("Python", "what is said"), bad_input.CALLS)
    return (
        f"{HEAD}\n## Values of a config\n\nOf `python experiments/train.py "
        f"--config=pgd_at:digits_debug --workdir=run --config.KEY=VALUE`.\n\n{settings}\n\n"
        f"## Commands\n\n`a_file` is a file, `a_folder` an empty folder.\n\n{commands}\n\n"
        f"## Calls\n\n`ball` is `threat.Linf(0.1)`; `images`, `labels` and `logits` are of 4 "
        f"images of 8 by 8 pixels and of 10 classes.\n\n{calls}\n"
    )


if __name__ == "__main__":
    files.write_text(PAGE, page())
