"""One task, solved, and the modes of torch that solving runs in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metawrap.layers.step_clock import Moments
from metawrap.results import accuracy_of
from metawrap.tasks import Task, TaskId, map_tensors, tensors_in


@dataclass
class Solved:
    """One task, solved. Only `loss` carries a graph.

    loss: scalar. step_losses: (inner steps,), NaN where not computed. moments: what the norms saw, pass by pass.
    head: the adapted head, where it is to be stored for the task.
    """

    loss: Tensor
    step_losses: Tensor
    prediction: Any
    accuracy: Tensor | None
    moments: list[Moments] = field(default_factory=list)
    task_id: TaskId | None = None
    head: dict[str, Tensor] = field(default_factory=dict)

    def detached(self) -> Solved:
        """The same without its graph, so that the graph can be freed."""
        return replace(self, loss=self.loss.detach())

    def packed(self) -> Solved:
        """The same, copied into one block of memory for each dtype, for when the graph is gone.

        It stays until the last task is solved, and small blocks that stay between large ones that went tear the memory
        of a process to pieces.
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


def solved_from(
    loss: Tensor,
    step_losses: list[Tensor | None],
    prediction: Any,
    task: Task,
    moments: list[Moments],
    head: dict[str, Tensor],
    ignored: int,
) -> Solved:
    """Gathers a task's outcome; everything but the loss is detached. ignored: the label that does not count."""
    prediction = map_tensors(prediction, Tensor.detach)
    missing = torch.full_like(loss.detach(), torch.nan)
    losses = [missing if step is None else step.detach() for step in step_losses]
    stacked = torch.stack(losses) if losses else missing.new_empty(0)
    return Solved(loss, stacked, prediction, accuracy_of(prediction, task.target_y, ignored), moments, task.id, head)


def attached(value: Tensor, pairs: Iterable[tuple[Tensor, Tensor | None]]) -> Tensor:
    """The value, as a tensor whose gradient with respect to each tensor is the one beside it; differentiable once.

    For gradients that were made as values, while their graph still stood.
    """
    present = [(tensor, g) for tensor, g in pairs if g is not None and tensor.requires_grad]
    return _Attached.apply(value, [g for _, g in present], *(tensor for tensor, _ in present))  # type: ignore[no-any-return]


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> Any:
        return None, None, *(outer * gradient for gradient in ctx.gradients)


def added(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """The sum of two gradients, where None is zero."""
    if old is None or new is None:
        return new if old is None else old
    return old + new


def dense(gradient: Tensor) -> Tensor:
    """The gradient as an ordinary tensor: some embeddings have sparse ones."""
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
