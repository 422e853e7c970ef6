"""Docstrings: their Args are the signature's, and their examples run and give what they say."""

import doctest
import importlib
import inspect
import pkgutil
import re

import pytest

# Each with its modules, if it is a package.
PACKAGES = (
    "jaxdefense.attacks",
    "jaxdefense.data",
    "jaxdefense.defenses",
    "jaxdefense.evaluation",
    "jaxdefense.extras",
    "jaxdefense.files",
    "jaxdefense.losses",
    "jaxdefense.mixing",
    "jaxdefense.models",
    "jaxdefense.registry",
    "jaxdefense.runs",
    "jaxdefense.threat",
    "jaxdefense.train",
    "jaxdefense.types",
)
# Whose functions need an Args section and an example; of the packages, those in __all__.
DOCUMENTED = (
    "jaxdefense.attacks",
    "jaxdefense.evaluation",
    "jaxdefense.evaluation.curves",
    "jaxdefense.losses",
    "jaxdefense.mixing",
    "jaxdefense.threat",
)
WITH_EXAMPLES = (
    "jaxdefense.attacks.Method",
    "jaxdefense.evaluation.Evaluator",
    "jaxdefense.threat.Linf",
    "jaxdefense.threat.L2",
    "jaxdefense.threat.L1",
    "jaxdefense.threat.Linf.project",
    "jaxdefense.threat.L2.project",
    "jaxdefense.threat.L1.project",
)


def modules(package):
    """The package and the modules in it."""
    root = importlib.import_module(package)
    inside = pkgutil.walk_packages(getattr(root, "__path__", ()), f"{package}.")
    return [root, *(importlib.import_module(module.name) for module in inside)]


def public_members(module):
    """(name, object) of the functions, classes and methods that a module defines."""
    for name, member in vars(module).items():
        if name.startswith("_") or getattr(member, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(member) or inspect.isclass(member):
            yield f"{module.__name__}.{name}", member
        if inspect.isclass(member):
            for key, value in vars(member).items():
                function = value.fget if isinstance(value, property) else value
                function = getattr(function, "__func__", function)
                own = getattr(function, "__qualname__", "") == f"{name}.{key}"
                if own and not key.startswith("_") and inspect.isfunction(function):
                    yield f"{module.__name__}.{name}.{key}", function


MEMBERS = {
    name: member
    for package in PACKAGES
    for module in modules(package)
    for name, member in public_members(module)
}


def functions(package):
    """{name: function} of a module's public functions, or of those in a package's __all__."""
    root = importlib.import_module(package)
    names = getattr(root, "__all__", vars(root))
    found = {name: getattr(root, name) for name in names if not name.startswith("_")}
    own = {
        name: value
        for name, value in found.items()
        if inspect.isfunction(value) and value.__module__.startswith(package)
    }
    return {f"{package}.{name}": value for name, value in own.items()}


NEEDED = {name: value for package in DOCUMENTED for name, value in functions(package).items()}
EXAMPLES = {name: doc for name, member in MEMBERS.items() if ">>>" in (doc := member.__doc__ or "")}


def documented_arguments(member):
    """The names in the Args section, None without one."""
    section = re.search(r"^Args:\n((?: .*\n|\n)*)", f"{inspect.getdoc(member)}\n", re.MULTILINE)
    return re.findall(r"^  (\S[^:\n]*):", section[1], re.MULTILINE) if section else None


def arguments(member):
    """The signature's names, *args and **kwargs with their stars."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = list(inspect.signature(member).parameters.values())
    if inspect.isfunction(member) and "." in member.__qualname__:
        parameters = [p for p in parameters if p.name not in ("self", "cls")]
    return [stars.get(p.kind, "") + p.name for p in parameters]


@pytest.mark.parametrize("name", MEMBERS)
def test_has_a_docstring_whose_arguments_are_the_signatures(name):
    member = MEMBERS[name]
    written = member.__doc__ or ""
    assert written
    assert not written.startswith(f"{member.__name__}("), "only the one that dataclasses make"
    listed = documented_arguments(member)
    assert listed is None or listed == arguments(member)


@pytest.mark.parametrize("name", NEEDED)
def test_all_arguments_of_the_public_functions_are_explained(name):
    assert (documented_arguments(NEEDED[name]) or []) == arguments(NEEDED[name])


@pytest.mark.parametrize("name", [*NEEDED, *WITH_EXAMPLES])
def test_has_an_example(name):
    module, _, path = name.partition("jaxdefense.")[2].partition(".")
    member = importlib.import_module(f"jaxdefense.{module}")
    for part in path.split("."):
        member = getattr(member, part)
    assert ">>>" in (member.__doc__ or "")


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs_as_it_stands(name, tfds_dir, monkeypatch):
    """With nothing defined before it, as a reader would paste it."""
    monkeypatch.setenv("TFDS_DATA_DIR", tfds_dir)
    example = doctest.DocTestParser().get_doctest(EXAMPLES[name], {}, name, None, None)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    report = []
    result = doctest.DocTestRunner(optionflags=flags).run(example, out=report.append)
    assert result.attempted or "+SKIP" in EXAMPLES[name]
    assert not result.failed, "".join(report)
