"""One task, solved, and the modes of torch that solving runs in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from metawrap.layers.per_step_norm import PerStepNorm
from metawrap.layers.step_clock import Moments
from metawrap.results import accuracy_of
from metawrap.tasks import Task, map_tensors


@dataclass
class Solved:
    """One task, solved. Only `loss` carries a graph.

    loss: scalar. step_losses: (inner steps,), NaN where not computed. moments: what the norms saw, pass by pass.
    """

    loss: Tensor
    step_losses: Tensor
    prediction: Any
    accuracy: Tensor | None
    moments: list[Moments] = field(default_factory=list)

    def detached(self) -> Solved:
        """The same without its graph, so that the graph can be freed."""
        return Solved(self.loss.detach(), self.step_losses, self.prediction, self.accuracy, self.moments)


def solved_from(loss: Tensor, step_losses: list[Tensor | None], prediction: Any, y: Any, moments: Any) -> Solved:
    """Gathers a task's outcome; everything but the loss is detached."""
    prediction = map_tensors(prediction, Tensor.detach)
    missing = torch.full_like(loss.detach(), torch.nan)
    losses = [missing if step is None else step.detach() for step in step_losses]
    stacked = torch.stack(losses) if losses else missing.new_empty(0)
    return Solved(loss, stacked, prediction, accuracy_of(prediction, y), moments)


def usable(task: Task) -> Task:
    """The task, with tensors that were made in inference mode cloned: they could not be saved for a backward pass."""
    return task.map(lambda tensor: tensor.clone() if tensor.is_inference() else tensor)


@contextmanager
def autograd(enabled: bool = True) -> Iterator[None]:
    """Gradients on or off, whatever mode the caller is in, inference mode too; under autocast without its cache.

    The cache holds casts of leaf tensors until the autocast block ends: stale ones after an optimizer step inside it,
    and one of every fast weight.
    """
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(enabled):
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)


@contextmanager
def restored_buffers(model: nn.Module) -> Iterator[Callable[[Tensor], None]]:
    """Puts back the user's own buffers on an exception, and where the function it yields is told to.

    The function takes a bool scalar on the model's device, so that nothing synchronises. Per-step norms are left out:
    their statistics are folded as values, when all has gone well.
    """
    owners = [module for module in model.modules() if not isinstance(module, PerStepNorm)]
    slots = [(m, name, b, b.clone()) for m in owners for name, b in m._buffers.items() if b is not None]

    @torch.no_grad()
    def restore(where: Tensor | None = None) -> None:
        for module, name, _, value in slots:
            present = module._buffers[name]
            if where is None or present is None:
                module._buffers[name] = value
            else:
                present.copy_(torch.where(where, value, present))

    try:
        yield restore
    except BaseException:
        restore()
        raise


@contextmanager
def untouched_buffers(model: nn.Module, when: bool = True) -> Iterator[None]:
    """Puts every buffer back, whether it was edited in place or replaced."""
    if not when:
        yield
        return
    slots = [
        (m, name, b, b._version, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, version, value in slots:
                if buffer._version != version:
                    buffer.copy_(value)
                module._buffers[name] = buffer
