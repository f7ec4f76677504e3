"""Files of each class -> bytes -> checked pictures of one size -> StreamedImages."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from metawrap.data.sources import ImageSource
from metawrap.data.streamed import Pixels, StreamedImages
from metawrap.errors import DataError


@dataclass(frozen=True)
class Decoding:
    """How a file becomes pixels: squeezed to size x size, one channel if grayscale, else three."""

    size: int
    grayscale: bool
    resample: Image.Resampling
    max_pixels: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a decoded image: (channels, height, width)."""
        return (1 if self.grayscale else 3), self.size, self.size


class FilePixels:
    """Images that are a file each, decoded when asked for."""

    def __init__(self, files: ImageSource, names: Sequence[str], decoding: Decoding) -> None:
        self._files, self._names, self._decoding = files, tuple(names), decoding

    def __len__(self) -> int:
        return len(self._names)

    def pixels(self, place: int) -> Pixels:
        """The image, uint8, (channels, size, size), or DataError."""
        return decode_image(self._files.read(self._names[place]), self._names[place], self._decoding)

    def name(self, place: int) -> str:
        """The file's name."""
        return self._names[place]


def file_classes(
    source: ImageSource, classes: Mapping[str, Sequence[str]], decoding: Decoding, origin: str = ""
) -> StreamedImages:
    """Every file of every class (class name -> file names), none of them read yet; labels follow the mapping's order.

    What is drawn later may raise DataError: a file is missing, too large, or no readable image; the message names it.
    """
    counts = torch.tensor([len(names) for names in classes.values()])
    files = FilePixels(source, [name for names in classes.values() for name in names], decoding)
    labels = torch.arange(len(classes)).repeat_interleave(counts)
    return StreamedImages(files, labels, tuple(classes), decoding.shape, origin)


def decode_image(content: bytes, name: str, decoding: Decoding) -> Pixels:
    """A picture as uint8 of shape (channels, size, size).

    Raises:
        DataError: the content is no picture, is cut short, or its header claims more than `max_pixels` pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of huge headers Pillow warns; below they are refused.
            with Image.open(io.BytesIO(content)) as image:
                # The header is read, the pixels are not: the place to stop a decompression bomb.
                _check_pixels(name, image, decoding.max_pixels)
                # Converted first: Pillow resizes palette images by nearest neighbour whatever it is asked for.
                plain = image.convert("L" if decoding.grayscale else "RGB")
        pixels = np.array(plain.resize((decoding.size, decoding.size), decoding.resample), dtype=np.uint8)
    except DataError:
        raise
    except UnidentifiedImageError as error:  # Whose message names an object in memory.
        raise DataError(f"'{name}' is not a readable image: no known format. Replace or remove it.") from error
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"'{name}' is not a readable image: {error}. Replace or remove it.") from error
    return pixels[None] if decoding.grayscale else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _check_pixels(name: str, image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise DataError(
            f"'{name}' claims {image.width} x {image.height} pixels; at most {max_pixels} in all are accepted. "
            "Shrink or remove it."
        )
