"""The face that every method has: meta_step, forward, evaluate, adapt, unwrap, describe.

meta_step: task batch -> each task through `_solve` -> gradient, summed in task order -> outer update.
A method says how one task is solved and what a finished module is; the rest is written here once.
"""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from metawrap.checks.not_finite import find_trouble, naming_operations, trouble_in_words
from metawrap.checks.task_batches import check_labels, explained, refuse_not_finite, refuse_uncounted
from metawrap.errors import ArgumentError, DivergedError, MetaWrapError, MetaWrapWarning, OutOfMemoryError, TaskError
from metawrap.execution.allocator import keep_memory
from metawrap.execution.out_of_memory import free_memory, is_out_of_memory, too_little_memory, warn_split
from metawrap.execution.ranks import Ranks
from metawrap.inner_loop.outcome import Solved, added, autograd, usable
from metawrap.layers.per_step_norm import PerStepNorm
from metawrap.layers.step_clock import Moments
from metawrap.learner.description import Description
from metawrap.learner.loading import wholly_or_not_at_all
from metawrap.outer_update.outer_update import OptimizerFactory, OuterUpdate, SchedulerFactory
from metawrap.results import EvaluationResult, MetaOutput, StepMetrics, Trouble
from metawrap.settings.settings import OuterSettings, check_choice, check_switch
from metawrap.snapshot.generators import Generators
from metawrap.snapshot.module_state import restored_buffers, untouched_buffers
from metawrap.surgery.copying import rebind_functions, spare_cached_results
from metawrap.tasks import (
    Inputs,
    Task,
    TaskBatch,
    as_task_batch,
    describe_value,
    iterate_task_batches,
    same_device,
)

LossFunction = Callable[[Any, Any], Tensor]
Chunk = tuple[Task, ...]
Result = TypeVar("Result")


class Method(nn.Module, ABC):
    """Base of all meta-learners; see the public face in the README.

    distributed: whether the processes of torch's default group share this learner's meta-steps; True unless it is set.
    """

    skipped_steps: Tensor
    distributed: bool = True
    outer_update: type[OuterUpdate] = OuterUpdate

    def __init__(
        self,
        model: nn.Module,
        settings: OuterSettings,
        loss_fn: LossFunction,
    ) -> None:
        super().__init__()
        if not callable(loss_fn):
            raise ArgumentError(
                f"loss_fn: expected a function loss_fn(prediction, y) to a scalar, but got {describe_value(loss_fn)}."
            )
        self.settings = settings
        # A loss that is a module moves and trains with the learner; the user's own must not.
        self.loss_fn = copy.deepcopy(loss_fn) if isinstance(loss_fn, nn.Module) else loss_fn
        self.model = model
        self.iteration = 0
        # Whether the other processes are known to have the same learner.
        self._same_everywhere = False
        # How many tasks at once were seen to fit into memory; None while nothing else was seen.
        self._fitting: int | None = None
        # Total, in a row, and the longest row: on the device, so that counting does not synchronise.
        self.register_buffer("skipped_steps", torch.zeros(3, dtype=torch.long))

    @abstractmethod
    def _solve(
        self,
        task: Task,
        *,
        training: bool,
        norm: str,
        steps: int | None = None,
        mask: bool | None = None,
        whole_graph: bool = True,
    ) -> Solved:
        """Adapts to one task's support set and judges on its target set.

        The loss is differentiable with respect to the learner's parameters wherever gradients are enabled. Without the
        whole graph it need not be with respect to anything else, so that parts of it can be freed at once.
        """

    def _solve_all(
        self, tasks: Sequence[Task], *, training: bool, norm: str, whole_graph: bool = True
    ) -> tuple[Tensor, list[Solved]]:
        """The sum of the tasks' losses, differentiable as in `_solve`, and the outcome of each."""
        solved = [self._solve(task, training=training, norm=norm, whole_graph=whole_graph) for task in tasks]
        return torch.stack([outcome.loss for outcome in solved]).sum(), [outcome.detached() for outcome in solved]

    def _tasks_at_once(self, tasks: int) -> int:
        """How many tasks of a batch are unrolled before a backward pass."""
        return self.settings.tasks_per_backward or 1

    @abstractmethod
    def _prepare(self, task: Task) -> None:
        """Looks at the first task; changes nothing that a later one would notice."""

    @abstractmethod
    def adapt(self, support_x: Inputs, support_y: Any, steps: int | None = None) -> nn.Module:
        """A plain module of the user's own class, fitted to one support set."""

    @abstractmethod
    def unwrap(self) -> nn.Module:
        """The meta-trained initialisation as a plain module of the user's own class."""

    @abstractmethod
    def describe(self) -> Description:
        """What wrapping found and did."""

    def meta_step(self, task_batch: Any) -> StepMetrics:
        """One outer update on a batch of tasks: forward, backward, clip, optimizer step, schedules, counters.

        Each `tasks_per_backward` tasks are unrolled and differentiated together, so that memory is theirs alone. Where
        they do not fit, half as many are, from then on, and a warning says so. The gradient stays in `.grad`. A failed
        call leaves the learner as it was.

        Where torch.distributed runs several processes, all of them must call it, each with its own share of the tasks,
        at least one; shares may differ. All make the same update, that of the mean over all tasks in order of rank, and
        get metrics of all tasks. What fails on one process fails on all.

        Args:
            task_batch: a `TaskBatch`, a tuple (support_x, support_y, target_x, target_y) with a leading task axis, or a
                list of `Task`.
        Raises:
            TaskError: the batch has the wrong form, shapes, labels or device.
            DivergedError: `max_skipped_steps` steps in a row were skipped; looked up once in as many steps. Or, with
                `detect_anomaly`, an operation's backward gave NaN.
            OutOfMemoryError: one task alone does not fit into memory.
            RankError: another process failed, is gone, or has another learner.
        """
        ranks = Ranks.of_meta_step(self)
        with ranks.together():
            if not self.training:
                raise MetaWrapError(
                    "meta_step needs training mode, but the learner is in eval(). Call learner.train()."
                )
            batch = self._checked(task_batch)
            with explained(batch, self.model):
                self._check_trainable(batch)
            self.outer.check_holds(self.named_parameters())
            if self.settings.allocator and self._device.type == "cpu":
                keep_memory(one_arena=self.settings.in_threads)
        with autograd():
            parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
            with restored_buffers(*self._stateful()) as restore:
                with ranks.together(), explained(batch, self.model):
                    meta_lr = self.outer.start(self.epoch)
                    with self._anomalies_named(batch):
                        solved, gradients = self._meta_gradient(batch, parameters)
                solved, gradients = ranks.shared(solved, parameters, gradients)
                norm, applied = self.outer.apply(parameters, gradients)
                restore(~applied)
            self._fold(solved, applied)
            output = self._output(solved, _mean_loss(solved))
            metrics = StepMetrics(
                output.loss, output.step_losses, output.accuracy, norm, applied, meta_lr, self.epoch, self.iteration
            )
            self.iteration += 1
            self.outer.end(self.iteration)
            self._count_skipped(applied, batch)
        return metrics

    def find_trouble(self, task_batch: Any) -> list[Trouble]:
        """The tasks of a batch whose loss or gradient is not finite, each with the inner step and layer where it shows.

        For a look behind a skipped step, which has left the weights as they were. It changes nothing, solves the tasks
        again, one by one, and waits for the device. A model that draws random numbers may do well the second time.
        """
        return find_trouble(self, self._checked(task_batch))

    @contextmanager
    def _anomalies_named(self, batch: TaskBatch) -> Iterator[None]:
        if not self.settings.detect_anomaly:
            yield
            return
        self._prepare(usable(batch[0]))  # Its looks may fail, which has a meaning there.
        with naming_operations(self, batch):
            yield

    def _meta_gradient(
        self, batch: TaskBatch, parameters: list[nn.Parameter]
    ) -> tuple[list[Solved], list[Tensor | None]]:
        batch = TaskBatch(tuple(usable(task) for task in batch))
        self._prepare(batch[0])
        size = min(self._tasks_at_once(len(batch)), self._fitting or len(batch))
        while True:
            # One task is not tried again. What is recorded draws nothing, and may not be asked.
            generators = Generators(None if getattr(self.settings, "cuda_graphs", False) else self._device)
            try:
                with restored_buffers(*self._stateful()) if size > 1 else nullcontext():
                    return self._summed_gradient(batch, parameters, size)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    raise OutOfMemoryError(too_little_memory(error, self.settings)) from error
            # Behind the handler, as the exception holds the graph that did not fit.
            free_memory(self._device)
            generators.put_back()
            size = (size + 1) // 2
            self._fitting = size
            warn_split(size)

    def _summed_gradient(
        self, batch: TaskBatch, parameters: list[nn.Parameter], size: int
    ) -> tuple[list[Solved], list[Tensor | None]]:
        total: list[Tensor | None] = [None] * len(parameters)
        solved: list[Solved] = []
        chunks = list(batch.chunks(size))

        def gradient(learner: Method, chunk: Chunk) -> tuple[list[Solved], tuple[Tensor | None, ...]]:
            return learner._chunk_gradient(chunk, parameters, len(batch))

        for outcomes, gradients in self._in_order(gradient, chunks):
            total = [added(old, new) for old, new in zip(total, gradients, strict=True)]
            solved += outcomes
        return solved, total

    def _in_order(self, work: Callable[[Any, Chunk], Result], chunks: Sequence[Chunk]) -> Iterator[Result]:
        """`work(learner, chunk)` for each chunk of tasks, in their order."""
        for chunk in chunks:
            yield work(self, chunk)

    def _chunk_gradient(
        self, chunk: Chunk, parameters: list[nn.Parameter], tasks: int
    ) -> tuple[list[Solved], tuple[Tensor | None, ...]]:
        loss, outcomes = self._solve_all(chunk, training=True, norm=self.settings.norm, whole_graph=False)
        gradients = torch.autograd.grad(loss / tasks, parameters, allow_unused=True)
        del loss
        return [outcome.packed() for outcome in outcomes], gradients

    def forward(self, task_batch: Any) -> MetaOutput:
        """The differentiable meta-loss of a batch, for those who own their loop: `learner(batch).loss.backward()`.

        In training mode it is the meta-loss of the current epoch, and running statistics are updated, as in any module;
        the epoch is yours to set: `learner.epoch = ...`, or the schedules stand still.
        In `eval()` mode it is the last step's loss under the evaluation policy, and nothing changes.

        Inside of `DistributedDataParallel`, in training mode, all processes must call it, each with its own share of
        the tasks, at least one; shares may differ. The gradients that DDP then averages are those of the mean over all
        tasks, zeros where a parameter plays no part; running statistics are folded for all tasks in order of rank.
        """
        ranks = Ranks.of_forward(self, when=self.training)
        with ranks.together():
            batch = self._checked(task_batch)
            if self.training:
                with explained(batch, self.model):
                    self._check_trainable(batch)
            differentiable = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            untouched = untouched_buffers(self.model, when=not self.training)
            with autograd(differentiable), untouched, explained(batch, self.model):
                batch = TaskBatch(tuple(usable(task) for task in batch))
                self._prepare(batch[0])
                loss, solved = self._solve_all(batch.tasks, training=self.training, norm=self.settings.norm)
                output = self._output(solved, loss / len(batch))
        if self.training:
            everyone, _ = ranks.shared(solved)
            self._fold(everyone, torch.ones((), dtype=torch.bool, device=self._device))
            if ranks.in_ddp:
                whole = self._output(everyone, _mean_loss(everyone))
                loss = ranks.averaged(output.loss, len(solved), whole.loss, len(everyone))
                output = output._replace(loss=loss, accuracy=whole.accuracy)
        return output

    def evaluate(
        self,
        tasks: Any,
        *,
        norm: str | None = None,
        steps: int | None = None,
        mask_unused_outputs: bool | None = None,
        metric: Callable[[Any, Any], Any] | None = None,
        keep_predictions: bool = False,
    ) -> EvaluationResult:
        """Adapts to each task and measures on its target set; changes nothing.

        What draws random numbers in evaluation (head_init="random", say) draws from torch's global generator: seed it
        to repeat a figure.

        Args:
            tasks: a task batch in any accepted form, or an iterable of them.
            norm: batch-norm policy; the learner's own if None.
            steps: inner steps; as in training if None, 0 for before adaptation, and more than in training is fine.
            mask_unused_outputs: as in the constructor, which decides if None: for tasks with fewer ways than the model
                has outputs.
            metric: `metric(prediction, target_y)` of one task; accuracy if None and labels are classes, else the loss.
            keep_predictions: whether the result holds each task's prediction.
        Returns:
            The mean over tasks with a 95 % confidence interval.
        Raises:
            TaskError: a task has the wrong form, shapes, labels or device, or holds NaN that reaches its loss.
        """
        policy = self._evaluation_policy(norm, steps, mask_unused_outputs)
        if metric is not None and not callable(metric):
            raise ArgumentError(
                f"metric: expected a function metric(prediction, target_y) to a number, or None, but got "
                f"{describe_value(metric)}."
            )
        check_switch("keep_predictions", keep_predictions)
        name = "loss"
        values: list[Tensor] = []
        losses: list[Tensor] = []
        predictions: list[Any] = []
        with self._evaluating(), torch.no_grad():
            for batch in iterate_task_batches(tasks):
                for task in self._checked(batch):
                    refuse_uncounted(task, self.loss_fn, f"tasks (task {len(values)}): ")
                    with explained([task], self.model):
                        solved = self._solved_for_evaluation(task, policy, steps, mask_unused_outputs)
                    losses.append(solved.loss.detach().double().cpu())
                    refuse_not_finite(task, losses[-1:], f"tasks (task {len(values)}): ")
                    name, value = _measured(solved, task, metric)
                    values.append(torch.as_tensor(value, dtype=torch.float64).detach().cpu().reshape(()))
                    if keep_predictions:
                        predictions.append(solved.prediction)
        if not values:
            raise TaskError("tasks: expected at least 1 task to evaluate on, but got none.")
        _warn_diverged(torch.stack(losses), policy)
        details = {"norm": policy, "steps": self.settings.default_steps if steps is None else steps}
        return EvaluationResult.of(name, torch.stack(values), torch.stack(losses), predictions=predictions, **details)

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of the learner's own parameters, with the usual state_dict; assign your own to replace it."""
        return self.outer.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: Optimizer) -> None:
        self.outer.take_over(optimizer, self.parameters())

    @property
    def scheduler(self) -> LRScheduler | None:
        """The user's scheduler, or None: the built-in cosine has no state but `epoch`."""
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
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ArgumentError(f"epoch: expected a whole number of at least 0, but got {value!r}.")
        self.iteration = value * self.settings.iterations_per_epoch
        self.outer.start(self.epoch)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Method:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.optimizer.state:
            # Loading puts each state tensor where its parameter is now, in its dtype; torch leaves them behind.
            self.optimizer.load_state_dict(self.optimizer.state_dict())
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Method:
        spare_cached_results(self, memo)
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))  # type: ignore[no-untyped-call]
        rebind_functions(copied, memo)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_same_everywhere": False}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch, but a state that does not fit changes nothing.

        Raises:
            ArgumentError: it is no mapping.
            CheckpointError: it is that of another model or method, or damaged; a RuntimeError, as torch's is.
        """
        with wholly_or_not_at_all(self, self.optimizer, state_dict):
            return super().load_state_dict(state_dict, strict, assign)

    def get_extra_state(self) -> dict[str, Any]:
        """The counters, for state_dict."""
        return {"iteration": self.iteration}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restores the counters."""
        self.iteration = int(state["iteration"])
        self._same_everywhere = False

    def _stateful(self) -> list[nn.Module]:
        return [self.model, self.loss_fn] if isinstance(self.loss_fn, nn.Module) else [self.model]

    def _make_outer(self, optimizer: OptimizerFactory | None, scheduler: SchedulerFactory | None) -> None:
        self.outer = self.outer_update(list(self.parameters()), self.settings, optimizer, scheduler)

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def _checked(self, task_batch: Any) -> TaskBatch:
        batch = as_task_batch(task_batch)
        same_device(batch, self._device)
        check_labels(batch, self.loss_fn)
        return batch

    @contextmanager
    def _adapting(self, task: Task) -> Iterator[Task]:
        """Checks the task of an `adapt`, and yields it for use in eval() mode without gradients.

        Raises:
            TaskError: its device, labels, shapes or dtypes are not what the learner takes.
        """
        same_device([task], self._device)
        check_labels([task], self.loss_fn)
        refuse_uncounted(task, self.loss_fn)
        with self._evaluating(), autograd(False), explained([task], self.model):
            task = usable(task)
            self._prepare(task)
            yield task

    def _finished(self, module: nn.Module, task: Task) -> nn.Module:
        """The module that `adapt` returns; raises TaskError where NaN in the support set got into it."""
        refuse_not_finite(task, module.state_dict().values())
        return module

    def _check_trainable(self, batch: TaskBatch) -> None:
        """Raises TaskError when a task lacks what training needs of it."""

    def _loss(self, prediction: Any, y: Any, part: str) -> Tensor:
        try:
            loss = self.loss_fn(prediction, y)
        except IndexError as error:
            if self.loss_fn is F.cross_entropy and isinstance(y, Tensor) and isinstance(prediction, Tensor):
                ways = prediction.shape[1]
                raise TaskError(
                    f"{part}_y holds labels {int(y.min())}..{int(y.max())}, but the model has {ways} outputs. "
                    f"Relabel the episode to 0..{ways - 1}, or give the model more outputs."
                ) from error
            raise
        if not isinstance(loss, Tensor) or loss.ndim:
            raise ArgumentError(f"loss_fn: expected a scalar tensor from it, but got {describe_value(loss)}.")
        return loss

    def _output(self, solved: Sequence[Solved], loss: Tensor) -> MetaOutput:
        accuracies = [outcome.accuracy for outcome in solved if outcome.accuracy is not None]
        return MetaOutput(
            loss=loss,
            step_losses=torch.stack([outcome.step_losses for outcome in solved]),
            predictions=[outcome.prediction for outcome in solved],
            accuracy=torch.stack(accuracies).mean() if accuracies else None,
        )

    def _fold(self, solved: Sequence[Solved], applied: Tensor) -> None:
        passes: dict[str, list[Moments]] = {}
        for outcome in solved:
            for moments in outcome.moments:
                passes.setdefault(moments.norm, []).append(moments)
        norms = {m.per_step.name: m for m in self.model.modules() if isinstance(m, PerStepNorm)}
        for name, seen in passes.items():
            norms[name].fold(seen, applied)

    def _count_skipped(self, applied: Tensor, batch: TaskBatch) -> None:
        total, row, longest = self.skipped_steps.unbind()
        row = torch.where(applied, torch.zeros_like(row), row + 1)
        self.skipped_steps.copy_(torch.stack([total + ~applied, row, torch.maximum(longest, row)]))
        limit = self.settings.max_skipped_steps
        if self.iteration % limit == 0 and int(self.skipped_steps[2]) >= limit:
            self.skipped_steps[1:] = 0
            raise DivergedError(
                f"At least {limit} meta-steps in a row had a meta-gradient that is not finite, and changed nothing. "
                f"The weights are finite.{trouble_in_words(self, batch)} Lower meta_lr or inner_lr, or set "
                "max_grad_norm."
            )

    def _evaluation_policy(self, norm: str | None, steps: int | None, mask: bool | None) -> str:
        policy = self.settings.norm if norm is None else norm
        check_choice("norm", policy)
        if mask is not None:
            check_choice("mask_unused_outputs", mask)
        if steps is not None:
            self._checked_steps(steps)
        if policy != self.settings.norm and any(isinstance(m, PerStepNorm) for m in self.model.modules()):
            warnings.warn(
                f'Evaluating under norm="{policy}" what was trained under norm="{self.settings.norm}": the '
                "weights have not been trained for these statistics, and accuracy is known to suffer.",
                MetaWrapWarning,
                stacklevel=3,
            )
        return policy

    def _checked_steps(self, steps: int) -> int:
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
            raise ArgumentError(f"steps: expected a whole number of at least 0, or None, but got {steps!r}.")
        return steps

    def _solved_for_evaluation(self, task: Task, norm: str, steps: int | None, mask: bool | None) -> Solved:
        with autograd(False):
            task = usable(task)
            self._prepare(task)
            return self._solve(task, training=False, norm=norm, steps=steps, mask=mask)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """eval() mode for a while: every flag and buffer is put back."""
        flags = [(module, module.training) for module in self.modules()]
        try:
            self.eval()
            with untouched_buffers(self.model):
                yield
        finally:
            for module, flag in flags:
                module.training = flag


def _warn_diverged(losses: Tensor, policy: str) -> None:
    if diverged := int((~torch.isfinite(losses)).sum()):
        warnings.warn(
            f'{diverged} of {len(losses)} tasks ended with a loss that is not finite under norm="{policy}": the inner '
            "loop diverged. Rates that were learned under batch statistics are known to do so under stored ones; "
            'norm="support" is inductive too, and the same in training and evaluation.',
            MetaWrapWarning,
            stacklevel=3,
        )


def _mean_loss(solved: Sequence[Solved]) -> Tensor:
    return torch.stack([outcome.loss for outcome in solved]).sum() / len(solved)


def _measured(solved: Solved, task: Task, metric: Callable[[Any, Any], Any] | None) -> tuple[str, Any]:
    if metric is not None:
        value = metric(solved.prediction, task.target_y)
        name = getattr(metric, "__name__", type(metric).__name__)
        if not isinstance(value, int | float) and not (isinstance(value, Tensor) and value.numel() == 1):
            raise ArgumentError(f"metric: expected one number per task from {name}, but got {describe_value(value)}.")
        return name, value
    if solved.accuracy is not None:
        return "accuracy", solved.accuracy
    return "loss", solved.loss.detach()
