"""Recognising the layout at a path: names of files -> the name of a data set, as for `load_data`."""

from __future__ import annotations

from pathlib import Path

from metawrap.data.image_files import files_at
from metawrap.data.mini_imagenet import CACHES, CSV_FILES
from metawrap.errors import DataError

FOLDER = "folder"
_CACHES = frozenset(name for names in CACHES for name in names)
_HOW = (
    "Expected a folder of class folders, or the files of omniglot, mini-imagenet, tieredimagenet, cub or CIFAR-100 (a "
    "folder; the first two and cub as a zip too; CIFAR-100 as its tar.gz)."
)


def recognise(path: Path) -> tuple[str, Path]:
    """The data set's name, or "folder" for class folders, and the root to load it from.

    Raises:
        DataError: nothing is at the path, or no known layout.
    """
    if path.is_dir():
        # A folder may be a class, and have any name.
        names = {child.name for child in path.iterdir() if child.name != "meta" or child.is_file()}
        return _by_names(names) or FOLDER, path
    if not path.is_file():
        raise DataError(f"There is nothing at '{path}'. {_HOW}")
    name = None
    if path.suffix in (".pkl", ".pickle", ".npz", ".csv"):  # one part; the others are beside it
        path = path.parent
        name = _by_names({child.name for child in path.iterdir()})
    elif path.suffixes[-1:] in ([".tgz"], [".tar"]) or path.suffixes[-2:] == [".tar", ".gz"]:
        name = "cifar-fs"
    elif path.suffix == ".zip":
        members = files_at(path, 0).names()
        name = _by_names({part for each in members for part in each.split("/")[:2]})
    if name is None:
        raise DataError(f"'{path}' holds no data set in a layout that metawrap knows. {_HOW}")
    return name, path


def _by_names(names: set[str]) -> str | None:
    if {"omniglot-py", "images_background", "omniglot-py.zip"} & names:
        return "omniglot"
    if _CACHES & names or set(CSV_FILES) <= names:
        return "mini-imagenet"
    if {"tiered-imagenet", "train_images_png.pkl", "train_images.npz"} & names:
        return "tieredimagenet"
    if "CUB_200_2011" in names or {"images.txt", "classes.txt"} <= names:
        return "cub"
    if {"cifar-100-python", "cifar-100-python.tar.gz"} & names or {"meta", "train", "test"} <= names:
        return "cifar-fs"
    return None
