"""How a gradient-based learner's tasks are run: in order, in threads, in forked processes, or by replays.

The way changes the time of a meta-gradient and never its value. The user names it, or the first meta-step measures it.
Tasks that are not independent are run in order, whatever was chosen.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from metawrap.checks.first_look import Gradients, differ, warn_tasks_in_order
from metawrap.checks.first_task import carries_channels_last, model_unchanged, probed_gradient
from metawrap.engines import ENGINES, differentiable_twice, first_line
from metawrap.execution.cuda_graphs import Recordings, check_can_record, form_of
from metawrap.execution.executor import Chunk, Executor, MetaGradient, chunk_gradient, edits_weights, stateful_modules
from metawrap.execution.forked_processes import ChildError, LeftBehindError, in_processes, refused
from metawrap.execution.threads import has_modes, in_threads, replica
from metawrap.execution.tuning import Speed, fastest
from metawrap.inner_loop.flat_memory import DisturbedError
from metawrap.inner_loop.task_solver import TaskSolver
from metawrap.settings.groups import ExecutionOptions
from metawrap.settings.schedules import is_second_order, step_loss_weights
from metawrap.snapshot.generators import Generators
from metawrap.snapshot.module_state import restored_buffers
from metawrap.snapshot.reachable_state import difference, state_of
from metawrap.surgery.inspect import find_hooks
from metawrap.tasks import Task, TaskBatch, device_of, usable

_LOG = logging.getLogger(__name__)

# Before a way is measured with tune="auto": the first meta-step looks at the model, the second shows the time.
_LOOKS = 2
_ORDINALS = ("first", "second", "third")
# Seconds of a meta-gradient: what starts and joins workers takes milliseconds.
_WORTH_WHILE = 0.1


class ParallelExecutor(Executor):
    """Runs the tasks of a batch as its options say, or as was measured.

    measured: the way that was measured to be fastest; None before that. looked: meta-steps before it, with tune="auto".
    in_order_because: what was seen in a meta-step that makes tasks depend on each other.
    """

    def __init__(self, options: ExecutionOptions, several_at_once: bool = False) -> None:
        super().__init__(options, several_at_once)
        self.measured: Speed | None = None
        self.looked = 0
        self.recordings = Recordings()
        self.in_order_because: str | None = None
        self._any_order = False
        self._probed: dict[str, Any] = {}  # Fields of the solver while ways are measured.

    @property
    def speed(self) -> Speed:
        """How tasks are run: as the options say, or as was measured."""
        options = self.options
        asked = Speed(options.workers, options.channels_last, options.workers_in == "processes")
        return self.measured or asked

    def in_words(self, learner: Any) -> str:
        """See `Executor.in_words`."""
        if self.several_at_once:
            return super().in_words(learner) + (", recorded and replayed" if self.options.cuda_graphs else "")
        if self._undecided and device_of(learner).type == "cpu":
            return f"one task after another until the {_ORDINALS[self._looks]} meta-step, which measures what is faster"
        if self.speed.workers != 1 and (reason := self.why_in_order(learner)):
            return f"{replace(self.speed, workers=1)}: {reason}"
        return str(self.speed)

    def meta_gradient(self, learner: Any, batch: TaskBatch, parameters: Sequence[nn.Parameter]) -> MetaGradient:
        """See `Executor.meta_gradient`."""
        run = partial(super().meta_gradient, learner)
        if self._undecided and self.looked >= self._looks:
            self._measure(learner, batch, parameters, run)
        begun = time.process_time()  # Of all threads, without the time that other processes take.
        found = self._solved(learner, batch, parameters, run)
        if self._undecided and device_of(learner).type == "cpu":
            self._look(time.process_time() - begun)
        return found

    @property
    def _undecided(self) -> bool:
        return self.options.measures and self.measured is None

    @property
    def _looks(self) -> int:
        """Meta-steps before the one that measures: their time shows whether it is worth while."""
        return 0 if self.options.tune is True else _LOOKS

    def _look(self, seconds: float) -> None:
        self.looked += 1
        if self.looked == _LOOKS and seconds < _WORTH_WHILE:
            self.measured = Speed(why=f"a meta-gradient takes {seconds:.2g} s, too little to divide")

    def _solved(
        self, learner: Any, batch: TaskBatch, parameters: Sequence[nn.Parameter], run: Callable[..., MetaGradient]
    ) -> MetaGradient:
        if self.options.cuda_graphs:
            return self._replayed(learner, batch, parameters, run)
        if self.speed.workers == 1 and self.options.memory == "unrolled":
            return run(batch, parameters)
        generators = Generators()
        self._any_order = self.options.memory == "flat"
        try:
            with restored_buffers(*stateful_modules(learner)):
                return run(batch, parameters)
        except DisturbedError as disturbed:
            # Random draws or a counter that began after the first task: from now on in order, this step included.
            generators.put_back()
            if self.in_any_order(learner):
                # Perhaps the only cause; if not, the next try shows the other.
                learner.checks.passes_in_order = str(disturbed)
                return self._solved(learner, batch, parameters, run)
            self.in_order_because = str(disturbed)
            failed = isinstance(disturbed.__cause__, ChildError)
        finally:
            self._any_order = False
        try:
            found = run(batch, parameters)
        except BaseException:
            if failed:  # It fails in order too, so the process is not to blame.
                self.in_order_because = None
            raise
        if self.options.workers not in (1, "auto"):  # No warning for a measured way: the user did not ask for workers.
            warn_tasks_in_order(self.options.workers, self.in_order_because or "")
        return found

    def in_any_order(self, learner: Any) -> bool:
        """Whether the passes of a task may run in another order than their own."""
        if not self._any_order or learner.checks.passes_in_order or edits_weights(learner.model):
            return False
        return self._left_behind(learner) is None

    def why_in_order(self, learner: Any, processes: bool | None = None) -> str | None:
        """Why tasks cannot be solved at the same time, in threads or in processes, or None."""
        processes = self.speed.processes if processes is None else processes
        if device_of(learner).type != "cpu":
            return "workers are for the CPU"
        if learner.checks.engine.name != "functional":
            return f'engine="{learner.checks.engine.name}" runs in one thread'
        if reason := self.in_order_because or self._left_behind(learner):
            return reason
        if edits_weights(learner.model):
            return "an embedding with max_norm edits its weights in forward"
        if processes and (reason := refused()):
            return reason
        if not processes and any(parametrize.is_parametrized(module) for module in learner.model.modules()):
            return "torch caches the results of parametrizations for all threads together"
        if any(parameter._backward_hooks for parameter in learner.parameters()):
            return "a parameter has a hook on its gradient"
        return "it is called in a mode that belongs to one thread" if has_modes() else None

    def worker_differs(self, learner: Any, solver: TaskSolver, task: Task, processes: bool | None = None) -> str | None:
        """Why a worker, in a thread or a process, does not do what the learner does, or None."""
        processes = self.speed.processes if processes is None else processes
        engine = learner.checks.engine.name
        if processes and refused():
            return None  # `why_in_order` tells of it.
        where = "in a forked process it" if processes else "a replica of it"
        try:
            # Where it will run: a thread has state of its own, and not all libraries can be forked.
            if processes:
                work = partial(probed_gradient, solver, engine)
                [found] = in_processes(lambda one: work([one]), [task], 1, lambda: None)
            else:
                [found] = in_threads(
                    lambda each, one: probed_gradient(_copied(each, solver), engine, [one]),
                    [task],
                    [self._replica(learner)],
                )
            same = not differ(found, probed_gradient(solver, engine, [task]))
        except Exception as error:  # Any failure of the user's own code in a copy of it.
            return f"{where} fails ({first_line(error)})"
        return None if same else f"{where} does not give the same gradient"

    def state(self) -> dict[str, Any]:
        """What was measured, for a state_dict."""
        if self.measured is not None:
            return {"speed": asdict(self.measured)}
        return {"looked": self.looked} if self._undecided and self.looked else {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what was measured, if these options would measure."""
        super().load_state(state)
        if self.options.measures:
            self.measured = Speed(**state["speed"]) if "speed" in state else None
            self.looked = state.get("looked", 0)
            self.channels_last = self.speed.channels_last

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"recordings": Recordings()}

    def _replayed(
        self, learner: Any, batch: TaskBatch, parameters: Sequence[nn.Parameter], run: Callable[..., MetaGradient]
    ) -> MetaGradient:
        batch = TaskBatch(tuple(usable(task) for task in batch))
        learner._prepare(batch[0])
        settings = learner.settings
        stored = "stored heads are another for each task" if settings.outputs.head_init == "stored" else None
        check_can_record(device_of(learner), self._left_behind(learner) or stored)
        order = is_second_order(learner.epoch, settings.first_order_epochs)
        weights = tuple(step_loss_weights(settings.inner_steps, learner.epoch, settings.step_loss_epochs))
        form = form_of(batch, learner.model, parameters, order, weights, settings, id(learner.loss_fn))
        return self.recordings.run(lambda these: run(these, parameters), batch, form)

    def _left_behind(self, learner: Any) -> str | None:
        """What solving a task leaves behind for the next one, or None."""
        checks, model = learner.checks, learner.model
        if learner.settings.outputs.head_init == "random":
            return "random heads come in the order of the tasks"
        if checks.edits.edited:
            return f"forward edits the buffer '{min(checks.edits.edited)}'"
        if nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
            return "torch has hooks on all modules, which may touch what is outside of it"
        if (hooked := find_hooks(model)) is not None:
            return f"'{hooked or 'the model itself'}' has hooks, which may touch what is outside of it"
        return known.left_behind if (known := checks.findings.get(True)) else None

    def _measure(
        self, learner: Any, batch: TaskBatch, parameters: Sequence[nn.Parameter], run: Callable[..., MetaGradient]
    ) -> None:
        """Chooses by the time of this batch's meta-gradient, of second order if training comes to that."""
        settings, cores = learner.settings, torch.get_num_threads()
        few = TaskBatch(batch.tasks[: 2 * cores * (self.options.tasks_per_backward or 1)])
        chosen = None

        def timed(speed: Speed) -> Gradients:
            self.measured, self.channels_last = speed, speed.channels_last
            with model_unchanged(learner):
                return run(few, parameters)[1]

        try:
            task = usable(few[0])
            learner._prepare(task)
            twice = not learner.checks.findings[learner.model.training].no_second_derivative
            if not math.isinf(settings.first_order_epochs) and twice:
                self._probed = {"settings": replace(settings, first_order_epochs=0)}
            counts = [n for n in range(2, cores + 1) if cores % n == 0]
            workers = [
                (count, processes)
                for processes in (False, True)
                if counts
                and not self.why_in_order(learner, processes)
                and not self.worker_differs(learner, learner._solver(**self._probed), task, processes)
                for count in counts
            ]
            images = any(isinstance(m, nn.modules.conv._ConvNd) for m in learner.model.modules())
            layouts = [True] if images and carries_channels_last(learner, task, **self._probed) else []
            chosen = fastest(timed, layouts, workers)
        finally:
            self._probed, self.measured = {}, chosen
            self.channels_last = self.speed.channels_last
        _LOG.info("Tasks of a meta-step: %s", chosen)

    def _chunks_in_order(
        self, learner: Any, chunks: Sequence[Chunk], parameters: Sequence[nn.Parameter], tasks: int
    ) -> Iterator[MetaGradient]:
        any_order, norm = self.in_any_order(learner), learner.settings.norm

        def gradient(each: Any, chunk: Chunk) -> MetaGradient:
            return chunk_gradient(each._solver(any_order=any_order, **self._probed), chunk, parameters, norm, tasks)

        count = self.speed.number_of_workers(len(chunks))
        if count < 2 or self.why_in_order(learner):
            for chunk in chunks:
                yield gradient(learner, chunk)
        elif self.speed.processes:
            yield from self._in_processes(learner, partial(gradient, learner), chunks, count)
        else:
            yield from self._in_threads(learner, gradient, chunks, count)

    def _in_processes(
        self, learner: Any, work: Callable[[Chunk], MetaGradient], chunks: Sequence[Chunk], count: int
    ) -> Iterator[MetaGradient]:
        before = state_of(_parts(learner))
        try:
            # Settings of the whole process are made before it is forked.
            with _twice(learner):
                yield from in_processes(work, chunks, count, lambda: difference(before, state_of(_parts(learner))))
        except (ChildError, LeftBehindError) as error:
            # The same step again, in order: an error that is the work's own is raised there.
            raise DisturbedError(str(error)) from error

    def _in_threads(
        self, learner: Any, work: Callable[[Any, Chunk], MetaGradient], chunks: Sequence[Chunk], count: int
    ) -> Iterator[MetaGradient]:
        try:
            replicas = [self._replica(learner) for _ in range(count)]
        except Exception as error:  # A lock, for example, that the model was given since the first task.
            raise DisturbedError(f"it cannot be copied any more: {first_line(error)}") from error
        before = [state_of(_parts(each)) for each in replicas]
        # Settings of the whole process are made before the first worker begins, and undone after the last.
        with _twice(learner):
            yield from in_threads(work, chunks, replicas)
        for each, state in zip(replicas, before, strict=True):
            if changed := difference(state, state_of(_parts(each))):
                raise DisturbedError(changed)

    def _replica(self, learner: Any) -> Any:
        return replica(learner, shared=[learner.outer, learner.head_start, learner.checks, self])


def _copied(each: Any, solver: TaskSolver) -> TaskSolver:
    """The replica's solver, with the findings that the first task has shown so far."""
    own: TaskSolver = each._solver(engine=ENGINES["functional"](each.model, solver.edits))
    found = {name: getattr(solver, name) for name in ("settings", "plain_forms", "clone_inputs")}
    return replace(own, **found)


def _parts(learner: Any) -> tuple[nn.Module, Any]:
    return learner.model, learner.loss_fn


def _twice(learner: Any) -> AbstractContextManager[None]:
    return differentiable_twice(learner.model, learner.checks.plain_forms)


def executor_for(options: ExecutionOptions, engine: str) -> Executor:
    """The executor of a gradient-based learner: the plain one where the tasks are run in order, or all at once."""
    measured = options.measures and (engine == "functional" or options.tune is True)
    plain = options.workers == 1 and options.memory == "unrolled" and not (measured or options.cuda_graphs)
    return (Executor if plain else ParallelExecutor)(options, engine == "batched")
