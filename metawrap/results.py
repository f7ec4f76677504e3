"""What a learner hands back: metrics of a step, the differentiable output, an evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metawrap.losses import accuracy_of
from metawrap.tasks import Task, TaskId, map_tensors, tensors_in


class MetaOutput(NamedTuple):
    """Result of `learner(task_batch)`. Only `loss` is differentiable, once; the rest is detached.

    A named tuple, so that `DistributedDataParallel` and its like find the tensors in it. Inside of that, `loss` and
    `accuracy` are over the tasks of all processes, `step_losses` and `predictions` are of this process's own.

    loss: scalar, mean over tasks. step_losses: (tasks, inner steps), NaN where a loss has no weight. predictions: one
    per task, on its target set, after the last step. accuracy: scalar mean over tasks, or None; see `accuracy_of`.
    """

    loss: Tensor
    step_losses: Tensor
    predictions: list[Any]
    accuracy: Tensor | None


@dataclass(frozen=True)
class Trouble:
    """Where a task's numbers stopped being finite.

    task: its place in the batch, from 0. classes: `Task.classes`. step: the inner step, from 0; None where it is no
    inner step. place: what was not finite.
    """

    task: int
    classes: tuple[int, ...] | None
    step: int | None
    place: str

    def __str__(self) -> str:
        classes = "" if self.classes is None else f" (classes {', '.join(map(str, self.classes))})"
        where = "" if self.step is None else f"in inner step {self.step + 1} "
        return f"task {self.task + 1} of the batch{classes}: {where}{self.place} not finite"


class StepMetrics:
    """Result of `learner.meta_step(task_batch)`. A field is read from the device when it is asked for."""

    def __init__(
        self,
        loss: Tensor,
        step_losses: Tensor,
        accuracy: Tensor | None,
        gradient_norm: Tensor,
        applied: Tensor,
        meta_lr: float,
        epoch: int,
        iteration: int,
    ) -> None:
        self._loss, self._accuracy, self._gradient_norm, self._applied = loss, accuracy, gradient_norm, applied
        self.step_losses = step_losses
        self.meta_lr = meta_lr
        self.epoch = epoch
        self.iteration = iteration

    @property
    def loss(self) -> float:
        """The meta-loss: weighted over steps, mean over tasks."""
        return float(self._loss)

    @property
    def accuracy(self) -> float | None:
        """Fraction of targets right after the last step, mean over tasks; None where `accuracy_of` does not know it."""
        return None if self._accuracy is None else float(self._accuracy)

    @property
    def gradient_norm(self) -> float:
        """L2 norm of the whole meta-gradient, before clipping."""
        return float(self._gradient_norm)

    @property
    def skipped(self) -> bool:
        """Whether the update was skipped because the meta-gradient was not finite."""
        return not bool(self._applied)

    def __repr__(self) -> str:
        accuracy = "" if self.accuracy is None else f", accuracy={self.accuracy:.4f}"
        skipped = ", skipped=True" if self.skipped else ""
        return f"StepMetrics(iteration={self.iteration}, loss={self.loss:.4f}{accuracy}{skipped})"


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
        values = [
            f"accuracy {100 * found.mean:.2f} % +- {100 * found.interval:.2f}"
            if name == "accuracy"
            else f"{name} {found.mean:.4g} +- {found.interval:.2g}"
            for name, found in self.metrics.items()
        ]
        steps = "" if self.steps is None else f"{self.steps} inner steps, "
        return f'{", ".join(values)} (95 %, {self.tasks} tasks, {steps}norm="{self.norm}", {kind})'


# The label that cross-entropy ignores unless it is told otherwise.


@dataclass
class TaskOutcome:
    """The result of solving one task. Only `loss` carries a graph.

    loss: scalar. step_losses: (inner steps,), NaN where not computed. moments: statistics that the norms saw, pass by
    pass. head: the adapted head, if it is to be stored for the task.
    """

    loss: Tensor
    step_losses: Tensor
    prediction: Any
    accuracy: Tensor | None
    moments: list[Any] = field(default_factory=list)
    task_id: TaskId | None = None
    head: dict[str, Tensor] = field(default_factory=dict)

    def detached(self) -> TaskOutcome:
        """The same without its graph, so that the graph can be freed."""
        return replace(self, loss=self.loss.detach())

    def packed(self) -> TaskOutcome:
        """A copy in one block of memory for each dtype, made before the graph is freed.

        Outcomes stay until the last task is solved. Many small blocks between freed large ones fragment the heap.
        """
        own = (
            self.loss,
            self.step_losses,
            self.prediction,
            self.accuracy,
            [(m.mean, m.variance) for m in self.moments],
        )
        values = iter(_in_few_blocks(tensors_in(own)))
        loss, step_losses, prediction, accuracy, pairs = map_tensors(own, lambda _: next(values))
        moments = [m._replace(mean=a, variance=b) for m, (a, b) in zip(self.moments, pairs, strict=True)]
        return replace(
            self, loss=loss, step_losses=step_losses, prediction=prediction, accuracy=accuracy, moments=moments
        )


def _in_few_blocks(tensors: Sequence[Tensor]) -> list[Tensor]:
    copies = list(tensors)
    groups: dict[Any, list[int]] = {}
    for place, tensor in enumerate(tensors):
        if type(tensor) is Tensor and tensor.layout == torch.strided:
            groups.setdefault((tensor.dtype, tensor.device), []).append(place)
    for places in groups.values():
        block = torch.cat([tensors[place].reshape(-1) for place in places])
        parts = block.split([tensors[place].numel() for place in places])  # type: ignore[no-untyped-call]
        for place, part in zip(places, parts, strict=True):
            copies[place] = part.view(tensors[place].shape)
    return copies


def outcome_of(
    task: Task,
    loss: Tensor,
    prediction: Any,
    *,
    loss_fn: Any,
    step_losses: Sequence[Tensor | None] = (),
    moments: list[Any] | None = None,
    head: dict[str, Tensor] | None = None,
    known: bool = False,
) -> TaskOutcome:
    """The outcome of one task; everything but the loss is detached. loss_fn, known: see `accuracy_of`."""
    prediction = map_tensors(prediction, Tensor.detach)
    missing = torch.full_like(loss.detach(), torch.nan)
    losses = [missing if step is None else step.detach() for step in step_losses]
    stacked = torch.stack(losses) if losses else missing.new_empty(0)
    accuracy = accuracy_of(prediction, task.target_y, loss_fn, known)
    return TaskOutcome(loss, stacked, prediction, accuracy, moments or [], task.id, head or {})


@dataclass
class OneByOne:
    """Solves the tasks of a batch one by one. solve: `solve(task, training=..., norm=..., ...)` to a task's outcome."""

    solve: Callable[..., TaskOutcome]

    def solve_all(
        self, tasks: Sequence[Task], *, training: bool, norm: str, whole_graph: bool = True
    ) -> tuple[Tensor, list[TaskOutcome]]:
        """The sum of the tasks' losses, with its graph, and the outcome of each task without graph."""
        each = [self.solve(task, training=training, norm=norm, whole_graph=whole_graph) for task in tasks]
        return torch.stack([outcome.loss for outcome in each]).sum(), [outcome.detached() for outcome in each]


def mean_loss(outcomes: Sequence[TaskOutcome]) -> Tensor:
    """The mean of the tasks' losses."""
    return torch.stack([outcome.loss for outcome in outcomes]).sum() / len(outcomes)


def meta_output(outcomes: Sequence[TaskOutcome], loss: Tensor) -> MetaOutput:
    """What a learner returns for a batch of tasks, with the given meta-loss."""
    accuracies = [outcome.accuracy for outcome in outcomes if outcome.accuracy is not None]
    return MetaOutput(
        loss=loss,
        step_losses=torch.stack([outcome.step_losses for outcome in outcomes]),
        predictions=[outcome.prediction for outcome in outcomes],
        accuracy=torch.stack(accuracies).mean() if len(accuracies) == len(outcomes) else None,
    )
