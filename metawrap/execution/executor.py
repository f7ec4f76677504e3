"""How tasks are run: the meta-gradient of a batch, one chunk of tasks after another, and fewer at once where memory
runs out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from metawrap.errors import OutOfMemoryError
from metawrap.execution.out_of_memory import (
    can_be_flat,
    free_memory,
    is_out_of_memory,
    too_little_memory,
    warn_flat,
    warn_split,
)
from metawrap.inner_loop.inner_loop import added
from metawrap.results import MetaOutput, TaskOutcome
from metawrap.settings.groups import ExecutionOptions
from metawrap.snapshot.generators import Generators
from metawrap.snapshot.module_state import restored_buffers
from metawrap.tasks import Task, TaskBatch, device_of, usable

Chunk = tuple[Task, ...]
Solve = Callable[[Any, Task], TaskOutcome]
MetaGradient = tuple[list[TaskOutcome], list[Tensor | None]]


class Executor:
    """Runs the tasks of a batch in their order.

    several_at_once: the engine runs all tasks of a batch together. channels_last: images have this layout. memory: as
    in the options, until memory runs out. fitting: the chunk size after the last lack of memory; None while memory
    never ran out. settled: tasks run one after another, and no subclass has a say in it: the short path of a meta-step.
    same_everywhere: the other processes of a distributed run are known to have the same learner.
    keeps_memory: the process was told to keep the memory that it frees.
    """

    def __init__(self, options: ExecutionOptions, several_at_once: bool = False) -> None:
        self.options, self.several_at_once = options, several_at_once
        self.channels_last, self.memory = options.channels_last, options.memory
        self.fitting: int | None = None
        self.settled = True
        self.same_everywhere = self.keeps_memory = False

    def in_words(self, learner: Any) -> str:
        """How tasks are run, for `describe()`."""
        words = self.way_in_words(learner)
        if self.memory != self.options.memory:
            words += ", with the graph of one inner step at a time, as memory ran out"
        return words

    def way_in_words(self, learner: Any) -> str:
        """As `in_words`, without what it says about memory."""
        if self.several_at_once:
            reason = learner.checks.not_padded
            if reason is None:
                return "all tasks of near sizes at once in meta_step and forward, padded: a trial had the same gradient"
            return f"all tasks of one shape at once in meta_step and forward, unequal ones not padded: {reason}"
        return "one task after another" + (", images in channels_last" if self.channels_last else "")

    def state(self) -> dict[str, Any]:
        """What was found out, for a state_dict."""
        return {} if self.memory == self.options.memory else {"memory": self.memory}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what was found out."""
        self.same_everywhere = False
        if "memory" not in self.options.given:
            self.memory = state.get("memory", self.options.memory)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"same_everywhere": False, "keeps_memory": False}

    def meta_gradient(self, learner: Any, batch: TaskBatch, parameters: Sequence[nn.Parameter]) -> MetaGradient:
        """The outcome of each task, and the gradient of the mean of their losses with respect to the parameters.

        Raises:
            OutOfMemoryError: one task alone does not fit into memory.
        """
        run = self.in_memory if self.settled else self.way
        return run(learner, batch, parameters)

    def way(self, learner: Any, batch: TaskBatch, parameters: Sequence[nn.Parameter]) -> MetaGradient:
        """Computes the meta-gradient; subclasses choose here how tasks are run."""
        return self.in_memory(learner, batch, parameters)

    def in_memory(self, learner: Any, batch: TaskBatch, parameters: Sequence[nn.Parameter]) -> MetaGradient:
        """Computes the meta-gradient. If memory runs out, it tries flat memory first, then fewer tasks at once."""
        batch = TaskBatch(tuple(usable(task) for task in batch))
        learner._prepare(batch[0])
        at_once = self.options.tasks_per_backward or (len(batch) if self.several_at_once else 1)
        size, memory = min(at_once, self.fitting or len(batch)), self.memory
        while True:
            device = device_of(learner)
            # A device that records a graph must not be asked for its random state.
            recorded = learner.settings.execution.cuda_graphs
            generators = Generators(None if recorded else device) if size > 1 else None
            try:
                with restored_buffers(*stateful_modules(learner)):
                    return self._summed(learner, batch, parameters, size)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                cause = too_little_memory(error, learner.settings, self.memory)
            # Behind the handler: the exception holds the graph that did not fit.
            free_memory(device)
            if generators is not None:
                generators.put_back()
            if can_be_flat(learner, batch[0], self.memory):
                self.memory, self.settled = "flat", False
                warn_flat()
            elif size == 1:
                self.memory = memory  # A smaller graph did not help.
                raise OutOfMemoryError(cause)
            else:
                size = (size + 1) // 2
                self.fitting = size
                warn_split(size)

    def _summed(self, learner: Any, batch: TaskBatch, parameters: Sequence[nn.Parameter], size: int) -> MetaGradient:
        total: list[Tensor | None] = [None] * len(parameters)
        outcomes: list[TaskOutcome] = []
        chunks = list(batch.chunks(size))
        run = self.in_order if self.settled else self.chunk_gradients
        for found, gradients in run(learner, chunks, parameters, len(batch)):
            total = [added(old, new) for old, new in zip(total, gradients, strict=True)]
            outcomes += found
        return outcomes, total

    def in_order(
        self, learner: Any, chunks: Sequence[Chunk], parameters: Sequence[nn.Parameter], tasks: int
    ) -> Iterator[MetaGradient]:
        """Outcomes and gradient of each chunk of tasks, one chunk after another."""
        for chunk in chunks:
            solver = learner._solver(**self.changes(learner.settings))
            yield chunk_gradient(solver, chunk, parameters, learner.settings.norm, tasks)

    def chunk_gradients(
        self, learner: Any, chunks: Sequence[Chunk], parameters: Sequence[nn.Parameter], tasks: int
    ) -> Iterator[MetaGradient]:
        """Outcomes and gradient of each chunk of tasks, in their order; subclasses may run chunks at the same time."""
        return self.in_order(learner, chunks, parameters, tasks)

    def solved(self, learner: Any, tasks: Sequence[Task], solve: Solve) -> Iterator[TaskOutcome]:
        """The outcome of each task of an evaluation, in their order."""
        for task in tasks:
            yield solve(learner, task)

    def changes(self, settings: Any) -> dict[str, Any]:
        """Fields of the task solver that differ from the settings: flat memory, after memory ran out."""
        if self.memory == self.options.memory:
            return {}
        return {"settings": replace(settings, execution=replace(settings.execution, memory=self.memory))}


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


def edits_weights(model: nn.Module) -> bool:
    """Whether an embedding with max_norm edits its weights in forward."""
    return any(getattr(module, "max_norm", None) is not None for module in model.modules())


class OneProcess:
    """Stands for `Ranks` where torch has no process group."""

    def together(self) -> AbstractContextManager[None]:
        """Nothing to tell to other processes."""
        return nullcontext()

    def shared(
        self,
        outcomes: Sequence[TaskOutcome],
        parameters: Sequence[Tensor] = (),
        gradients: Sequence[Tensor | None] = (),
    ) -> MetaGradient:
        """This process's outcomes and gradients are all."""
        return list(outcomes), list(gradients)

    def averaged(self, output: MetaOutput, own: int, everyone: Sequence[TaskOutcome]) -> MetaOutput:
        """The output is that of all tasks."""
        return output
