"""What wrapping found and did: the facts, and the page that shows them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from metawrap.learner.description_page import Line, Page, Words, printable
from metawrap.learner.module_rows import ModuleRow, kinds_without_line, module_lines
from metawrap.learner.notebook import html
from metawrap.learner.terminal import plain_text, render

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

Shapes = dict[str, tuple[int, ...]]

_LATER = "known after the first task"
_NORMS = {
    "batch": "each batch's own statistics, always (transductive)",
    "running": "the batch's own statistics in training, stored ones in evaluation (inductive)",
    "support": "the target passes use the support set's statistics (inductive)",
}


@dataclass(frozen=True, repr=False)
class Description:
    """What wrapping found and did. Prints as a table; in a terminal `rich.print` adds colours, a notebook shows HTML.

    adapted, learned_only, frozen: names and shapes of the parameters that the inner loop adapts, that only the outer
    loop learns, and that neither changes: each parameter is in one of them. swapped, left_alone: names of batch norms.
    rates: how many inner learning rates there are; rate_range: their lowest and highest value at present.
    head: the module that makes the prediction. seen: whether the learner has looked at a task; before that the head
    (unless it was named), unused parameters and a fault of the engine are not known. modules: a row for each module of
    the network, in order. speed: how tasks are run, and why so.
    """

    method: str
    model: str
    settings: dict[str, Any]
    adapted: Shapes
    learned_only: Shapes
    frozen: Shapes
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
        """Plain values only, fit for JSON; a number that is not finite is a word."""
        plain: dict[str, Any] = _finite(asdict(self))
        for stored, row in zip(plain["modules"], self.modules, strict=True):
            stored.update(numbers=row.numbers, done=row.done)
        return plain

    def page(self) -> Page:
        """All of it as words, for a medium to show."""
        lines = module_lines(self.modules, self.head)
        return Page(
            title=f"{self.method} around {self.model}",
            lines=lines,
            totals=self._totals(),
            more=kinds_without_line(self.modules, lines),
            facts=[(label, printable(text)) for label, text in self._facts()],
            settings=[(name, _value(value)) for name, value in self.settings.items()],
            notes=[printable(note) for note in self.notes],
            warnings=[printable(warning) for warning in self.warnings],
        )

    def __str__(self) -> str:
        return plain_text(self.page(), shutil.get_terminal_size((100, 24)).columns)

    def __repr__(self) -> str:
        return str(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        return render(self.page(), options)

    def _repr_html_(self) -> str:
        return html(self.page())

    def _totals(self) -> list[Line]:
        groups = (
            ("adapted", self.adapted, "in the inner loop"),
            ("learned only", self.learned_only, "in the outer loop only"),
            ("frozen", self.frozen, "in neither loop"),
        )
        return [
            Line(
                label=title,
                role="total",
                shapes=f"{len(shapes)} tensor{'s' if len(shapes) > 1 else ''}",
                numbers=sum(math.prod(shape) for shape in shapes.values()),
                rates=self.rates or None if title == "adapted" else None,
                done=(Words(meaning, "dim"),),
            )
            for title, shapes, meaning in groups
            if shapes
        ]

    def _facts(self) -> list[tuple[str, str]]:
        unused = sum(fate == "unused" for row in self.modules for fate in row.fates.values())
        whole = f" of the {len(self.adapted)} adapted" if self.adapted else ""
        said = f"{unused}{whole} tensors" if unused else "nothing"
        facts = [
            ("head", self._head_text()),
            ("unused", said if self.seen else _LATER),
            ("inner rates", self._rates_text()),
            ("batch norm", self._norm_text()),
            ("gradient", _order(self.settings)),
            ("engine", self._engine_text()),
            ("speed", self.speed),
        ]
        return [(label, text) for label, text in facts if text]

    def _head_text(self) -> str:
        start = self.settings.get("outputs.head_init", "learned")
        name = self.head or ("not found" if self.seen else _LATER)
        return name if start == "learned" else f'{name} (outputs.head_init="{start}")'

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

    def _engine_text(self) -> str:
        if not self.engine:
            return ""
        if self.engine != "higher":
            return f"{self.engine}: {self.engine_reason}"
        check = "its gradient is that of functional" if self.seen else "its gradient is checked on the first task"
        return f"{self.engine}: {self.engine_reason}; {check}"


def _order(settings: Mapping[str, Any]) -> str:
    epochs = settings.get("first_order_epochs")
    if epochs is None:
        return ""
    if not epochs:
        return "second order"
    return "first order" if math.isinf(epochs) else f"first order until epoch {epochs}, then second order"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _value(value: Any) -> str:
    return printable(repr(value)).replace(", ", ",")
