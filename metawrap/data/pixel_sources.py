"""The three places that pixels come from: image files, rows of an array, and encoded pictures inside one file.

Each is a `PixelSource`: place -> checked bytes -> uint8 of shape (channels, height, width).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from metawrap.data.image_files import ImageFiles
from metawrap.data.image_sets import Pixels, StreamedImages
from metawrap.data.pictures import GRAY, RGB, Decoding, decode_image, fitted_array
from metawrap.data.stored_arrays import StoredArray
from metawrap.errors import DataError


class FilePixels:
    """Images that are a file each. positions: the place of each in an archive that can only be read in order."""

    def __init__(self, files: ImageFiles, names: Sequence[str], decoding: Decoding) -> None:
        self.files, self._names, self._decoding = files, tuple(names), decoding
        self.positions = np.array([files.position(name) for name in names]) if files.sequential else None

    def __len__(self) -> int:
        return len(self._names)

    def pixels(self, place: int, remarks: list[str] | None = None) -> Pixels:
        """The image, or DataError; `remarks` is extended by what was done to it."""
        return decode_image(self.files.read(self._names[place]), self._names[place], self._decoding, remarks)

    def name(self, place: int) -> str:
        """The file's name."""
        return self._names[place]

    def identity(self, place: int, whole: bool) -> bytes:
        """The file's content; or its size, and its name without folders."""
        name = self._names[place]
        return self.files.read(name) if whole else f"{self.files.size(name)} {name.rpartition('/')[2]}".encode()


class PicturePixels:
    """Encoded pictures, PNG for example, in one file; each is an array of bytes that may stay in the file."""

    def __init__(self, pictures: Sequence[StoredArray | bytes], decoding: Decoding, file: str) -> None:
        self._pictures, self._decoding, self._file = pictures, decoding, file

    def __len__(self) -> int:
        return len(self._pictures)

    def pixels(self, place: int, remarks: list[str] | None = None) -> Pixels:
        """The image, or DataError; `remarks` is extended by what was done to it."""
        return decode_image(self.identity(place), self.name(place), self._decoding, remarks)

    def name(self, place: int) -> str:
        """The file, and the place in it."""
        return f"{self._file}[{place}]"

    def identity(self, place: int, whole: bool = True) -> bytes:
        """The picture's bytes, or their number."""
        picture = self._pictures[place]
        content = picture if isinstance(picture, bytes) else picture.read().tobytes()
        return content if whole else b"%d" % len(content)


class ArrayPixels:
    """Rows of a uint8 array of shape (images, height, width, 1 or 3), which may stay in its file."""

    def __init__(self, array: NDArray[np.uint8] | StoredArray, decoding: Decoding, file: str) -> None:
        channels = array.shape[-1] if len(array.shape) == 4 else 0
        if array.dtype != np.uint8 or channels not in (GRAY, RGB) or 0 in array.shape:
            raise DataError(
                f"'{file}': expected images as a uint8 array of shape (images, height, width, 3), but it has type "
                f"{array.dtype} and shape {tuple(array.shape)}. Get a fresh copy of it, or convert it."
            )
        self._array, self._decoding, self._file = array, decoding, file
        self._rows: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return int(self._array.shape[0])

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of an image: (channels, height, width)."""
        return self._decoding.shape

    def pixels(self, place: int) -> Pixels:
        """The image."""
        return fitted_array(self._row(place), self.name(place), self._decoding)

    def _row(self, place: int) -> Pixels:
        if self._rows is None:
            self._rows = self._array.read() if isinstance(self._array, StoredArray) else self._array
        row: Pixels = self._rows[place]
        return row

    def name(self, place: int) -> str:
        """The file, and the row in it."""
        return f"{self._file}[{place}]"

    def identity(self, place: int, whole: bool) -> bytes:
        """The row's bytes, or nothing."""
        return self._row(place).tobytes() if whole else b""

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
