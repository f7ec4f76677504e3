"""The base class of all methods: meta_step, forward, evaluate, adapt, unwrap, describe.

meta_step: task batch -> checks -> executor (each task through `_solver`, gradients summed in task order) -> ranks
           -> outer update -> statistics and counters.

A learner has an executor (how tasks are run), an outer update (how a meta-gradient moves the parameters), checks, and
the calls that run at present. A method says how one task is solved and what a finished module is.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from metawrap.checks.first_look import FirstLook
from metawrap.checks.not_finite import find_trouble, naming_operations
from metawrap.checks.task_batches import checked_batch, explained, without_graphs
from metawrap.engines.calling import autograd
from metawrap.errors import ArgumentError, MetaWrapError
from metawrap.evaluation_result import EvaluationResult
from metawrap.execution.allocator import keep_memory
from metawrap.execution.calls import Calls, alone, at_rest, shared, sharing
from metawrap.execution.executor import Executor, OneProcess, stateful_modules
from metawrap.execution.ranks import Ranks
from metawrap.learner.describing import describe_learner
from metawrap.learner.description import Description
from metawrap.learner.evaluation import evaluated, meta_loss
from metawrap.learner.loading import put_back_on_error, wholly_or_not_at_all
from metawrap.learner.metrics import Metric
from metawrap.learner.task_classes import Classes
from metawrap.learner.without_inner_loop import shown_settings
from metawrap.outer_update import users_scheduler
from metawrap.outer_update.outer_update import OuterUpdate, has_diverged, keep_outcomes, raise_diverged, row_of_skipped
from metawrap.results import MetaOutput, OneByOne, StepMetrics, Trouble, mean_loss, meta_output
from metawrap.settings.settings import OuterSettings
from metawrap.settings.validated import Whole, check_value
from metawrap.snapshot.module_state import restored_buffers, signals_deferred, untouched_buffers
from metawrap.surgery.copying import rebind_functions, spare_cached_results
from metawrap.surgery.swap import plain_copy
from metawrap.surgery.wrap import Wrapped
from metawrap.tasks import Inputs, Task, TaskBatch, describe_value, device_of


class Learner(nn.Module, ABC):
    """Base of all methods; docs/index.md lists the public calls.

    model: the wrapped copy of the user's module. head: name of the module whose output is the prediction; None before
    the first task. distributed: whether the processes of torch's default group share this learner's meta-steps.
    findings: what the first task of each mode showed. own: the method's own keywords, as `checked` sets them. options:
    the same as `describe` shows them.
    """

    own: dict[str, Any]
    skipped_steps: Tensor
    distributed: bool = True
    head: str | None = None
    outer_update: type[OuterUpdate] = OuterUpdate
    # Whether the network itself adapts in an inner loop.
    inner_loop: bool = False

    def __init__(
        self,
        wrapped: Wrapped,
        settings: OuterSettings,
        keywords: Mapping[str, Any],
        *,
        executor: Executor,
        parts: Mapping[str, Any],
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Args: keywords: `loss_fn`, `optimizer` and `scheduler` are read. parts: learned besides the module."""
        super().__init__()
        loss_fn = keywords.get("loss_fn", F.cross_entropy)
        if not callable(loss_fn):
            raise ArgumentError(
                f"loss_fn: expected a function loss_fn(prediction, y) to a scalar, but got {describe_value(loss_fn)}."
            )
        self.settings, self.executor, self.options = settings, executor, dict(options or {})
        self.calls, self.findings = Calls(), dict[bool, FirstLook]()
        # A loss that is a module moves and trains with the learner; the user's own must not.
        self.loss_fn = copy.deepcopy(loss_fn) if isinstance(loss_fn, nn.Module) else loss_fn
        self.wrapped, self.model = wrapped, wrapped.model
        # Outside of an inner loop, too, the norms follow the policy.
        wrapped.clock.statistics = "batch" if settings.norm == "batch" else None
        self.iteration = 0
        for name, part in parts.items():
            setattr(self, name, part)
        if not list(self.parameters()):
            raise ArgumentError(f"model: {type(self.model).__name__} has no parameters, so there is nothing to learn.")
        # Skipped meta-steps: total, at present in a row, longest row; on the device, so that counting does not wait.
        self.register_buffer("skipped_steps", torch.zeros(3, dtype=torch.long, device=device_of(self)))
        self.outer = self.outer_update(
            list(self.parameters()), settings, keywords.get("optimizer"), keywords.get("scheduler")
        )

    def _solver(self) -> Any:
        """Solves tasks with the present state; by default one by one, through the method's `_solve`."""
        solve: Any = self._solve
        return OneByOne(solve)

    @abstractmethod
    def _prepare(self, task: Task) -> None:
        """Inspects the first task of a mode; changes nothing that a later task would notice."""

    def _check_trainable(self, batch: TaskBatch) -> None:
        """Raises TaskError when a task lacks something that training needs."""

    @abstractmethod
    def adapt(
        self,
        support_x: Inputs,
        support_y: Any,
        steps: int | None = None,
        *,
        classes: Classes | None = None,
        norm: str | None = None,
    ) -> nn.Module:
        """A plain module of the user's own class, fitted to a support set; classes: see `TaskClasses`."""

    @shared
    def unwrap(self) -> nn.Module:
        """The meta-trained network as a plain module of the user's own class."""
        return plain_copy(self.model, {}, 0, None, keep_statistics=self.settings.norm != "batch")

    def describe(self) -> Description:
        """What wrapping found and did."""
        return describe_learner(self, settings=shown_settings(self))

    @alone
    def meta_step(self, task_batch: Any) -> StepMetrics:
        """One outer update on a batch of tasks: forward, backward, clip, optimizer step, schedules, counters.

        Peak memory is that of one chunk of `execution.tasks_per_backward` tasks. When memory runs out, the chunk is
        halved for this and all later steps, with a warning. The gradient stays in `.grad`. A failed call leaves
        weights, statistics, optimizer and iteration as they were.

        Where torch.distributed runs several processes, all of them must call it, each with its own share of the tasks,
        at least one; shares may differ. All make the same update, that of the mean over all tasks in order of rank, and
        get metrics of all tasks. What fails on one process fails on all.

        Args:
            task_batch: a `TaskBatch`, a tuple (support_x, support_y, target_x, target_y) with a leading task axis, or a
                list of `Task`. Graphs that lead to its tensors are not followed, with a warning: `forward` does.
        Raises:
            TaskError: the batch has the wrong form, shapes, labels or device.
            DivergedError: at least `outer_update.max_skipped_steps` steps in a row, this one included, were skipped;
                looked up once in as many steps. Or, with `outer_update.detect_anomaly`, a backward gave NaN.
            OutOfMemoryError: one task alone does not fit into memory.
            RankError: another process failed, is gone, or has another learner.
        """
        ranks = Ranks.of_meta_step(self) if _distributed() else OneProcess()
        with ranks.together():
            if not self.training:
                raise MetaWrapError(
                    "meta_step needs training mode, but the learner is in eval(). Call learner.train()."
                )
            batch = without_graphs(checked_batch(task_batch, self.loss_fn, device_of(self)), self)
            with explained(batch, self.model):
                self._check_trainable(batch)
            parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
            self.outer.check_holds(self.named_parameters())
            if self.settings.execution.allocator and not self.executor.keeps_memory and device_of(self).type == "cpu":
                keep_memory(one_arena=self.settings.execution.in_threads)
                self.executor.keeps_memory = True
        with signals_deferred() as defer, autograd(), restored_buffers(*stateful_modules(self)) as restore:
            with ranks.together(), explained(batch, self.model):
                meta_lr = self.outer.start(self.epoch)
                anomalies = self.settings.outer_update.detect_anomaly
                with naming_operations(self, batch) if anomalies else nullcontext():
                    outcomes, gradients = self.executor.meta_gradient(self, batch, parameters)
            outcomes, gradients = ranks.shared(outcomes, parameters, gradients)
            ends = self.outer.ends_epoch(self.iteration + 1)
            defer()  # An interrupt would leave the optimizer a step ahead of the counters.
            with put_back_on_error(self, self.optimizer, self.scheduler) if ends else nullcontext():
                norm, applied = self.outer.apply(parameters, gradients)
                skipped = row_of_skipped(self.skipped_steps, applied)
                place = self.epoch, self.iteration
                if not (diverged := has_diverged(self, skipped)):
                    self.iteration += 1
                    self.outer.end(self.iteration)
            if diverged:
                raise_diverged(self, batch)
            restore(~applied)
            keep_outcomes(self, outcomes, applied)
            self.skipped_steps.copy_(skipped)
        output = meta_output(outcomes, mean_loss(outcomes))
        return StepMetrics(output.loss, output.step_losses, output.accuracy, norm, applied, meta_lr, *place)

    def forward(self, task_batch: Any) -> MetaOutput:
        """The differentiable meta-loss of a batch, for those who own their loop: `learner(batch).loss.backward()`.

        In training mode it is the meta-loss of the current epoch, and running statistics are updated, as in any module;
        the epoch is yours to set: `learner.epoch = ...`, or the schedules stand still.
        In `eval()` mode it is the last step's loss under the evaluation policy, and nothing changes.

        Inside of `DistributedDataParallel`, in training mode, all processes must call it, each with its own share of
        the tasks, at least one; shares may differ. The gradients that DDP then averages are those of the mean over all
        tasks, zeros where a parameter plays no part; running statistics are folded for all tasks in order of rank.
        """
        if not _in_training(self):
            with self.calls.shared(), self.calls.modules(self) as learner, untouched_buffers(learner.model):
                return meta_loss(learner, checked_batch(task_batch, self.loss_fn, device_of(self)))[0]
        ranks = Ranks.of_forward(self) if _distributed() else OneProcess()
        with self.calls.alone():
            with ranks.together():
                batch = checked_batch(task_batch, self.loss_fn, device_of(self))
                with explained(batch, self.model):
                    self._check_trainable(batch)
                output, outcomes = meta_loss(self, batch)
            everyone, _ = ranks.shared(outcomes)
            keep_outcomes(self, everyone, torch.ones((), dtype=torch.bool, device=device_of(self)))
        return ranks.averaged(output, len(outcomes), everyone)

    @sharing
    def evaluate(
        self,
        tasks: Any,
        *,
        norm: str | None = None,
        steps: int | None = None,
        mask_unused_outputs: bool | None = None,
        metric: Metric | None = None,
        keep_predictions: bool = False,
    ) -> EvaluationResult:
        """Adapts to each task and measures on its target set: the mean over tasks, with its interval; changes nothing.

        Random numbers (head_init="random") come from torch's global generator: seed it to repeat a figure.

        Args:
            tasks: a task batch in any form, or an iterable of batches that ends, and waits for no other call of the
                learner.
            norm: batch-norm policy; the learner's own if None.
            steps: inner steps; as in training if None, 0 for before adaptation; more than in training is fine.
            mask_unused_outputs: as in the constructor, which decides if None.
            metric: `metric(prediction, target_y)` of one task to a number, an object with update, compute and reset (as
                torchmetrics has), or a dict of these by name. If None, as `StepMetrics.accuracy`, or else the loss.
            keep_predictions: whether the result holds each task's prediction.
        Raises:
            TaskError: a task has the wrong form, shapes, labels or device, or holds NaN that reaches its loss.
        """
        how: dict[str, Any] = {"norm": norm, "steps": steps, "mask": mask_unused_outputs, "metric": metric}
        return evaluated(self, tasks, keep_predictions=keep_predictions, **how)

    @shared
    def find_trouble(self, task_batch: Any) -> list[Trouble]:
        """The tasks of a batch whose loss or gradient is not finite, each with the inner step and layer where it shows.

        Explains a skipped step. It solves the tasks again, one by one, and changes nothing. A model that draws random
        numbers may succeed the second time.
        """
        return find_trouble(self, checked_batch(task_batch, self.loss_fn, device_of(self)))

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of the learner's own parameters, with the usual state_dict; assign your own to replace it."""
        return self.outer.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: Optimizer) -> None:
        self.outer.take_over(optimizer, self.parameters())
        self.executor.same_everywhere = False

    @property
    def scheduler(self) -> LRScheduler | None:
        """The user's scheduler, or None: the built-in schedule has no state but `epoch`."""
        return self.outer.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: LRScheduler) -> None:
        self.outer.take_over_schedule(scheduler)

    @property
    def epoch(self) -> int:
        """Completed epochs of `iterations_per_epoch` meta-steps; set it to move all schedules but your own."""
        return self.iteration // self.settings.iterations_per_epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        check_value("epoch", value, Whole)
        self.iteration = value * self.settings.iterations_per_epoch
        self.outer.start(self.epoch)

    @at_rest
    def train(self, mode: bool = True) -> Learner:
        """As in torch; norms named by `wrapping.keep_norm` stay on their stored statistics."""
        super().train(mode)
        self.wrapped.hold_kept_norms()
        return self

    @alone
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Learner:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.optimizer.state:
            # Loading puts each state tensor where its parameter is now, in its dtype; torch leaves them behind.
            self.optimizer.load_state_dict(self.optimizer.state_dict())
        return self

    # Fast weights that a call of another thread lends to the modules are not the learner's.
    state_dict = at_rest(nn.Module.state_dict)
    named_parameters = at_rest(nn.Module.named_parameters)
    named_buffers = at_rest(nn.Module.named_buffers)

    @at_rest
    def __deepcopy__(self, memo: dict[int, Any]) -> Learner:
        spare_cached_results(self, memo)
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))  # type: ignore[no-untyped-call]
        rebind_functions(copied, memo)
        return copied

    @alone
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch, but a state that does not fit changes nothing.

        Raises:
            ArgumentError: it is no mapping.
            CheckpointError: it is that of another model or method, or damaged; a RuntimeError, as torch's is.
        """
        with wholly_or_not_at_all(self, self.optimizer, self.scheduler, state_dict):
            return super().load_state_dict(state_dict, strict, assign)

    def get_extra_state(self) -> dict[str, Any]:
        """The counters, the state of the user's scheduler, and what the executor measured, for state_dict."""
        return {"iteration": self.iteration} | users_scheduler.state_of(self.scheduler) | self.executor.state()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restores counters and scheduler; what was measured, too, where this learner would measure."""
        self.iteration = int(state["iteration"])
        users_scheduler.put_back(self.scheduler, state.get("scheduler"), begun=self.iteration > 0)
        self.executor.load_state(state)


def _distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


@at_rest
def _in_training(learner: Learner) -> bool:
    return learner.training
