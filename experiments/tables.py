"""Prints Markdown tables from records: files, or folders searched for *.json.

    python experiments/tables.py experiments/records/mnist
    python experiments/tables.py --per_class=pgd40 experiments/records/mnist
    python experiments/tables.py --protected experiments/records/cost_sensitive_fashion
    python experiments/tables.py --into=README.md      # renews the tables that README.md marks
    python experiments/tables.py --html=report.html experiments/records   # a page of all of them

A marked table lies between `<!-- KIND PATH -->` and `<!-- end -->`; KIND is table, protected
(metric I) or benchmark, and PATH is of its records. One number within a line of text lies between
`<!-- accuracy PATH; ROW; ATTACK -->` and `<!-- end -->`; ROW is a record's NAME or NAME[PREDICTOR],
or a run of the benchmark `fast`, whose attacks are AutoAttack's versions `standard` and `fast`.
"""

import pathlib
import re

import cli
import configs
from absl import flags
from benchmark import tables as benchmark
from papers import metric_i

from jaxdefense import files, registry, validate
from jaxdefense.evaluation import records, tables

PER_CLASS = flags.DEFINE_string("per_class", None, "Accuracy per class under this attack instead.")
PROTECTED = flags.DEFINE_bool("protected", False, "Metric I, of the protected classes, instead.")
INTO = flags.DEFINE_string("into", None, "A Markdown file whose marked tables are renewed.")
HTML = flags.DEFINE_string("html", None, "A file: a page of the records, sortable, with charts.")
TITLE = flags.DEFINE_string("title", "jaxdefense: what was measured", "Of the page.")

ROOT = pathlib.Path(__file__).parents[1]
_MARKED = re.compile(r"(<!-- (table|protected|benchmark) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_NUMBER = re.compile(r"(<!-- accuracy ([^;]+); ([^;]+); (.+?) -->).*?(<!-- end -->)")


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


def renew(text):
    """`text` with each marked table and number rendered from the records that its mark names."""

    def block(match):
        begin, kind, path, end = match.groups()
        if kind == "benchmark":
            record = records.load(ROOT / path)
            return f"{begin}{benchmark.render(record)}\n\n{tables.provenance([record])}\n{end}"
        return begin + render([ROOT / path], protected=kind == "protected") + end

    def inline(match):
        begin, path, row, column, end = match.groups()
        return begin + number(ROOT / path, row, column) + end

    return _NUMBER.sub(inline, _MARKED.sub(block, text))


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
        if path:
            validate.check_file(name, path)
    if HTML.value and INTO.value:
        raise ValueError("--html writes a page and --into renews a file: give one of them")
    if INTO.value and not pathlib.Path(INTO.value).is_file():
        raise ValueError(f"--into renews a file, and there is none at {INTO.value}")
    paths = argv[1:] or [ROOT / "experiments" / "records"]
    if HTML.value:
        files.write_text(HTML.value, page(paths, TITLE.value))
        print(f"page: {HTML.value}")
        return
    if INTO.value:
        path = pathlib.Path(INTO.value)
        files.write_text(path, renew(path.read_text()))
    else:
        print(render(paths, PER_CLASS.value, PROTECTED.value), end="")


if __name__ == "__main__":
    cli.run(main)
