"""The three places that pixels come from: image files, rows of an array, and encoded pictures inside one file.

Each is a `PixelSource`: place -> checked bytes -> uint8 of shape (channels, size, size).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from metawrap.data.image_files import ImageFiles
from metawrap.data.image_sets import Pixels, StreamedImages
from metawrap.data.stored_arrays import StoredArray
from metawrap.errors import DataError

GRAY, RGB = 1, 3
MAX_IMAGE_BYTES = 64 * 2**20
MAX_IMAGE_PIXELS = 2**26


@dataclass(frozen=True)
class Decoding:
    """The way from a file to pixels: size x size, three channels, or one if grayscale."""

    size: int
    grayscale: bool = False
    resample: Image.Resampling = Image.Resampling.LANCZOS
    max_pixels: int = MAX_IMAGE_PIXELS

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of a decoded image: (channels, height, width)."""
        return (GRAY if self.grayscale else RGB), self.size, self.size


class FilePixels:
    """Images that are a file each."""

    def __init__(self, files: ImageFiles, names: Sequence[str], decoding: Decoding) -> None:
        self._files, self._names, self._decoding = files, tuple(names), decoding

    def __len__(self) -> int:
        return len(self._names)

    def pixels(self, place: int) -> Pixels:
        """The image, or DataError."""
        return decode_image(self._files.read(self._names[place]), self._names[place], self._decoding)

    def name(self, place: int) -> str:
        """The file's name."""
        return self._names[place]


class PicturePixels:
    """Encoded pictures, PNG for example, in one file; each is an array of bytes that may stay in the file."""

    def __init__(self, pictures: Sequence[StoredArray | bytes], decoding: Decoding, file: str) -> None:
        self._pictures, self._decoding, self._file = pictures, decoding, file

    def __len__(self) -> int:
        return len(self._pictures)

    def pixels(self, place: int) -> Pixels:
        """The image, or DataError."""
        picture = self._pictures[place]
        content = picture if isinstance(picture, bytes) else picture.read().tobytes()
        return decode_image(content, self.name(place), self._decoding)

    def name(self, place: int) -> str:
        """The file, and the place in it."""
        return f"{self._file}[{place}]"


class ArrayPixels:
    """Rows of a uint8 array of shape (images, height, width, 1 or 3), which may stay in its file."""

    def __init__(self, array: NDArray[np.uint8] | StoredArray, size: int, file: str) -> None:
        channels = array.shape[-1] if len(array.shape) == 4 else 0
        if array.dtype != np.uint8 or channels not in (GRAY, RGB) or 0 in array.shape:
            raise DataError(
                f"'{file}': expected images as a uint8 array of shape (images, height, width, 3), but it has type "
                f"{array.dtype} and shape {tuple(array.shape)}. Get a fresh copy of it, or convert it."
            )
        self._array, self._size, self._file = array, size, file
        self._rows: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return int(self._array.shape[0])

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of an image: (channels, height, width)."""
        return int(self._array.shape[-1]), self._size, self._size

    def pixels(self, place: int) -> Pixels:
        """The image."""
        if self._rows is None:
            self._rows = self._array.read() if isinstance(self._array, StoredArray) else self._array
        return resized(self._rows[place], self._size)

    def name(self, place: int) -> str:
        """The file, and the row in it."""
        return f"{self._file}[{place}]"

    def __getstate__(self) -> dict[str, object]:
        # Pickle would copy a view of the file whole; a worker maps the file itself.
        return {**self.__dict__, "_rows": None}


def file_classes(
    files: ImageFiles, classes: Mapping[str, Sequence[str]], decoding: Decoding, origin: str = ""
) -> StreamedImages:
    """All files of all classes (class name -> file names), unread; labels follow the mapping's order."""
    counts = torch.tensor([len(names) for names in classes.values()])
    source = FilePixels(files, [name for names in classes.values() for name in names], decoding)
    labels = torch.arange(len(classes)).repeat_interleave(counts)
    return StreamedImages(source, labels, tuple(classes), decoding.shape, origin)


def decode_image(content: bytes, name: str, decoding: Decoding) -> Pixels:
    """A picture as uint8 of shape (channels, size, size).

    Raises:
        DataError: the content is no picture, is cut short, or its header claims more than `max_pixels` pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of huge headers, which are refused here.
            with Image.open(io.BytesIO(content)) as image:
                # Only the header is read at this point, so a decompression bomb is stopped before its pixels.
                if image.width * image.height > decoding.max_pixels:
                    raise DataError(
                        f"'{name}' claims {image.width} x {image.height} pixels; at most {decoding.max_pixels} in all "
                        "are accepted. Shrink or remove it."
                    )
                # Converted first, because Pillow resizes palette images by nearest neighbour always.
                plain = image.convert("L" if decoding.grayscale else "RGB")
        return _channels_first(plain.resize((decoding.size, decoding.size), decoding.resample))
    except DataError:
        raise
    except UnidentifiedImageError as error:  # Its message names an object in memory.
        raise DataError(f"'{name}' is not a readable image: no known format. Replace or remove it.") from error
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"'{name}' is not a readable image: {error}. Replace or remove it.") from error


def resized(image: NDArray[np.uint8], size: int) -> Pixels:
    """(height, width, 1 or 3) as (channels, size, size); another size is squeezed or stretched with Lanczos."""
    if image.shape[:2] == (size, size):
        return np.ascontiguousarray(image.transpose(2, 0, 1))
    flat = image[:, :, 0] if image.shape[2] == GRAY else image
    picture = Image.fromarray(np.ascontiguousarray(flat))
    return _channels_first(picture.resize((size, size), Image.Resampling.LANCZOS))


def _channels_first(picture: Image.Image) -> Pixels:
    pixels = np.array(picture, dtype=np.uint8).reshape(picture.height, picture.width, -1)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
