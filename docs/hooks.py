"""The API reference: a page for each package, made of the sources when the site is built.

A page shows what the package's `__all__` names, then what its modules define beyond that. Sources
are read, not imported, and a new module has its entry without an edit here.
"""

import ast
import pathlib

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "jaxdefense"

# In the order of the floors; each is a package or a module.
PAGES = (
    "attacks",
    "threat",
    "losses",
    "mixing",
    "models",
    "evaluation",
    "defenses",
    "data",
    "runs",
    "train",
    "rewrite",
    "conv",
    "types",
    "registry",
    "validate",
    "checksums",
    "distributed",
    "extras",
    "files",
    "interrupts",
    "streams",
)


def _tree(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def exported(path: pathlib.Path) -> list[str]:
    """The names in a module's `__all__`; none without one."""
    for node in _tree(path).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def imported_from(path: pathlib.Path) -> dict[str, str]:
    """{name: the module that it is imported from} of a package's `from ... import name` lines."""
    nodes = [node for node in ast.walk(_tree(path)) if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: node.module or "" for node in nodes for alias in node.names}


def defined(path: pathlib.Path) -> list[str]:
    """The public functions, classes and constants that a module defines, in its order."""
    names = []
    for node in _tree(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    return [name for name in dict.fromkeys(names) if not name.startswith("_")]


def entry(name: str, members: list[str], *, heading: bool = True) -> str:
    """The directive that documents a module's docstring and these members."""
    shown = "" if heading else "      show_root_heading: false\n      show_root_toc_entry: false\n"
    listed = "".join(f"        - {member}\n" for member in members)
    chosen = f"      members:\n{listed}" if members else "      members: false\n"
    return f"::: {name}\n    options:\n{shown}{chosen}\n"


def page(name: str) -> str:
    """The page of jaxdefense.NAME."""
    dotted = f"jaxdefense.{name}"
    if not (PACKAGE / name).is_dir():
        names = defined(PACKAGE / f"{name}.py")
        return f"# {dotted}\n\n{entry(dotted, names, heading=False)}"
    top = PACKAGE / name / "__init__.py"
    names, sources = exported(top), imported_from(top)
    modules = sorted((PACKAGE / name).glob("[!_]*.py"))
    # A function of its module's name: the parser takes the module for it.
    hidden = [found for found in names if found in {path.stem for path in modules}]
    own = [found for found in names if found not in hidden]
    parts = [f"# {dotted}\n", entry(dotted, own, heading=False)]
    for path in modules:
        module = f"{dotted}.{path.stem}"
        shown = [found for found in names if sources.get(found) == module and found not in hidden]
        if more := [found for found in defined(path) if found not in shown]:
            parts.append(entry(module, more))
        if path.stem in hidden:
            parts.append(f"`from {dotted} import {path.stem}` gives the function.\n")
    for inner in sorted((PACKAGE / name).glob("[!_]*/__init__.py")):
        for path in (inner, *sorted(inner.parent.glob("[!_]*.py"))):
            stem = "" if path is inner else f".{path.stem}"
            parts.append(entry(f"{dotted}.{inner.parent.name}{stem}", defined(path)))
    return "\n".join(parts)


def index() -> str:
    """The list of all pages, each with the first line of its docstring."""
    lines = []
    for name in PAGES:
        folder = PACKAGE / name
        path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        first = (ast.get_docstring(_tree(path)) or "").partition("\n\n")[0].replace("\n", " ")
        lines.append(f"* [`jaxdefense.{name}`]({name}.md): {first}")
    return "# API reference\n\n" + "\n".join(lines) + "\n"


def on_config(config):
    """The pages' entries in the navigation, under "API reference"."""
    (section,) = [part for part in config.nav if "API reference" in part]
    section["API reference"] += [{f"jaxdefense.{name}": f"api/{name}.md"} for name in PAGES]
    return config


def on_files(files, config):
    """Adds the pages to the site's files."""
    for name, text in {"index": index(), **{name: page(name) for name in PAGES}}.items():
        files.append(File.generated(config, f"api/{name}.md", content=text))
    return files
