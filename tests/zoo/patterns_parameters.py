"""Parameters and buffers of every kind: complex, scalar, empty, frozen, parametrized, pruned, in lists, aliased."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from entry import Entry
from pieces import SEQUENCES, VECTORS, AroundSequence, Between, Body, Whole, words
from torch import Tensor, nn


# --- kinds of parameters ---------------------------------------------------------------------------------------------
def _complex(model: Any, x: Tensor) -> Tensor:
    return model.phase(x.to(torch.complex128) @ model.mixed).abs() ** 2 / 10


def complex_linear() -> nn.Module:
    mixed, phase = torch.randn(6, 6, dtype=torch.complex128), nn.Linear(6, 6, dtype=torch.complex128)
    return Between(_complex, mixed=nn.Parameter(mixed), phase=phase)


class Spectral(AroundSequence):
    """A Fourier layer: a few frequencies are mixed by complex weights."""

    def __init__(self) -> None:
        super().__init__(self.spectral)
        del self.layer
        self.weights = nn.Parameter(torch.randn(4, 4, 2, dtype=torch.complex128) / 4)

    def spectral(self, x: Tensor) -> Tensor:
        frequencies = torch.fft.rfft(x, dim=1)[:, :2]
        mixed = torch.einsum("bti,iot->bto", frequencies, self.weights)
        return torch.fft.irfft(mixed, n=x.shape[1], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.spectral(x) + x).mean(1))


def _collections(model: Any, x: Tensor) -> Tensor:
    for scale in model.scales:
        x = torch.tanh(x * scale)
    return x + model.shifts["one"] + sum(model.shifts.values())


def collections() -> nn.Module:
    shifts = {"one": torch.randn(6), "two": nn.Parameter(torch.randn(6), requires_grad=False)}
    scales = nn.ParameterList([torch.randn(6), torch.randn(())])
    return Between(_collections, scales=scales, shifts=nn.ParameterDict(shifts))


class Scalar(Body):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.temperature.exp()


# Networks with parameters that not every pass uses: `run` makes the hidden values.
PARTLY_USED: dict[str, Callable[[], nn.Module]] = {
    "parameter without entries": lambda: Between(
        lambda m, x: torch.tanh(x + (x @ m.nothing).sum()), nothing=nn.Parameter(torch.zeros(6, 0))
    ),
    "unused parameters": lambda: Between(
        lambda m, x: torch.tanh(m.branch(x) if len(x) > 100 else x), forgotten=nn.Linear(7, 7), branch=nn.Linear(6, 6)
    ),
    # The target set is larger than the support set.
    "parameters that only the target uses": lambda: Between(
        lambda m, x: torch.tanh(m.branch(x) if len(x) > 3 else x), branch=nn.Linear(6, 6)
    ),
    # Which layer runs depends on the data, so the first task does not use what the second does.
    "parameters that only some tasks use": lambda: Between(
        lambda m, x: torch.tanh(m.up(x) if float(x.detach().sum()) > 0 else m.down(x)),
        up=nn.Linear(6, 6),
        down=nn.Linear(6, 6),
    ),
}


def frozen_backbone() -> nn.Module:
    model = nn.Sequential(Body(), nn.Tanh(), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    return model


def partly_frozen() -> nn.Module:
    model = Body()
    model.first.bias.requires_grad_(False)
    model.last.weight.requires_grad_(False)
    return model


class BufferAsWeight(Body):
    """Random features: a buffer, an integer one and one of another precision among the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("projection", torch.randn(6, 6))
        self.register_buffer("order", torch.arange(5, -1, -1))
        self.register_buffer("mask", torch.rand(6) > 0.3, persistent=False)
        self.constant = torch.linspace(0, 1, 6, dtype=torch.float32)

    def between(self, x: Tensor) -> Tensor:
        return torch.tanh((x @ self.projection)[:, self.order] * self.mask + self.constant)


class Mixed(Body):
    """Half of it in single precision."""

    def __init__(self) -> None:
        super().__init__()
        self.single = nn.Parameter(torch.ones(6, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        made = super()._apply(fn, recurse)
        self.single.data = self.single.data.float()
        return made

    def between(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.single.to(x.dtype))


# --- aliases ---------------------------------------------------------------------------------------------------------
class Aliased(Body):
    """Keeps a parameter a second time, where `way` puts it."""

    def __init__(self, way: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        object.__setattr__(self, "kept", way(self.scale))

    def between(self, x: Tensor) -> Tensor:
        kept = self.kept
        while not isinstance(kept, Tensor):
            kept = next(iter(kept.values() if isinstance(kept, dict) else kept))
        return torch.tanh(x * kept)


ALIASES: dict[str, Callable[[Tensor], Any]] = {
    "an attribute": lambda scale: scale,
    "a list": lambda scale: [scale],
    "a tuple": lambda scale: (scale,),
    "a dict": lambda scale: {"scale": scale},
    "a set in a list": lambda scale: [{scale}],
}


HIDDEN: dict[str, Callable[[Tensor], Any]] = {
    "an object": lambda scale: SimpleNamespace(held=SimpleNamespace(scale=scale)),
    "a closure": lambda scale: lambda: scale,
    "a partial": lambda scale: partial(torch.mul, scale, 1.0),
    "a deep list": lambda scale: SimpleNamespace(held=[[[[[scale]]]]]),
}


class Hidden(Body):
    """Keeps a parameter where inspection does not look for it, and reads it from there and from the module."""

    def __init__(self, way: Callable[[Tensor], Any], alone: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.kept, self.alone = way(self.scale), alone

    def between(self, x: Tensor) -> Tensor:
        kept = self.kept
        while not isinstance(kept, Tensor):
            if isinstance(kept, SimpleNamespace):
                kept = next(iter(vars(kept).values()))
            else:
                kept = kept() if callable(kept) else kept[0]
        return torch.tanh(x * kept * (1 if self.alone else self.scale))


def embedded(**options: Any) -> nn.Module:
    parts = {"words": nn.Embedding(9, 4, **options), "last": nn.Linear(4, 3)}
    return Whole(lambda m, x: m.last(torch.tanh(m.words(x)).mean(1)), **parts)


_entry = partial(Entry, family="parameters", tasks=VECTORS, quick=True)

PATTERNS = [
    _entry("complex linear layer", make=complex_linear),
    _entry("spectral convolution", make=Spectral, tasks=SEQUENCES),
    _entry("ParameterList and ParameterDict", make=collections),
    _entry("scalar parameter", make=Scalar),
    *(_entry(name, make=make) for name, make in PARTLY_USED.items()),
    _entry("frozen backbone", make=frozen_backbone),
    _entry("some parameters frozen", make=partly_frozen),
    _entry("head only", make=Body, options={"adapt": "last.*"}),
    _entry("buffers as weights", make=BufferAsWeight),
    *(
        _entry(
            f"parameter kept again in {name}",
            make=partial(Aliased, way),
            refused=r"'the model itself' \(Aliased\).*'scale'.*'kept'.*ParameterList",
        )
        for name, way in ALIASES.items()
    ),
    *(
        _entry(
            f"parameter hidden in {name}{', read twice' * (not alone)}",
            make=partial(Hidden, way, alone),
            refused=r"reads 'scale' from somewhere else.*adapt=|closure in its plain attribute 'kept'",
        )
        for name, way in HIDDEN.items()
        for alone in (True, False)
    ),
    _entry("Embedding", make=embedded, tasks=words()),
    _entry("Embedding, padding", make=partial(embedded, padding_idx=0), tasks=words()),
    _entry("Embedding, max_norm", make=partial(embedded, max_norm=0.5), tasks=words()),
    _entry("Embedding, gradient by frequency", make=partial(embedded, scale_grad_by_freq=True), tasks=words()),
    _entry("Embedding, sparse", make=partial(embedded, sparse=True), tasks=words()),
    _entry(
        "Embedding, sparse, not adapted",
        make=partial(embedded, sparse=True),
        tasks=words(),
        options={"adapt": "last.*"},
    ),
    _entry(
        "Embedding, max_norm, not adapted",
        make=partial(embedded, max_norm=0.5),
        tasks=words(),
        options={"adapt": "last.*"},
    ),
    _entry("half in single precision", make=Mixed, tolerance=1e-5, note="to the rounding of float32"),
]
