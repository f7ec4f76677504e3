"""Which class is for training, validation and test: named in a file or a mapping, or drawn by seed."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from metawrap.data.draws import Draws
from metawrap.errors import ArgumentError, DataError
from metawrap.tasks import describe_value

PARTS = ("train", "validation", "test")
SHARES = (0.64, 0.16, 0.20)
MAX_TEXT_BYTES = 2**26  # mini-ImageNet's train.csv has 1.2 MB

GivenSplit: TypeAlias = str | Path | Mapping[str, Sequence[Any]]
_PART_OF = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}


def split_by_seed(names: Sequence[str], shares: Sequence[float], seed: int | str) -> list[list[str]]:
    """Sorts the classes by name, shuffles them by seed, the same on every platform, and cuts them by shares.

    Raises:
        DataError: too few classes for three sets.
    """
    count = len(names)
    validation, test = (max(1, round(count * share)) for share in shares[1:])
    train = count - validation - test
    if train < 1:
        raise DataError(
            f"splits={tuple(shares)}: {count} classes are too few for three sets. Add classes, at least 3 in all."
        )
    ordered = sorted(names)
    shuffled = [ordered[index] for index in Draws(seed).permutation(count)]
    return [shuffled[:train], shuffled[train : train + validation], shuffled[train + validation :]]


def split_as_given(names: Sequence[str], split: GivenSplit) -> list[list[str]]:
    """The classes of train, validation and test as a mapping or a file names them; what it leaves out is left out.

    Args:
        names: the classes that exist.
        split: {"train": [...], "validation" (or "val"): [...], "test": [...]}; or the path of a JSON or YAML file with
            the same, or of a CSV file with the columns class and split.
    Raises:
        ArgumentError: another type, or a part that is missing or is no list of names.
        DataError: the file cannot be read, or a class is named twice or does not exist.
    """
    where = "split" if isinstance(split, Mapping) else f"'{split}'"
    given = split if isinstance(split, Mapping) else _read_split(split)
    parts = _three_parts(given, where)
    known = set(names)
    seen: dict[str, str] = {}
    for part, classes in zip(PARTS, parts, strict=True):
        for name in classes:
            if name not in known:
                raise DataError(
                    f"{where}: the class '{name}' of {part} does not exist; there are {len(known)}, such as "
                    f"{', '.join(repr(each) for each in sorted(known)[:3])}. Correct the name, or leave it out."
                )
            if name in seen:
                raise DataError(
                    f"{where}: the class '{name}' is named in {seen[name]} and again in {part}; few-shot splits are by "
                    "class. Name it once."
                )
            seen[name] = part
    return parts


def check_shares(splits: Sequence[float]) -> tuple[float, ...]:
    """Three shares above 0 that sum to 1, or ArgumentError."""
    numbers = isinstance(splits, tuple | list) and all(isinstance(share, int | float) for share in splits)
    if not numbers or len(splits) != 3 or min(splits) <= 0 or abs(sum(splits) - 1) > 1e-6:
        raise ArgumentError(
            f"splits: expected three shares above 0 that sum to 1 (train, validation, test), but got "
            f"{splits if numbers else describe_value(splits)}."
        )
    return tuple(float(share) for share in splits)


def read_text(path: Path) -> str:
    """A text file in UTF-8 of moderate size, or DataError."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}. Name an existing file.") from error
    return decoded(content, str(path))


def decoded(content: bytes, name: str) -> str:
    """Bytes as text in UTF-8, a byte-order mark left out, or DataError."""
    if len(content) > MAX_TEXT_BYTES:
        raise DataError(f"'{name}' holds more than {MAX_TEXT_BYTES} bytes, too many for a list of names. Check it.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"'{name}' is not text in UTF-8 ({error.reason}). Save it as UTF-8.") from error


def read_table(text: str, name: str, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """The named columns of a CSV with a header, row by row.

    Raises:
        DataError: a column is missing, a row is short, or it is no CSV; names the line.
    """
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise DataError(f"'{name}' is not a readable CSV file: {error}. Get a fresh copy of it.") from error
    header = [cell.strip() for cell in rows[0]] if rows else []
    if missing := [column for column in columns if column not in header]:
        raise DataError(
            f"'{name}': expected the header {','.join(columns)}, but {missing[0]} is missing from "
            f"'{','.join(header)[:80]}'. Add it as the first line."
        )
    places = [header.index(column) for column in columns]
    table = []
    for number, row in enumerate(rows[1:], start=2):
        if row and len(row) <= max(places):
            raise DataError(f"'{name}' line {number}: expected {len(header)} columns, but got {len(row)}. Correct it.")
        if row:
            table.append(tuple(row[place].strip() for place in places))
    return table


def _read_split(split: Any) -> Mapping[str, Any]:
    if not isinstance(split, str | Path):
        raise ArgumentError(
            "split: expected a mapping of train, validation and test, or the path of a CSV, JSON or YAML file, but "
            f"got {describe_value(split)}."
        )
    path = Path(split).expanduser()
    kind = path.suffix.lower()
    if kind not in (".csv", ".json", ".yaml", ".yml"):
        raise ArgumentError(f"split: expected a .csv, .json or .yaml file that names the classes, but got '{split}'.")
    text = read_text(path)
    if kind == ".csv":
        parts: dict[str, list[str]] = {}
        for name, part in read_table(text, str(path), ("class", "split")):
            parts.setdefault(part, []).append(name)
        return parts
    given = _parse_json(text, path) if kind == ".json" else _parse_yaml(text, path)
    if not isinstance(given, Mapping):
        raise ArgumentError(f"'{path}': expected train, validation and test, but got {describe_value(given)}.")
    return given


def _parse_json(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"'{path}' is not readable JSON: {str(error)[:200]}. Correct it there.") from error


def _parse_yaml(text: str, path: Path) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = " ".join(str(error).split())[:200]
        raise DataError(f"'{path}' is not readable YAML: {problem}. Correct it there.") from error


def _three_parts(given: Mapping[str, Any], where: str) -> list[list[str]]:
    found: dict[str, list[str]] = {}
    for key, classes in given.items():
        part = _PART_OF.get(key) if isinstance(key, str) else None
        if part is None or part in found:
            raise ArgumentError(
                f"{where}: expected train, validation (or val) and test, but got the part {key!r}"
                f"{' again' if part else ''}. Rename or remove it."
            )
        flat = isinstance(classes, list | tuple) and all(
            isinstance(name, str | int) and not isinstance(name, bool) for name in classes
        )
        if not flat or not classes:
            raise ArgumentError(
                f"{where}: expected a list of class names for {part}, at least one, but got {describe_value(classes)}."
            )
        found[part] = [str(name) for name in classes]
    if missing := [part for part in PARTS if part not in found]:
        raise ArgumentError(f"{where}: {missing[0]} is missing. Name the classes of {', '.join(PARTS)}.")
    return [found[part] for part in PARTS]
