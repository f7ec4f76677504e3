"""The meta-gradient of a task batch, one chunk of tasks after another; fewer at once where memory runs out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from metawrap.errors import OutOfMemoryError
from metawrap.execution.out_of_memory import free_memory, is_out_of_memory, too_little_memory, warn_split
from metawrap.inner_loop.inner_loop import added
from metawrap.results import TaskOutcome
from metawrap.snapshot.generators import Generators
from metawrap.snapshot.module_state import restored_buffers
from metawrap.tasks import Task, TaskBatch, device_of, usable

Chunk = tuple[Task, ...]
MetaGradient = tuple[list[TaskOutcome], list[Tensor | None]]


class Executor:
    """Runs the tasks of a batch in their order.

    fitting: how many tasks at once were seen to fit into memory; None while memory never ran out. same_everywhere:
    the other processes of a distributed run are known to have the same learner; a copy does not know it.
    """

    def __init__(self) -> None:
        self.fitting: int | None = None
        self.same_everywhere = False

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"same_everywhere": False}

    def meta_gradient(self, learner: Any, batch: TaskBatch, parameters: Sequence[nn.Parameter]) -> MetaGradient:
        """The outcome of each task, and the gradient of the mean of their losses with respect to the parameters.

        Raises:
            OutOfMemoryError: one task alone does not fit into memory.
        """
        batch = TaskBatch(tuple(usable(task) for task in batch))
        learner._prepare(batch[0])
        size = min(self.tasks_at_once(learner, len(batch)), self.fitting or len(batch))
        while True:
            # A single task is not tried again. A device that records a graph must not be asked for its random state.
            device = device_of(learner)
            generators = Generators(None if learner.settings.execution.cuda_graphs else device)
            try:
                with restored_buffers(*stateful_modules(learner)) if size > 1 else nullcontext():
                    return self._summed(learner, batch, parameters, size)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    raise OutOfMemoryError(too_little_memory(error, learner.settings)) from error
            # Behind the handler: the exception holds the graph that did not fit.
            free_memory(device)
            generators.put_back()
            size = (size + 1) // 2
            self.fitting = size
            warn_split(size)

    def tasks_at_once(self, learner: Any, tasks: int) -> int:
        """How many tasks of a batch are unrolled before a backward pass."""
        return learner.settings.execution.tasks_per_backward or 1

    def _summed(self, learner: Any, batch: TaskBatch, parameters: Sequence[nn.Parameter], size: int) -> MetaGradient:
        total: list[Tensor | None] = [None] * len(parameters)
        outcomes: list[TaskOutcome] = []
        for found, gradients in self._chunks_in_order(learner, list(batch.chunks(size)), parameters, len(batch)):
            total = [added(old, new) for old, new in zip(total, gradients, strict=True)]
            outcomes += found
        return outcomes, total

    def _chunks_in_order(
        self, learner: Any, chunks: Sequence[Chunk], parameters: Sequence[nn.Parameter], tasks: int
    ) -> Iterator[MetaGradient]:
        for chunk in chunks:
            yield chunk_gradient(learner._solver(), chunk, parameters, learner.settings.norm, tasks)


def chunk_gradient(
    solver: Any, chunk: Chunk, parameters: Sequence[nn.Parameter], norm: str, tasks: int
) -> MetaGradient:
    """Outcomes of a chunk of tasks, and its part in the gradient of the mean over all `tasks`."""
    loss, outcomes = solver.solve_all(chunk, training=True, norm=norm, whole_graph=False)
    gradients = torch.autograd.grad(loss / tasks, parameters, allow_unused=True)
    del loss
    return [outcome.packed() for outcome in outcomes], list(gradients)


def stateful_modules(learner: Any) -> list[nn.Module]:
    """The modules that a pass may run: the model, the loss function if it is one, and the method's own parts."""
    return list(learner.children())
