"""Reports: one self-contained HTML file each, made from records only; needs the extra `plots`.

* `leaderboard`: any records, a row for each system, with charts.
* `audit_page`: one audit's record.

`rows` joins records, `charts` and `images` draw, `papers` finds the references; the templates hold
the page, its style and its script. Tables are DataTables (out of itables' package), charts Vega
(out of vl-convert's): both lie in the file, once, so that it opens without a network.
"""

import functools
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxdefense import extras
from jaxdefense.evaluation import tables
from jaxdefense.evaluation.records import Record
from jaxdefense.evaluation.report import rows as joining
from jaxdefense.evaluation.report.rows import AA_FAST, AUDIT, AUTOATTACK, WEAK, Row

with extras.required("plots", __name__):
    import itables.utils
    import jinja2
    import vl_convert

    from jaxdefense.evaluation.report import charts, images

# Characters of the images of all galleries of a page, beyond which further galleries are left out.
_GALLERIES = 1_000_000
_SHOWN = 3  # columns of attacks that are visible at first


@functools.cache
def _vega() -> str:
    return _inline(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


@functools.cache
def _datatables(kind: str) -> str:
    return _inline(itables.utils.read_package_file("html", f"dt_bundle.{kind}"))


# What would end or open an element in the middle of a library's source.
_MARKUP = re.compile(r"<(?=/script|/style|!--)", re.IGNORECASE)


def _inline(source: str) -> str:
    """A library's source for a <script> or <style>: nothing in it ends or opens an element.

    What is replaced can only stand in strings and patterns, where "\\x3c" is the same.
    """
    return _MARKUP.sub(r"\\x3c", source)


def _finite(value: Any) -> Any:
    """Plain values with None for what JSON has no word for."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Page:
    """What one page collects while it is rendered: its charts, and how large its galleries are."""

    def __init__(self) -> None:
        self.charts: dict[str, Any] = {}
        self.pixels = 0

    def figure(self, chart: charts.Chart | None) -> dict[str, str] | None:
        """A chart's place in the page, None for no chart."""
        if chart is None:
            return None
        name = f"chart{len(self.charts)}"
        self.charts[name] = _finite(chart.spec)
        words = chart.spec["description"]
        return {"id": name, "caption": chart.caption, "words": words, "shape": chart.shape}

    def gallery(self, row: Row) -> images.Gallery | str:
        """A row's gallery, or why there is none."""
        if not row.examples:
            return "No images are kept in the records."
        found = images.gallery(row.examples)
        if self.pixels + found.size > _GALLERIES:
            return "The images are left out here, to keep this file small; the record has them."
        self.pixels += found.size
        return found

    def details(self, row: Row) -> dict[str, Any]:
        """What a row opens to."""
        curve = (row.audit or {}).get("curve") or ()
        eps = tables.record_threat(row.first).get("eps")
        drawn = [
            charts.training([row]),
            charts.over_eps({"PGD": curve}, eps) if curve else None,
            charts.row_classes(row),
            charts.histograms(row) if row.main else None,
        ]
        return {
            "row": row,
            "figures": [self.figure(chart) for chart in drawn if chart],
            "gallery": self.gallery(row),
        }

    def render(self, template: str, **values: Any) -> str:
        """The page in HTML; what records say is escaped."""
        found = _templates().get_template(template)
        sources = {"vega": _vega(), "dt_js": _datatables("js"), "dt_css": _datatables("css")}
        return found.render(charts=self.charts, **sources, **values)


@functools.cache
def _templates() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.PackageLoader(__name__),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["percent"] = lambda value: "–" if value is None else f"{value:.2f}"
    made.filters["count"] = lambda value: "–" if value is None else f"{value:,}"
    made.filters["duration"] = _duration
    made.globals |= {"AUDIT": AUDIT, "MIN_PER_CLASS": tables.MIN_PER_CLASS}
    return made


def _duration(seconds: float | None) -> str:
    if not seconds:
        return "–"
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _provenance(records: Sequence[Record]) -> str:
    return tables.provenance(records) if records else "no records yet"


Groups = dict[tuple[str, str], list[Row]]


def _groups(found: Sequence[Row]) -> Groups:
    """{(data set, threat): rows}, the largest first; in each the most robust first."""
    groups: Groups = {}
    for row in sorted(found, key=lambda row: (not row.main, -_robust(row))):
        groups.setdefault((row.dataset, row.threat), []).append(row)
    return dict(sorted(groups.items(), key=lambda item: -sum(row.main for row in item[1])))


def _robust(row: Row) -> float:
    return row.numbers[row.hardest].mean if row.hardest else -1.0


def _rivals(group: Sequence[Row]) -> list[Row]:
    """The rows whose numbers may be compared: all that met the strongest attack in common.

    That is AutoAttack where two systems met it. Elsewhere, of the attacks that at least two
    systems and half of the rows met, it is the one that comes nearest to each row's lowest number.
    """
    sound = [row for row in group if row.main and row.hardest and row.is_sound]

    def met(attack: str) -> list[Row]:
        return [row for row in sound if attack in row.numbers]

    def gap(attack: str) -> float:
        return statistics.fmean(row.numbers[attack].mean - _robust(row) for row in met(attack))

    attacks = dict.fromkeys(c for row in sound for c in row.numbers if tables.is_robustness(c))
    common = [attack for attack in attacks if _systems(met(attack)) > 1]
    if AUTOATTACK in common:
        return met(AUTOATTACK)
    most = max((len(met(attack)) for attack in common), default=0)
    common = [c for c in common if len(met(c)) >= min(most, len(sound) / 2)]
    return met(min(common, key=lambda c: (gap(c), -len(met(c))))) if common else []


def _systems(found: Sequence[Row]) -> int:
    """How many systems rows are of: one may have several, of other seeds or checkpoints."""
    return len({row.name for row in found})


def _best(group: Sequence[Row], dataset: str, threat: str) -> str | None:
    """A sentence about the most robust system of several; None where there are not two.

    Compared are sound rows (`Row.is_sound`), over the attacks that all of them met.
    """
    rivals = _rivals(group)
    if not rivals:
        return None
    shared = [c for c in rivals[0].numbers if all(c in row.numbers for row in rivals)]

    def lowest(row: Row) -> str:
        return str(tables.hardest_attack({c: row.numbers[c].mean for c in shared}))

    best = max(rivals, key=lambda row: row.numbers[lowest(row)].mean)
    attack = lowest(best)
    number = best.numbers[attack]
    of, all_of = _systems(rivals), _systems([row for row in group if row.main and row.hardest])
    if AUTOATTACK in shared:
        which = f"the {of} of {all_of} systems that met AutoAttack"
    else:
        few = f"{of} of {all_of}" if of < all_of else str(of)
        which = f"{few} systems under the attacks that they share"
    said = [
        f"On {dataset} under {threat}, {best.label} keeps the most of {which}: "
        f"{number.text} %, {attack}, {number.images} images."
    ]
    if best.hardest != attack:
        said.append(f"Its own lowest is {best.numbers[str(best.hardest)].text} %, {best.hardest}.")
    if best.strength == WEAK:
        said.append("AutoAttack was not run there: an upper bound.")
    if "warning" in best.severities:
        said.append("AutoAttack's flags warn there that another attack may find more.")
    if doubted := [row.label for row in group if row.main and row.hardest and not row.is_sound]:
        said.append(f"Left out, because their numbers are doubtful: {', '.join(doubted)}.")
    return " ".join(said)


def _warnings(found: Sequence[Row]) -> list[str]:
    """What must not be concluded."""
    main = [row for row in found if row.main and row.hardest]
    told = ["Numbers of different data sets, threats or attacks are not comparable."]
    if weak := sum(row.strength == WEAK for row in main):
        told.append(
            f"{weak} of {len(main)} systems met neither AutoAttack nor an audit: their numbers "
            "are upper bounds, and their order may change."
        )
    if single := sum(len(row.seeds) == 1 for row in main):
        told.append(
            f"{single} of {len(main)} have one seed: a difference of a few points says nothing."
        )
    if broken := [row.label for row in main if row.failed_checks]:
        told.append(f"Failed checks make these numbers doubtful: {', '.join(broken)}.")
    if wrong := [row.label for row in main if "error" in row.severities]:
        told.append(
            f"By AutoAttack's flags these numbers are no robust accuracies: {', '.join(wrong)}."
        )
    if warned := [row.label for row in main if row.severities - {"note"} == {"warning"}]:
        told.append(
            f"AutoAttack's flags warn that another attack may find more: {', '.join(warned)}."
        )
    return told


def _attack_columns(found: Sequence[Row]) -> tuple[list[str], list[str]]:
    """The attacks with a column of their own, the most common first, and those hidden at first.

    Hidden are all but `_SHOWN`, and what fewer than a fifth of the systems have met.
    """
    own = ("clean", AA_FAST, AUTOATTACK, AUDIT)
    counts: dict[str, int] = {}
    for row in found:
        for column in [*row.numbers, *row.only_reported]:
            if column not in own:
                counts[column] = counts.get(column, 0) + row.main
    columns = sorted(counts, key=lambda column: -counts[column])
    few = sum(row.main for row in found) / 5
    hidden = [column for i, column in enumerate(columns) if i >= _SHOWN or counts[column] < few]
    return columns, hidden


class _Header(NamedTuple):
    """A column of the table behind "system"."""

    text: str
    numeric: bool = True
    hidden: bool = False


def _headers(columns: Sequence[str], hidden: Sequence[str]) -> list[_Header]:
    """The columns behind "system": each row of the table has as many cells."""
    return [
        _Header("data set", numeric=False),
        _Header("threat", numeric=False),
        _Header("clean"),
        _Header("hardest attack"),
        *(_Header(column, hidden=column in hidden) for column in columns),
        _Header("AA-fast"),
        _Header("AutoAttack"),
        _Header("audit", numeric=False),
        _Header("worst class"),
        _Header("network", numeric=False),
        *map(_Header, ("images", "seeds", "minutes", "parameters")),
        _Header("protocol", numeric=False),
    ]


def leaderboard(
    records: Sequence[Record],
    *,
    title: str,
    waiting: Sequence[str] = (),
    failed: Mapping[str, str] | None = None,
) -> str:
    """A page of any records: a sortable table whose rows open, and charts. One HTML file.

    Records are joined over seeds and protocols where their configs agree; others get rows of their
    own. A missing number is a dash.

    Args:
      records: of any names, protocols and seeds; none is fine.
      title: of the page.
      waiting: rows that run or wait.
      failed: {row: why it failed, in one line}.

    >>> from jaxdefense.evaluation import report
    >>> page = report.leaderboard([], title="Mine", waiting=["trades-digits"])
    >>> "trades-digits" in page
    True
    """
    page = _Page()
    records = joining.distinct(records)
    found = joining.join(records)
    groups = _groups(found)
    ordered = [row for group in groups.values() for row in group]
    sections = []
    for (dataset, threat), group in groups.items():
        curves = {
            row.label: row.audit["curve"]
            for row in group
            if row.main and row.audit and row.audit.get("curve")
        }
        eps = tables.record_threat(group[0].first).get("eps")
        drawn = (
            charts.trade_off(group),
            charts.classes(group),
            charts.over_eps(curves, eps),
            charts.training(group),
        )
        systems = _systems([row for row in group if row.main])
        figures = [page.figure(chart) for chart in drawn if chart]
        if figures:
            name = f"{dataset}, {threat}: {systems} system{'s' * (systems != 1)}"
            sections.append({"name": name, "figures": figures})
    columns, hidden = _attack_columns(found)
    return page.render(
        "leaderboard.html",
        title=title,
        bests=[said for key, group in groups.items() if (said := _best(group, *key))],
        warnings=_warnings(found),
        details=[page.details(row) for row in ordered],
        columns=columns,
        headers=_headers(columns, hidden),
        sections=sections,
        waiting=list(waiting),
        failed=dict(failed or {}),
        choices={
            "dataset": sorted({row.dataset for row in found}),
            "threat": sorted({row.threat for row in found}),
            "protocol": sorted({name for row in found for name in row.by_protocol}),
        },
        others=sum(not row.main for row in found),
        source=_provenance(records),
    )


def _verdict(row: Row) -> str:
    """An audit's result in words."""
    failed, checks = row.failed_checks, (row.audit or {}).get("checks", ())
    if not checks:
        return "The record holds no checks: nothing says whether to trust the number."
    if not failed:
        return f"No check of {len(checks)} failed."
    why = "; ".join(f"“{check['name']}” ({check['evidence']})" for check in failed)
    told = f"{len(failed)} of {len(checks)} checks failed"
    return f"{told}: the number is not to be trusted, because this does not hold: {why}."


def audit_page(record: Record) -> str:
    """The page of one audit's record: verdict, tiers, checks, accuracy over eps, examples.

    Args:
      record: of the protocol 'audit'.
    """
    page = _Page()
    audited = [row for row in joining.join([record]) if row.audit]
    parts = [{**page.details(row), "verdict": _verdict(row)} for row in audited]
    return page.render(
        "audit.html",
        title=f"Audit of {record['name']}",
        parts=parts,
        options=record.get("config", {}).get("evaluation", {}).get("audit", {}),
        source=_provenance([record]),
    )
