"""Where the head stands when a task begins: as it was learned, at zero, at fresh random values, or as stored for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metawrap.errors import ArgumentError, MetaWrapError, TaskError
from metawrap.methods.solved import Solved
from metawrap.surgery.copying import duplicate
from metawrap.surgery.swap import parameter_slots
from metawrap.tasks import TaskId

Heads = dict[TaskId, dict[str, Tensor]]


class HeadStart(nn.Module):
    """`head_init="learned"`: the head starts from its meta-learned values, as every other module does.

    names: the head's adapted parameters, and what each is called inside the head; known after `find`.
    """

    kind = "learned"

    def __init__(self) -> None:
        super().__init__()
        self.head: str | None = None
        self.names: dict[str, str] = {}

    def find(self, model: nn.Module, head: str | None, adapted: Iterable[str]) -> None:
        """Called when the head's name is known."""

    def values(self, model: nn.Module, task_id: TaskId | None) -> Mapping[str, Tensor]:
        """Where the head's parameters start, by name, without gradient; those that are not named start as learned."""
        return {}

    def of_unwrapped(self, model: nn.Module) -> Mapping[str, Tensor]:
        """The same for a module that leaves the learner before any task."""
        return {}

    def check(self, task_id: TaskId | None) -> None:
        """Raises TaskError when a task cannot be trained on."""

    def adapted(self, fast: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What of a task's last fast weights is kept for it."""
        return {}

    def keep(self, solved: Iterable[Solved], applied: Tensor) -> None:
        """Keeps it, where the meta-step was applied."""


class _OwnStart(HeadStart):
    """A head that does not start as learned: it must be known, adapted, and share nothing with the body."""

    def find(self, model: nn.Module, head: str | None, adapted: Iterable[str]) -> None:
        """Learns which parameters are the head's.

        Raises:
            ArgumentError: the head cannot start in this way.
        """
        if self.head is not None:
            return
        asked = f'head_init="{self.kind}"'
        if head is None:
            raise ArgumentError(f"{asked}: no head was found by watching a forward pass. Name it with head=.")
        owner, slots = model.get_submodule(head), parameter_slots(model)
        inside = {id(module) for module in owner.modules()}
        names = [name for name in adapted if any(id(module) in inside for module, _ in slots[name])]
        if not names:
            raise ArgumentError(
                f"{asked}: the head '{head}' has no adapted parameter. Unfreeze it, name it in adapt=, or name another "
                "head with head=."
            )
        for name in names:
            if shared := [f"{type(m).__name__}.{local}" for m, local in slots[name] if id(m) not in inside]:
                raise ArgumentError(
                    f"{asked}: the head '{head}' shares '{name}' with {', '.join(shared)}, which must not start anew "
                    'with it. Give the head its own parameter, or use head_init="learned".'
                )
            self._check_owner(name, slots[name][0][0])
        local = {id(parameter): name for name, parameter in owner.named_parameters()}
        parameters = dict(model.named_parameters())
        self.head, self.names = head, {name: local[id(parameters[name])] for name in names}

    def _check_owner(self, name: str, owner: nn.Module) -> None:
        pass


class ZeroHead(_OwnStart):
    """`head_init="zeros"`: no output is preferred, whatever the order of the labels."""

    kind = "zeros"

    def values(self, model: nn.Module, task_id: TaskId | None) -> Mapping[str, Tensor]:
        """Zeros."""
        parameters = dict(model.named_parameters())
        return {name: torch.zeros_like(parameters[name]) for name in self.names}

    def of_unwrapped(self, model: nn.Module) -> Mapping[str, Tensor]:
        """Zeros too."""
        if self.head is None:
            raise MetaWrapError(
                'head_init="zeros": the head is not known before the first task. Pass head= to the constructor, or run '
                "a task first."
            )
        return self.values(model, None)


class RandomHead(_OwnStart):
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

    def _check_owner(self, name: str, owner: nn.Module) -> None:
        if not callable(getattr(owner, "reset_parameters", None)):
            raise ArgumentError(
                f"head_init=\"random\": {type(owner).__name__}, which owns '{name}', has no reset_parameters() to draw "
                'fresh values with. Give it one, or use head_init="zeros".'
            )


class StoredHead(_OwnStart):
    """`head_init="stored"`: as the task with this id left it when it was last trained on; the first time, as learned.

    stored: a head's parameters by name, by task id; saved in the learner's state_dict.
    """

    kind = "stored"

    def __init__(self) -> None:
        super().__init__()
        self.stored: Heads = {}

    def values(self, model: nn.Module, task_id: TaskId | None) -> Mapping[str, Tensor]:
        """The stored head, if there is one."""
        return {} if task_id is None else self.stored.get(task_id, {})

    def check(self, task_id: TaskId | None) -> None:
        """Raises TaskError when there is no id to store under."""
        if task_id is None:
            raise TaskError(
                'head_init="stored" keeps one head per task, but a task has no id. Pass a list of '
                "Task(support_x, support_y, target_x, target_y, id=...)."
            )

    def adapted(self, fast: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The head's fast weights."""
        return {name: fast[name].detach().clone() for name in self.names}

    def keep(self, solved: Iterable[Solved], applied: Tensor) -> None:
        """Stores each task's head. Waits for the device: a step that was skipped must leave the old ones."""
        if bool(applied):
            self.stored |= {one.task_id: one.head for one in solved if one.task_id is not None and one.head}

    def get_extra_state(self) -> dict[str, Heads]:
        """The stored heads, for state_dict."""
        return {"stored": self.stored}

    def set_extra_state(self, state: dict[str, Heads]) -> None:
        """Restores the stored heads."""
        self.stored = dict(state["stored"])

    def _apply(self, fn: Any, recurse: bool = True) -> StoredHead:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.stored = {key: {name: fn(value) for name, value in head.items()} for key, head in self.stored.items()}
        return self


HEAD_STARTS: dict[str, type[HeadStart]] = {start.kind: start for start in (HeadStart, ZeroHead, RandomHead, StoredHead)}
