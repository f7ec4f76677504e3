"""Joint pre-training, then fine-tuning: all examples -> one classifier over all classes; a task -> gradient steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from metawrap.errors import ArgumentError, TaskError, UnsupportedModuleError
from metawrap.inner_loop.masking import ignored_label
from metawrap.layers.step_clock import Moments
from metawrap.learner.embedding_learner import EmbeddedKeywords
from metawrap.learner.joint_training import Joint, Tune
from metawrap.settings.settings import InnerOptimizerName
from metawrap.tasks import Task, describe_value


class FineTune(Joint):
    """Train on the union of all tasks, then fine-tune on each new one: the baseline without meta-learning.

    Pre-training is ordinary supervised training on support and target examples alike. A label means something else in
    each task, so it is the class behind it that is learned: with f the body, W one weight vector for each class of all
    tasks, L(softmax(W f(x) + b), class of x), averaged over the examples of a task and over tasks. For this, tasks name
    their classes (`Task.classes`; `EpisodeSampler` does). Tasks that name none are trained on with their labels as they
    are, through the network's own head, which is right where a label means the same in every task, and for regression.

    A new task: gradient steps on its support set, from the network's own head, which in pre-training by classes stays
    as it was given, and otherwise is trained with the rest.

    As in the paper (its "Baseline"): a linear classifier over all training classes, the body frozen at test time and a
    new classifier fitted by SGD (tune="head"). What differs: the whole support set in each step, not batches of 4, and
    no momentum and weight decay; the new head starts from the values that the network came with, so that a task is
    fitted the same way each time; images are not augmented. tune="full" moves the body, too: "train on the union of all
    tasks, then fine-tune". Batches are the episodes themselves, so that a batch norm sees one task at a time.

    In training the accuracy is that among the task's own classes. In `eval()` mode `learner(batch).loss` has no graph,
    and its backward fails: a fitted network is nothing to learn from.

    Args:
        model: any `torch.nn.Module`; it is copied, never changed.
        tune: "head" fits the head alone to a new task (a linear probe, where it is linear), "full" the whole network.
        inner_steps: gradient steps on a new task's support set.
        inner_lr: their rate.
        inner_optimizer: "sgd" or "adam", torch's own.
        classes: how many classes the training tasks are drawn from; None lets the table grow with the numbers that
            tasks bring. Needed where several processes train together.
        keywords: see `EmbeddedKeywords` and `OuterKeywords`; embedding="output" makes no sense here.
    Raises:
        ArgumentError: an argument has the wrong type, range or combination.
        UnsupportedModuleError: the model has something that cannot be carried.

    Source: Chen, Liu, Kira, Wang, Huang 2019, arXiv:1904.04232, section 3.2.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tune: Tune = "head",
        inner_steps: int = 100,
        inner_lr: float = 0.1,
        inner_optimizer: InnerOptimizerName = "sgd",
        classes: int | None = None,
        **keywords: Unpack[EmbeddedKeywords],
    ) -> None:
        if tune not in ("full", "head"):
            raise ArgumentError(f"tune: expected 'full' or 'head', but got {tune!r}.")
        super().__init__(
            model,
            keywords,
            tune=tune,
            inner_steps=inner_steps,
            inner_lr=inner_lr,
            inner_optimizer=inner_optimizer,
            classes=classes,
            options={"tune": tune},
        )

    def _joint(self, task: Task, norm: str, moments: list[Moments], labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self._by_classes(task):
            both = torch.cat(self._of_both(self._predicted, task, True, norm, moments))
            return both, labels, both
        rows = self._class_rows(task)
        logits = self.table(torch.cat(self._embeddings(task, True, norm, moments)))
        counted = labels != ignored_label(self.loss_fn)
        return logits, torch.where(counted, rows[labels.long() * counted], labels), logits[:, rows]

    def _predicted(self, *arguments: object) -> Tensor:
        found = self._run(*arguments)  # type: ignore[arg-type]
        if not isinstance(found, Tensor):
            raise UnsupportedModuleError(
                f"FineTune trains on the network's prediction as one tensor, but it is {describe_value(found)}. "
                "Return a tensor, or name each task's classes."
            )
        return found

    def _check_joint(self, task: Task) -> None:
        if task.classes is None and (self.table.classes or self.classes is not None):
            raise TaskError(
                "classes: a task without them, after tasks that named theirs, or where classes= says how many there "
                "are: its labels are not known to mean the same. Pass Task(..., classes=...) for all tasks, or for "
                "none, and then no classes=."
            )
        super()._check_joint(task)

    def _solves_by_head(self) -> bool:
        return self.tune == "head"

    def _needed_head(self, task: Task) -> str | None:
        return None if self.tune == "full" and task.classes is None else self._found_head(task)

    def _tuned_names(self) -> list[str]:
        named = self.model.named_parameters()
        everything = [name for name, parameter in named if parameter.requires_grad]
        return everything if self.tune == "full" else list(self._full_names().values())
