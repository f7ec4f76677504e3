"""Arrays that stay in the file they were saved in: file -> span of bytes -> array.

An array in a pickle or in an uncompressed .npz is described by its place, shape and type. Its bytes are read on demand.
"""

from __future__ import annotations

import codecs
import math
import mmap
import struct
import zipfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from metawrap.data.problems import check_no_page, reading
from metawrap.errors import DataError


class FileContent:
    """The bytes of a file, mapped into memory on first use, in each process anew; or bytes that are `held` already."""

    def __init__(self, path: Path | None, name: str, held: bytes | None = None) -> None:
        self.path, self.name, self._held = path, name, held
        self._mapped: mmap.mmap | None = None

    def view(self) -> bytes | mmap.mmap:
        """All the bytes; DataError if the file cannot be read."""
        if self._held is not None:
            return self._held
        if self._mapped is None:
            assert self.path is not None
            # ValueError: the file is empty.
            with reading(f"'{self.name}' cannot be read", OSError, ValueError), open(self.path, "rb") as file:
                self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._mapped

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None}


class RefusedPickleError(Exception):
    """A pickle asks for something that no cache of images needs; the message continues "'<file>' ..."."""


class Sealed:
    """Base of a dataclass that a pickle may hold: the pickle cannot set its fields, only the constructor can."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise RefusedPickleError(f"sets the state of a {type(self).__name__}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes receive these objects, so their own pickles call the constructor.
        return type(self), tuple(getattr(self, each.name) for each in fields(self))  # type: ignore[arg-type]


@dataclass(slots=True)
class FileSpan(Sealed):
    """Long bytes or text that stay in the file.

    start, length: place and size in bytes. form: "bytes", "utf-8", "string-escape" or "unicode-escape", the encoding.
    """

    content: FileContent
    start: int
    length: int
    form: str = "bytes"

    def read(self) -> bytes | memoryview:
        """The bytes; text becomes one byte for each character, as in latin-1."""
        raw = memoryview(self.content.view())[self.start : self.start + self.length]
        if self.form == "bytes":
            return raw
        with reading(f"'{self.content.name}' holds broken text", ValueError):
            if self.form == "string-escape":
                return bytes(codecs.escape_decode(bytes(raw))[0])
            encoding = "utf-8" if self.form == "utf-8" else "raw-unicode-escape"
            return str(bytes(raw), encoding).encode("latin-1")
        raise AssertionError


@dataclass(slots=True)
class StoredArray(Sealed):
    """An array of numbers or texts as its file describes it; name: the file. `read` makes the array."""

    name: str
    shape: tuple[int, ...] = ()
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype("u1"))
    fortran: bool = False
    raw: bytes | FileSpan | None = None

    def read(self) -> NDArray[Any]:
        """The array, a read-only view of the file if that holds plain bytes; DataError for a wrong number of bytes."""
        raw = self.raw.read() if isinstance(self.raw, FileSpan) else (self.raw or b"")
        needed = math.prod(self.shape) * self.dtype.itemsize
        if len(raw) != needed:
            raise DataError(
                f"'{self.name}': an array of shape {self.shape} and type {self.dtype} needs {needed} bytes, but "
                f"{len(raw)} are there. Get a fresh copy of it."
            )
        return np.frombuffer(raw, self.dtype).reshape(self.shape, order="F" if self.fortran else "C")


def npz_array(file: Path, name: str) -> StoredArray:
    """An array of an uncompressed .npz, left in the file; nothing is unpickled.

    Raises:
        DataError: the array is missing, compressed or of objects, or the file is broken.
    """
    with reading(
        f"'{file}' holds no readable array '{name}'", zipfile.BadZipFile, KeyError, OSError, ValueError, struct.error
    ):
        with open(file, "rb") as raw:
            check_no_page(raw.read(512), str(file))
        with zipfile.ZipFile(file) as archive:
            member = archive.getinfo(f"{name}.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            raise DataError(
                f"'{file}' is compressed, so its images cannot be read one by one. Save it with np.savez, not "
                "np.savez_compressed."
            )
        with open(file, "rb") as raw:
            raw.seek(member.header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", raw.read(4))
            raw.seek(member.header_offset + 30 + name_length + extra_length)
            begin = raw.tell()
            read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(raw)]
            shape, fortran, dtype = read_header(raw)
            start = raw.tell()
    if dtype.hasobject:
        raise DataError(f"'{file}': the array '{name}' holds Python objects; expected numbers. It was not read.")
    length = member.file_size - (start - begin)
    return StoredArray(str(file), shape, dtype, fortran, FileSpan(FileContent(file, str(file)), start, length))
