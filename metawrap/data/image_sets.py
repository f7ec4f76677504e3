"""Sets of labelled images: LabelledImages in memory, StreamedImages on disk, and DataSplits of three such sets.

Both kinds have the same interface, so `EpisodeSampler` draws the same episodes from either. Images are uint8, a quarter
of the memory of floats; the sampler scales them to [0, 1].
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import Self

from metawrap.data.problems import listed
from metawrap.errors import DataError
from metawrap.tasks import describe_value

Pixels: TypeAlias = NDArray[np.uint8]
# Images of each class whose whole content counts in its fingerprint; of the others, the size and name of the file.
READ_OF_CLASS = 20


class PixelSource(Protocol):
    """Images by their place, 0, 1, ..., each decoded on demand. Workers receive a source through pickle."""

    def __len__(self) -> int:
        """The number of images."""

    def pixels(self, place: int) -> Pixels:
        """The image as uint8 of shape (channels, height, width), or DataError that names the image."""

    def name(self, place: int) -> str:
        """The image's name for people: its file, or its place in a file."""


@runtime_checkable
class FilePixelSource(PixelSource, Protocol):
    """Images that lie in files, which tell them apart without decoding."""

    def identity(self, place: int, whole: bool) -> bytes:
        """Bytes that stay the same wherever the files lie: all of the image's own if `whole`, else a cheap part."""


class LabelledSet:
    """The part of an image set that needs no pixels: `labels`, int64, (images,), and `class_names`."""

    labels: Tensor
    class_names: tuple[str, ...]

    def fingerprints(self) -> tuple[str, ...]:
        """For each class, in the order of class_names: a digest of all its images, and those of up to 20 single images,
        with spaces between. They depend neither on the place or time of the files, nor on the names of classes, nor on
        streaming. The single images stay nearly the same when the class loses or gains one, or gets another name.
        """
        by_class = np.split(torch.argsort(self.labels, stable=True).numpy(), np.cumsum(self.images_per_class)[:-1])
        cheap = [self._identity(i, False) for i in range(len(self))]
        # Hashes of size and name, in this order: files with other names, or of one size, are chosen alike too.
        ranks = [[_digest(part) for part in each.split(b" ", 1)] for each in cheap]
        whole = {i for each in by_class for i in sorted(each.tolist(), key=ranks.__getitem__)[:READ_OF_CLASS]}
        order = self._reading_order(np.arange(len(self))).tolist()
        marks = {i: _digest(self._identity(i, True) if i in whole else cheap[i]) for i in order}
        kept = [[marks[i] for i in each if i in whole] for each in by_class]
        digests = [_digest("".join(marks[i] for i in each).encode()) for each in by_class]
        return tuple(" ".join([digest, *own]) for digest, own in zip(digests, kept, strict=True))

    def _identity(self, index: int, whole: bool) -> bytes:
        """See `FilePixelSource.identity`."""
        raise NotImplementedError

    def _reading_order(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The indices in the order to read them in."""
        return indices

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def images_per_class(self) -> tuple[int, ...]:
        """The number of images of each class, in the order of class_names."""
        return tuple(torch.bincount(self.labels, minlength=self.num_classes).tolist())

    def subset(self, class_indices: Sequence[int]) -> Self:
        """Only these classes, relabelled 0, 1, ... in the order given.

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
        names = tuple(self.class_names[index] for index in chosen)
        return replace(self, labels=labels[order], class_names=names, **self._rows(order, chosen))  # type: ignore[type-var]

    def _rows(self, order: Tensor, chosen: Sequence[int]) -> dict[str, Any]:
        """The fields with one entry per image or class, for these images and classes only."""
        raise NotImplementedError

    def in_short(self) -> str:
        """The numbers of classes and images, and the shape of an image, for people."""
        shape = " x ".join(map(str, getattr(self, "image_shape", ())))
        return f"{self.num_classes} class{'es' * (self.num_classes > 1)}, {len(self)} images of {shape}"

    def __repr__(self) -> str:
        counts = sorted({*self.images_per_class})
        each = " to ".join(map(str, counts if len(counts) < 3 else (counts[0], counts[-1])))
        return f"{type(self).__name__}: {self.in_short()}\n{each} images in a class; {listed(self.class_names, 3)}"

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False, repr=False)
class LabelledImages(LabelledSet):
    """Images in memory, and the class of each.

        >>> pixels = torch.zeros(4, 3, 28, 28, dtype=torch.uint8)
        >>> LabelledImages(pixels, torch.tensor([0, 0, 1, 1]), ("cat", "dog")).images_per_class
        (2, 2)

    images: uint8, (images, channels, height, width). labels: int64, (images,), indices into class_names. origin: the
    layout of the files that the images were read from. known: the fingerprint of each class, if the files gave it.

    Raises:
        DataError: a wrong type or shape, lengths that disagree, a label without a name, or a class without an image.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    origin: str = ""
    known: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.images, Tensor) or self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise DataError(
                f"images: expected a uint8 tensor of shape (images, channels, height, width), but got "
                f"{describe_value(self.images)}. Pass (images * 255).round().to(torch.uint8) for floats in [0, 1]."
            )
        if self.images.numel() == 0:
            raise DataError(f"images: expected at least one pixel, but the shape is {tuple(self.images.shape)}.")
        _check_labels(self.labels, len(self.images), self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return tuple(self.images.shape[1:])  # type: ignore[return-value]

    def gather(self, indices: NDArray[np.int64]) -> Tensor:
        """The images at these indices, uint8, (len(indices), channels, height, width)."""
        return self.images[torch.from_numpy(indices)]

    def name(self, index: int) -> str:
        """The name of image `index` for people."""
        return f"image {index}"

    def fingerprints(self) -> tuple[str, ...]:
        """As for `StreamedImages`, from the files; of images that had none, from their pixels."""
        return self.known or super().fingerprints()

    def _identity(self, index: int, whole: bool) -> bytes:
        return self.images[index].cpu().numpy().tobytes() if whole else b""

    def _rows(self, order: Tensor, chosen: Sequence[int]) -> dict[str, Any]:
        return {"images": self.images[order], "known": tuple(self.known[index] for index in chosen if self.known)}


@dataclass(frozen=True, eq=False, repr=False)
class StreamedImages(LabelledSet):
    """Images that are read when they are drawn, and the class of each: for sets larger than memory.

        >>> from metawrap.data import splits_from
        >>> part = splits_from(np.zeros((6, 8, 8), np.uint8), list("aabbcc"), stream=True).train
        >>> part.gather(np.array([0, 1])).shape
        torch.Size([2, 1, 8, 8])

    source: gives the pixels. labels: int64, (images,), indices into class_names. image_shape: (channels, height,
    width). places: the place of each image in the source; by default all places in order. origin: the layout of the
    files.

    Raises:
        DataError: wrong labels, as for `LabelledImages`.
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
        _check_labels(self.labels, len(self.places), self.class_names)

    def gather(self, indices: NDArray[np.int64]) -> Tensor:
        """The images at these indices, uint8, (len(indices), channels, height, width); or DataError that names one."""
        images = torch.empty((len(indices), *self.image_shape), dtype=torch.uint8)
        places, positions = self.places[indices], _positions(self)
        for row in range(len(places)) if positions is None else np.argsort(positions[places]):
            # A copy: torch warns of views of a mapped file, which are read-only.
            images[row] = torch.from_numpy(np.array(self.source.pixels(int(places[row]))))
        return images

    def _reading_order(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        positions = _positions(self)
        return indices if positions is None else indices[np.argsort(positions[self.places[indices]])]

    def name(self, index: int) -> str:
        """The name of image `index` for people."""
        return self.source.name(int(self.places[index]))

    def _identity(self, index: int, whole: bool) -> bytes:
        place = int(self.places[index])
        if isinstance(self.source, FilePixelSource):
            return self.source.identity(place, whole)
        return self.source.pixels(place).tobytes() if whole else b""

    def _rows(self, order: Tensor, chosen: Sequence[int]) -> dict[str, Any]:
        return {"places": self.places[order.numpy()]}

    def in_memory(self, fix: str = "Pass a smaller image_size (--image-size).") -> LabelledImages:
        """All images, read now; DataError if one cannot be read, or memory is too small for all of them (`fix`)."""
        needed, free = len(self) * int(np.prod(self.image_shape)), free_memory()
        if needed > free:
            if _positions(self) is not None:
                fix = "Unpack the archive and pass the folder, which can be streamed."
            raise DataError(
                f"stream: {len(self)} images of shape {self.image_shape} take {needed / 2**30:.1f} GiB, but "
                f"{free / 2**30:.1f} GiB of memory are free. {fix}"
            )
        images = self.gather(np.arange(len(self)))
        known = self.fingerprints() if isinstance(self.source, FilePixelSource) else ()
        return LabelledImages(images, self.labels, self.class_names, self.origin, known)


ImageSet: TypeAlias = LabelledImages | StreamedImages


class DataSplits(NamedTuple):
    """Three sets without a class in common.

    >>> from metawrap.data import load_glyphs
    >>> train, validation, test = load_glyphs((6, 2, 3))
    >>> train.num_classes, validation.num_classes, test.num_classes
    (6, 2, 3)
    """

    train: ImageSet
    validation: ImageSet
    test: ImageSet

    def __repr__(self) -> str:
        return "\n".join(f"{f'{name}:':12}{part.in_short()}" for name, part in self._asdict().items())


def as_splits(parts: Sequence[StreamedImages], stream: bool | None) -> DataSplits:
    """The three parts, as `read_unless_streamed` gives them."""
    return DataSplits(*read_unless_streamed(parts, stream))


def read_unless_streamed(parts: Sequence[StreamedImages], stream: bool | None) -> Sequence[ImageSet]:
    """The parts, read into memory unless `stream`; None streams sets that would fill half of the free memory."""
    sequential = any(_positions(part) is not None for part in parts)
    if stream and sequential:
        raise DataError(
            "stream: the archive is compressed, so its images cannot be drawn one by one. Unpack it and pass the "
            "folder, or leave stream out (--no-stream) to hold the images in memory."
        )
    if stream is None:
        size = sum(len(part) * int(np.prod(part.image_shape)) for part in parts)
        stream = not sequential and size > free_memory() // 2
    fix = "Leave stream=False (--no-stream) out, or pass a smaller image_size (--image-size)."
    return parts if stream else [part.in_memory(fix) for part in parts]


def _positions(part: StreamedImages) -> NDArray[np.int64] | None:
    """The place of each image in a compressed archive, which is read in order; None for sources of another kind."""
    return getattr(part.source, "positions", None)


def free_memory() -> int:
    """Bytes that can be allocated without swapping; 2**62 if the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 2**62


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _check_labels(labels: Tensor, images: int, names: tuple[str, ...]) -> None:
    """DataError unless labels are int64, one per image, each with a name, and every name has an image."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.ndim != 1:
        raise DataError(f"labels: expected an int64 tensor of shape (images,), but got {describe_value(labels)}.")
    if len(labels) != images:
        raise DataError(f"labels: expected one per image, but got {len(labels)} labels for {images} images.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(names):
        raise DataError(f"labels: expected 0..{len(names) - 1}, one per class name, but they run from {low} to {high}.")
    counts = torch.bincount(labels, minlength=len(names)).tolist()
    if empty := [name for name, count in zip(names, counts, strict=True) if count == 0]:
        raise DataError(f"class_names: {len(empty)} classes have no image: {listed(empty)}. Leave them out.")
