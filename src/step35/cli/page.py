"""The pieces of a self-contained HTML page. Every text passes through `escape`; no piece loads anything."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #10a37f; --bad: #d6404f; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem;
  background: Canvas; color: CanvasText; }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; border-bottom: 1px solid var(--line); margin-top: 2.2rem }
h3 { font-size: 1rem; margin: 1rem 0 .3rem }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1rem }
.charts svg { width: 100%; height: auto; max-width: 42rem }
.tiles { display: flex; flex-wrap: wrap; gap: .7rem }
.tiles div { background: var(--soft); border-radius: 8px; padding: .5rem .9rem }
.tiles b { display: block; font-size: 1.25rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; margin: .4rem 0 }
td, th { border-bottom: 1px solid var(--line); padding: .2rem .7rem; text-align: left; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums }
pre { background: var(--soft); padding: .7rem; border-radius: 6px;
  white-space: pre-wrap; overflow-wrap: anywhere }
details { margin: .4rem 0 } summary { cursor: pointer }
.note { opacity: .7 } .good { color: var(--good) } .bad { color: var(--bad) }
@media print { body { max-width: none; margin: 0 } .charts svg, table, .tiles { break-inside: avoid } }
"""


def document(title: str, body: Iterable[str]) -> str:
    """Return a whole page."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def section(title: str, body: str) -> str:
    """Return a titled panel; an empty body says that its stage has not run."""
    return f"<section><h2>{escape(title)}</h2>{body or note('not run yet')}</section>"


def note(text: str) -> str:
    """Return a line in a lower voice."""
    return f'<p class="note">{escape(text)}</p>'


def charts(drawings: Sequence[str]) -> str:
    """Return SVG drawings side by side."""
    return f'<div class="charts">{"".join(drawings)}</div>' if drawings else ""


def tiles(figures: Iterable[tuple[str, str]]) -> str:
    """Return (label, value) pairs as large figures."""
    cells = "".join(f"<div><b>{escape(value)}</b>{escape(label)}</div>" for label, value in figures)
    return f'<div class="tiles">{cells}</div>' if cells else ""


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table; numbers are aligned to the right."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>' if body else ""


def fold(title: str, body: str, *, mark: str = "") -> str:
    """Return a collapsed part; `mark` is the class of its title, "good" or "bad"."""
    return f'<details><summary class="{mark}">{escape(title)}</summary>{body}</details>'


def text(content: Any) -> str:
    """Return preformatted text, data as indented JSON."""
    if not isinstance(content, str):
        content = json.dumps(content, indent=2, ensure_ascii=False)
    return f"<pre>{escape(content)}</pre>"


def structure(value: Any, title: str = "") -> str:
    """Return any JSON object as tables: its plain values first, then a table for each nested one."""
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    if isinstance(value, dict):
        nested = {key: inner for key, inner in value.items() if isinstance(inner, dict | list) and inner}
        plain = [(key, inner) for key, inner in value.items() if key not in nested]
        own = table(("", ""), plain)
        return (heading if own else "") + own + "".join(structure(inner, str(key)) for key, inner in nested.items())
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        columns = list(dict.fromkeys(key for item in value for key in item))
        return heading + table(columns, ([item.get(column, "") for column in columns] for item in value))
    return heading + f"<p>{escape(', '.join(map(number, value)) if isinstance(value, list) else number(value))}</p>"


def number(value: Any) -> str:
    """Return a value as short text: 12,345 or 0.1235; "–" for nothing."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) and abs(value) < 10_000 else f"{value:,.0f}"
    return str(value)


def _cell(value: Any) -> str:
    kind = ' class="number"' if isinstance(value, int | float) and not isinstance(value, bool) else ""
    return f"<td{kind}>{escape(number(value))}</td>"
