"""Reading files from a folder or straight from a zip: names -> checked bytes.

Nothing is extracted, so an archive cannot write anywhere; names that would leave a folder are refused all the same,
because a member that tries is no image of any data set.
"""

from __future__ import annotations

import re
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Protocol

from metawrap.errors import DataError


class ImageSource(Protocol):
    """Where image files lie: names with forward slashes, and the bytes of each."""

    def names(self) -> list[str]:
        """All file names, sorted."""

    def read(self, name: str) -> bytes:
        """The bytes of one file, or DataError."""


class FolderSource:
    """The files under a folder; a file of more than `max_bytes` is refused when it is read."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root, self._max_bytes = root, max_bytes

    def names(self) -> list[str]:
        """All file names below the root, sorted."""
        return sorted(path.relative_to(self._root).as_posix() for path in self._root.rglob("*") if path.is_file())

    def read(self, name: str) -> bytes:
        """The bytes of one file, or DataError."""
        try:
            with open(self._root / name, "rb") as file:
                content = file.read(self._max_bytes + 1)
        except OSError as error:
            raise DataError(f"'{name}' in {self._root} cannot be read: {error}.") from error
        _check_size(name, len(content), self._max_bytes)
        return content


class ZipSource:
    """The members of an open zip, every one of them checked before the first is read."""

    def __init__(self, archive: zipfile.ZipFile, max_bytes: int) -> None:
        self._archive, self._max_bytes = archive, max_bytes
        self._members: dict[str, zipfile.ZipInfo] = {}
        for member in archive.infolist():
            check_member(member)
            if member.filename in self._members:
                raise DataError(f"The archive holds '{member.filename}' twice. Get a fresh copy of it.")
            if member.filename and not member.is_dir():  # which fails where there is no name
                self._members[member.filename] = member

    def names(self) -> list[str]:
        """All member names, folders left out, sorted."""
        return sorted(self._members)

    def read(self, name: str) -> bytes:
        """The bytes of one member, or DataError."""
        member = self._members[name]
        # zipfile never yields more than the header declares, so a lying header is a checksum error and not a bomb.
        _check_size(name, member.file_size, self._max_bytes)
        try:
            return self._archive.read(member)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, OSError) as error:
            raise DataError(
                f"'{name}' in the archive cannot be read: {error}. Get a fresh copy of the archive."
            ) from error


@contextmanager
def open_source(path: Path, max_bytes: int) -> Iterator[ImageSource]:
    """A folder or a zip file as an ImageSource, closed afterwards.

    Raises:
        DataError: there is nothing at the path, it is no zip, or a member's name or kind is unsafe.
    """
    if path.is_dir():
        yield FolderSource(path, max_bytes)
        return
    if not path.is_file():
        raise DataError(f"There is no folder and no zip file at '{path}'.")
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"'{path}' is not a readable zip file: {error}. Get a fresh copy of it.") from error
    with archive:
        yield ZipSource(archive, max_bytes)


def check_member(member: zipfile.ZipInfo) -> None:
    """Raises DataError if extracting this member could write outside the target folder, or would make a link."""
    name = member.orig_filename
    if name.startswith("/") or "\\" in name or "\0" in name or re.match(r"[A-Za-z]:", name):
        raise DataError(f"The archive holds the unsafe name {name!r}; expected a relative name with forward slashes.")
    if ".." in PurePosixPath(name).parts:
        raise DataError(f"The archive holds the unsafe name {name!r}, which leaves the folder; it was not read.")
    if stat.S_ISLNK(member.external_attr >> 16):
        raise DataError(f"The archive holds a link, {name!r}; expected ordinary files only. It was not read.")


def _check_size(name: str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise DataError(
            f"'{name}' holds more than {max_bytes} bytes, too many for one image here. Shrink or remove it."
        )
