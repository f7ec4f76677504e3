"""A page in a terminal, through rich; plain text is the same without the colours."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from rich.box import Box
from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from metawrap.learner.description_page import COLUMNS, Line, Page, Tone, Words, grouped

_STYLES: dict[Tone, str] = {
    "plain": "",
    "dim": "bright_black",
    "adapted": "green",
    "learned": "cyan",
    "frozen": "bright_blue",
    "alone": "magenta",
    "unused": "bold yellow",
}
_ROLES = {"module": "", "header": _STYLES["dim"], "total": "bold"}
# Narrower than these, a table without the column reads better than one with all of them squeezed.
_SHAPES_FROM, _CLASS_FROM = 84, 64


def plain_text(page: Page, width: int) -> str:
    """The page as text of at most that width, without escape codes, in letters that stdout can show."""
    console = Console(width=width, force_jupyter=False)
    options = console.options.update(width=width)
    options.encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
    parts = [segment.text for piece in render(page, options) for segment in console.render(piece, options)]
    return "\n".join(line.rstrip() for line in "".join(parts).splitlines())


def render(page: Page, options: ConsoleOptions) -> Iterator[RenderableType]:
    """The pieces of the page, from top to bottom."""
    yield Text(page.title, style="bold")
    yield Text()
    yield _table(page, options)
    if page.more:
        yield Text(f"without parameters or buffers: {page.more}", style=_STYLES["dim"])
    yield Text()
    yield _facts(page)


def _table(page: Page, options: ConsoleOptions) -> Table:
    kept = [
        name for name in COLUMNS if options.max_width >= {"shapes": _SHAPES_FROM, "class": _CLASS_FROM}.get(name, 0)
    ]
    table = Table(
        box=_ruled("-" if options.ascii_only else "─"),
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
        header_style="bold",
        border_style=_STYLES["dim"],
    )
    widest = {"module": options.max_width * 2 // 5, "class": 20, "shapes": 26}
    for name in kept:
        counts = name in ("parameters", "rates")
        # What may not wrap is narrowed last: the names of modules tell more than their classes and shapes.
        fixed = counts or name == "module"
        table.add_column(name, justify="right" if counts else "left", no_wrap=fixed, max_width=widest.get(name))
    for line in page.lines:
        table.add_row(*_cells(line, kept))
    table.add_section()
    for line in page.totals:
        table.add_row(*_cells(line, kept))
    return table


def _cells(line: Line, kept: list[str]) -> Iterator[RenderableType]:
    cells: dict[str, RenderableType] = {
        "module": _Elided(line.label, 2 * line.depth, _ROLES[line.role]),
        "class": _Elided(line.kind, 0, _STYLES["dim"]),
        "shapes": _Elided(line.shapes, 0, _STYLES["dim"]),
        "parameters": grouped(line.numbers),
        "rates": grouped(line.rates),
        "what was done": _joined(line.done),
    }
    return (cells[name] for name in kept)


def _joined(pieces: tuple[Words, ...]) -> Text:
    return Text(", ").join(Text(piece.text, style=_STYLES[piece.tone]) for piece in pieces)


def _facts(page: Page) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column()
    for label, text in page.facts:
        grid.add_row(Text(label, style=_STYLES["dim"]), Text(text))
    settings = Text("  ").join(Text.assemble((f"{name}=", _STYLES["dim"]), value) for name, value in page.settings)
    grid.add_row(Text("settings", style=_STYLES["dim"]), settings)
    for note in page.notes:
        grid.add_row(Text("note", style=_STYLES["learned"]), Text(note))
    for warning in page.warnings:
        grid.add_row(Text("warning", style=_STYLES["unused"]), Text(warning, style="yellow"))
    return grid


def _ruled(rule: str) -> Box:
    blank, ruled = "    \n", f"{rule * 4}\n"
    return Box(blank * 2 + ruled + blank + ruled * 2 + blank * 2, ascii=rule == "-")


class _Elided:
    """One line that loses its middle where there is no room: the ends of a dotted name tell the most."""

    def __init__(self, text: str, indent: int, style: str) -> None:
        self.text, self.indent, self.style = text, indent, style

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        full = self.indent + cell_len(self.text)
        return Measurement(min(full, 8), full).with_maximum(options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        indent = min(self.indent, options.max_width // 2)
        room = options.max_width - indent
        text = self.text
        if cell_len(text) > room:
            front = max(0, (room - 3) // 3)
            back = max(0, room - 3 - front)
            text = set_cell_size(text, front) + "..."[:room] + _last_cells(text, back)
        yield Text(" " * indent + text, style=self.style, no_wrap=True, overflow="crop")


def _last_cells(text: str, width: int) -> str:
    while cell_len(text) > width:
        text = text[1:]
    return text
