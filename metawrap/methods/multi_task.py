"""Multi-task learning: one body for all tasks, a head for each; a new task gets a head of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from metawrap.engines.functional import FunctionalEngine
from metawrap.errors import TaskError
from metawrap.execution.ranks import several
from metawrap.heads.class_table import TaskHeads
from metawrap.layers.step_clock import Moments
from metawrap.learner.embedding_learner import EmbeddedKeywords
from metawrap.learner.joint_training import Joint, below
from metawrap.settings.settings import InnerOptimizerName
from metawrap.tasks import Inputs, Task, TaskBatch, TaskId


class MultiTask(Joint):
    """Joint training of a shared body with a head for each task; a new task gets a fresh head on the frozen body.

    With f the body and h_t the head of task t, the mean over the tasks of a batch of L(h_t(f(x)), y) over the examples
    of t, support and target alike, is minimised in f and all h_t together. A task is known by its `Task.id`: each id
    has a head like the network's own, made from that one's values when the id is first seen. Episodes that have no id
    but name their classes (`Task.classes`; `EpisodeSampler` does) share what they have in common: a head of theirs is
    made of one weight vector for each class, softmax over the task's own classes only. Tasks with neither are refused.

    A new task: the network's own head, which stays as it was given, fitted by gradient steps on the support set with
    the body frozen; from the task's own head where its id has been trained on.

    As in the sources: hard parameter sharing, equal weights of the tasks. What differs: the test-time head is fitted
    by gradient steps on the support set alone, as in `FineTune`, because the sources know no new tasks.

    In `eval()` mode `learner(batch).loss` has no graph, and its backward fails: a fitted head is nothing to learn from.

    Args:
        model: any `torch.nn.Module`; it is copied, never changed.
        inner_steps: gradient steps on a new task's support set.
        inner_lr: their rate.
        inner_optimizer: "sgd" or "adam", torch's own.
        classes: how many classes the training tasks are drawn from; None lets the table grow with the numbers that
            tasks bring. Needed where several processes train together.
        keywords: see `EmbeddedKeywords` and `OuterKeywords`; embedding="output" makes no sense here.
    Raises:
        ArgumentError: an argument has the wrong type, range or combination.
        UnsupportedModuleError: the model has something that cannot be carried.

    Sources: Caruana 1997, Machine Learning 28, 41-75; Ruder 2017, arXiv:1706.05098, section 2.
    """

    heads: TaskHeads

    def __init__(
        self,
        model: nn.Module,
        *,
        inner_steps: int = 100,
        inner_lr: float = 0.1,
        inner_optimizer: InnerOptimizerName = "sgd",
        classes: int | None = None,
        **keywords: Unpack[EmbeddedKeywords],
    ) -> None:
        super().__init__(
            model,
            keywords,
            tune="head",
            inner_steps=inner_steps,
            inner_lr=inner_lr,
            inner_optimizer=inner_optimizer,
            classes=classes,
            options={},
            parts={"heads": TaskHeads()},
        )

    def _joint(self, task: Task, norm: str, moments: list[Moments], labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        embedded = torch.cat(self._embeddings(task, True, norm, moments))
        if self._by_classes(task):
            logits = self.table(embedded, self._class_rows(task))
        else:
            head = self.heads.of(task.id, self._full_names())
            logits = FunctionalEngine(self._own_head()).call(head, embedded)
        return logits, labels, logits

    def _by_classes(self, task: Task) -> bool:
        return task.id is None and task.classes is not None

    def _start(self, task: Task) -> Mapping[str, Tensor]:
        full = self._full_names()
        return {full[name]: value for name, value in self.heads.of(task.id, full).items()}

    def adapt(
        self, support_x: Inputs, support_y: Any, steps: int | None = None, *, task_id: TaskId | None = None
    ) -> nn.Module:
        """A plain module of the user's own class, in eval mode, with a head fitted to one support set; changes nothing.

        Its norms are ordinary ones: under norm="running" with the stored statistics, under "batch" without any (they
        use each batch's own), under "support" with the support set's.

        Args:
            support_x, support_y: one task's support set, (examples, ...).
            steps: inner steps; `inner_steps` if None; 0 for before adaptation.
            task_id: whose head to start from; the network's own if None or not seen yet.
        """
        return self._adapted_to(Task(support_x, support_y, support_x, support_y, id=task_id), steps)

    def _check_joint(self, task: Task) -> None:
        if task.id is None and task.classes is None:
            raise TaskError(
                "MultiTask trains one head per task, but a task has neither an id nor classes. Pass a list of "
                "Task(support_x, support_y, target_x, target_y, id=...), or with classes=..."
            )
        if task.id is not None and several() and self.distributed:
            raise TaskError(
                f"id: the task {task.id!r} has a head of its own, which other processes would not have. Train on one "
                "process, or name the tasks' classes in place of ids."
            )
        super()._check_joint(task)

    def _check_trainable(self, batch: TaskBatch) -> None:
        super()._check_trainable(batch)
        names, own = self._full_names(), dict(self._own_head().named_parameters())
        for task_id in dict.fromkeys(task.id for task in batch):
            if task_id is not None and not self.heads.of(task_id, names):
                self._learn(*self.heads.make(task_id, {name: own[name] for name in names}))

    def _make_room(self, stored: Mapping[str, Any]) -> None:
        super()._make_room(stored)
        self._learn(*self.heads.follow(below("heads.", stored), self._like()))
