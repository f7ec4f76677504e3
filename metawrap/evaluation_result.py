"""Results of an evaluation: each metric with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class MetricResult(NamedTuple):
    """A metric over tasks. interval: half width of the 95 % confidence interval of the mean. per_task: (tasks,)."""

    mean: float
    interval: float
    per_task: Tensor

    @classmethod
    def of(cls, per_task: Tensor) -> MetricResult:
        """From the value of each task, (tasks,)."""
        spread = float(per_task.std()) if len(per_task) > 1 else math.nan
        return cls(float(per_task.mean()), 1.96 * spread / math.sqrt(len(per_task)), per_task)


@dataclass
class EvaluationResult:
    """Result of `learner.evaluate(tasks)`.

    metric: "accuracy", "loss", or the name of the user's (first) metric; `mean`, `interval` and `per_task` are of it.
    mean: over tasks. interval: half width of the 95 % confidence interval of the mean over tasks (normal approximation;
    NaN for one task). loss: mean target loss. norm: the batch-norm policy used. steps: inner steps taken; None for a
    method without an inner loop.
    per_task: (tasks,) the metric of each task. predictions: one per task if they were asked for. metrics: all, by name.
    """

    metric: str
    mean: float
    interval: float
    loss: float
    tasks: int
    norm: str
    steps: int | None
    per_task: Tensor
    predictions: list[Any] = field(default_factory=list, repr=False)
    metrics: dict[str, MetricResult] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, values: Mapping[str, Tensor], losses: Tensor, **details: Any) -> EvaluationResult:
        """From metrics by name and the losses, (tasks,) each."""
        metrics = {name: MetricResult.of(per_task) for name, per_task in values.items()}
        name, first = next(iter(metrics.items()))
        return cls(name, *first[:2], float(losses.mean()), len(losses), per_task=first[2], metrics=metrics, **details)

    @classmethod
    def joined(cls, parts: Sequence[EvaluationResult]) -> EvaluationResult:
        """One result of evaluations of the same learner on parts of the tasks, in their order."""
        first, predictions = parts[0], [each for part in parts for each in part.predictions]
        values = {name: torch.cat([part.metrics[name].per_task for part in parts]) for name in first.metrics}
        losses = torch.cat([torch.full_like(part.per_task, part.loss) for part in parts])
        return cls.of(values, losses, norm=first.norm, steps=first.steps, predictions=predictions)

    @property
    def accuracy(self) -> float | None:
        """The mean accuracy in 0..1, or None when it was not measured."""
        return self.metrics["accuracy"].mean if "accuracy" in self.metrics else None

    def __str__(self) -> str:
        kind = "transductive" if self.norm == "batch" else "inductive"
        known = self.tasks > 1  # One task has no interval.
        values = [
            f"accuracy {100 * found.mean:.2f} %" + (f" +- {100 * found.interval:.2f}" if known else "")
            if name == "accuracy"
            else f"{name} {found.mean:.4g}" + (f" +- {found.interval:.2g}" if known else "")
            for name, found in self.metrics.items()
        ]
        steps = "" if self.steps is None else f"{self.steps} inner steps, "
        tasks = f"95 %, {self.tasks} tasks" if known else "1 task"
        return f'{", ".join(values)} ({tasks}, {steps}norm="{self.norm}", {kind})'
