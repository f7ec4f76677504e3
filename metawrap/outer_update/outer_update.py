"""The outer update: clip, refuse what is not finite, step the optimizer, follow the schedule.

Nothing here synchronises with the device when the optimizer is fused: a step whose gradient is not finite is masked
there.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from metawrap.checks.not_finite import trouble_in_words
from metawrap.errors import ArgumentError, DivergedError, MetaWrapWarning
from metawrap.layers.per_step_norm import fold_moments
from metawrap.outer_update.users_scheduler import SchedulerFactory, check_scheduler, made_scheduler
from metawrap.results import TaskOutcome
from metawrap.settings.schedules import cosine_meta_lr, linear_meta_lr
from metawrap.settings.settings import OuterSettings
from metawrap.tasks import TaskBatch

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]


class OuterUpdate:
    """Owns the optimizer and the schedule of a learner's own parameters: built in, Adam and a half cosine.

    switch: the setting that turns the built-in schedule on.
    """

    switch = "cosine_annealing"

    def __init__(
        self,
        parameters: list[nn.Parameter],
        settings: OuterSettings,
        optimizer: OptimizerFactory | None,
        scheduler: SchedulerFactory | None,
    ) -> None:
        self.settings = settings
        self.optimizer = _built(optimizer, parameters) if optimizer else self._own_optimizer(parameters)
        self.scheduler = made_scheduler(scheduler, self.optimizer) if scheduler else None
        # A user's optimizer or scheduler keeps its own rate; the schedule belongs to the optimizer built here.
        self.anneals = getattr(settings, self.switch) and not (optimizer or scheduler)

    def take_over(self, optimizer: Any, parameters: Iterable[nn.Parameter]) -> None:
        """Puts the user's optimizer in place of the present one; the schedule of that one ends.

        Raises:
            ArgumentError: it is no usable optimizer, or holds a parameter that is not the learner's.
        """
        _check_optimizer(optimizer, "the assigned value")
        own = {id(parameter) for parameter in parameters}
        if any(id(p) not in own for group in optimizer.param_groups for p in group["params"]):
            raise ArgumentError(
                "optimizer: it holds parameters that are not the learner's. The learner works on a copy of the model: "
                "build the optimizer from learner.parameters()."
            )
        self.optimizer, self.scheduler, self.anneals = optimizer, None, False

    def take_over_schedule(self, scheduler: Any) -> None:
        """Puts the user's scheduler, of the present optimizer, in place of the present schedule."""
        check_scheduler(scheduler, "the assigned value")
        if scheduler.optimizer is not self.optimizer:
            raise ArgumentError("scheduler: it belongs to another optimizer. Build it from learner.optimizer.")
        self.scheduler, self.anneals = scheduler, False

    def start(self, epoch: int) -> float:
        """Sets this epoch's rate where the built-in schedule rules it; returns the rate in use."""
        if self.anneals:
            rate = self._rate_of(epoch)
            for group in self.optimizer.param_groups:
                if group["lr"] != rate and group["lr"] not in map(self._rate_of, range(self.settings.epochs + 1)):
                    warnings.warn(
                        f"Learning rate {group['lr']} is not one of the {self.switch.split('_')[0]} schedule, and is "
                        f"set to {rate:.3g}. "
                        f"To rule it yourself, build the learner with {self.switch}=False.",
                        MetaWrapWarning,
                        stacklevel=3,
                    )
                group["lr"] = rate
        return float(self.optimizer.param_groups[0]["lr"])

    def _own_optimizer(self, parameters: list[nn.Parameter]) -> Optimizer:
        s = self.settings
        return torch.optim.Adam(parameters, lr=s.meta_lr, betas=s.outer_update.betas, fused=_can_fuse(parameters))

    def _rate_of(self, epoch: int) -> float:
        s = self.settings
        return cosine_meta_lr(epoch, s.epochs, s.meta_lr, s.min_meta_lr)

    def check_holds(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Raises ArgumentError when nothing is to be learned, or when the optimizer lacks a parameter that is."""
        held = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        learned = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        if not learned:
            raise ArgumentError(
                "model: expected at least one parameter that requires a gradient, but all are frozen, so meta_step has "
                "nothing to learn. Unfreeze some with learner.model.requires_grad_(), or call evaluate or adapt."
            )
        missing = [name for name, parameter in learned if id(parameter) not in held]
        if missing:
            raise ArgumentError(
                f"optimizer: it does not hold {', '.join(missing)}, which would never be learned. Freeze them with "
                "requires_grad_(False), give the optimizer all parameters, or wrap the model again if a module or "
                "parameter of learner.model was replaced."
            )

    def follow(self, named: Iterable[tuple[str, nn.Parameter]], made: Iterable[nn.Parameter]) -> None:
        """Takes in parameters that were made since it was built, and lets go of those that are gone.

        The new ones join the first group, in the learner's order, so that the places of a stored state are the same in
        a learner that is built from it.

        Args:
            named: all of the learner's parameters. made: the new ones.
        """
        names = {id(parameter): name for name, parameter in named}
        order, new = {key: place for place, key in enumerate(names)}, list(made)
        for index, group in enumerate(self.optimizer.param_groups):
            kept = [p for p in [*group["params"], *(new if index == 0 else [])] if id(p) in names]
            group["params"] = sorted({id(p): p for p in kept}.values(), key=lambda p: order[id(p)]) if new else kept
            if "param_names" in group:
                group["param_names"] = [names[id(p)] for p in group["params"]]
        for parameter in [p for p in self.optimizer.state if id(p) not in names]:
            del self.optimizer.state[parameter]

    def lengthen(self, parameter: nn.Parameter, more: Tensor) -> None:
        """Puts rows behind those of a parameter, of which nothing is remembered yet; it stays the same parameter."""
        before = parameter.shape
        parameter.grad = None
        parameter.data = torch.cat([parameter.detach(), more])
        state = self.optimizer.state.get(parameter, {})
        remembered = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.ndim}
        if any(value.shape != before for value in remembered.values()):
            del self.optimizer.state[parameter]  # In a form of the optimizer's own, which cannot be lengthened.
            return
        for key, value in remembered.items():
            state[key] = torch.cat([value, torch.zeros_like(more, dtype=value.dtype)])

    def apply(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Puts the gradients in `.grad` and steps.

        Returns:
            The L2 norm of the gradient before clipping, and a bool scalar: whether it was finite and the step taken.
        """
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                # One that was frozen since the last step would be moved by what it still holds.
                parameter.grad = None
        if not isinstance(self.optimizer, torch.optim.SparseAdam):
            gradients = [g.to_dense() if g is not None and g.is_sparse else g for g in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else _laid_out_as(parameter, gradient)
            # What was saved before the parameter's layout changed is loaded as it was.
            state = self.optimizer.state.get(parameter, {})
            state.update({key: _laid_out_as(parameter, v) for key, v in state.items() if isinstance(v, Tensor)})
        present = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm, finite, squares_fit = _norm_of(present)
        options = self.settings.outer_update
        if options.max_grad_value is not None:
            nn.utils.clip_grad_value_(parameters, options.max_grad_value)
        if options.max_grad_norm is not None:
            clipped = norm if options.max_grad_value is None else _norm_of(present)[0]
            nn.utils.clip_grads_with_norm_(parameters, options.max_grad_norm, clipped)
        if not isinstance(self.optimizer, torch.optim.SGD):
            # Adam and its like store the squares of the entries, and would keep an infinite one for ever.
            clips = options.max_grad_value is not None or options.max_grad_norm is not None
            finite = finite & (_norm_of(present)[2] if clips else squares_fit)
        self._step_where(finite)
        return norm, finite

    def ends_epoch(self, iteration: int) -> bool:
        """Whether the user's scheduler is due after so many meta-steps."""
        return self.scheduler is not None and iteration % self.settings.iterations_per_epoch == 0

    def end(self, iteration: int) -> None:
        """Steps the user's scheduler at the end of each epoch."""
        if self.scheduler is not None and self.ends_epoch(iteration):
            self.scheduler.step()

    def _step_where(self, finite: Tensor) -> None:
        optimizer: Any = self.optimizer
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            # The way GradScaler tells a fused optimizer to skip on the device.
            optimizer.grad_scale, optimizer.found_inf = None, (~finite).to(torch.float32)
            try:
                optimizer.step()
            finally:
                del optimizer.grad_scale, optimizer.found_inf
        elif bool(finite):
            optimizer.step()


class PlainOuterUpdate(OuterUpdate):
    """Built in: plain SGD, whose rate goes down to zero in equal parts, epoch by epoch."""

    switch = "linear_annealing"

    def _own_optimizer(self, parameters: list[nn.Parameter]) -> Optimizer:
        return torch.optim.SGD(parameters, lr=self.settings.meta_lr, fused=_can_fuse(parameters))

    def _rate_of(self, epoch: int) -> float:
        return linear_meta_lr(epoch, self.settings.epochs, self.settings.meta_lr)


def _norm_of(gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The L2 norm of all gradients together; whether every entry, and every square of one, is finite.

    All are scalars on the device. Squares of finite entries may overflow: the norm is then that of the gradients
    divided by their largest entry.
    """
    norm = nn.utils.get_total_norm(gradients)
    if not gradients or (norm.device.type == "cpu" and bool(torch.isfinite(norm))):
        finite = torch.isfinite(norm)
        return norm, finite, finite
    largest = nn.utils.get_total_norm(gradients, math.inf)
    finite = torch.isfinite(largest)
    scale = torch.where(finite & (largest > 0), largest, torch.ones_like(largest))
    scaled = scale * nn.utils.get_total_norm([gradient / scale.to(gradient.device) for gradient in gradients])
    return torch.where(torch.isfinite(norm) | ~finite, norm, scaled), finite, torch.isfinite(largest.square())


def _laid_out_as(parameter: Tensor, tensor: Tensor) -> Tensor:
    """The tensor in the parameter's layout in memory; torch's fused optimizers take it for granted, unchecked."""
    if tensor.layout != torch.strided or tensor.shape != parameter.shape or tensor.stride() == parameter.stride():
        return tensor
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)


def _can_fuse(parameters: list[nn.Parameter]) -> bool:
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)


def _built(factory: Any, parameters: list[nn.Parameter]) -> Optimizer:
    if isinstance(factory, Optimizer) or not callable(factory):
        raise ArgumentError(
            "optimizer: expected a function from parameters to an optimizer, such as "
            f"lambda parameters: torch.optim.SGD(parameters, lr=0.1), but got {type(factory).__name__}. The learner "
            "works on a copy of the model, so an optimizer built beforehand holds other parameters."
        )
    made: Optimizer = factory(parameters)
    _check_optimizer(made, "what the function returned")
    return made


def _check_optimizer(made: Any, what: str) -> None:
    if not isinstance(made, Optimizer):
        raise ArgumentError(f"optimizer: {what} is {type(made).__name__}, expected a torch optimizer.")
    if isinstance(made, torch.optim.LBFGS):
        raise ArgumentError(
            "optimizer: LBFGS evaluates the loss several times a step, which one meta-gradient cannot give. "
            "Use a first-order optimizer such as Adam or SGD."
        )


def row_of_skipped(counts: Tensor, applied: Tensor) -> Tensor:
    """The counts after one more meta-step: (total, at present in a row, longest row), on the device.

    Args:
        counts: before it. applied: bool scalar, whether its update was made.
    """
    total, row, longest = counts.unbind()
    row = torch.where(applied, torch.zeros_like(row), row + 1)
    return torch.stack([total + ~applied, row, torch.maximum(longest, row)])


def has_diverged(learner: Any, counts: Tensor) -> bool:
    """Whether the last steps, this one included, were skipped, and they are at least `max_skipped_steps`.

    Looks at the counts once in as many meta-steps, so that a GPU waits no more often.
    """
    limit: int = learner.settings.outer_update.max_skipped_steps
    return bool((learner.iteration + 1) % limit == 0 and int(counts[1]) >= limit)


def raise_diverged(learner: Any, batch: TaskBatch) -> NoReturn:
    """Raises DivergedError; the count in a row begins anew, so that training can go on with other tasks."""
    learner.skipped_steps[1:] = 0
    limit = learner.settings.outer_update.max_skipped_steps
    raise DivergedError(
        f"At least {limit} meta-steps in a row had a meta-gradient that is not "
        f"finite, and changed nothing. The weights are finite.{trouble_in_words(learner, batch)} Lower meta_lr or "
        "inner_lr, or set outer_update.max_grad_norm."
    )


def keep_outcomes(learner: Any, outcomes: list[TaskOutcome], applied: Tensor) -> None:
    """Keeps the statistics and heads that the tasks left, if the meta-step was applied."""
    fold_moments(learner.model, outcomes, applied)
    head_start: Any = getattr(learner, "head_start", None)
    if head_start is not None and head_start.kind != "learned":
        head_start.keep(outcomes, applied)
    if (centre := getattr(learner, "centre", None)) is not None:
        centre.keep(outcomes, applied)
