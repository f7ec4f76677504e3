"""Preprocessing: a picture -> pixels -> a network's input, the same in training, evaluation and deployment."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from pydantic import BeforeValidator, Field
from torch import Tensor

from metawrap.data.array_pictures import bytes_of
from metawrap.data.image_sets import Pixels
from metawrap.data.normalisation import normalised, statistics_of
from metawrap.data.pictures import (
    GRAY,
    MAX_IMAGE_BYTES,
    MAX_IMAGE_PIXELS,
    RGB,
    Decoding,
    check_pixels,
    decode_image,
    fitted,
    plain,
)
from metawrap.data.problems import check_int, check_size, reading, wrong_argument
from metawrap.errors import ArgumentError
from metawrap.settings.validated import Count, Expected, Number, Options, Positive, validated


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Size = Annotated[
    tuple[Count, Count], BeforeValidator(_as_tuple), Expected("(height, width), two whole numbers of at least 1")
]
Means = Annotated[tuple[Number, ...], BeforeValidator(_as_tuple), Expected("a finite number for each channel")]
Deviations = Annotated[tuple[Positive, ...], BeforeValidator(_as_tuple), Expected("a positive number for each channel")]
Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]


@validated
class Preprocessing(Options):
    """The way from a picture to a network's input.

    The picture is turned as its EXIF says, transparent pixels become white, 16 bits become 8. Then it is resized to
    `size` / `crop_fraction`: "squeeze" changes the aspect, "crop" keeps it and covers that size. The centre of `size`
    is cut out. The network gets (pixels / 255 - mean) / deviation.

    size: (height, width) of the input. crop_fraction: the share of the resized picture's sides, with "crop" of its
    short side, that is kept. interpolation: Pillow's, always antialiased but for "nearest". mean, deviation: of each
    channel of the input, in its order, for pixels in [0, 1]; by default 0 and 1. channels: 3, or 1 for gray.
    order: "RGB" or "BGR", the order of the input's channels.

    >>> way = Preprocessing(size=(2, 2), mean=(0.5, 0.5, 0.5), deviation=(0.5, 0.5, 0.5))
    >>> way(np.full((7, 5, 3), 255, np.uint8))[0]
    tensor([[1., 1.],
            [1., 1.]])
    >>> Preprocessing.from_dict(way.to_dict()) == way
    True
    """

    kind: ClassVar[str] = "photos"

    size: Size
    resize: Literal["squeeze", "crop"] = "squeeze"
    crop_fraction: Annotated[float, Field(ge=0.01, le=1), Expected("a number from 0.01 to 1")] = 1.0
    interpolation: Interpolation = "lanczos"
    mean: Means = ()
    deviation: Deviations = ()
    channels: Literal[1, 3] = 3
    order: Literal["RGB", "BGR"] = "RGB"

    def check_together(self) -> None:
        """Fills in mean and deviation. Raises ArgumentError if they do not fit the channels, or one gray is turned."""
        for name, default in (("mean", 0.0), ("deviation", 1.0)):
            values = getattr(self, name) or (default,) * self.channels
            if len(values) != self.channels:
                raise wrong_argument(name, f"a number for each of {self.channels} channels", values)
            object.__setattr__(self, name, values)
        if self.channels == GRAY and self.order != "RGB":
            raise wrong_argument("order", "'RGB', because there is one channel", self.order)

    @property
    def decoding(self) -> Decoding:
        """The part before the normalisation."""
        return Decoding(self.size, self.channels, self.resize, self.crop_fraction, self.interpolation)

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and deviation; None if they change nothing."""
        plain = set(self.mean) == {0.0} and set(self.deviation) == {1.0}
        return None if plain else (self.mean, self.deviation)

    def pixels(self, picture: Any) -> Pixels:
        """A picture at the network's size, uint8 of shape (height, width, channels), the colours as RGB.

        Args:
            picture: a path, the content of a file as bytes, a PIL image, an array (height, width, channels) or
                (height, width), or a tensor (channels, height, width); uint8, bool, or floats in [0, 1].
        Raises:
            DataError: no readable picture, too large a one, or pixels in another range.
            ArgumentError: an array or tensor whose channels are at an unknown place.
        """
        return np.ascontiguousarray(self._decoded(picture).transpose(1, 2, 0))

    def prepare(self, picture: Any) -> Pixels:
        """As `pixels`; the name that `TextPreprocessing` has, too."""
        return self.pixels(picture)

    def stack(self, prepared: Sequence[Any]) -> Tensor:
        """Pictures of `pixels` as a program takes them: uint8 of shape (pictures, channels, height, width)."""
        return torch.from_numpy(np.ascontiguousarray(np.asarray(prepared).transpose(0, 3, 1, 2)))

    def inputs(self, prepared: Sequence[Any]) -> Tensor:
        """Pictures of `pixels` as the network takes them: floats of shape (pictures, channels, height, width)."""
        return self.normalised(self.stack(prepared))

    def examples(self) -> list[Pixels]:
        """Two random pictures of `pixels`, to try a network on."""
        return list(np.random.default_rng(0).integers(0, 256, (2, *self.size, self.channels), np.uint8))

    def __call__(self, picture: Any) -> Tensor:
        """A picture, see `pixels`, as the network's input: float32 of shape (channels, height, width)."""
        return self.normalised(torch.from_numpy(self._decoded(picture)))

    def normalised(self, pixels: Tensor) -> Tensor:
        """RGB pixels, uint8 or floats in [0, 1] of shape (..., channels, height, width), as the network's input."""
        statistics = statistics_of(self.statistics, self.channels)
        if statistics is not None:
            statistics = statistics[0].to(pixels.device), statistics[1].to(pixels.device)
        return normalised(pixels, statistics, self.order == "BGR")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON can hold them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Preprocessing:
        """The preprocessing from the values of `to_dict`.

        Raises:
            ArgumentError: no mapping, a name that is unknown, or a value that is wrong.
        """
        if not isinstance(stored, Mapping):
            raise wrong_argument("preprocessing", "a mapping as to_dict returns it", stored)
        known = [each.name for each in fields(cls)]
        if unknown := [str(name) for name in stored if name not in known]:
            raise ArgumentError(f"preprocessing: it has no '{unknown[0]:.60}'; it has {', '.join(known)}.")
        if "size" not in stored:
            raise ArgumentError("preprocessing: expected size=(height, width), but it is missing.")
        return cls(**stored)

    def _decoded(self, picture: Any) -> Pixels:
        """(channels, height, width)."""
        if isinstance(picture, str | os.PathLike):
            return decode_image(_content(Path(picture)), str(picture), self.decoding)
        if isinstance(picture, bytes):
            check_size("the picture", len(picture), MAX_IMAGE_BYTES)
            return decode_image(picture, "the picture", self.decoding)
        name = "picture"
        if not isinstance(picture, Image.Image):
            array = bytes_of(picture, name, fix="Pass an array (height, width, 3) or a PIL image.")
            picture = Image.fromarray(array[:, :, 0] if array.shape[2] == GRAY else np.ascontiguousarray(array))
        name = getattr(picture, "filename", "") or name
        check_pixels(picture, name, MAX_IMAGE_PIXELS)
        with reading(f"'{name}' is not a readable image", OSError, ValueError, SyntaxError, fix="Replace it."):
            return fitted(plain(picture, name), name, self.decoding)
        raise AssertionError


# The side in pixels of images that are squeezed to squares; or a preprocessing, whose normalisation does not count.
ImageSize: TypeAlias = int | Preprocessing


def decoding_of(image_size: ImageSize, channels: int = RGB, **how: Any) -> Decoding:
    """The decoding that a loader's `image_size` asks for. how: fields of `Decoding` for a plain number.

    Raises:
        ArgumentError: neither a preprocessing nor an integer of at least 1.
    """
    if isinstance(image_size, Preprocessing):
        most = {"max_pixels": how["max_pixels"]} if "max_pixels" in how else {}
        return replace(image_size.decoding, **most)
    check_int("image_size", image_size, 1)
    return Decoding((image_size, image_size), channels, **how)


def _content(path: Path) -> bytes:
    with reading(f"'{path}' cannot be read", OSError, fix="Correct the path."), open(path, "rb") as file:
        content = file.read(MAX_IMAGE_BYTES + 1)
    check_size(str(path), len(content), MAX_IMAGE_BYTES)
    return content
