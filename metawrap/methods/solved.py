"""One task, solved, and the modes of torch that solving runs in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

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
    """Gradients on or off, whatever mode the caller is in, inference mode too."""
    with torch.inference_mode(False), torch.set_grad_enabled(enabled):
        yield


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
