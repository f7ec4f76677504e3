"""Images that are rows of an array or pictures inside a file: place -> pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from metawrap.data.decode import Decoding, decode_image
from metawrap.data.pickled_array import PickledArray
from metawrap.data.streamed import Pixels
from metawrap.errors import DataError

GRAY, RGB = 1, 3


class ArrayPixels:
    """Rows of a uint8 array of shape (images, height, width, 1 or 3), maybe in a file, as images of one size."""

    def __init__(self, array: NDArray[np.uint8] | PickledArray, size: int, name: str) -> None:
        channels = array.shape[-1] if len(array.shape) == 4 else 0
        if array.dtype != np.uint8 or channels not in (GRAY, RGB) or 0 in array.shape:
            raise DataError(
                f"'{name}': expected images as a uint8 array of shape (images, height, width, 3), but it has type "
                f"{array.dtype} and shape {tuple(array.shape)}. Get a fresh copy of it, or convert it."
            )
        self._array, self._size, self._name = array, size, name
        self._rows: NDArray[np.uint8] | None = None if isinstance(array, PickledArray) else array

    def __len__(self) -> int:
        return int(self._array.shape[0])

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image: (channels, height, width)."""
        return int(self._array.shape[-1]), self._size, self._size

    def pixels(self, place: int) -> Pixels:
        """The image, uint8, (channels, size, size)."""
        if self._rows is None:
            assert isinstance(self._array, PickledArray)
            self._rows = self._array.read()
        return resized(self._rows[place], self._size)

    def name(self, place: int) -> str:
        """The file, and the row in it."""
        return f"{self._name}[{place}]"

    def __getstate__(self) -> dict[str, object]:
        # A view of a file would be copied whole; a worker looks at the file itself.
        return {**self.__dict__, "_rows": None if isinstance(self._array, PickledArray) else self._rows}


class PicturePixels:
    """Encoded pictures, PNG say, each an array of bytes that may lie in a file."""

    def __init__(self, pictures: Sequence[PickledArray | bytes], decoding: Decoding, name: str) -> None:
        self._pictures, self._decoding, self._name = pictures, decoding, name

    def __len__(self) -> int:
        return len(self._pictures)

    def pixels(self, place: int) -> Pixels:
        """The image, uint8, (channels, size, size), or DataError."""
        picture = self._pictures[place]
        content = picture if isinstance(picture, bytes) else picture.read().tobytes()
        return decode_image(content, self.name(place), self._decoding)

    def name(self, place: int) -> str:
        """The file, and the place in it."""
        return f"{self._name}[{place}]"


def resized(image: NDArray[np.uint8], size: int) -> Pixels:
    """(height, width, channels) as (channels, size, size), squeezed with Lanczos if the size differs."""
    if image.shape[:2] != (size, size):
        flat = image[:, :, 0] if image.shape[2] == GRAY else image
        picture = Image.fromarray(np.ascontiguousarray(flat)).resize((size, size), Image.Resampling.LANCZOS)
        image = np.asarray(picture, dtype=np.uint8).reshape(size, size, -1)
    return np.ascontiguousarray(image.transpose(2, 0, 1))
