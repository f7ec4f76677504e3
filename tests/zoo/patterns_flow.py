"""Forwards whose way depends on the data, or on chance."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from entry import Entry
from pieces import SEQUENCES, VECTORS, Around, AroundSequence, Body
from torch import Tensor, nn


# --- control flow ----------------------------------------------------------------------------------------------------
class Branches(Body):
    def between(self, x: Tensor) -> Tensor:
        return torch.tanh(x) if x.sum().item() > 0 else 0.5 * x


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


class Experts(Body):
    """Each example goes to the expert that a router picks."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 3)
        self.experts = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])

    def between(self, x: Tensor) -> Tensor:
        weight, choice = torch.softmax(self.router(x), 1).max(1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
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
class Noisy(Body):
    def between(self, x: Tensor) -> Tensor:
        return torch.tanh(x + 0.1 * torch.randn_like(x) * self.training)


class Variational(Body):
    """Draws its weights: a Bayesian layer by reparametrisation."""

    def __init__(self) -> None:
        super().__init__()
        self.spread = nn.Parameter(torch.full((6, 6), -2.0))
        self.centre = nn.Parameter(torch.randn(6, 6) / 3)

    def between(self, x: Tensor) -> Tensor:
        weight = self.centre + F.softplus(self.spread) * torch.randn_like(self.centre)
        return torch.tanh(F.linear(x, weight if self.training else self.centre))


class StochasticDepth(Body):
    """Skips a block for whole examples, or the whole block by a Python draw."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(6, 6)

    def between(self, x: Tensor) -> Tensor:
        if not self.training:
            return torch.tanh(x + self.block(x))
        if torch.rand(()).item() < 0.3:
            return torch.tanh(x)
        kept = torch.bernoulli(torch.full((len(x), 1), 0.7, dtype=x.dtype)) / 0.7
        return torch.tanh(x + kept * self.block(x))


class Gumbel(Body):
    def between(self, x: Tensor) -> Tensor:
        return F.gumbel_softmax(x, tau=0.7, hard=True) if self.training else torch.softmax(x, 1)


_entry = partial(Entry, family="flow", tasks=VECTORS, quick=True)

PATTERNS = [
    _entry("branch on .item()", make=Branches),
    _entry("loop over examples", make=ExampleLoop),
    _entry("mixture of experts", make=Experts),
    _entry("recurrence that halts", make=Halting, tasks=SEQUENCES),
    *(
        _entry(kind.__name__, make=partial(lambda kind: Around(kind(0.3)), kind))
        for kind in (nn.Dropout, nn.AlphaDropout)
    ),
    _entry("noise in forward", make=Noisy),
    _entry("weights drawn in forward", make=Variational),
    _entry("stochastic depth", make=StochasticDepth),
    _entry("gumbel softmax", make=Gumbel),
]
