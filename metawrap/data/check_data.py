"""Checking a whole data set: path -> layout; every image is read once -> sizes of the parts, broken images, notes."""

from __future__ import annotations

import hashlib
import inspect
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metawrap.data.catalog import DATASETS, advice, load_data
from metawrap.data.class_split import PARTS, VALIDATION
from metawrap.data.folder import load_image_folder
from metawrap.data.image_files import files_at
from metawrap.data.image_sets import DataSplits, ImageSet, Pixels, StreamedImages
from metawrap.data.pixel_sources import FilePixels, PicturePixels
from metawrap.data.tar_members import is_compressed
from metawrap.errors import DataError

FOLDER = "folder"
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz")
_CACHE = re.compile(r"mini-imagenet-cache-\w+\.pkl|miniImageNet_category_split_\w+\.pickle")
_HOW = (
    "Expected a folder of class folders, or the files of omniglot, mini-imagenet, tieredimagenet, cub, grocery or "
    "CIFAR-100 (a folder, a zip or a tar; CIFAR-100 a folder or its tar.gz)."
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
    surprises that training does not refuse: repeated images, conversions of pixels, files that are not read.
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
        options["stream"] = place is None or not (place.is_file() and is_compressed(place))
    splits = load_data(place, **options) if name == FOLDER and place is not None else load_data(name, place, **options)
    total, done = sum(len(part) for part in splits), 0
    digests = np.zeros(total, dtype=np.uint64)  # of the images in the order of the parts; 0 for a broken one
    converted = Counter[str]()
    examples: dict[str, str] = {}
    reports = []
    for part_name, part in zip(PARTS, splits, strict=True):
        broken: list[str] = []
        for index in range(len(part)):
            try:
                pixels, remarks = _look(part, index)
            except DataError as error:
                broken.append(str(error))
            else:
                digests[done] = int.from_bytes(hashlib.blake2b(pixels.tobytes(), digest_size=8).digest(), "big") or 1
                converted.update(remarks)
                examples = {remark: part.name(index) for remark in remarks} | examples
            done += 1
            if on_progress is not None:
                on_progress(done, total)
        counts = part.images_per_class
        sizes = min(counts), statistics.median(counts), max(counts)
        reports.append(PartReport(part_name, part.num_classes, len(part), *sizes, tuple(broken)))
    notes = [*_repeats(splits, digests)]
    notes += [f"images with {remark}: {count}, such as {examples[remark]}" for remark, count in converted.items()]
    report = DataReport(
        data=name,
        root=None if place is None else str(place),
        layout=splits.train.origin or name,
        image_shape=splits.train.image_shape,
        parts=tuple(reports),
        notes=(*notes, *_left_out(splits)) if name == FOLDER else tuple(notes),
    )
    return report, splits


def _look(part: ImageSet, index: int) -> tuple[Pixels, list[str]]:
    """An image, and what was done to its pixels."""
    remarks: list[str] = []
    if isinstance(part, StreamedImages) and isinstance(part.source, FilePixels | PicturePixels):
        return part.source.pixels(int(part.places[index]), remarks), remarks
    return part.gather(np.array([index])).numpy(), remarks


def _repeats(splits: DataSplits, digests: NDArray[np.uint64]) -> Iterator[str]:
    """Notes on images that equal an earlier one, pixel for pixel: in another part, in their class, in another class."""
    sizes = [len(part) for part in splits]
    part_of = np.repeat(np.arange(3), sizes)
    labels = np.concatenate([part.labels.cpu().numpy() for part in splits])
    within = np.arange(len(digests)) - np.repeat(np.cumsum([0, *sizes[:2]]), sizes)

    def name(image: int) -> str:
        return f"{splits[part_of[image]].name(int(within[image]))} ({PARTS[part_of[image]]})"

    def again(*keys: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The images for which an earlier one has the same keys, and the first one of each."""
        rows = np.stack([key.astype(np.uint64) for key in keys])
        _, first, group = np.unique(rows, axis=1, return_index=True, return_inverse=True)
        earliest = first[group.reshape(-1)]
        later = np.flatnonzero((earliest != np.arange(len(digests))) & (digests != 0))
        return later, earliest[later]

    later, first = again(digests)
    shared = part_of[later] != part_of[first]
    in_part, first_in_part = again(digests, part_of)
    in_class, first_in_class = again(digests, part_of, labels)
    others = ~np.isin(in_part, in_class)
    for text, images, equals in (
        ("images that come in two parts", later[shared], first[shared]),
        ("images that come again in their class, so that a target may equal a support image", in_class, first_in_class),
        ("images that come again in another class of their part", in_part[others], first_in_part[others]),
    ):
        if len(images):
            yield f"{text}: {len(images)}, such as {name(equals[0])} = {name(images[0])}"


def _left_out(splits: DataSplits) -> Iterator[str]:
    """A note on files of a folder or archive that are not read."""
    sources = [part.source for part in splits if isinstance(part, StreamedImages)]
    if not sources or not isinstance(sources[0], FilePixels):
        return
    used = {part.name(index) for part in splits for index in range(len(part))}
    left = [name for name in sources[0].files.names() if name not in used and not name.endswith("/")]
    if left:
        kinds = Counter(PurePosixPath(name).suffix.lower() or "no suffix" for name in left).most_common(5)
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds)
        yield f"files that are not read: {len(left)}, such as {left[0]} ({counts})"


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
    elif path.name.lower().endswith(_ARCHIVES):
        members = files_at(path, 0).names()
        name = _by_names({part for each in members for part in each.split("/")[:2]}) or FOLDER
    if name is None:
        raise DataError(f"'{path}' holds no data set in a layout that metawrap knows. {_HOW}")
    return name, path


def _by_names(names: set[str]) -> str | None:
    # The alphabet is one of the 30 of images_background.
    if {"omniglot-py", "images_background", "omniglot-py.zip", "Alphabet_of_the_Magi"} & names:
        return "omniglot"
    csv_files = {"train.csv", "test.csv"} <= names and any(f"{word}.csv" in names for word in VALIDATION)
    if csv_files or any(map(_CACHE.fullmatch, names)):
        return "mini-imagenet"
    if {"tiered-imagenet", "train_images_png.pkl", "train_images.npz"} & names:
        return "tieredimagenet"
    if {"CUB_200_2011", "CUB_200_2011.tgz"} & names or {"images.txt", "classes.txt"} <= names:
        return "cub"
    repository = any(name.startswith("GroceryStoreDataset") for name in names)
    if repository or "grocery-store-128.zip" in names or {"Granny-Smith", "Tropicana-Juice-Smooth"} <= names:
        return "grocery"
    if {"cifar-100-python", "cifar-100-python.tar.gz"} & names or {"meta", "train", "test"} <= names:
        return "cifar-fs"
    return None
