"""Where the head stands when a task begins: as it was learned, at zero, at fresh random values, or as stored for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from metawrap.errors import ArgumentError, MetaWrapError, TaskError
from metawrap.inner_loop.inner_loop import FastWeights, InnerLoop
from metawrap.results import TaskOutcome
from metawrap.surgery.copying import duplicate
from metawrap.surgery.swap import parameter_slots
from metawrap.tasks import Task, TaskId

Heads = dict[TaskId, dict[str, Tensor]]


class HeadStart(nn.Module):
    """`head_init="learned"`: the head starts from its meta-learned values, as every other module does.

    names: the head's adapted parameters, and what each is called inside the head; known after `find`.
    reads_support: whether the support set decides where the head starts.
    """

    kind = "learned"
    reads_support = False

    def __init__(self) -> None:
        super().__init__()
        self.head: str | None = None
        self.names: dict[str, str] = {}

    def find(self, model: nn.Module, head: str | None, adapted: Iterable[str]) -> None:
        """Called when the head's name is known."""

    def values(self, model: nn.Module, task_id: TaskId | None) -> Mapping[str, Tensor]:
        """Where the head's parameters start, by name; those that are not named start as learned."""
        return {}

    def of_support(self, loop: InnerLoop, initial: Callable[[], FastWeights], ignored: int) -> Mapping[str, Tensor]:
        """Where those start that the support set of the loop's task, or of each of its tasks, decides.

        Args:
            initial: makes the initial fast weights anew. ignored: the label that is left out.
        """
        return {}

    def of_unwrapped(self, model: nn.Module) -> Mapping[str, Tensor]:
        """The same for a module that leaves the learner before any task."""
        return {}

    def check(self, task: Task, ignored: int, masked: bool) -> None:
        """Raises TaskError when a task cannot be trained on. Args: masked: whether unused outputs are."""

    def adapted(self, fast: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What of a task's last fast weights is kept for it."""
        return {}

    def keep(self, solved: Iterable[TaskOutcome], applied: Tensor) -> None:
        """Keeps it, where the meta-step was applied."""


def head_parameters(asked: str, model: nn.Module, head: str | None, adapted: Iterable[str]) -> list[str]:
    """The adapted parameters of a head.

    Args:
        asked: what needs the head, for errors. head: its name; None where it is not known for sure.
    Raises:
        ArgumentError: it is not known, or shares such a parameter with the body.
    """
    if head is None:
        raise ArgumentError(
            f"{asked}: no module's output is the prediction itself, so the head is not known for sure. Name it "
            "with head=."
        )
    slots, inside = parameter_slots(model), {id(module) for module in model.get_submodule(head).modules()}
    names = [name for name in adapted if any(id(module) in inside for module, _ in slots[name])]
    for name in names:
        if shared := [f"{type(m).__name__}.{local}" for m, local in slots[name] if id(m) not in inside]:
            raise ArgumentError(
                f"{asked}: the head '{head}' shares '{name}' with {', '.join(shared)}, which are no part of it. Give "
                'the head its own parameter, or use MAML with outputs={"head_init": "learned"}.'
            )
    return names


class OwnStart(HeadStart):
    """A head that does not start as learned: it must be known, adapted, and share nothing with the body.

    alike: whether it starts alike in every task.
    """

    alike = False

    def find(self, model: nn.Module, head: str | None, adapted: Iterable[str]) -> None:
        """Learns which parameters are the head's.

        Raises:
            ArgumentError: the head cannot start in this way.
        """
        if self.head is not None:
            return
        asked = f'head_init="{self.kind}"'
        names = head_parameters(asked, model, head, adapted)
        if not names:
            raise ArgumentError(
                f"{asked}: the head '{head}' has no adapted parameter. Unfreeze it, name it in adapt=, or name another "
                "head with head=."
            )
        owner, slots = model.get_submodule(str(head)), parameter_slots(model)
        local = {id(parameter): name for name, parameter in owner.named_parameters()}
        parameters = dict(model.named_parameters())
        self._check_owners({name: slots[name][0][0] for name in names})
        self.head, self.names = head, {name: local[id(parameters[name])] for name in names}

    def _check_owners(self, owners: Mapping[str, nn.Module]) -> None:
        """Raises ArgumentError when the module that owns a parameter cannot start in this way."""

    def of_unwrapped(self, model: nn.Module) -> Mapping[str, Tensor]:
        """The same where every task starts alike."""
        if self.alike and self.head is None:
            raise MetaWrapError(
                f'outputs.head_init="{self.kind}": the head is not known before the first task. Pass head= to the '
                "constructor or run a task first."
            )
        return self.values(model, None) if self.alike else {}

    def _refuse_several_layers(self, owners: Mapping[str, nn.Module], reason: str) -> None:
        """Raises ArgumentError unless the head is one layer, all of it adapted."""
        self._refuse_reparametrized(owners)
        if len({id(owner) for owner in owners.values()}) > 1:
            raise ArgumentError(
                f'head_init="{self.kind}": the head holds several layers, with {", ".join(owners)}. {reason} Name its '
                'last layer with head=, or use outputs={"head_init": "random"}.'
            )
        for owner in owners.values():
            if left := [name for name, _ in owner.named_parameters(recurse=False) if not _ends(owners, name)]:
                raise ArgumentError(
                    f'head_init="{self.kind}": {", ".join(left)} of the head is not adapted, and would keep its value. '
                    'Adapt all of the head, or use outputs={"head_init": "learned"}.'
                )

    def _refuse_reparametrized(self, owners: Mapping[str, nn.Module]) -> None:
        for name, owner in owners.items():
            if isinstance(owner, ParametrizationList) or owner._forward_pre_hooks:
                raise ArgumentError(
                    f"head_init={self.kind!r}: {type(owner).__name__}, which owns '{name}', computes a weight from its "
                    "parameters (weight_norm, spectral_norm, a pre-hook): they cannot start anew by themselves. Use "
                    'outputs={"head_init": "learned"} or "stored", or a plain head.'
                )


class ZeroHead(OwnStart):
    """`head_init="zeros"`: no output is preferred, whatever the order of the labels.

    Of one layer, all of it adapted: a product of zeros has no gradient, and would stay zero for ever.
    """

    kind = "zeros"
    alike = True

    def _check_owners(self, owners: Mapping[str, nn.Module]) -> None:
        self._refuse_several_layers(owners, "Products of zeros have no gradient: it would stay zero for ever.")

    def values(self, model: nn.Module, task_id: TaskId | None) -> Mapping[str, Tensor]:
        """Zeros."""
        parameters = dict(model.named_parameters())
        return {name: torch.zeros_like(parameters[name]) for name in self.names}


def _ends(names: Iterable[str], local: str) -> bool:
    return any(name.rpartition(".")[2] == local for name in names)


class RandomHead(OwnStart):
    """`head_init="random"`: drawn anew for each task by the head's own `reset_parameters`.

    From torch's global generator, as dropout draws.
    """

    kind = "random"

    def values(self, model: nn.Module, task_id: TaskId | None) -> Mapping[str, Tensor]:
        """Fresh values at each call."""
        assert self.head is not None
        fresh = duplicate(model.get_submodule(self.head))
        slots = parameter_slots(fresh)
        owners: dict[int, Any] = {id(module): module for name in self.names.values() for module, _ in slots[name]}
        for module in owners.values():
            module.reset_parameters()
        drawn = dict(fresh.named_parameters())
        return {name: drawn[local].detach() for name, local in self.names.items()}

    def _check_owners(self, owners: Mapping[str, nn.Module]) -> None:
        self._refuse_reparametrized(owners)
        for name, owner in owners.items():
            if not callable(getattr(owner, "reset_parameters", None)):
                raise ArgumentError(
                    f"head_init=\"random\": {type(owner).__name__}, which owns '{name}', has no reset_parameters() to "
                    'draw fresh values with. Give it one, or use outputs={"head_init": "zeros"}.'
                )


class StoredHead(OwnStart):
    """`head_init="stored"`: as the task with this id left it when it was last trained on; the first time, as learned.

    stored: a head's parameters by name, by task id; saved in the learner's state_dict.
    """

    kind = "stored"

    def __init__(self) -> None:
        super().__init__()
        self.stored: Heads = {}

    def values(self, model: nn.Module, task_id: TaskId | None) -> Mapping[str, Tensor]:
        """The stored head, if there is one, where the model is now and in its dtype."""
        parameters = dict(model.named_parameters())
        stored = {} if task_id is None else self.stored.get(task_id, {})
        return {name: value.to(parameters[name]) for name, value in stored.items()}

    def check(self, task: Task, ignored: int, masked: bool) -> None:
        """Raises TaskError when there is no id to store under."""
        if task.id is None:
            raise TaskError(
                'outputs.head_init="stored" keeps one head per task, but a task has no id. Pass a list of '
                "Task(support_x, support_y, target_x, target_y, id=...)."
            )

    def adapted(self, fast: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The head's fast weights."""
        return {name: fast[name].detach().clone() for name in self.names}

    def keep(self, solved: Iterable[TaskOutcome], applied: Tensor) -> None:
        """Stores each task's head. Waits for the device: what was skipped or is not finite must leave the old ones."""
        for one in solved if bool(applied) else ():
            if one.task_id is not None and all(bool(value.isfinite().all()) for value in one.head.values()):
                self.stored[one.task_id] = one.head

    def get_extra_state(self) -> dict[str, Heads]:
        """The stored heads, for state_dict."""
        return {"stored": {key: dict(head) for key, head in self.stored.items()}}

    def set_extra_state(self, state: dict[str, Heads]) -> None:
        """Restores the stored heads."""
        self.stored = dict(state["stored"])

    def _apply(self, fn: Any, recurse: bool = True) -> StoredHead:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.stored = {key: {name: fn(value) for name, value in head.items()} for key, head in self.stored.items()}
        return self
