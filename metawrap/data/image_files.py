"""Files of a folder or a zip: names -> checked bytes.

A zip is never extracted, so it cannot write anywhere. Names that would leave the folder are refused all the same: no
data set has them. Both classes can be pickled and read in another process.
"""

from __future__ import annotations

import os
import re
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from metawrap.data.problems import reading
from metawrap.errors import DataError

_PIECE = 2**20


class FolderFiles:
    """The files under a folder; names have forward slashes. A file of more than `max_bytes` is refused when read."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root, self._max_bytes = root, max_bytes

    def names(self) -> list[str]:
        """All file names below the root, sorted."""
        return sorted(path.relative_to(self._root).as_posix() for path in self._root.rglob("*") if path.is_file())

    def has(self, name: str) -> bool:
        """Whether a file has this name."""
        return (self._root / name).is_file()

    def read(self, name: str) -> bytes:
        """The bytes of one file, or DataError."""
        with reading(f"'{name}' in {self._root} cannot be read", OSError), open(self._root / name, "rb") as file:
            # `read` allocates as much memory as it is asked for.
            content = file.read(min(os.fstat(file.fileno()).st_size, self._max_bytes) + 1)
        _check_size(name, len(content), self._max_bytes)
        return content

    def close(self) -> None:
        """Nothing: no file stays open."""


class ZipFiles:
    """The members of a zip, all of them checked before the first is read; `max_bytes` bounds each."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path, self._max_bytes = path, max_bytes
        self._archive: zipfile.ZipFile | None = None
        self._opener = 0
        self._members: dict[str, zipfile.ZipInfo] = {}
        for member in self._open().infolist():
            check_name(member.orig_filename)
            if stat.S_ISLNK(member.external_attr >> 16):
                raise DataError(
                    f"The archive holds a link, {member.orig_filename!r}; expected ordinary files only. It was not "
                    "read."
                )
            if member.filename in self._members:
                raise DataError(f"The archive holds '{member.filename}' twice. Get a fresh copy of it.")
            if member.filename and not member.is_dir():  # is_dir fails without a name.
                self._members[member.filename] = member

    def names(self) -> list[str]:
        """All member names without folders, sorted."""
        return sorted(self._members)

    def has(self, name: str) -> bool:
        """Whether a member has this name."""
        return name in self._members

    def read(self, name: str) -> bytes:
        """The bytes of one member, or DataError."""
        member = self._members.get(name)
        if member is None:
            raise DataError(f"'{name}' is not in the archive '{self._path}'. Get a fresh copy of it.")
        _check_size(name, member.file_size, self._max_bytes)
        content = bytearray()
        errors = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, OSError)
        with reading(f"'{name}' in the archive cannot be read", *errors), self._open().open(member) as file:
            # By pieces: zipfile yields as many bytes as the header declares, but decompresses as many as it is asked
            # for, so a header that lies would be a bomb.
            while piece := file.read(_PIECE):
                content += piece
        return bytes(content)

    def close(self) -> None:
        """Closes the file; another read opens it again."""
        if self._archive is not None:
            self._archive.close()
            self._archive = None

    def _open(self) -> zipfile.ZipFile:
        # A forked process shares the position in an open file with its parent, so each process opens its own.
        if self._archive is None or self._opener != os.getpid():
            errors = (zipfile.BadZipFile, OSError, ValueError, NotImplementedError)
            with reading(f"'{self._path}' is not a readable zip file", *errors):
                self._archive, self._opener = zipfile.ZipFile(self._path), os.getpid()
        assert self._archive is not None
        return self._archive

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None}


ImageFiles: TypeAlias = FolderFiles | ZipFiles


def files_at(path: Path, max_bytes: int) -> ImageFiles:
    """The files of a folder or a zip; DataError if neither is there, or a member of the zip is unsafe."""
    if path.is_dir():
        return FolderFiles(path, max_bytes)
    if not path.is_file():
        raise DataError(f"There is no folder and no zip file at '{path}'.")
    return ZipFiles(path, max_bytes)


def check_name(name: str, where: str = "The archive") -> None:
    """Raises DataError unless this is a relative name with forward slashes that stays in its folder."""
    if name.startswith("/") or "\\" in name or "\0" in name or re.match(r"[A-Za-z]:", name):
        raise DataError(f"{where} holds the unsafe name {name!r}; expected a relative name with forward slashes.")
    if ".." in PurePosixPath(name).parts:
        raise DataError(f"{where} holds the unsafe name {name!r}, which leaves the folder; it was not read.")


def _check_size(name: str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise DataError(
            f"'{name}' holds more than {max_bytes} bytes, too many for one image here. Shrink or remove it."
        )
