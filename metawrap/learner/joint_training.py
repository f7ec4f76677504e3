"""Joint training: the examples of all tasks -> one supervised loss; then gradient steps on a new task's support set.

What `FineTune` and `MultiTask` share. A method says which head training goes through; see `_joint`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metawrap.engines import call_model
from metawrap.errors import ArgumentError, TaskError
from metawrap.execution.ranks import several
from metawrap.heads.class_table import ClassTable
from metawrap.inner_loop.masking import ignored_label
from metawrap.inner_loop.outcome import Solved, autograd, dense, solved_from, usable
from metawrap.layers.step_clock import Moments
from metawrap.learner.direct import Parts
from metawrap.learner.embedding_learner import EmbeddedKeywords
from metawrap.learner.own_head import OwnHead
from metawrap.settings.settings import InnerOptimizerName, check_choice, check_positive
from metawrap.surgery.swap import plain_copy
from metawrap.tasks import Task, TaskBatch, describe_value

Tune = Literal["full", "head"]
_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}


class Joint(OwnHead):
    """Supervised training on the examples of all tasks; each new task is then fitted by gradient steps of its own.

    tune: what these move. inner_optimizer: torch's SGD or Adam, at the rate inner_lr, on the whole support set at once.
    classes: how many classes tasks are drawn from; None lets the table grow with the numbers that tasks bring.
    """

    table: ClassTable

    def __init__(
        self,
        model: nn.Module,
        keywords: EmbeddedKeywords,
        *,
        tune: Tune,
        inner_steps: int,
        inner_lr: float,
        inner_optimizer: InnerOptimizerName,
        classes: int | None,
        options: Mapping[str, Any],
        parts: Parts | None = None,
    ) -> None:
        own = {"inner_lr": inner_lr, "inner_optimizer": inner_optimizer}
        check_positive("inner_lr", inner_lr)
        check_choice("inner_optimizer", inner_optimizer)
        if classes is not None and (not isinstance(classes, int) or isinstance(classes, bool) or classes < 1):
            raise ArgumentError(f"classes: expected a whole number of at least 1, or None, but got {classes!r}.")
        self.tune, self.inner_lr, self.inner_optimizer, self.classes = tune, inner_lr, inner_optimizer, classes
        parts = {"table": ClassTable(), **(parts or {})}
        shown = {**options, **own, "classes": classes}
        super().__init__(model, keywords, inner_steps=inner_steps, options=shown, parts=parts)

    @abstractmethod
    def _joint(self, task: Task, norm: str, moments: list[Moments], labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Predictions for support and target as training judges them, the labels for these, and by the task's labels.

        Args:
            labels: (examples, ...), the task's own, support before target.
        """

    def _by_classes(self, task: Task) -> bool:
        """Whether training goes through the table."""
        return task.classes is not None

    def _start(self, task: Task) -> Mapping[str, Tensor]:
        """Values by name in the network from which a task is tuned; the network's own where there is none."""
        return {}

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
        self._refuse_mask(mask)
        moments: list[Moments] = []
        if training:
            predicted, labels, own = self._joint(task, norm, moments, torch.cat([task.support_y, task.target_y]))
            loss = self._loss(predicted, labels, "support and target")
            prediction = own[len(task.support_y) :]
        else:
            module = self._module(task, norm, self.settings.inner_steps if steps is None else steps)
            # A graph would lead to that module's own weights, and backward would end there without a word.
            with autograd(False):
                prediction = call_model(module, task.target_x)
                loss = self._loss(prediction, task.target_y, "target")
        return solved_from(loss, [], prediction, task, moments, {}, ignored_label(self.loss_fn))

    def _module(self, task: Task, norm: str, steps: int) -> nn.Module:
        module = plain_copy(self.model, self._start(task), 0, None, keep_statistics=norm == "running").eval()
        part, inputs = module, task.support_x
        if self.tune == "head":
            assert self._head is not None
            part = module.get_submodule(self._head)
            inputs = self._embedded(task.support_x, "running" if norm == "running" else "batch").detach()
        with autograd(True):
            self._tune(part, inputs, task.support_y, steps)
        # Under norm="support" the norms used the support's own statistics until here; now they hold them.
        return self._plain(dict(module.named_parameters()), task.support_x, norm) if norm == "support" else module

    def _tune(self, part: nn.Module, inputs: Any, labels: Any, steps: int) -> None:
        learned = [parameter for parameter in part.parameters() if parameter.requires_grad]
        optimizer = _OPTIMIZERS[self.inner_optimizer](learned, lr=self.inner_lr)  # type: ignore[call-arg]
        for _ in range(steps):
            loss = self._loss(call_model(part, inputs), labels, "support")
            gradients = torch.autograd.grad(loss, learned, allow_unused=True)
            for parameter, gradient in zip(learned, gradients, strict=True):
                parameter.grad = None if gradient is None else dense(gradient)
            optimizer.step()
        for parameter in learned:
            parameter.grad = None

    def _own_outputs(self, task: Task) -> bool:
        return not self._by_classes(task)

    def _class_rows(self, task: Task) -> Tensor:
        return torch.tensor(task.classes, device=self._device)

    def _check_trainable(self, batch: TaskBatch) -> None:
        for task in batch:
            self._check_joint(task)
        by_classes = [task for task in batch if self._by_classes(task)]
        made = not self.table.classes
        if by_classes and made:
            self._looks.pop(self.model.training, None)  # Whatever was seen before, it made no table.
        with autograd():
            self._prepare(usable((by_classes or batch)[0]))
        needed = max((max(task.classes or ()) + 1 for task in by_classes), default=0)
        if needed > self.table.classes:
            if self._in_forward and not made:
                raise ArgumentError(
                    f"classes: expected how many classes tasks are drawn from, at least {needed}, but got None: a "
                    "table that grows would leave an optimizer of your own behind. Pass classes=, such as "
                    "sampler.num_classes, or use meta_step."
                )
            for parameter, more in self.table.rows_behind(needed):
                self.outer.lengthen(parameter, more)

    def _check_joint(self, task: Task) -> None:
        """Raises TaskError when a task cannot be trained on."""
        if not all(isinstance(y, Tensor) for y in (task.support_y, task.target_y)):
            raise TaskError(
                f"support_y: {type(self).__name__} needs tensors as labels, but got {describe_value(task.support_y)}."
            )
        if not self._by_classes(task):
            return
        classes = task.classes or ()
        if self.classes is None and several() and self.distributed:
            raise ArgumentError(
                "classes: expected how many classes tasks are drawn from, for several processes, whose tables would "
                "else grow apart, but got None. Pass classes=, such as sampler.num_classes."
            )
        if self.classes is not None and max(classes) >= self.classes:
            raise TaskError(
                f"classes: a task has the class number {max(classes)}, but there are classes={self.classes}. Number "
                "them from 0, or pass a larger classes= to the constructor."
            )
        for name in ("support_y", "target_y"):
            y = getattr(task, name)
            if y.ndim != 1 or y.is_floating_point() or y.is_complex():
                raise TaskError(
                    f"{name}: a task with classes needs the label of each example, (examples,) whole numbers, but got "
                    f"{describe_value(y)}. Leave classes out for other labels."
                )
            seen = y[y != ignored_label(self.loss_fn)]
            if len(seen) and not 0 <= int(seen.min()) <= int(seen.max()) < len(classes):
                raise TaskError(
                    f"{name} holds labels {int(seen.min())}..{int(seen.max())}, but the task names {len(classes)} "
                    f"classes. Name the class of each label."
                )

    def _make_parts(self, task: Task | None) -> None:
        # How many rows there are is for training to say: from other tasks only where it needs none of their numbers.
        sized = self.training or self.classes is not None
        if sized and task is not None and not self.table.classes and task.classes and self._by_classes(task):
            self._refuse_late()
            width = self._embedded(task.support_x, "batch").flatten(1).shape[1]
            rows = max(task.classes) + 1 if self.classes is None else self.classes
            self._learn(*self.table.make(rows, width, self._like()))

    def _make_room(self, stored: Mapping[str, Any]) -> None:
        self._learn(*self.table.follow(below("table.", stored), self._like()))

    def _like(self) -> Tensor:
        return next(p for p in self.model.parameters() if p.is_floating_point())


def below(prefix: str, stored: Mapping[str, Any]) -> dict[str, Any]:
    """What a state_dict holds under a prefix, by the rest of each key."""
    return {key[len(prefix) :]: value for key, value in stored.items() if key.startswith(prefix)}
