"""The data of a run in data.json: the classes of its three parts, each with a fingerprint, and the preprocessing of its
pictures; and what has changed since.

The split of a data set into parts depends on all of its classes, so one class more can move any other from training to
test. A test on classes that were trained on would give an accuracy that looks like few-shot learning and is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import TypeAlias

import torch

from metawrap.data import DataSplits, ImageSet, LabelledImages, Preprocessing, StreamedImages
from metawrap.data.class_split import PARTS
from metawrap.data.problems import listed
from metawrap.errors import ArgumentError, CheckpointError, DataError
from metawrap.training.stored_files import DataFile, read_typed

FILE = "data.json"
# Part -> class -> fingerprint, classes in the order of their numbers.
DataRecord: TypeAlias = dict[str, dict[str, str]]
_REMEDY = (
    "The classes that the run was trained on are so unknown. Put back a copy of the file, or delete it to go on "
    "without this check."
)


def record_of(splits: DataSplits | Mapping[str, ImageSet]) -> DataRecord:
    """The classes of the three parts, or of sets by name, and their fingerprints."""
    sets = splits if isinstance(splits, Mapping) else dict(zip(PARTS, splits, strict=True))
    return {part: dict(zip(each.class_names, each.fingerprints(), strict=True)) for part, each in sets.items()}


def read_record(run: Path) -> DataRecord | None:
    """The record of the run in this folder; None if it has none, as runs of metawrap 0.1. Raises CheckpointError if the
    file is damaged.
    """
    found = _read(run)
    return None if found is None else {part: getattr(found, part) for part in PARTS}


def read_preprocessing(run: Path) -> Preprocessing | None:
    """The preprocessing of the run's pictures; None where it is not on record. Raises as `read_record`."""
    found = _read(run)
    try:
        return Preprocessing.from_dict(found.preprocessing) if found and found.preprocessing else None
    except ArgumentError as error:
        raise CheckpointError(f"'{run / FILE}' is damaged ({error}). {_REMEDY}") from error


def _read(run: Path) -> DataFile | None:
    try:
        return read_typed(run / FILE, DataFile, _REMEDY)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"'{run / FILE}' is damaged ({error.strerror}). {_REMEDY}") from error


def changed(run: Path, found: Sequence[str], fix: str = "") -> DataError:
    """The error that names the `differences`. fix: one more remedy, for its end."""
    return DataError(
        f"The data differ from those that the run in '{run}' was trained on: {'; '.join(found)}. Put them back as they "
        f"were, or train a new run with another --out{fix}."
    )


def unseen(record: DataRecord, present: DataRecord, by_name: bool) -> dict[str, list[str]]:
    """By part: the present classes that the run was neither trained nor validated on.

    A class is known by any image on record, under any name and beside any others; with `by_name` by its name too.
    """
    known = record["train"] | record["validation"]
    names, marks = set(known if by_name else ()), {mark for own in known.values() for mark in own.split()}
    return {
        part: [name for name, own in classes.items() if name not in names and marks.isdisjoint(own.split())]
        for part, classes in present.items()
    }


def joined(splits: Sequence[ImageSet], names: Mapping[str, Sequence[str]]) -> LabelledImages:
    """The images of these classes of each part, in memory, as one set. At least one class."""
    fix, found = "Test one --part, or test where more memory is free.", list[LabelledImages]()
    for images, chosen in zip(splits, names.values(), strict=True):
        if chosen:
            part = images.subset([images.class_names.index(name) for name in chosen])
            found.append(part.in_memory(fix) if isinstance(part, StreamedImages) else part)
    starts = [sum(each.num_classes for each in found[:place]) for place in range(len(found))]
    return LabelledImages(
        torch.cat([each.images for each in found]),
        torch.cat([each.labels + start for each, start in zip(found, starts, strict=True)]),
        tuple(name for each in found for name in each.class_names),
    )


def differences(record: DataRecord, present: DataRecord) -> list[str]:
    """A phrase for each kind of difference, with the classes."""
    before, now = _by_class(record), _by_class(present)
    gone, new = [name for name in before if name not in now], [name for name in now if name not in before]
    renamed = {old: name for old in gone for name in new if before[old][1] == now[name][1]}
    kept = [name for name in before if name in now]
    found = {
        "added": [name for name in new if name not in renamed.values()],
        "missing": [name for name in gone if name not in renamed],
        "renamed": [f"{old} (now {name})" for old, name in renamed.items()],
        "with other images": [name for name in kept if before[name][1] != now[name][1]],
    } | {
        f"moved from {old} to {part}": [name for name in kept if (before[name][0], now[name][0]) == (old, part)]
        for old, part in permutations(PARTS, 2)
    }
    phrases = [f"{kind}: {listed(sorted(names))}" for kind, names in found.items() if names]
    if not phrases and [list(part) for part in record.values()] != [list(part) for part in present.values()]:
        phrases.append("the classes stand in another order, which draws other tasks")
    return phrases


def _by_class(record: Mapping[str, Mapping[str, str]]) -> dict[str, tuple[str, str]]:
    return {name: (part, mark) for part, classes in record.items() for name, mark in classes.items()}
