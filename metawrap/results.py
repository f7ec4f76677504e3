"""What a learner hands back: metrics of a step, the differentiable output, an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metawrap.errors import ArgumentError, TaskError
from metawrap.outputs import prediction_for, prediction_in, refuse_unread
from metawrap.tasks import Task, TaskId, describe_value, map_tensors, tensors_in


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


@dataclass
class TaskOutcome:
    """The result of solving one task. Only `loss` carries a graph.

    loss: scalar. step_losses: (inner steps,), NaN where not computed. moments: statistics that the norms saw, pass by
    pass. head: the adapted head, if it is to be stored for the task, or what a fitted head keeps of the task.
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
        predicted = tensors_in(self.prediction)
        accuracy = [] if self.accuracy is None else [self.accuracy]
        seen = [value for moments in self.moments for value in (moments.mean, moments.variance)]
        copies = iter(_in_few_blocks([self.loss, self.step_losses, *predicted, *accuracy, *seen]))
        return replace(
            self,
            loss=next(copies),
            step_losses=next(copies),
            prediction=map_tensors(self.prediction, lambda _: next(copies)),
            accuracy=next(copies) if accuracy else None,
            moments=[m._replace(mean=next(copies), variance=next(copies)) for m in self.moments],
        )


def _in_few_blocks(tensors: Sequence[Tensor]) -> list[Tensor]:
    copies = list(tensors)
    groups: dict[Any, list[int]] = {}
    for place, tensor in enumerate(tensors):
        if type(tensor) is Tensor and tensor.layout == torch.strided:
            groups.setdefault((tensor.dtype, tensor.device), []).append(place)
    for places in groups.values():
        flat = [t if t.ndim == 1 else t.reshape(-1) for t in map(tensors.__getitem__, places)]
        parts = torch.cat(flat).split([len(t) for t in flat])  # type: ignore[no-untyped-call]
        for place, part in zip(places, parts, strict=True):
            copies[place] = part if tensors[place].ndim == 1 else part.view(tensors[place].shape)
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


# The label that cross-entropy ignores unless it is told otherwise.
IGNORED = -100


def are_logits(prediction: Any, y: Any) -> bool:
    """Whether these are (examples, classes, ...) logits and (examples, ...) labels."""
    if not (isinstance(prediction, Tensor) and isinstance(y, Tensor)) or y.is_floating_point() or y.is_complex():
        return False
    fits = prediction.ndim == y.ndim + 1 and prediction.shape[:1] + prediction.shape[2:] == y.shape
    return bool(fits) and prediction.shape[1] > 1


_OF_LOSSES = ' Of losses in training mode, methods with an inner loop know: outputs={"losses_in_training_mode": True}.'
# Losses of torch on one score for each class, whose prediction is the class of the largest score.
_CLASS_LOSSES: dict[Any, Callable[..., Tensor]] = {
    nn.CrossEntropyLoss.forward: F.cross_entropy,
    nn.NLLLoss.forward: F.nll_loss,
    nn.MultiMarginLoss.forward: F.multi_margin_loss,
}


def class_loss(loss_fn: Any) -> Callable[..., Tensor] | None:
    """The loss of torch on classes that this is, itself or as module or partial; None for any other loss."""
    return function_of(loss_fn, _CLASS_LOSSES)


def function_of(loss_fn: Any, losses: Mapping[Any, Callable[..., Tensor]]) -> Callable[..., Tensor] | None:
    """The function of torch that a loss function computes, if it is one of `losses`; else None.

    Args:
        loss_fn: the function itself, its module (`nn.MSELoss()`), or a partial of either.
        losses: functions by the forward method of their module, such as {nn.MSELoss.forward: F.mse_loss}.
    """
    function = _bare(loss_fn)
    if isinstance(function, nn.Module):
        return losses.get(type(function).forward)
    return next((known for known in losses.values() if known is function), None)


def accuracy_of(prediction: Any, y: Any, loss_fn: Any, known: bool = False) -> Tensor | None:
    """Fraction of right classes of (examples, classes, ...) scores on (examples, ...) labels.

    None unless the loss is cross-entropy, nll_loss or multi_margin_loss of torch, as function, module or partial, or
    the method knows that these are classes (`known`): shapes do not tell, as ordinal labels and tokens have them too.
    """
    if not isinstance(prediction, Tensor):
        prediction = prediction_in(prediction)
    if not (known or class_loss(loss_fn)) or not are_logits(prediction, y):
        return None
    labelled = y != ignored_label(loss_fn)
    right = (prediction.argmax(1) == y) & labelled
    accuracy: Tensor = right.sum() / labelled.sum()
    return accuracy


def ignored_label(loss_fn: Any) -> int:
    """The label that a loss ignores: its own `ignore_index`, or torch's."""
    return int(loss_option(loss_fn, "ignore_index", IGNORED))


def loss_option(loss_fn: Any, name: str, default: Any) -> Any:
    """An option of a loss that is a partial or a module."""
    keywords = loss_fn.keywords if isinstance(loss_fn, partial) else {}
    return keywords.get(name, getattr(_bare(loss_fn), name, default))


def _bare(loss_fn: Any) -> Any:
    return loss_fn.func if isinstance(loss_fn, partial) else loss_fn


def task_loss(loss_fn: Any, prediction: Any, y: Any, part: str) -> Tensor:
    """The loss of one task's examples, a scalar.

    Args:
        part: which examples, "support" or "target", for errors.
    Raises:
        TaskError: a loss on classes met a label that the model has no output for.
        ArgumentError: the loss function returned something other than a scalar tensor, or cannot read the output.
    """
    if not isinstance(prediction, Tensor):
        prediction = prediction_for(loss_fn, prediction)
    try:
        loss = loss_fn(prediction, y)
    except (AttributeError, TypeError, LookupError) as error:
        refuse_unread("loss_fn", prediction, error, _OF_LOSSES)
        if isinstance(error, IndexError) and class_loss(loss_fn) and isinstance(y, Tensor):
            ways = prediction.shape[1]
            raise TaskError(
                f"{part}_y holds labels {int(y.min())}..{int(y.max())}, but the model has {ways} outputs. Relabel the "
                f"episode to 0..{ways - 1}, or give the model more outputs."
            ) from error
        raise
    if not isinstance(loss, Tensor) or loss.ndim:
        raise ArgumentError(f"loss_fn: expected a scalar tensor from it, but got {describe_value(loss)}.")
    return loss
