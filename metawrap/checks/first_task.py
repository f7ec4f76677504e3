"""Checks of a gradient-based learner's model on the first task of each mode; they change nothing but the findings.

Inspection cannot see everything: a gradient shows unused parameters, operations without a second derivative, an engine
that is wrong for this model, and passes that depend on each other. A probe answers each question: a `TaskSolver` with
settings and engines of its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metawrap.checks.first_look import (
    FirstLook,
    Gradients,
    counted,
    differ,
    refuse_bypassed,
    refuse_carried_graphs,
    refuse_other_layout,
    support_gradient,
    warn_many_outputs,
    warn_no_second_derivative,
    warn_tasks_in_order,
    warn_unused,
)
from metawrap.checks.second_derivative import missing_second_derivative
from metawrap.checks.several_tasks import refuse_impure, twin_of, without_dropout
from metawrap.checks.unequal_tasks import why_not_padded
from metawrap.engines import (
    ENGINES,
    BatchedEngine,
    BufferEdits,
    EngineChoice,
    PlainForms,
    cannot,
    differentiable_twice,
    first_line,
)
from metawrap.engines.calling import autograd, dense
from metawrap.errors import MetaWrapError, UnsupportedModuleError
from metawrap.inner_loop.flat_memory import DisturbedError
from metawrap.inner_loop.task_layout import stacked, start_of
from metawrap.inner_loop.task_solver import TaskSolver
from metawrap.inner_loop.update_rules import inner_optimizer
from metawrap.settings.groups import InnerOptions, Memory
from metawrap.settings.schedules import is_second_order
from metawrap.snapshot.module_state import attributes_put_back, unchanged
from metawrap.snapshot.reachable_state import difference, state_of
from metawrap.surgery.inspect import find_buffer_aliases, find_head
from metawrap.tasks import Task, copy_of, device_of, tensors_in

# Relative differences of gradients that pass for rounding.
_DOUBLE, _SINGLE = 1e-6, 1e-3


class FirstTaskChecks:
    """Findings about one model, and the questions that lead to them.

    engine: the chosen engine; a finding may change the choice. findings: by mode, True for training mode.
    edits: buffers that forward edits. edits_inputs: forward edits its inputs. plain_forms: forward runs an operation
    that `PlainForms` replaces. work: multiplications and additions of a support pass. batched: several tasks at once
    have the right gradient. not_padded: why tasks of unequal sizes do not run at once; None where they do.
    passes_in_order: why the passes of one task must run in their own order, or None.
    """

    def __init__(self, model: nn.Module, engine: EngineChoice) -> None:
        self.engine = engine
        self.findings: dict[bool, FirstLook] = {}
        self.edits = BufferEdits(find_buffer_aliases(model))
        self.plain_forms, self.edits_inputs, self.batched, self.work = False, False, False, 0
        self.not_padded: str | None = "no task was tried yet"
        self.passes_in_order: str | None = None

    def prepare(self, learner: Any, task: Task) -> None:
        """Asks what this mode's first task can answer; later calls return at once.

        Raises:
            UnsupportedModuleError: the model cannot be adapted correctly.
        """
        training, differentiable = learner.model.training, torch.is_grad_enabled()
        known = self.findings.get(training)
        if known is None or (differentiable and not known.differentiable):
            with autograd(True), model_unchanged(learner, self.edits):
                known = self._first_look(learner, task.map(copy_of), differentiable)
            self.findings[training] = known
            workers = learner.settings.execution.workers
            if training and workers not in (1, "auto") and (reason := learner.executor.why_in_order(learner)):
                warn_tasks_in_order(workers, reason)
        if differentiable:
            self._refuse_second_order(learner, known.no_second_derivative)
        if self.engine.name == "batched" and training and not self.batched:
            with autograd(True), model_unchanged(learner, self.edits):
                self._refuse_impure(learner, task.map(copy_of))
                self.batched = self._several_at_once_are_right(learner, task.map(copy_of), differentiable)

    def _first_look(self, learner: Any, task: Task, differentiable: bool) -> FirstLook:
        wrapped, settings = learner.wrapped, learner.settings
        solver = learner._solver(engine=ENGINES["functional"](wrapped.model, self.edits))
        learned = {name: p.detach().clone().requires_grad_() for name, p in wrapped.adapted_parameters()}

        def prediction(fast: Mapping[str, Tensor] = learned) -> Any:
            loop = solver.loop(task, training=False, norm="batch", mask=False)
            return loop.predict(dict(fast), loop.task.support_x, 0, "batch")

        def support_loss(fast: Mapping[str, Tensor]) -> Tensor:
            loop = solver.loop(task, training=False, norm="batch")
            loss: Tensor = loop.support_loss(dict(fast), loop.task, 0)
            return loss

        if solver.channels_last:
            # As forward gets it, so that edits of it are seen.
            task = solver.loop(task, training=False, norm="batch", mask=False).task
            refuse_other_layout(lambda: prediction())
        versions = [tensor._version for tensor in tensors_in(task.support_x)]
        self.edits.carried.clear()
        before = state_of((wrapped.model, learner.loss_fn))
        with PlainForms() as forms:
            unused = support_gradient(learned, support_loss)
        changed = difference(before, state_of((wrapped.model, learner.loss_fn)))
        self.plain_forms |= forms.seen
        self.edits_inputs |= versions != [tensor._version for tensor in tensors_in(task.support_x)]
        solver = replace(solver, plain_forms=self.plain_forms, clone_inputs=self.edits_inputs)
        if differentiable:
            refuse_carried_graphs(wrapped.model, self.edits.carried, lambda: support_loss(learned))
        predicted, self.work, drawn = counted(prediction)
        refuse_bypassed(predicted, wrapped.adapted_parameters())
        if learner.head is None:
            head, exact, _ = find_head(wrapped.model, prediction)
            # Before it is stored: a head that was refused must be refused again.
            learner.head_start.find(wrapped.model, head if exact else None, wrapped.adapted)
            learner.head = head
        cause = None
        if differentiable and not math.isinf(settings.first_order_epochs):
            with differentiable_twice(wrapped.model, self.plain_forms):
                cause = missing_second_derivative(wrapped.model, learned, support_loss)
            self._refuse_second_order(learner, cause)
        if self.engine.name == "higher":
            self._refuse_higher_if_wrong(solver, task)
        if settings.execution.memory == "flat" and differentiable:
            self._look_at_flat_memory(solver, task)
        earlier = {name for look in self.findings.values() for name in look.unused}
        warn_unused([name for name in unused if name not in earlier])
        if wrapped.model.training and True not in self.findings and not settings.outputs.mask_unused_outputs:
            mask = ', or pass outputs={"mask_unused_outputs": True}' if self.engine.name != "batched" else ""
            warn_many_outputs(predicted, task, learner.loss_fn, mask)
        if cause:
            warn_no_second_derivative(cause, settings.first_order_epochs)
        several = differentiable and wrapped.model.training and settings.execution.workers != 1
        left_behind = changed or drawn or (learner.executor.worker_differs(learner, solver, task) if several else None)
        return FirstLook(unused, differentiable, cause, left_behind)

    def _refuse_second_order(self, learner: Any, cause: str | None) -> None:
        if cause and is_second_order(learner.epoch, learner.settings.first_order_epochs):
            raise UnsupportedModuleError(cause)

    def _refuse_higher_if_wrong(self, solver: TaskSolver, task: Task) -> None:
        if not any(parameter.requires_grad for parameter in solver.learned):
            return
        reference = probed_gradient(solver, "functional", [task])
        try:
            wrong = differ(probed_gradient(solver, "higher", [task]), reference)
            reason = "higher's gradient is not the module's own" if wrong else ""
        except Exception as error:  # Any failure inside the third library is a reason to leave it.
            reason = f"higher fails on this model ({first_line(error)})"
        if reason:
            raise UnsupportedModuleError(f'engine="higher" cannot carry this model: {reason}. Use engine="functional".')

    def look_at_flat_memory(self, learner: Any, task: Task) -> None:
        """Checks that flat memory is right for the model, after memory ran out without it.

        Raises:
            UnsupportedModuleError: the model does not do the same when a pass runs a second time.
        """
        with autograd(True), model_unchanged(learner, self.edits):
            self._look_at_flat_memory(learner._solver(), task.map(copy_of))
            if self.engine.name == "batched":
                self._several_at_once_are_right(learner, task.map(copy_of), differentiable=True, memory="flat")

    def _look_at_flat_memory(self, solver: TaskSolver, task: Task) -> None:
        if self.engine.name != "batched":  # Two tasks at once are compared with the memory of the run.
            self._refuse_flat_if_wrong(solver, task)
        self.passes_in_order = self.passes_in_order or self._order_matters(solver, task)

    def _refuse_flat_if_wrong(self, solver: TaskSolver, task: Task) -> None:
        engine = self.engine.name
        # Of one step: two would take the memory that flat memory saves.
        flat = probed_gradient(solver, engine, [task], memory="flat", steps=1)
        if differ(flat, probed_gradient(solver, engine, [task], steps=1)):
            raise UnsupportedModuleError(
                'memory="flat" runs each support pass a second time, and this model does not do the same then: its '
                "forward keeps something from call to call, in a list or outside of the module, that cannot be put "
                'back. Keep it in a buffer or a plain attribute, or use execution={"memory": "unrolled"}.'
            )

    def _order_matters(self, solver: TaskSolver, task: Task) -> str | None:
        """Why the passes of a task must run in their own order, or None."""
        engine = self.engine.of_one_task
        try:
            found = probed_gradient(solver, engine, [task], memory="flat", any_order=True)
        except DisturbedError as disturbed:
            return str(disturbed)
        wrong = differ(found, probed_gradient(solver, engine, [task], memory="flat"))
        return "in another order the passes of a task give another gradient" if wrong else None

    def _refuse_impure(self, learner: Any, task: Task) -> None:
        if edited := self.edits.edited:
            raise UnsupportedModuleError(
                cannot(f"its forward edits the buffer '{min(edited)}', once for all tasks, not for each")
            )
        model = learner.wrapped.model
        try:
            with without_dropout(model):
                solver = learner._solver(batched=BatchedEngine(model, self.edits))
                stack = stacked([task, twin_of(task)])
                loop = solver.loop(stack, training=False, norm="batch", mask=False, several=True)
                weights = {n: start_of([p.detach()] * 2) for n, p in learner.wrapped.adapted_parameters()}
                for inputs in (stack.support_x, stack.target_x):
                    refuse_impure(model, partial(loop.predict, weights, inputs, 0, "batch"))
        except (MetaWrapError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # It has run as one task before, so the second task is the cause.
            raise UnsupportedModuleError(cannot(f"it fails with {first_line(error)}")) from error

    def _several_at_once_are_right(
        self, learner: Any, task: Task, differentiable: bool, memory: Memory | None = None
    ) -> bool:
        """Whether two tasks at once have the gradient that they have one by one; False where that cannot be told yet.

        Raises:
            UnsupportedModuleError: they have another gradient, or none.
        """
        if not any(parameter.requires_grad for parameter in learner.parameters()):
            self.not_padded = "nothing is learned"
            return True
        if not differentiable:
            return False
        once, asked = self.findings[learner.model.training].no_second_derivative, learner.settings.first_order_epochs
        order = asked if once or math.isinf(asked) else 0
        solver, sample, tolerance = in_double_precision(learner, task)
        memory = memory or learner.settings.execution.memory
        gradient = partial(probed_gradient, replace(solver, pads=True), first_order_epochs=order)
        with without_dropout(solver.wrapped.model):
            try:
                pair = [sample, twin_of(sample)]
                reference = gradient("functional", pair)
            except Exception:  # Labels that cannot be exchanged: both tasks are then the same.
                pair = [sample, sample]
                reference = gradient("functional", pair)
            if not all(bool(g.isfinite().all()) for g in reference if g is not None):
                return False
            try:
                found = gradient("batched", pair, memory=memory)
            except (MetaWrapError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise UnsupportedModuleError(cannot(f"it fails with {first_line(error)}")) from error
            if differ(found, reference, tolerance):
                raise UnsupportedModuleError(
                    cannot("its meta-gradient for two tasks at once is not that of one after the other")
                )
            self.not_padded = why_not_padded(solver, sample, partial(gradient, memory=memory), tolerance)
        return True


def probed_gradient(
    solver: TaskSolver,
    engine: str,
    tasks: Sequence[Task],
    *,
    memory: Memory = "unrolled",
    first_order_epochs: float | None = None,
    any_order: bool = False,
    steps: int = 2,
    channels_last: bool | None = None,
) -> Gradients:
    """The gradient of the tasks' summed loss through an engine of the probe's own; the model is put back afterwards.

    The inner update is plain gradient descent: the question is whether the engine runs the module right, and Adam
    amplifies rounding.
    """
    model, settings = solver.wrapped.model, solver.settings
    plain = replace(solver.update, optimizer=partial(inner_optimizer, options=InnerOptions()))
    probe = replace(
        solver,
        engine=ENGINES["functional" if engine == "batched" else engine](model, solver.edits),
        batched=BatchedEngine(model, solver.edits) if engine == "batched" else None,
        any_order=any_order,
        # A learned update rule is part of what is asked about.
        update=solver.update if solver.update.keeps_graph else plain,
        channels_last=solver.channels_last if channels_last is None else channels_last,
        settings=replace(
            settings,
            inner_steps=min(steps, settings.inner_steps),
            first_order_epochs=settings.first_order_epochs if first_order_epochs is None else first_order_epochs,
            inner_update=InnerOptions(),
            execution=replace(settings.execution, memory=memory),
        ),
    )
    learned = [parameter for parameter in solver.learned if parameter.requires_grad]
    with model_unchanged(solver):
        loss, _ = probe.solve_all(tasks, training=True, norm=settings.norm, whole_graph=False)
        gradients = torch.autograd.grad(loss, learned, allow_unused=True)
    return tuple(None if gradient is None else dense(gradient) for gradient in gradients)


def in_double_precision(learner: Any, task: Task) -> tuple[TaskSolver, Task, float]:
    """A solver and a task in double precision, where rounding hides nothing, and how far gradients may differ."""
    numbers = [p for p in learner.parameters() if p.is_floating_point() or p.is_complex()]
    if all(p.dtype in (torch.float64, torch.complex128) for p in numbers):
        return learner._solver(), task, _DOUBLE
    try:
        solver = copy.deepcopy(learner).double()._solver()
        sample = task.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
        probed_gradient(solver, "functional", [sample], first_order_epochs=math.inf, steps=1)
    except Exception:  # A forward that insists on single precision, for example.
        return learner._solver(), task, _SINGLE
    return solver, sample, _DOUBLE


def carries_channels_last(learner: Any, task: Task, **changes: Any) -> bool:
    """Whether one inner step has the same meta-gradient in channels_last. Args: changes: other fields of the solver."""
    solver, sample, tolerance = in_double_precision(learner, task)
    solver = replace(solver, **changes)
    try:
        found = [probed_gradient(solver, "functional", [sample], channels_last=last, steps=1) for last in (False, True)]
    except RuntimeError:  # A `view` that needs the usual layout, for example.
        return False
    return not differ(found[1], found[0], tolerance)


@contextmanager
def model_unchanged(learner: Any, edits: BufferEdits | None = None) -> Iterator[None]:
    """Restores all that a probe may change in the model and the loss of a learner or of a solver."""
    model, loss_fn, device = learner.wrapped.model, learner.loss_fn, device_of(learner.wrapped.model)
    with ExitStack() as stack:
        stack.enter_context(unchanged(model, device, edits))
        if isinstance(loss_fn, nn.Module):
            stack.enter_context(unchanged(loss_fn, device))
        elif own := getattr(loss_fn, "__dict__", None):
            stack.enter_context(attributes_put_back(own))
        yield
