"""Prints Markdown tables from records: files, or folders searched for *.json.

    python experiments/tables.py experiments/records/mnist
    python experiments/tables.py --per_class=pgd40 experiments/records/mnist
    python experiments/tables.py --protected experiments/records/cost_sensitive_fashion
    python experiments/tables.py --into=README.md      # renews the tables that README.md marks
    python experiments/tables.py --renew               # of README.md and of every page of docs
    python experiments/tables.py --check               # a number without a record is an error
    python experiments/tables.py --html=report.html experiments/records   # a page of all of them

A marked table lies between `<!-- KIND PATH -->` and `<!-- end -->`; KIND is table, protected
(metric I), benchmark, accelerators or soak (the counts of experiments/soak.py), and PATH is of its
records. KIND is also document or claims, with the name of one, or cross or top, with a folder of
the study's records: a whole cross-table or its first rows (study_pages.py).

One number within a line of text lies between `<!-- accuracy PATH; ROW; ATTACK -->` and
`<!-- end -->`; ROW is a record's NAME or NAME[PREDICTOR], or a run of the benchmark `fast`, whose
attacks are AutoAttack's versions `standard` and `fast`. A difference of two rows and its standard
error lie between `<!-- difference PATH; ROW; ROW; ATTACK -->` and `<!-- end -->`.

--check also looks at the percentages outside marks and code: each must be an accuracy of a record,
a number that a paper reports, or in the page's line `<!-- not accuracies: .2, 5 -->`, for
thresholds and ratios.
"""

import json
import pathlib
import re

import cli
import comparisons
import configs
import study_pages
from absl import flags
from accelerators import tables as accelerators
from benchmark import tables as benchmark
from papers import metric_i

from jaxdefense import files, registry, validate
from jaxdefense.evaluation import records, tables

PER_CLASS = flags.DEFINE_string("per_class", None, "Accuracy per class under this attack instead.")
PROTECTED = flags.DEFINE_bool("protected", False, "Metric I, of the protected classes, instead.")
INTO = flags.DEFINE_string("into", None, "A Markdown file whose marked tables are renewed.")
RENEW = flags.DEFINE_bool("renew", False, "Renew README.md and every page of docs.")
CHECK = flags.DEFINE_bool("check", False, "Fail where they show a number without a record.")
HTML = flags.DEFINE_string("html", None, "A file: a page of the records, sortable, with charts.")
TITLE = flags.DEFINE_string("title", "jaxdefense: what was measured", "Of the page.")

# Records with tables of their own.
_RENDERED = {"benchmark": benchmark.render, "accelerators": accelerators.render}

ROOT = pathlib.Path(__file__).parents[1]
_MARKED = re.compile(
    r"(<!-- (table|protected|benchmark|accelerators|soak|document|claims|cross|top) (\S+) -->\n)"
    r".*?(<!-- end -->)",
    re.DOTALL,
)
_NUMBER = re.compile(r"(<!-- accuracy ([^;]+); ([^;]+); (.+?) -->).*?(<!-- end -->)")
_DIFFERENCE = re.compile(r"(<!-- difference ([^;]+); ([^;]+); ([^;]+); (.+?) -->).*?(<!-- end -->)")
_OF_STUDY = {
    "document": study_pages.document_table,
    "claims": study_pages.claims,
    "cross": study_pages.cross_table,
    "top": study_pages.top_table,
}
# What --check looks at in prose: 84.34, 60.47 %, 5 %, .2 %; not 2302.08066, 8/255 or eps .15.
_PERCENT = re.compile(r"(?<![\w.\-/])(\d{1,3}\.\d\d(?![\w]|\.\d)|(?:\d{1,3}|\d{0,3}\.\d+)(?= ?%))")
_VERSIONS = re.compile(r"\b(?:Python|jax|torch) [\d.]+(?: to [\d.]+)?")
_OTHERS = re.compile(r"<!-- not accuracies: ([^>]*) -->")


def pages():
    """The paths of README.md and of every page of docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def shown(text):
    """The paths of records that a page's marks name, from the root of the checkout."""
    found = [path for _, kind, path, _ in _MARKED.findall(text) if kind not in _OF_STUDY]
    found += [match[1] for match in (*_NUMBER.findall(text), *_DIFFERENCE.findall(text))]
    # The pages of the study show all that it measures.
    study = any(kind in _OF_STUDY for _, kind, *_ in _MARKED.findall(text))
    return [*found, *([study_pages.STUDY] if study else [])]


def render(paths, per_class=None, protected=False):
    """The accuracy table of records, one per class or metric I, and where they come from."""
    found = records.load_all(paths)
    if not found:
        runs = [path for path in map(pathlib.Path, paths) if (path / "config.json").is_file()]
        todo = f"; run experiments/evaluate.py --workdir={runs[0]} first" if runs else ""
        raise ValueError(f"no records in {', '.join(map(str, paths))}{todo}")
    if per_class:
        table = tables.class_table(found, per_class)
    elif protected:
        table = metric_i.table(found)
    else:
        table = tables.accuracy_table(found)
    return f"{table}\n\n{tables.provenance(found)}\n"


def number(path, row, column):
    """The accuracy of one row under one attack, "76.00 ± 1.22 (3)", from the records of a path.

    Raises:
      ValueError: no such row or attack in the records.
    """
    found = records.load_all([path])
    rows = {}  # {row: one {attack: accuracy} per seed}
    for (name, predictor), same in tables.group_by_row(found).items():
        results = [record["results"][predictor] for record in same]
        seeds = [{attack: r["accuracy"] for attack, r in one.items()} for one in results]
        rows.setdefault(name, seeds)  # the first predictor is the deployed one
        rows[f"{name}[{predictor}]"] = seeds
    for record in found:
        rows |= {run: [versions] for run, versions in benchmark.accuracies(record).items()}
    registry.check_known(f"row of {path}", [row], rows)
    registry.check_known(f"attack on {row}", [column], rows[row][0])
    return tables.format_mean([seed[column] for seed in rows[row]])


def soak_table(record):
    """How many runs were disturbed, and how many were lost by it, from a record of soak.py."""
    lines = ["| disturbed by | tried | ended well | lost |", "|---|---:|---:|---:|"]
    names = {"kills": "a signal at a random moment", "damages": "a damaged file"}
    for kind, name in {**names, "disks": "a full disk"}.items():
        found = record["counts"][kind]
        lines.append(f"| {name} | {found['tried']} | {found['well']} | {found['lost']} |")
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in ("python", "jax"))
    made = f"{record['date'][:10]}, {versions}, {record['device']['host']}"
    return "\n".join([*lines, "", f"{made}; random seed {record['seed']}.", ""])


def renew(text):
    """`text` with each marked table and number rendered from the records that its mark names."""

    def block(match):
        begin, kind, path, end = match.groups()
        if kind in _OF_STUDY:
            return f"{begin}{_OF_STUDY[kind](path)}\n{end}"
        if kind in _RENDERED:
            record = records.load(ROOT / path)
            return f"{begin}{_RENDERED[kind](record)}\n\n{tables.provenance([record])}\n{end}"
        if kind == "soak":
            return begin + soak_table(json.loads((ROOT / path).read_text())) + end
        return begin + render([ROOT / path], protected=kind == "protected") + end

    def inline(match):
        begin, path, row, column, end = match.groups()
        return begin + number(ROOT / path, row, column) + end

    def apart(match):
        begin, path, first, second, column, end = match.groups()
        found = records.load_all([ROOT / path])
        (pair,) = comparisons.compare(found, first, second, [column])
        return f"{begin}{pair.difference:.2f} ± {pair.error:.2f}{end}"

    return _DIFFERENCE.sub(apart, _NUMBER.sub(inline, _MARKED.sub(block, text)))


def known_percentages():
    """Every accuracy of a committed record and every number that a paper reports, percent."""
    found = set(study_pages.reported_values())
    for record in records.load_all([ROOT / "experiments" / "records"]):
        for attacks in record.get("results", {}).values():
            found |= {result["accuracy"] for result in attacks.values()}
        found |= {entry["value"] for entry in record.get("reported", {}).values()}
    return found


def prose(text):
    """A page without its marked tables and numbers, code, links' targets and comments."""
    text = _DIFFERENCE.sub("", _NUMBER.sub("", _MARKED.sub("", text)))
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = _VERSIONS.sub("", text)
    return re.sub(r"`[^`]*`|<!--.*?-->|\]\([^)]*\)", "", text, flags=re.DOTALL)


def unknown_percentages(text, known):
    """The percentages in a page's prose that nothing measured or reports, in order.

    Args:
      text: of the page.
      known: of `known_percentages`.
    """
    others = {word.strip() for line in _OTHERS.findall(text) for word in line.split(",")}
    found = []
    for word in _PERCENT.findall(prose(text)):
        digits = len(word.partition(".")[2])
        if (
            word
            and word not in others
            and not any(round(value, digits) == float(word) for value in known)
        ):
            found.append(word)
    return found


def problems(text, known):
    """What a page shows that records do not say, a line each.

    Args:
      text: of the page.
      known: of `known_percentages`.
    """
    found = []
    for path in shown(text):
        # PATH is a mark that is explained; the study's records come row by row.
        if not path.isupper() and path != study_pages.STUDY and not (ROOT / path).exists():
            found.append(f"shows {path}, which is not there")
    if found:
        return found
    for old, new in zip(text.splitlines(), renew(text).splitlines(), strict=False):
        if old != new:
            pairs = enumerate(zip(old, new, strict=False))
            same = next((i for i, (a, b) in pairs if a != b), min(len(old), len(new)))
            place = slice(max(same - 30, 0), same + 50)
            found.append(f"is not renewed: {old[place]!r} is now {new[place]!r}")
            break
    if not found and renew(text) != text:
        found.append("is not renewed: its tables have grown or shrunk")
    words = unknown_percentages(text, known)
    return found + [f"{word} is in no record and no paper's report" for word in words]


def check():
    """Fails, naming page and number, where a page shows what no record says.

    Raises:
      ValueError: see `problems`.
    """
    known = known_percentages()
    found = [
        f"{path.relative_to(ROOT)} {problem}"
        for path in pages()
        for problem in problems(path.read_text(), known)
    ]
    if found:
        raise ValueError(f"{'; '.join(found)}; python experiments/tables.py --renew renews tables")
    print(f"{len(pages())} pages: marked numbers are their records', others are in some record")


def page(paths, title):
    """The HTML page of any records; the commands of older ones follow from their configs."""
    with cli.needed("plots"):
        from jaxdefense.evaluation import report
    found = records.load_all(paths)
    for record in found:
        if "command" not in record:
            record["command"] = configs.commands(
                record.get("config", {}),
                protocol=record.get("protocol", "configured"),
                checkpoint=record.get("training", {}).get("checkpoint", "best"),
            )
    return report.leaderboard(found, title=title)


def main(argv):
    for name, path in (("--html", HTML.value), ("--into", INTO.value)):
        if path is not None:
            validate.check_file(name, path)
    if HTML.value and INTO.value:
        raise ValueError("--html writes a page and --into renews a file: give one of them")
    if INTO.value and not pathlib.Path(INTO.value).is_file():
        raise ValueError(f"--into renews a file, and there is none at {INTO.value}")
    paths = argv[1:] or [ROOT / "experiments" / "records"]
    into = [pathlib.Path(INTO.value)] if INTO.value else []
    for path in pages() if RENEW.value else into:
        text = path.read_text()
        if (renewed := renew(text)) != text:
            files.write_text(path, renewed)
            print(f"renewed: {path}")
        elif INTO.value:
            print(f"as it was: {path} has {'its' if _MARKED.search(text) else 'no'} marked tables")
    if CHECK.value:
        check()
    if HTML.value:
        files.write_text(HTML.value, page(paths, TITLE.value))
        print(f"page: {HTML.value}")
    if not (INTO.value or RENEW.value or CHECK.value or HTML.value):
        print(render(paths, PER_CLASS.value, PROTECTED.value), end="")


if __name__ == "__main__":
    cli.run(main)
