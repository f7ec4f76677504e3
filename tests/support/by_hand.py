"""A network whose embedding numpy computes, and derivatives by differences: what tests of fitted heads share."""

from __future__ import annotations

import copy
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


def assert_gradient_is_that_of_differences(learner: Any, task: Task, step: float = 1e-6) -> None:
    """One entry of each of the learner's parameters."""
    learner([task]).loss.backward()
    for name, parameter in learner.named_parameters():
        if parameter.grad is None:
            assert name.startswith("model.2."), f"{name} has no gradient"  # The head that is not run.
            continue
        place = np.unravel_index(parameter.numel() // 2, parameter.shape)
        values = []
        for sign in (1, -1):
            moved = copy.deepcopy(learner)
            with torch.no_grad():
                dict(moved.named_parameters())[name][place] += sign * step
            values.append(float(moved([task]).loss.detach()))
        found, expected = float(parameter.grad[place]), (values[0] - values[1]) / (2 * step)
        assert abs(found - expected) <= 1e-7 * max(1.0, abs(expected)), (name, found, expected)


def assert_relabelled_is_permuted(learner: Any, task: Task, order: list[int]) -> None:
    """Class c called order[c] moves its logits from column c to column order[c]."""
    new = torch.tensor(order)
    found = prediction(learner, Task(task.support_x, new[task.support_y], task.target_x, new[task.target_y]))
    np.testing.assert_allclose(found[:, order], prediction(learner, task), rtol=1e-9, atol=1e-12)


def assert_deployed_is_evaluated(learner: Any, task: Task) -> nn.Module:
    module = learner.adapt(task.support_x, task.support_y)
    with torch.no_grad():
        found = module(task.target_x)
    np.testing.assert_allclose(found.numpy(), prediction(learner, task), rtol=1e-12, atol=1e-12)
    return module  # type: ignore[no-any-return]
