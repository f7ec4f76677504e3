"""The page of a description: laid out once as lines and words, shown by rich in a terminal and by jinja as HTML."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rich.box import Box
from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from metawrap.templates import fill_template

Tone = Literal["plain", "dim", "adapted", "learned", "frozen", "alone", "unused"]

COLUMNS = ("module", "class", "shapes", "parameters", "rates", "what was done")
_STYLES: dict[Tone, str] = {
    "plain": "",
    "dim": "bright_black",
    "adapted": "green",
    "learned": "cyan",
    "frozen": "bright_blue",
    "alone": "magenta",
    "unused": "bold yellow",
}
_ROLE_STYLES = {"module": "", "header": _STYLES["dim"], "total": "bold"}
# A terminal that is narrower than this leaves the column out, because squeezed columns are harder to read.
_LEAST_WIDTHS = {"shapes": 84, "class": 64}


class Words(NamedTuple):
    """A piece of a cell. tone: its meaning, for which a terminal and a notebook have different colours."""

    text: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class Line:
    """A line of the table: a module, a header above the parts of a module that owns nothing itself, or a total.

    depth: steps of indentation. path: the whole dotted name, of which `label` is the end.
    """

    label: str
    role: Literal["module", "header", "total"] = "module"
    depth: int = 0
    path: str = ""
    kind: str = ""
    shapes: str = ""
    numbers: int | None = None
    rates: int | None = None
    done: tuple[Words, ...] = ()


@dataclass(frozen=True)
class Page:
    """Everything that is shown, in order. more: the modules without a line. settings: names and values."""

    title: str
    lines: list[Line]
    totals: list[Line]
    more: str
    facts: list[tuple[str, str]]
    settings: list[tuple[str, str]]
    notes: list[str]
    warnings: list[str]

    def as_html(self) -> str:
        """A fragment for any HTML document: it has no scripts, loads nothing, and its style rules have one class."""
        return fill_template("metawrap.learner", "description.html", page=self, columns=COLUMNS, grouped=grouped)

    def as_text(self, width: int) -> str:
        """Text of at most that width, without escape codes, in the characters that stdout can show."""
        console = Console(width=width, force_jupyter=False)
        options = console.options.update(width=width)
        options.encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
        parts = [segment.text for piece in self.rendered(options) for segment in console.render(piece, options)]
        return "\n".join(line.rstrip() for line in "".join(parts).splitlines())

    def rendered(self, options: ConsoleOptions) -> Iterator[RenderableType]:
        """The page for a rich console, from top to bottom."""
        yield Text(self.title, style="bold")
        yield Text()
        yield _modules(self, options)
        if self.more:
            yield Text(f"without parameters or buffers: {self.more}", style=_STYLES["dim"])
        yield Text()
        yield _facts(self)


def printable(text: str) -> str:
    """The text with escape codes and line breaks written out. Torch allows them in the names of modules."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def grouped(number: int | None) -> str:
    """A number with its thousands grouped; "" for None."""
    return "" if number is None else f"{number:,}"


def _modules(page: Page, options: ConsoleOptions) -> Table:
    rule = "-" if options.ascii_only else "─"
    blank, ruled = "    \n", f"{rule * 4}\n"
    box = Box(blank * 2 + ruled + blank + ruled * 2 + blank * 2, ascii=options.ascii_only)
    style = {"pad_edge": False, "show_edge": False, "header_style": "bold", "border_style": _STYLES["dim"]}
    table = Table(box=box, padding=(0, 1, 0, 0), **style)  # type: ignore[arg-type]
    columns = [name for name in COLUMNS if options.max_width >= _LEAST_WIDTHS.get(name, 0)]
    widest = {"module": options.max_width * 2 // 5, "class": 20, "shapes": 26}
    for name in columns:
        is_number = name in ("parameters", "rates")
        # Rich narrows a column without wrapping last: the names of modules tell more than classes and shapes.
        no_wrap = is_number or name == "module"
        table.add_column(name, justify="right" if is_number else "left", no_wrap=no_wrap, max_width=widest.get(name))
    for lines in (page.lines, page.totals):
        for line in lines:
            cells: dict[str, RenderableType] = {
                "module": _Elided(line.label, 2 * line.depth, _ROLE_STYLES[line.role]),
                "class": _Elided(line.kind, 0, _STYLES["dim"]),
                "shapes": _Elided(line.shapes, 0, _STYLES["dim"]),
                "parameters": grouped(line.numbers),
                "rates": grouped(line.rates),
                "what was done": _joined(", ", [[words] for words in line.done]),
            }
            table.add_row(*(cells[name] for name in columns))
        table.add_section()
    return table


def _facts(page: Page) -> Table:
    settings = _joined("  ", [[Words(f"{name}=", "dim"), Words(value)] for name, value in page.settings])
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column()
    for label, text in page.facts:
        grid.add_row(Text(label, style=_STYLES["dim"]), Text(text))
    grid.add_row(Text("settings", style=_STYLES["dim"]), settings)
    for note in page.notes:
        grid.add_row(Text("note", style=_STYLES["learned"]), Text(note))
    for warning in page.warnings:
        grid.add_row(Text("warning", style=_STYLES["unused"]), Text(warning, style="yellow"))
    return grid


def _joined(separator: str, pieces: Iterable[Iterable[Words]]) -> Text:
    return Text(separator).join(Text.assemble(*((text, _STYLES[tone]) for text, tone in piece)) for piece in pieces)


class _Elided:
    """One line that loses its middle if it is too long, because the ends of a dotted name tell the most."""

    def __init__(self, text: str, indent: int, style: str) -> None:
        self.text, self.indent, self.style = text, indent, style

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        full = self.indent + cell_len(self.text)
        return Measurement(min(full, 8), full).with_maximum(options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        indent, text = min(self.indent, options.max_width // 2), self.text
        room = options.max_width - indent
        if cell_len(text) > room:
            front = max(0, (room - 3) // 3)
            end = text
            while cell_len(end) > max(0, room - 3 - front):
                end = end[1:]
            text = set_cell_size(text, front) + "..."[:room] + end
        yield Text(" " * indent + text, style=self.style, no_wrap=True, overflow="crop")
