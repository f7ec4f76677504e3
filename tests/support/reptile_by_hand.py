"""Reptile by plain torch optimizers on a copy of the network."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from models import class_tasks
from torch import Tensor, nn

BATCH = class_tasks((4,), tasks=3, shots=2, seed=5)
LR = 0.2


def fitted(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], optimizer: Any = torch.optim.SGD, **options: Any
) -> nn.Module:
    """A copy of the network after one step of a torch optimizer on each batch."""
    model = copy.deepcopy(model).train()
    inner = optimizer(model.parameters(), **{"lr": LR} | options)
    for x, y in batches:
        inner.zero_grad()
        F.cross_entropy(model(x), y).backward()
        inner.step()
    return model


def whole(task: Any) -> tuple[Tensor, Tensor]:
    return torch.cat([task[0], task[2]]), torch.cat([task[1], task[3]])


def moved(model: nn.Module, ends: list[nn.Module], rate: float) -> list[Tensor]:
    """theta + rate * mean(theta_k - theta), parameter by parameter."""
    columns = zip(*(end.parameters() for end in ends), strict=True)
    return [p + rate * (torch.stack(column).mean(0) - p) for p, column in zip(model.parameters(), columns, strict=True)]
