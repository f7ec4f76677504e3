"""Problems with arguments and files, told in one way by all modules of this room."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from metawrap.errors import ArgumentError, DataError
from metawrap.tasks import describe_value


def wrong_argument(name: str, expected: str, value: Any, fix: str = "") -> ArgumentError:
    """The error for an argument that is not as expected; short lists are shown whole."""
    shown = str(value) if isinstance(value, tuple | list) and len(str(value)) < 60 else describe_value(value)
    return ArgumentError(f"{name}: expected {expected}, but got {shown}. {fix}".rstrip())


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
