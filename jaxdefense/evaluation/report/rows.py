"""The rows of a leaderboard: records joined over seeds and, where their configs agree, protocols.

Records that may not stand in one row (another config, threat or checkpoint, the same seed twice)
make rows of their own, so that any records make a page.
"""

import dataclasses
import functools
import json
import math
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxdefense.evaluation import tables
from jaxdefense.evaluation.records import Record
from jaxdefense.evaluation.report import papers

Result = Mapping[str, Any]

AUTOATTACK, AA_FAST, AUDIT = "autoattack", "aa-fast", "audit worst case"
_ORDER = ("configured", "autoattack", "audit")  # the protocols as a reader meets them

# How much a row's lowest accuracy says.
STRONG, AUDITED, WEAK = "AutoAttack", "audit", "weaker attacks alone"


@dataclasses.dataclass(frozen=True)
class Number:
    """An accuracy over seeds.

    Attributes:
      values: in percent, one for each seed.
      images: how many each is of, as text.
      reported: the paper's number with its status, "" without one.
    """

    values: tuple[float, ...]
    images: str = "–"
    reported: str = ""

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.values)

    @property
    def text(self) -> str:
        """Mean ± standard deviation (seeds)."""
        return tables.format_mean(list(self.values))

    @property
    def spread(self) -> str:
        """What follows the mean in `text`."""
        return self.text.partition(" ")[2]


class Line(NamedTuple):
    """One attack of one protocol.

    Attributes:
      protocol: its name.
      attack: its name.
      number: over seeds.
      classes: {class: mean accuracy}, of classes with enough images.
      how: how it was built, "" where no record says.
    """

    protocol: str
    attack: str
    number: Number
    classes: dict[int, float]
    how: str


@dataclasses.dataclass(eq=False)
class Row:
    """One predictor of one configuration, as far as it was measured.

    Attributes:
      name: the records'.
      predictor: which of their predictors.
      records: over seeds and protocols.
      main: whether it is the deployed predictor, measured on more than one class.
      apart: what tells it from other rows of its name and predictor, "" where there are none.
    """

    name: str
    predictor: str
    records: list[Record] = dataclasses.field(default_factory=list)
    main: bool = True
    apart: str = ""

    @property
    def first(self) -> Record:
        """The record that speaks for what all agree in."""
        return self.records[0]

    @property
    def config(self) -> Mapping[str, Any]:
        """The config of the first."""
        return self.first.get("config", {})

    @property
    def label(self) -> str:
        """The name, with the predictor unless it is the deployed one, and what sets it apart."""
        label = tables.row_label(self.first, self.predictor)
        return f"{label} ({self.apart})" if self.apart else label

    @property
    def paper(self) -> papers.Paper | None:
        """Of the defence."""
        return papers.find_paper(self.first)

    @property
    def network(self) -> str:
        """The network's name and sizes, e.g. "resnet, depth 18, width 64"."""
        model = dict(self.config.get("model", {}))
        sizes = [f"{key} {v:g}" for key, v in model.items() if isinstance(v, int | float)]
        return ", ".join([str(model.get("name", "–")), *sizes])

    @property
    def dataset(self) -> str:
        """The data set's name."""
        return str(self.config.get("dataset", {}).get("name", "–"))

    @property
    def threat(self) -> str:
        """Norm and eps of the measurement."""
        return tables.format_threat(self.first)

    @property
    def by_protocol(self) -> dict[str, list[Record]]:
        """The records of each protocol."""
        found: dict[str, list[Record]] = {}
        for record in self.records:
            found.setdefault(_protocol(record), []).append(record)
        known = [p for p in _ORDER if p in found]
        return {p: found[p] for p in [*known, *(p for p in found if p not in _ORDER)]}

    @property
    def seeds(self) -> list[Any]:
        """The seeds of all records."""
        return sorted({_seed(record) for record in self.records}, key=str)

    @functools.cached_property
    def results(self) -> dict[str, list[Result]]:
        """{column: results over seeds}; of an audit, clean and the worst case alone."""
        found: dict[str, list[Result]] = {}
        for protocol, same in self.by_protocol.items():
            measured = [record["results"][self.predictor] for record in same]
            for column in tables.attack_columns({"results": {"": m}} for m in measured):
                name = column
                if protocol == "audit" and column != "clean":
                    if column != "worst":
                        continue
                    name = AUDIT
                results = [m[column] for m in measured if column in m]
                results = [r for r in results if _is_measured(r)]
                # Two protocols may measure clean accuracy: the one with more images speaks.
                if results and _images(results) > _images(found.get(name, [])):
                    found[name] = results
        return found

    @functools.cached_property
    def numbers(self) -> dict[str, Number]:
        """{column: its number}."""
        return {column: self._number(column, found) for column, found in self.results.items()}

    @property
    def only_reported(self) -> dict[str, str]:
        """{column: the paper's number} of what was not measured here."""
        return {c: text for c, text in self._reported.items() if c not in self.results}

    @functools.cached_property
    def hardest(self) -> str | None:
        """The attack with the lowest mean accuracy."""
        return tables.hardest_attack({name: number.mean for name, number in self.numbers.items()})

    @property
    def strength(self) -> str:
        """How much its lowest accuracy says."""
        if AUTOATTACK in self.numbers:
            return STRONG
        return AUDITED if AUDIT in self.numbers else WEAK

    @property
    def classes(self) -> dict[int, float]:
        """{class: accuracy under the hardest attack}, of classes with enough images."""
        return self.class_means(self.hardest) if self.hardest else {}

    def lines(self) -> list[Line]:
        """All that was measured, an audit's tiers too, in the protocols' order."""
        found = []
        for protocol, same in self.by_protocol.items():
            measured = [record["results"][self.predictor] for record in same]
            built: dict[str, str] = {}
            for record in same:
                built |= record.get("attacks", {})
                built |= record.get("audit", {}).get(self.predictor, {}).get("attacks", {})
            for column in tables.attack_columns({"results": {"": m}} for m in measured):
                results = [m[column] for m in measured if _is_measured(m.get(column, {}))]
                number = self._number(column, results)
                if number.values:
                    how = built.get(column, "")
                    found.append(Line(protocol, column, number, _class_means(results), how))
        return found

    def _number(self, column: str, results: Sequence[Result]) -> Number:
        known = [result for result in results if _is_measured(result)]
        values = tuple(result["accuracy"] for result in known)
        return Number(values, tables.format_count(known), self._reported.get(column, ""))

    @property
    def _reported(self) -> dict[str, str]:
        """{column: the paper's number with its status}."""
        return {
            column: f"{entry['value']:.2f} {entry['status']}"
            for column, entry in self.first.get("reported", {}).items()
        }

    def class_means(self, column: str) -> dict[int, float]:
        """{class: mean accuracy over seeds}, of classes with enough images.

        Args:
          column: one of `results`.
        """
        return _class_means(self.results[column])

    @property
    def worst_class(self) -> tuple[int, float] | None:
        """(class, its accuracy) under the hardest attack."""
        classes = self.classes
        return min(classes.items(), key=lambda item: item[1], default=None)

    @property
    def images(self) -> str:
        """Numbers of images, over all attacks."""
        return tables.format_count(r for results in self.results.values() for r in results)

    @property
    def most_images(self) -> int:
        """The largest of them; -1 where no record says."""
        return max((_images(results) for results in self.results.values()), default=-1)

    @property
    def config_text(self) -> str:
        """The config as JSON, without the folders of the machine that it ran on."""
        return json.dumps(_without_folders(self.config), indent=1)

    @property
    def minutes(self) -> float | None:
        """Of training, mean over seeds."""
        found = {_seed(r): r.get("training", {}).get("seconds") for r in self.records}
        known = [seconds for seconds in found.values() if seconds]
        return statistics.fmean(known) / 60 if known else None

    @property
    def parameters(self) -> int | None:
        """How many numbers the predictor computes with."""
        known = (record.get("parameters", {}).get(self.predictor) for record in self.records)
        return next((count for count in known if count), None)

    @property
    def audit(self) -> Mapping[str, Any] | None:
        """The audit's report of this predictor, of the first audited seed."""
        told = (record.get("audit", {}).get(self.predictor) for record in self.records)
        return next((report for report in told if report), None)

    @property
    def failed_checks(self) -> list[Mapping[str, Any]]:
        """What the audit found wrong."""
        return [check for check in (self.audit or {}).get("checks", ()) if not check["passed"]]

    @functools.cached_property
    def _told_flags(self) -> list[tuple[str, str]]:
        """(severity, sentence) of what AutoAttack's run warns of."""
        found = []
        for record in self.records:
            for flag in record.get("cascade", {}).get("flags", ()):
                if isinstance(flag, str):  # older records have the sentence, of masked gradients
                    whose, colon, _ = flag.partition(": ")
                    whose = whose if colon and whose in record["results"] else self.predictor
                    severity, said = "warning", flag
                else:
                    whose = flag.get("predictor", self.predictor)
                    severity = flag.get("severity", "warning")
                    said = ": ".join([severity, *(flag.get(k, "–") for k in ("name", "evidence"))])
                if whose == self.predictor:
                    found.append((severity, f"seed {_seed(record)}, {said}"))
        return found

    @property
    def flags(self) -> list[str]:
        """What AutoAttack's run and training warn of, a sentence each."""
        return [*(said for _, said in self._told_flags), *self._training_warnings]

    @property
    def _training_warnings(self) -> list[str]:
        """What training warned of, once for each seed, whatever the protocols."""
        found = [
            f"seed {_seed(record)}, in training: {warned['name']}: {warned['evidence']}"
            for record in self.records
            for warned in record.get("training", {}).get("warnings", ())
        ]
        return list(dict.fromkeys(found))

    @property
    def severities(self) -> set[str]:
        """The severities of its flags: 'note', 'warning' and 'error' (see `evaluation.Flag`)."""
        return {severity for severity, _ in self._told_flags}

    @property
    def is_sound(self) -> bool:
        """Whether neither an audit's check nor a flag says that the number is none."""
        return not self.failed_checks and "error" not in self.severities

    @property
    def examples(self) -> Mapping[str, Any] | None:
        """Images to show: the audit's, else those of the configured protocol's hardest attack."""
        if self.audit:
            return self.audit.get("examples")
        if not self.main:
            return None
        return next((r["examples"] for r in self.records if r.get("examples")), None)

    @property
    def validation(self) -> dict[Any, Sequence[Sequence[float]]]:
        """{seed: [(epoch, clean, robust)]} of training."""
        curves = {_seed(r): r.get("training", {}).get("validation") for r in self.records}
        return {seed: curve for seed, curve in curves.items() if curve}

    @property
    def commands(self) -> list[str]:
        """The lines that make the row, each once."""
        lines = (line for record in self.records for line in record.get("command", ()))
        return list(dict.fromkeys(lines))

    @property
    def histograms(self) -> list[tuple[str, str, Mapping[str, Any]]]:
        """(when, layer, {"counts", "edges", ...}) of weights, where the record holds some."""
        found = []
        for value in self.first.values():
            for when, layers in value.items() if isinstance(value, Mapping) else ():
                for layer, told in layers.items() if isinstance(layers, Mapping) else ():
                    if isinstance(told, Mapping) and "histogram" in told:
                        found.append((when, layer, told["histogram"]))
        return found


def _without_folders(value: Any) -> Any:
    """Plain values whose absolute paths are cut down to their last name."""
    if isinstance(value, Mapping):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(inner) for inner in value]
    if isinstance(value, str) and pathlib.PurePath(value).is_absolute():
        return pathlib.PurePath(value).name
    return value


def _protocol(record: Record) -> str:
    return str(record.get("protocol", "not recorded"))


def _seed(record: Record) -> Any:
    return record.get("seed", "–")


def _is_measured(result: Result) -> bool:
    """Whether there is an accuracy, and a finite one."""
    accuracy = result.get("accuracy")
    return accuracy is not None and math.isfinite(accuracy)


def _class_means(results: Sequence[Result]) -> dict[int, float]:
    over = [tables.class_accuracies(result) for result in results]
    shared = set.intersection(*map(set, over))
    return {k: statistics.fmean(one[k] for one in over) for k in sorted(shared)}


def _images(results: Sequence[Result]) -> int:
    return max((result.get("n", 0) for result in results), default=-1)


def _belongs(record: Record, row: Row) -> bool:
    """Whether a record may stand in a row: another seed or protocol of the same configuration."""
    for other in row.records:
        if _protocol(other) == _protocol(record) and _seed(other) == _seed(record):
            return False
        found = tables.differences(other, record, row.predictor)
        if _protocol(other) != _protocol(record):
            how = ("record.protocol", "attack ", "n of ")
            found = {key: values for key, values in found.items() if not key.startswith(how)}
        if found:
            return False
    return True


def distinct(records: Iterable[Record]) -> list[Record]:
    """The records without those that say the same as an earlier one, bit for bit.

    Args:
      records: of any names; a run's folder and a collection may both hold a record.

    >>> from jaxdefense.evaluation.report import rows
    >>> rows.distinct([{"name": "a", "seed": 0}, {"seed": 0, "name": "a"}])
    [{'name': 'a', 'seed': 0}]
    """
    # As text, since NaN is unequal to itself.
    found: dict[str, Record] = {}
    for record in records:
        found.setdefault(json.dumps(record, sort_keys=True, default=repr), record)
    return list(found.values())


def join(records: Iterable[Record]) -> list[Row]:
    """The rows of records: none is refused, and none counts twice (see `distinct`).

    Args:
      records: of any names, seeds, protocols and order; those without results make no row.

    Returns:
      Rows in order of appearance, the deployed predictors' first.
    """
    rows: dict[tuple[str, str], list[Row]] = {}
    for record in distinct(records):
        for predictor in record["results"]:
            same = rows.setdefault((record["name"], predictor), [])
            row = next((row for row in same if _belongs(record, row)), None)
            if row is None:
                row = Row(record["name"], predictor)
                same.append(row)
            row.records.append(record)
    for same in rows.values():
        _tell_apart(same)
    found = [row for same in rows.values() for row in same]
    for row in found:
        deployed = next(iter(row.first["results"])) == row.predictor
        row.main = deployed and not _is_of_one_class(row)
    return sorted(found, key=lambda row: not row.main)


def _tell_apart(same: Sequence[Row]) -> None:
    """Sets what tells rows of one name and predictor apart: as few of these as are needed."""
    told = [
        {
            "data": row.dataset,
            "threat": row.threat,
            "protocol": " and ".join(row.by_protocol),
            "checkpoint": str(row.first.get("training", {}).get("checkpoint", "–")),
            "seed": " and ".join(map(str, row.seeds)),
            "n": row.images,
        }
        for row in same
    ]
    texts = [""] * len(same)
    for key in told[0]:
        if len(set(texts)) == len(same):
            break
        if len({one[key] for one in told}) > 1:
            texts = [
                ", ".join(filter(None, (text, f"{key} {one[key]}")))
                for text, one in zip(texts, told, strict=True)
            ]
    for i, row in enumerate(same):
        earlier = texts[:i].count(texts[i])
        count = f"no. {earlier + 1}" if texts.count(texts[i]) > 1 else ""
        row.apart = ", ".join(filter(None, (texts[i], count)))


def _is_of_one_class(row: Row) -> bool:
    """Whether it was judged on the images of a single class of several."""
    for results in row.results.values():
        for result in results:
            seen = [value is not None for value in result.get("per_class", ())]
            if len(seen) > 1 and sum(seen) == 1:
                return True
    return False


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The places of the points that no other one equals or beats in both numbers.

    Args:
      points: (clean, robust), both the higher the better.

    Returns:
      Places, by the first number.

    >>> from jaxdefense.evaluation.report import rows
    >>> rows.pareto_front([(90.0, 40.0), (80.0, 60.0), (79.0, 50.0)])
    [1, 0]
    """
    front, best = [], float("-inf")
    for i in sorted(range(len(points)), key=lambda i: points[i], reverse=True):
        if points[i][1] > best:
            front.append(i)
            best = points[i][1]
    return front[::-1]
