"""EpisodeBatchSampler: labels of your own data set -> places of the items of each task -> DataLoader -> TaskBatch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler, default_collate

from metawrap.data.episode_draws import EpisodeDraws
from metawrap.data.image_sets import LabelledImages
from metawrap.data.loader_workers import BatchSlice
from metawrap.data.problems import check_int, listed, wrong_argument
from metawrap.data.user_data import label_list, plain_label
from metawrap.errors import ArgumentError, DataError
from metawrap.task_iteration import endless
from metawrap.tasks import TaskBatch, map_tensors


class EpisodeBatchSampler(Sampler[list[int]]):
    """Draws the tasks of `EpisodeSampler` from a map-style data set of your own: the places of the items of a batch.

        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> data = TensorDataset(torch.rand(60, 7), torch.arange(20).repeat(3))
        >>> tasks = EpisodeBatchSampler(data.tensors[1], ways=5, shots=1, targets=2)
        >>> loader = DataLoader(data, batch_sampler=tasks[:100], collate_fn=tasks.collate)
        >>> len(loader), next(iter(loader))[0].target_x.shape
        (100, torch.Size([10, 7]))

    A batch depends on the seed and its number alone, whatever the number of workers. `tasks[:100]` are batches 0 to 99,
    each time that the loader starts again; `tasks[100:200]` are others. The sampler itself never ends.

    Args:
        labels: the label of each item of the data set, whole numbers or texts, such as `data.targets`.
        ways, shots, targets, tasks_per_batch, seed: as for `EpisodeSampler`.
        classes: the labels to draw from; None means all. So training and test classes can share a data set.
    Raises:
        ArgumentError: labels are of another kind, a class is no label, or a number is out of range.
        DataError: too few classes, or a class with too few items.
    """

    def __init__(
        self,
        labels: Any,
        ways: int = 5,
        shots: int = 1,
        targets: int = 1,
        tasks_per_batch: int = 1,
        seed: int = 0,
        classes: Iterable[Any] | None = None,
    ) -> None:
        own = _plain_labels("labels", labels)
        chosen = sorted(set(own) if classes is None else _plain_labels("classes", classes))
        if absent := [label for label in chosen if label not in set(own)]:
            raise wrong_argument("classes", "labels of the data set", absent, f"It has {listed(sorted(set(own)))}.")
        self._numbers = {label: number for number, label in enumerate(chosen)}
        places = [place for place, label in enumerate(own) if label in self._numbers]
        self._places = np.array(places, dtype=np.int64)
        numbers = torch.tensor([self._numbers[own[place]] for place in places])
        images = LabelledImages(torch.zeros(len(places), 1, 1, 1, dtype=torch.uint8), numbers, tuple(map(str, chosen)))
        self._draws = EpisodeDraws(images, ways, shots, targets, tasks_per_batch, seed)
        self.ways, self.shots, self.targets, self.tasks_per_batch, self.seed = (
            ways,
            shots,
            targets,
            tasks_per_batch,
            seed,
        )

    @property
    def num_classes(self) -> int:
        """The number of classes to draw from."""
        return self._draws.num_classes

    def batch(self, index: int) -> list[int]:
        """The places of the items of this batch: task by task, in each class by class, support before target items."""
        check_int("index", index, 0)
        return self._places[self._draws.draw(index).examples].reshape(-1).tolist()

    def __getitem__(self, place: slice) -> BatchSlice[list[int]]:
        """`tasks[start:stop]`: these batches, with a length, for `DataLoader(data, batch_sampler=...)`."""
        return BatchSlice(self, self._each, place)

    @endless
    def __iter__(self) -> Iterator[list[int]]:
        """Endless, from batch 0."""
        return self._each(itertools.count())

    def _each(self, indices: Iterable[int]) -> Iterator[list[int]]:
        """The batches of these numbers."""
        return map(self.batch, indices)

    def __repr__(self) -> str:
        classes = f"{self.num_classes} class{'es' * (self.num_classes > 1)} ({listed(list(self._numbers), 3)})"
        return f"EpisodeBatchSampler({self._draws!r})\n{classes}, {len(self._places)} items"

    def collate(self, items: Sequence[Any]) -> TaskBatch:
        """The items (x, y) of one batch as tasks with labels 0..ways - 1: the `collate_fn` of a DataLoader.

        x: what `torch.utils.data.default_collate` stacks: tensors, arrays, numbers, or tuples or dicts of them.

        Raises:
            ArgumentError: the items are no pairs, or another number than a batch has.
            DataError: their labels are not those that the sampler was made with.
        """
        shape = self.tasks_per_batch, self.ways, self.shots + self.targets
        if len(items) != np.prod(shape) or not all(isinstance(item, tuple | list) and len(item) == 2 for item in items):
            expected = f"{np.prod(shape)} pairs (x, y): tasks_per_batch * ways * (shots + targets)"
            fix = "Give a DataLoader slices and collate of one sampler, and a data set of pairs."
            raise wrong_argument("items", expected, items, fix)
        labels = [plain_label(y) for _, y in items]
        numbers = np.array([self._numbers.get(label, -1) for label in labels]).reshape(shape)
        if numbers.min() < 0 or (numbers != numbers[..., :1]).any():
            raise DataError(
                f"labels: the items of a batch have the labels {listed(labels)}, which are not those that the "
                "EpisodeBatchSampler was made with. Make it with the labels of this data set, in its order."
            )
        x = default_collate([x for x, _ in items])

        def part(start: int, count: int) -> tuple[Any, Tensor]:
            def cut(stacked: Tensor) -> Tensor:
                return stacked.view(*shape, *stacked.shape[1:]).narrow(2, start, count).flatten(1, 2)

            y = torch.arange(self.ways).repeat_interleave(count).repeat(self.tasks_per_batch, 1)
            return map_tensors(x, cut), y

        (support_x, support_y), (target_x, target_y) = part(0, self.shots), part(self.shots, self.targets)
        return TaskBatch.stacked(support_x, support_y, target_x, target_y, classes=numbers[..., 0].tolist())


def _plain_labels(name: str, labels: Any) -> list[Any]:
    if isinstance(labels, str) or not hasattr(labels, "__iter__"):
        fix = "data.targets, or [y for _, y in data], has the label of each item."
        raise wrong_argument(name, "a list, array or tensor of labels", labels, fix)
    found = label_list(labels)
    whole = all(isinstance(label, int) and not isinstance(label, bool) for label in found)
    if not found or not (whole or all(isinstance(label, str) for label in found)):
        raise ArgumentError(
            f"{name}: expected whole numbers alone or texts alone, at least one, but got {listed(found, 3) or 'none'}. "
            "Few-shot tasks are made of classes."
        )
    return found
