"""The classes of train, validation and test: named in a file or a mapping, or drawn by seed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from metawrap.data.problems import listed, wrong_argument
from metawrap.data.random_stream import RandomStream
from metawrap.data.text_files import parsed, read_table, read_text
from metawrap.errors import ArgumentError, DataError

PARTS = ("train", "validation", "test")
SHARES = (0.64, 0.16, 0.20)

GivenSplit: TypeAlias = str | Path | Mapping[str, Sequence[Any]]
VALIDATION = ("val", "validation", "valid")
_PART_OF = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_PART_OF |= dict.fromkeys((*VALIDATION, "dev"), "validation")


def part_of(name: str) -> str | None:
    """The part that a name stands for: train, validation or test; None for another name.

    >>> part_of("Train"), part_of("meta-val"), part_of("testosterone")
    ('train', 'validation', None)
    """
    return _PART_OF.get(re.sub(r"[-_ ]", "", name.casefold()).removeprefix("meta"))


def part_files(has: Callable[[str], bool], pattern: str, train: str = "train") -> list[str] | None:
    """The files of train, validation and test by a pattern such as "{}.csv"; None if none of them is there.

    Args:
        has: whether a file has a name.
        train: the word for the training part in the names.
    Raises:
        DataError: some of the three are missing, or a part has two files.
    """
    found = [[word for word in words if has(pattern.format(word))] for words in ((train,), VALIDATION, ("test",))]
    if not any(found):
        return None
    for part, words in zip(PARTS, found, strict=True):
        if len(words) != 1:
            first = pattern.format(train if part == "train" else part if part == "test" else VALIDATION[0])
            names = ", ".join(pattern.format(word) for word in words)
            problem = f"{names} are both there for {part}" if words else f"'{first}' is missing beside other parts"
            raise DataError(f"{problem}. Put one file for each of {', '.join(PARTS)} into one folder.")
    return [pattern.format(words[0]) for words in found]


def validation_drawn(train: Sequence[str], shares: Sequence[float], seed: int | str) -> tuple[list[str], list[str]]:
    """Training classes, and the validation classes drawn from them by seed, where a data set has train and test alone.

    The validation share is that of `shares` among train and validation.

    Raises:
        DataError: fewer than two training classes.
    """
    ordered = sorted(train)
    count = max(1, round(len(ordered) * shares[1] / (shares[0] + shares[1])))
    if count >= len(ordered):
        raise DataError(f"train has {len(ordered)} classes, too few to draw validation classes from. Add some.")
    shuffled = [ordered[index] for index in RandomStream(seed).permutation(len(ordered))]
    return shuffled[count:], shuffled[:count]


def split_by_seed(names: Sequence[str], shares: Sequence[float], seed: int | str) -> list[list[str]]:
    """Sorts the classes by name, shuffles them by seed and cuts them by shares; DataError if they are too few."""
    count = len(names)
    validation, test = (max(1, round(count * share)) for share in shares[1:])
    train = count - validation - test
    if train < 1:
        raise DataError(
            f"splits={tuple(shares)}: {count} classes are too few for three sets. Add classes, at least 3 in all."
        )
    ordered = sorted(names)
    shuffled = [ordered[index] for index in RandomStream(seed).permutation(count)]
    return [shuffled[:train], shuffled[train : train + validation], shuffled[train + validation :]]


def split_as_given(names: Sequence[str], split: GivenSplit) -> list[list[str]]:
    """The classes of train, validation and test by name; classes that the split does not name are left out.

    Args:
        names: the existing classes.
        split: {"train": [...], "validation" (or "val"): [...], "test": [...]}; or the path of a JSON or YAML file with
            such a mapping, or of a CSV file with the columns class and split.
    Raises:
        ArgumentError: another type, or a part that is missing or is no list of names.
        DataError: the file cannot be read, or a class is named twice or does not exist.
    """
    where = "split" if isinstance(split, Mapping) else f"'{split}'"
    parts = _three_parts(split if isinstance(split, Mapping) else _read_split(split), where)
    places: dict[str, list[str]] = {}
    for part, classes in zip(PARTS, parts, strict=True):
        if unknown := [name for name in classes if name not in set(names)]:
            raise DataError(
                f"{where}: the classes {listed(unknown)} of {part} do not exist; there are {len(names)}, such as "
                f"{listed(sorted(names)[:3])}. Correct the names, or leave them out."
            )
        for name in classes:
            places.setdefault(name, []).append(part)
    if twice := [f"{name} ({' and '.join(found)})" for name, found in places.items() if len(found) > 1]:
        raise DataError(
            f"{where}: the classes {listed(twice)} are named more than once; few-shot splits are by class. Name each "
            "once."
        )
    return parts


def check_shares(splits: Sequence[float]) -> tuple[float, ...]:
    """Three shares above 0 that sum to 1, or ArgumentError."""
    numbers = isinstance(splits, tuple | list) and all(isinstance(share, int | float) for share in splits)
    if not numbers or len(splits) != 3 or min(splits) <= 0 or abs(sum(splits) - 1) > 1e-6:
        raise wrong_argument("splits", "three shares above 0 that sum to 1 (train, validation, test)", splits)
    return tuple(float(share) for share in splits)


def _read_split(split: Any) -> Mapping[str, Any]:
    if not isinstance(split, str | Path):
        kinds = "a mapping of train, validation and test, or the path of a CSV, JSON or YAML file"
        raise wrong_argument("split", kinds, split)
    path = Path(split).expanduser()
    if path.suffix.lower() not in (".csv", ".json", ".yaml", ".yml"):
        raise wrong_argument("split", "a .csv, .json or .yaml file that names the classes", str(split))
    text = read_text(path)
    if path.suffix.lower() == ".csv":
        parts: dict[str, list[str]] = {}
        for name, part in read_table(text, str(path), ("class", "split")):
            parts.setdefault(part, []).append(name)
        return parts
    given = parsed(text, path)
    if not isinstance(given, Mapping):
        raise wrong_argument(f"'{path}'", "train, validation and test", given)
    return given


def _three_parts(given: Mapping[str, Any], where: str) -> list[list[str]]:
    found: dict[str, list[str]] = {}
    for key, classes in given.items():
        part = part_of(key) if isinstance(key, str) else None
        if part is None or part in found:
            raise ArgumentError(
                f"{where}: expected train, validation (or val) and test, but got the part {key!r}"
                f"{' again' if part else ''}. Rename or remove it."
            )
        flat = isinstance(classes, list | tuple) and all(
            isinstance(name, str | int) and not isinstance(name, bool) for name in classes
        )
        if not flat or not classes:
            raise wrong_argument(where, f"a list of class names for {part}, at least one", classes)
        found[part] = [str(name) for name in classes]
    if missing := [part for part in PARTS if part not in found]:
        raise ArgumentError(f"{where}: {missing[0]} is missing. Name the classes of {', '.join(PARTS)}.")
    return [found[part] for part in PARTS]
