"""The cases that every benchmark runs: task shapes, images, and one set of initial values for every contender.

The network is Conv4 with per-step batch norm. Each case has learned rates, the multi-step loss of epoch 0, 5 inner
steps and Adam as outer optimizer.

A: 5-way 1-shot, 28x28x1, 64 filters, 1 target per class, 8 tasks. A15: the same with 15 targets per class. B: 20-way
1-shot, 4 tasks. C: 84x84x3, 48 filters, 5-way 1-shot, 15 targets per class, 2 tasks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

BLOCKS = 4
EPSILON, MOMENTUM, SLOPE = 1e-5, 0.1, 0.01  # of the batch norms, their running statistics, and the leaky ReLU
META_LR = 1e-3


@dataclass(frozen=True)
class Case:
    """Examples per class, tasks per batch, inner steps, image side in pixels, channels, filters.

    ranks: processes of torch.distributed that share metawrap's tasks; the other contenders are one process each.
    """

    name: str
    ways: int = 5
    shots: int = 1
    targets: int = 1
    tasks: int = 8
    steps: int = 5
    side: int = 28
    channels: int = 1
    filters: int = 64
    ranks: int = 1

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.ways}-way {self.shots}-shot, {self.targets} targets per class, {self.tasks} tasks, "
            f"{self.steps} steps, {self.side}x{self.side}x{self.channels}, {self.filters} filters"
        )

    @property
    def features(self) -> int:
        """Inputs of the linear head."""
        return self.filters * (self.side // 2**BLOCKS) ** 2


CASES = {
    case.name: case
    for case in (
        Case("A"),
        Case("A15", targets=15),
        Case("B", ways=20, tasks=4),
        Case("C", targets=15, tasks=2, side=84, channels=3, filters=48),
    )
}
# The share of the plain loop's time that a meta-step of metawrap should take at most, by case.
TARGETS = {"A": 0.80, "A15": 0.90, "B": 0.90, "C": 0.75}

TaskTensors = tuple[Tensor, Tensor, Tensor, Tensor]


def make_tasks(case: Case, dtype: torch.dtype, device: str) -> list[TaskTensors]:
    """(support_x, support_y, target_x, target_y) for each task: random images, balanced labels."""
    generator = torch.Generator().manual_seed(0)

    def part(per_class: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(case.ways).repeat_interleave(per_class)
        images = torch.rand(len(labels), case.channels, case.side, case.side, generator=generator)
        return images.to(device, dtype), labels.to(device)

    return [(*part(case.shots), *part(case.targets)) for _ in range(case.tasks)]


def initial_values(case: Case, dtype: torch.dtype, device: str, spread: float = 0.0) -> dict[str, Tensor]:
    """Every learned tensor by name; `lr/<name>` holds the (steps,) rates of an adapted one.

    Args:
        spread: standard deviation of the noise that is added to each entry. With noise, rows and rates differ, and an
            exchange of two of them changes the gradient.
    """
    generator = torch.Generator().manual_seed(1)

    def xavier(*shape: int) -> Tensor:
        receptive = math.prod(shape[2:])
        bound = math.sqrt(6 / ((shape[0] + shape[1]) * receptive))
        return (2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1) * bound

    values: dict[str, Tensor] = {}
    for block in range(BLOCKS):
        values[f"conv{block}.conv.weight"] = xavier(case.filters, case.filters if block else case.channels, 3, 3)
        values[f"conv{block}.conv.bias"] = torch.zeros(case.filters, dtype=torch.float64)
    values["linear.weight"] = xavier(case.ways, case.features)
    values["linear.bias"] = torch.zeros(case.ways, dtype=torch.float64)
    values |= {f"lr/{name}": torch.full((case.steps,), 0.1, dtype=torch.float64) for name in list(values)}
    for block in range(BLOCKS):
        values[f"conv{block}.norm.weight"] = torch.ones(case.steps, case.filters, dtype=torch.float64)
        values[f"conv{block}.norm.bias"] = torch.zeros(case.steps, case.filters, dtype=torch.float64)
    return {
        name: (value + spread * torch.randn(value.shape, generator=generator, dtype=torch.float64)).to(device, dtype)
        for name, value in values.items()
    }


def adapted_names(values: dict[str, Tensor]) -> list[str]:
    """The tensors that the inner loop adapts: those with a rate."""
    return [name for name in values if f"lr/{name}" in values]


def step_loss_weights(case: Case) -> list[float]:
    """Weights of the target losses at epoch 0: all equal (arXiv:1810.09502, section 4)."""
    return [1 / case.steps] * case.steps


def megabytes_of_inputs(case: Case) -> float:
    """Memory of the images of a float32 task batch."""
    examples = case.ways * (case.shots + case.targets) * case.tasks
    return examples * case.channels * case.side**2 * 4 / 2**20


def small(case: Case) -> Case:
    """The same kind of task at a tiny size, to try whether a script runs."""
    return replace(
        case, name=f"{case.name} (small)", ways=2, targets=min(case.targets, 2), tasks=2, steps=2, side=16, filters=4
    )
