"""iterate_task_batches: task batches, one by one, from one batch, a list, a sampler or a data loader."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from metawrap.errors import TaskError
from metawrap.tasks import Stacked, Task, TaskBatch, describe_value, is_stacked


def iterate_task_batches(tasks: Any) -> Iterator[Any]:
    """Task batches, each in an accepted form, from one or from any iterable of them (a sampler, a data loader).

    A plain list of four-tuples could mean single tasks or stacked batches. It is read as whichever the shapes
    prove, and refused when they prove neither. So is an iterable that is known to be endless; a generator may be.
    """
    if _is_endless(tasks):
        some = "tasks.batches(100)" if hasattr(tasks, "batches") else "itertools.islice(tasks, 100)"
        raise TaskError(f"tasks: {type(tasks).__name__} never ends. Pass as many batches as you mean: {some}.")
    listed = isinstance(tasks, Sequence) and tasks and all(isinstance(item, Task) for item in tasks)
    if listed or isinstance(tasks, TaskBatch | Task) or is_stacked(tasks):
        yield tasks
        return
    if not isinstance(tasks, Iterable):
        raise TaskError(
            f"tasks: expected a task batch or an iterable of task batches, but got {describe_value(tasks)}."
        )
    for item in tasks:
        bare = isinstance(tasks, list) and isinstance(item, tuple) and len(item) == 4
        yield [item] if bare and _is_single_task(item) else item


def endless(iterate: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Marks an `__iter__` whose iterator never ends, so that a call which takes all of it refuses."""
    iterate.endless = True  # type: ignore[attr-defined]
    return iterate


def _is_endless(tasks: Any) -> bool:
    if isinstance(tasks, DataLoader):
        return any(map(_is_endless, (tasks.dataset, tasks.batch_sampler)))
    if isinstance(tasks, itertools.repeat):
        return operator.length_hint(tasks, -1) < 0
    endless_iter = getattr(getattr(type(tasks), "__iter__", None), "endless", False)
    return endless_iter or isinstance(tasks, itertools.count | itertools.cycle)


def _is_single_task(item: Stacked) -> bool:
    support, target = item[1], item[3]
    if not (isinstance(support, Tensor) and isinstance(target, Tensor)):
        raise TaskError(_AMBIGUOUS)
    if support.ndim < 2 or len(support) != len(target):
        return True
    if support.is_floating_point():
        raise TaskError(_AMBIGUOUS)
    return False


_AMBIGUOUS = (
    "tasks: a list of bare four-tuples can mean single tasks or stacked batches, and these shapes prove neither. "
    "Write Task(*parts) for a single task or TaskBatch.stacked(*parts) for a batch."
)
