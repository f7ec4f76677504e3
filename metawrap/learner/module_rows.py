"""A row for each module of the network, and the lines of the table that they become."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from metawrap.learner.description_page import Line, Tone, Words, printable, shape_text

Fate = Literal["adapted", "adapted from a frozen start", "unused", "learned only", "frozen", "shared"]

_TONES: dict[Fate, Tone] = {
    "adapted": "adapted",
    "adapted from a frozen start": "adapted",
    "unused": "unused",
    "learned only": "learned",
    "frozen": "frozen",
}
# Their names say nothing that the dotted names of their children do not.
_LISTS = frozenset({"Sequential", "ModuleList", "ModuleDict"})
_SHAPES_SHOWN = 4


@dataclass(frozen=True)
class ModuleRow:
    """One module of the user's network, and what wrapping did to it.

    name: dotted; "" is the network itself. kind: the user's class. parameters, buffers: its own, not its children's,
    by local name, with their shapes in the learner: a per-step tensor has a leading step axis.
    fates: what happens to each parameter. "unused": the support loss does not depend on it, so it is not adapted.
    "shared": it is the parameter that `shared` names, in whose module it is counted. same_as: the module is
    registered earlier too, under that name. rates: inner learning rates of its parameters.
    steps: rows of its per-step tensors, which are `per_step`: "affine" (scale and shift), "statistics". left_alone:
    a batch norm named by keep_norm.
    """

    name: str
    kind: str
    parameters: dict[str, tuple[int, ...]] = field(default_factory=dict)
    buffers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    fates: dict[str, Fate] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    same_as: str | None = None
    rates: int = 0
    per_step: tuple[str, ...] = ()
    steps: int = 0
    left_alone: bool = False

    @property
    def numbers(self) -> int:
        """How many numbers its parameters hold, each shared one counted where it is first."""
        return sum(math.prod(shape) for name, shape in self.parameters.items() if name not in self.shared)

    @property
    def done(self) -> str:
        """What was done, in words: "adapted", "learned only, per step x5", "no parameters"."""
        return ", ".join(words.text for words in self.words())

    def words(self) -> tuple[Words, ...]:
        """The same, in pieces."""
        if self.same_as is not None:
            return (Words(f"the same module as {printable(self.same_as)}", "dim"),)
        found = [Words("left alone", "alone")] if self.left_alone else []
        by_fate: dict[Fate, list[str]] = {}
        for name, fate in self.fates.items():
            by_fate.setdefault(fate, []).append(printable(name))
        mixed = len(by_fate) > 1
        for fate, tone in _TONES.items():
            if fate in by_fate:
                found.append(Words(f"{' and '.join(by_fate[fate])} {fate}" if mixed else fate, tone))
        found += [Words(f"{printable(name)} is {printable(first)}", "dim") for name, first in self.shared.items()]
        if self.per_step:
            alone = self.parameters and len(self.per_step) == 1
            part = {"affine": "scale and shift ", "statistics": "statistics "}[self.per_step[0]] if alone else ""
            found.append(Words(f"{part}per step x{self.steps}", "learned"))
        return tuple(found) or (Words("buffers only" if self.buffers else "no parameters", "dim"),)

    def line(self, above: str, depth: int, head: str | None) -> Line:
        """The row as a line of the table, below the module `above`."""
        shapes = [shape_text(shape) for shape in self.parameters.values()]
        if len(shapes) > _SHAPES_SHOWN:
            shapes = [*shapes[: _SHAPES_SHOWN - 1], f"{len(shapes) - _SHAPES_SHOWN + 1} more"]
        is_head = self.name == head and self.same_as is None
        return Line(
            label=printable(self.name[len(above) + 1 if above else 0 :] or "(the model itself)"),
            depth=depth,
            path=printable(self.name),
            kind=self.kind,
            shapes=", ".join(shapes),
            numbers=self.numbers if self.parameters else None,
            rates=self.rates or None,
            done=(*self.words(), Words("the head", "plain")) if is_head else self.words(),
        )


def module_lines(rows: Sequence[ModuleRow], head: str | None) -> list[Line]:
    """A line for every module that owns parameters or buffers, below a header for the module that they are parts of.

    Lists and modules of a single part have no header: their names stay in front of their children's.
    """
    owners = [row.name for row in rows if row.parameters or row.buffers]
    below = Counter(above for name in owners for above in _above(name))
    owners += [row.name for row in rows if row.same_as is not None and (row.same_as in below or row.same_as in owners)]
    below = Counter(above for name in owners for above in _above(name))
    own, kinds = set(owners), {row.name: row.kind for row in rows}
    alive = own | set(below)
    children: dict[str, list[str]] = {}
    for name in alive - {""}:
        children.setdefault(_above(name)[0], []).append(name)

    def is_header(name: str) -> bool:
        parts = children.get(name, [])
        plain = len(parts) == 1 and kinds[parts[0]] not in _LISTS
        return bool(name) and below[name] > 1 and kinds[name] not in _LISTS and not plain

    lines = []
    shown = {row.name for row in rows if row.name in own or is_header(row.name)}
    for row in rows:
        if row.name in shown:
            ancestors = [name for name in _above(row.name) if name and name in shown]
            above, depth = (ancestors or [""])[0], len(ancestors)
            if row.name in own:
                lines.append(row.line(above, depth, head))
            else:
                label = printable(row.name[len(above) + 1 if above else 0 :])
                lines.append(Line(label, "header", depth, printable(row.name), row.kind))
    return lines


def kinds_without_line(rows: Sequence[ModuleRow], lines: Sequence[Line]) -> str:
    """The modules that own nothing and hold nothing that does, counted by class; empty if there are none."""
    paths = [line.path for line in lines]
    kinds = Counter(
        row.kind
        for row in rows
        if row.same_as is None and not any(f"{path}.".startswith(f"{printable(row.name)}.") for path in paths)
        if row.name
    )
    return ", ".join(f"{count} {kind}" if count > 1 else kind for kind, count in kinds.most_common())


def _above(name: str) -> list[str]:
    """The names of the modules that hold it, nearest first; torch keeps dots out of a module's own name."""
    found = []
    while name:
        name = name.rpartition(".")[0]
        found.append(name)
    return found
