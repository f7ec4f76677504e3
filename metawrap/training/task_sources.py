"""The tasks of a run: training tasks batch by batch, and the fixed tasks of validation and test.

An `EpisodeSampler` is both. `BatchStream` and `ListedTasks` make the same of the user's own iterables.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from operator import length_hint
from typing import Any, Protocol

import torch

from metawrap.errors import ArgumentError
from metawrap.snapshot.generators import Generators
from metawrap.task_iteration import iterate_task_batches
from metawrap.tasks import Task, TaskBatch, as_task_batch, describe_value


class TrainingTasks(Protocol):
    """Batches by number."""

    def batches(self, count: int, start: int = 0) -> Iterator[Any]:
        """The batches start, ..., start + count - 1, each in an accepted form."""


class FixedTasks(TrainingTasks, Protocol):
    """Batches of `tasks_per_batch` tasks, the same each time."""

    tasks_per_batch: int


class BatchStream:
    """The batches of an iterable, one after the other; it is begun again when it ends.

    Args:
        source: the iterable, such as a list or a DataLoader. An iterator may be given, if it gives enough batches.
        device: the learner's; the state of its random generator is kept where batches are skipped.
    """

    def __init__(self, source: Iterable[Any], device: torch.device) -> None:
        self._source, self._device, self._name = source, device, type(source).__name__
        self._batches: Iterator[Any] = iter(())
        self._next = 0

    def first(self) -> Any:
        """The first batch; it comes again in `batches`."""
        self._batches = iter(self._source)
        again = self._batches is not self._source  # Else it is an iterator, which has given its first batch.
        batch = self._take()
        self._batches, self._next = itertools.chain([batch], self._batches), 0
        self._source = self._source if again else self._batches
        return batch

    def batches(self, count: int, start: int = 0) -> Iterator[Any]:
        """See `TrainingTasks`. Batches before `start` that this process has not trained on are drawn and skipped, of a
        source with a length those of the present pass alone; the global generators are then put back.
        """
        if start != self._next:
            self._batches, self._next = iter(()), start
            length = length_hint(self._source)  # 0 if it has none.
            passed = start % length if length else start
            if passed:
                generators = Generators(self._device)
                for _ in range(passed):
                    self._take()
                generators.put_back()
        for _ in range(count):
            yield self._take()
            self._next += 1

    def _take(self) -> Any:
        for batch in self._batches:
            return batch
        self._batches = iter(self._source)
        for batch in self._batches:
            return batch
        raise ArgumentError(
            f"train: {self._name} gives no batch after {self._next} of them. An iterator cannot begin again: give a "
            "list, a DataLoader or an object whose __iter__ starts anew, or fewer epochs."
        )


class ListedTasks:
    """The tasks of an iterable of task batches, counted, in batches of equal size.

    Args:
        source: the iterable, which ends and can begin again; or one task batch.
        name: the argument, for errors.
        count: how many of its tasks; all if None.
    Raises:
        ArgumentError: it cannot begin again, or has fewer tasks, or none. TaskError: it never ends.
    """

    def __init__(self, source: Any, name: str, count: int | None = None) -> None:
        self._source, self._name = source, name
        if isinstance(source, Iterator):
            raise ArgumentError(
                f"{name}: expected tasks that can be gone through after each epoch, but got the iterator "
                f"{describe_value(source)}. Make a list of it: list(...)."
            )
        self.count = sum(1 for _ in itertools.islice(self._tasks(), count))
        if not self.count or (count is not None and self.count < count):
            raise ArgumentError(
                f"{name}: expected at least {count or 1} tasks, but got {self.count}. Give more tasks, or a smaller "
                f"{name}_tasks."
            )
        self.tasks_per_batch = math.gcd(self.count, 20)

    def batches(self, count: int, start: int = 0) -> Iterator[TaskBatch]:
        """See `FixedTasks`."""
        size = self.tasks_per_batch
        tasks = itertools.islice(self._tasks(), start * size, (start + count) * size)
        while chunk := tuple(itertools.islice(tasks, size)):
            yield TaskBatch(chunk)

    def _tasks(self) -> Iterator[Task]:
        for batch in iterate_task_batches(self._source):
            yield from as_task_batch(batch)


def task_at(tasks: FixedTasks, index: int) -> Task:
    """The task with this number."""
    [batch] = tasks.batches(1, index // tasks.tasks_per_batch)
    return as_task_batch(batch)[index % tasks.tasks_per_batch]
