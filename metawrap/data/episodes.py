"""EpisodeSampler: (seed, index) -> classes -> places of images -> one gather -> rotation -> TaskBatch.

A batch is a pure function of the seed and its index: a run resumes from an index alone, and no global random number
generator is read or moved.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metawrap.data.augmentation import Augment, augmented, check_augment
from metawrap.data.image_sets import ImageSet, LabelledImages, Pixels, StreamedImages
from metawrap.data.loader_workers import made_ahead
from metawrap.data.normalisation import Normalise, normalised, statistics_of
from metawrap.data.preprocessing import Preprocessing
from metawrap.data.problems import check_int, listed, wrong_argument
from metawrap.data.random_stream import Ints, RandomStream, seeded_generators
from metawrap.errors import DataError
from metawrap.settings.settings import check_switch
from metawrap.tasks import TaskBatch, endless

ROTATIONS = 4
_Read: TypeAlias = Pixels | NDArray[np.float32]


class EpisodeSampler:
    """Draws balanced few-shot tasks of `ways` classes, with `shots` support and `targets` target images of each.

        >>> from metawrap.data import load_glyphs
        >>> sampler = EpisodeSampler(load_glyphs((6, 2, 3)).train, ways=5, shots=1, targets=3, tasks_per_batch=4)
        >>> sampler.batch(0)[0].support_x.shape
        torch.Size([5, 1, 28, 28])
        >>> len(list(sampler.batches(10)))
        10

    No class and no image is repeated inside a task, and the label of each class is random. `rotations=True` turns each
    class into four, one per quarter turn; two turns of one character may meet in a task (the protocol of Antoniou et
    al. 2018, arXiv:1810.09502, after Santoro et al. 2016, arXiv:1605.06065).

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
        counts = {"ways": ways, "shots": shots, "targets": targets, "tasks_per_batch": tasks_per_batch}
        for name, value in counts.items():
            check_int(name, value, 1)
        check_int("seed", seed, 0)
        check_switch("rotations", rotations)
        check_int("workers", workers, 0)
        if workers and isinstance(images, LabelledImages) and augment is None:
            raise wrong_argument("workers", "0 for images in memory", workers, "Leave it out, or stream the images.")
        self.device = _device(device)
        check_enough([Demand(images, ways, rotations)], shots, targets)
        self.images, self.ways, self.shots, self.targets = images, ways, shots, targets
        self.tasks_per_batch, self.seed, self.rotations = tasks_per_batch, seed, rotations
        self.workers = workers
        if augment is not None:
            check_augment(augment, images)
        held = isinstance(images, LabelledImages) and augment is None
        self._pixels = _store(images.images, self.device) if held else None  # type: ignore[union-attr]
        self._draws = _EpisodeDraws(images, ways, shots + targets, tasks_per_batch, seed, rotations)
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

    @endless
    def __iter__(self) -> Iterator[TaskBatch]:
        """Endless, from batch 0."""
        return self._each(itertools.count())

    def _each(self, indices: Iterable[int]) -> Iterator[TaskBatch]:
        if not self.workers:
            return (self.batch(index) for index in indices)
        ahead = made_ahead(self._draw_and_read, indices, self.workers)
        return (self._read(drawn, pixels) for drawn, pixels in ahead)

    def _read(self, drawn: _Drawn, pixels: _Read) -> TaskBatch:
        turns = torch.from_numpy(drawn.quarter_turns.flatten()).to(self.device)
        return self._assemble(drawn, torch.from_numpy(pixels).to(self.device), turns)

    def _assemble(self, drawn: _Drawn, pixels: Tensor, quarter_turns: Tensor) -> TaskBatch:
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


@dataclass(frozen=True)
class _Drawn:
    """The images of a batch of tasks.

    classes: (tasks, ways), each quarter turn of a class with its own number. examples, quarter_turns: places of images
    and the number of turns of each, both (tasks, ways, shots + targets).
    """

    classes: Ints
    examples: Ints
    quarter_turns: Ints


class _EpisodeDraws:
    """The draws of a sampler, numbers only: the same for images in memory and streamed images of the same labels."""

    def __init__(self, images: ImageSet, ways: int, examples: int, tasks: int, seed: int, rotations: bool) -> None:
        self._ways, self._examples, self._tasks, self.seed = ways, examples, tasks, seed
        self._distinct = images.num_classes
        self.num_classes = images.num_classes * (ROTATIONS if rotations else 1)
        labels = images.labels.cpu().numpy()
        self._by_class: Ints = np.argsort(labels, kind="stable").astype(np.int64)
        self._counts: Ints = np.bincount(labels, minlength=images.num_classes).astype(np.int64)
        self._starts: Ints = np.cumsum(self._counts) - self._counts

    def draw(self, index: int) -> _Drawn:
        """The draws of the batch with this number."""
        random = RandomStream(self.seed, index)
        drawn = random.distinct(np.full(self._tasks, self.num_classes, dtype=np.int64), self._ways).reshape(-1)
        classes, quarter_turns = drawn % self._distinct, drawn // self._distinct
        within = random.distinct(self._counts[classes], self._examples)
        chosen = self._by_class[self._starts[classes, None] + within]
        shape = (self._tasks, self._ways, self._examples)
        turns = np.broadcast_to(quarter_turns[:, None], within.shape).reshape(shape)
        return _Drawn(drawn.reshape(self._tasks, self._ways), chosen.reshape(shape), turns)


class _DrawAndRead:
    """The work of a worker for one batch: draws it, reads and augments its images. Holds nothing of a device."""

    def __init__(self, draws: _EpisodeDraws, images: ImageSet, augment: Augment | None) -> None:
        self._draws, self._images, self._augment = draws, images, augment
        self._seeded = augment is not None or getattr(getattr(images, "source", None), "draws_numbers", False)

    def __call__(self, index: int) -> tuple[_Drawn, _Read]:
        drawn = self._draws.draw(index)
        # The user's code draws from the global generators, in a worker as here.
        with seeded_generators(self._draws.seed, "augment", index) if self._seeded else nullcontext():
            pixels = self._images.gather(drawn.examples.reshape(-1)).numpy()
            if self._augment is None:
                return drawn, pixels
            turns = drawn.quarter_turns.reshape(-1)
            turned = np.stack([np.rot90(image, int(turn), (1, 2)) for image, turn in zip(pixels, turns, strict=True)])
            return drawn, augmented(turned, self._augment)


class Demand(NamedTuple):
    """The tasks to draw from a set. part: its name for people. keyword: the argument that sets `ways`."""

    images: ImageSet
    ways: int
    rotations: bool = False
    part: str = "the set"
    keyword: str = "ways"

    @property
    def classes(self) -> int:
        """The number of classes to draw from."""
        return self.images.num_classes * (ROTATIONS if self.rotations else 1)


def check_enough(demands: Sequence[Demand], shots: int, targets: int, fixed: bool = False) -> None:
    """Raises DataError, with all short parts and classes and numbers that fit them all, if tasks cannot be drawn.

    Args:
        fixed: whether the user cannot change ways, shots and targets, as in the test of a trained network.
    """
    for images, _, rotations, part, _ in demands:
        height, width = images.image_shape[1:]
        if rotations and height != width:
            raise DataError(
                f"rotations: expected square images, but those of {part} are {height}x{width}. Pass rotations=False "
                "(--no-rotations)."
            )
    if short := [each for each in demands if each.ways > each.classes]:
        raise DataError(f"{'; '.join(map(_few_classes, short))}. {_classes_that_fit(demands, short, fixed)}")
    needed, found, least = shots + targets, [], shots + targets
    for each in demands:
        counts = zip(each.images.class_names, each.images.images_per_class, strict=True)
        small = {name: count for name, count in counts if count < needed}
        least = min([least, *small.values()])
        if small:
            shown = ", ".join(f"{name!r} ({count})" for name, count in sorted(small.items())[:10])
            more = f" and {len(small) - 10} more" if len(small) > 10 else ""
            found.append(f"{each.part} has {len(small)} with fewer: {shown}{more}")
    if found:
        fit = min(shots, least - 1), least - min(shots, least - 1)
        use = (
            f"Use shots={fit[0]}, targets={fit[1]} (--shots {fit[0]} --targets {fit[1]}), or leave"
            if fit[0]
            else "Leave"
        )
        raise DataError(
            f"shots + targets = {shots} + {targets} = {needed} images of a class are needed, but {'; '.join(found)}. "
            f"{'Leave' if fixed else use} these classes out, or add images to them."
        )


def _few_classes(demand: Demand) -> str:
    turned = f", {demand.classes} with rotations" if demand.rotations else ""
    own = demand.images.class_names
    many = "1 class" if len(own) == 1 else f"{len(own)} classes"
    return f"{demand.keyword}={demand.ways}, but {demand.part} has only {many} ({listed(own, 5)}{turned})"


def _classes_that_fit(demands: Sequence[Demand], short: Sequence[Demand], fixed: bool) -> str:
    """The remedy: the largest numbers of ways that all parts can give, if it can be changed, or more classes."""
    parts = " and ".join(each.part for each in short)
    by_seed = any(each.images.origin.endswith("split by seed") for each in short)
    more = f"more classes to {parts}{', such as with split= (--split FILE)' if by_seed and not fixed else ''}."
    fits = {each.keyword: min(d.classes for d in demands if d.keyword == each.keyword) for each in short}
    if fixed or min(fits.values()) < 2:  # Tasks of a run have two classes at least.
        return f"Add {more}"
    numbers = ", ".join(f"{name}={count} (--{name.replace('_', '-')} {count})" for name, count in fits.items())
    return f"Use {numbers} or fewer, or add {more}"


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
