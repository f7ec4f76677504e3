"""What the patterns are made of: small tasks, and bodies into which a layer or a function is put."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import class_tasks
from torch import Tensor, nn

Tasks = Callable[[], list[tuple[Any, Any, Any, Any]]]


def noise(*shape: int, **options: Any) -> Tasks:
    """Tasks of float64 noise around one prototype per class, (examples, *shape), without a task axis."""
    return lambda: list(zip(*class_tasks(shape, **options), strict=True))


def of_inputs(tasks: Tasks, change: Callable[[Tensor], Any]) -> Tasks:
    """The same tasks with inputs of another form."""
    return lambda: [(change(sx), sy, change(tx), ty) for sx, sy, tx, ty in tasks()]


def words(length: int = 5, count: int = 9) -> Tasks:
    """Tasks of (examples, length) word numbers below `count`."""

    def tasks() -> list[tuple[Any, Any, Any, Any]]:
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(3)

        def draw(examples: int) -> Tensor:
            return torch.randint(0, count, (examples, length), generator=generator)

        return [(draw(3), labels, draw(6), labels.repeat(2)) for _ in range(2)]

    return tasks


VECTORS, SEQUENCES, IMAGES = noise(4), noise(5, 3), noise(1, 6, 6)


class Body(nn.Module):
    """first -> between -> last on (examples, 4), six features in between; most patterns differ in `between` only."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.last = nn.Linear(6, 3)

    def between(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


class Between(Body):
    """A Body whose `between` is a function of the model and its hidden values; `parts` are its attributes.

    Tensors among the parts become buffers.
    """

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if type(part) is Tensor:
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def between(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Whole(nn.Module):
    """A network whose forward is a function of itself and its inputs; `parts` are its attributes."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *x: Any) -> Any:
        return self.run(self, *x)


class Delegates(nn.Module):
    """Hands every attribute that it does not have to its inner model, as wrappers do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["inner"], name)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


class Calls(nn.Module):
    """A module around a function: its name is what an error should say."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *x: Tensor) -> Any:
        return self.call(*x)


class Around(nn.Module):
    """A layer or function between two linear layers, on (examples, 4); it makes `features` of 6."""

    def __init__(self, layer: Callable[..., Any], features: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.layer = layer
        self.last = nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.layer(self.first(x))).flatten(1))


class AroundImage(nn.Module):
    """A layer or function on (examples, 4, 6, 6) images between a convolution and a linear layer."""

    def __init__(self, layer: Callable[..., Any]) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.layer = layer
        self.last = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.layer(self.first(x))).flatten(1)
        return self.last(torch.stack([x.mean(1), x.square().mean(1), (x * torch.sin(x)).sum(1)], 1))


class AroundSequence(nn.Module):
    """A layer or function on (examples, 5, 4) sequences between two linear layers."""

    def __init__(self, layer: Callable[..., Any], features: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.layer = layer
        self.last = nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.layer(torch.tanh(self.first(x)))).mean(1))
