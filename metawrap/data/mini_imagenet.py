"""mini-ImageNet: 100 classes of ImageNet with 600 images each, 84 x 84; layout -> classes of each part -> pixels.

Source: Vinyals et al. 2016, arXiv:1606.04080; the split into 64, 16 and 20 classes is that of Ravi & Larochelle 2017
(Optimization as a Model for Few-Shot Learning), whose train.csv, val.csv and test.csv are read here. The pickle caches
are those of Ren et al. 2018 (mini-imagenet-cache-*.pkl) and Gidaris & Komodakis 2018 (miniImageNet_category_split_*).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from metawrap.data.arrays import ArrayPixels
from metawrap.data.checks import check_int
from metawrap.data.class_split import MAX_TEXT_BYTES, PARTS, decoded, read_table
from metawrap.data.decode import Decoding, file_classes
from metawrap.data.folder import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, split_folders
from metawrap.data.pickled_array import PickledArray
from metawrap.data.pickles import read_pickle
from metawrap.data.sources import FolderSource, ImageSource, check_name, source_at
from metawrap.data.splits import DataSplits, as_splits
from metawrap.data.streamed import StreamedImages
from metawrap.errors import DataError

CSV_FILES = ("train.csv", "val.csv", "test.csv")
CACHES = (
    tuple(f"mini-imagenet-cache-{part}.pkl" for part in ("train", "val", "test")),
    tuple(f"mini-imagenet-cache-{part}.pkl" for part in ("train", "validation", "test")),
    tuple(f"miniImageNet_category_split_{part}.pickle" for part in ("train_phase_train", "val", "test")),
)
_HOW_TO_GET = (
    "Pass root=<folder> with train.csv, val.csv, test.csv and images/ (or a zip of them), with "
    "mini-imagenet-cache-{train,val,test}.pkl, with miniImageNet_category_split_{train_phase_train,val,test}.pickle, "
    "or with train, val and test folders of class folders. It cannot be downloaded for you: ImageNet has terms of use."
)


def load_mini_imagenet(root: str | Path, *, image_size: int = 84, stream: bool | None = None) -> DataSplits:
    """mini-ImageNet with the split of its files; train, validation and test of other sizes are read as well.

    Args:
        root: a folder, or a zip of the CSV layout, as in the module's docstring.
        image_size: images of another size are squeezed to this many pixels on either side (Lanczos).
        stream: read images when they are drawn (True), all now (False), or, by default, whichever suits the memory.
    Returns:
        Classes named as in the files; those of a cache with numbered labels by their number.
    Raises:
        ArgumentError: image_size is no integer of at least 1.
        DataError: no known layout, or a file that is missing, unsafe or broken; names it.
    """
    check_int("image_size", image_size, 1)
    base = Path(root).expanduser()
    if not base.exists():
        raise DataError(f"mini-ImageNet was not found at '{base}'. {_HOW_TO_GET}")
    for names in CACHES:
        if any((base / name).is_file() for name in names):
            parts = [read_cache(base / name, image_size) for name in names if _must_exist(base / name)]
            return as_splits(parts, stream)
    decoding = Decoding(image_size, False, Image.Resampling.LANCZOS, MAX_IMAGE_PIXELS)
    source = source_at(base, MAX_IMAGE_BYTES)
    if (prefix := _csv_prefix(base, source)) is not None:
        return as_splits(list(_csv_parts(source, prefix, decoding)), stream)
    if isinstance(source, FolderSource) and (folders := split_folders(base)) is not None:
        origin = "train, val and test folders of class folders"
        return as_splits([file_classes(source, part, decoding, origin) for part in folders], stream)
    raise DataError(f"'{base}' is not mini-ImageNet in a layout that metawrap knows. {_HOW_TO_GET}")


def read_cache(path: Path, image_size: int) -> StreamedImages:
    """One part from its pickle cache, of either kind; nothing of the pickle is run.

    Raises:
        DataError: the file is missing, unsafe or broken, or holds no images with labels.
    """
    cache = read_pickle(path)
    content = cache if isinstance(cache, dict) else {}
    array = content.get("image_data", content.get("data"))
    if not isinstance(array, PickledArray):
        raise DataError(
            f"'{path}': expected a dict with the array image_data and class_dict, or data and labels, but got "
            f"{_keys(cache)}. Get a fresh copy of it."
        )
    pixels = ArrayPixels(array, image_size, str(path))
    if "class_dict" in content:
        origin = "pickle cache with image_data and class_dict"
        places, labels, names = _of_class_dict(content["class_dict"], len(pixels), path)
    else:
        origin = "pickle cache with data and labels"
        places, labels, names = _of_labels(content.get("labels"), len(pixels), path)
    return StreamedImages(pixels, torch.from_numpy(labels), names, pixels.shape, origin, places)


def numbered_labels(labels: Any, count: int, path: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    """A list or array of whole numbers of at least 0, one per image, as int64.

    Raises:
        DataError: they are something else, or not as many as images.
    """
    values = labels.read() if isinstance(labels, PickledArray) else labels
    good = isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "iu"
    if isinstance(values, list | tuple):
        good = all(type(value) is int and 0 <= value < 2**31 for value in values)
    if not good or len(values) != count or count == 0 or min(values) < 0:
        got = f"{len(values)} of them" if good else _keys(labels)
        raise DataError(
            f"'{path}': expected a whole number of at least 0 for each of {count} images as labels, but got {got}. "
            "Get a fresh copy of it."
        )
    return np.asarray(values, dtype=np.int64)


def _of_class_dict(classes: Any, count: int, path: Path) -> tuple[Any, Any, tuple[str, ...]]:
    if not isinstance(classes, dict) or not classes:
        raise DataError(f"'{path}': expected class_dict to be a dict of class names, but got {_keys(classes)}.")
    places, labels = [], []
    for label, (name, members) in enumerate(classes.items()):
        rows = members.read().tolist() if isinstance(members, PickledArray) else members
        good = isinstance(rows, list | tuple) and rows and all(type(r) is int and 0 <= r < count for r in rows)
        if not good:
            raise DataError(
                f"'{path}': expected class_dict[{name!r}] to list places of images in 0..{count - 1}, at least one, "
                "but it does not. Get a fresh copy of it."
            )
        places += rows
        labels += [label] * len(rows)
    if len(set(places)) != len(places):
        raise DataError(f"'{path}': class_dict lists an image twice. Get a fresh copy of it.")
    return np.array(places, dtype=np.int64), np.array(labels, dtype=np.int64), tuple(map(_text, classes))


def _of_labels(labels: Any, count: int, path: Path) -> tuple[Any, Any, tuple[str, ...]]:
    numbers, compact = np.unique(numbered_labels(labels, count, path), return_inverse=True)
    return np.arange(count), compact.astype(np.int64), tuple(str(number) for number in numbers)


def _csv_prefix(base: Path, source: ImageSource) -> str | None:
    """What stands before train.csv in the names of the source: nothing, or one folder of a zip."""
    if isinstance(source, FolderSource):
        return "" if any((base / name).is_file() for name in CSV_FILES) else None
    found = [name for name in source.names() if name.rpartition("/")[2] == "train.csv" and name.count("/") < 2]
    return found[0].removesuffix("train.csv") if len(found) == 1 else None


def _csv_parts(source: ImageSource, prefix: str, decoding: Decoding) -> Iterator[StreamedImages]:
    names = None if isinstance(source, FolderSource) else frozenset(source.names())
    owner: dict[str, str] = {}
    for part, file in zip(PARTS, CSV_FILES, strict=True):
        rows = read_table(_csv_text(source, prefix + file), file, ("filename", "label"))
        classes: dict[str, list[str]] = {}
        for image, label in rows:
            check_name(image, f"'{file}'")
            check_name(label, f"'{file}'")
            if owner.setdefault(label, part) != part:
                raise DataError(f"'{file}': the class '{label}' is in {owner[label]} as well; expected other classes.")
            classes.setdefault(label, []).append(_image_place(source, names, prefix, label, image, file))
        if not classes:
            raise DataError(f"'{file}' names no image. Get a fresh copy of it.")
        yield file_classes(source, classes, decoding, "CSV split of Ravi & Larochelle, with images/")


def _csv_text(source: ImageSource, name: str) -> str:
    content = source.read(name)
    return decoded(content[: MAX_TEXT_BYTES + 1], name)


def _image_place(
    source: ImageSource, names: frozenset[str] | None, prefix: str, label: str, image: str, file: str
) -> str:
    """images/<file>, as Ravi & Larochelle have it, or images/<class>/<file>."""
    places = (f"{prefix}images/{image}", f"{prefix}images/{label}/{image}")
    for place in places:
        if place in names if names is not None else isinstance(source, FolderSource) and source.has(place):
            return place
    raise DataError(f"'{file}' names '{image}', but there is no '{places[0]}'. Get the missing image, or a fresh copy.")


def _must_exist(path: Path) -> bool:
    if not path.is_file():
        raise DataError(f"'{path}' is missing, beside other parts of mini-ImageNet. Put all three into one folder.")
    return True


def _keys(value: Any) -> str:
    if isinstance(value, dict):
        return f"a dict with {', '.join(map(repr, list(value)[:6])) or 'nothing'}"[:200]
    return f"a {type(value).__name__}"


def _text(name: Any) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


def texts(names: Sequence[Any]) -> tuple[str, ...]:
    """Names of a pickle as text, those of Python 2 included."""
    return tuple(_text(name) for name in names)
