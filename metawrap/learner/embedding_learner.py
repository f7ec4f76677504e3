"""Methods on an embedding: task -> embeddings of support and target -> a head fitted to the support set -> its logits.

Read `_solve` first; each method below is one arrow of it. A method says which head it fits: see `_fit_head`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metawrap.checks.first_look import FirstLook
from metawrap.engines.calling import autograd
from metawrap.errors import ArgumentError, TaskError, UnsupportedModuleError, shown
from metawrap.execution.calls import shared
from metawrap.execution.executor import Executor
from metawrap.heads.embedding import BehindNetwork, Embedding, EmbeddingSource, put_in_place
from metawrap.heads.fitted import FittedHead
from metawrap.heads.joint_rows import may_hold_places, rows_stand_alone
from metawrap.heads.placed_head import placed
from metawrap.layers.norm_policies import Passes, passes_of
from metawrap.layers.per_step_norm import PerStepNorm
from metawrap.layers.step_clock import Moments
from metawrap.learner.evaluation import adapting, finished, in_eval_mode, policy_of
from metawrap.learner.keywords import OuterKeywords
from metawrap.learner.learner import Learner
from metawrap.learner.task_classes import Classes, TaskClasses
from metawrap.learner.without_inner_loop import (
    inspect_once,
    leave_out_unsized,
    moved_parts,
    refuse_inner_loop,
    wrapped_as_it_is,
)
from metawrap.results import TaskOutcome, ignored_label, outcome_of
from metawrap.surgery.swap import plain_copy
from metawrap.tasks import Inputs, Task, describe_value

_EMBEDDED_AT_ONCE = 64


class EmbeddingKeywords(OuterKeywords, total=False):
    """The keywords of every method on an embedding, besides those of all methods.

    head: name of the module that makes the prediction; found by watching a forward pass if None. embedding:
    "head_input" embeds by the input of that module; "output" embeds by the network's own output, for a network without
    a head; a function reads the embedding from that output, such as `lambda output: output.pooler_output`.
    """

    head: str | None
    embedding: EmbeddingSource


class EmbeddingLearner(Learner):
    """A method that embeds a task and fits a head to its support set.

    flat: whether the method takes embeddings as vectors. In every method of this kind, `model` is any
    `torch.nn.Module`; it is copied, never changed. The input of its head is the embedding.

    Raises:
        ArgumentError: an argument has the wrong type, range or combination.
        UnsupportedModuleError: the model has something that cannot be carried.
    """

    flat: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        keywords: EmbeddingKeywords,
        *,
        options: Mapping[str, Any] | None = None,
        parts: Mapping[str, Any] | None = None,
    ) -> None:
        head, source = keywords.pop("head", None), keywords.pop("embedding", "head_input")
        known = isinstance(source, str) and source in ("head_input", "output")
        if not known and (not callable(source) or isinstance(source, nn.Module)):
            raise ArgumentError(
                "embedding: expected 'head_input' or 'output', or a function that reads the embedding from the "
                f"network's output, but got {describe_value(source)}. A module with weights belongs into the network."
            )
        if head is not None and source != "head_input":
            raise ArgumentError('head: has no effect with another embedding than "head_input". Leave one of them out.')
        named = source if isinstance(source, str) else getattr(source, "__name__", type(source).__name__)
        options = {**(options or {}), "head": head, "embedding": named}
        wrapped, settings = wrapped_as_it_is(type(self), model, keywords, defaults={}, head=head, own_steps=None)
        moved = moved_parts(parts or {}, wrapped.model)
        executor = Executor(settings.execution)
        super().__init__(wrapped, settings, keywords, executor=executor, parts=moved, options=options)
        leave_out_unsized(self)
        self.embedding = Embedding(type(self).__name__, self.model, self.wrapped.run, head, source, self.flat)

    @property
    def head(self) -> str | None:  # type: ignore[override]
        """The name of the module whose input is the embedding; None before the first task."""
        return self.embedding.head

    @abstractmethod
    def _fit_head(self, support: Tensor, labels: Tensor, ways: int) -> FittedHead:
        """The head fitted to a support set: embeddings (examples, ...), labels (examples,) in 0..ways - 1.

        Differentiable with respect to the embeddings and the method's own parts wherever gradients are enabled.
        """

    def _predict(self, task: Task, support: Tensor, labels: Tensor, ways: int, target: Tensor) -> tuple[Tensor, Tensor]:
        """The prediction for the targets, and the loss that trains the method.

        Args:
            support, target: the task's embeddings. labels: of the support set, (examples,) in 0..ways - 1.
        """
        prediction = self._fit_head(support, labels, ways)(target)
        return prediction, self._loss(prediction, task.target_y, "target")

    def _kept(self, task: Task, support: Tensor, target: Tensor, ways: int) -> dict[str, Tensor]:
        """What the learner keeps of a training task's embeddings after the meta-step."""
        return {}

    def _loss(self, prediction: Tensor, y: Any, part: str) -> Tensor:
        """The user's loss of a prediction."""
        return self.embedding.loss(self.loss_fn, prediction, y, part)

    def _solve(
        self, task: Task, *, training: bool, norm: str, steps: int | None = None, mask: bool | None = None, **_: Any
    ) -> TaskOutcome:
        refuse_inner_loop(self, steps, mask)
        labels, ways = self._labels(task)
        moments: list[Moments] | None = [] if training else None
        support, target = self.embedding.of_task(task, training, norm, moments)
        prediction, loss = self._predict(task, support, labels, ways, target)
        prediction = self.embedding.in_form(prediction)
        kept = self._kept(task, support, target, ways) if training else None
        return outcome_of(task, loss, prediction, loss_fn=self.loss_fn, moments=moments, head=kept, known=True)

    def _prepare(self, task: Task) -> None:
        inspect_once(self, task, self._inspect)

    def _labels(self, task: Task) -> tuple[Tensor, int]:
        """The support labels, and the number of classes.

        Raises:
            TaskError: they are no classes 0..ways - 1, or a target has a class that the support set has not shown.
        """
        name = type(self).__name__
        for part in ("support_y", "target_y"):
            y = getattr(task, part)
            if not isinstance(y, Tensor) or y.ndim != 1 or y.is_floating_point() or y.is_complex():
                raise TaskError(
                    f"{part}: {name} needs the class of each example, (examples,) whole numbers, but got "
                    f"{describe_value(y)}."
                )
        # In one copy, as a GPU waits for each.
        labels = torch.cat([task.support_y.long(), task.target_y.long()]).tolist()
        found, asked = (sorted(set(part)) for part in (labels[: len(task.support_y)], labels[len(task.support_y) :]))
        ways = len(found)
        if found != list(range(ways)):
            raise TaskError(
                f"support_y: {name} needs each class from 0 to the last, but it holds {shown(found)}. Relabel the "
                f"episode to 0..{ways - 1}."
            )
        ignored = ignored_label(self.loss_fn)
        if missing := [y for y in asked if y != ignored and not 0 <= y < ways]:
            raise TaskError(
                f"target_y holds classes {shown(missing)}, which the support set has not shown. Leave such targets "
                "out, or show the classes."
            )
        return task.support_y.long(), ways

    def _inspect(self, task: Task) -> FirstLook:
        with self.embedding.found(task.support_x):
            if self.embedding.head is not None:
                self.embedding.check(task.support_x)
                self.embedding.check_replaceable(task.support_x)
            labels, ways = self._labels(task)
            # Batch statistics exist in every mode.
            support = self.embedding.of(task.support_x, "batch")
            self.embedding.check_rows(support, len(labels))
            own = replace(task, target_x=task.support_x, target_y=task.support_y)
            _, loss = self._predict(own, support, labels, ways, support)
            learned = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            unused: list[str] = []
            if self.model.training and not loss.requires_grad:
                raise UnsupportedModuleError(
                    f"Nothing that {type(self).__name__} would learn has a gradient: all that comes before the head is "
                    "frozen. Unfreeze some of it with requires_grad_(); evaluate and adapt work as it is."
                )
            if loss.requires_grad and learned:
                gradients = torch.autograd.grad(loss, list(learned.values()), allow_unused=True)
                unused = [name for name, g in zip(learned, gradients, strict=True) if g is None]
        return FirstLook(unused, differentiable=True)

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
        """A plain module of the user's own class, in eval mode, with a fitted head in the place of its own.

        Its norms are ordinary ones: under norm="running" with the stored statistics, under "batch" without any (they
        use each batch's own), under "support" with the support set's. A head that is linear is an `nn.Linear`. With
        another `embedding` than "head_input" the user's network has the fitted head behind it, in an `nn.Sequential`,
        or in a `BehindNetwork` where a function reads the embedding or the network takes or returns more than one
        tensor. Where metawrap is missing: see `PlacedHead`. The learner does not change.

        Args:
            support_x, support_y: one task's support set, (examples, ...), labels 0..ways - 1 without `classes`.
            steps: None; there is no inner loop.
            classes: the task's classes in the order of the outputs: labels, or names; see `TaskClasses`.
            norm: batch-norm policy; the learner's own if None; after "batch", "support" suits single images.
        """
        refuse_inner_loop(self, steps)
        asked, norm = TaskClasses(classes, support_x, support_y, self.loss_fn), policy_of(self, norm)
        with adapting(self, asked.task(places=True)) as task:
            labels, ways = self._labels(task)
            passes = passes_of(norm, training=False)
            entering = self.embedding.entering(task.support_x, passes.context or passes.support)
            embedded = entering.value.flatten(1) if self.flat else entering.value
            fitted = placed(self._fit_head(embedded, labels, ways).plain(), entering, self.flat)
            held = self.wrapped.held(norm) if passes.context is not None else None
            module = plain_copy(self.model, {}, 0, held, keep_statistics=norm != "batch").eval()
        if self.embedding.head is not None:
            put_in_place(module, self.embedding.head, fitted)
        elif entering.bare:
            module = nn.Sequential(module, fitted).eval()
        else:
            module = BehindNetwork(module, self.embedding.source, fitted).eval()
        return finished(module, task)

    @shared
    def embedded(self, task: Task, inputs: Tensor, norm: str | None = None) -> Tensor | None:
        """The embeddings of inputs, in eval mode and without gradients; None where company may change one of them.

        They are the same in any company without batch norm or under norm="running", if the network keeps rows apart.

        Args:
            task: a small task of such inputs, for the checks of a first task. inputs: (examples, ...).
        Returns:
            (examples, numbers), or (examples, ...) for a method whose embeddings are no vectors.
        """
        normed = any(isinstance(module, PerStepNorm) for module in self.model.modules())
        if normed and passes_of(policy_of(self, norm), training=False) != Passes("running", None, "running"):
            return None
        with adapting(self, task) as small:
            stored = partial(self.embedding.of, statistics="running")
            if may_hold_places(inputs) or not rows_stand_alone(self.model, stored, small.support_x, small.target_x):
                return None
            return torch.cat([stored(part) for part in torch.split(inputs, _EMBEDDED_AT_ONCE)])

    @shared
    def predicted(self, task: Task) -> Tensor:
        """The prediction (targets, ways) for a task whose inputs are embeddings that `embedded` has returned."""
        support, target = task.support_x, task.target_x
        assert isinstance(support, Tensor)
        assert isinstance(target, Tensor)
        with in_eval_mode(self), autograd(False):
            return self._predict(task, support, *self._labels(task), target)[0]

    def get_extra_state(self) -> dict[str, Any]:
        """The counters and the head's name, for state_dict."""
        return super().get_extra_state() | {"head": self.embedding.head}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restores the counters, and the head's name where this learner has none yet."""
        super().set_extra_state(state)
        self.embedding.head = self.embedding.head or state.get("head")
