"""LabelledImages: a whole set of images in memory, as bytes, and the class of each.

Images stay uint8, a quarter of the memory of floats; `EpisodeSampler` scales them to [0, 1] when it draws an episode.
`StreamedImages` in streamed.py has the same face for sets that do not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metawrap.errors import DataError
from metawrap.tasks import describe_value


class LabelledSet:
    """What every set of labelled images knows without its images: `labels`, int64, (images,), and `class_names`."""

    labels: Tensor
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def images_per_class(self) -> tuple[int, ...]:
        """The number of images of each class, in the order of class_names."""
        return tuple(torch.bincount(self.labels, minlength=self.num_classes).tolist())

    def chosen(self, class_indices: Sequence[int]) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """For these classes alone: the places of their images, in the new order, with new labels, and their names.

        Raises:
            DataError: no class, a repeated class, or an index outside 0..num_classes-1.
        """
        chosen = [int(index) for index in class_indices]
        if not chosen or len(set(chosen)) != len(chosen) or not all(0 <= index < self.num_classes for index in chosen):
            raise DataError(
                f"class_indices: expected different indices in 0..{self.num_classes - 1}, at least one, but got "
                f"{describe_value(chosen)} with smallest {min(chosen, default=None)}, largest "
                f"{max(chosen, default=None)} and {len(set(chosen))} different ones."
            )
        new_label = torch.full((self.num_classes,), -1, dtype=torch.int64)
        new_label[chosen] = torch.arange(len(chosen))
        labels = new_label[self.labels]
        order = torch.argsort(labels, stable=True)
        order = order[labels[order] >= 0]
        return order, labels[order], tuple(self.class_names[index] for index in chosen)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class LabelledImages(LabelledSet):
    """Images and the class of each.

    images: uint8, (images, channels, height, width). labels: int64, (images,), indices into class_names. origin: the
    layout that they were found in.

    Raises:
        DataError: a wrong type or shape, lengths that disagree, a label without a name, or a class without an image.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    origin: str = ""

    def __post_init__(self) -> None:
        _check_images(self.images)
        check_labels(self.labels, len(self.images), self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def gather(self, indices: NDArray[np.int64]) -> Tensor:
        """These images, uint8, (len(indices), channels, height, width)."""
        return self.images[torch.from_numpy(indices)]

    def name(self, index: int) -> str:
        """What a person would call image `index`."""
        return f"image {index}"

    def subset(self, class_indices: Sequence[int]) -> LabelledImages:
        """Only these classes, relabelled 0, 1, ... in the order given; the images are copied.

        Raises:
            DataError: no class, a repeated class, or an index outside 0..num_classes-1.
        """
        order, labels, names = self.chosen(class_indices)
        return LabelledImages(self.images[order], labels, names, self.origin)


def _check_images(images: Tensor) -> None:
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4:
        raise DataError(
            f"images: expected a uint8 tensor of shape (images, channels, height, width), but got "
            f"{describe_value(images)}. Floats in [0, 1] become bytes with (images * 255).round().to(torch.uint8)."
        )
    if images.numel() == 0:
        raise DataError(f"images: expected at least one pixel, but the shape is {tuple(images.shape)}.")


def check_labels(labels: Tensor, images: int, names: tuple[str, ...]) -> None:
    """DataError unless labels are int64, one per image, each with a name, and every name has an image."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.ndim != 1:
        raise DataError(f"labels: expected an int64 tensor of shape (images,), but got {describe_value(labels)}.")
    if len(labels) != images:
        raise DataError(f"labels: expected one per image, but got {len(labels)} labels for {images} images.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(names):
        raise DataError(f"labels: expected 0..{len(names) - 1}, one per class name, but they run from {low} to {high}.")
    counts = torch.bincount(labels, minlength=len(names))
    empty = [name for name, count in zip(names, counts.tolist(), strict=True) if count == 0]
    if empty:
        raise DataError(f"class_names: {len(empty)} classes have no image, the first is '{empty[0]}'. Leave them out.")
