"""Files of each class -> bytes -> checked pictures of one size -> LabelledImages."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from metawrap.data.images import LabelledImages
from metawrap.data.sources import ImageSource
from metawrap.errors import DataError

Pixels: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True)
class Decoding:
    """How a file becomes pixels: squeezed to size x size, one channel if grayscale, else three."""

    size: int
    grayscale: bool
    resample: Image.Resampling
    max_pixels: int


def read_classes(source: ImageSource, classes: Mapping[str, Sequence[str]], decoding: Decoding) -> LabelledImages:
    """Reads every file of every class (class name -> file names); labels follow the order of the mapping.

    Raises:
        DataError: a file is missing, too large, or no readable image; the message names it.
    """
    counts = torch.tensor([len(names) for names in classes.values()])
    channels = 1 if decoding.grayscale else 3
    # Filled in place: stacking a list would need the memory of the whole set twice.
    images = torch.empty((int(counts.sum()), channels, decoding.size, decoding.size), dtype=torch.uint8)
    files = [name for names in classes.values() for name in names]
    with warnings.catch_warnings():
        # Pillow only warns about moderately huge headers; decode_image refuses them.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for place, name in enumerate(files):
            images[place] = torch.from_numpy(decode_image(source.read(name), name, decoding))
    return LabelledImages(images, torch.arange(len(classes)).repeat_interleave(counts), tuple(classes))


def decode_image(content: bytes, name: str, decoding: Decoding) -> Pixels:
    """A picture as uint8 of shape (channels, size, size).

    Raises:
        DataError: the content is no picture, is cut short, or its header claims more than `max_pixels` pixels.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            # The header is read, the pixels are not: the place to stop a decompression bomb.
            _check_pixels(name, image, decoding.max_pixels)
            # Converted first, because Pillow resizes palette images by nearest neighbour whatever it is asked for.
            plain = image.convert("L" if decoding.grayscale else "RGB")
        pixels = np.array(plain.resize((decoding.size, decoding.size), decoding.resample), dtype=np.uint8)
    except DataError:
        raise
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"'{name}' is not a readable image: {error}. Replace or remove it.") from error
    return pixels[None] if decoding.grayscale else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _check_pixels(name: str, image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise DataError(
            f"'{name}' claims {image.width} x {image.height} pixels; at most {max_pixels} in all are accepted. "
            "Shrink or remove it."
        )
