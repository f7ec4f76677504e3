"""Parameters of joint training besides the network: a weight vector for each class, or a head for each task."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor, nn

from metawrap.errors import ArgumentError, TaskError, shown
from metawrap.tasks import Task, TaskId, describe_value


class ClassTable(nn.Module):
    """A linear layer over all classes that tasks are drawn from; it has no parameters until `make`.

    weight: (classes, numbers), bias: (classes,). limit: how many classes there are; None lets the table grow.

    >>> table = ClassTable()
    >>> _ = table.make(classes=5, width=3, like=torch.zeros(()))
    >>> table(torch.ones(2, 3), classes=torch.tensor([4, 0])).shape
    torch.Size([2, 2])
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            raise ArgumentError(f"classes: expected a whole number of at least 1, or None, but got {shown(limit)}.")
        self.limit = limit
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    @property
    def classes(self) -> int:
        """Rows; 0 before `make`."""
        return 0 if self.weight is None else len(self.weight)

    def make(self, classes: int, width: int, like: Tensor) -> list[nn.Parameter]:
        """Draws rows for so many classes, on the device and in the precision of `like`; returns the new parameters."""
        weight, bias = _drawn(0, classes, width, like)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        return [self.weight, self.bias]

    def further_rows(self, classes: int) -> list[tuple[nn.Parameter, Tensor]]:
        """Each parameter, with the rows that it lacks to hold so many classes."""
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

    def match(self, stored: Mapping[str, Any], like: Tensor) -> list[nn.Parameter]:
        """Takes the size that the table has in a state_dict; returns the new parameters."""
        weight = stored.get("weight")
        if weight is None:
            self.weight = self.bias = None
        elif self.weight is None or self.weight.shape != weight.shape:
            return self.make(weight.shape[0], weight.shape[1], like)
        return []

    def check_task(self, task: Task, ignored: int) -> None:
        """Raises TaskError when a task's labels do not number its classes, or the table has no such class."""
        classes = task.classes or ()
        if self.limit is not None and max(classes) >= self.limit:
            raise TaskError(
                f"classes: a task has the class number {max(classes)}, but there are classes={self.limit}. Number them "
                "from 0, or pass a larger classes= to the constructor."
            )
        for name in ("support_y", "target_y"):
            y = getattr(task, name)
            if y.ndim != 1 or y.is_floating_point() or y.is_complex():
                raise TaskError(
                    f"{name}: a task with classes needs the label of each example, (examples,) whole numbers, but got "
                    f"{describe_value(y)}. Leave classes out for other labels."
                )
            seen = [label for label in y.tolist() if label != ignored]
            if seen and not 0 <= min(seen) <= max(seen) < len(classes):
                raise TaskError(
                    f"{name} holds labels {min(seen)}..{max(seen)}, but the task names {len(classes)} "
                    "classes. Name the class of each label."
                )


def _drawn(first: int, classes: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Rows from `first` on, drawn as `nn.Linear` draws them, by a generator of their own."""
    generator = torch.Generator().manual_seed(first)
    bound = 1 / math.sqrt(width)
    shapes = (classes - first, width), (classes - first,)
    weight, bias = ((torch.rand(shape, generator=generator) * 2 - 1) * bound for shape in shapes)
    return weight.to(like.device, like.dtype), bias.to(like.device, like.dtype)


class TaskHeads(nn.Module):
    """The parameters of one head for each task id, by their names in the head.

    >>> heads = TaskHeads()
    >>> _ = heads.make("blue", {"weight": torch.zeros(2, 3)})
    >>> heads.of("blue", ["weight"])["weight"].shape, heads.of("red", ["weight"])
    (torch.Size([2, 3]), {})
    """

    def of(self, task_id: TaskId | None, names: Iterable[str]) -> dict[str, nn.Parameter]:
        """The head of a task; {} for an unknown id."""
        found = {} if task_id is None else {name: self._parameters.get(_key(task_id, name)) for name in names}
        return {name: p for name, p in found.items() if p is not None}

    def make(self, task_id: TaskId, start: Mapping[str, Tensor]) -> list[nn.Parameter]:
        """A head that starts from these values; returns the new parameters."""
        for name, value in start.items():
            self.register_parameter(_key(task_id, name), nn.Parameter(value.detach().clone()))
        return [self._parameters[_key(task_id, name)] for name in start]  # type: ignore[misc]

    def match(self, stored: Mapping[str, Any], like: Tensor) -> list[nn.Parameter]:
        """Holds the heads that a state_dict holds, in its order; returns the new parameters."""
        before, made = dict(self._parameters), []
        self._parameters.clear()
        for key, value in stored.items():
            kept = before.get(key)
            if kept is None or kept.shape != value.shape:
                made.append(kept := nn.Parameter(torch.empty(value.shape, device=like.device, dtype=like.dtype)))
            self.register_parameter(key, kept)
        return made


def _key(task_id: TaskId, name: str) -> str:
    # torch refuses dots in a parameter's own name. repr tells the id 1 from the id "1".
    return f"{quote(repr(task_id), safe='')}/{name}".replace(".", "|")
