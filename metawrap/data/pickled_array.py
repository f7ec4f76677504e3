"""Arrays that stay in the file they were pickled in: where their bytes lie, and how they are written there."""

from __future__ import annotations

import codecs
import math
import mmap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metawrap.errors import DataError


class Content:
    """The bytes of a file, mapped into memory when first used, in each process anew; or bytes at hand."""

    def __init__(self, path: Path | None, name: str, held: bytes | None = None) -> None:
        self.path, self.name, self._held = path, name, held
        self._mapped: mmap.mmap | None = None

    def view(self) -> bytes | mmap.mmap:
        """All the bytes; DataError where the file cannot be read."""
        if self._held is not None:
            return self._held
        if self._mapped is None:
            assert self.path is not None
            try:
                with open(self.path, "rb") as file:
                    self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:  # ValueError: the file is empty.
                raise DataError(f"'{self.name}' cannot be read: {error}. Get a fresh copy of it.") from error
        return self._mapped

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None}


@dataclass(frozen=True, slots=True)
class Stretch:
    """Long bytes or text, left in the file: where they lie and how they are written there."""

    content: Content
    start: int
    length: int
    form: str  # "bytes", "utf-8", "string-escape", "unicode-escape"

    def read(self) -> bytes | memoryview:
        """The bytes; text becomes the bytes of its characters, as in latin-1."""
        raw = memoryview(self.content.view())[self.start : self.start + self.length]
        if self.form == "bytes":
            return raw
        try:
            if self.form == "string-escape":
                return bytes(codecs.escape_decode(bytes(raw))[0])
            encoding = "utf-8" if self.form == "utf-8" else "raw-unicode-escape"
            return str(bytes(raw), encoding).encode("latin-1")
        except (UnicodeError, ValueError) as error:
            raise DataError(f"'{self.content.name}' holds broken text: {error}. Get a fresh copy of it.") from error


@dataclass(slots=True)
class PickledArray:
    """An array of numbers or texts as its pickle describes it; `read` makes it real."""

    name: str
    shape: tuple[int, ...] = ()
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype("u1"))
    fortran: bool = False
    raw: bytes | Stretch | None = None

    def read(self) -> NDArray[Any]:
        """The array; one that lies in the file as it is in memory is a read-only view of the file.

        Raises:
            DataError: the bytes are fewer or more than the shape asks for.
        """
        raw = self.raw.read() if isinstance(self.raw, Stretch) else (self.raw or b"")
        needed = math.prod(self.shape) * self.dtype.itemsize
        if len(raw) != needed:
            raise DataError(
                f"'{self.name}': an array of shape {self.shape} and type {self.dtype} needs {needed} bytes, but "
                f"{len(raw)} are there. Get a fresh copy of it."
            )
        return np.frombuffer(raw, self.dtype).reshape(self.shape, order="F" if self.fortran else "C")
