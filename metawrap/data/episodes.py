"""EpisodeSampler: (seed, index) -> classes -> places of images -> one gather -> rotation -> TaskBatch.

A batch is a pure function of the seed and its index: a run resumes from an index alone, and no global random number
generator is read or moved.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from metawrap.data.augmentation import Augment, augmented, check_augment
from metawrap.data.episode_draws import ROTATIONS, Drawn, EpisodeDraws
from metawrap.data.image_sets import ImageSet, LabelledImages, Pixels, StreamedImages
from metawrap.data.loader_workers import BatchSlice, made_ahead, of_this_worker
from metawrap.data.normalisation import Normalise, normalised, statistics_of
from metawrap.data.preprocessing import Preprocessing
from metawrap.data.problems import check_int, wrong_argument
from metawrap.data.random_stream import seeded_generators
from metawrap.task_iteration import endless
from metawrap.tasks import TaskBatch

_Read: TypeAlias = Pixels | NDArray[np.float32]


class EpisodeSampler(IterableDataset[TaskBatch]):
    """Draws balanced few-shot tasks of `ways` classes, with `shots` support and `targets` target images of each.

        >>> from metawrap.data import load_glyphs
        >>> sampler = EpisodeSampler(load_glyphs((6, 2, 3)).train, ways=5, shots=1, targets=3, tasks_per_batch=4)
        >>> sampler.batch(0)[0].support_x.shape
        torch.Size([5, 1, 28, 28])
        >>> len(list(sampler.batches(10)))
        10
        >>> len(torch.utils.data.DataLoader(sampler[:100], batch_size=None, num_workers=2))
        100

    No class and no image is repeated inside a task, and the label of each class is random. `rotations=True` turns each
    class into four, one per quarter turn; two turns of one character may meet in a task (the protocol of Antoniou et
    al. 2018, arXiv:1810.09502, after Santoro et al. 2016, arXiv:1605.06065).

    It is an `IterableDataset` without an end, and slices of it have a length. A DataLoader with `batch_size=None` gives
    its batches in order, each once, whatever the number of workers; it begins at the same batch each time.

    Each task: support_x float32, in [0, 1] unless normalised, of shape (ways * shots, channels, height, width);
    support_y int64 of shape (ways * shots,), grouped by label; target_x and target_y likewise with `targets`; classes:
    the number of each label's class in 0..num_classes - 1, where each quarter turn of a class has its own number.

    Args:
        images: the images to draw from. `LabelledImages` are kept on `device` if they fit there, else on the CPU;
            `StreamedImages` are read when they are drawn, and give the same episodes.
        ways: classes per task.
        shots: support images per class.
        targets: target images per class.
        tasks_per_batch: tasks in each TaskBatch.
        seed: a non-negative integer; the same seed gives the same episodes on every platform.
        rotations: add the three quarter turns of every class as separate classes; needs square images.
        device: the device of the batches; default the CPU.
        normalise: "imagenet", or (mean, deviation) with a number for each channel: x becomes (x - mean) / deviation; or
            a `Preprocessing`, of which mean, deviation and order count.
        workers: processes in which `batches` and iteration read streamed images, or augment images, ahead; with 0 the
            calling process does it, as `batch` always does. The episodes do not depend on it.
        augment: a random transform for the sampler of training episodes, such as those of torchvision.transforms.v2.
            It gets one image at a time, uint8 of shape (channels, height, width), before normalisation, and returns
            uint8 or floats in [0, 1]; another height and width are allowed. Support and target images are augmented
            alike, each by a draw of its own, after a quarter turn. The draws come from the global generators, which
            are seeded for each batch and put back: the same seed gives the same episodes.
    Raises:
        ArgumentError: a count is not an integer of at least 1, the seed is negative, the device does not exist,
            `normalise` or `augment` does not fit the images, or workers are asked for with images in memory that are
            not augmented.
        DataError: too few classes, a class with too few images, or rotations of images that are not square.
    """

    def __init__(
        self,
        images: ImageSet,
        ways: int = 5,
        shots: int = 1,
        targets: int = 1,
        tasks_per_batch: int = 1,
        seed: int = 0,
        rotations: bool = False,
        device: torch.device | str | None = None,
        normalise: Normalise | Preprocessing = None,
        workers: int = 0,
        augment: Augment | None = None,
    ) -> None:
        if not isinstance(images, LabelledImages | StreamedImages):
            fix = "splits_from makes both from arrays and data sets."
            raise wrong_argument("images", "LabelledImages or StreamedImages", images, fix)
        check_int("workers", workers, 0)
        if workers and isinstance(images, LabelledImages) and augment is None:
            raise wrong_argument("workers", "0 for images in memory", workers, "Leave it out, or stream the images.")
        self.device = _device(device)
        self._draws = EpisodeDraws(images, ways, shots, targets, tasks_per_batch, seed, rotations)
        self.images, self.ways, self.shots, self.targets = images, ways, shots, targets
        self.tasks_per_batch, self.seed, self.rotations = tasks_per_batch, seed, rotations
        self.workers = workers
        if augment is not None:
            check_augment(augment, images)
        held = isinstance(images, LabelledImages) and augment is None
        self._pixels = _store(images.images, self.device) if held else None  # type: ignore[union-attr]
        self._draw_and_read = _DrawAndRead(self._draws, images, augment)
        home = self.device if self._pixels is None else self._pixels.device
        self._turned = _turned_pixels(images.image_shape[-1]).to(home) if rotations and augment is None else None
        self._turned_colours = isinstance(normalise, Preprocessing) and normalise.order == "BGR"
        if isinstance(normalise, Preprocessing):
            normalise = normalise.statistics
        statistics = statistics_of(normalise, images.image_shape[0])
        self._statistics = (
            None if statistics is None else (statistics[0].to(self.device), statistics[1].to(self.device))
        )
        self._support_y = torch.arange(ways, device=self.device).repeat_interleave(shots)
        self._target_y = torch.arange(ways, device=self.device).repeat_interleave(targets)

    @property
    def num_classes(self) -> int:
        """The number of classes to draw from, rotated ones included."""
        return self._draws.num_classes

    def batch(self, index: int) -> TaskBatch:
        """The batch with this number; the same number gives the same batch.

        Raises:
            ArgumentError: index is not an integer of at least 0.
            DataError: a streamed image cannot be read.
        """
        check_int("index", index, 0)
        if self._pixels is None:
            return self._read(*self._draw_and_read(index))
        drawn = self._draws.draw(index)
        # One copy to the device: (2, tasks, ways, shots + targets).
        chosen = torch.from_numpy(np.stack([drawn.examples, drawn.quarter_turns])).to(self._pixels.device)
        return self._assemble(drawn, self._pixels[chosen[0].flatten()], chosen[1].flatten())

    def batches(self, count: int, start: int = 0) -> Iterator[TaskBatch]:
        """The batches start, start + 1, ..., start + count - 1.

        Raises:
            ArgumentError: count or start is not an integer of at least 0.
        """
        check_int("count", count, 0)
        check_int("start", start, 0)
        return self._each(range(start, start + count))

    def __getitem__(self, place: slice) -> BatchSlice[TaskBatch]:  # type: ignore[override]
        """`sampler[start:stop]`: these batches, as a data set with a length."""
        return BatchSlice(self, self._each, place)

    @endless
    def __iter__(self) -> Iterator[TaskBatch]:
        """Endless, from batch 0."""
        return self._each(of_this_worker(self, itertools.count()))

    def __repr__(self) -> str:
        turned = f", {self.num_classes} classes with rotations" if self.rotations else ""
        return f"EpisodeSampler({self._draws!r})\n{self.images.in_short()}{turned}"

    def _each(self, indices: Iterable[int]) -> Iterator[TaskBatch]:
        """The batches of these numbers, read by `workers` processes; ArgumentError in a loader's worker without CPU."""
        inside = get_worker_info() is not None
        if inside and self.device.type != "cpu":
            fix = "Make the sampler without device=, and move each batch: batch.to(device)."
            raise wrong_argument("device", "'cpu' in the workers of a DataLoader", str(self.device), fix)
        if not self.workers or inside:  # A worker starts no workers.
            return (self.batch(index) for index in indices)
        ahead = made_ahead(self._draw_and_read, indices, self.workers)
        return (self._read(drawn, pixels) for drawn, pixels in ahead)

    def _read(self, drawn: Drawn, pixels: _Read) -> TaskBatch:
        turns = torch.from_numpy(drawn.quarter_turns.flatten()).to(self.device)
        return self._assemble(drawn, torch.from_numpy(pixels).to(self.device), turns)

    def _assemble(self, drawn: Drawn, pixels: Tensor, quarter_turns: Tensor) -> TaskBatch:
        """The batch of these pixels, (tasks * ways * (shots + targets), channels, height, width)."""
        if self._turned is not None:
            source = self._turned[quarter_turns].unsqueeze(1).expand(-1, pixels.shape[1], -1)
            pixels = pixels.flatten(2).gather(2, source).view_as(pixels)
        pixels = normalised(pixels.to(self.device), self._statistics, self._turned_colours)
        image_shape = pixels.shape[1:]
        pixels = pixels.view(self.tasks_per_batch, self.ways, self.shots + self.targets, *image_shape)
        support = pixels[:, :, : self.shots].reshape(self.tasks_per_batch, -1, *image_shape)
        target = pixels[:, :, self.shots :].reshape(self.tasks_per_batch, -1, *image_shape)
        repeat = (self.tasks_per_batch, 1)
        labels = self._support_y.repeat(repeat), self._target_y.repeat(repeat)
        return TaskBatch.stacked(support, labels[0], target, labels[1], classes=drawn.classes.tolist())


class _DrawAndRead:
    """The work of a worker for one batch: draws it, reads and augments its images. Holds nothing of a device."""

    def __init__(self, draws: EpisodeDraws, images: ImageSet, augment: Augment | None) -> None:
        self._draws, self._images, self._augment = draws, images, augment
        self._seeded = augment is not None or getattr(getattr(images, "source", None), "draws_numbers", False)

    def __call__(self, index: int) -> tuple[Drawn, _Read]:
        drawn = self._draws.draw(index)
        # The user's code draws from the global generators, in a worker as here.
        with seeded_generators(self._draws.seed, "augment", index) if self._seeded else nullcontext():
            pixels = self._images.gather(drawn.examples.reshape(-1)).numpy()
            if self._augment is None:
                return drawn, pixels
            turns = drawn.quarter_turns.reshape(-1)
            turned = np.stack([np.rot90(image, int(turn), (1, 2)) for image, turn in zip(pixels, turns, strict=True)])
            return drawn, augmented(turned, self._augment)


def _device(device: Any) -> torch.device:
    try:
        return torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise wrong_argument("device", "'cpu', 'cuda', 'cuda:1', ... or a torch.device", device) from error


def _store(images: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and images.device != device:
        free, _ = torch.cuda.mem_get_info(device)
        # Half of the free memory: the model and its unrolled graph need room too.
        if images.numel() > free // 2:
            return images.cpu()
    return images.to(device)


def _turned_pixels(side: int) -> Tensor:
    """The place in the original of each pixel after each quarter turn; shape (4, side * side)."""
    places = torch.arange(side * side).view(side, side)
    return torch.stack([torch.rot90(places, turns).flatten() for turns in range(ROTATIONS)])
