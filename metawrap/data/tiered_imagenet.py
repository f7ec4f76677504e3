"""tieredImageNet: 608 classes of ImageNet in 34 categories, split by category; layout -> parts -> pixels.

Source: Ren et al. 2018, arXiv:1803.00676: 351 classes to train on, 97 to validate, 160 to test, 84 x 84. Three layouts
are read: the published {train,val,test}_images_png.pkl (PNG pictures) with {train,val,test}_labels.pkl; the
{train,val,test}_images.npz that many programs unpack them into; and train, val and test folders of class folders.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from metawrap.data.cached_labels import renumbered, texts, whole_numbers, with_text_keys
from metawrap.data.folder import published_parts
from metawrap.data.image_files import FolderFiles
from metawrap.data.image_sets import DataSplits, StreamedImages, as_splits
from metawrap.data.pickles import read_pickle
from metawrap.data.pictures import MAX_IMAGE_BYTES, Decoding
from metawrap.data.pixel_sources import ArrayPixels, PicturePixels
from metawrap.data.preprocessing import ImageSize, decoding_of
from metawrap.data.stored_arrays import StoredArray, npz_array
from metawrap.errors import DataError

MAX_VALUES = 2**25  # the largest part has 448,695 pictures, each some 25 opcodes
_PARTS = ("train", "val", "test")
_HOW_TO_GET = (
    "Pass root=<folder> with {train,val,test}_images_png.pkl and {train,val,test}_labels.pkl, with "
    "{train,val,test}_images.npz and the same labels, or with train, val and test folders of class folders. It cannot "
    "be downloaded for you: ImageNet has terms of use."
)


def load_tiered_imagenet(root: str | Path, *, image_size: ImageSize = 84, stream: bool | None = None) -> DataSplits:
    """tieredImageNet with the split of its files.

        >>> train, validation, test = load_tiered_imagenet("path/to/tiered-imagenet", stream=True)  # doctest: +SKIP

    PNG pictures are decoded as they are stored: some programs stored them with red and blue swapped.

    Args:
        root: a folder in one of the layouts above, or the parent of such a folder called tiered-imagenet.
        image_size, stream: as for `load_image_folder`; all images take 16 GB of memory.
    Raises:
        ArgumentError, DataError: as `load_image_folder`; or an unknown layout, or an unsafe or broken file.
    """
    decoding = decoding_of(image_size)
    base = Path(root).expanduser()
    base = base / "tiered-imagenet" if (base / "tiered-imagenet").is_dir() else base
    parts: list[StreamedImages] | None = None
    for suffix in ("_images_png.pkl", "_images.npz"):
        files = [base / f"{part}{suffix}" for part in _PARTS]
        if parts is None and any(file.is_file() for file in files):
            parts = [_read_part(file, part, decoding) for file, part in zip(files, _PARTS, strict=True)]
    if parts is None and base.is_dir():
        parts = published_parts(FolderFiles(base, MAX_IMAGE_BYTES), base, decoding)
    if parts is None:
        raise DataError(f"tieredImageNet was not found at '{base}' in a layout that metawrap knows. {_HOW_TO_GET}")
    return as_splits(parts, stream)


def _read_part(file: Path, part: str, decoding: Decoding) -> StreamedImages:
    labels_file = file.with_name(f"{part}_labels.pkl")
    for path in (file, labels_file):
        if not path.is_file():
            raise DataError(f"'{path}' is missing, beside other parts of tieredImageNet. {_HOW_TO_GET}")
    pixels: ArrayPixels | PicturePixels
    if file.suffix == ".npz":
        pixels, origin = ArrayPixels(npz_array(file, "images"), decoding, str(file)), "images.npz with labels.pkl"
    else:
        pixels, origin = _pictures(file, decoding), "PNG pictures in a pickle with labels.pkl"
    labels, names = _labels(labels_file, len(pixels), part)
    return StreamedImages(pixels, torch.from_numpy(labels), names, decoding.shape, origin)


def _pictures(file: Path, decoding: Decoding) -> PicturePixels:
    pictures = read_pickle(file, max_values=MAX_VALUES)
    if not isinstance(pictures, list) or not pictures or not all(_is_picture(each) for each in pictures):
        raise DataError(
            f"'{file}': expected a list of PNG pictures, each an array of bytes (at most {MAX_IMAGE_BYTES}). "
            "Get a fresh copy of it."
        )
    return PicturePixels(pictures, decoding, str(file))


def _is_picture(value: Any) -> bool:
    if isinstance(value, StoredArray):
        return value.dtype == np.uint8 and int(np.prod(value.shape)) <= MAX_IMAGE_BYTES
    return isinstance(value, bytes) and len(value) <= MAX_IMAGE_BYTES


def _labels(path: Path, count: int, part: str) -> tuple[Any, tuple[str, ...]]:
    given = with_text_keys(read_pickle(path))
    if "label_specific" not in given:
        raise DataError(f"'{path}': expected a dict with label_specific. Get a fresh copy of it.")
    numbers, labels = renumbered(whole_numbers(given["label_specific"], count, path))
    known = given.get("label_specific_str")
    known = known.read().tolist() if isinstance(known, StoredArray) else known
    if isinstance(known, list) and len(set(texts(known))) == len(known) > numbers[-1]:
        return labels, texts(known[number] for number in numbers)
    return labels, tuple(f"{part} {number}" for number in numbers)  # The labels of each part begin at 0.
