"""Weights that are made of others: parametrized, pruned, low-rank, of a hypernetwork."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from entry import Entry
from pieces import VECTORS, Around, Between, Body
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune


# --- parametrized and pruned -----------------------------------------------------------------------------------------
class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).T


class Scaled(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale[:, None] * x


def parametrized(how: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
    return partial(_parametrized, how)


def _parametrized(how: Callable[[nn.Module], Any]) -> nn.Module:
    model = Around(nn.Linear(6, 6))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # The legacy forms are deprecated; people have them all the same.
        how(model.layer)
    return model


def _on(parametrization: Callable[[], nn.Module]) -> Callable[[nn.Module], Any]:
    return lambda layer: parametrize.register_parametrization(layer, "weight", parametrization())


def _two(layer: nn.Module) -> None:
    _on(Symmetric)(layer)
    _on(Scaled)(layer)


class Cached(Around):
    def forward(self, x: Tensor) -> Tensor:
        with parametrize.cached():
            return super().forward(x) + super().forward(0.5 * x)


def _cached() -> nn.Module:
    model = Cached(nn.Linear(6, 6))
    parametrizations.weight_norm(model.layer)
    return model


def _twice_cached() -> nn.Module:
    model = _parametrized(_on(Symmetric))
    parametrizations.spectral_norm(model.first)
    return model


def _masked(layer: nn.Module) -> None:
    prune.custom_from_mask(layer, "weight", (torch.arange(36).reshape(6, 6) % 3 > 0).double())


class LowRank(Body):
    """LoRA: a frozen layer with two small factors beside it, one of which starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, 4))
        self.up = nn.Parameter(torch.zeros(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x) + x @ self.down.T @ self.up.T))


class DropsWeights(Body):
    """Puts a dropped-out weight in its own slot before use, as AWD-LSTM does."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(self.first.weight.detach().clone())
        del self.first._parameters["weight"]
        self.first.weight = self.raw.detach()

    def forward(self, x: Tensor) -> Tensor:
        self.first.weight = F.dropout(self.raw, 0.3) if self.training else self.raw * 1
        return super().forward(x)


def _views(model: Any, x: Tensor) -> Tensor:
    weight, bias = model.flat.split([36, 6])
    return torch.tanh(F.linear(x, weight.view(6, 6), bias))


def tests_for_parameter() -> nn.Module:
    """Scales only by what is a parameter: in a twin with plain tensors it would scale by nothing."""
    run = lambda m, x: torch.tanh(x * m.scale if isinstance(m.scale, nn.Parameter) else x)
    return Between(run, scale=nn.Parameter(torch.full((6,), 0.7)))


def graph() -> nn.Module:
    """A graph network: a sparse adjacency matrix is a buffer."""
    near = (torch.rand(6, 6) > 0.5).double().to_sparse()
    return Between(lambda m, x: torch.tanh(torch.sparse.mm(m.near, x.T).T), near=near)


def hypernetwork() -> nn.Module:
    """One layer's weights are another's output."""
    run = lambda m, x: torch.tanh(F.linear(x, m.maker(m.code).view(6, 6)))
    return Between(run, code=nn.Parameter(torch.randn(3)), maker=nn.Linear(3, 36))


_entry = partial(Entry, family="parametrized", tasks=VECTORS, quick=True)

PATTERNS = [
    _entry("weight_norm", make=parametrized(parametrizations.weight_norm), higher=False),
    _entry("spectral_norm", make=parametrized(parametrizations.spectral_norm), higher=False),
    _entry("orthogonal", make=parametrized(parametrizations.orthogonal), higher=False, inner_lr=0.01),
    _entry(
        "orthogonal, Cayley",
        make=parametrized(partial(parametrizations.orthogonal, orthogonal_map="cayley")),
        higher=False,
    ),
    _entry(
        "orthogonal, Householder",
        make=parametrized(partial(parametrizations.orthogonal, orthogonal_map="householder")),
        higher=False,
    ),
    _entry("parametrization of one's own", make=parametrized(_on(Symmetric)), higher=False),
    _entry("two parametrizations, one with a parameter", make=parametrized(_two), higher=False),
    _entry("cached parametrization", make=_cached, higher=False),
    _entry("two parametrized layers", make=_twice_cached, higher=False),
    _entry("legacy weight_norm", make=parametrized(nn.utils.weight_norm)),
    _entry("legacy spectral_norm", make=parametrized(nn.utils.spectral_norm)),
    _entry("pruned", make=parametrized(_masked)),
    _entry(
        "pruned twice", make=parametrized(lambda layer: (_masked(layer), prune.l1_unstructured(layer, "weight", 3)))
    ),
    _entry("low-rank adapters", make=LowRank),
    _entry("isinstance(weight, nn.Parameter)", make=tests_for_parameter, higher=False),
    _entry("weights dropped out in their own slots", make=DropsWeights, adapted_alone=False),
    _entry("sparse buffer", make=graph),
    _entry("hypernetwork", make=hypernetwork),
    _entry(
        "layers that are views of one parameter", make=lambda: Between(_views, flat=nn.Parameter(torch.randn(42) / 3))
    ),
]
