"""Markdown tables from records: mean ± std (seeds), reported beside measured.

Every accuracy stands beside its threat and its number of test images, and only records that
differ in nothing but the seed are averaged (`group_by_row`).
"""

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxdefense.evaluation.records import Record

Cell = list[float]

_NORMS = {"linf": "L∞", "l2": "L2", "l1": "L1"}
MIN_PER_CLASS = 30  # images of a class, below which nothing is said of it alone
_TAG = re.compile(r"<(?=[a-zA-Z/!?])")  # what begins an element, a comment or their end
_PLACES = ("workdir", "file")  # the config keys that say where another run lies


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns but the first are right-aligned."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(_escape, line)) + " |" for line in lines)


def _escape(text: str) -> str:
    """A cell's text, which makes no HTML, no further cell and no further line of Markdown."""
    return " ".join(_TAG.sub("&lt;", text.replace("|", "\\|")).splitlines())


def format_mean(values: Cell) -> str:
    """ "97.31", or "97.31 ± 0.12 (3)": mean, sample standard deviation, number of seeds."""
    if not values:
        return "–"
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.2f}"
    return f"{mean:.2f} ± {statistics.stdev(values):.2f} ({len(values)})"


def record_threat(record: Record) -> Mapping[str, Any]:
    """What a record's attacks were allowed: its own "threat" if it has one, else its config's.

    Returns:
      {"norm", "eps"} and perhaps a "note" for the reader; {} for a record without a threat.
    """
    return record.get("threat") or record.get("config", {}).get("threat") or {}


def format_eps(eps: float) -> str:
    """Three significant digits where they are exact, else k/255 where that is, else the digits."""
    digits, steps = f"{eps:.3g}", 255 * eps
    exact = math.isclose(float(digits), eps, rel_tol=1e-6)
    if not exact and math.isclose(steps, round(steps), rel_tol=1e-6):
        return f"{round(steps)}/255"
    return digits


def format_threat(record: Record) -> str:
    """ "L∞ 8/255", with the threat's note in brackets; "–" for a record without a threat."""
    found = record_threat(record)
    if not found:
        return "–"
    text = f"{_NORMS.get(found['norm'], found['norm'])} {format_eps(found['eps'])}"
    return f"{text} ({found['note']})" if "note" in found else text


def format_count(results: Iterable[Mapping[str, Any]]) -> str:
    """The number of images of results per attack: "500", or "200 to 500"; "–" if none says so."""
    counts = sorted({result["n"] for result in results if "n" in result})
    return " to ".join(map(str, dict.fromkeys((counts[0], counts[-1])))) if counts else "–"


def _conditions(same: Sequence[Record], predictor: str) -> list[str]:
    """The cells "threat" and "n" of a row."""
    results = (result for record in same for result in record["results"][predictor].values())
    return [format_threat(same[0]), format_count(results)]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested plain values as {dotted key: value}, without the paths of other runs."""
    if isinstance(value, list | tuple):
        if not any(isinstance(inner, Mapping | list | tuple) for inner in value):
            return {prefix: list(value)}
        value = dict(enumerate(value))
    if not isinstance(value, Mapping) or (prefix and not value):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if key not in _PLACES:
            found |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return found


def _settings(record: Record, own_threat: bool) -> dict[str, Any]:
    """The config without its seed; on demand also the threat of the measurement."""
    config = {key: value for key, value in record.get("config", {}).items() if key != "seed"}
    return _flat(config) | (_flat(record_threat(record), "record.threat") if own_threat else {})


def _measurement(record: Record, predictor: str) -> dict[str, Any]:
    """How a predictor was measured, as far as the record says."""
    known: dict[str, Any] = {k: record[k] for k in ("protocol", "dataset") if k in record}
    if "checkpoint" in record.get("training", {}):
        known["checkpoint"] = record["training"]["checkpoint"]
    found = _flat(known, "record") if known else {}
    for column, text in record.get("attacks", {}).items():
        found[f"attack {column}"] = re.sub(r" at 0x[0-9a-f]+", "", text)
    for column, result in record["results"][predictor].items():
        if "n" in result:
            found[f"n of {column}"] = result["n"]
    return found


def differences(one: Record, other: Record, predictor: str) -> dict[str, tuple[str, str]]:
    """{key: (its value in `one`, in `other`)} of what keeps two records out of one row.

    The keys of the config are as they are; those of the measurement begin with "record.",
    "attack " or "n of "; see `group_by_row`.

    Args:
      one: a record that has the predictor.
      other: likewise.
      predictor: whose measurements are compared.
    """
    found = {}
    own_threat = "threat" in one or "threat" in other
    first, second = (_settings(record, own_threat) for record in (one, other))
    for key in dict.fromkeys((*first, *second)):
        if (key in first) != (key in second) or first.get(key) != second.get(key):
            texts = [repr(had[key]) if key in had else "absent" for had in (first, second)]
            found[key] = (texts[0], texts[1])
    first, second = _measurement(one, predictor), _measurement(other, predictor)
    for key in first:
        if key in second and first[key] != second[key]:
            found[key] = (repr(first[key]), repr(second[key]))
    return found


def _check_same_row(one: Record, other: Record, predictor: str) -> None:
    """Refuses two records that may not be averaged; see `group_by_row`."""
    keys: dict[tuple[str, str], list[str]] = {}
    for key, values in differences(one, other, predictor).items():
        keys.setdefault(values, []).append(key)
    if not keys:
        return
    seeds = [f" (seed {one['seed']})", f" (seed {other['seed']})"]
    told = []
    for (first, second), named in keys.items():
        told.append(f"{', '.join(named)} is {first}{seeds[0]} and {second}{seeds[1]}")
        seeds = ["", ""]  # said once
    label = row_label(one, predictor)
    raise ValueError(f"records of {label} do not belong together: {'; '.join(told)}")


def row_label(record: Record, predictor: str) -> str:
    """The record's name, with the predictor in brackets unless it is the first, deployed one."""
    first = next(iter(record["results"]))
    return record["name"] if predictor == first else f"{record['name']} [{predictor}]"


def group_by_row(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """{(record name, predictor): records over seeds}, in order of appearance.

    Records of one row differ in their seed and in what the seed decides. Compared are the config
    (all but its seed), the record's own "threat", "protocol", "dataset" and checkpoint, each
    attack's description in "attacks", and each attack's number of images. A config's key that one
    record lacks is a difference; of the rest, which older records may lack, only what both say is
    compared.

    Not compared is the path of another run, `workdir`, such as the teacher's in a config: it is
    where a thing lies, not what it is, and may hold the seed or the machine's folders. Two
    different teachers are therefore told apart only by what else the config says of them.

    Args:
      records: of any names, seeds and order.

    Raises:
      ValueError: two records of the same name that differ in more than their seed (the keys and
        both values are named), or that have the same seed.
    """
    rows: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        for predictor in record["results"]:
            same = rows.setdefault((record["name"], predictor), [])
            for other in same:
                _check_same_row(other, record, predictor)
            if record["seed"] in [other["seed"] for other in same]:
                raise ValueError(f"two records of {record['name']} with seed {record['seed']}")
            same.append(record)
    return rows


def attack_columns(records: Iterable[Record]) -> list[str]:
    """The attacks that any record holds, in order of appearance."""
    seen: dict[str, None] = {}
    for record in records:
        for attacks in record["results"].values():
            seen |= dict.fromkeys(attacks)
    return list(seen)


def _measured(records: Iterable[Record], predictor: str, column: str) -> Cell:
    found = [record["results"][predictor].get(column) for record in records]
    return [result["accuracy"] for result in found if result is not None]


def _reported(record: Record, column: str) -> str:
    """A paper's number with its status, e.g. "92.81 (FOUND)"; nothing unless the record has one."""
    entry: Mapping[str, Any] | None = record.get("reported", {}).get(column)
    return f"{entry['value']:.2f} ({entry['status']})" if entry else ""


def accuracy_table(records: Sequence[Record]) -> str:
    """A row per record name and predictor: threat, images, then a column per attack, percent.

    A cell is the measured mean ± std (seeds), behind it the reported number where one is known.
    """
    names = attack_columns(records)
    rows = []
    for (_, predictor), same in group_by_row(records).items():
        cells = _conditions(same, predictor)
        for column in names:
            reported = _reported(same[0], column)
            cell = format_mean(_measured(same, predictor, column))
            cells.append(f"{cell}; reported {reported}" if reported else cell)
        rows.append([row_label(same[0], predictor), *cells])
    return markdown(["accuracy, %", "threat", "n", *names], rows)


def class_table(records: Sequence[Record], column: str) -> str:
    """A row per record name and predictor: threat, images of all classes, then a column per class.

    Args:
      records: see `group_by_row`.
      column: the attack; the cells are accuracies in percent.
    """
    rows, classes = [], 0
    for (name, predictor), same in group_by_row(records).items():
        found = [r["results"][predictor][column] for r in same if column in r["results"][predictor]]
        if not found:
            continue
        lists = [result["per_class"] for result in found]
        classes = max(classes, len(lists[0]))
        cells = [[v for v in values if v is not None] for values in zip(*lists, strict=True)]
        told = [format_threat(same[0]), format_count(found)]
        rows.append([f"{name} [{predictor}]", *told, *map(format_mean, cells)])
    return markdown([f"{column}, %", "threat", "n", *map(str, range(classes))], rows)


def class_accuracies(result: Mapping[str, Any]) -> dict[int, float]:
    """{class: accuracy in percent} of the classes that have enough images to say something.

    Enough are `MIN_PER_CLASS`. Records before "per_class_n" do not count the images of a class:
    there all classes have enough where they have so many in the mean, or none has.

    Args:
      result: of one predictor under one attack.

    >>> from jaxdefense.evaluation import tables
    >>> result = {"per_class": [90.0, 0.0], "per_class_n": [40, 6], "n": 46}
    >>> tables.class_accuracies(result)
    {0: 90.0}
    """
    found = {
        k: v
        for k, v in enumerate(result.get("per_class", ()))
        if v is not None and math.isfinite(v)
    }
    mean = result.get("n", 0) / max(len(found), 1)
    counts = result.get("per_class_n", [mean] * (max(found, default=-1) + 1))
    return {k: v for k, v in found.items() if counts[k] >= MIN_PER_CLASS}


def is_robustness(column: str) -> bool:
    """Whether a column is an attack whose accuracy may be called robust.

    Not so clean accuracy, an attack whose name says that it is invalid, and one that is crafted
    without the defence ("not white-box").

    Args:
      column: of a record's results.
    """
    return column != "clean" and not any(word in column for word in ("invalid", "not white-box"))


def hardest_attack(accuracies: Mapping[str, float]) -> str | None:
    """The attack with the lowest accuracy; None where no attack was measured.

    Args:
      accuracies: {column: percent}; what is not finite is no measurement.

    >>> from jaxdefense.evaluation import tables
    >>> tables.hardest_attack({"clean": 9.0, "fgsm": 60.0, "pgd20": 40.0, "square": 55.0})
    'pgd20'
    """
    attacks = [c for c, value in accuracies.items() if is_robustness(c) and math.isfinite(value)]
    return min(attacks, key=accuracies.__getitem__, default=None)


def tier_table(record: Record, predictor: str) -> str:
    """A row per tier of an audit: threat, images, accuracy, and the class that suffers most.

    The class is a dash where no class has `MIN_PER_CLASS` images.
    """
    rows = []
    for name, found in record["results"][predictor].items():
        classes = class_accuracies(found)
        worst = min(classes, key=classes.__getitem__, default=None)
        label = "worst case per example, T0 left out" if name == "worst" else name
        told = [format_threat(record), format_count([found])]
        said = "–" if worst is None else f"{classes[worst]:.2f} (class {worst})"
        rows.append([label, *told, f"{found['accuracy']:.2f}", said])
    return markdown([f"{predictor}, accuracy, %", "threat", "n", "all", "worst class"], rows)


def check_table(record: Record, predictor: str) -> str:
    """A row per check of an audit: its answer and what that rests on."""
    checks = record["audit"][predictor]["checks"]
    rows = [[c["name"], "pass" if c["passed"] else "FAIL", c["evidence"]] for c in checks]
    return markdown(["check", "answer", "evidence"], rows)


def provenance(records: Sequence[Record]) -> str:
    """Where the numbers come from: devices, versions, revisions, dates, seeds.

    Args:
      records: one or more; what a record does not say is a dash.
    """

    def distinct(read):
        return ", ".join(dict.fromkeys(read(record) for record in records))

    def device(record):
        told = record.get("device")
        return f"{told['count']} x {told['kind']} ({told['host']})" if told else "–"

    def versions(record):
        told = record.get("versions")
        return f"jax {told['jax']} on Python {told['python']}" if told else "versions –"

    dates = sorted(record["date"][:10] for record in records if "date" in record) or ["–"]
    seeds = ", ".join(map(str, sorted({r["seed"] for r in records if "seed" in r}))) or "–"
    return _escape(
        f"{len(records)} records; {distinct(device)}; {distinct(versions)}; "
        f"git {distinct(lambda r: r.get('git', '–'))}; "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}; seeds {seeds}."
    )
