"""A folder of photos per class -> pictures and labels, and the near-duplicates among them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from metawrap.data.class_folders import class_files, folder_tree, visible
from metawrap.data.image_files import files_at
from metawrap.data.pictures import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, decode_image
from metawrap.data.preprocessing import Preprocessing
from metawrap.data.problems import listed
from metawrap.errors import DataError

# Differing bits of the 64 that sum a picture up, up to which two pictures count as near-duplicates.
_NEAR = 4
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)  # bits set in a byte
# Pictures as the network gets them, all at once.
_MAX_SUPPORT_BYTES = 8 * 2**30


@dataclass(frozen=True)
class Photos:
    """Photos of known classes.

    classes: their names. files: the name of each photo. labels: (photos,), places among `classes`. pictures: uint8 of
    shape (photos, height, width, channels), as `Preprocessing.pixels` gives them.
    """

    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: Tensor
    pictures: NDArray[np.uint8]

    @classmethod
    def read(cls, place: str | Path, preprocessing: Preprocessing) -> Photos:
        """Reads a folder, zip or tar with a folder of photos for each class; other files are left out.

        Raises:
            DataError: there is no such folder, or fewer than two classes, a class without a photo, two classes whose
                names look the same, a photo that cannot be read, or more photos than fit into memory.
        """
        path = Path(place).expanduser()
        if not path.exists():
            raise DataError(
                f"support: there is no folder at '{place}'. Pass one that holds a folder of photos per class."
            )
        files = files_at(path, MAX_IMAGE_BYTES)
        classes = class_files(folder_tree(visible(files.names())), path)
        check_classes(list(classes), place)
        names = [(label, name) for label, own in enumerate(classes.values()) for name in own]
        height, width = preprocessing.size
        if (needed := 4 * len(names) * preprocessing.channels * height * width) > _MAX_SUPPORT_BYTES:
            raise DataError(
                f"support: {len(names)} photos of {width} x {height} pixels take {needed / 2**30:.1f} GiB; expected at "
                f"most {_MAX_SUPPORT_BYTES / 2**30:.0f}. Use fewer photos per class, or a smaller --image-size."
            )
        return cls.of(list(classes), ((label, name, files.read(name)) for label, name in names), preprocessing)

    @classmethod
    def of(
        cls,
        classes: Sequence[str],
        contents: Iterable[tuple[int, str, bytes]],
        preprocessing: Preprocessing,
        max_pixels: int = MAX_IMAGE_PIXELS,
    ) -> Photos:
        """Photos in memory.

        Args:
            contents: of each photo, the place of its class among `classes`, the name of its file, and the file. They
                are read one by one. max_pixels: photos of more pixels are refused.
        Raises:
            DataError: as `read` does.
        """
        check_classes(classes)
        decoding = replace(preprocessing.decoding, max_pixels=max_pixels)
        read = [(label, name, decode_image(content, name, decoding)) for label, name, content in contents]
        labels = torch.tensor([label for label, _, _ in read], dtype=torch.long)
        if empty := [name for label, name in enumerate(classes) if label not in labels]:
            raise DataError(f"There is no photo of {listed(empty)}. Add one to each, or remove the class.")
        pictures = np.ascontiguousarray(np.stack([pixels for _, _, pixels in read]).transpose(0, 2, 3, 1))
        return cls(tuple(classes), tuple(name for _, name, _ in read), labels, pictures)

    @property
    def prepared(self) -> Any:
        """The pictures, as `Preprocessing.prepare` gives them."""
        return self.pictures

    def near_duplicates(self) -> Iterator[tuple[str, str, bool]]:
        """Pairs of photos that look the same, and whether their classes differ.

        Two photos look the same where the signs of the brightness steps of an 8 x 8 thumbnail differ in few places.
        """
        signs = np.stack([np.packbits(_signs(picture)) for picture in self.pictures])
        for first in range(len(signs)):
            apart = _ONES[signs[first + 1 :] ^ signs[first]].sum(1)
            for place in np.flatnonzero(apart <= _NEAR):
                second = first + 1 + int(place)
                yield self.files[first], self.files[second], bool(self.labels[first] != self.labels[second])


def _signs(picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether each of 8 x 8 cells is darker than its right neighbour (a difference hash), 64 of them."""
    image = Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture).convert("L")
    cells = np.asarray(image.resize((9, 8), Image.Resampling.BOX)).astype(int)
    return (cells[:, 1:] > cells[:, :-1]).reshape(-1)


def check_classes(names: Sequence[str], place: object = None) -> None:
    """Raises DataError unless there are two or more classes, whose names look different. place: where they lie."""
    if len(names) < 2:
        found = f"got {len(names)}" if place is None else f"'{place}' holds one class, {listed(names)}"
        raise DataError(
            f"Expected examples of two or more classes, but {found}. Add a class; one such as 'other' may hold what is "
            "none of them."
        )
    seen: dict[str, str] = {}
    for name in names:
        looks = unicodedata.normalize("NFKC", name).casefold().strip()
        if looks in seen:
            raise DataError(
                f"The classes {listed([seen[looks], name])} have names that look the same. Make one class "
                "of them, or rename one."
            )
        seen[looks] = name
