"""Joint training: the examples of all tasks -> one supervised loss; then gradient steps on a new task's support set.

`FineTune` and `MultiTask` share it. A method says through which outputs a task is trained: see `TrainingOutputs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from metawrap.engines.calling import autograd, dense
from metawrap.errors import ArgumentError, TaskError
from metawrap.execution.ranks import several
from metawrap.heads.class_table import ClassTable
from metawrap.layers.norm_policies import BLENDS
from metawrap.layers.step_clock import Moments
from metawrap.learner.head_learner import HeadLearner, plain_module, refuse_late_parts, refuse_mask, under_prefix
from metawrap.results import TaskOutcome, ignored_label, outcome_of, task_loss
from metawrap.settings.settings import InnerOptimizerName
from metawrap.surgery.swap import plain_copy
from metawrap.tasks import Task, TaskBatch, call_model, describe_value, usable

Tune = Literal["full", "head"]
_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}


class TrainingOutputs(NamedTuple):
    """Outputs for the support and target examples of a task, one after the other.

    logits, labels: enter the loss. own_logits: are compared with the task's own labels, for the accuracy.
    """

    logits: Tensor
    labels: Tensor
    own_logits: Tensor


@dataclass
class JointTraining:
    """Supervised training on the examples of all tasks; gradient steps then fit each new task.

    tune: whether these steps move the "head" or the "full" network, by torch's SGD or Adam at the rate inner_lr, each
    on the whole support set. table: the classifier over all classes. by_classes: whether a task is trained through the
    table. outputs: `outputs(task, norm, moments, labels)`, where labels are the task's own, (examples, ...), support
    before target.
    """

    tune: Tune
    inner_lr: float
    inner_optimizer: InnerOptimizerName
    table: ClassTable
    by_classes: Callable[[Task], bool]
    outputs: Callable[[Task, str, list[Moments], Tensor], TrainingOutputs]

    def solve(
        self,
        learner: HeadLearner,
        task: Task,
        *,
        training: bool,
        norm: str,
        steps: int | None = None,
        mask: bool | None = None,
        **_: Any,
    ) -> TaskOutcome:
        """In training the supervised loss of a task's examples; else the target loss of the module fitted to it."""
        refuse_mask(learner, mask)
        moments: list[Moments] = []
        if training:
            found = self.outputs(task, norm, moments, torch.cat([task.support_y, task.target_y]))
            loss = learner.own_head.loss(learner.loss_fn, found.logits, found.labels, "support and target")
            prediction = learner.own_head.in_form(found.own_logits[len(task.support_y) :])
        else:
            module = learner._module(task, norm, learner.settings.inner_steps if steps is None else steps)
            # A graph would lead to the weights of this module only, and backward would do nothing without an error.
            with autograd(False):
                prediction, loss = self._judged(learner, module, task)
        known = self.by_classes(task)
        return outcome_of(task, loss, prediction, loss_fn=learner.loss_fn, moments=moments, known=known)

    def _judged(self, learner: HeadLearner, module: nn.Module, task: Task) -> tuple[Any, Tensor]:
        """The prediction of a fitted module for the targets, and its loss; those of a head that was fitted alone."""
        if self.tune == "full":
            prediction = call_model(module, task.target_x)
            return prediction, task_loss(learner.loss_fn, prediction, task.target_y, "target")
        made: list[Any] = []
        with module.get_submodule(str(learner.head)).register_forward_hook(lambda _, args, output: made.append(output)):
            call_model(module, task.target_x)
        loss = learner.own_head.loss(learner.loss_fn, made[-1], task.target_y, "target")
        return learner.own_head.in_form(made[-1]), loss

    def module(self, learner: HeadLearner, task: Task, norm: str, steps: int, start: Mapping[str, Tensor]) -> nn.Module:
        """A plain module fitted to a task from the values in `start`, by name in the network, and else from its own."""
        module = plain_copy(learner.model, start, 0, None, keep_statistics=norm == "running").eval()
        part, inputs, loss_of = module, task.support_x, partial(task_loss, learner.loss_fn)
        if self.tune == "head":
            part, loss_of = module.get_submodule(str(learner.head)), partial(learner.own_head.loss, learner.loss_fn)
            inputs = learner.own_head.of(task.support_x, "running" if norm == "running" else "batch").detach()
        learned = [parameter for parameter in part.parameters() if parameter.requires_grad]
        optimizer = _OPTIMIZERS[self.inner_optimizer](learned, lr=self.inner_lr)  # type: ignore[call-arg]
        with autograd(True):
            for _ in range(steps):
                loss = loss_of(call_model(part, inputs), task.support_y, "support")
                gradients = torch.autograd.grad(loss, learned, allow_unused=True)
                for parameter, gradient in zip(learned, gradients, strict=True):
                    parameter.grad = None if gradient is None else dense(gradient)
                optimizer.step()
        for parameter in learned:
            parameter.grad = None
        if norm != "support":
            return module
        # Until here the norms used the support set's own statistics; the finished module holds them.
        return plain_module(learner, dict(module.named_parameters()), task.support_x, norm)

    @staticmethod
    def refuse_blend(method: str, norm: object) -> None:
        """Raises ArgumentError under TaskNorm, whose blend a module that is fitted to a task cannot learn."""
        if isinstance(norm, str) and norm in BLENDS:
            raise ArgumentError(
                f'norm: {method} fits plain networks, whose norms have no learned blend, but got "{norm}". Use '
                '"support" or "running", or another method.'
            )

    def check(self, learner: HeadLearner, batch: TaskBatch) -> None:
        """Raises TaskError or ArgumentError when a task cannot be trained on."""
        for task in batch:
            if not all(isinstance(y, Tensor) for y in (task.support_y, task.target_y)):
                raise TaskError(
                    f"support_y: {type(learner).__name__} needs tensors as labels, but got "
                    f"{describe_value(task.support_y)}."
                )
            if self.by_classes(task):
                if self.table.limit is None and several() and learner.distributed:
                    raise ArgumentError(
                        "classes: expected how many classes tasks are drawn from, for several processes, whose tables "
                        "would else grow apart, but got None. Pass classes=, such as sampler.num_classes."
                    )
                self.table.check_task(task, ignored_label(learner.loss_fn))

    def prepare(self, learner: HeadLearner, batch: TaskBatch) -> None:
        """Shows the learner its first task, and makes the table large enough for a batch."""
        by_classes = [task for task in batch if self.by_classes(task)]
        made = not self.table.classes
        if by_classes and made:
            learner.findings.pop(learner.model.training, None)  # An earlier look has made no table.
        with autograd():
            learner._prepare(usable((by_classes or batch)[0]))
        needed = max((max(task.classes or ()) + 1 for task in by_classes), default=0)
        if needed > self.table.classes:
            if learner._in_training_forward and not made:
                raise ArgumentError(
                    f"classes: expected how many classes tasks are drawn from, at least {needed}, but got None: an "
                    "optimizer of your own would not follow a table that grows. Pass classes=, such as "
                    "sampler.num_classes, or use meta_step."
                )
            for parameter, more in self.table.further_rows(needed):
                learner.outer.lengthen(parameter, more)

    def make_table(self, learner: HeadLearner, task: Task | None) -> None:
        """Makes the table for the classes of a first task, or for all of `classes=`."""
        # An evaluated task may be of other classes than training: its numbers must not size the table.
        sized = learner.training or self.table.limit is not None
        if sized and task is not None and not self.table.classes and task.classes and self.by_classes(task):
            refuse_late_parts(learner)
            with learner.own_head.found(task.support_x):
                learner.own_head.check_parameters()
                width = learner.own_head.of(task.support_x, "batch").flatten(1).shape[1]
            rows = max(task.classes) + 1 if self.table.limit is None else self.table.limit
            learner._learn(*self.table.make(rows, width, like_weights(learner.model)))

    def match_table(self, learner: HeadLearner, stored: Mapping[str, Any]) -> None:
        """Gives the table the size that it has in a state_dict of the learner."""
        learner._learn(*self.table.match(under_prefix("table.", stored), like_weights(learner.model)))


def like_weights(model: nn.Module) -> Tensor:
    """A floating-point parameter of the network, whose device and precision new parameters take."""
    return next(p for p in model.parameters() if p.is_floating_point())
