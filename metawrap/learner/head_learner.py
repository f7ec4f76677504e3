"""Methods that keep the user's own head: task -> embeddings -> gradient steps on the head, or on the whole network.

The head is found and checked with the first task. Parameters besides the network are made when their sizes are known.
"""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from metawrap.checks.first_look import FirstLook, without_part
from metawrap.engines.calling import autograd
from metawrap.engines.functional import FunctionalEngine
from metawrap.errors import ArgumentError, MetaWrapWarning, UnsupportedModuleError, shown
from metawrap.execution.calls import shared
from metawrap.execution.executor import Executor
from metawrap.heads.own_head import OwnHead
from metawrap.layers.norm_policies import passes_of
from metawrap.learner.describing import describe_learner
from metawrap.learner.description import Description
from metawrap.learner.embedding_learner import EmbeddingKeywords
from metawrap.learner.evaluation import adapting, check_steps, finished, policy_of
from metawrap.learner.learner import Learner
from metawrap.learner.task_classes import Classes, TaskClasses
from metawrap.learner.without_inner_loop import (
    inspect_once,
    leave_out_unsized,
    moved_parts,
    shown_settings,
    wrapped_as_it_is,
)
from metawrap.results import MetaOutput, StepMetrics, task_loss
from metawrap.settings.settings import TunedSettings
from metawrap.surgery.swap import plain_copy
from metawrap.tasks import Inputs, Task, TaskBatch, TaskId, tensors_in, usable


class HeadLearner(Learner):
    """A method that fits the user's own head to a support set by gradient steps.

    Embeddings reach the head as the network gives them, and labels are whatever the loss takes. In every method of this
    kind, `model` is any `torch.nn.Module`; it is copied, never changed. `embedding="output"` makes no sense here.

    head_runs_alone: whether inner steps run the head by itself, on embeddings.

    Raises:
        ArgumentError: an argument has the wrong type, range or combination.
        UnsupportedModuleError: the model has something that cannot be carried.
    """

    settings: TunedSettings
    head_runs_alone: bool = True
    # Settings in place of the usual ones.
    defaults: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self, model: nn.Module, keywords: EmbeddingKeywords, *, parts: Mapping[str, Any] | None = None
    ) -> None:
        head, source = keywords.pop("head", None), keywords.pop("embedding", "head_input")
        if not isinstance(source, str) or source != "head_input":
            raise ArgumentError(
                f"embedding: {type(self).__name__} fits the head of the network itself, so that only 'head_input' "
                f"makes sense, but got {shown(source)}. Leave it out; head= names the head."
            )
        self._in_training_forward = False
        inner_steps, options = self.own["inner_steps"], {**self.own, "head": head, "embedding": source}
        wrapped, settings = wrapped_as_it_is(
            type(self), model, keywords, defaults=self.defaults, head=head, own_steps=inner_steps
        )
        moved = moved_parts(parts or {}, wrapped.model)
        executor = Executor(settings.execution)
        super().__init__(wrapped, settings, keywords, executor=executor, parts=moved, options=options)
        leave_out_unsized(self)
        self.own_head = OwnHead(type(self).__name__, self.model, self.wrapped.run, head, flat=False)
        if self.own_head.head is not None:
            self.own_head.check_parameters()
            self._make_parts(None)

    @property
    def head(self) -> str | None:  # type: ignore[override]
        """The name of the module that is fitted; None before the first task."""
        return self.own_head.head

    @abstractmethod
    def _module(self, task: Task, norm: str, steps: int) -> nn.Module:
        """A plain module fitted to the task's support set."""

    def _make_parts(self, task: Task | None) -> None:
        """Makes parameters besides the network; called once the head is known, and with each mode's first task."""

    def _match_parts(self, stored: Mapping[str, Any]) -> None:
        """Makes the same parameters as a state_dict holds, whose keys are those of this learner."""

    def _by_classes(self, task: Task) -> bool:
        """Whether a task is trained through weights of its classes, and not through the outputs of a head."""
        return False

    def _check_head(self, task: Task) -> None:
        """Further checks of the head with the first task."""

    def _tuned_names(self) -> Iterable[str]:
        """The names of the parameters that the inner steps move."""
        return self.own_head.names().values() if self.own_head.head is not None else ()

    def meta_step(self, task_batch: Any) -> StepMetrics:
        """As in every method."""
        with undone_if_it_fails(self):
            return super().meta_step(task_batch)

    def forward(self, task_batch: Any) -> MetaOutput:
        """As in every method; parameters besides the network are made with the first task.

        Build an optimizer of your own after that, or use `learner.optimizer`.
        """
        self._in_training_forward = self.training
        try:
            with undone_if_it_fails(self):
                return super().forward(task_batch)
        finally:
            self._in_training_forward = False

    def _learn(self, *made: nn.Parameter) -> None:
        """Gives the outer optimizer new parameters, and takes from it those that are gone."""
        new = {id(parameter) for parameter in made if parameter.requires_grad}
        if self._in_training_forward and new:
            names = [name for name, parameter in self.named_parameters() if id(parameter) in new]
            warnings.warn(
                f"{type(self).__name__} makes {', '.join(names)} when it sees its first task: an optimizer of your own "
                "that was built before does not hold them, and they would never be learned. Use learner.optimizer, "
                "which does, or build yours afterwards.",
                MetaWrapWarning,
                stacklevel=2,
            )
        self.outer.follow(self.named_parameters(), made)

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
        """A plain module of the user's own class, in eval mode, fitted to one support set; the learner does not change.

        Its norms are ordinary ones: under norm="running" with the stored statistics, under "batch" without any (they
        use each batch's own), under "support" with the support set's.

        Args:
            support_x, support_y: one task's support set, (examples, ...).
            steps: inner steps; `inner_steps` if None; 0 for before adaptation.
            classes: the task's classes, whose outputs alone the module has: labels, or names; see `TaskClasses`.
            norm: batch-norm policy; the learner's own if None; after "batch", "support" suits single images.
        """
        return self._adapted_to(TaskClasses(classes, support_x, support_y, self.loss_fn), steps, norm)

    def _adapted_to(
        self, asked: TaskClasses, steps: int | None, norm: str | None, task_id: TaskId | None = None
    ) -> nn.Module:
        check_steps(steps)
        steps, policy = self.settings.inner_steps if steps is None else steps, policy_of(self, norm)
        with adapting(self, asked.task(id=task_id)) as task:
            return asked.cut(finished(self._module(task, policy, steps), task))

    def describe(self) -> Description:
        """What wrapping found and did."""
        tuned, rates = replace(self.wrapped, adapted=tuple(self._tuned_names())), getattr(self, "learning_rates", {})
        return describe_learner(self, settings=shown_settings(self), wrapped=tuned, rates=rates)

    def _prepare(self, task: Task) -> None:
        inspect_once(self, task, self._inspect)

    def _check_trainable(self, batch: TaskBatch) -> None:
        # Before the optimizer is asked for its parameters: the first task may make some.
        with autograd():
            self._prepare(usable(batch[0]))

    def _inspect(self, task: Task) -> FirstLook:
        own_head = self.own_head
        with own_head.found(task.support_x, needed=self.head_runs_alone):
            if own_head.head is not None:
                own_head.check_parameters()
                if self.head_runs_alone:
                    own_head.check_runs_alone(task.support_x, len(tensors_in(task.support_y)[0]))
                self._check_head(task)
            if self.head_runs_alone:
                prediction = own_head.module(own_head.of(task.support_x, "batch"))
                loss = partial(own_head.loss, self.loss_fn)
            else:
                prediction = self.wrapped.run(task.support_x, "batch", None)
                loss = partial(task_loss, self.loss_fn)
            if not self._by_classes(task):
                loss(prediction, task.support_y, "support")
            self._make_parts(task)
            if own_head.head is not None and not self.head_runs_alone:
                own_head.note_form(task.support_x)
        return FirstLook(without_part(self.model, prediction), differentiable=True)

    def get_extra_state(self) -> dict[str, Any]:
        """The counters and the head's name, for state_dict."""
        return super().get_extra_state() | {"head": self.head}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restores the counters, and the head's name where this learner has none yet."""
        super().set_extra_state(state)
        self.own_head.head = self.head or state.get("head")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        stored = under_prefix(prefix, state_dict)
        head = (stored.get("_extra_state") or {}).get("head")
        if self.head is None and head in dict(self.model.named_modules()):
            self.own_head.head = head
        self._match_parts(stored)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def under_prefix(prefix: str, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a state_dict whose keys start with a prefix, by the rest of each key."""
    return {key[len(prefix) :]: value for key, value in stored.items() if key.startswith(prefix)}


def plain_module(learner: Learner, weights: Mapping[str, Tensor], support_x: Inputs, norm: str) -> nn.Module:
    """A learner's network with these weights in place of its own, as a plain module in eval mode."""
    held = None
    if (context := passes_of(norm, training=False).context) is not None:
        with learner.wrapped.clock.at(0, context):
            FunctionalEngine(learner.model).call(weights, support_x)
        held = learner.wrapped.held(norm)
    return plain_copy(learner.model, weights, 0, held, keep_statistics=norm != "batch").eval()


def refuse_mask(learner: Learner, mask: bool | None) -> None:
    """Raises ArgumentError when a call asks to mask the head's outputs."""
    if mask is not None:
        raise ArgumentError(
            f"mask_unused_outputs: {type(learner).__name__} compares all outputs of the head, but got {shown(mask)}. "
            "Leave it out, and mask in loss_fn."
        )


@contextmanager
def undone_if_it_fails(learner: HeadLearner) -> Iterator[None]:
    """Takes back the parts that a failed call made, and its changes of the optimizer.

    A failure after the outer update takes nothing back.
    """
    optimizer, iteration, head, looks = learner.optimizer, learner.iteration, learner.head, dict(learner.findings)
    children = dict(learner._modules)
    own = [child for child in children.values() if child is not None and child is not learner.model]
    tables = [(part, dict(part._parameters)) for child in own for part in child.modules()]
    held = [(p, p.data, p.grad) for _, table in tables for p in table.values() if p is not None]
    groups = [dict(group) for group in optimizer.param_groups]
    state = {parameter: copy.copy(value) for parameter, value in optimizer.state.items()}
    try:
        yield
    except BaseException:
        if learner.iteration == iteration:
            learner.own_head.head, learner.findings = head, looks
            learner._modules.clear()
            learner._modules.update(children)
            for part, table in tables:
                part._parameters.clear()
                part._parameters.update(table)
            for parameter, data, gradient in held:
                parameter.grad = None  # It may have the other shape.
                parameter.data, parameter.grad = data, gradient
            for group, known in zip(optimizer.param_groups, groups, strict=True):
                group.update(known)
            # Entries of the present shape are right, or were restored already, with tensors of their own.
            for made in [p for p in optimizer.state if p not in state]:
                del optimizer.state[made]
            for owner, known in state.items():
                if _shapes(optimizer.state.get(owner, {})) != _shapes(known):
                    optimizer.state[owner] = known
        raise


def _shapes(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.shape if isinstance(value, Tensor) else None for key, value in state.items()}


def refuse_late_parts(learner: nn.Module) -> None:
    """Raises UnsupportedModuleError where parameters can no longer be made; call it before making them."""
    # torch's own compiler reads this marker, which is set during the wrapped module's forward.
    if DistributedDataParallel._get_active_ddp_module() is not None:  # type: ignore[no-untyped-call]
        raise UnsupportedModuleError(
            f"{type(learner).__name__} makes parameters when it sees its first task, and DistributedDataParallel does "
            "not follow parameters that are made after it. Use meta_step, or evaluate the learner on one task before "
            "you wrap it; one with a table of classes needs classes= for that."
        )
