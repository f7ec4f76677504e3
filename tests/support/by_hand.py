"""A network whose embedding numpy computes, and derivatives by differences: what tests of fitted heads share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metawrap import Task

# Uneven classes in any order, more than two of them.
LABELS = torch.tensor([2, 0, 1, 1, 2, 2])


def mlp(width: int = 5, inputs: int = 4, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, 3)).double()


def embedded(model: Any, x: Tensor) -> np.ndarray:
    return np.tanh(x.numpy() @ model[0].weight.detach().numpy().T + model[0].bias.detach().numpy())  # type: ignore[no-any-return]


def task_with(labels: Tensor = LABELS, targets: int = 4, inputs: int = 4, seed: int = 0) -> Task:
    generator = torch.Generator().manual_seed(seed)
    ways = int(labels.max()) + 1
    centres = torch.randn(ways, inputs, generator=generator, dtype=torch.float64)
    asked = torch.arange(targets) % ways
    return Task(
        *(
            part
            for y in (labels, asked)
            for part in (0.7 * torch.randn(len(y), inputs, generator=generator, dtype=torch.float64) + centres[y], y)
        )
    )


def one_hot(labels: Tensor) -> np.ndarray:
    return np.eye(int(labels.max()) + 1)[labels.numpy()]  # type: ignore[no-any-return]


def prediction(learner: Any, task: Task) -> np.ndarray:
    return learner.evaluate([task], keep_predictions=True).predictions[0].numpy()  # type: ignore[no-any-return]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))  # type: ignore[no-any-return]
