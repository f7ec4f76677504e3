"""Looking through a whole data set: every image read once -> what is there, what is broken, what would surprise."""

from __future__ import annotations

import hashlib
import inspect
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from metawrap.data.catalog import DATASETS, advice, load_data
from metawrap.data.class_split import PARTS
from metawrap.data.folder import load_image_folder
from metawrap.data.recognition import FOLDER, recognise
from metawrap.data.splits import DataSplits, ImageSet
from metawrap.errors import DataError


@dataclass(frozen=True)
class PartReport:
    """One of train, validation and test; smallest, median and largest are images per class."""

    part: str
    classes: int
    images: int
    smallest: int
    median: float
    largest: int
    broken: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataReport:
    """What was found.

    data, root: as for `load_data`. layout: in words. image_shape: (channels, height, width) as trained on. notes:
    nothing that training refuses, but that one would want to know.
    """

    data: str
    root: str | None
    layout: str
    image_shape: tuple[int, int, int]
    parts: tuple[PartReport, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def broken(self) -> tuple[str, ...]:
        """Every image that training would refuse, and why."""
        return tuple(each for part in self.parts for each in part.broken)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only."""
        return asdict(self)


def check_data(
    name_or_path: str | Path,
    root: str | Path | None = None,
    seen: Callable[[int, int], None] | None = None,
    **options: Any,
) -> tuple[DataReport, DataSplits]:
    """Reads every image of a data set once; nothing is written.

    Args:
        name_or_path: a name in `DATASETS`; or a folder or file, whose layout is recognised.
        root: where the files of a named data set lie.
        seen: called with the number of images read, and of all.
        options: passed on to the loader, such as image_size and split.
    Raises:
        ArgumentError, DataError: what loading raises before an image is read: a missing file, an unknown layout.
    """
    name, place = str(name_or_path), None if root is None else Path(root)
    if name not in DATASETS:
        if root is not None:
            raise DataError(
                f"'{name}' is no data set ({', '.join(sorted(DATASETS))}), so it takes no root. Leave it out."
            )
        if not Path(name).expanduser().exists():
            raise DataError(f"There is no data set and no file called '{name}'. {advice(name)}")
        name, place = recognise(Path(name_or_path).expanduser())
    loader = load_image_folder if name == FOLDER else DATASETS[name]
    if "stream" in inspect.signature(loader).parameters:
        options["stream"] = True
    splits = load_data(place, **options) if name == FOLDER and place is not None else load_data(name, place, **options)
    total = sum(len(part) for part in splits)
    digests: dict[bytes, tuple[str, str]] = {}
    shared: list[str] = []
    reports, done = [], 0
    for part_name, part in zip(PARTS, splits, strict=True):
        broken: list[str] = []
        for index in range(len(part)):
            try:
                pixels = part.gather(np.array([index]))
            except DataError as error:
                broken.append(str(error))
            else:
                digest = hashlib.blake2b(pixels.numpy().tobytes(), digest_size=16).digest()
                first = digests.setdefault(digest, (part_name, part.name(index)))
                if first[0] != part_name:
                    shared.append(f"{first[1]} ({first[0]}) = {part.name(index)} ({part_name})")
            done += 1
            if seen is not None:
                seen(done, total)
        reports.append(_part_report(part_name, part, broken))
    notes = [f"images that come in two parts: {len(shared)}, such as {shared[0]}"] if shared else []
    found = DataReport(
        name,
        None if place is None else str(place),
        splits.train.origin or name,
        splits.train.image_shape,
        tuple(reports),
        tuple(notes),
    )
    return found, splits


def _part_report(name: str, part: ImageSet, broken: list[str]) -> PartReport:
    counts = part.images_per_class
    return PartReport(
        name, part.num_classes, len(part), min(counts), statistics.median(counts), max(counts), tuple(broken)
    )
