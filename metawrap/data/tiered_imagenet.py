"""tieredImageNet: 608 classes of ImageNet in 34 categories, split by category; layout -> parts -> pixels.

Source: Ren et al. 2018, arXiv:1803.00676: 351 classes to train on, 97 to validate, 160 to test, 84 x 84. Read are the
published {train,val,test}_images_png.pkl (PNG pictures) with {train,val,test}_labels.pkl; the
{train,val,test}_images.npz that many programs unpack them into; and train, val and test folders of class folders.
"""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from PIL import Image

from metawrap.data.arrays import ArrayPixels, PicturePixels
from metawrap.data.checks import check_int
from metawrap.data.decode import Decoding, file_classes
from metawrap.data.folder import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, split_folders
from metawrap.data.mini_imagenet import numbered_labels, texts
from metawrap.data.pickled_array import Content, PickledArray, Stretch
from metawrap.data.pickles import read_pickle
from metawrap.data.sources import FolderSource
from metawrap.data.splits import DataSplits, as_splits
from metawrap.data.streamed import StreamedImages
from metawrap.errors import DataError

MAX_VALUES = 2**25  # the largest part has 448,695 pictures, each some 25 opcodes
_PARTS = ("train", "val", "test")
_HOW_TO_GET = (
    "Pass root=<folder> with {train,val,test}_images_png.pkl and {train,val,test}_labels.pkl, with "
    "{train,val,test}_images.npz and the same labels, or with train, val and test folders of class folders. It cannot "
    "be downloaded for you: ImageNet has terms of use."
)


def load_tiered_imagenet(root: str | Path, *, image_size: int = 84, stream: bool | None = None) -> DataSplits:
    """tieredImageNet with the split of its files.

    PNG pictures are taken as they are: red and blue are swapped if whoever wrote them had swapped them.

    Args:
        root: a folder in one of the layouts above, or one that holds it as tiered-imagenet.
        image_size: images of another size are squeezed to this many pixels on either side (Lanczos).
        stream: read images when they are drawn (True), all now (False, 16 GB), or whichever suits the memory.
    Raises:
        ArgumentError: image_size is no integer of at least 1.
        DataError: no known layout, or a file that is missing, unsafe or broken; names it.
    """
    check_int("image_size", image_size, 1)
    base = Path(root).expanduser()
    base = base / "tiered-imagenet" if (base / "tiered-imagenet").is_dir() else base
    decoding = Decoding(image_size, False, Image.Resampling.LANCZOS, MAX_IMAGE_PIXELS)
    for suffix in ("_images_png.pkl", "_images.npz"):
        files = [base / f"{part}{suffix}" for part in _PARTS]
        if any(file.is_file() for file in files):
            return as_splits(
                [_read_part(file, part, decoding) for file, part in zip(files, _PARTS, strict=True)], stream
            )
    folders = split_folders(base) if base.is_dir() else None
    if folders is None:
        raise DataError(f"tieredImageNet was not found at '{base}' in a layout that metawrap knows. {_HOW_TO_GET}")
    source, origin = FolderSource(base, MAX_IMAGE_BYTES), "train, val and test folders of class folders"
    return as_splits([file_classes(source, part, decoding, origin) for part in folders], stream)


def _read_part(file: Path, part: str, decoding: Decoding) -> StreamedImages:
    for path in (file, file.with_name(f"{part}_labels.pkl")):
        if not path.is_file():
            raise DataError(f"'{path}' is missing, beside other parts of tieredImageNet. {_HOW_TO_GET}")
    pixels: ArrayPixels | PicturePixels
    if file.suffix == ".npz":
        pixels, origin = (
            ArrayPixels(stored_array(file, "images"), decoding.size, str(file)),
            "images.npz with labels.pkl",
        )
    else:
        pixels, origin = _pictures(file, decoding), "PNG pictures in a pickle with labels.pkl"
    labels, names = _labels(file.with_name(f"{part}_labels.pkl"), len(pixels), part)
    return StreamedImages(pixels, torch.from_numpy(labels), names, decoding.shape, origin)


def _pictures(file: Path, decoding: Decoding) -> PicturePixels:
    pictures = read_pickle(file, max_values=MAX_VALUES)
    good = isinstance(pictures, list) and pictures
    for picture in pictures if good else ():
        plain = isinstance(picture, bytes) or (isinstance(picture, PickledArray) and picture.dtype == np.uint8)
        size = len(picture) if isinstance(picture, bytes) else int(np.prod(picture.shape)) if plain else 0
        if not plain or size > MAX_IMAGE_BYTES:
            good = False
    if not good:
        raise DataError(
            f"'{file}': expected a list of PNG pictures, each an array of bytes (at most {MAX_IMAGE_BYTES}). "
            "Get a fresh copy of it."
        )
    return PicturePixels(pictures, decoding, str(file))


def _labels(path: Path, count: int, part: str) -> tuple[Any, tuple[str, ...]]:
    given = read_pickle(path)
    given = {texts([key])[0]: value for key, value in given.items()} if isinstance(given, dict) else {}
    if "label_specific" not in given:
        raise DataError(f"'{path}': expected a dict with label_specific. Get a fresh copy of it.")
    numbers, compact = np.unique(numbered_labels(given["label_specific"], count, path), return_inverse=True)
    known = given.get("label_specific_str")
    known = known.read().tolist() if isinstance(known, PickledArray) else known
    if isinstance(known, list) and len(set(texts(known))) == len(known) > numbers[-1]:
        names = tuple(texts([known[number]])[0] for number in numbers)
    else:  # Each part counts from 0.
        names = tuple(f"{part} {number}" for number in numbers)
    return compact.astype(np.int64), names


def stored_array(file: Path, name: str) -> PickledArray:
    """An array of an uncompressed .npz, as np.savez writes it, left where it lies; nothing is unpickled.

    Raises:
        DataError: it is missing, compressed, of objects, or the file is broken.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            member = archive.getinfo(f"{name}.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            raise DataError(
                f"'{file}' is compressed, so that its images cannot be read one by one. Save it with np.savez, not "
                "np.savez_compressed."
            )
        with open(file, "rb") as raw:
            raw.seek(member.header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", raw.read(4))
            raw.seek(member.header_offset + 30 + name_length + extra_length)
            begin = raw.tell()
            read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(raw)]
            shape, fortran, dtype = read_header(raw)
            start = raw.tell()
    except (zipfile.BadZipFile, KeyError, OSError, ValueError, struct.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"'{file}' holds no readable array '{name}': {error}. Get a fresh copy of it.") from error
    if dtype.hasobject:
        raise DataError(f"'{file}': the array '{name}' holds Python objects; expected numbers. It was not read.")
    length = member.file_size - (start - begin)
    return PickledArray(str(file), shape, dtype, fortran, Stretch(Content(file, str(file)), start, length, "bytes"))
