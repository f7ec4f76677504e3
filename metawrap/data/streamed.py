"""StreamedImages: labels in memory, images where they lie, each made into pixels when it is drawn.

The twin of `LabelledImages` for sets larger than memory: `EpisodeSampler` takes either, and draws the same episodes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metawrap.data.images import LabelledImages, LabelledSet, check_labels
from metawrap.errors import DataError

Pixels: TypeAlias = NDArray[np.uint8]


class PixelSource(Protocol):
    """Images by their place, 0, 1, ..., each made into pixels when asked for. Has to survive pickling, for workers."""

    def __len__(self) -> int:
        """How many images there are."""

    def pixels(self, place: int) -> Pixels:
        """The image as uint8 of shape (channels, height, width), or DataError that names it."""

    def name(self, place: int) -> str:
        """What a person would call the image: its file, or its place in one."""


@dataclass(frozen=True, eq=False)
class StreamedImages(LabelledSet):
    """Images that are read when they are drawn, and the class of each.

    source: where the pixels come from. labels: int64, (images,), indices into class_names. image_shape: (channels,
    height, width). places: of each image in the source; all of them, in order, by default. origin: the layout that
    they were found in.

    Raises:
        DataError: as `LabelledImages`, for the labels.
    """

    source: PixelSource
    labels: Tensor
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    origin: str = ""
    places: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def __post_init__(self) -> None:
        if not len(self.places):
            object.__setattr__(self, "places", np.arange(len(self.source)))
        check_labels(self.labels, len(self.places), self.class_names)

    def gather(self, indices: NDArray[np.int64]) -> Tensor:
        """These images as uint8 of shape (len(indices), channels, height, width).

        Raises:
            DataError: one of them cannot be read; the message names it.
        """
        images = torch.empty((len(indices), *self.image_shape), dtype=torch.uint8)
        for row, index in enumerate(indices):
            # A copy, because a view of a mapped file is read-only, which torch warns of.
            images[row] = torch.from_numpy(np.array(self.source.pixels(int(self.places[index]))))
        return images

    def name(self, index: int) -> str:
        """What a person would call image `index`."""
        return self.source.name(int(self.places[index]))

    def subset(self, class_indices: Sequence[int]) -> StreamedImages:
        """Only these classes, relabelled 0, 1, ... in the order given.

        Raises:
            DataError: no class, a repeated class, or an index outside 0..num_classes-1.
        """
        order, labels, names = self.chosen(class_indices)
        return replace(self, labels=labels, class_names=names, places=self.places[order.numpy()])

    def in_memory(self) -> LabelledImages:
        """All images, read now.

        Raises:
            DataError: an image cannot be read, or memory is too small for them.
        """
        needed, free = len(self) * int(np.prod(self.image_shape)), free_memory()
        if needed > free:
            raise DataError(
                f"stream: {len(self)} images of shape {self.image_shape} take {needed / 2**30:.1f} GiB, but "
                f"{free / 2**30:.1f} GiB of memory are free. Pass stream=True (--stream), or a smaller image_size."
            )
        images = self.gather(np.arange(len(self)))
        return LabelledImages(images, self.labels, self.class_names, self.origin)


def free_memory() -> int:
    """Bytes that can be had without swapping; a very large number where the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 2**62
