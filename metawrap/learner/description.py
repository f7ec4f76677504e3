"""The facts of a description: a row for each module, and what wrapping found and did to the whole network."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from metawrap.learner.description_page import Line, Page, Tone, Words, printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

Shape = tuple[int, ...]
Fate = Literal["adapted", "adapted from a frozen start", "unused", "learned only", "frozen", "shared"]

_TONES: dict[Fate, Tone] = {
    "adapted": "adapted",
    "adapted from a frozen start": "adapted",
    "unused": "unused",
    "learned only": "learned",
    "frozen": "frozen",
}
# Modules of these classes have no header: the dotted names of their children hold their names.
_LISTS = frozenset({"Sequential", "ModuleList", "ModuleDict"})
_SHAPES_SHOWN = 4
_LATER = "known after the first task"
_NORMS = {
    "batch": "each batch's own statistics, always (transductive)",
    "running": "stored statistics in evaluation; with an inner loop they correct the support set's (inductive)",
    "support": "the target passes use the support set's statistics (inductive)",
    "task": "TaskNorm-I: the support set's statistics, blended with those of each example by channel (inductive)",
    "task_layer": "TaskNorm-L: the support set's statistics, blended with those of each example (inductive)",
}


@dataclass(frozen=True)
class ModuleRow:
    """One module of the user's network, and what wrapping did to it.

    >>> from metawrap import MAML
    >>> from torch import nn
    >>> MAML(nn.Linear(4, 3), inner_steps=1).describe().modules[0].done
    'adapted'

    name: dotted; "" is the network itself. kind: the user's class. parameters, buffers: of the module, without those of
    its children, by local name, with their shapes in the learner: a per-step tensor has a leading step axis.
    fates: what happens to each parameter. "unused": the support loss does not depend on the parameter, so it is not
    adapted. "shared": the parameter belongs to an earlier module, too, and is counted there; `shared` has its full
    name. same_as: the earlier name of a module that is registered twice. rates: inner learning rates of its
    parameters. steps: rows of its per-step tensors. per_step: which of its tensors are per-step, "affine" (scale and
    shift) or "statistics". left_alone: the module is a batch norm that keep_norm names.
    """

    name: str
    kind: str
    parameters: dict[str, Shape] = field(default_factory=dict)
    buffers: dict[str, Shape] = field(default_factory=dict)
    fates: dict[str, Fate] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    same_as: str | None = None
    rates: int = 0
    per_step: tuple[str, ...] = ()
    steps: int = 0
    left_alone: bool = False

    @property
    def numbers(self) -> int:
        """How many numbers its parameters hold. A shared parameter counts in its first module only."""
        return sum(math.prod(shape) for name, shape in self.parameters.items() if name not in self.shared)

    @property
    def done(self) -> str:
        """What was done, in words: "adapted", "learned only, per step x5", "no parameters"."""
        return ", ".join(words.text for words in self.words())

    def words(self) -> tuple[Words, ...]:
        """What was done, in pieces with a tone each."""
        if self.same_as is not None:
            return (Words(f"the same module as {printable(self.same_as)}", "dim"),)
        found = [Words("left alone", "alone")] if self.left_alone else []
        by_fate: dict[Fate, list[str]] = {}
        for name, fate in self.fates.items():
            by_fate.setdefault(fate, []).append(printable(name))
        for fate, tone in _TONES.items():
            if fate in by_fate:
                found.append(Words(f"{' and '.join(by_fate[fate])} {fate}" if len(by_fate) > 1 else fate, tone))
        found += [Words(f"{printable(name)} is {printable(first)}", "dim") for name, first in self.shared.items()]
        if self.per_step:
            is_part = self.parameters and len(self.per_step) == 1
            part = {"affine": "scale and shift ", "statistics": "statistics "}[self.per_step[0]] if is_part else ""
            found.append(Words(f"{part}per step x{self.steps}", "learned"))
        return tuple(found) or (Words("buffers only" if self.buffers else "no parameters", "dim"),)


@dataclass(frozen=True, repr=False)
class Description:
    """What wrapping found and did. Prints as a table; `rich.print` adds colours, and a notebook shows HTML.

    >>> from metawrap import MAML
    >>> from torch import nn
    >>> list(MAML(nn.Linear(4, 3), inner_steps=1).describe().adapted)
    ['weight', 'bias']

    adapted, learned_only, frozen: names and shapes of the parameters that the inner loop adapts, that only the outer
    loop learns, and that neither loop changes. Each parameter is in one of the three. swapped, left_alone: names of
    batch norms. rates: the number of inner learning rates. rate_range: their lowest and highest value at present.
    head: the module that makes the prediction. seen: whether the learner has seen a task. Before its first task, the
    head (unless it was named), unused parameters and faults of the engine are unknown. modules: a row for each module
    of the network, in order. speed: how tasks are run, and why.
    """

    method: str
    model: str
    settings: dict[str, Any]
    adapted: dict[str, Shape]
    learned_only: dict[str, Shape]
    frozen: dict[str, Shape]
    swapped: list[str]
    left_alone: list[str]
    head: str | None
    engine: str
    engine_reason: str
    rates: int
    notes: list[str]
    warnings: list[str]
    modules: list[ModuleRow]
    rate_range: tuple[float, float] | None
    seen: bool
    speed: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for strict JSON; infinity and NaN become words."""
        text = json.dumps(asdict(self), default=str)
        plain: dict[str, Any] = json.loads(text, parse_constant=lambda name: str(float(name)))
        for stored, row in zip(plain["modules"], self.modules, strict=True):
            stored.update(numbers=row.numbers, done=row.done)
        return plain

    def page(self) -> Page:
        """The description as words, for any medium to show."""
        lines = _module_lines(self.modules, self.head)
        return Page(
            title=f"{self.method} around {self.model}",
            lines=lines,
            totals=self._totals(),
            more=_kinds_without_line(self.modules, lines),
            facts=[(label, printable(text)) for label, text in self._facts().items() if text],
            settings=[(name, printable(repr(each)).replace(", ", ",")) for name, each in self.settings.items()],
            notes=[printable(note) for note in self.notes],
            warnings=[printable(warning) for warning in self.warnings],
        )

    def __str__(self) -> str:
        return self.page().as_text(shutil.get_terminal_size((100, 24)).columns)

    __repr__ = __str__

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        return self.page().rendered(options)

    def _repr_html_(self) -> str:
        return self.page().as_html()

    def _totals(self) -> list[Line]:
        groups = (
            ("adapted", self.adapted, "in the inner loop", self.rates or None),
            ("learned only", self.learned_only, "in the outer loop only", None),
            ("frozen", self.frozen, "in neither loop", None),
        )
        return [
            Line(
                label=title,
                role="total",
                shapes=f"{len(shapes)} tensor{'s' if len(shapes) > 1 else ''}",
                numbers=sum(math.prod(shape) for shape in shapes.values()),
                rates=rates,
                done=(Words(meaning, "dim"),),
            )
            for title, shapes, meaning, rates in groups
            if shapes
        ]

    def _facts(self) -> dict[str, str]:
        """The lines below the table, by label; "" where a method has none."""
        unused = sum(fate == "unused" for row in self.modules for fate in row.fates.values())
        whole = f" of the {len(self.adapted)} adapted" if self.adapted else ""
        found = f"{unused}{whole} tensors" if unused else "nothing"
        head, start = (
            self.head or ("not found" if self.seen else _LATER),
            self.settings.get("outputs.head_init", "learned"),
        )
        engine = ": ".join(filter(None, [self.engine, self.engine_reason]))
        if self.engine == "higher":
            engine += f"; its gradient is {'that of functional' if self.seen else 'checked on the first task'}"
        return {
            "head": head if start == "learned" else f'{head} (outputs.head_init="{start}")',
            "unused": found if self.seen else _LATER,
            "inner rates": self._rates_text(),
            "batch norm": self._norm_text(),
            "gradient": _order(self.settings),
            "engine": engine,
            "speed": self.speed,
        }

    def _rates_text(self) -> str:
        if self.rate_range is None:
            return ""
        low, high = (f"{value:.3g}" for value in self.rate_range)
        learned = "learned" if self.settings.get("learn_inner_lr") else "fixed"
        return f"{self.rates:,}, {learned}, " + (f"all {low}" if low == high else f"{low} to {high}")

    def _norm_text(self) -> str:
        norm = self.settings.get("norm")
        if norm is None:
            return ""
        if not self.swapped:
            return "all left alone, on their stored statistics" if self.left_alone else "none in this network"
        alone = f"; {len(self.left_alone)} left alone" if self.left_alone else ""
        return f'{len(self.swapped)} under norm="{norm}": {_NORMS.get(norm, "")}{alone}'


def _order(settings: Mapping[str, Any]) -> str:
    epochs = settings.get("first_order_epochs")
    if epochs is None:
        return ""
    if not epochs:
        return "second order"
    return "first order" if math.isinf(epochs) else f"first order until epoch {epochs}, then second order"


def _module_lines(rows: Sequence[ModuleRow], head: str | None) -> list[Line]:
    """A line for each module that owns parameters or buffers, and a header above the parts of a block.

    Lists and modules of a single part have no header. Their names stay in front of the names of their children.
    """
    kinds = {row.name: row.kind for row in rows}
    own = {row.name for row in rows if row.parameters or row.buffers}
    known = own.union(*map(_above, own))
    own |= {row.name for row in rows if row.same_as in known}
    below = Counter(above for name in own for above in _above(name))
    children: dict[str, list[str]] = {}
    for name in own.union(below) - {""}:
        children.setdefault(_above(name)[0], []).append(name)

    def is_header(name: str) -> bool:
        parts = children.get(name, [])
        is_wrapper = len(parts) == 1 and kinds[parts[0]] not in _LISTS
        return bool(name) and below[name] > 1 and kinds[name] not in _LISTS and not is_wrapper

    shown = {row.name for row in rows if row.name in own or is_header(row.name)}
    lines = []
    for row in (row for row in rows if row.name in shown):
        ancestors = [name for name in _above(row.name) if name and name in shown]
        start = len(ancestors[0]) + 1 if ancestors else 0
        label = printable(row.name[start:] or "(the model itself)")
        place: dict[str, Any] = {"label": label, "depth": len(ancestors), "path": printable(row.name), "kind": row.kind}
        cells = _cells(row, head) if row.name in own else {"role": "header"}
        lines.append(Line(**place, **cells))
    return lines


def _cells(row: ModuleRow, head: str | None) -> dict[str, Any]:
    shapes = ["x".join(map(str, shape)) or "scalar" for shape in row.parameters.values()]
    if len(shapes) > _SHAPES_SHOWN:
        shapes = [*shapes[: _SHAPES_SHOWN - 1], f"{len(shapes) - _SHAPES_SHOWN + 1} more"]
    is_head = row.name == head and row.same_as is None
    done = (*row.words(), Words("the head")) if is_head else row.words()
    numbers = row.numbers if row.parameters else None
    return {"shapes": ", ".join(shapes), "numbers": numbers, "rates": row.rates or None, "done": done}


def _kinds_without_line(rows: Sequence[ModuleRow], lines: Sequence[Line]) -> str:
    """The modules that have no line and no part with a line, counted by class; "" if there are none."""
    paths = [f"{line.path}." for line in lines]
    kinds = Counter(
        row.kind
        for row in rows
        if row.name and row.same_as is None
        if not any(path.startswith(f"{printable(row.name)}.") for path in paths)
    )
    return ", ".join(f"{count} {kind}" if count > 1 else kind for kind, count in kinds.most_common())


def _above(name: str) -> list[str]:
    """The names of the modules that hold a module, nearest first. Torch allows no dots in a module's own name."""
    found = []
    while name:
        name = name.rpartition(".")[0]
        found.append(name)
    return found
