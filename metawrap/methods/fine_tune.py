"""Joint pre-training, then fine-tuning: all examples -> one classifier over all classes; a task -> gradient steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from metawrap.errors import TaskError, UnsupportedModuleError
from metawrap.heads.class_table import ClassTable
from metawrap.layers.norm_policies import Statistics
from metawrap.layers.step_clock import Moments
from metawrap.learner.embedding_learner import EmbeddingKeywords
from metawrap.learner.head_learner import HeadLearner
from metawrap.learner.joint_training import JointTraining, TrainingOutputs, Tune
from metawrap.outputs import form_of, in_words, prediction_in
from metawrap.results import TaskOutcome, class_loss, ignored_label
from metawrap.settings.keywords import checked
from metawrap.settings.settings import InnerOptimizerName
from metawrap.settings.validated import Count, Positive
from metawrap.tasks import Inputs, Task, TaskBatch, device_of, tensors_in


class FineTune(HeadLearner):
    """Train on the union of all tasks, then fine-tune on each new one: the baseline without meta-learning.

    Pre-training is supervised training on support and target examples. With f the body and W one weight vector for each
    class of all tasks, the loss is L(softmax(W f(x) + b), class of x), averaged over the examples of a task and over
    tasks, which name their classes (`Task.classes`; `EpisodeSampler` does). For regression, and with classes="shared",
    tasks name none, and train the network's own head with their labels as they are.

    A new task: gradient steps on its support set, from the network's own head. Pre-training by classes leaves this head
    as it was given; pre-training without classes trains it.

    As in the paper (its "Baseline"): a linear classifier over all training classes, the body frozen at test time and a
    new classifier fitted by SGD (tune="head"). Differs: each step takes the whole support set, not batches of 4; no
    momentum and weight decay; the new head starts from the network's own; images are not augmented; batches are the
    episodes, so that a batch norm sees one task at a time. tune="full" moves the body, too.

    In training the accuracy is that among the task's own classes. In `eval()` mode the loss of `learner(batch)` has no
    graph.

    Args:
        tune: "head" fits the head alone to a new task (a linear probe, where it is linear), "full" the whole network.
        inner_steps: gradient steps on a new task's support set.
        inner_lr: their rate.
        inner_optimizer: "sgd" or "adam", torch's own.
        classes: how many classes the training tasks are drawn from; with None the table grows with the class numbers of
            the tasks. Needed where several processes train together. "shared": a label means the same in every task.
        keywords: see `EmbeddingKeywords` and `OuterKeywords`.

    >>> learner = FineTune(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), inner_steps=20, classes=64)
    >>> adapted = learner.adapt(torch.randn(6, 4), torch.arange(6) % 3)

    Source: Chen, Liu, Kira, Wang, Huang 2019, arXiv:1904.04232, section 3.2.
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        *,
        tune: Tune = "head",
        inner_steps: Count = 100,
        inner_lr: Positive = 0.1,
        inner_optimizer: InnerOptimizerName = "sgd",
        classes: Count | Literal["shared"] | None = None,
        **keywords: Unpack[EmbeddingKeywords],
    ) -> None:
        self.head_runs_alone = tune == "head"
        self.shared_labels = classes == "shared"
        table = ClassTable(None if isinstance(classes, str) else classes)
        self.joint = JointTraining(tune, inner_lr, inner_optimizer, table, self._by_classes, self._outputs)
        self.joint.refuse_blend(type(self).__name__, keywords.get("norm"))
        super().__init__(model, keywords, parts={"table": self.joint.table})

    def _outputs(self, task: Task, norm: str, moments: list[Moments], labels: Tensor) -> TrainingOutputs:
        if task.classes is None:
            both = torch.cat(self.own_head.of_task(task, True, norm, moments, self._predicted))
            return TrainingOutputs(both, labels, both)
        rows = torch.tensor(task.classes, device=device_of(self))
        logits = self.joint.table(torch.cat(self.own_head.of_task(task, True, norm, moments)))
        counted = labels != ignored_label(self.loss_fn)
        return TrainingOutputs(logits, torch.where(counted, rows[labels.long() * counted], labels), logits[:, rows])

    def _predicted(self, inputs: Inputs, statistics: Statistics, moments: list[Moments] | None) -> Tensor:
        output, calls = self.own_head.watched(inputs, statistics, moments)
        found = prediction_in(output)
        if found is None and calls:
            found = next((tensor for tensor in tensors_in(output) if tensor is calls[-1][1]), None)
        if found is None:
            raise UnsupportedModuleError(
                f"FineTune trains on the network's prediction, but the network returns {in_words(output)}, and which "
                "tensor that is is not known. Return it under the name 'logits', name the module that makes it with "
                "head=, or name each task's classes."
            )
        self.own_head.forms[self.model.training] = form_of(output, lambda tensor: tensor is found)
        return found

    def _solve(self, task: Task, **how: Any) -> TaskOutcome:
        return self.joint.solve(self, task, **how)

    def _module(self, task: Task, norm: str, steps: int) -> nn.Module:
        return self.joint.module(self, task, norm, steps, {})

    def _check_trainable(self, batch: TaskBatch) -> None:
        for task in batch:
            if self.shared_labels and task.classes is not None:
                raise TaskError(
                    'classes: a task names its classes, but classes="shared" says that its labels are these. Leave one '
                    "of them out."
                )
            named = bool(self.joint.table.classes) or self.joint.table.limit is not None
            of_classes = named or _of_classes(self.loss_fn, task.support_y)
            if task.classes is None and of_classes and not self.shared_labels:
                raise TaskError(
                    "classes: a task without them: label 0 of one task need not be label 0 of another. Pass "
                    "Task(..., classes=...) for all tasks, as EpisodeSampler does, or build the learner with "
                    'classes="shared" where a label means the same in every task, or is no class.'
                )
        self.joint.check(self, batch)
        self.joint.prepare(self, batch)

    def _by_classes(self, task: Task) -> bool:
        return task.classes is not None

    def _make_parts(self, task: Task | None) -> None:
        self.joint.make_table(self, task)

    def _match_parts(self, stored: Mapping[str, Any]) -> None:
        self.joint.match_table(self, stored)

    def _tuned_names(self) -> list[str]:
        if self.joint.tune == "head":
            return list(super()._tuned_names())
        return [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]


def _of_classes(loss_fn: Any, y: Any) -> bool:
    """Whether labels are classes: whole numbers, or probabilities of classes for cross-entropy."""
    return any(not label.is_floating_point() for label in tensors_in(y)) or class_loss(loss_fn) is F.cross_entropy
