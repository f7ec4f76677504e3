"""THE DATA PATH of gradient-based meta-learning: MAML, first-order MAML, MAML++.

task -> fast weights -> inner step (support loss, gradient, rate of this layer and step) -> target loss after each step
     -> weighted sum over steps.   `Method.meta_step` takes it from there: mean over tasks -> backward -> outer update.

Read `_solve` first; each method below it is one arrow of the path.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metawrap.engines import ENGINES, Engine, HardGates, choose_engine, differentiable_twice
from metawrap.errors import MetaWrapWarning, UnsupportedModuleError
from metawrap.layers.learning_rates import LearningRates
from metawrap.layers.step_clock import Moments, Statistics
from metawrap.methods.first_look import (
    FirstLook,
    differ,
    support_gradient,
    unchanged,
    warn_fallback,
    warn_unused,
)
from metawrap.methods.method import LossFunction, Method
from metawrap.methods.outer import OptimizerFactory, SchedulerFactory
from metawrap.methods.settings import NormPolicy, Settings, resolve
from metawrap.methods.solved import Solved, autograd, solved_from, usable
from metawrap.results import Description
from metawrap.schedules import is_second_order, step_loss_weights
from metawrap.surgery.inspect import find_head
from metawrap.surgery.swap import Factory, plain_copy
from metawrap.surgery.wrap import Selection, wrap
from metawrap.tasks import Inputs, Task, map_tensors, same_device, tensors_in

FastWeights = dict[str, Tensor]
Rates = Mapping[str, tuple[Tensor, ...]]


@dataclass
class _Unroll:
    """What stays the same while one task is unrolled, and what its norms saw."""

    task: Task
    norm: str
    training: bool
    differentiable: bool
    second_order: bool
    moments: list[Moments] = field(default_factory=list)

    @property
    def statistics(self) -> Statistics:
        return "running" if self.norm == "running" and not self.training else "batch"


class MAML(Method):
    """Model-Agnostic Meta-Learning: an initialisation from which a few gradient steps fit a new task.

    All keywords are those of `MAMLPlusPlus`, whose six parts are off here. Source: Finn et al. 2017, arXiv:1703.03400.
    """

    default_preset = "maml"

    def __init__(
        self,
        model: nn.Module,
        *,
        inner_steps: int = 5,
        inner_lr: float = 0.1,
        preset: str | None = None,
        multi_step_loss: bool | None = None,
        msl_epochs: int | None = None,
        first_order_epochs: float | None = None,
        per_step_norm_statistics: bool | None = None,
        per_step_norm_affine: bool | None = None,
        learn_inner_lr: bool | None = None,
        cosine_annealing: bool | None = None,
        meta_lr: float | None = None,
        min_meta_lr: float | None = None,
        epochs: int | None = None,
        iterations_per_epoch: int | None = None,
        norm: NormPolicy | None = None,
        betas: tuple[float, float] | None = None,
        adapt: Selection = None,
        adapt_norm: bool = False,
        loss_fn: LossFunction = F.cross_entropy,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        max_grad_norm: float | None = None,
        max_grad_value: float | None = None,
        engine: Literal["auto", "higher", "functional"] = "auto",
        tasks_per_backward: int = 1,
        swap: Mapping[type[nn.Module], Factory] | None = None,
        head: str | None = None,
        keep_norm: str | Iterable[str] = (),
        max_skipped_steps: int = 20,
    ) -> None:
        arguments = dict(locals())
        preset = self.default_preset if preset is None else preset
        names = {setting.name for setting in fields(Settings)}
        own_outer = [name for name in ("optimizer", "scheduler") if arguments[name] is not None]
        settings = resolve(preset, {name: arguments[name] for name in names}, own_outer)
        wrapped = wrap(
            model,
            steps=settings.inner_steps,
            affine=settings.per_step_norm_affine,
            statistics=settings.per_step_norm_statistics,
            adapt=adapt,
            adapt_norm=adapt_norm,
            swap=swap,
            keep_norm=keep_norm,
            head=head,
        )
        self._chosen = choose_engine(engine, wrapped.model)
        super().__init__(wrapped.model, settings, loss_fn)
        self.preset, self.wrapped, self._asked_engine = preset, wrapped, engine
        self._looks: dict[bool, FirstLook] = {}
        self._engine: Engine | None = None
        self._head = head
        self._has_hard_gates = self._edits_inputs = False
        # Used outside of an inner loop, too, the norms follow the policy.
        wrapped.clock.statistics = "batch" if settings.norm == "batch" else None
        self.learning_rates = LearningRates(
            wrapped.adapted_parameters(), settings.inner_steps, settings.inner_lr, settings.learn_inner_lr
        )
        self._make_outer(optimizer, scheduler)
        if wrapped.swapped and settings.per_step_norm_affine and settings.first_order_epochs >= settings.epochs:
            warnings.warn(f"first_order_epochs: {_first_order_warning(settings)}", MetaWrapWarning, stacklevel=2)

    def _solve(self, task: Task, *, training: bool, norm: str, steps: int | None = None) -> Solved:
        steps = self.settings.inner_steps if steps is None else steps
        differentiable = torch.is_grad_enabled()
        second_order = differentiable and is_second_order(self.epoch, self.settings.first_order_epochs)
        unroll = _Unroll(task, norm, training, differentiable, second_order)
        weights = self._step_weights(steps, training)
        losses: list[Tensor | None] = [None] * steps
        with differentiable_twice(self.model, self._has_hard_gates) if second_order else nullcontext():
            rates = self.learning_rates.per_step()
            fast = self._initial_weights(differentiable)
            for step, weight in enumerate(weights):
                fast = self._inner_step(fast, rates, step, unroll)
                if weight:
                    prediction = self._predict_target(fast, step, unroll)
                    losses[step] = self._loss(prediction, task.target_y, "target")
            if steps:
                total = torch.stack(
                    [w * loss for w, loss in zip(weights, losses, strict=True) if loss is not None]
                ).sum()
            else:
                prediction = self._predict_target(fast, 0, unroll)
                total = self._loss(prediction, task.target_y, "target")
        return solved_from(total, losses, prediction, task.target_y, unroll.moments)

    def _step_weights(self, steps: int, training: bool) -> list[float]:
        return step_loss_weights(steps, self.epoch, self.settings.step_loss_epochs if training else 0) if steps else []

    def _initial_weights(self, differentiable: bool) -> FastWeights:
        # Clones: in-place edits of a fast weight, and hooks on the user's parameters, must not meet each other.
        copies = {name: parameter.clone() for name, parameter in self.wrapped.adapted_parameters()}
        # One that was frozen after wrapping is still adapted, from where it is.
        return {
            name: w if differentiable and w.requires_grad else w.detach().requires_grad_() for name, w in copies.items()
        }

    def _inner_step(self, fast: FastWeights, rates: Rates, step: int, unroll: _Unroll) -> FastWeights:
        with autograd(True):
            prediction = self._predict(fast, unroll.task.support_x, step, unroll.statistics, unroll)
            loss = self._loss(prediction, unroll.task.support_y, "support")
            # Only of the fast weights: every other parameter would lead back through all earlier steps.
            gradients = torch.autograd.grad(
                loss, tuple(fast.values()), create_graph=unroll.second_order, allow_unused=True
            )
        row = min(step, self.settings.inner_steps - 1)
        updated = {
            name: weight if gradient is None else weight - rates[name][row] * _dense(gradient)
            for (name, weight), gradient in zip(fast.items(), gradients, strict=True)
        }
        return updated if unroll.differentiable else {name: w.detach().requires_grad_() for name, w in updated.items()}

    def _predict_target(self, fast: FastWeights, step: int, unroll: _Unroll) -> Any:
        if unroll.norm == "support":
            # This pass is recorded in the target's place: the target normalises by no statistics of its own.
            self._predict(fast, unroll.task.support_x, step, "capture", unroll)
            return self._predict(fast, unroll.task.target_x, step, "captured", unroll)
        return self._predict(fast, unroll.task.target_x, step, unroll.statistics, unroll)

    def _predict(self, fast: FastWeights, inputs: Inputs, step: int, statistics: Statistics, unroll: _Unroll) -> Any:
        assert self._engine is not None
        if self._edits_inputs:
            inputs = map_tensors(inputs, Tensor.clone)
        with self.wrapped.clock.at(step, statistics, unroll.moments if unroll.training else None):
            return self._engine.call(fast, inputs)

    def adapt(self, support_x: Inputs, support_y: Any, steps: int | None = None) -> nn.Module:
        """A plain module of the user's own class, in eval mode, fitted to one support set; changes nothing here.

        Its norms are ordinary ones, at row max(0, min(steps, inner_steps) - 1): under norm="batch" without running
        statistics (they use each batch's own), under "running" with that row's, under "support" with the support set's.

        Args:
            support_x, support_y: one task's support set, (examples, ...).
            steps: inner steps; as in training if None; 0 gives the initialisation.
        """
        steps = self.settings.inner_steps if steps is None else self._checked_steps(steps)
        with self._evaluating(), autograd(False):
            task = usable(Task(support_x, support_y, support_x, support_y))
            same_device([task], self._device)
            self._prepare(task)
            unroll = _Unroll(task, self.settings.norm, training=False, differentiable=False, second_order=False)
            rates, fast = self.learning_rates.per_step(), self._initial_weights(differentiable=False)
            for step in range(steps):
                fast = self._inner_step(fast, rates, step, unroll)
            row = max(0, min(steps, self.settings.inner_steps) - 1)
            statistics = self._support_statistics(fast, row, unroll) if unroll.norm == "support" else None
            return plain_copy(self.model, fast, row, statistics, keep_statistics=unroll.norm != "batch")

    def unwrap(self) -> nn.Module:
        """The meta-trained initialisation as a plain module of the user's own class, its norms at row 0."""
        return plain_copy(self.model, {}, 0, None, keep_statistics=self.settings.norm != "batch")

    def describe(self) -> Description:
        """What wrapping found and did."""
        shapes = {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        adapted = set(self.wrapped.adapted)
        look = next(iter(self._looks.values()), None)
        unused = look.unused if look else []
        return Description(
            method=f'{type(self).__name__}(preset="{self.preset}")',
            model=type(self.model).__name__,
            settings=self.settings.as_dict(),
            adapted={name: shape for name, shape in shapes.items() if name in adapted},
            learned_only={name: shape for name, shape in shapes.items() if name in trained - adapted},
            frozen={name: shape for name, shape in shapes.items() if name not in trained},
            swapped=self.wrapped.swapped,
            left_alone=self.wrapped.kept,
            head=self.head,
            engine=self._chosen[0],
            engine_reason=self._chosen[1],
            rates=sum(rates.numel() for _, rates in self.learning_rates.items()),
            notes=self.wrapped.notes,
            warnings=[f"the support loss does not depend on '{name}'" for name in unused] + self._norm_warnings(),
        )

    @property
    def head(self) -> str | None:
        """The name of the module whose output is the prediction; None before the first task."""
        return self._head

    def train(self, mode: bool = True) -> MAML:
        """As in torch; norms named by `keep_norm` stay on their stored statistics."""
        super().train(mode)
        self.wrapped.hold_kept_norms()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # An engine holds classes made at run time; it is made again when needed.
        return self.__dict__ | {"_engine": None}

    def _prepare(self, task: Task) -> None:
        self.wrapped.hold_kept_norms()
        mode = self.model.training
        if mode not in self._looks:
            with autograd(True), unchanged(self.model, self._device):
                self._looks[mode] = self._first_look(task.map(Tensor.clone))
        if self._engine is None:
            self._engine = ENGINES[self._chosen[0]](self.model)

    def _first_look(self, task: Task) -> FirstLook:
        self._engine = ENGINES["functional"](self.model)
        try:
            unroll = _Unroll(task, self.settings.norm, training=False, differentiable=True, second_order=False)

            def prediction() -> Any:
                return self._predict(self._initial_weights(False), task.support_x, 0, "batch", unroll)

            versions = [tensor._version for tensor in tensors_in(task.support_x)]
            with HardGates() as gates:
                unused = support_gradient(
                    self._initial_weights(False),
                    lambda fast: self._loss(
                        self._predict(dict(fast), task.support_x, 0, "batch", unroll), task.support_y, "support"
                    ),
                )
            self._has_hard_gates = self._has_hard_gates or gates.seen
            self._edits_inputs |= versions != [tensor._version for tensor in tensors_in(task.support_x)]
            self._head = self._head or find_head(self.model, prediction)
            if self._chosen[0] == "higher":
                self._leave_higher_if_wrong(task)
        finally:
            self._engine = None
        known = {name for earlier in self._looks.values() for name in earlier.unused}
        warn_unused([name for name in unused if name not in known])
        return FirstLook(unused)

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

    def _gradient_with(self, engine: str, task: Task) -> tuple[Tensor | None, ...]:
        self._engine = ENGINES[engine](self.model)
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        with unchanged(self.model, self._device):
            solved = self._solve(task, training=True, norm=self.settings.norm, steps=min(2, self.settings.inner_steps))
            gradients = torch.autograd.grad(solved.loss, parameters, allow_unused=True)
        return tuple(None if gradient is None else _dense(gradient) for gradient in gradients)

    def _support_statistics(self, fast: FastWeights, row: int, unroll: _Unroll) -> dict[str, tuple[Tensor, Tensor]]:
        self._predict(fast, unroll.task.support_x, row, "capture", unroll)
        captured, self.wrapped.clock.captured = self.wrapped.clock.captured, {}
        for name, passes in captured.items():
            if len(passes) != 1:
                raise UnsupportedModuleError(
                    f"'{name}' runs {len(passes)} times in one forward pass, but a plain batch norm holds one set of "
                    'statistics. Use norm="batch" or norm="running", or evaluate with the learner itself.'
                )
        return {name: passes[0] for name, passes in captured.items()}

    def _norm_warnings(self) -> list[str]:
        s = self.settings
        if not self.wrapped.swapped:
            return []
        rows = s.per_step_norm_affine and s.inner_steps > 1 and s.first_order_epochs > s.step_loss_epochs
        stored = (
            'norm="running" trains under batch statistics and adapts under stored ones in evaluation, where the inner '
            'loop often diverges; norm="support" is inductive and the same in both'
        )
        return [_first_order_warning(s)] * rows + [stored] * (s.norm == "running")


class MAMLPlusPlus(MAML):
    """MAML++: MAML with six parts, each of which can be switched alone.

    MSL: multi-step loss, `multi_step_loss`, `msl_epochs`. DA: derivative-order annealing, `first_order_epochs`. BNRS
    and BNWB:
    per-step batch-norm statistics and affine parameters, `per_step_norm_statistics`, `per_step_norm_affine`. LSLR: a
    learned rate per parameter tensor and inner step, `learn_inner_lr`. CA: cosine annealing of the outer rate,
    `cosine_annealing`. Source: Antoniou, Edwards, Storkey 2018, arXiv:1810.09502.

    Args:
        model: any `torch.nn.Module`; it is copied, never changed.
        inner_steps: inner updates per task in training.
        inner_lr: initial inner rate of every adapted tensor and step; any sign.
        preset: "authors_code" (default) or "paper"; an argument that is given wins over it.
        multi_step_loss, msl_epochs: MSL, and the epochs over which its weights move to the last step.
        first_order_epochs: DA: epochs of first-order gradients before second-order ones; 0 turns it off.
        per_step_norm_statistics: BNRS: running statistics per inner step.
        per_step_norm_affine: BNWB: batch-norm scale and shift per inner step, learned by the outer loop.
        learn_inner_lr: LSLR; without it the rates stay at `inner_lr`.
        cosine_annealing, meta_lr, min_meta_lr, epochs: CA, from `meta_lr` to `min_meta_lr` over `epochs` epochs.
        iterations_per_epoch: meta-steps that make an epoch, for every schedule.
        norm: batch-norm policy: "batch" (each batch's own statistics, transductive), "running" (stored ones
            in evaluation) or "support" (targets use their support set's).
        betas: of the built-in Adam.
        adapt: which parameters the inner loop adapts: names, wildcards, or a function of the name; all but the
            batch norms' if None. A parameter frozen before wrapping is not adapted; one frozen later still is, from a
            start that is no longer learned.
        adapt_norm: adapts batch-norm scale and shift in the inner loop too, as one (channels,) vector each.
        loss_fn: `loss_fn(prediction, y)` to a scalar.
        optimizer: function from parameters to an optimizer, in place of Adam; brings its own learning rate.
        scheduler: function from an optimizer to a scheduler, stepped at the end of each epoch, in place of CA.
        max_grad_norm, max_grad_value: clipping of the meta-gradient, by norm or by entry.
        engine: "auto", "higher" or "functional".
        tasks_per_backward: tasks that are unrolled before a backward pass: memory against speed.
        swap: module class to factory(module), for norms that cannot become per-step as they are.
        head: name of the module that makes the prediction; found by watching a forward pass if None.
        keep_norm: names or wildcards of batch norms to leave alone: they run on their stored statistics.
        max_skipped_steps: training stops when this many meta-steps in a row have a gradient that is not finite.
    Raises:
        ArgumentError: an argument has the wrong type, range or combination.
        UnsupportedModuleError: the model has something that no engine can adapt correctly.
    """

    default_preset = "authors_code"


class FOMAML(MAML):
    """First-order MAML: the inner gradients count as constants. Source: Finn et al. 2017, section 5.2."""

    default_preset = "fomaml"


def _first_order_warning(settings: Settings) -> str:
    until = "the end" if math.isinf(settings.first_order_epochs) else f"epoch {settings.first_order_epochs}"
    return (
        f"from epoch {settings.step_loss_epochs} to {until} the gradient is first-order and only the last step "
        f"counts, so batch-norm rows 0..{settings.inner_steps - 2} get no gradient"
    )


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient
