"""Classes of every kind, and trees of every shape."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from entry import Entry
from models import TiedNet
from pieces import VECTORS, Between, Body, Delegates, Whole, noise
from torch import Tensor, nn


# --- classes ---------------------------------------------------------------------------------------------------------
class Abstract(Body, ABC):
    @abstractmethod
    def unit(self, x: Tensor) -> Tensor: ...

    def between(self, x: Tensor) -> Tensor:
        return self.unit(x)


class Concrete(Abstract):
    def unit(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


class Registering(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        made.made_by = cls.__name__
        return made


class WithMetaclass(Body, metaclass=Registering):
    pass


class Slotted(Body):
    __slots__ = ("factor",)

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.3

    def between(self, x: Tensor) -> Tensor:
        return torch.tanh(self.factor * x)


class ReadsInner(Delegates):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


class OwnCall(Body):
    def __call__(self, x: Tensor) -> Tensor:
        return 1.5 * super().__call__(x)


class Layered(Body):
    """Keeps parameters behind properties and setters."""

    def __init__(self) -> None:
        super().__init__()
        self._raw = nn.Parameter(torch.zeros(6))

    @property
    def scale(self) -> Tensor:
        return F.softplus(self._raw)

    def between(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.scale)


@dataclass(eq=False)
class AsDataclass(nn.Module):
    inputs: int = 4
    hidden: int = 6

    def __post_init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(self.inputs, self.hidden)
        self.last = nn.Linear(self.hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


class OwnDeepcopy(Body):
    """Copies itself by its constructor and its state, as models with handles do."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = (token for token in "abc")

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnDeepcopy:
        made = OwnDeepcopy().double()
        made.load_state_dict(self.state_dict())
        return made


class ForwardArguments(Body):
    def forward(self, params: Tensor) -> Tensor:
        return super().forward(params)


class FewerNamed(Body):
    """Names the parameters that it wants trained, and no others."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return ((name, p) for name, p in super().named_parameters(*args, **kwargs) if not name.startswith("first"))


class SuperClassCall(nn.Linear):
    """Calls its parent's forward by name, not through super()."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.Linear.forward(self, x) + nn.functional.linear(x, self.weight * 0.1)


# --- shape of the tree -----------------------------------------------------------------------------------------------
class NoneChild(Body):
    def __init__(self) -> None:
        super().__init__()
        self.register_module("shortcut", None)
        self.register_parameter("scale", None)
        self.register_buffer("mask", None)


def lists() -> nn.Module:
    def forward(model: Any, x: Tensor) -> Tensor:
        for layer in model.layers[:2]:
            x = torch.tanh(layer(x))
        return model.layers[-1](x)

    return Whole(forward, layers=nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)]))


def branches() -> nn.Module:
    def forward(model: Any, x: Tensor) -> Tensor:
        for part in model.parts.values():
            x = part(x)
        return x

    return Whole(forward, parts=nn.ModuleDict({"a_b": nn.Linear(4, 6), "relu": nn.ReLU(), "out": nn.Linear(6, 3)}))


class Walks(Body):
    """Looks for its layers among its own submodules and parameters."""

    def layer(self) -> nn.Module:
        return next(part for part in self.modules() if isinstance(part, nn.Linear) and part.in_features == 4)

    def forward(self, x: Tensor) -> Tensor:
        penalty = sum(parameter.square().sum() for parameter in self.parameters())
        return self.last(torch.tanh(self.layer()(x))) * (1 + 0.01 * penalty)


class ByName(Body):
    def forward(self, x: Tensor) -> Tensor:
        named = dict(self.named_parameters())
        x = torch.tanh(F.linear(x, named["first.weight"], named["first.bias"]))
        return F.linear(x, self.get_parameter("last.weight"), self.get_submodule("last").bias)


def deep(depth: int = 60) -> nn.Module:
    model: nn.Module = nn.Linear(4, 3)
    for _ in range(depth):
        model = nn.Sequential(model)
    return model


def many(count: int = 300) -> nn.Module:
    layers = [nn.Linear(4, 4) for _ in range(count)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(torch.eye(4) + 0.02 * layer.weight)
    return nn.Sequential(*layers, nn.Linear(4, 3))


class Registered(Body):
    """Its parameters and children have names that collide with a module's own words."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Module()
        self.weights.items = nn.Parameter(torch.randn(6))
        self.weights.register_parameter("steps", nn.Parameter(torch.randn(6)))
        self.add_module("model", nn.Linear(6, 6))

    def between(self, x: Tensor) -> Tensor:
        return torch.tanh(self.model(x) * self.weights.items + self.weights.steps)


def _shared() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Sequential(layer), nn.Linear(4, 3))


def _lazy() -> nn.Module:
    model = nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(3))
    model(torch.zeros(2, 4))
    return model


_entry = partial(Entry, family="classes", tasks=VECTORS, quick=True)

PATTERNS = [
    _entry("ABC", make=Concrete, higher=False),
    _entry("metaclass", make=WithMetaclass, higher=False),
    _entry("__slots__", make=Slotted, higher=False),
    _entry("__getattr__ that delegates", make=lambda: ReadsInner(Body())),
    _entry("__call__ of its own", make=OwnCall),
    _entry("parameter behind a property", make=Layered),
    _entry("dataclass", make=AsDataclass),
    _entry("__deepcopy__ of its own", make=OwnDeepcopy),
    _entry("argument named params", make=ForwardArguments, higher=False),
    _entry(
        "test of an exact type",
        make=lambda: Between(lambda m, x: torch.tanh(x) if type(m.first) is nn.Linear else torch.sigmoid(x)),
        higher=False,
    ),
    _entry(
        "named_parameters of its own",
        make=FewerNamed,
        refused=r"named_parameters\(\) of its own, which leaves out first\.weight.*adapt=",
    ),
    _entry("parent's forward by name", make=lambda: nn.Sequential(SuperClassCall(4, 6), nn.Tanh(), nn.Linear(6, 3))),
    _entry("children, parameters and buffers that are None", make=NoneChild, higher=False),
    _entry("slice of a ModuleList", make=lists, higher=False),
    _entry(
        "slice of a Sequential",
        make=lambda: Whole(
            lambda m, x: m.layers[2:](m.layers[:2](x)),
            layers=nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)),
        ),
        higher=False,
    ),
    _entry("ModuleDict", make=branches),
    _entry("walks its own submodules", make=Walks),
    _entry("reads its own named_parameters", make=ByName, higher=False),
    _entry("60 modules deep", make=deep),
    _entry("300 layers", make=many, inner_lr=0.01),
    _entry("names that are words of torch, in a bare nn.Module", make=Registered, higher=False),
    _entry("one module three times", make=_shared),
    _entry("parameters and modules under two names", make=TiedNet, tasks=noise(6)),
    _entry("lazy modules, initialised", make=_lazy),
]
