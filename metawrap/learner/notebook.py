"""A page as a piece of HTML: no scripts, nothing loaded, every rule of style under one class, every word escaped."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from metawrap.learner.description_page import COLUMNS, Line, Page, Tone, Words, grouped

# Text has the colour of the notebook around it, light or dark; only dots and rules bring colours of their own, in
# middle tones that stand out on both.
_STYLE = """
.metawrap-description {font-size: 13px; line-height: 1.45; max-width: 70em; color: inherit}
.metawrap-description .title {font-size: 15px; font-weight: 600; margin: 0 0 .6em}
.metawrap-description .scroll {overflow-x: auto; margin: .4em 0}
.metawrap-description table {border-collapse: collapse; border: 0; margin: 0; font-size: inherit; color: inherit}
.metawrap-description table[class] tbody tr, .metawrap-description thead {background: none; border: 0}
.metawrap-description td, .metawrap-description th {padding: .16em 1.1em .16em 0; text-align: left; border: 0;
  vertical-align: top; white-space: nowrap; color: inherit; background: none; max-width: none}
.metawrap-description .modules tbody td {border-top: 1px solid rgba(128, 128, 128, .16)}
.metawrap-description .modules tbody.totals tr:first-child td {border-top: 1px solid rgba(128, 128, 128, .8)}
.metawrap-description .modules thead th {font-weight: 600; border-bottom: 1px solid rgba(128, 128, 128, .8)}
.metawrap-description .modules .header td {padding-top: .5em}
.metawrap-description .number {text-align: right; font-variant-numeric: tabular-nums}
.metawrap-description code {font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 12px;
  background: none; color: inherit; padding: 0}
.metawrap-description .faint, .metawrap-description .dim {opacity: .62}
.metawrap-description .facts td {white-space: normal}
.metawrap-description .facts td:first-child {white-space: nowrap; opacity: .62}
.metawrap-description summary {cursor: pointer; margin: .5em 0 .2em}
.metawrap-description .settings {columns: 17em; column-gap: 2em; margin: .2em 0 0 1.1em}
.metawrap-description .warning, .metawrap-description .note {border-left: 3px solid #d98e04; padding: .3em .8em;
  margin: .4em 0; background: rgba(217, 142, 4, .12)}
.metawrap-description .note {border-color: #2b8fc9; background: rgba(43, 143, 201, .10)}
.metawrap-description .dot {display: inline-block; width: .6em; height: .6em; border-radius: 50%;
  margin-right: .45em; background: rgba(128, 128, 128, .45)}
.metawrap-description .dot.adapted {background: #27a35a}
.metawrap-description .dot.learned {background: #2b8fc9}
.metawrap-description .dot.frozen {background: #7d6bd6}
.metawrap-description .dot.alone {background: #c2549d}
.metawrap-description .dot.unused {background: #d98e04}
""".strip()


_OPEN_UP_TO = 100


def html(page: Page) -> str:
    """The page as a fragment, to stand anywhere in a document."""
    count = sum(line.role == "module" for line in page.lines)
    opened = " open" if count <= _OPEN_UP_TO else ""
    more = f'<div class="faint">without parameters or buffers: {escape(page.more)}</div>' if page.more else ""
    parts = [
        f"<style>{_STYLE}</style>",
        f'<div class="title">{escape(page.title)}</div>',
        *(f'<div class="warning"><b>Warning:</b> {escape(text)}</div>' for text in page.warnings),
        *(f'<div class="note"><b>Note:</b> {escape(text)}</div>' for text in page.notes),
        _facts(page),
        f"<details{opened}><summary>{count} module{'s' if count != 1 else ''}</summary>",
        f'<div class="scroll">{_table(page)}</div>{more}</details>',
        f'<details><summary>{len(page.settings)} settings</summary><div class="settings">',
        *(f'<div><code><span class="faint">{escape(n)}=</span>{escape(v)}</code></div>' for n, v in page.settings),
        "</div></details>",
    ]
    return f'<div class="metawrap-description">{"".join(parts)}</div>'


def _facts(page: Page) -> str:
    rows = (f"<tr><td>{escape(label)}</td><td>{escape(text)}</td></tr>" for label, text in page.facts)
    return f'<table class="facts"><tbody>{"".join(rows)}</tbody></table>'


def _table(page: Page) -> str:
    names = (f"<th{_number(name)}>{name}</th>" for name in COLUMNS)
    head = f"<thead><tr>{''.join(names)}</tr></thead>"
    return (
        f'<table class="modules">{head}<tbody>{_rows(page.lines)}</tbody>'
        f'<tbody class="totals">{_rows(page.totals)}</tbody></table>'
    )


def _rows(lines: Iterable[Line]) -> str:
    return "".join(f'<tr class="{line.role}">{_cells(line)}</tr>' for line in lines)


def _cells(line: Line) -> str:
    tag = "b" if line.role == "total" else "code"
    faint = ' class="faint"' if line.role == "header" else ""
    return (
        f'<td style="padding-left: {1.4 * line.depth:.1f}em" title="{escape(line.path)}">'
        f"<{tag}{faint}>{escape(line.label)}</{tag}></td>"
        f'<td class="faint">{escape(line.kind)}</td><td class="faint">{escape(line.shapes)}</td>'
        f'<td class="number">{grouped(line.numbers)}</td><td class="number">{grouped(line.rates)}</td>'
        f"<td>{_done(line.done)}</td>"
    )


def _done(pieces: tuple[Words, ...]) -> str:
    shown = []
    before: Tone = "plain"
    for words in pieces:
        if words.tone in ("plain", "dim"):
            shown.append(f'<span class="{words.tone}">{escape(words.text)}</span>')
        else:
            dot = f'<span class="dot {words.tone}"></span>' if words.tone != before else ""
            shown.append(dot + escape(words.text))
        before = words.tone
    return ", ".join(shown)


def _number(column: str) -> str:
    return ' class="number"' if column in ("parameters", "rates") else ""
