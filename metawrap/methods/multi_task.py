"""Multi-task learning: one body for all tasks, a head for each; a new task gets a head of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from metawrap.engines.functional import FunctionalEngine
from metawrap.errors import ArgumentError, TaskError, shown
from metawrap.execution.calls import shared
from metawrap.execution.ranks import several
from metawrap.heads.class_table import ClassTable, TaskHeads
from metawrap.layers.step_clock import Moments
from metawrap.learner.embedding_learner import EmbeddingKeywords
from metawrap.learner.head_learner import HeadLearner, under_prefix
from metawrap.learner.joint_training import JointTraining, TrainingOutputs, like_weights
from metawrap.learner.task_classes import Classes, TaskClasses
from metawrap.outputs import prediction_in
from metawrap.results import TaskOutcome
from metawrap.settings.keywords import checked
from metawrap.settings.settings import InnerOptimizerName
from metawrap.settings.validated import Count, Positive
from metawrap.tasks import Inputs, Task, TaskBatch, TaskId, device_of


class MultiTask(HeadLearner):
    """Joint training of a shared body with a head for each task; a new task gets a fresh head on the frozen body.

    With f the body and h_t the head of task t, the mean over the tasks of a batch of L(h_t(f(x)), y) over the examples
    of t, support and target alike, is minimised in f and all h_t together. Each `Task.id` has a head like the network's
    own, made from that one's values when the id is first seen. Tasks without id that name their classes
    (`Task.classes`; `EpisodeSampler` does) share one weight vector for each class, softmax over the task's own classes
    only.

    A new task: gradient steps fit the network's own head, which training leaves as it was given, to the support set,
    with the body frozen; a task whose id was trained on starts from its own head.

    As in the sources: hard parameter sharing, equal weights of the tasks. The fit at test time is that of `FineTune`,
    because the sources know no new tasks. In `eval()` mode the loss of `learner(batch)` has no graph.

    Args:
        inner_steps, inner_lr, inner_optimizer, classes: as in `FineTune`.
        keywords: see `EmbeddingKeywords` and `OuterKeywords`.

    >>> learner = MultiTask(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), inner_steps=20)
    >>> x, y = torch.randn(6, 4), torch.arange(6) % 3
    >>> _ = learner.meta_step([Task(x, y, x, y, id="blue"), Task(-x, y, -x, y, id="red")])
    >>> adapted = learner.adapt(x, y, task_id="blue")

    Sources: Caruana 1997, Machine Learning 28, 41-75; Ruder 2017, arXiv:1706.05098, section 2.
    """

    heads: TaskHeads

    @checked
    def __init__(
        self,
        model: nn.Module,
        *,
        inner_steps: Count = 100,
        inner_lr: Positive = 0.1,
        inner_optimizer: InnerOptimizerName = "sgd",
        classes: Count | None = None,
        **keywords: Unpack[EmbeddingKeywords],
    ) -> None:
        table = ClassTable(classes)
        self.joint = JointTraining("head", inner_lr, inner_optimizer, table, self._by_classes, self._outputs)
        self.joint.refuse_blend(type(self).__name__, keywords.get("norm"))
        super().__init__(model, keywords, parts={"table": table, "heads": TaskHeads()})

    def _outputs(self, task: Task, norm: str, moments: list[Moments], labels: Tensor) -> TrainingOutputs:
        embedded = self.own_head.of_task(task, True, norm, moments)
        if self._by_classes(task):
            logits = self.joint.table(torch.cat(embedded), torch.tensor(task.classes, device=device_of(self)))
        else:
            head, engine = self.heads.of(task.id, self.own_head.names()), FunctionalEngine(self.own_head.module)
            logits = torch.cat([prediction_in(engine.call(head, rows)) for rows in embedded])  # type: ignore[misc]
        return TrainingOutputs(logits, labels, logits)

    def _solve(self, task: Task, **how: Any) -> TaskOutcome:
        return self.joint.solve(self, task, **how)

    def _module(self, task: Task, norm: str, steps: int) -> nn.Module:
        full = self.own_head.names()
        start = {full[name]: value for name, value in self.heads.of(task.id, full).items()}
        return self.joint.module(self, task, norm, steps, start)

    @shared
    def adapt(
        self,
        support_x: Inputs,
        support_y: Any,
        steps: int | None = None,
        *,
        classes: Classes | None = None,
        norm: str | None = None,
        task_id: TaskId | None = None,
    ) -> nn.Module:
        """A plain module of the user's own class, in eval mode, with a head fitted to one support set.

        As `adapt` of every method that fits the user's own head, with one argument more.

        Args:
            task_id: the task whose head to start from; the network's own head if None or a new task.
        Raises:
            ArgumentError: `task_id` has no effect, because no task with an id was trained on.
        """
        if task_id is not None and not list(self.heads.parameters()):
            raise ArgumentError(
                f"task_id: no task with an id was trained on, so {shown(task_id)} names no head to start from. "
                "Leave it out."
            )
        return self._adapted_to(TaskClasses(classes, support_x, support_y, self.loss_fn), steps, norm, task_id)

    def _check_trainable(self, batch: TaskBatch) -> None:
        for task in batch:
            if task.id is None and task.classes is None:
                raise TaskError(
                    "MultiTask trains one head per task, but a task has neither an id nor classes. Pass a list of "
                    "Task(support_x, support_y, target_x, target_y, id=...), or with classes=..."
                )
            if task.id is not None and several() and self.distributed:
                raise TaskError(
                    f"id: the task {task.id!r} has a head of its own, which other processes would not have. Train on "
                    "one process, or name the tasks' classes in place of ids."
                )
        self.joint.check(self, batch)
        self.joint.prepare(self, batch)
        names, own = self.own_head.names(), dict(self.own_head.module.named_parameters())
        for task_id in dict.fromkeys(task.id for task in batch):
            if task_id is not None and not self.heads.of(task_id, names):
                self._learn(*self.heads.make(task_id, {name: own[name] for name in names}))

    def _by_classes(self, task: Task) -> bool:
        return task.id is None and task.classes is not None

    def _make_parts(self, task: Task | None) -> None:
        self.joint.make_table(self, task)

    def _match_parts(self, stored: Mapping[str, Any]) -> None:
        self.joint.match_table(self, stored)
        self._learn(*self.heads.match(under_prefix("heads.", stored), like_weights(self.model)))
