"""Buffers, attributes and weights that forward edits, replaces, shares or counts in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from entry import Entry
from pieces import VECTORS, Between, Body
from torch import Tensor, nn


# --- buffers ---------------------------------------------------------------------------------------------------------
class Counts(Body):
    """Counts its calls and averages its input, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(6))

    def between(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            self.average.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return torch.tanh(x - self.average)


class Rescales(Counts):
    """Multiplies by what it edits in place: the backward pass needs the value of its own call."""

    def between(self, x: Tensor) -> Tensor:
        return super().between(x * (1 + self.average) * (1 + 0.1 * self.calls))


def _scale(buffer: Tensor, value: Tensor) -> None:
    buffer.mul_(0.9).add_(value, alpha=0.1)


def _scale_data(buffer: Tensor, value: Tensor) -> None:
    buffer.data.mul_(0.9).add_(value, alpha=0.1)  # torch does not count an edit of `.data`.


def _scale_anew(buffer: Tensor, value: Tensor) -> None:
    buffer.data = 0.9 * buffer + 0.1 * value


def _divides(model: Any, x: Tensor) -> Tensor:
    if model.training:
        model.edit(model.scale, x.detach().abs().mean(0))
    return torch.tanh(x / model.scale)


def divides(edit: Callable[[Tensor, Tensor], None]) -> nn.Module:
    """Divides by a running scale that it edits: each backward pass needs the value of its own call."""
    return Between(_divides, scale=torch.ones(6), edit=edit)


class Replaces(Counts):
    """Replaces its buffers by new ones."""

    def between(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls = self.calls + 1
            self.average = 0.9 * self.average + 0.1 * x.detach().mean(0)
        return torch.tanh(x * (1 + self.average))


class Shares(Body):
    """One buffer, edited in place, under two names, and its value is needed by the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(6, dtype=torch.float64))
        self.other = nn.Linear(6, 6)
        self.other.register_buffer("scale", self.scale)

    def between(self, x: Tensor) -> Tensor:
        if self.training:
            self.scale.mul_(1.1)
        return torch.tanh(self.other(x) * self.other.scale)


class EditsByFunction(Counts):
    """Has torch's batch norm as a function edit its buffers, which raises no version, and multiplies by one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("spread", torch.ones(6))

    def between(self, x: Tensor) -> Tensor:
        F.batch_norm(x.detach(), self.average, self.spread, training=self.training)
        return torch.tanh((x - self.average) * self.spread)


class Alias(Body):
    """Holds a buffer in a plain attribute, too, whole or in part, and reads it there; `edits` it where it owns it."""

    def __init__(self, part: bool = False, edits: Callable[[Tensor, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.register_buffer("ema", torch.ones(6, dtype=torch.float64))  # double() would leave the other as it is
        self.edits = edits
        self.also = [self.ema[:3] if part else self.ema]

    def between(self, x: Tensor) -> Tensor:
        if self.training and self.edits:
            self.edits(self.ema, x.detach().mean(0))
        return torch.tanh(x * self.also[0].mean())


def _keeps_graph(model: Any, x: Tensor) -> Tensor:
    if model.training and model.in_place:
        model.ema.mul_(0.9).add_(x.mean(0) * 0.1)
    elif model.training:
        model.ema = 0.9 * model.ema + 0.1 * x.mean(0)
    return torch.tanh(x - model.ema)


def keeps_graph(in_place: bool) -> nn.Module:
    """Averages its hidden layer with its graph, in place or into a new tensor, and reads the average at later calls."""
    return Between(_keeps_graph, ema=torch.zeros(6), in_place=in_place)


def _keeps_last(model: Any, x: Tensor) -> Tensor:
    if model.in_place:
        model.recent.copy_(x.mean(0))
    else:
        model.recent = x.mean(0)
    return torch.tanh(x * (1 + model.recent))


def keeps_last(in_place: bool) -> nn.Module:
    """Keeps its hidden layer's mean with its graph, in place or as a new tensor, and reads it in the same call only."""
    return Between(_keeps_last, recent=torch.zeros(6), in_place=in_place)


def _codebook(model: Any, x: Tensor) -> Tensor:
    """Vector quantisation with a codebook that is a moving average, and straight-through gradients."""
    nearest = (x.detach()[:, None] - model.codes).square().sum(2).argmin(1)
    chosen = model.codes[nearest]
    if model.training:
        with torch.no_grad():
            model.codes.index_add_(0, nearest, 0.1 * (x - chosen))
    return torch.tanh(x + (chosen - x).detach() + 0.1 * x * chosen)


class Grows(Body):
    """A memory that grows by each call's examples, and one that the first call fills."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(0, 6))
        self.register_buffer("centre", None)

    def between(self, x: Tensor) -> Tensor:
        if self.centre is None:
            self.centre = x.detach().mean(0)
        if self.training:
            self.memory = torch.cat([self.memory, x.detach()])
        return torch.tanh(x - self.centre + (self.memory.mean(0) if len(self.memory) else 0))


def _counts_in_python(model: Any, x: Tensor) -> Tensor:
    model.calls += 1
    model.seen = x.detach()
    return torch.tanh(x) if model.calls % 2 else torch.tanh(1.1 * x)


class Remembers(Body):
    """Assigns a weight to an attribute in forward."""

    def forward(self, x: Tensor) -> Tensor:
        self.recent = self.first.weight
        return self.last(torch.tanh(F.linear(x, self.recent, self.first.bias)))


class Momentum(Body):
    """A slow copy of its own layer, moved at each call, as momentum contrast does."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = nn.Linear(4, 6).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                for slow, fast in zip(self.slow.parameters(), self.first.parameters(), strict=True):
                    slow.mul_(0.9).add_(0.1 * fast)
        return self.last(torch.tanh(self.first(x) * self.slow(x)))


_entry = partial(Entry, family="state", tasks=VECTORS, quick=True)

PATTERNS = [
    _entry("counts in buffers", make=Counts),
    _entry("multiplies by a buffer that it edits", make=Rescales),
    _entry("divides by a buffer that it edits", make=partial(divides, _scale)),
    _entry("buffers that grow", make=Grows, adapted_alone=False),
    _entry("replaces its buffers", make=Replaces),
    _entry("one edited buffer under two names", make=Shares),
    _entry("edits a buffer's data", make=partial(divides, _scale_data)),
    _entry("assigns a buffer's data", make=partial(divides, _scale_anew)),
    _entry("edits buffers by batch_norm", make=EditsByFunction),
    _entry("a buffer that is held twice", make=Alias),
    _entry("a buffer that is held in part", make=partial(Alias, part=True)),
    *(
        _entry(
            f"a buffer that is {name}",
            make=partial(Alias, part, edits),
            refused=r"buffer 'ema', which forward edits.*'the model itself' \(Alias\).*'also'.*register_buffer",
        )
        for name, part, edits in [
            ("edited and held twice", False, _scale),
            ("edited and held in part", True, _scale),
            ("edited as data and held twice", False, _scale_data),
        ]
    ),
    *(
        entry
        for name, in_place in [("in place", True), ("anew", False)]
        for entry in [
            _entry(
                f"writes a graph into a buffer {name}",
                make=partial(keeps_graph, in_place),
                refused=r"graph into its buffer 'ema'.*Detach",
            ),
            # A copy of a model with a graph in a buffer cannot be made.
            _entry(
                f"writes a graph {name} for the same call", make=partial(keeps_last, in_place), adapted_alone=in_place
            ),
        ]
    ),
    _entry("codebook", make=lambda: Between(_codebook, codes=torch.randn(5, 6))),
    _entry("counts in Python", make=partial(Between, _counts_in_python, calls=0, seen=None), adapted_alone=False),
    _entry(
        "assigns a weight to an attribute",
        make=Remembers,
        refused=r"\(Remembers\) is given a weight as its attribute 'recent'.*local",
    ),
    _entry("slow copy of its own layer", make=Momentum),
]
