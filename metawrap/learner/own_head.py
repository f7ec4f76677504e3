"""Methods that keep the user's own head: task -> embeddings -> gradient steps on the head alone, or on all of it.

What they share: the head is found and looked at once, its parameters are replaced by other values in place, and what
they learn besides the network is made when it is known how large it must be.
"""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from metawrap.checks.first_look import FirstLook, without_part
from metawrap.engines.functional import FunctionalEngine
from metawrap.errors import ArgumentError, MetaWrapWarning, UnsupportedModuleError
from metawrap.heads.fitted import FittedHead
from metawrap.inner_loop.outcome import autograd, usable
from metawrap.layers.learning_rates import LearningRates
from metawrap.layers.per_step_norm import PerStepNorm
from metawrap.learner.describing import describe_learner
from metawrap.learner.description import Description
from metawrap.learner.direct import Parts
from metawrap.learner.embedding_learner import Embedded, EmbeddedKeywords
from metawrap.results import MetaOutput, StepMetrics
from metawrap.settings.settings import TunedSettings
from metawrap.surgery.inspect import find_head
from metawrap.surgery.swap import parameter_slots, plain_copy
from metawrap.tasks import Inputs, Task, TaskBatch, tensors_in


class OwnHead(Embedded):
    """A method on an embedding that fits the user's own head to a support set by gradient steps.

    Embeddings reach the head as the network gives them, and labels are whatever the loss takes.
    """

    settings: TunedSettings
    flat: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        keywords: EmbeddedKeywords,
        *,
        inner_steps: int,
        options: Mapping[str, Any],
        parts: Parts | None = None,
    ) -> None:
        if keywords.get("embedding", "head_input") != "head_input":
            raise ArgumentError(
                f"embedding: {type(self).__name__} fits the head of the network itself, so that only 'head_input' "
                f"makes sense, but got {keywords['embedding']!r}. Leave it out; head= names the head."
            )
        self._in_forward = False
        super().__init__(model, keywords, options=options, parts=parts, own_steps=inner_steps)
        if self._head is not None:
            self._refuse_shared(self._head)
            self._make_parts(None)

    @abstractmethod
    def _module(self, task: Task, norm: str, steps: int) -> nn.Module:
        """A plain module fitted to the task's support set."""

    def _make_parts(self, task: Task | None) -> None:
        """Makes what is learned besides the network; called when the head is known, and with each mode's first task."""

    def _make_room(self, stored: Mapping[str, Any]) -> None:
        """The same, as a state_dict has it: the keys of this learner."""

    def _own_outputs(self, task: Task) -> bool:
        """Whether the task's labels are those of the network's own outputs."""
        return True

    def _solves_by_head(self) -> bool:
        """Whether the head is run by itself, on embeddings."""
        return True

    def _fitted(self, support: Tensor, labels: Tensor, ways: int) -> FittedHead:
        raise NotImplementedError("The head is the user's own.")

    def _own_head(self) -> nn.Module:
        assert self._head is not None
        return self.model.get_submodule(self._head)

    def _full_names(self, *, all: bool = False) -> dict[str, str]:
        """The name in the network of each of the head's parameters that are not frozen, by its name in the head.

        all: the frozen ones, too.
        """
        full = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return {local: full[id(p)] for local, p in self._own_head().named_parameters() if all or p.requires_grad}

    def meta_step(self, task_batch: Any) -> StepMetrics:
        """See `Method.meta_step`."""
        with self._undone_if_it_fails():
            return super().meta_step(task_batch)

    def forward(self, task_batch: Any) -> MetaOutput:
        """See `Method.forward`. What is learned besides the network is made with the first task.

        So an optimizer of your own is to be built after that, or use `learner.optimizer`.
        """
        self._in_forward = True
        try:
            with self._undone_if_it_fails():
                return super().forward(task_batch)
        finally:
            self._in_forward = False

    @contextmanager
    def _undone_if_it_fails(self) -> Iterator[None]:
        """Takes back what a call makes besides the network, and in the optimizer; not once the outer update is made."""
        optimizer, iteration, head, looks = self.optimizer, self.iteration, self._head, dict(self._looks)
        children = dict(self._modules)
        own = [child for child in children.values() if child is not None and child is not self.model]
        tables = [(part, dict(part._parameters)) for child in own for part in child.modules()]
        held = [(p, p.data, p.grad) for _, table in tables for p in table.values() if p is not None]
        groups = [dict(group) for group in optimizer.param_groups]
        state = {parameter: copy.copy(value) for parameter, value in optimizer.state.items()}
        try:
            yield
        except BaseException:
            if self.iteration == iteration:
                self._head, self._looks = head, looks
                self._modules.clear()
                self._modules.update(children)
                for part, table in tables:
                    part._parameters.clear()
                    part._parameters.update(table)
                for parameter, data, gradient in held:
                    parameter.grad = None  # It may be of the other shape.
                    parameter.data, parameter.grad = data, gradient
                for group, known in zip(optimizer.param_groups, groups, strict=True):
                    group.update(known)
                optimizer.state.clear()
                optimizer.state.update(state)
            raise

    def _refuse_late(self) -> None:
        """Raises UnsupportedModuleError where what is learned cannot be made any more; call it before making it."""
        # The marker that torch's own compiler goes by: it is set for the time of the wrapped module's forward.
        if DistributedDataParallel._get_active_ddp_module() is not None:  # type: ignore[no-untyped-call]
            raise UnsupportedModuleError(
                f"{type(self).__name__} makes parameters when it sees its first task, and DistributedDataParallel does "
                "not follow what is made after it. Use meta_step, or evaluate the learner on one task before you wrap "
                "it; one with a table of classes needs classes= for that."
            )

    def _learn(self, *made: nn.Parameter) -> None:
        """Gives the outer optimizer parameters that were made after it, and takes from it those that are gone."""
        new = {id(parameter) for parameter in made if parameter.requires_grad}
        if self._in_forward and self.training and new:
            names = [name for name, parameter in self.named_parameters() if id(parameter) in new]
            warnings.warn(
                f"{type(self).__name__} makes {', '.join(names)} when it sees its first task: an optimizer of your own "
                "that was built before does not hold them, and they would never be learned. Use learner.optimizer, "
                "which does, or build yours afterwards.",
                MetaWrapWarning,
                stacklevel=2,
            )
        self.outer.follow(self.named_parameters(), made)

    def adapt(self, support_x: Inputs, support_y: Any, steps: int | None = None) -> nn.Module:
        """A plain module of the user's own class, in eval mode, fitted to one support set; changes nothing here.

        Its norms are ordinary ones: under norm="running" with the stored statistics, under "batch" without any (they
        use each batch's own), under "support" with the support set's.

        Args:
            support_x, support_y: one task's support set, (examples, ...).
            steps: inner steps; `inner_steps` if None; 0 for before adaptation.
        """
        return self._adapted_to(Task(support_x, support_y, support_x, support_y), steps)

    def _adapted_to(self, task: Task, steps: int | None) -> nn.Module:
        steps = self.settings.inner_steps if steps is None else self._checked_steps(steps)
        with self._adapting(task) as task:
            return self._finished(self._module(task, self.settings.norm, steps), task)

    def _plain(self, weights: Mapping[str, Tensor], support_x: Inputs, norm: str) -> nn.Module:
        """The network with these weights in place of its own, as a plain module in eval mode."""
        held = None
        if norm == "support":
            with self.wrapped.clock.at(0, "capture"):
                FunctionalEngine(self.model).call(weights, support_x)
            held = self.wrapped.clock.taken()
        return plain_copy(self.model, weights, 0, held, keep_statistics=norm != "batch").eval()

    def describe(self) -> Description:
        """What wrapping found and did."""
        names = self._tuned_names() if self._head is not None else ()
        rates = getattr(self, "learning_rates", None)
        return describe_learner(
            self,
            wrapped=replace(self.wrapped, adapted=tuple(names)),
            head=self.head,
            looks=self._looks,
            settings=self._shown_settings(),
            warnings=self._warnings(),
            rates=rates if isinstance(rates, LearningRates) else {},
        )

    def _tuned_names(self) -> Iterable[str]:
        return self._full_names().values()

    def _check_trainable(self, batch: TaskBatch) -> None:
        # Before the optimizer is asked for its parameters: what the first task shows may make some.
        with autograd():
            self._prepare(usable(batch[0]))

    def _refuse_mask(self, mask: bool | None) -> None:
        if mask is not None:
            raise ArgumentError(
                f"mask_unused_outputs: {type(self).__name__} judges all outputs of the head, but got {mask!r}. Leave "
                "it out, and mask in loss_fn."
            )

    def _look(self, task: Task) -> FirstLook:
        before = self._head
        try:
            if before is None:
                self._head = self._needed_head(task)
            if self._head is not None:
                self._refuse_shared(self._head)
                self._refuse_unfit(self._head, task)
            prediction = self._run(task.support_x, "batch", None)
            if self._own_outputs(task):
                self._loss(prediction, task.support_y, "support")
            self._make_parts(task)
        except BaseException:
            self._head = before
            raise
        return FirstLook(without_part(self.model, prediction), differentiable=True)

    def _needed_head(self, task: Task) -> str | None:
        return self._found_head(task)

    def _found_head(self, task: Task) -> str:
        head, exact = find_head(self.model, lambda: self._run(task.support_x, "batch", None))
        name = type(self).__name__
        if head is None or not exact:
            raise UnsupportedModuleError(
                "No module's output is the prediction itself, so the head, and with it the embedding, is not known for "
                f"sure (the last module that ran is '{head}'). Name the head with head=."
            )
        if head == "":
            raise UnsupportedModuleError(
                f"The whole network is one {type(self.model).__name__}: nothing is embedded before it, and {name} "
                "would fit all of it. Use MAML for that."
            )
        return head

    def _refuse_shared(self, head: str) -> None:
        """Raises UnsupportedModuleError when the head has nothing to fit, or shares it with the body."""
        owner = self.model.get_submodule(head)
        if not any(p.requires_grad for p in owner.parameters()):
            raise UnsupportedModuleError(
                f"The head '{head}' ({type(owner).__name__}) has no parameters that are not frozen, so "
                f"{type(self).__name__} has nothing to fit. Unfreeze it, or name another module with head=."
            )
        inside = {id(module) for module in owner.modules()}
        slots = parameter_slots(self.model)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for parameter in owner.parameters():
            others = [f"{type(m).__name__}.{local}" for m, local in slots[names[id(parameter)]] if id(m) not in inside]
            if others:
                raise UnsupportedModuleError(
                    f"The head '{head}' shares '{names[id(parameter)]}' with {', '.join(others)}, which must not be "
                    "fitted with it. Give the head a parameter of its own."
                )

    def _refuse_unfit(self, head: str, task: Task) -> None:
        """Raises UnsupportedModuleError when the head cannot be run by itself, on embeddings."""
        if not self._solves_by_head():
            return
        owner, calls = self.model.get_submodule(head), []
        if norms := [name for name, m in owner.named_modules() if isinstance(m, PerStepNorm)]:
            raise UnsupportedModuleError(
                f"The head '{head}' holds the batch norm '{norms[0]}', which would normalise at every inner step by "
                "other statistics. Name what comes behind it with head=, or leave it alone with "
                'wrapping={"keep_norm": ...}.'
            )

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls.append((len(args) + len(kwargs), output))

        handle = owner.register_forward_hook(note, with_kwargs=True)
        try:
            prediction = self._run(task.support_x, "batch", None)
        finally:
            handle.remove()
        embedded = self._embedded(task.support_x, "batch")
        if calls[0][0] != 1:
            raise UnsupportedModuleError(
                f"The head '{head}' is called with {calls[0][0]} arguments, but it is fitted on embeddings alone. "
                "Name a module that takes one tensor with head=."
            )
        if calls[0][1] is not prediction:
            raise UnsupportedModuleError(
                f"The network does more behind the head '{head}': its prediction is not the head's own output, which "
                f"is what {type(self).__name__} fits. Name the last module with head=, or move what follows into "
                "the loss."
            )
        if len(embedded) != len(_first(task.support_y)):
            raise UnsupportedModuleError(
                f"The embedding has {len(embedded)} rows for {len(_first(task.support_y))} support examples: expected "
                "one for each."
            )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        stored = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        head = (stored.get("_extra_state") or {}).get("head")
        if self._head is None and head in dict(self.model.named_modules()):
            self._head = head
        self._make_room(stored)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _first(y: Any) -> Tensor:
    return tensors_in(y)[0]
