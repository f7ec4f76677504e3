"""The outcome of one task, and the modes of torch in which a task is solved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metawrap.errors import ArgumentError, TaskError
from metawrap.inner_loop.masking import ignored_label
from metawrap.layers.step_clock import Moments
from metawrap.results import MetaOutput, accuracy_of
from metawrap.tasks import Task, TaskId, describe_value, map_tensors, tensors_in


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
    moments: list[Moments] = field(default_factory=list)
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
    moments: list[Moments] | None = None,
    head: dict[str, Tensor] | None = None,
) -> TaskOutcome:
    """The outcome of one task; everything but the loss is detached. `loss_fn` says which label does not count."""
    prediction = map_tensors(prediction, Tensor.detach)
    missing = torch.full_like(loss.detach(), torch.nan)
    losses = [missing if step is None else step.detach() for step in step_losses]
    stacked = torch.stack(losses) if losses else missing.new_empty(0)
    accuracy = accuracy_of(prediction, task.target_y, ignored_label(loss_fn))
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


def task_loss(loss_fn: Any, prediction: Any, y: Any, part: str) -> Tensor:
    """The loss of one task's examples, a scalar.

    Args:
        part: which examples, "support" or "target", for errors.
    Raises:
        TaskError: cross-entropy met a label that the model has no output for.
        ArgumentError: the loss function returned something other than a scalar tensor.
    """
    try:
        loss = loss_fn(prediction, y)
    except IndexError as error:
        if loss_fn is F.cross_entropy and isinstance(y, Tensor) and isinstance(prediction, Tensor):
            ways = prediction.shape[1]
            raise TaskError(
                f"{part}_y holds labels {int(y.min())}..{int(y.max())}, but the model has {ways} outputs. Relabel the "
                f"episode to 0..{ways - 1}, or give the model more outputs."
            ) from error
        raise
    if not isinstance(loss, Tensor) or loss.ndim:
        raise ArgumentError(f"loss_fn: expected a scalar tensor from it, but got {describe_value(loss)}.")
    return loss


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
        accuracy=torch.stack(accuracies).mean() if accuracies else None,
    )


def dense(gradient: Tensor) -> Tensor:
    """The gradient as an ordinary tensor: some embeddings have sparse gradients."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def usable(task: Task) -> Task:
    """The task with its inference-mode tensors cloned, as a backward pass cannot save such tensors."""
    return task.map(lambda tensor: tensor.clone() if tensor.is_inference() else tensor)


@contextmanager
def autograd(enabled: bool = True) -> Iterator[None]:
    """Gradients on or off, whatever mode the caller is in, inference mode too; autocast runs without its cache.

    That cache keeps casts of leaf tensors until the autocast block ends: one of every fast weight, and stale ones after
    an optimizer step in the block.
    """
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(enabled):
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
