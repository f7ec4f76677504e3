"""A description as words in cells, before anything is known of colours or widths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Tone = Literal["plain", "dim", "adapted", "learned", "frozen", "alone", "unused"]


@dataclass(frozen=True)
class Words:
    """A piece of a cell. tone: what it tells; how that looks is for each medium to say."""

    text: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class Line:
    """A line of the table: a module's, a header above the parts of one that owns nothing itself, or a total.

    depth: of its indentation. path: the whole dotted name, where `label` is a part of it.
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
    """All that is shown, in order. more: the modules that have no line of their own. settings: names and values."""

    title: str
    lines: list[Line]
    totals: list[Line]
    more: str
    facts: list[tuple[str, str]]
    settings: list[tuple[str, str]]
    notes: list[str]
    warnings: list[str]


COLUMNS = ("module", "class", "shapes", "parameters", "rates", "what was done")


def printable(text: str) -> str:
    """The text with what cannot be printed written out: torch allows any name, escape codes and line breaks too."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def grouped(number: int | None) -> str:
    """A number with its thousands grouped; nothing for None."""
    return "" if number is None else f"{number:,}"


def shape_text(shape: tuple[int, ...]) -> str:
    """(64, 3, 7, 7) as 64x3x7x7."""
    return "x".join(map(str, shape)) or "scalar"
