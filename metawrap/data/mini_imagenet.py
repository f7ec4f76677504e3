"""mini-ImageNet: 100 classes of ImageNet with 600 images each, 84 x 84; layout -> classes of each part -> pixels.

Source: Vinyals et al. 2016, arXiv:1606.04080; the split into 64, 16 and 20 classes is that of Ravi & Larochelle 2017
(Optimization as a Model for Few-Shot Learning), whose train.csv, val.csv and test.csv are read here. The pickle caches
are those of Ren et al. 2018 (mini-imagenet-cache-*.pkl) and Gidaris & Komodakis 2018 (miniImageNet_category_split_*).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metawrap.data.cached_labels import kind_of, renumbered, texts, whole_numbers
from metawrap.data.class_split import PARTS, VALIDATION, part_files
from metawrap.data.folder import published_parts
from metawrap.data.image_files import FolderFiles, ImageFiles, files_at
from metawrap.data.image_sets import DataSplits, StreamedImages, as_splits
from metawrap.data.pickles import read_pickle
from metawrap.data.pictures import MAX_IMAGE_BYTES, Decoding
from metawrap.data.pixel_sources import ArrayPixels, file_classes
from metawrap.data.preprocessing import ImageSize, decoding_of
from metawrap.data.problems import check_name
from metawrap.data.stored_arrays import StoredArray
from metawrap.data.text_files import decoded, read_table
from metawrap.errors import DataError

# Patterns of file names for `part_files`, and the word for the training part in them.
CSV_FILES = ("{}.csv", "train")
CACHES = (("mini-imagenet-cache-{}.pkl", "train"), ("miniImageNet_category_split_{}.pickle", "train_phase_train"))
_HOW_TO_GET = (
    "Pass root=<folder> with train.csv, val.csv, test.csv and images/ (or a zip of them), with "
    "mini-imagenet-cache-{train,val,test}.pkl, with miniImageNet_category_split_{train_phase_train,val,test}.pickle, "
    "or with train, val and test folders of class folders. It cannot be downloaded for you: ImageNet has terms of use."
)


def load_mini_imagenet(root: str | Path, *, image_size: ImageSize = 84, stream: bool | None = None) -> DataSplits:
    """mini-ImageNet with the split of its files; train, validation and test of other sizes are read as well.

        >>> train, validation, test = load_mini_imagenet("path/to/mini")  # doctest: +SKIP

    Args:
        root: a folder in a layout of docs/data.md, or a zip of the CSV layout. Classes are named as in the files; a
            cache with numbered labels names them by number.
        image_size, stream: as for `load_image_folder`.
    Raises:
        ArgumentError, DataError: as `load_image_folder`; or an unknown layout, or an unsafe or broken file.
    """
    decoding = decoding_of(image_size)
    base = Path(root).expanduser()
    if not base.exists():
        raise DataError(f"mini-ImageNet was not found at '{base}'. {_HOW_TO_GET}")
    for pattern, train in CACHES:
        if names := part_files(lambda name: (base / name).is_file(), pattern, train):
            return as_splits([_read_cache(base / name, decoding) for name in names], stream)
    files = files_at(base, MAX_IMAGE_BYTES)
    prefix = _csv_prefix(files)
    if tables := part_files(lambda name: files.has(prefix + name), *CSV_FILES):
        return as_splits(list(_csv_parts(files, prefix, tables, decoding)), stream)
    if (parts := published_parts(files, base, decoding)) is not None:
        return as_splits(parts, stream)
    raise DataError(f"'{base}' is not mini-ImageNet in a layout that metawrap knows. {_HOW_TO_GET}")


def _read_cache(path: Path, decoding: Decoding) -> StreamedImages:
    """One part from its pickle cache, of either kind."""
    cache = read_pickle(path)
    content = cache if isinstance(cache, dict) else {}
    array = content.get("image_data", content.get("data"))
    if not isinstance(array, StoredArray):
        raise DataError(
            f"'{path}': expected a dict with the array image_data and class_dict, or data and labels, but got "
            f"{kind_of(cache)}. Get a fresh copy of it."
        )
    pixels = ArrayPixels(array, decoding, str(path))
    if "class_dict" in content:
        origin = "pickle cache with image_data and class_dict"
        places, labels, names = _of_class_dict(content["class_dict"], len(pixels), path)
    else:
        origin, places = "pickle cache with data and labels", np.arange(len(pixels))
        numbers, labels = renumbered(whole_numbers(content.get("labels"), len(pixels), path))
        names = texts(numbers)
    return StreamedImages(pixels, torch.from_numpy(labels), names, pixels.shape, origin, places)


def _of_class_dict(classes: Any, count: int, path: Path) -> tuple[Any, Any, tuple[str, ...]]:
    """The place and the label of each image that a dict of class name -> places lists, and the class names."""
    if not isinstance(classes, dict) or not classes:
        raise DataError(f"'{path}': expected class_dict to be a dict of class names, but got {kind_of(classes)}.")
    places, labels = [], []
    for label, (name, members) in enumerate(classes.items()):
        rows = members.read().tolist() if isinstance(members, StoredArray) else members
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
    return np.array(places, dtype=np.int64), np.array(labels, dtype=np.int64), texts(classes)


def _csv_prefix(files: ImageFiles) -> str:
    """The part of the names before train.csv: nothing, or one folder of an archive."""
    names = [] if isinstance(files, FolderFiles) else files.names()
    found = [name for name in names if name.rpartition("/")[2] == "train.csv" and name.count("/") < 2]
    return found[0].removesuffix("train.csv") if len(found) == 1 else ""


def _csv_parts(files: ImageFiles, prefix: str, tables: list[str], decoding: Decoding) -> Iterator[StreamedImages]:
    owner: dict[str, str] = {}
    for part, table in zip(PARTS, tables, strict=True):
        classes: dict[str, list[str]] = {}
        for image, label in read_table(decoded(files.read(prefix + table), table), table, ("filename", "label")):
            check_name(image, f"'{table}'")
            check_name(label, f"'{table}'")
            if owner.setdefault(label, part) != part:
                raise DataError(f"'{table}': the class '{label}' is in {owner[label]} as well; expected other classes.")
            # images/<file>, as Ravi & Larochelle have it, or images/<class>/<file>, or train/<class>/<file>.
            folders = ("images", *(VALIDATION if part == "validation" else (part,)))
            inside = [f"{folder}/{where}{image}" for folder in folders for where in ("", f"{label}/")]
            places = [prefix + each for each in (*inside, f"{label}/{image}", image)]
            place = next((each for each in places if files.has(each)), None)
            if place is None:
                raise DataError(
                    f"'{table}' names '{image}', but there is no '{places[0]}'. Get the missing image, or a fresh copy."
                )
            classes.setdefault(label, []).append(place)
        if not classes:
            raise DataError(f"'{table}' names no image. Get a fresh copy of it.")
        yield file_classes(files, classes, decoding, "CSV split of Ravi & Larochelle")
