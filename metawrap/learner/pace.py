"""How a meta-gradient is run, which changes its time and never its value: in order, in threads, or by replays.

What the caller chose, or what was measured; and in order, whatever was chosen, where tasks are not independent.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from metawrap.checks.first_look import FirstLook, Gradients, warn_tasks_in_order
from metawrap.engines import ENGINES, BufferEdits, Engine, differentiable_twice
from metawrap.engines.batched import first_line
from metawrap.execution.cuda_graphs import Recordings, check_can_record, form_of
from metawrap.execution.forked_processes import ChildError, LeftBehindError, in_processes, refused
from metawrap.execution.threads import has_modes, in_threads, replica
from metawrap.execution.tuning import Speed, fastest, to_channels_last
from metawrap.inner_loop.head_starts import HeadStart
from metawrap.inner_loop.outcome import Solved, usable
from metawrap.learner.learner import Chunk, LossFunction, Method, Result
from metawrap.settings.schedules import is_second_order, step_loss_weights
from metawrap.settings.settings import Settings
from metawrap.snapshot.generators import Generators
from metawrap.snapshot.module_state import restored_buffers
from metawrap.snapshot.reachable_state import difference, state_of
from metawrap.surgery.inspect import find_hooks
from metawrap.tasks import Task, TaskBatch, map_tensors


class Paced(Method):
    """A method on an engine that can solve tasks in threads, in another layout, or by replays."""

    settings: Settings
    _chosen: tuple[str, str]
    _engine: Engine | None
    _buffer_edits: BufferEdits
    _looks: dict[bool, FirstLook]
    _has_hard_gates: bool
    head_start: HeadStart

    def __init__(self, model: nn.Module, settings: Settings, loss_fn: LossFunction) -> None:
        super().__init__(model, settings, loss_fn)
        self._tuned: Speed | None = None
        self._recordings = Recordings()
        self._in_one_thread: str | None = None
        # Whether the passes of a task may be run in another order, as somebody would catch what comes of it; and why
        # they may not be for this model, if so.
        self._any_order = False
        self._passes_in_order: str | None = None

    @abstractmethod
    def _worker_differs(self, task: Task, processes: bool) -> str | None:
        """Why a worker, in a thread or a process, does not do what the learner does, or None."""

    @abstractmethod
    def _carries_layout(self, task: Task) -> bool:
        """Whether the gradient is the same in channels_last."""

    @abstractmethod
    def _unchanged(self) -> AbstractContextManager[None]:
        """Puts back all that a look at the model and the loss may change."""

    def _meta_gradient(
        self, batch: TaskBatch, parameters: list[nn.Parameter]
    ) -> tuple[list[Solved], list[Tensor | None]]:
        if self.settings.tune and self._tuned is None:
            self._tune(batch, parameters)
        if self.settings.cuda_graphs:
            return self._replayed(batch, parameters)
        if self.speed.workers == 1 and self.settings.memory == "unrolled":
            return super()._meta_gradient(batch, parameters)
        generators = Generators()
        self._any_order = self.settings.memory == "flat"
        try:
            with restored_buffers(*self._stateful()):
                return super()._meta_gradient(batch, parameters)
        except DisturbedError as disturbed:
            # What began after the first look: random draws, a counter. From now on in order, this step included.
            generators.put_back()
            if self._in_any_order():
                self._passes_in_order = str(disturbed)  # Which may be all; if not, the next try shows it.
                return self._meta_gradient(batch, parameters)
            self._in_one_thread = str(disturbed)
            failed = isinstance(disturbed.__cause__, ChildError)
        finally:
            self._any_order = False
        try:
            found = super()._meta_gradient(batch, parameters)
        except BaseException:
            if failed:  # Here as there, so it is not the process that is to blame.
                self._in_one_thread = None
            raise
        if self.settings.workers not in (1, "auto"):  # What was measured is nobody's wish; describe() says it.
            warn_tasks_in_order(self.settings.workers, self._in_one_thread)
        return found

    def _replayed(self, batch: TaskBatch, parameters: list[nn.Parameter]) -> tuple[list[Solved], list[Tensor | None]]:
        batch = TaskBatch(tuple(usable(task) for task in batch))
        self._prepare(batch[0])
        stored = "stored heads are another for each task" if self.settings.head_init == "stored" else None
        check_can_record(self._device, self._changes() or stored)
        order = is_second_order(self.epoch, self.settings.first_order_epochs)
        weights = step_loss_weights(self.settings.inner_steps, self.epoch, self.settings.step_loss_epochs)
        form = form_of(batch, self.model, parameters, order, tuple(weights), self.settings, id(self.loss_fn))

        def run(these: TaskBatch) -> tuple[list[Solved], list[Tensor | None]]:
            return super(Paced, self)._meta_gradient(these, parameters)

        return self._recordings.run(run, batch, form)

    def _in_any_order(self) -> bool:
        """Whether the passes of a task may be run in another order than theirs."""
        if not self._any_order or self._passes_in_order or self._edits_weights():
            return False
        return self._changes() is None

    def _edits_weights(self) -> bool:
        return any(getattr(module, "max_norm", None) is not None for module in self.model.modules())

    def _changes(self) -> str | None:
        """What solving a task leaves behind for the next one, or None."""
        if self.settings.head_init == "random":
            return "random heads come in the order of the tasks"
        if self._buffer_edits.edited:
            return f"forward edits the buffer '{min(self._buffer_edits.edited)}'"
        if nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
            return "torch has hooks on all modules, which may touch what is outside of it"
        if (hooked := find_hooks(self.model)) is not None:
            return f"'{hooked or 'the model itself'}' has hooks, which may touch what is outside of it"
        return look.left_behind if (look := self._looks.get(True)) else None

    def _parts(self) -> tuple[nn.Module, Any]:
        return self.model, self.loss_fn

    def _tune(self, batch: TaskBatch, parameters: list[nn.Parameter]) -> None:
        """Chooses by the time of this batch's meta-gradient, of second order where training comes to that."""
        settings, cores = self.settings, torch.get_num_threads()
        few = TaskBatch(batch.tasks[: 2 * cores * (settings.tasks_per_backward or 1)])

        def run(speed: Speed) -> Gradients:
            self._tuned = speed
            with self._unchanged():
                return super(Paced, self)._meta_gradient(few, parameters)[1]

        images = any(isinstance(m, nn.modules.conv._ConvNd) for m in self.model.modules())
        chosen = None
        try:
            self._prepare(usable(few[0]))
            if (
                not math.isinf(settings.first_order_epochs)
                and not self._looks[self.model.training].no_second_derivative
            ):
                self.settings = replace(settings, first_order_epochs=0)
            task = usable(few[0])
            counts = [n for n in range(2, cores + 1) if cores % n == 0]
            workers = [
                (count, processes)
                for processes in (False, True)
                if counts and not self._alone(processes) and not self._worker_differs(task, processes)
                for count in counts
            ]
            chosen = fastest(run, [True] if images and self._carries_layout(task) else [], workers)
        finally:
            self.settings, self._tuned = settings, chosen

    @property
    def speed(self) -> Speed:
        """How tasks are run: as the constructor was told, or as was measured."""
        s = self.settings
        return self._tuned or Speed(s.workers, s.channels_last, s.workers_in == "processes")

    def _speed_text(self) -> str:
        if self._chosen[0] == "batched":
            return "all tasks of one shape at once in meta_step and forward" + (
                ", recorded and replayed" if self.settings.cuda_graphs else ""
            )
        if self.settings.tune and self._tuned is None:
            return "measured in the first meta-step"
        if self.speed.workers != 1 and (reason := self._alone()):
            return f"{replace(self.speed, workers=1)}: {reason}"
        return str(self.speed)

    def _alone(self, processes: bool | None = None) -> str | None:
        """Why tasks cannot be solved at the same time, in threads or in processes, or None."""
        processes = self.speed.processes if processes is None else processes
        if self._device.type != "cpu":
            return "workers are for the CPU"
        if self._chosen[0] != "functional":
            return f'engine="{self._chosen[0]}" runs in one thread'
        if reason := self._in_one_thread or self._changes():
            return reason
        if self._edits_weights():
            return "an embedding with max_norm edits its weights in forward"
        if processes and (reason := refused()):
            return reason
        if not processes and any(parametrize.is_parametrized(module) for module in self.model.modules()):
            return "torch caches the results of parametrizations for all threads together"
        if any(parameter._backward_hooks for parameter in self.parameters()):
            return "a parameter has a hook on its gradient"
        return "it is called in a mode that belongs to one thread" if has_modes() else None

    def _in_order(self, work: Callable[[Any, Chunk], Result], chunks: Sequence[Chunk]) -> Iterator[Result]:
        count = self.speed.number_of_workers(len(chunks))
        if count < 2 or self._alone():
            yield from super()._in_order(work, chunks)
        elif self.speed.processes:
            yield from self._in_processes(work, chunks, count)
        else:
            yield from self._in_threads(work, chunks, count)

    def _in_processes(
        self, work: Callable[[Any, Chunk], Result], chunks: Sequence[Chunk], count: int
    ) -> Iterator[Result]:
        before = state_of(self._parts())
        try:
            # What this sets for the whole process is set in those that are forked from it, too.
            with self._twice():
                yield from in_processes(
                    lambda chunk: work(self, chunk), chunks, count, lambda: difference(before, state_of(self._parts()))
                )
        except (ChildError, LeftBehindError) as error:
            # The same step again, in order: if it fails there too, whoever called sees it as it is.
            raise DisturbedError(str(error)) from error

    def _in_threads(
        self, work: Callable[[Any, Chunk], Result], chunks: Sequence[Chunk], count: int
    ) -> Iterator[Result]:
        try:
            replicas = [self._replica() for _ in range(count)]
        except Exception as error:  # A lock, say, that was given to the model since the first look.
            raise DisturbedError(f"it cannot be copied any more: {first_line(error)}") from error
        before = [state_of(each._parts()) for each in replicas]
        # What this sets for the whole process must be set before the first worker begins, and put back after the last.
        with self._twice():
            yield from in_threads(work, chunks, replicas)
        for each, state in zip(replicas, before, strict=True):
            if changed := difference(state, state_of(each._parts())):
                raise DisturbedError(changed)

    def _twice(self) -> AbstractContextManager[None]:
        return differentiable_twice(self.model, self._has_hard_gates)

    def _replica(self) -> Paced:
        made = replica(self, shared=[self.outer, self.head_start, self._looks, self._recordings])
        made._engine = ENGINES[self._chosen[0]](made.model, made._buffer_edits)
        return made

    def get_extra_state(self) -> dict[str, Any]:
        """The counters and what was measured, for state_dict."""
        return super().get_extra_state() | ({} if self._tuned is None else {"speed": asdict(self._tuned)})

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restores the counters; what was measured, too, where this learner would measure."""
        super().set_extra_state(state)
        if self.settings.tune and "speed" in state:
            self._tuned = Speed(**state["speed"])

    def _laid_out(self, task: Task) -> Task:
        """The task with its images as `channels_last` asks for."""
        if not self.speed.channels_last:
            return task
        images = {part: map_tensors(getattr(task, part), to_channels_last) for part in ("support_x", "target_x")}
        return replace(task, **images)


class DisturbedError(Exception):
    """Tasks that were solved at the same time, or passes that were run in another order, were not independent."""
