"""How a gradient-based learner's tasks are run: in order, in threads, in forked processes, or by replays.

The way changes the time of a meta-gradient and never its value. The user names it, or it is measured (`measured`).
Tasks that are not independent are run in order, whatever was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from metawrap.checks.first_look import differ, warn_tasks_in_order
from metawrap.checks.first_task import probed_gradient
from metawrap.checks.several_tasks import left_behind
from metawrap.engines import ENGINES, differentiable_twice, first_line
from metawrap.execution.cuda_graphs import Recordings, check_can_record, form_of
from metawrap.execution.executor import (
    Chunk,
    Executor,
    MetaGradient,
    Solve,
    chunk_gradient,
    edits_weights,
    stateful_modules,
)
from metawrap.execution.forked_processes import ChildError, LeftBehindError, in_processes, refused
from metawrap.execution.staying_processes import StayingProcesses, can_be_sent
from metawrap.execution.threads import Item, Result, has_modes, in_threads, replica
from metawrap.execution.tuning import Speed
from metawrap.inner_loop.flat_memory import DisturbedError
from metawrap.inner_loop.task_solver import TaskSolver
from metawrap.results import TaskOutcome
from metawrap.settings.groups import ExecutionOptions
from metawrap.settings.schedules import is_second_order, step_loss_weights
from metawrap.snapshot.fingerprint import Fingerprint, fingerprint
from metawrap.snapshot.generators import Generators
from metawrap.snapshot.module_state import restored_buffers
from metawrap.snapshot.reachable_state import RANDOM_NUMBERS, difference, state_of
from metawrap.tasks import Task, TaskBatch, device_of, usable

Part = tuple[Chunk, int]  # And the number of tasks in all chunks.
# Processes that had to be forked anew this many times in a row are forked for each meta-step from then on. Every
# _AGAIN meta-steps they get another chance to stay.
_MISFITS, _AGAIN = 3, 50


class ParallelExecutor(Executor):
    """Runs the tasks of a batch as its options say.

    speed: how. in_order_because: what was seen in a meta-step that makes tasks depend on each other. probed: fields of
    the solver while ways are measured.
    """

    def __init__(self, options: ExecutionOptions, several_at_once: bool = False) -> None:
        super().__init__(options, several_at_once)
        self.speed = Speed(options.workers, options.channels_last, options.workers_in == "processes")
        self.settled = False
        self.recordings = Recordings()
        self.staying: StayingProcesses | None = None
        self._misfits = 0  # In a row: meta-steps whose processes had to be forked anew.
        self.in_order_because: str | None = None
        self._any_order = False
        self._replicates: bool | None = None  # Whether a replica gives the same gradient, where that is known.
        self.probed: dict[str, Any] = {}

    def way_in_words(self, learner: Any) -> str:
        """See `Executor.way_in_words`."""
        if self.several_at_once:
            return super().way_in_words(learner) + (", recorded and replayed" if self.options.cuda_graphs else "")
        if self.speed.workers != 1 and (reason := self.why_in_order(learner)):
            return f"{replace(self.speed, workers=1)}: {reason}"
        return str(self.speed)

    def way(self, learner: Any, batch: TaskBatch, parameters: Sequence[nn.Parameter]) -> MetaGradient:
        """See `Executor.way`."""
        run = partial(self.in_memory, learner)
        if self.options.cuda_graphs:
            return self._replayed(learner, batch, parameters, run)
        if self.speed.workers == 1 and self.memory == "unrolled":
            return run(batch, parameters)
        generators = Generators()
        self._any_order = self.memory == "flat"
        try:
            with restored_buffers(*stateful_modules(learner)):
                return run(batch, parameters)
        except DisturbedError as disturbed:
            # Random draws or a counter that began after the first task: from now on in order, this step included.
            generators.put_back()
            if self.in_any_order(learner):
                # Perhaps the only cause; if not, the next try shows the other.
                learner.checks.passes_in_order = str(disturbed)
                return self.way(learner, batch, parameters)
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
        return left_behind(learner) is None

    def why_in_order(self, learner: Any, processes: bool | None = None) -> str | None:
        """Why tasks cannot be solved at the same time, in threads or in processes, or None."""
        processes = self.speed.processes if processes is None else processes
        if device_of(learner).type != "cpu":
            return "workers are for the CPU"
        if learner.checks.engine.name != "functional":
            return f'engine="{learner.checks.engine.name}" runs in one thread'
        if reason := self.in_order_because or left_behind(learner):
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
            threads = torch.get_num_threads()
            try:
                if processes:  # They have one thread each: sums that are divided otherwise are rounded otherwise.
                    torch.set_num_threads(1)
                same = not differ(found, probed_gradient(solver, engine, [task]))
            finally:
                torch.set_num_threads(threads)
        except Exception as error:  # Any failure of the user's own code in a copy of it.
            same, reason = False, f"{where} fails ({first_line(error)})"
        else:
            reason = f"{where} does not give the same gradient"
        if not processes:
            self._replicates = same
        elif same and self._replicates is None:
            self._replicates = not (
                self.why_in_order(learner, False) or self.worker_differs(learner, solver, task, False)
            )
        return None if same else reason

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"recordings": Recordings(), "staying": None}

    def _replayed(
        self, learner: Any, batch: TaskBatch, parameters: Sequence[nn.Parameter], run: Callable[..., MetaGradient]
    ) -> MetaGradient:
        batch = TaskBatch(tuple(usable(task) for task in batch))
        learner._prepare(batch[0])
        settings = learner.settings
        stored = "stored heads are another for each task" if settings.outputs.head_init == "stored" else None
        check_can_record(device_of(learner), left_behind(learner) or stored)
        order = is_second_order(learner.epoch, settings.first_order_epochs)
        weights = tuple(step_loss_weights(settings.inner_steps, learner.epoch, settings.step_loss_epochs))
        form = form_of(batch, learner.model, parameters, order, weights, settings, id(learner.loss_fn))
        return self.recordings.run(lambda these: run(these, parameters), batch, form)

    def chunk_gradients(
        self, learner: Any, chunks: Sequence[Chunk], parameters: Sequence[nn.Parameter], tasks: int
    ) -> Iterator[MetaGradient]:
        """See `Executor.chunk_gradients`."""
        any_order, norm = self.in_any_order(learner), learner.settings.norm
        changes = self.probed | self.changes(self.probed.get("settings", learner.settings))

        def gradient(each: Any, part: Part) -> MetaGradient:
            return chunk_gradient(each._solver(any_order=any_order, **changes), part[0], parameters, norm, part[1])

        def look() -> Fingerprint | None:
            solver, free = learner._solver(any_order=any_order, **changes), _tensors(learner)
            return fingerprint((solver, parameters, norm, free), free)

        parts, count = [(chunk, tasks) for chunk in chunks], self.speed.number_of_workers(len(chunks))
        if count < 2 or self.why_in_order(learner):
            for part in parts:
                yield gradient(learner, part)
        elif self.speed.processes:
            yield from self._in_processes(learner, gradient, parts, count, look)
        else:
            yield from self._in_threads(learner, gradient, parts, count)

    def solved(self, learner: Any, tasks: Sequence[Task], solve: Solve) -> Iterator[TaskOutcome]:
        """See `Executor.solved`. Threads are used if meta-steps have workers: a meta-step has checked that they may."""
        looked = learner.findings.keys() >= {True, False}
        count = self.speed.number_of_workers(len(tasks))
        if count < 2 or not looked or self.why_in_order(learner, processes=False):
            yield from super().solved(learner, tasks, solve)
            return
        generators = Generators()
        try:
            with restored_buffers(*stateful_modules(learner)):
                found = list(self._in_threads(learner, solve, tasks, count))
        except DisturbedError as disturbed:
            generators.put_back()
            self.in_order_because = str(disturbed)
            yield from super().solved(learner, tasks, solve)
        else:
            yield from found

    def _in_processes(
        self,
        learner: Any,
        work: Callable[[Any, Part], MetaGradient],
        parts: Sequence[Part],
        count: int,
        look: Callable[[], Fingerprint | None],
    ) -> Iterator[MetaGradient]:
        """This process takes a share, on a replica of the learner, if the work can change nothing but the replica."""
        own, before = learner, state_of(_parts(learner))
        if self._replicates and not before.outside:
            with suppress(Exception):  # A lock, for example, that the model was given since the first task.
                own = self._replica(learner)
        seen = before if own is learner else state_of(_parts(own))
        mine = None if own is learner else partial(work, own)
        try:
            # Settings of the whole process are made before it is forked.
            with _twice(learner):
                if staying := self._staying_for(learner, work, parts, range(mine is not None, count), look):
                    yield from staying.run(parts, _tensors(learner), mine)
                else:
                    yield from in_processes(partial(work, learner), parts, count, _watch(learner), mine)
            if changed := difference(seen, state_of(_parts(own))):
                raise LeftBehindError(changed)
        except (ChildError, LeftBehindError) as error:
            self.end_staying()
            # The same step again, in order: an error that is the work's own is raised there.
            raise DisturbedError(str(error)) from error

    def _staying_for(
        self,
        learner: Any,
        work: Callable[[Any, Part], MetaGradient],
        parts: Sequence[Part],
        ranks: range,
        look: Callable[[], Fingerprint | None],
    ) -> StayingProcesses | None:
        """Processes that stay, forked anew where anything but weights and buffers has changed, or None."""
        if self._misfits >= _MISFITS and learner.iteration % _AGAIN == 0:
            self._misfits -= 1
        may_stay = self._misfits < _MISFITS and can_be_sent(task for chunk, _ in parts for task in chunk)
        world = look() if may_stay else None
        if self.staying and world is not None and self.staying.fit(world, ranks):
            self._misfits = 0
        elif self.staying:
            self._misfits = min(self._misfits + 1, _MISFITS)
            self.end_staying()
        if world is not None and self.staying is None:
            watch = partial(_watch, learner)
            self.staying = StayingProcesses(partial(work, learner), _tensors(learner), ranks, world, look, watch)
        return self.staying

    def end_staying(self) -> None:
        """Ends the processes that stay."""
        if self.staying:
            self.staying.end()
            self.staying = None

    def _in_threads(
        self, learner: Any, work: Callable[[Any, Item], Result], items: Sequence[Item], count: int
    ) -> Iterator[Result]:
        try:
            replicas = [self._replica(learner) for _ in range(count)]
        except Exception as error:  # A lock, for example, that the model was given since the first task.
            raise DisturbedError(f"it cannot be copied any more: {first_line(error)}") from error
        before, put_back = [state_of(_parts(each)) for each in replicas], Generators.put_back_in_all
        # Settings of the whole process are made before the first worker begins, and undone after the last.
        with _twice(learner):
            yield from in_threads(work, items, replicas)
        if put_back != Generators.put_back_in_all:
            raise DisturbedError(RANDOM_NUMBERS)
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


def _tensors(learner: Any) -> list[Tensor]:
    return [*learner.parameters(), *learner.buffers()]


def _watch(learner: Any) -> Callable[[], str | None]:
    """A function that says what has changed since this call, or None."""
    before = state_of(_parts(learner))
    return lambda: difference(before, state_of(_parts(learner)))


def _parts(learner: Any) -> tuple[nn.Module, Any]:
    return learner.model, learner.loss_fn


def _twice(learner: Any) -> AbstractContextManager[None]:
    return differentiable_twice(learner.model, learner.checks.plain_forms)
