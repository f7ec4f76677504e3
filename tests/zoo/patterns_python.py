"""Python habits: how inputs and outputs look, where modules and functions are kept, and what classes they are of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from entry import Entry
from models import Mlp
from pieces import VECTORS, Body, of_inputs
from torch import Tensor, nn


# --- inputs and outputs ----------------------------------------------------------------------------------------------
class Keywords(nn.Module):
    """Takes keywords, ones it does not know too, and an argument with a default."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(2, 5), nn.Linear(2, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, left: Tensor, right: Tensor | None = None, *, scale: float = 1.0, **others: Any) -> Tensor:
        x = self.left(left) * scale
        x = x if right is None else x + self.right(right)
        return self.last(torch.tanh(x + sum(value.mean() for value in others.values())))


def _keywords(x: Tensor) -> dict[str, Any]:
    return {"left": x[:, :2], "right": x[:, 2:], "others": x.abs()}


class Pair(NamedTuple):
    logits: Tensor
    features: Tensor


@dataclass
class Output:
    logits: Tensor
    others: dict[str, Any] = field(default_factory=dict)


class Gives(Body):
    """Its output is what `form` makes of the logits and the features."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> Any:
        features = torch.tanh(self.first(x))
        return self.form(self.last(features), features)


def _both(logits: Tensor, features: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y) + 0.1 * features.square().mean()


OUTPUTS: dict[str, tuple[Callable[..., Any], Callable[..., Tensor]]] = {
    "a tuple": (lambda logits, features: (logits, features), lambda out, y: _both(*out, y)),
    "a named tuple": (Pair, lambda out, y: _both(*out, y)),
    "a dict": (
        lambda logits, features: {"logits": logits, "f": [features]},
        lambda o, y: _both(o["logits"], o["f"][0], y),
    ),
    "a dataclass": (lambda logits, f: Output(logits, {"f": f}), lambda out, y: _both(out.logits, out.others["f"], y)),
    "an object": (
        lambda logits, f: type("Any", (), {"logits": logits})(),
        lambda out, y: F.cross_entropy(out.logits, y),
    ),
    "its own loss": (
        lambda logits, features: (logits, features.square().mean()),
        lambda o, y: F.cross_entropy(o[0], y) + o[1],
    ),
}


# --- where modules and functions are kept ----------------------------------------------------------------------------
class Keeps(Body):
    """Registered as usual, and reached through something else that `way` makes of the model."""

    def __init__(self, way: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.kept = way(self)

    def between(self, x: Tensor) -> Tensor:
        kept = self.kept
        while not callable(kept):
            kept = next(iter(kept.values() if isinstance(kept, dict) else kept))
        return torch.tanh(kept(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(x))


def _partial_of_method(model: Any) -> Any:
    return partial(model.first.forward)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def _closure(model: Any) -> Any:
    first = model.first
    return lambda x: first(x)


def _default(model: Any) -> Any:
    return lambda x, layer=model.first: layer(x)


def _decorated(model: Any) -> Any:
    first = model.first

    @functools.wraps(_linear)
    def run(x: Tensor) -> Tensor:
        return first(x)

    return run


class CallsIt:
    """An object that is no module, and holds one."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer(x)


WAYS: dict[str, Callable[[Any], Any]] = {
    "a list": lambda model: [model.first],
    "a dict in a tuple": lambda model: ({"first": model.first},),
    "a bound method": lambda model: model.first.forward,
    "a bound __call__ in a list": lambda model: [model.first.__call__],
    "a closure": _closure,
    "a closure in a list": lambda model: [_closure(model)],
    "a closure in a dict": lambda model: {"run": _closure(model)},
    "a default argument": _default,
    "a decorated closure": _decorated,
    "a closure over a closure": lambda model: (lambda inner: lambda x: inner(x))(_closure(model)),
    "a partial of a bound method": _partial_of_method,
    "a partial of a function with the module": lambda model: partial(_linear, model.first),
    "a partial of a closure": lambda model: partial(_closure(model)),
    "an object that is no module": lambda model: CallsIt(model.first),
    "a closure over a list": lambda model: (lambda layers: lambda x: layers[0](x))([model.first]),
    "a closure over an object": lambda model: (lambda held: lambda x: held(x))(CallsIt(model.first)),
}


def instance_forward() -> nn.Module:
    model = Body()
    model.first.forward = lambda x, layer=model.first: F.linear(x, layer.weight, layer.bias) * 1.1  # type: ignore[method-assign]
    return model


def instance_forward_bound() -> nn.Module:
    """The way of those who patch a library's layer: a function bound to the instance."""
    model = Body()

    def scaled(self: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * 1.1

    model.first.forward = scaled.__get__(model.first)  # type: ignore[method-assign]
    return model


def instance_forward_around() -> nn.Module:
    """Keeps the old forward and calls it: logging, timing and LoRA tools do so."""
    model = Body()
    old = model.first.forward
    model.first.forward = lambda x: 1.1 * old(x)  # type: ignore[method-assign]
    return model


class Parent(Body):
    """A child that knows its parent, without registering it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Tanh()
        object.__setattr__(self.child, "parent", self)

    def between(self, x: Tensor) -> Tensor:
        return self.child(x) * self.child.parent.last.weight.sum()


class OtherMethod(Body):
    """The forward of one module calls a method of another that is not its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Mlp(6, 5, 6)
        self.inner.encode = types_method(self.inner)  # type: ignore[assignment]

    def between(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner.encode(x)) + self.inner.second.weight.sum()


def types_method(layer: Any) -> Any:
    def encode(self: Any, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))

    return encode.__get__(layer)


class ClassMethods(Body):
    """Everything goes through methods, static methods and properties; forward only dispatches."""

    @property
    def scale(self) -> Tensor:
        return self.first.bias.square().mean()

    @staticmethod
    def activate(x: Tensor) -> Tensor:
        return torch.tanh(x)

    def encode(self, x: Tensor) -> Tensor:
        return self.activate(F.linear(x, self.first.weight)) * self.scale

    def forward(self, x: Tensor, mode: str = "classify") -> Tensor:
        return getattr(self, mode)(x)

    def classify(self, x: Tensor) -> Tensor:
        return self.last(self.encode(x))


class Twins(nn.Module):
    """One encoder for two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, 5), nn.Tanh())
        self.last = nn.Linear(5, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.last((self.encoder(left) - self.encoder(right)).abs())


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, :2], x[:, 2:]


_entry = partial(Entry, family="python", tasks=VECTORS, quick=True)

PATTERNS = [
    _entry("keyword inputs", make=Keywords, tasks=of_inputs(VECTORS, _keywords)),
    _entry("keyword inputs, some left out", make=Keywords, tasks=of_inputs(VECTORS, lambda x: {"left": x[:, :2]})),
    _entry("positional inputs", make=Twins, tasks=of_inputs(VECTORS, _halves)),
    *(_entry(f"output is {name}", make=partial(Gives, form), loss_fn=loss) for name, (form, loss) in OUTPUTS.items()),
    *(_entry(f"layer kept in {name}", make=partial(Keeps, way), higher=False) for name, way in WAYS.items()),
    _entry("forward of an instance", make=instance_forward, higher=False),
    _entry("forward of an instance, bound", make=instance_forward_bound, higher=False),
    _entry("forward of an instance, around the old", make=instance_forward_around, higher=False),
    _entry("child knows its parent", make=Parent, higher=False),
    _entry("method that is not forward", make=OtherMethod, higher=False),
    _entry("methods, static methods and properties", make=ClassMethods),
]
