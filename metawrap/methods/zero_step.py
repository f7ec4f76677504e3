"""The control: a network trained on the target sets of all tasks, without their support sets."""

from __future__ import annotations

from typing import Any

from torch import nn
from typing_extensions import Unpack

from metawrap.checks.first_look import FirstLook, without_part
from metawrap.execution.calls import shared
from metawrap.execution.executor import Executor
from metawrap.layers.norm_policies import passes_of
from metawrap.layers.step_clock import Moments
from metawrap.learner.evaluation import adapting, finished, policy_of
from metawrap.learner.keywords import OuterKeywords
from metawrap.learner.learner import Learner
from metawrap.learner.task_classes import Classes, TaskClasses
from metawrap.learner.without_inner_loop import inspect_once, refuse_inner_loop, wrapped_as_it_is
from metawrap.results import TaskOutcome, outcome_of, task_loss
from metawrap.surgery.swap import plain_copy
from metawrap.tasks import Inputs, Task


class ZeroStep(Learner):
    """No adaptation at all: the same network and loss, trained on target sets as in any supervised training.

    Minimises the mean over tasks of L(f(target), target_y), as MAML with no inner step; there is no paper. Where labels
    are shuffled from task to task, as in few-shot episodes, the accuracy is chance by construction; any method above
    chance has used the support set. Where labels mean the same in every task, it is a baseline in its own right.

    Args:
        model: any `torch.nn.Module`; it is copied, never changed.
        keywords: see `OuterKeywords`. norm="support" takes statistics from the support set's inputs, never its labels.
    Raises:
        ArgumentError: an argument has the wrong type, range or combination.
        UnsupportedModuleError: the model has something that cannot be carried.

    >>> import torch
    >>> learner = ZeroStep(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    >>> adapted = learner.adapt(torch.randn(6, 4), torch.arange(6) % 3)

    Source: the lecture's question whether a task can be solved without its support set; Yin et al. 2020,
    arXiv:1912.03820, call this failure of meta-learning memorization.
    """

    def __init__(self, model: nn.Module, **keywords: Unpack[OuterKeywords]) -> None:
        wrapped, settings = wrapped_as_it_is(type(self), model, keywords, defaults={}, head=None, own_steps=None)
        super().__init__(wrapped, settings, keywords, executor=Executor(settings.execution), parts={})

    def _prepare(self, task: Task) -> None:
        inspect_once(self, task, self._inspect)

    def _solve(
        self, task: Task, *, training: bool, norm: str, steps: int | None = None, mask: bool | None = None, **_: Any
    ) -> TaskOutcome:
        self._refuse_steps(steps, mask)
        moments: list[Moments] | None = [] if training else None
        passes = passes_of(norm, training=training)
        if passes.context is not None:
            self.wrapped.run(task.support_x, passes.context, moments)
        prediction = self.wrapped.run(task.target_x, passes.target, moments)
        loss = task_loss(self.loss_fn, prediction, task.target_y, "target")
        return outcome_of(task, loss, prediction, loss_fn=self.loss_fn, moments=moments)

    @shared
    def adapt(
        self,
        support_x: Inputs,
        support_y: Any,
        steps: int | None = None,
        *,
        classes: Classes | None = None,
        norm: str | None = None,
    ) -> nn.Module:
        """The trained network as a plain module of the user's own class, in eval mode; changes nothing here.

        Args:
            support_x, support_y: one task's support set, (examples, ...); used for nothing but the statistics of its
                images under norm="support".
            steps: None or 0.
            classes: the task's classes, whose outputs alone the module has: labels, or names; see `TaskClasses`.
            norm: batch-norm policy; the learner's own if None; after "batch", "support" suits single images.
        """
        self._refuse_steps(steps, None)
        asked, norm = TaskClasses(classes, support_x, support_y, self.loss_fn), policy_of(self, norm)
        with adapting(self, asked.task()) as task:
            held = None
            if (context := passes_of(norm, training=False).context) is not None:
                self.wrapped.run(task.support_x, context)
                held = self.wrapped.held(norm)
            module = plain_copy(self.model, {}, 0, held, keep_statistics=norm != "batch").eval()
            return asked.cut(finished(module, task))

    def _inspect(self, task: Task) -> FirstLook:
        prediction = self.wrapped.run(task.target_x, "batch", None)
        task_loss(self.loss_fn, prediction, task.target_y, "target")
        return FirstLook(without_part(self.model, prediction), differentiable=True)

    def _refuse_steps(self, steps: int | None, mask: bool | None) -> None:
        refuse_inner_loop(self, None if steps == 0 else steps, mask)
