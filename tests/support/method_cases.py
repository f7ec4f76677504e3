"""Tiny networks and tasks, and checks, that the tests of several methods share."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from face import assert_same_state, fingerprint
from models import Conv4
from torch import Tensor, nn

from metawrap import Task, TaskError

# Class numbers of three tasks, some of them shared.
CLASSES = [(4, 0, 2), (1, 2, 5), (0, 3, 7)]


class MLP(nn.Module):
    """Vectors (examples, 4) through a body without norms to a linear head."""

    def __init__(self, ways: int = 3, width: int = 5) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, width), nn.Tanh())
        self.head = nn.Linear(width, ways)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


class MapNet(nn.Module):
    """Its head takes a map: (examples, 4, 5, 5) enters it."""

    def __init__(self, ways: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Conv2d(4, ways, 5)
        self.flat = nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(self.head(self.body(x)))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def predict(learner: Any, support: Tensor, labels: Tensor, ways: int, target: Tensor, target_y: Tensor) -> Any:
    """Prediction and loss of a learner whose embedding is its input."""
    return learner._predict(Task(support, labels, target, target_y), support, labels, ways, target)


def step(learner: Any, batch: Any, seed: int = 5) -> Any:
    torch.manual_seed(seed)
    return learner.meta_step(batch)


def uneven(shape: tuple[int, ...], ways: int = 3) -> Task:
    labels = torch.cat([torch.full((way + 1,), way) for way in range(ways)])
    asked = torch.arange(ways).repeat(2)
    return Task(numbers(len(labels), *shape), labels, numbers(len(asked), *shape, seed=1), asked)


def net(ways: int = 3, seed: int = 0) -> Conv4:
    torch.manual_seed(seed)
    return Conv4(filters=3, ways=ways, blocks=2).double()


def mlp(ways: int = 3, seed: int = 0) -> MLP:
    torch.manual_seed(seed)
    return MLP(ways).double()


def conv_tasks(count: int = 2, ways: int = 3, **extra: Any) -> list[Task]:
    """Noisy images of as many patterns as there are ways; `extra` holds a value of each task."""
    return _tasks(count, ways, 2, 3, (1, 16, 16), 0.7, 7, extra)


def vector_tasks(count: int = 2, ways: int = 3, targets: int = 2, **extra: Any) -> list[Task]:
    return _tasks(count, ways, 2, targets, (4,), 0.3, 11, extra)


def _tasks(
    count: int, ways: int, shots: int, targets: int, shape: tuple[int, ...], noise: float, seed: int, extra: Any
) -> list[Task]:
    tasks = []
    for index in range(count):
        centres = numbers(ways, *shape, seed=seed + 10 * index)
        parts = []
        for place, n in enumerate((shots, targets)):
            y = torch.arange(ways).repeat(n)
            parts += [centres[y] + noise * numbers(len(y), *shape, seed=seed + 10 * index + place + 1), y]
        tasks.append(Task(*parts, **{name: value[index] for name, value in extra.items()}))
    return tasks


def gradients(learner: Any) -> dict[str, Tensor | None]:
    """Of everything that is learned, after a meta_step or a backward pass."""
    found = {name: p.grad for name, p in learner.named_parameters() if p.requires_grad}
    return {name: None if g is None else g.detach().clone() for name, g in found.items()}


def assert_same_gradients(learned: nn.Module, plain: nn.Module) -> None:
    """Those that a backward pass left in two modules with the same names."""
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(learned.get_parameter(name).grad, parameter.grad, rtol=1e-9, atol=1e-12)


def assert_fitted_by_torch(adapted: nn.Module, plain: nn.Module, task: Task, optimizer: torch.optim.Optimizer) -> None:
    """Takes four steps of a torch optimizer on the support set; the plain module then is the adapted one."""
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(plain(task.support_x), task.support_y).backward()
        optimizer.step()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(adapted.get_parameter(name), parameter, rtol=1e-9, atol=1e-12)


def assert_a_failed_call_changes_nothing(learner: Any, call: Any, batch: Any, *, raises: Any = TaskError) -> None:
    """Everything that is learned, by identity and value, and the optimizer: its groups, their order, its state."""

    def known() -> Any:
        groups = [[id(p) for p in group["params"]] for group in learner.optimizer.param_groups]
        return fingerprint(learner), groups, set(map(id, learner.optimizer.state))

    before, state, head = known(), copy.deepcopy(learner.state_dict()), learner.head
    optimizer = copy.deepcopy(learner.optimizer.state_dict())
    with pytest.raises(raises):
        call(batch)
    assert known() == before
    assert learner.head == head
    assert_same_state(dict(learner.state_dict()), dict(state))
    assert_same_state(learner.optimizer.state_dict(), optimizer)
