"""Names and labels in the pickles of data sets: values of `read_pickle` -> checked texts and whole numbers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metawrap.data.stored_arrays import StoredArray
from metawrap.errors import DataError


def texts(names: Iterable[Any]) -> tuple[str, ...]:
    """Names as text; the bytes of Python 2 are decoded."""
    return tuple(name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in names)


def with_text_keys(value: Any) -> dict[str, Any]:
    """A dict with its keys as text; any other value counts as an empty dict."""
    return dict(zip(texts(value), value.values(), strict=True)) if isinstance(value, dict) else {}


def whole_numbers(labels: Any, count: int, where: str | Path) -> NDArray[np.int64]:
    """A list or array of whole numbers of at least 0, one per image, as int64.

    Raises:
        DataError: other values, or another number of them than of images; names the file `where`.
    """
    values = labels.read() if isinstance(labels, StoredArray) else labels
    good = isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "iu"
    if isinstance(values, list | tuple):
        good = all(type(value) is int and 0 <= value < 2**31 for value in values)
    if not good or len(values) != count or count == 0 or min(values) < 0:
        got = f"{len(values)} of them" if good else kind_of(labels)
        raise DataError(
            f"'{where}': expected a whole number of at least 0 for each of {count} images as labels, but got {got}. "
            "Get a fresh copy of it."
        )
    return np.asarray(values, dtype=np.int64)


def renumbered(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The different labels, sorted, and the labels as 0, 1, ... in that order."""
    numbers, compact = np.unique(labels, return_inverse=True)
    return numbers, compact.astype(np.int64)


def kind_of(value: Any) -> str:
    """The kind of a value in words, for errors."""
    if isinstance(value, dict):
        return f"a dict with {', '.join(map(repr, list(value)[:6])) or 'nothing'}"[:200]
    return f"a {type(value).__name__}"
