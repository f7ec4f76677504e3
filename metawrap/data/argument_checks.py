"""The argument checks that the loaders and the sampler share."""

from __future__ import annotations

import numpy as np

from metawrap.errors import ArgumentError
from metawrap.tasks import describe_value


def check_int(name: str, value: int, least: int) -> None:
    """Raises ArgumentError unless value is an integer (not a bool) of at least `least`."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise ArgumentError(f"{name}: expected an integer of at least {least}, but got {describe_value(value)}.")


def check_seed(seed: int | str) -> None:
    """Raises ArgumentError unless seed is a name or an integer of at least 0."""
    if not isinstance(seed, str):
        check_int("seed", seed, 0)


def check_counts(name: str, counts: object, least: int) -> tuple[int, int, int]:
    """Three integers for train, validation and test, or ArgumentError."""
    if not isinstance(counts, tuple | list) or len(counts) != 3:
        raise ArgumentError(f"{name}: expected three (train, validation, test), but got {describe_value(counts)}.")
    for part, count in zip(("train", "validation", "test"), counts, strict=True):
        check_int(f"{name} ({part})", count, least)
    return counts[0], counts[1], counts[2]
