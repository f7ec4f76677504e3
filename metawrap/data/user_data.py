"""splits_from: your arrays, tensors or torch data set with labels -> classes -> split -> DataSplits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from metawrap.data.array_pictures import bytes_of
from metawrap.data.class_split import SHARES, GivenSplit, check_shares, split_as_given, split_by_seed
from metawrap.data.image_sets import DataSplits, Pixels, StreamedImages, as_splits
from metawrap.data.pictures import GRAY, RGB, Decoding, fitted_array
from metawrap.data.problems import check_int, check_seed, wrong_argument
from metawrap.data.random_stream import RandomStream
from metawrap.errors import ArgumentError, DataError
from metawrap.snapshot.generators import Generators
from metawrap.tasks import describe_value

_SPOTS = 8  # images that are read twice, and whose labels are compared, before anything else


def splits_from(
    data: Any,
    labels: Any = None,
    *,
    class_names: Sequence[str] | None = None,
    channels: str | None = None,
    splits: Sequence[float] = SHARES,
    split: GivenSplit | None = None,
    seed: int | str = 0,
    image_size: int | None = None,
    stream: bool | None = None,
) -> DataSplits:
    """Your own labelled images, split by class, for `EpisodeSampler`.

        >>> images, labels = torch.rand(60, 3, 28, 28), torch.arange(20).repeat(3)
        >>> train, validation, test = splits_from(images, labels)
        >>> train.num_classes, train.image_shape
        (13, (3, 28, 28))

    Args:
        data: images as one array, with `labels`; or a map-style `torch.utils.data.Dataset` of (image, label). As in
            torchvision, a tensor is (channels, height, width), and an array or PIL image (height, width, channels) or
            (height, width). Pixels are uint8, bool, or floats in [0, 1], which are rounded to the nearest 1/255. PIL
            images are converted as files are, see `load_image_folder`. The images must not be random: see `stream`.
        labels: whole numbers or texts, one for each image of an array. The labels of a data set are its `targets` or
            `labels` if it has them and no `target_transform`, and if some items agree; else one pass over the data set
            collects them. Each item that is read later is held against its label.
        class_names: the name of label 0, 1, ..., all different; by default the data set's `classes` if the labels are
            its `targets`, or it has none; else the labels as text.
        channels: "first" or "last", the place of the channels in a tensor or array; needed where the shape does not
            tell, as with other numbers of channels than 1, 3 and 4.
        splits: shares of the classes for train, validation and test.
        split: the classes of each part by name, as for `load_image_folder`.
        seed: names the shuffle of the classes; the same seed gives the same split on every platform.
        image_size: images are squeezed or stretched to this many pixels on either side (Lanczos); without it, all
            images must have one size.
        stream: True keeps the data set and takes images from it when they are drawn, also in workers; False takes all
            images now; by default, sets that would fill half of the free memory are streamed. A data set with random
            images, by a transform such as RandomResizedCrop, is refused without stream=True: in memory, each image
            would keep its first draw. With it, the images of all three parts are random. `augment` of `EpisodeSampler`
            changes those of the training part alone.
    Raises:
        ArgumentError: an argument of the wrong type or range, labels that do not fit the images, channels at an unknown
            place, or random images.
        DataError: too few classes, images of different sizes, or pixels in another range.
    """
    shares = check_shares(splits)
    check_seed(seed)
    if image_size is not None:
        check_int("image_size", image_size, 1)
    if channels not in (None, "first", "last"):
        raise wrong_argument("channels", "'first', 'last' or None", channels)
    items, found, names = _labelled(data, labels)
    named = list(map(str, class_names)) if class_names is not None else names
    if class_names is not None and any(isinstance(label, str) for label in found):
        raise wrong_argument("class_names", "None, because the labels are texts", class_names, "Leave it out.")
    by_class: dict[str, list[int]] = {}
    for place, label in enumerate(found):
        members = by_class.setdefault(name := _text_of(label, place, named), [])
        if members and (first := found[members[0]]) != label:
            fix = "Pass class_names= with another name for each."
            raise ArgumentError(f"class_names: the labels {first!r} and {label!r} are both called {name!r}. {fix}")
        members.append(place)
    existing = sorted(by_class)
    parts = split_by_seed(existing, shares, seed) if split is None else split_as_given(existing, split)
    source = _ItemPixels(items, found, image_size, channels)
    if not stream:
        _refuse_random(source)
    shape = source.pixels(0).shape
    streamed = []
    for part in parts:
        own = torch.arange(len(part)).repeat_interleave(torch.tensor([len(by_class[name]) for name in part]))
        places = np.array([place for name in part for place in by_class[name]], dtype=np.int64)
        origin = f"{type(data).__name__}, split by {'seed' if split is None else 'name'}"
        streamed.append(StreamedImages(source, own, tuple(part), shape, origin, places))
    return as_splits(streamed, stream)


class _ItemPixels:
    """The images of an array or a map-style data set, all of one shape."""

    draws_numbers = True  # A data set may have random transforms; the sampler seeds the generators for them.

    def __init__(self, items: Any, labels: list[Any], size: int | None, channels: str | None) -> None:
        self._items, self._labels, self._size, self._channels = items, labels, size, channels
        self._shape: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self._items)

    def pixels(self, place: int) -> Pixels:
        """The image, or DataError."""
        item = self._items[place]
        if isinstance(item, tuple | list):
            if len(item) > 1 and not _same_label(item[1], self._labels[place]):
                raise DataError(
                    f"{self.name(place)} has the label {plain_label(item[1])!r:.40}, but the data set says "
                    f"{self._labels[place]!r:.40} elsewhere. Pass torch.utils.data.Subset(data, range(len(data))): it "
                    "has the items alone, so their own labels are read."
                )
            item = item[0] if item else None
        pixels = self._sized(bytes_of(item, self.name(place), self._channels), self.name(place))
        self._shape = self._shape or pixels.shape
        if pixels.shape != self._shape:
            raise DataError(
                f"{self.name(place)} has the shape {pixels.shape}, but the first image {self._shape}. "
                "Pass image_size=, or make them alike."
            )
        return pixels

    def _sized(self, pixels: Pixels, name: str) -> Pixels:
        if self._size is None:
            return np.ascontiguousarray(pixels.transpose(2, 0, 1))
        size, own = (self._size, self._size), pixels.shape[2]
        if own not in (GRAY, RGB) and pixels.shape[:2] != size:
            raise DataError(f"{name}: expected 1 or 3 channels to resize, but got {own}. Leave image_size out.")
        return fitted_array(pixels, name, Decoding(size, own))

    def name(self, place: int) -> str:
        """The place in the data set."""
        return f"image {place}"


def _labelled(data: Any, labels: Any) -> tuple[Any, list[Any], list[str] | None]:
    """The items, the label of each, and the names of labels 0, 1, ... if the data set knows them."""
    if isinstance(data, Tensor | np.ndarray):
        if data.ndim not in (3, 4) or len(data) == 0:
            kinds = "a tensor (images, channels, height, width) or an array (images, height, width, channels)"
            raise wrong_argument("data", f"images as {kinds}, at least one", data)
        if data.dtype in (torch.uint8, np.uint8) and data.max() == 1:
            raise DataError("data: expected uint8 up to 255, but there are 0 and 1 only, nearly black. Pass data != 0.")
        if labels is None or len(labels) != len(data):
            got = None if labels is None else len(labels)
            raise wrong_argument("labels", f"one for each of {len(data)} images", got)
        return data, label_list(labels), None
    sized = hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, IterableDataset | str)
    if not sized or isinstance(data, dict) or len(data) == 0:
        kinds = "a tensor or array of images, or a data set with __len__ and __getitem__, not empty"
        raise wrong_argument("data", kinds, data, "Collect an iterable one into a list first.")
    if labels is not None:
        raise ArgumentError("labels: expected None, because a data set has labels of its own. Leave labels out.")
    names = getattr(data, "classes", None)
    known = [str(name) for name in names] if isinstance(names, list | tuple) else None
    stated = _stated_labels(data)
    if stated is not None:
        items = [(place, data[place]) for place in _spots(len(data))]
        if all(
            _same_label(item[1], stated[place]) for place, item in items if isinstance(item, tuple | list) and item[1:]
        ):
            return data, stated, known
        known = None  # A wrapper that hands on wrong labels may hand on wrong names.
    return data, _labels_of_items(data), known


def _stated_labels(data: Dataset[Any]) -> list[Any] | None:
    """The labels of all items in an attribute of the data set, if it has one that is meant for them."""
    for attribute in ("targets", "labels"):
        own = getattr(data, attribute, None)
        plain_targets = getattr(data, "target_transform", None) is None
        if own is not None and plain_targets and hasattr(own, "__len__") and len(own) == len(data):  # type: ignore[arg-type]
            return label_list(own)
    return None


def _labels_of_items(data: Dataset[Any]) -> list[Any]:
    labels = []
    for place in range(len(data)):  # type: ignore[arg-type]
        item = data[place]
        if not isinstance(item, tuple | list) or len(item) != 2:
            got = f"{len(item)} values" if isinstance(item, tuple | list) else describe_value(item)
            raise ArgumentError(
                f"data: expected items (image, label), but item {place} is {got}. "
                "Wrap the data set so that it returns both, and nothing else."
            )
        labels.append(item[1])
    return label_list(labels)


def _refuse_random(source: _ItemPixels) -> None:
    """Reads some images twice; ArgumentError if the two differ, or if reading draws random numbers."""
    for place in _spots(len(source)):
        first, before = source.pixels(place), Generators()
        if not np.array_equal(first, source.pixels(place)) or before.moved():
            raise ArgumentError(
                f"data: {source.name(place)} is random: it changes whenever it is read, and memory would keep one draw "
                "for ever. Take the random transforms out of the data set and pass augment= to the EpisodeSampler "
                "of the training part, or pass stream=True to have random images in all parts."
            )


def _spots(count: int) -> list[int]:
    """Some places of a data set to look at, in order: the first, and others at random, the same ones every time."""
    return sorted({0, *(RandomStream("spots").permutation(count)[: _SPOTS - 1].tolist())})


def _same_label(one: Any, other: Any) -> bool:
    one, other = plain_label(one), plain_label(other)
    return isinstance(one, str | int | float) and isinstance(other, str | int | float) and one == other


def plain_label(label: Any) -> Any:
    """A label as a number or text, where it is an array or tensor of one."""
    single = isinstance(label, np.generic) or (isinstance(label, Tensor | np.ndarray) and math.prod(label.shape) == 1)
    return label.item() if single else label


def label_list(labels: Any) -> list[Any]:
    """Labels as plain values."""
    return [plain_label(label) for label in (labels.tolist() if isinstance(labels, Tensor | np.ndarray) else labels)]


def _text_of(label: Any, place: int, names: list[str] | None) -> str:
    if isinstance(label, str):
        return label
    if isinstance(label, bool) or not isinstance(label, int):
        raise ArgumentError(
            f"labels: expected whole numbers or texts, but label {place} is {describe_value(label)}. "
            "Few-shot tasks are made of classes."
        )
    if names is None:
        return str(label)
    if not 0 <= label < len(names):
        raise ArgumentError(f"class_names: there are {len(names)} names, and label {place} is {label}. Name each.")
    return names[label]
