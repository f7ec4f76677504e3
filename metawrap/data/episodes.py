"""EpisodeSampler: (seed, index) -> classes -> images -> one gather -> rotation -> TaskBatch.

A batch is a pure function of the seed and its index: a run resumes from an index alone, and no global random number
generator is read or moved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metawrap.data.checks import check_int, check_switch
from metawrap.data.draws import Draws, Ints
from metawrap.data.images import LabelledImages
from metawrap.errors import ArgumentError, DataError
from metawrap.tasks import TaskBatch, describe_value

ROTATIONS = 4


class EpisodeSampler:
    """Draws balanced few-shot tasks of `ways` classes, with `shots` support and `targets` target images of each.

    No class and no image is repeated inside a task, and which class gets which label is random. `rotations=True` turns
    each class into four, one per quarter turn; two turns of one character may meet in a task (the protocol of Antoniou
    et al. 2018, arXiv:1810.09502, after Santoro et al. 2016, arXiv:1605.06065).

    Each task: support_x float32 in [0, 1] of shape (ways * shots, channels, height, width), support_y int64 of shape
    (ways * shots,), grouped by label; target_x and target_y likewise with `targets`; classes: the number of each
    label's class in 0..num_classes - 1, where each quarter turn of a class has one of its own.

    Args:
        images: where to draw from; kept on `device` if it fits there, else on the CPU.
        ways: classes per task.
        shots: support images per class.
        targets: target images per class.
        tasks_per_batch: tasks in each TaskBatch.
        seed: a non-negative integer; the same seed gives the same episodes on every platform.
        rotations: add the three quarter turns of every class as classes of their own; needs square images.
        device: where the batches end up; default the CPU.
    Raises:
        ArgumentError: a count is not an integer of at least 1, the seed is negative, or the device does not exist.
        DataError: too few classes, a class with too few images, or rotations of images that are not square.
    """

    def __init__(
        self,
        images: LabelledImages,
        ways: int = 5,
        shots: int = 1,
        targets: int = 1,
        tasks_per_batch: int = 1,
        seed: int = 0,
        rotations: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(images, LabelledImages):
            raise ArgumentError(f"images: expected LabelledImages, but got {describe_value(images)}.")
        for name, value in (("ways", ways), ("shots", shots), ("targets", targets)):
            check_int(name, value, 1)
        check_int("tasks_per_batch", tasks_per_batch, 1)
        check_int("seed", seed, 0)
        check_switch("rotations", rotations)
        self.device = _device(device)
        _check_enough(images, ways, shots, targets, rotations)
        self.images, self.ways, self.shots, self.targets = images, ways, shots, targets
        self.tasks_per_batch, self.seed, self.rotations = tasks_per_batch, seed, rotations
        self._pixels = _store(images.images, self.device)
        labels = images.labels.cpu().numpy()
        self._by_class: Ints = np.argsort(labels, kind="stable").astype(np.int64)
        self._counts: Ints = np.bincount(labels, minlength=images.num_classes).astype(np.int64)
        self._starts: Ints = np.cumsum(self._counts) - self._counts
        self._turned = _turned_pixels(images.images.shape[-1]).to(self._pixels.device) if rotations else None
        self._support_y = torch.arange(ways, device=self.device).repeat_interleave(shots)
        self._target_y = torch.arange(ways, device=self.device).repeat_interleave(targets)

    @property
    def num_classes(self) -> int:
        """Classes to draw from, the rotated ones included."""
        return self.images.num_classes * (ROTATIONS if self.rotations else 1)

    def batch(self, index: int) -> TaskBatch:
        """The batch with this number, always the same one.

        Raises:
            ArgumentError: index is not an integer of at least 0.
        """
        check_int("index", index, 0)
        classes, examples, quarter_turns = self._choose(Draws(self.seed, index))
        # On the device in one copy: (2, tasks, ways, shots + targets).
        chosen = torch.from_numpy(np.stack([examples, quarter_turns])).to(self._pixels.device)
        pixels = self._gather(chosen[0].flatten(), chosen[1].flatten())
        # A product, because CUDA turns a division by a number into one anyway and CPUs would differ in the last bit.
        pixels = pixels.to(self.device).to(torch.float32).mul_(1 / 255)
        image_shape = pixels.shape[1:]
        pixels = pixels.view(self.tasks_per_batch, self.ways, self.shots + self.targets, *image_shape)
        support = pixels[:, :, : self.shots].reshape(self.tasks_per_batch, -1, *image_shape)
        target = pixels[:, :, self.shots :].reshape(self.tasks_per_batch, -1, *image_shape)
        repeat = (self.tasks_per_batch, 1)
        labels = self._support_y.repeat(repeat), self._target_y.repeat(repeat)
        return TaskBatch.stacked(support, labels[0], target, labels[1], classes=classes.tolist())

    def batches(self, count: int, start: int = 0) -> Iterator[TaskBatch]:
        """The batches start, start + 1, ..., start + count - 1.

        Raises:
            ArgumentError: count or start is not an integer of at least 0.
        """
        check_int("count", count, 0)
        check_int("start", start, 0)
        return (self.batch(index) for index in range(start, start + count))

    def __iter__(self) -> Iterator[TaskBatch]:
        """Endless, from batch 0."""
        index = 0
        while True:
            yield self.batch(index)
            index += 1

    def _choose(self, draws: Draws) -> tuple[Ints, Ints, Ints]:
        """Classes (tasks, ways); positions of images and their quarter turns, both (tasks, ways, shots + targets)."""
        tasks, examples = self.tasks_per_batch, self.shots + self.targets
        drawn = draws.distinct(np.full(tasks, self.num_classes, dtype=np.int64), self.ways).reshape(-1)
        classes, quarter_turns = drawn % self.images.num_classes, drawn // self.images.num_classes
        within = draws.distinct(self._counts[classes], examples)
        chosen = self._by_class[self._starts[classes, None] + within]
        shape = (tasks, self.ways, examples)
        turns = np.broadcast_to(quarter_turns[:, None], within.shape).reshape(shape)
        return drawn.reshape(tasks, self.ways), chosen.reshape(shape), turns

    def _gather(self, examples: Tensor, quarter_turns: Tensor) -> Tensor:
        pixels = self._pixels[examples]
        if self._turned is None:
            return pixels
        source = self._turned[quarter_turns].unsqueeze(1).expand(-1, pixels.shape[1], -1)
        return pixels.flatten(2).gather(2, source).view_as(pixels)


def _check_enough(images: LabelledImages, ways: int, shots: int, targets: int, rotations: bool) -> None:
    height, width = images.images.shape[-2:]
    if rotations and height != width:
        raise DataError(f"rotations: expected square images, but they are {height}x{width}. Pass rotations=False.")
    available = images.num_classes * (ROTATIONS if rotations else 1)
    if ways > available:
        raise DataError(
            f"ways={ways}, but there are only {available} classes{' (rotations included)' if rotations else ''}. "
            f"Use ways={available} or fewer, or a larger split."
        )
    needed = shots + targets
    for name, count in zip(images.class_names, images.images_per_class, strict=True):
        if count < needed:
            raise DataError(
                f"Class '{name}' has {count} images, but shots + targets = {shots} + {targets} = {needed} are needed. "
                f"Lower shots or targets, or leave the class out with images.subset(...)."
            )


def _device(device: Any) -> torch.device:
    try:
        return torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(
            f"device: expected 'cpu', 'cuda', 'cuda:1', ... or a torch.device, but got {describe_value(device)}."
        ) from error


def _store(images: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and images.device != device:
        free, _ = torch.cuda.mem_get_info(device)
        # Half of what is free: the model and its unrolled graph need room too.
        if images.numel() > free // 2:
            return images.cpu()
    return images.to(device)


def _turned_pixels(side: int) -> Tensor:
    """For each quarter turn and pixel, which pixel of the original belongs there; shape (4, side * side)."""
    places = torch.arange(side * side).view(side, side)
    return torch.stack([torch.rot90(places, turns).flatten() for turns in range(ROTATIONS)])
