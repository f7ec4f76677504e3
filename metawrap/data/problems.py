"""Problems with arguments and files, told in one way by all modules of this room."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from metawrap.errors import ArgumentError, DataError
from metawrap.tasks import describe_value


def wrong_argument(name: str, expected: str, value: Any, fix: str = "") -> ArgumentError:
    """The error for an argument that is not as expected; short lists are shown whole."""
    shown = str(value) if isinstance(value, tuple | list) and len(str(value)) < 60 else describe_value(value)
    return ArgumentError(f"{name}: expected {expected}, but got {shown}. {fix}".rstrip())


def listed(names: Sequence[Any], most: int = 10) -> str:
    """Names in quotes for a message, the first `most` of them and the number of the others; no control character.

    >>> listed(["cat", "dog", "fox"], most=2)
    "'cat', 'dog' and 1 more"
    """
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


@contextmanager
def reading(problem: str, *errors: type[Exception], fix: str = "Get a fresh copy of it.") -> Iterator[None]:
    """Turns any of these errors into a DataError that says the problem, the cause and the fix."""
    try:
        yield
    except DataError:
        raise
    except errors as error:
        raise DataError(f"{problem}: {' '.join(str(error).split())[:300]}. {fix}") from error


def check_int(name: str, value: int, least: int) -> None:
    """Raises ArgumentError unless value is an integer (not a bool) of at least `least`."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise wrong_argument(name, f"an integer of at least {least}", value)


def check_seed(seed: int | str) -> None:
    """Raises ArgumentError unless seed is a name or an integer of at least 0."""
    if not isinstance(seed, str):
        check_int("seed", seed, 0)


def check_counts(name: str, counts: Any, least: int) -> tuple[int, int, int]:
    """Three integers for train, validation and test, or ArgumentError."""
    if not isinstance(counts, tuple | list) or len(counts) != 3:
        raise wrong_argument(name, "three (train, validation, test)", counts)
    for part, count in zip(("train", "validation", "test"), counts, strict=True):
        check_int(f"{name} ({part})", count, least)
    return counts[0], counts[1], counts[2]


def check_name(name: str, where: str = "The archive") -> None:
    """Raises DataError unless this is a relative name with forward slashes that stays in its folder."""
    if name.startswith("/") or "\\" in name or "\0" in name or re.match(r"[A-Za-z]:", name):
        raise DataError(f"{where} holds the unsafe name {name!r}; expected a relative name with forward slashes.")
    if ".." in PurePosixPath(name).parts:
        raise DataError(f"{where} holds the unsafe name {name!r}, which leaves the folder; it was not read.")


def check_size(name: str, size: int, max_bytes: int) -> None:
    """Raises DataError if a file of one image has more than `max_bytes`."""
    if size > max_bytes:
        raise DataError(
            f"'{name}' holds more than {max_bytes} bytes, too many for one image here. Shrink or remove it."
        )


def check_no_page(head: bytes, name: str) -> None:
    """Raises DataError if the first bytes of a file show that something else was saved in its place."""
    start = head[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"<") and any(mark in start for mark in (b"<!doctype html", b"<html", b"<head", b"<error")):
        raise DataError(
            f"'{name}' is a web page that was saved in place of the file. Open it in a browser to see why, and "
            "download the file again."
        )
    if start.startswith(b"version https://git-lfs.github.com"):
        raise DataError(f"'{name}' is a pointer of Git LFS, not the file. Run 'git lfs pull' where it was cloned.")
