"""Hooks of every kind: before and after forward and backward, on parameters and hidden values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from entry import Entry
from pieces import VECTORS, Between, Body
from torch import Tensor, nn


def hooked(register: Callable[[Any], Any]) -> nn.Module:
    model = Body()
    register(model)
    return model


def _halve_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
    return (args[0] / 2,)


def _bend(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return torch.tanh(output) + 0.2 * output


def _with_keywords(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return (args[0] * 1.5,), kwargs


def _bend_with_keywords(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    return output * module.weight.mean()


def _closure_over_the_model(model: Any) -> Any:
    return model.first.register_forward_hook(lambda module, args, out: out * model.last.weight.mean())


def _scale_gradient(module: nn.Module, into: Any, out: Any) -> Any:
    return tuple(None if g is None else 0.5 * g for g in into)


def _scale_gradient_before(module: nn.Module, out: Any) -> Any:
    return tuple(None if g is None else 2 * g for g in out)


class Keeper:
    """A hook that is an object, and keeps what it sees."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        self.seen.append(tuple(output.shape))
        return output * 1.2


class Extracts(Body):
    """Reads its features from where a hook of its own put them, as feature extractors do."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Tensor] = {}
        self.first.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kept["first"] = output

    def forward(self, x: Tensor) -> Tensor:
        self.first(x)
        return self.last(torch.tanh(self.kept.pop("first")))


class HooksInForward(Body):
    """Registers a hook for the time of one call."""

    def forward(self, x: Tensor) -> Tensor:
        handle = self.first.register_forward_hook(_bend)
        try:
            return super().forward(x)
        finally:
            handle.remove()


def _hooks_hidden(_: Any, x: Tensor) -> Tensor:
    x = torch.tanh(x)
    if x.requires_grad:
        x.register_hook(lambda gradient: 0.5 * gradient)
    return x


HOOKS: dict[str, Callable[[Any], Any]] = {
    "forward": lambda model: model.first.register_forward_hook(_bend),
    "forward of the model itself": lambda model: model.register_forward_hook(_bend),
    "forward, an object": lambda model: model.first.register_forward_hook(Keeper()),
    "forward, a partial": lambda model: model.first.register_forward_hook(partial(_bend)),
    "forward, over the model": _closure_over_the_model,
    "before forward": lambda model: model.first.register_forward_pre_hook(_halve_input),
    "before forward, with keywords": lambda model: model.first.register_forward_pre_hook(
        _with_keywords, with_kwargs=True
    ),
    "forward, with keywords": lambda model: model.first.register_forward_hook(_bend_with_keywords, with_kwargs=True),
    "forward, two of them, the last first": lambda model: (
        model.first.register_forward_hook(_bend),
        model.first.register_forward_hook(Keeper(), prepend=True),
    ),
    "full backward": lambda model: model.last.register_full_backward_hook(_scale_gradient),
    "before full backward": lambda model: model.last.register_full_backward_pre_hook(_scale_gradient_before),
    "on a parameter": lambda model: model.first.weight.register_hook(lambda gradient: gradient * 0.5),
    "on a parameter, over the model": lambda model: model.first.bias.register_hook(
        lambda g: g * model.first.bias.detach()
    ),
    "after accumulation on a parameter": lambda m: m.first.bias.register_post_accumulate_grad_hook(
        lambda parameter: None
    ),
    "state dict": lambda model: (
        model.register_state_dict_post_hook(lambda module, state, prefix, local: None),
        model.register_load_state_dict_pre_hook(lambda *args: None),
        model.register_load_state_dict_post_hook(lambda module, keys: None),
        model.register_state_dict_pre_hook(lambda module, prefix, keep: None),
    ),
}


_entry = partial(Entry, family="state", tasks=VECTORS, quick=True)

PATTERNS = [
    *(
        _entry(f"hook: {name}", make=partial(hooked, register), higher=name != "forward, over the model")
        for name, register in HOOKS.items()
    ),
    _entry("hook that keeps features", make=Extracts),
    _entry("hook for the time of a call", make=HooksInForward),
    _entry("hook on a hidden value", make=partial(Between, _hooks_hidden)),
]
