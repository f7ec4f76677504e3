"""The meta-loss of a batch; evaluation and adaptation, which put a learner in eval mode for a while and change nothing.

evaluated: tasks -> each task solved under a batch-norm policy -> its metric -> mean with a 95 % interval
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metawrap.checks.task_batches import (
    check_device,
    check_labels,
    checked_batch,
    explained,
    refuse_not_finite,
    refuse_uncounted,
)
from metawrap.engines.calling import autograd
from metawrap.errors import ArgumentError, MetaWrapWarning, TaskError
from metawrap.evaluation_result import EvaluationResult
from metawrap.layers.norm_policies import BLENDS
from metawrap.layers.per_step_norm import PerStepNorm
from metawrap.learner.metrics import Metric, Metrics
from metawrap.results import MetaOutput, TaskOutcome, meta_output
from metawrap.settings.settings import check_choice, check_switch
from metawrap.settings.validated import WholeOrNone, check_value
from metawrap.snapshot.module_state import untouched_buffers
from metawrap.tasks import Task, TaskBatch, device_of, iterate_task_batches, usable

# Tasks that an evaluation solves before it lets other threads use the modules.
_IN_A_PART = 16


def evaluated(
    learner: Any,
    tasks: Any,
    *,
    norm: str | None,
    steps: int | None,
    mask: bool | None,
    metric: Metric | None,
    keep_predictions: bool,
) -> EvaluationResult:
    """See `Learner.evaluate`."""
    policy = policy_of(learner, norm)
    if mask is not None:
        check_choice("mask_unused_outputs", mask)
    check_steps(steps)
    metrics = None if metric is None else Metrics(metric, device_of(learner))
    check_switch("keep_predictions", keep_predictions)
    values: list[dict[str, Tensor]] = []
    losses: list[Tensor] = []
    predictions: list[Any] = []
    solve = partial(_solved, norm=policy, steps=steps, mask=mask)
    # A task may find in a buffer what the task before it has left there.
    whole = any(module._buffers for module in learner.model.modules() if not isinstance(module, PerStepNorm))
    with torch.no_grad(), _in_one_part(learner) if whole else nullcontext():
        for batch in iterate_task_batches(tasks):
            checked = list(checked_batch(batch, learner.loss_fn, device_of(learner)))
            for place, task in enumerate(checked, len(values)):
                refuse_uncounted(task, learner.loss_fn, f"tasks (task {place}): ")
            for task, (loss, accuracy, prediction) in zip(
                checked, _solved_in_parts(learner, checked, solve, whole), strict=True
            ):
                where = f"tasks (task {len(values)}): "
                losses.append(loss.detach().double().cpu())
                refuse_not_finite(task, losses[-1:], where)
                if metrics is not None:
                    values.append(metrics.of(prediction, task.target_y))
                else:
                    values.append({} if accuracy is None else {"accuracy": accuracy.double().cpu()})
                if keep_predictions:
                    predictions.append(prediction)
    if not values:
        raise TaskError("tasks: expected at least 1 task to evaluate on, but got none.")
    _warn_diverged(torch.stack(losses), policy)
    # Measured on each task, or it is no mean over tasks.
    names = [name for name in values[0] if all(name in each for each in values)]
    if some := {name for each in values if metrics for name in each} - {*names}:
        raise ArgumentError(
            f"metric: expected the same names from each task, but only some have {sorted(some)[:10]}. Return all "
            "names for every task, or evaluate these tasks apart."
        )
    found = {name: torch.stack([each[name] for each in values]) for name in names} or {"loss": torch.stack(losses)}
    details = {"norm": policy, "steps": learner.settings.default_steps if steps is None else steps}
    return EvaluationResult.of(found, torch.stack(losses), predictions=predictions, **details)


@contextmanager
def _in_one_part(learner: Any) -> Iterator[None]:
    with learner.calls.modules(learner) as used, in_eval_mode(used):
        yield


def _solved_in_parts(
    learner: Any, tasks: list[Task], solve: Callable[[Any, Task], TaskOutcome], whole: bool
) -> Iterator[tuple[Tensor, Tensor | None, Any]]:
    """Loss, accuracy and prediction of each task. Between parts, where metrics run, other threads may take turns."""
    for begin in range(0, len(tasks), _IN_A_PART):
        with learner.calls.modules(learner) as used, nullcontext() if whole else in_eval_mode(used):
            solved = used.executor.solved(used, tasks[begin : begin + _IN_A_PART], solve)
            part = [(outcome.loss, outcome.accuracy, outcome.prediction) for outcome in solved]
        yield from part


def meta_loss(learner: Any, batch: TaskBatch) -> tuple[MetaOutput, list[TaskOutcome]]:
    """The differentiable meta-loss of a batch in the learner's present mode, and the outcome of each task."""
    differentiable = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    with autograd(differentiable), explained(batch, learner.model):
        batch = TaskBatch(tuple(usable(task) for task in batch))
        learner._prepare(batch[0])
        solve_all = learner._solver().solve_all
        loss, outcomes = solve_all(batch.tasks, training=learner.training, norm=learner.settings.norm)
        return meta_output(outcomes, loss / len(batch)), outcomes


@contextmanager
def adapting(learner: Any, task: Task) -> Iterator[Task]:
    """Checks the task of an `adapt`, and yields it for use in eval mode without gradients.

    Raises:
        TaskError: its device, labels, shapes or dtypes are not what the learner takes.
    """
    check_device([task], device_of(learner))
    check_labels([task], learner.loss_fn)
    refuse_uncounted(task, learner.loss_fn)
    with in_eval_mode(learner), autograd(False), explained([task], learner.model):
        task = usable(task)
        learner._prepare(task)
        yield task


def finished(module: nn.Module, task: Task) -> nn.Module:
    """The module that `adapt` returns; raises TaskError where NaN of the support set got into it."""
    refuse_not_finite(task, module.state_dict().values())
    return module


@contextmanager
def in_eval_mode(learner: Any) -> Iterator[None]:
    """Eval mode for a while; every flag and buffer is put back."""
    flags = [(module, module.training) for module in learner.modules()]
    try:
        learner.eval()
        with untouched_buffers(learner.model):
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def check_steps(steps: int | None) -> None:
    """Raises ArgumentError unless `steps` is None or a whole number of at least 0."""
    check_value("steps", steps, WholeOrNone)


def policy_of(learner: Any, norm: str | None) -> str:
    """The batch-norm policy that a call asks for, the learner's own if None; it warns where training was under another.

    Raises:
        ArgumentError: no policy, or one that the learner lacks the learned numbers of.
    """
    own: str = learner.settings.norm
    policy = own if norm is None else norm
    check_choice("norm", policy)
    if policy != own and policy in BLENDS:
        raise ArgumentError(
            f'norm: "{policy}" blends by shares that are learned with it, but the learner was made with norm="{own}". '
            f'Make it with norm="{policy}", or use "batch", "support" or "running".'
        )
    if policy != own and any(isinstance(module, PerStepNorm) for module in learner.model.modules()):
        unmoved = ' It has stored no shifts of targets either, so this equals norm="support".'
        warnings.warn(
            f'norm="{policy}" for what was trained under norm="{own}": the weights have not been '
            "trained for these statistics, and accuracy is known to suffer."
            + (unmoved if policy == "running" and learner.inner_loop else ""),
            MetaWrapWarning,
            stacklevel=5,
        )
    return policy


def _solved(learner: Any, task: Task, norm: str, steps: int | None, mask: bool | None) -> TaskOutcome:
    with autograd(False), explained([task], learner.model):
        task = usable(task)
        learner._prepare(task)
        outcome: TaskOutcome = learner._solver().solve(task, training=False, norm=norm, steps=steps, mask=mask)
        return outcome


def _warn_diverged(losses: Tensor, policy: str) -> None:
    if diverged := int((~torch.isfinite(losses)).sum()):
        warnings.warn(
            f'{diverged} of {len(losses)} tasks ended with a loss that is not finite under norm="{policy}": the inner '
            "loop diverged. Evaluate under the policy of training, with fewer steps, or train longer.",
            MetaWrapWarning,
            stacklevel=5,
        )
