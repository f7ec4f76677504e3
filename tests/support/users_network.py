"""A small network in single precision and two tasks for it, as a user would write them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metawrap import TaskBatch

BATCH = TaskBatch.stacked(
    torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)),
    torch.arange(3).repeat(2, 2),
    torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1)),
    torch.arange(3).repeat(2, 2),
)
DOUBLE = TaskBatch(tuple(task.map(lambda x: x.double() if x.is_floating_point() else x) for task in BATCH))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


class Only(nn.Module):
    """One linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.only = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x)
