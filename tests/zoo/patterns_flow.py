"""Forwards whose way depends on the data, or on chance."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from entry import Entry
from pieces import SEQUENCES, VECTORS, Around, AroundSequence, Between, Body
from torch import Tensor, nn


# --- control flow ----------------------------------------------------------------------------------------------------
class ExampleLoop(Body):
    """One example at a time, each for as long as its data say."""

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for row in x:
            hidden = self.first(row)
            for _ in range(int(row.abs().sum().item()) % 3):
                hidden = torch.tanh(hidden)
            rows.append(self.last(hidden))
        return torch.stack(rows)


def _experts(model: Any, x: Tensor) -> Tensor:
    """Each example goes to the expert that a router picks."""
    weight, choice = torch.softmax(model.router(x), 1).max(1)
    out = torch.zeros_like(x)
    for number, expert in enumerate(model.experts):
        (rows,) = torch.where(choice == number)
        out = out.index_add(0, rows, expert(x[rows]) * weight[rows, None])
    return torch.tanh(out)


class Halting(AroundSequence):
    """Recurrence until a condition on the data holds."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x)).mean(1)
        for _ in range(6):
            x = torch.tanh(self.layer(x)) + 0.3
            if bool((x.norm(dim=1) > 1.2).all()):
                break
        return self.last(x)


# --- randomness ------------------------------------------------------------------------------------------------------
def _drawn_weights(model: Any, x: Tensor) -> Tensor:
    """A Bayesian layer by reparametrisation."""
    weight = model.centre + F.softplus(model.spread) * torch.randn_like(model.centre)
    return torch.tanh(F.linear(x, weight if model.training else model.centre))


def _stochastic_depth(model: Any, x: Tensor) -> Tensor:
    """Skips a block for whole examples, or the whole block by a Python draw."""
    if not model.training:
        return torch.tanh(x + model.block(x))
    if torch.rand(()).item() < 0.3:
        return torch.tanh(x)
    kept = torch.bernoulli(torch.full((len(x), 1), 0.7, dtype=x.dtype)) / 0.7
    return torch.tanh(x + kept * model.block(x))


def _gumbel(model: Any, x: Tensor) -> Tensor:
    return F.gumbel_softmax(x, tau=0.7, hard=True) if model.training else torch.softmax(x, 1)


_entry = partial(Entry, family="flow", tasks=VECTORS, quick=True)

PATTERNS = [
    _entry("branch on .item()", make=lambda: Between(lambda _, x: torch.tanh(x) if x.sum().item() > 0 else 0.5 * x)),
    _entry("loop over examples", make=ExampleLoop),
    _entry(
        "mixture of experts",
        make=lambda: Between(
            _experts, router=nn.Linear(6, 3), experts=nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        ),
    ),
    _entry("recurrence that halts", make=Halting, tasks=SEQUENCES),
    *(
        _entry(kind.__name__, make=partial(lambda kind: Around(kind(0.3)), kind))
        for kind in (nn.Dropout, nn.AlphaDropout)
    ),
    _entry(
        "noise in forward", make=lambda: Between(lambda m, x: torch.tanh(x + 0.1 * torch.randn_like(x) * m.training))
    ),
    _entry(
        "weights drawn in forward",
        make=lambda: Between(
            _drawn_weights, spread=nn.Parameter(torch.full((6, 6), -2.0)), centre=nn.Parameter(torch.randn(6, 6) / 3)
        ),
    ),
    _entry("stochastic depth", make=lambda: Between(_stochastic_depth, block=nn.Linear(6, 6))),
    _entry("gumbel softmax", make=partial(Between, _gumbel)),
]
