"""What every gradient-based method does around its data path: chooses an engine, looks at the first task, describes.

A look runs once for each mode, before the first task is solved: what inspection cannot see, a gradient shows.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from metawrap.checks.first_look import (
    FirstLook,
    Gradients,
    differ,
    refuse_bypassed,
    refuse_carried_graphs,
    refuse_other_layout,
    support_gradient,
    warn_functional_instead_of_higher,
    warn_no_second_derivative,
    warn_tasks_in_order,
    warn_unused,
)
from metawrap.checks.second_derivative import missing_second_derivative
from metawrap.checks.several_tasks import refuse_impure, twin_of, without_dropout
from metawrap.engines import (
    ENGINES,
    BatchedEngine,
    BufferEdits,
    Engine,
    HardGates,
    cannot,
    choose_engine,
)
from metawrap.engines.batched import first_line
from metawrap.errors import ArgumentError, MetaWrapError, UnsupportedModuleError
from metawrap.execution.cuda_graphs import Recordings
from metawrap.execution.forked_processes import in_processes, refused
from metawrap.execution.threads import in_threads
from metawrap.execution.tuning import Speed
from metawrap.inner_loop.head_starts import HEAD_STARTS, HeadStart
from metawrap.inner_loop.outcome import Solved, autograd, dense
from metawrap.inner_loop.stacking import stacked
from metawrap.layers.learning_rates import LearningRates
from metawrap.learner.describing import describe_learner, norm_warnings, unused_warnings
from metawrap.learner.description import Description
from metawrap.learner.learner import LossFunction
from metawrap.learner.pace import DisturbedError, Paced
from metawrap.settings.schedules import is_second_order
from metawrap.settings.settings import Memory, Settings
from metawrap.snapshot.module_state import attributes_put_back, unchanged
from metawrap.snapshot.reachable_state import difference, state_of
from metawrap.surgery.inspect import find_buffer_aliases, find_head
from metawrap.surgery.wrap import Wrapped
from metawrap.tasks import Task, TaskBatch, tensors_in

_DOUBLE, _SINGLE = 1e-6, 1e-3
_PLAIN_RULE: dict[str, Any] = {
    "inner_optimizer": "sgd",
    "inner_momentum": 0.0,
    "inner_max_grad_norm": None,
    "inner_max_grad_value": None,
}


class GradientBased(Paced):
    """A method that runs the user's module with fast weights, through an engine."""

    learning_rates: LearningRates

    def __init__(
        self, wrapped: Wrapped, settings: Settings, loss_fn: LossFunction, preset: str, engine: str, head: str | None
    ) -> None:
        chosen = choose_engine(engine, wrapped.model, settings.tune or settings.workers != 1)
        _check_goes_with(engine, settings)
        super().__init__(wrapped.model, settings, loss_fn)
        self.preset, self.wrapped = preset, wrapped
        self._asked_engine, self._chosen = engine, chosen
        self._engine: Engine | None = None
        # Of all tasks at once; None until a look has shown that it carries the model.
        self._batched: BatchedEngine | None = None
        self._buffer_edits = BufferEdits(find_buffer_aliases(wrapped.model))
        self._looks: dict[bool, FirstLook] = {}
        self._head = head
        self._has_hard_gates = self._edits_inputs = False
        self.head_start: HeadStart = HEAD_STARTS[settings.head_init]()
        if head is not None:
            self.head_start.find(wrapped.model, head, wrapped.adapted)

    @abstractmethod
    def _support_prediction(self, fast: Mapping[str, Tensor], task: Task) -> Any:
        """The model's own prediction on a support set, as at the first inner step."""

    @abstractmethod
    def _batched_calls(self, stack: Task) -> Iterator[Callable[[], Any]]:
        """Calls of the batched engine on a stack's support and target inputs."""

    @abstractmethod
    def _support_loss(self, fast: Mapping[str, Tensor], task: Task) -> Tensor:
        """Its loss."""

    def describe(self) -> Description:
        """What wrapping found and did."""
        return describe_learner(
            self,
            wrapped=self.wrapped,
            head=self.head,
            looks=self._looks,
            settings=self.settings.as_dict(),
            warnings=[*unused_warnings(self._looks), *norm_warnings(self.settings, self.wrapped)],
            title=f'(preset="{self.preset}")',
            rates=self.learning_rates,
            engine=self._chosen,
            speed=self._speed_text(),
        )

    @property
    def head(self) -> str | None:
        """The name of the module whose output is the prediction; None before the first task."""
        return self._head

    def train(self, mode: bool = True) -> GradientBased:
        """As in torch; norms named by `keep_norm` stay on their stored statistics."""
        super().train(mode)
        self.wrapped.hold_kept_norms()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # An engine holds classes made at run time; it is made again when needed.
        return super().__getstate__() | {"_engine": None, "_batched": None, "_recordings": Recordings()}

    def _check_trainable(self, batch: TaskBatch) -> None:
        for task in batch:
            self.head_start.check(task.id)

    def _fold(self, solved: Sequence[Solved], applied: Tensor) -> None:
        super()._fold(solved, applied)
        self.head_start.keep(solved, applied)

    def _prepare(self, task: Task) -> None:
        self.wrapped.hold_kept_norms()
        mode = self.model.training
        differentiable = torch.is_grad_enabled()
        if mode not in self._looks or (differentiable and not self._looks[mode].differentiable):
            with autograd(True), self._unchanged(edits=True):
                look = self._first_look(task.map(Tensor.clone), differentiable)
            self._looks[mode] = look
            if mode and self.settings.workers not in (1, "auto") and (reason := self._alone()):
                warn_tasks_in_order(self.settings.workers, reason)
        if differentiable:
            self._refuse_second_order(self._looks[mode].no_second_derivative)
        if self._chosen[0] == "batched" and mode and self._batched is None:
            with autograd(True), self._unchanged(edits=True):
                self._refuse_impure(task.map(Tensor.clone))
                shown = self._carried_at_once(task.map(Tensor.clone), differentiable)
            if shown:
                self._batched = BatchedEngine(self.model, self._buffer_edits)
        if self._engine is None:
            self._engine = ENGINES[_of_one_task(self._chosen[0])](self.model, self._buffer_edits)

    def _first_look(self, task: Task, differentiable: bool) -> FirstLook:
        self._engine = ENGINES["functional"](self.model, self._buffer_edits)
        try:
            learned = {name: p.detach().clone().requires_grad_() for name, p in self.wrapped.adapted_parameters()}

            def prediction(fast: Mapping[str, Tensor] = learned) -> Any:
                return self._support_prediction(fast, task)

            def support_loss(fast: Mapping[str, Tensor]) -> Tensor:
                return self._support_loss(fast, task)

            if self.speed.channels_last:
                # As forward gets it: what it edits must be seen to be edited.
                task = self._laid_out(task)
                refuse_other_layout(lambda: self._support_prediction(learned, task.map(Tensor.clone)))
            versions = [tensor._version for tensor in tensors_in(task.support_x)]
            self._buffer_edits.carried.clear()
            before = state_of(self._parts())
            with HardGates() as gates:
                unused = support_gradient(learned, support_loss)
            changed = difference(before, state_of(self._parts()))
            self._has_hard_gates = self._has_hard_gates or gates.seen
            self._edits_inputs |= versions != [tensor._version for tensor in tensors_in(task.support_x)]
            if differentiable:
                refuse_carried_graphs(self.model, self._buffer_edits.carried, lambda: support_loss(learned))
            refuse_bypassed(prediction(), self.wrapped.adapted_parameters())
            if self._head is None:
                head, exact = find_head(self.model, prediction)
                # Before it is remembered: a head that was refused must be refused again.
                self.head_start.find(self.model, head if exact else None, self.wrapped.adapted)
                self._head = head
            once = None
            if differentiable and not math.isinf(self.settings.first_order_epochs):
                with self._twice():
                    once = missing_second_derivative(self.model, learned, support_loss)
                self._refuse_second_order(once)
            if self._chosen[0] == "higher":
                self._leave_higher_if_wrong(task)
            if self.settings.memory == "flat" and differentiable:
                if self._chosen[0] != "batched":
                    self._refuse_flat_if_wrong(task)
                self._passes_in_order = self._passes_in_order or self._order_of_passes(task)
        finally:
            self._engine = None
        known = {name for earlier in self._looks.values() for name in earlier.unused}
        warn_unused([name for name in unused if name not in known])
        if once:
            warn_no_second_derivative(once, self.settings.first_order_epochs)
        several = differentiable and self.model.training and self.settings.workers != 1
        left_behind = changed or (self._worker_differs(task, self.speed.processes) if several else None)
        return FirstLook(unused, differentiable, once, left_behind)

    @contextmanager
    def _unchanged(self, edits: bool = False) -> Iterator[None]:
        """Puts back all that a look at the model and the loss may change."""
        with ExitStack() as stack:
            stack.enter_context(unchanged(self.model, self._device, self._buffer_edits if edits else None))
            if isinstance(self.loss_fn, nn.Module):
                stack.enter_context(unchanged(self.loss_fn, self._device))
            elif own := getattr(self.loss_fn, "__dict__", None):
                stack.enter_context(attributes_put_back(own))
            yield

    def _refuse_second_order(self, once: str | None) -> None:
        if once and is_second_order(self.epoch, self.settings.first_order_epochs):
            raise UnsupportedModuleError(once)

    def _leave_higher_if_wrong(self, task: Task) -> None:
        if not any(parameter.requires_grad for parameter in self.parameters()):
            return
        reference = self._gradient_with("functional", [task])
        try:
            reason = (
                "higher's gradient is not the module's own"
                if differ(self._gradient_with("higher", [task]), reference)
                else ""
            )
        except Exception as error:  # Whatever breaks inside a third library is a reason to leave it.
            reason = f"higher fails on this model ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
        if reason and self._asked_engine == "higher":
            raise UnsupportedModuleError(f'engine="higher" cannot carry this model: {reason}. Use engine="functional".')
        if reason:
            self._chosen = ("functional", reason)
            warn_functional_instead_of_higher(reason)

    def _refuse_flat_if_wrong(self, task: Task) -> None:
        engine = self._chosen[0]
        # Of one step: two would take the memory that is to be saved.
        if differ(self._gradient_with(engine, [task], "flat", steps=1), self._gradient_with(engine, [task], steps=1)):
            raise UnsupportedModuleError(
                'memory="flat" runs each support pass a second time, and this model does not do the same then: its '
                "forward keeps something from call to call, in a list or outside of the module, that cannot be put "
                'back. Keep it in a buffer or a plain attribute, or use memory="unrolled".'
            )

    def _order_of_passes(self, task: Task) -> str | None:
        """Why the passes of a task must be run in their own order, or None."""
        engine = _of_one_task(self._chosen[0])
        try:
            same = not differ(
                self._gradient_with(engine, [task], "flat", any_order=True), self._gradient_with(engine, [task], "flat")
            )
        except DisturbedError as disturbed:
            return str(disturbed)
        return None if same else "in another order the passes of a task give another gradient"

    def _carries_layout(self, task: Task) -> bool:
        probe, sample, tolerance = self._for_probing(task)
        before, found = probe._tuned, []
        try:
            for last in (False, True):
                probe._tuned = Speed(1, last)
                found.append(probe._gradient_with("functional", [sample]))
        except RuntimeError:  # A `view` of the usual layout, say.
            return False
        finally:
            probe._tuned, probe._engine = before, None
        return not differ(found[1], found[0], tolerance)

    def _worker_differs(self, task: Task, processes: bool) -> str | None:
        engine = self._chosen[0]

        def gradient(learner: Any, one: Task) -> Gradients:
            return learner._gradient_with(engine, [one])  # type: ignore[no-any-return]

        if processes and refused():
            return None  # Which `_alone` says.
        try:
            # Where it will run: what belongs to a thread is another there, and not all libraries can be forked.
            if processes:
                [found] = in_processes(lambda one: gradient(self, one), [task], 1, lambda: None)
            else:
                [found] = in_threads(gradient, [task], [self._replica()])
            same = not differ(found, gradient(self, task))
        except Exception as error:  # A copy of the user's own that does not run, in whatever way.
            what = "in a forked process it" if processes else "a replica of it"
            return f"{what} fails ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
        where = "in a forked process it" if processes else "a replica of it"
        return None if same else f"{where} does not give the same gradient"

    def _refuse_impure(self, task: Task) -> None:
        if edited := self._buffer_edits.edited:
            raise UnsupportedModuleError(
                cannot(f"its forward edits the buffer '{min(edited)}', once for all tasks, not for each")
            )
        try:
            with without_dropout(self.model):
                self._batched = BatchedEngine(self.model, self._buffer_edits)
                for call in self._batched_calls(stacked([task, twin_of(task)])):
                    refuse_impure(self.model, call)
        except (MetaWrapError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # It has just run as one task, so that whatever breaks now is due to two of them.
            raise UnsupportedModuleError(cannot(f"it fails with {first_line(error)}")) from error
        finally:
            self._batched = None

    def _carried_at_once(self, task: Task, differentiable: bool) -> bool:
        """Whether two tasks at once have the gradient that they have one by one; False where none can tell yet.

        Raises:
            UnsupportedModuleError: they have another, or none.
        """
        if not any(parameter.requires_grad for parameter in self.parameters()):
            return True
        if not differentiable:
            return False
        once = self._looks[self.model.training].no_second_derivative
        order = self.settings.first_order_epochs if once or math.isinf(self.settings.first_order_epochs) else 0
        probe, sample, tolerance = self._for_probing(task)
        with without_dropout(probe.model):
            try:
                pair = [sample, twin_of(sample)]
                reference = probe._gradient_with("functional", pair, first_order_epochs=order)
            except Exception:  # Labels that may not be exchanged: then both tasks are the same.
                pair = [sample, sample]
                reference = probe._gradient_with("functional", pair, first_order_epochs=order)
            if not all(bool(g.isfinite().all()) for g in reference if g is not None):
                return False
            try:
                found = probe._gradient_with("batched", pair, self.settings.memory, first_order_epochs=order)
            except (MetaWrapError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise UnsupportedModuleError(cannot(f"it fails with {first_line(error)}")) from error
        if differ(found, reference, tolerance):
            raise UnsupportedModuleError(
                cannot("its meta-gradient for two tasks at once is not that of one after the other")
            )
        return True

    def _for_probing(self, task: Task) -> tuple[GradientBased, Task, float]:
        """A learner and a task in double precision, where rounding hides nothing, and how far gradients may differ."""
        numbers = [p for p in self.parameters() if p.is_floating_point() or p.is_complex()]
        if all(p.dtype in (torch.float64, torch.complex128) for p in numbers):
            return self, task, _DOUBLE
        try:
            probe = copy.deepcopy(self).double()
            sample = task.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
            probe._gradient_with("functional", [sample], first_order_epochs=math.inf)
        except Exception:  # A forward that insists on single precision, say.
            return self, task, _SINGLE
        return probe, sample, _DOUBLE

    def _gradient_with(
        self,
        engine: str,
        tasks: Sequence[Task],
        memory: Memory = "unrolled",
        first_order_epochs: float | None = None,
        any_order: bool = False,
        steps: int = 2,
    ) -> tuple[Tensor | None, ...]:
        settings, before, allowed = self.settings, self._batched, self._any_order
        order = settings.first_order_epochs if first_order_epochs is None else first_order_epochs
        self._engine = ENGINES[_of_one_task(engine)](self.model, self._buffer_edits)
        self._batched = BatchedEngine(self.model, self._buffer_edits) if engine == "batched" else None
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        steps = min(steps, settings.inner_steps)
        try:
            # The plain rule: the question is whether the engine runs the module right, and Adam amplifies rounding.
            self.settings = replace(settings, memory=memory, inner_steps=steps, first_order_epochs=order, **_PLAIN_RULE)
            self._any_order = any_order
            with self._unchanged():
                loss, _ = self._solve_all(tasks, training=True, norm=settings.norm, whole_graph=False)
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        finally:
            self.settings, self._batched, self._any_order = settings, before, allowed
        return tuple(None if gradient is None else dense(gradient) for gradient in gradients)

    def _tasks_at_once(self, tasks: int) -> int:
        return self.settings.tasks_per_backward or (tasks if self._chosen[0] == "batched" else 1)


def _of_one_task(engine: str) -> str:
    return "functional" if engine == "batched" else engine


def _check_goes_with(engine: str, settings: Settings) -> None:
    if engine == "batched" and settings.mask_unused_outputs:
        raise ArgumentError(
            'mask_unused_outputs: cannot be True with engine="batched", where the tasks of a batch would each mask '
            'others. Use engine="functional", or ask for it in evaluate and adapt, which go task by task.'
        )
    if settings.workers != 1 and engine in ("higher", "batched"):
        raise ArgumentError(
            f'workers: expected 1 with engine="{engine}", which runs in one thread, but got {settings.workers!r}. '
            'Leave it out, or pass engine="functional".'
        )
    for name in ("tune", "channels_last"):
        if engine == "batched" and getattr(settings, name):
            raise ArgumentError(
                f'{name}: has no effect with engine="batched", which runs all tasks at once in a layout of its own. '
                'Leave it out, or pass engine="functional".'
            )
