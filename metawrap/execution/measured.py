"""Tuning: the first meta-steps time layouts, worker threads and worker processes, and the fastest is kept."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from metawrap.checks.first_task import carries_channels_last, model_unchanged
from metawrap.execution.allocator import keep_memory
from metawrap.execution.executor import Executor, MetaGradient
from metawrap.execution.parallel import ParallelExecutor
from metawrap.execution.tuning import Speed, fastest
from metawrap.settings.groups import ExecutionOptions
from metawrap.tasks import Task, TaskBatch, device_of, usable

_LOG = logging.getLogger(__name__)

# A meta-step with fewer multiplications and additions in its forward passes is not tuned. This is a count and not a
# time, so that small runs always end with the same bits: results of a tuned run may differ by rounding.
_WORTH_WHILE = 5e8
_STEPS = 2
_SHORT = Speed(why="a meta-step is too small to divide")


class MeasuredExecutor(ParallelExecutor):
    """Runs the tasks of a batch in the way that was measured to be fastest. decided: whether the choice is made."""

    def __init__(self, options: ExecutionOptions, several_at_once: bool = False) -> None:
        super().__init__(options, several_at_once)
        self.decided = False

    def way_in_words(self, learner: Any) -> str:
        """See `Executor.way_in_words`."""
        if self.decided or device_of(learner).type != "cpu":
            return super().way_in_words(learner)
        which = "first" if self.options.tune is True else "second"
        return f"one task after another until the {which} meta-step, which measures what is faster"

    def state(self) -> dict[str, Any]:
        """See `Executor.state`."""
        return super().state() | ({"speed": asdict(self.speed)} if self.decided and self.speed != _SHORT else {})

    def load_state(self, state: dict[str, Any]) -> None:
        """See `Executor.load_state`."""
        super().load_state(state)
        self.decided = self.settled = False
        self._take(Speed(**state.get("speed", {})), decided="speed" in state)

    def way(self, learner: Any, batch: TaskBatch, parameters: Sequence[nn.Parameter]) -> MetaGradient:
        """See `Executor.way`."""
        if not self.decided and (self.options.tune is True or (learner.iteration and device_of(learner).type == "cpu")):
            if self.options.tune is True or _work(learner, batch) >= _WORTH_WHILE:
                self._measure(learner, batch, parameters)
            else:
                self._take(_SHORT)
        return super().way(learner, batch, parameters)

    def _take(self, speed: Speed, decided: bool = True) -> None:
        self.speed, self.channels_last, self.decided = speed, speed.channels_last, decided
        if not speed.processes:
            self.end_staying()
        self.settled = decided and speed.workers == 1 and self.memory == "unrolled"

    def _measure(self, learner: Any, batch: TaskBatch, parameters: Sequence[nn.Parameter]) -> None:
        """Times the meta-gradient of a short inner loop in each way; in second order, if training ever reaches it."""
        settings, before, size = learner.settings, self.speed, self.options.tasks_per_backward or 1
        # Four tasks for each core. With two, the constant cost of processes hides a part of what they gain.
        few = TaskBatch(tuple(map(usable, batch.tasks[: 4 * torch.get_num_threads() * size])))
        if self.keeps_memory:
            keep_memory(one_arena=True)  # A block that one thread frees then serves another.

        def timed(speed: Speed) -> None:
            self.speed, self.channels_last = speed, speed.channels_last
            with model_unchanged(learner):
                if speed == Speed():
                    self.in_memory(learner, few, parameters)
                else:  # A way for which memory is too short is passed over.
                    self._summed(learner, few, parameters, min(size, self.fitting or size))

        try:
            task = few[0]
            learner._prepare(task)
            twice = not learner.checks.findings[learner.model.training].no_second_derivative
            # Each inner step takes as long as any other.
            short = replace(settings, inner_steps=min(_STEPS, settings.inner_steps))
            if not math.isinf(settings.first_order_epochs) and twice:
                short = replace(short, first_order_epochs=0)
            self.probed = {"settings": short}
            chosen = fastest(timed, self._layouts(learner, task), self._workers(learner, task))
        except BaseException:
            self._take(before, decided=False)
            raise
        finally:
            self.probed = {}
        self._take(chosen)
        _LOG.info("Tasks of a meta-step: %s", chosen)

    def _layouts(self, learner: Any, task: Task) -> list[bool]:
        """Layouts that give the same gradient, besides the usual one; of images alone."""
        images = any(isinstance(module, nn.modules.conv._ConvNd) for module in learner.model.modules())
        return [True] if images and carries_channels_last(learner, task, **self.probed) else []

    def _workers(self, learner: Any, task: Task) -> list[tuple[int, bool]]:
        """Numbers of workers that give the same gradient, each with whether they are processes."""
        cores = torch.get_num_threads()
        counts = [count for count in range(2, cores + 1) if cores % count == 0]
        return [
            (count, processes)
            for processes in (False, True)
            if counts
            and not self.why_in_order(learner, processes)
            and not self.worker_differs(learner, learner._solver(**self.probed), task, processes)
            for count in counts
        ]


def _work(learner: Any, batch: TaskBatch) -> float:
    """The number of multiplications and additions in all forward passes of one meta-step."""
    task = usable(batch[0])
    learner._prepare(task)
    try:
        targets = len(task.target_y) / max(1, len(task.support_y))
    except TypeError:  # Labels of the user's own, without rows.
        targets = 1.0
    return float(learner.checks.work * learner.settings.inner_steps * len(batch) * (1 + targets))


def executor_for(options: ExecutionOptions, engine: str) -> Executor:
    """The executor of a gradient-based learner, by the name of its engine."""
    several_at_once = engine == "batched"
    if options.measures and (engine == "functional" or options.tune is True):
        return MeasuredExecutor(options, several_at_once)
    in_order = options.workers == 1 and options.memory == "unrolled" and not options.cuda_graphs
    return (Executor if in_order else ParallelExecutor)(options, several_at_once)
