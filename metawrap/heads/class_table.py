"""What joint training learns besides the network: a weight vector for each class, or a head for each task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor, nn

from metawrap.tasks import TaskId


class ClassTable(nn.Module):
    """A linear layer over all classes that tasks are drawn from; empty until it is made.

    weight: (classes, numbers), bias: (classes,).
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    @property
    def classes(self) -> int:
        """Rows; 0 before it is made."""
        return 0 if self.weight is None else len(self.weight)

    def make(self, classes: int, width: int, like: Tensor) -> list[nn.Parameter]:
        """Fresh rows for so many classes, on the device and in the precision of `like`; returns what is new."""
        weight, bias = _drawn(0, classes, width, like)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        return [self.weight, self.bias]

    def rows_behind(self, classes: int) -> list[tuple[nn.Parameter, Tensor]]:
        """What is to be put behind each parameter for the table to hold so many classes."""
        assert self.weight is not None
        assert self.bias is not None
        present, width = self.weight.shape
        return list(zip((self.weight, self.bias), _drawn(present, classes, width, self.weight), strict=True))

    def forward(self, embeddings: Tensor, classes: Tensor | None = None) -> Tensor:
        """(examples, ...) to logits (examples, classes): of all classes, or of those (classes,) that are named."""
        assert self.weight is not None
        assert self.bias is not None
        chosen = slice(None) if classes is None else classes
        return nn.functional.linear(embeddings.flatten(1), self.weight[chosen], self.bias[chosen])

    def follow(self, stored: Mapping[str, Any], like: Tensor) -> list[nn.Parameter]:
        """Takes the size that a state_dict has it in; returns what is new."""
        weight = stored.get("weight")
        if weight is None:
            self.weight = self.bias = None
        elif self.weight is None or self.weight.shape != weight.shape:
            return self.make(weight.shape[0], weight.shape[1], like)
        return []


def _drawn(first: int, classes: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Rows from `first` on, as `nn.Linear` draws them; of a generator of their own, so that they depend on no other."""
    generator = torch.Generator().manual_seed(first)
    bound = 1 / math.sqrt(width)
    shapes = (classes - first, width), (classes - first,)
    weight, bias = ((torch.rand(shape, generator=generator) * 2 - 1) * bound for shape in shapes)
    return weight.to(like.device, like.dtype), bias.to(like.device, like.dtype)


class TaskHeads(nn.Module):
    """The parameters of one head per task id, by their names in the head."""

    def of(self, task_id: TaskId | None, names: Mapping[str, Any]) -> dict[str, nn.Parameter]:
        """A task's head; {} where there is none."""
        found = {} if task_id is None else {name: self._parameters.get(_key(task_id, name)) for name in names}
        return {name: p for name, p in found.items() if p is not None}

    def make(self, task_id: TaskId, start: Mapping[str, Tensor]) -> list[nn.Parameter]:
        """A head that starts from these values; returns what is new."""
        for name, value in start.items():
            self.register_parameter(_key(task_id, name), nn.Parameter(value.detach().clone()))
        return [self._parameters[_key(task_id, name)] for name in start]  # type: ignore[misc]

    def follow(self, stored: Mapping[str, Any], like: Tensor) -> list[nn.Parameter]:
        """Holds the heads that a state_dict holds, in its order; returns what is new."""
        before, made = dict(self._parameters), []
        self._parameters.clear()
        for key, value in stored.items():
            kept = before.get(key)
            if kept is None or kept.shape != value.shape:
                made.append(kept := nn.Parameter(torch.empty(value.shape, device=like.device, dtype=like.dtype)))
            self.register_parameter(key, kept)
        return made


def _key(task_id: TaskId, name: str) -> str:
    # torch refuses dots in a parameter's own name; an id's number and its text are two ids.
    return f"{quote(repr(task_id), safe='')}/{name}".replace(".", "|")
