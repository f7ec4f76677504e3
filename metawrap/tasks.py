"""Task and TaskBatch: what one episode is, and the checks on its shapes.

One task is a support set to adapt on and a target set to be judged on. A batch of them is accepted in three forms:
a `TaskBatch`, a tuple `(support_x, support_y, target_x, target_y)` with a leading task axis, or a list of tasks of
any sizes. Inputs (`x`) are a tensor, or a tuple or dict of tensors that reach the model as `model(*x)` or `model(**x)`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from numbers import Integral
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from metawrap.errors import ArgumentError, TaskError, is_array, shown

Inputs: TypeAlias = Tensor | tuple[Any, ...] | dict[str, Any]
TaskId: TypeAlias = str | int
Stacked: TypeAlias = tuple[Inputs, Tensor, Inputs, Tensor]


@dataclass(frozen=True, repr=False)
class Task:
    """One episode: inputs are (examples, ...), labels are (examples, ...); support and target sizes may differ.

    id: what the task is called where something is kept for it (`head_init="stored"`); None where nothing is.
    classes: what the labels 0..ways - 1 mean: the number of each one's class among all classes that tasks are drawn
    from, for methods that learn from the examples of all tasks at once; None where that is not known.
    """

    support_x: Inputs
    support_y: Any
    target_x: Inputs
    target_y: Any
    id: TaskId | None = None
    classes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.classes is not None:
            object.__setattr__(self, "classes", _class_numbers(self.classes))
        if isinstance(self.id, Integral) and not isinstance(self.id, bool):
            object.__setattr__(self, "id", int(self.id))  # numpy's whole numbers, too
        elif self.id is not None and not isinstance(self.id, str):
            raise TaskError(f"id: expected a string or a whole number, but got {describe_value(self.id)}.")
        for part in ("support", "target"):
            _check_same_length(part, getattr(self, f"{part}_x"), getattr(self, f"{part}_y"))

    def __repr__(self) -> str:
        known = [f"{name}={value!r}" for name in ("id", "classes") if (value := getattr(self, name)) is not None]
        names = [(f"{part}_x", f"{part}_y") for part in ("support", "target")]
        lines = [", ".join(f"{name}: {shown(getattr(self, name))}" for name in pair) for pair in names]
        return "\n".join([f"Task({', '.join(known)})", *lines])

    def map(self, change: Callable[[Tensor], Tensor]) -> Task:
        """The same task with `change` applied to every tensor."""
        names = ("support_x", "support_y", "target_x", "target_y")
        return replace(self, **{name: map_tensors(getattr(self, name), change) for name in names})

    def to(self, *args: Any, **kwargs: Any) -> Task:
        """The same task on another device or with other floats, with the arguments of `Tensor.to`.

        Whole numbers, such as labels and token ids, stay whole numbers, as in `nn.Module.to`.
        """

        def moved(tensor: Tensor) -> Tensor:
            found = tensor.to(*args, **kwargs)
            return tensor.to(found.device) if found.is_floating_point() > tensor.is_floating_point() else found

        return self.map(moved)

    def parts(self) -> tuple[Inputs, Any, Inputs, Any]:
        """Support and target set, in the order of the constructor."""
        return self.support_x, self.support_y, self.target_x, self.target_y


@dataclass(frozen=True, repr=False)
class TaskBatch:
    """Tasks that one meta-step averages over. Iterate over it, index it, or take its `len`."""

    tasks: tuple[Task, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.tasks, tuple | list) or not all(isinstance(task, Task) for task in self.tasks):
            raise TaskError(
                f"tasks: expected a tuple of Task, but got {describe_value(self.tasks)}. Four parts with a leading "
                "task axis are written TaskBatch.stacked(support_x, support_y, target_x, target_y)."
            )
        if not self.tasks:
            raise TaskError("The task batch holds 0 tasks, expected at least 1.")
        object.__setattr__(self, "tasks", tuple(self.tasks))

    def __repr__(self) -> str:
        first = "tasks, the first with" if len(self) > 1 else "task with"
        return "\n".join([f"TaskBatch of {len(self)} {first}", *repr(self[0]).split("\n")[1:]])

    @classmethod
    def stacked(
        cls,
        support_x: Inputs,
        support_y: Any,
        target_x: Inputs,
        target_y: Any,
        classes: Sequence[Sequence[int]] | None = None,
    ) -> TaskBatch:
        """From four parts with a leading task axis: x is (tasks, examples, ...), y is (tasks, examples, ...).

        Args:
            classes: `Task.classes` of each task.
        Raises:
            TaskError: a part has no task axis, or the parts disagree on the number of tasks.
        """
        parts = {"support_x": support_x, "support_y": support_y, "target_x": target_x, "target_y": target_y}
        counts = {name: _task_count(name, part) for name, part in parts.items()}
        if len(set(counts.values())) != 1:
            raise TaskError(
                f"All four parts must have the same number of tasks on their first axis, but got {counts}. "
                "For tasks of different sizes pass a list of Task(...)."
            )
        tasks = counts["support_x"]
        if classes is not None and (not isinstance(classes, Sequence) or len(classes) != tasks):
            raise TaskError(
                f"classes: expected a sequence for each of {tasks} tasks, but got {describe_value(classes)}."
            )
        pieces = [
            Task(
                *(map_tensors(part, lambda tensor, i=index: tensor[i]) for part in parts.values()),  # type: ignore[misc]
                classes=None if classes is None else classes[index],  # type: ignore[arg-type]
            )
            for index in range(tasks)
        ]
        return cls(tuple(pieces))

    def to(self, *args: Any, **kwargs: Any) -> TaskBatch:
        """The same tasks on another device or with other floats, as `Task.to`."""
        return TaskBatch(tuple(task.to(*args, **kwargs) for task in self.tasks))

    def pin_memory(self) -> TaskBatch:
        """The same tasks in page-locked memory; `DataLoader(pin_memory=True)` asks for it."""
        return TaskBatch(tuple(task.map(Tensor.pin_memory) for task in self.tasks))

    def chunks(self, size: int) -> Iterator[tuple[Task, ...]]:
        """The tasks in order, `size` at a time.

        Raises:
            ArgumentError: size is no whole number of at least 1.
        """
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ArgumentError(f"size: expected a whole number of at least 1, but got {describe_value(size)}.")
        for start in range(0, len(self.tasks), size):
            yield self.tasks[start : start + size]

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __getitem__(self, index: int) -> Task:
        return self.tasks[index]


def as_task_batch(batch: Any) -> TaskBatch:
    """Reads any accepted form of a task batch.

    Raises:
        TaskError: the form is none of those that the module docstring lists, or its shapes disagree.
    """
    if isinstance(batch, TaskBatch):
        return batch
    if isinstance(batch, Task):
        return TaskBatch((batch,))
    if is_stacked(batch):
        return TaskBatch.stacked(*batch)
    if isinstance(batch, Sequence) and batch and all(_is_task(item) for item in batch):
        return TaskBatch(tuple(item if isinstance(item, Task) else Task(*item) for item in batch))
    raise TaskError(
        "task_batch: expected a TaskBatch, a tuple (support_x, support_y, target_x, target_y) with a leading task "
        f"axis, or a list of Task, but got {describe_value(batch)}."
    )


def map_tensors(value: Any, change: Callable[[Tensor], Any], other: Callable[[Any], Any] = lambda value: value) -> Any:
    """Applies `change` to tensors in tuples, lists, dicts, dataclasses, objects with `logits`; `other` to all else."""
    again = partial(map_tensors, change=change, other=other)
    if isinstance(value, Tensor):
        return change(value)
    named = value.get("logits") if isinstance(value, Mapping) else getattr(value, "logits", None)
    record = is_dataclass(value) and not isinstance(value, type)
    if record or (isinstance(named, Tensor) and hasattr(value, "__dict__") and not isinstance(value, tuple | dict)):
        names = [part.name for part in fields(value)] if record else vars(value)
        changes = {name: again(getattr(value, name)) for name in names}
        if isinstance(value, dict):  # Outputs of transformers, which hold each field a second time, as an item.
            return type(value)(**changes)
        changed = copy.copy(value)
        for name, part in changes.items():
            object.__setattr__(changed, name, part)
        return changed
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(again, value))
    if isinstance(value, tuple | list):
        return type(value)(map(again, value))
    if isinstance(value, dict):
        return type(value)((key, again(item)) for key, item in value.items())
    return other(value)


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor inside nested tuples, lists and dicts, in order."""
    found: list[Tensor] = []
    map_tensors(value, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def call_model(model: Any, inputs: Any) -> Any:
    """`model(x)`, `model(*x)` for a tuple (or a list: a DataLoader makes one of it), `model(**x)` for a dict."""
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def describe_value(value: Any) -> str:
    """A short account of a value for error messages."""
    if isinstance(value, list | tuple):
        inside = ", ".join(sorted({type(item).__name__ for item in value}))
        return f"a {type(value).__name__} of {len(value)} ({inside or 'empty'})"
    return shown(value) if is_array(value) else f"{type(value).__name__} {shown(value)}"


def is_stacked(batch: Any) -> bool:
    """Whether a batch has the form of four parts with a leading task axis."""
    # A list, too: a DataLoader makes one of the tuple that it collates.
    if not isinstance(batch, tuple | list) or len(batch) != 4 or any(isinstance(p, Task | TaskBatch) for p in batch):
        return False
    return not all(isinstance(part, tuple | list) and len(part) == 4 for part in batch)


def _is_task(item: Any) -> bool:
    return isinstance(item, Task) or (isinstance(item, tuple) and len(item) == 4)


def _class_numbers(classes: Any) -> tuple[int, ...]:
    found = tuple(classes) if isinstance(classes, Sequence) else ()
    if (
        not found
        or not all(isinstance(one, Integral) and not isinstance(one, bool) and int(one) >= 0 for one in found)
        or len(set(found)) != len(found)
    ):
        raise TaskError(
            "classes: expected the number of each label's class, different whole numbers of at least 0, but got "
            f"{describe_value(classes)}."
        )
    return tuple(int(one) for one in found)  # numpy's whole numbers, too


def _lengths(value: Any) -> set[int]:
    if isinstance(value, tuple | list) and value and all(isinstance(item, dict) for item in value):
        return {len(value)}  # A dict for each example, as detectors take: it may hold any number of boxes.
    return {len(tensor) if tensor.ndim else 0 for tensor in tensors_in(value)}


def _task_count(name: str, part: Any) -> int:
    tensors = tensors_in(part)
    if not tensors or any(tensor.ndim < 2 for tensor in tensors):
        raise TaskError(
            f"{name}: expected tensors of shape (tasks, examples, ...), but got {describe_value(part)}. "
            "A single task is written Task(support_x, support_y, target_x, target_y)."
        )
    counts = _lengths(part)
    if len(counts) != 1:
        raise TaskError(f"{name}: its tensors disagree on the number of tasks: {sorted(counts)}.")
    return counts.pop()


def _check_same_length(part: str, x: Any, y: Any) -> None:
    if not tensors_in(x):
        raise TaskError(f"{part}_x: expected a tensor, or a tuple or dict of tensors, but got {describe_value(x)}.")
    if not tensors_in(y):
        raise TaskError(f"{part}_y: expected a tensor, but got {describe_value(y)}.")
    lengths = _lengths(y)
    if isinstance(x, Tensor):
        lengths |= _lengths(x)
    if 0 in lengths:
        raise TaskError(f"{part}: expected at least 1 example, but {part}_x or {part}_y has 0.")
    if isinstance(x, Tensor) and len(lengths) != 1:
        raise TaskError(
            f"{part}_x has {len(x)} examples and {part}_y has {sorted(_lengths(y))}; expected one label per example."
        )


def copy_of(tensor: Tensor) -> Tensor:
    """A copy without the graph that leads to the tensor; it requires a gradient if the tensor does."""
    return tensor.detach().requires_grad_(tensor.requires_grad).clone()


def usable(task: Task) -> Task:
    """The task with its inference-mode tensors cloned, as a backward pass cannot save such tensors."""
    return task.map(lambda tensor: tensor.clone() if tensor.is_inference() else tensor)


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's parameters."""
    # Of a learner too: its own method would list all of them, and wait for other threads.
    return next(nn.Module.named_parameters(module))[1].device
