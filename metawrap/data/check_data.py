"""Checking a whole data set: path -> layout; every image is read once -> sizes of the parts, broken images, notes."""

from __future__ import annotations

import hashlib
import inspect
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metawrap.data.catalog import DATASETS, advice, load_data
from metawrap.data.class_split import PARTS
from metawrap.data.folder import load_image_folder
from metawrap.data.image_files import files_at
from metawrap.data.image_sets import DataSplits
from metawrap.data.mini_imagenet import CACHES, CSV_FILES
from metawrap.errors import DataError

FOLDER = "folder"
_CACHES = frozenset(name for names in CACHES for name in names)
_HOW = (
    "Expected a folder of class folders, or the files of omniglot, mini-imagenet, tieredimagenet, cub or CIFAR-100 (a "
    "folder; the first two and cub as a zip too; CIFAR-100 as its tar.gz)."
)


@dataclass(frozen=True)
class PartReport:
    """One of train, validation and test; smallest, median and largest are numbers of images per class."""

    part: str
    classes: int
    images: int
    smallest: int
    median: float
    largest: int
    broken: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataReport:
    """The findings of `check_data`.

    data, root: as for `load_data`. layout: in words. image_shape: (channels, height, width) in training. notes:
    surprises that training does not refuse.
    """

    data: str
    root: str | None
    layout: str
    image_shape: tuple[int, int, int]
    parts: tuple[PartReport, ...]
    notes: tuple[str, ...] = ()

    @property
    def broken(self) -> tuple[str, ...]:
        """Every image that training would refuse, and the reason."""
        return tuple(each for part in self.parts for each in part.broken)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only."""
        return asdict(self)


def check_data(
    name_or_path: str | Path,
    root: str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> tuple[DataReport, DataSplits]:
    """Reads every image of a data set once; nothing is written.

        >>> report, splits = check_data("glyphs", classes=(6, 2, 3))
        >>> report.parts[0].images, report.broken
        (120, ())

    Args:
        name_or_path: a name in `DATASETS`; or a folder or file, whose layout is recognised.
        root: the place of a named data set's files.
        on_progress: called with the number of images read so far, and of all images.
        options: passed on to the loader, such as image_size and split.
    Raises:
        ArgumentError, DataError: errors of loading before an image is read: a missing file, an unknown layout.
    """
    name, place = str(name_or_path), None if root is None else Path(root)
    if name not in DATASETS:
        if root is not None:
            raise DataError(
                f"'{name}' is no data set ({', '.join(sorted(DATASETS))}), so it takes no root. Leave it out."
            )
        if not Path(name).expanduser().exists():
            raise DataError(f"There is no data set and no file called '{name}'. {advice(name)}")
        name, place = _recognise(Path(name_or_path).expanduser())
    loader = load_image_folder if name == FOLDER else DATASETS[name]
    if "stream" in inspect.signature(loader).parameters:
        options["stream"] = True
    splits = load_data(place, **options) if name == FOLDER and place is not None else load_data(name, place, **options)
    total, done = sum(len(part) for part in splits), 0
    first_places: dict[bytes, tuple[str, str]] = {}  # digest of an image -> part and name where it came first
    shared: list[str] = []
    reports = []
    for part_name, part in zip(PARTS, splits, strict=True):
        broken: list[str] = []
        for index in range(len(part)):
            try:
                pixels = part.gather(np.array([index]))
            except DataError as error:
                broken.append(str(error))
            else:
                digest = hashlib.blake2b(pixels.numpy().tobytes(), digest_size=16).digest()
                first_part, first_name = first_places.setdefault(digest, (part_name, part.name(index)))
                if first_part != part_name:
                    shared.append(f"{first_name} ({first_part}) = {part.name(index)} ({part_name})")
            done += 1
            if on_progress is not None:
                on_progress(done, total)
        counts = part.images_per_class
        sizes = min(counts), statistics.median(counts), max(counts)
        reports.append(PartReport(part_name, part.num_classes, len(part), *sizes, tuple(broken)))
    report = DataReport(
        data=name,
        root=None if place is None else str(place),
        layout=splits.train.origin or name,
        image_shape=splits.train.image_shape,
        parts=tuple(reports),
        notes=(f"images that come in two parts: {len(shared)}, such as {shared[0]}",) if shared else (),
    )
    return report, splits


def _recognise(path: Path) -> tuple[str, Path]:
    """The name of the data set at a path ("folder" for class folders), and the root to load it from; or DataError."""
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
