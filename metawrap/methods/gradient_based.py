"""What every gradient-based method does around its data path: chooses an engine, looks at the first task, describes.

A look runs once for each mode, before the first task is solved: what inspection cannot see, a gradient shows.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metawrap.description import Description
from metawrap.engines import ENGINES, BufferEdits, Engine, HardGates, choose_engine, differentiable_twice
from metawrap.errors import UnsupportedModuleError
from metawrap.layers.learning_rates import LearningRates
from metawrap.methods.describing import describe_learner
from metawrap.methods.first_look import (
    FirstLook,
    differ,
    refuse_bypassed,
    refuse_carried_graphs,
    support_gradient,
    unchanged,
    warn_fallback,
    warn_once,
    warn_unused,
)
from metawrap.methods.head_start import HEAD_STARTS, HeadStart
from metawrap.methods.method import LossFunction, Method
from metawrap.methods.second_derivative import missing_second_derivative
from metawrap.methods.settings import Memory, Settings
from metawrap.methods.solved import Solved, autograd, dense
from metawrap.schedules import is_second_order
from metawrap.surgery.inspect import find_buffer_aliases, find_head
from metawrap.surgery.wrap import Wrapped
from metawrap.tasks import Task, TaskBatch, tensors_in

_PLAIN_RULE: dict[str, Any] = {
    "inner_optimizer": "sgd",
    "inner_momentum": 0.0,
    "inner_max_grad_norm": None,
    "inner_max_grad_value": None,
}


class GradientBased(Method):
    """A method that runs the user's module with fast weights, through an engine."""

    learning_rates: LearningRates

    def __init__(
        self, wrapped: Wrapped, settings: Settings, loss_fn: LossFunction, preset: str, engine: str, head: str | None
    ) -> None:
        chosen = choose_engine(engine, wrapped.model)
        super().__init__(wrapped.model, settings, loss_fn)
        self.preset, self.wrapped = preset, wrapped
        self._asked_engine, self._chosen = engine, chosen
        self._engine: Engine | None = None
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
    def _support_loss(self, fast: Mapping[str, Tensor], task: Task) -> Tensor:
        """Its loss."""

    def describe(self) -> Description:
        """What wrapping found and did."""
        return describe_learner(
            self,
            preset=self.preset,
            wrapped=self.wrapped,
            rates=self.learning_rates,
            head=self.head,
            engine=self._chosen,
            looks=self._looks,
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
        return super().__getstate__() | {"_engine": None}

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
            with autograd(True), unchanged(self.model, self._device, self._buffer_edits):
                look = self._first_look(task.map(Tensor.clone), differentiable)
            self._looks[mode] = look
        if differentiable:
            self._refuse_second_order(self._looks[mode].once)
        if self._engine is None:
            self._engine = ENGINES[self._chosen[0]](self.model, self._buffer_edits)

    def _first_look(self, task: Task, differentiable: bool) -> FirstLook:
        self._engine = ENGINES["functional"](self.model, self._buffer_edits)
        try:
            learned = {name: p.detach().clone().requires_grad_() for name, p in self.wrapped.adapted_parameters()}

            def prediction(fast: Mapping[str, Tensor] = learned) -> Any:
                return self._support_prediction(fast, task)

            def support_loss(fast: Mapping[str, Tensor]) -> Tensor:
                return self._support_loss(fast, task)

            versions = [tensor._version for tensor in tensors_in(task.support_x)]
            self._buffer_edits.carried.clear()
            with HardGates() as gates:
                unused = support_gradient(learned, support_loss)
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
                with differentiable_twice(self.model, self._has_hard_gates):
                    once = missing_second_derivative(self.model, learned, support_loss)
                self._refuse_second_order(once)
            if self._chosen[0] == "higher":
                self._leave_higher_if_wrong(task)
            if self.settings.memory == "flat" and differentiable:
                self._refuse_flat_if_wrong(task)
        finally:
            self._engine = None
        known = {name for earlier in self._looks.values() for name in earlier.unused}
        warn_unused([name for name in unused if name not in known])
        if once:
            warn_once(once, self.settings.first_order_epochs)
        return FirstLook(unused, differentiable, once)

    def _refuse_second_order(self, once: str | None) -> None:
        if once and is_second_order(self.epoch, self.settings.first_order_epochs):
            raise UnsupportedModuleError(once)

    def _leave_higher_if_wrong(self, task: Task) -> None:
        if not any(parameter.requires_grad for parameter in self.parameters()):
            return
        reference = self._gradient_with("functional", task)
        try:
            reason = (
                "higher's gradient is not the module's own"
                if differ(self._gradient_with("higher", task), reference)
                else ""
            )
        except Exception as error:  # Whatever breaks inside a third library is a reason to leave it.
            reason = f"higher fails on this model ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
        if reason and self._asked_engine == "higher":
            raise UnsupportedModuleError(f'engine="higher" cannot carry this model: {reason}. Use engine="functional".')
        if reason:
            self._chosen = ("functional", reason)
            warn_fallback(reason)

    def _refuse_flat_if_wrong(self, task: Task) -> None:
        engine = self._chosen[0]
        if differ(self._gradient_with(engine, task, "flat"), self._gradient_with(engine, task)):
            raise UnsupportedModuleError(
                'memory="flat" runs each support pass a second time, and this model does not do the same then: its '
                "forward keeps something from call to call, in a list or outside of the module, that cannot be put "
                'back. Keep it in a buffer or a plain attribute, or use memory="unrolled".'
            )

    def _gradient_with(self, engine: str, task: Task, memory: Memory = "unrolled") -> tuple[Tensor | None, ...]:
        self._engine = ENGINES[engine](self.model, self._buffer_edits)
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        settings, steps = self.settings, min(2, self.settings.inner_steps)
        try:
            # The plain rule: the question is whether the engine runs the module right, and Adam amplifies rounding.
            self.settings = replace(settings, memory=memory, **_PLAIN_RULE)
            with unchanged(self.model, self._device):
                solved = self._solve(task, training=True, norm=settings.norm, steps=steps)
                gradients = torch.autograd.grad(solved.loss, parameters, allow_unused=True)
        finally:
            self.settings = settings
        return tuple(None if gradient is None else dense(gradient) for gradient in gradients)
