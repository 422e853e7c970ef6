"""HTML pages of records' tables and figures, each one file without dependencies."""

import html
import io
from collections.abc import Iterable

from jaxdefense.evaluation import plots, tables
from jaxdefense.evaluation.plots import Figure
from jaxdefense.evaluation.records import Record

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; }
td, th { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: right; }
td:first-child, th:first-child { text-align: left; }
svg { max-width: 100%; height: auto; }
.from { color: #666; font-size: 13px; }
"""


def _table(markdown: str) -> str:
    """An HTML table of a Markdown one."""
    lines = [line.strip("| ").split(" | ") for line in markdown.strip().splitlines()]
    rows = []
    for tag, cells in [("th", lines[0]), *(("td", line) for line in lines[2:])]:
        rows.append("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells))
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def page(title: str, parts: Iterable[tuple[str, str | Figure]], footer: str = "") -> str:
    """A page in HTML.

    Args:
      title: of the page.
      parts: (heading, Markdown table or figure), in order.
      footer: where the numbers come from.
    """
    body = [f"<h1>{html.escape(title)}</h1>"]
    for heading, part in parts:
        body.append(f"<h2>{html.escape(heading)}</h2>")
        body.append(_table(part) if isinstance(part, str) else _svg(part))
    body.append(f'<p class="from">{html.escape(footer)}</p>')
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>{''.join(body)}</html>\n"
    )


def audit_page(record: Record) -> str:
    """The page of one audit's record: tiers, checks, accuracy over eps and per class, examples.

    Args:
      record: of the protocol 'audit'.
    """
    parts: list[tuple[str, str | Figure]] = []
    for predictor, report in record["audit"].items():
        parts.append((f"Accuracy of {predictor} by tier", tables.tier_table(record, predictor)))
        parts.append((f"Checks of {predictor}", tables.check_table(record, predictor)))
        alone = {**record, "results": {predictor: record["results"][predictor]}}
        parts.append((f"Classes of {predictor}", plots.class_bars([alone], "clean", "worst")))
        for column in ("clean", "worst"):
            if column in record["results"][predictor]:
                parts.append((f"Per class, {column}", tables.class_table([alone], column)))
        parts.append((f"Examples of {predictor}", plots.gallery(report["examples"])))
    parts.insert(1, ("Over eps", plots.audit_curve([record])))
    return page(f"Audit of {record['name']}", parts, tables.provenance([record]))
