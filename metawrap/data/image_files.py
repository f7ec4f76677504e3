"""Files of a folder, a zip or a tar: names -> checked bytes.

An archive is never extracted, so it cannot write anywhere. Names that would leave the folder are refused all the same:
no data set has them. Each class can be pickled and read in another process.
"""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from pathlib import Path
from typing import Any, TypeAlias

from metawrap.data.problems import check_name, check_no_page, check_size, reading
from metawrap.data.tar_members import TarFiles
from metawrap.errors import DataError

_PIECE = 2**20


class FolderFiles:
    """The files under a folder; names have forward slashes. A file of more than `max_bytes` is refused when read."""

    sequential = False

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root, self._max_bytes = root, max_bytes

    def names(self) -> list[str]:
        """All file names below the root, sorted; links are followed, and a folder without files ends in a slash."""
        found = []
        for place, folders, files in os.walk(self._root, followlinks=True):
            inside = Path(place).relative_to(self._root).as_posix()
            prefix = "" if inside == "." else f"{inside}/"
            found += [prefix + name for name in files] or ([] if folders or not prefix else [prefix])
            # A link to a folder above would be followed for ever.
            folders[:] = [name for name in folders if not _leads_up(Path(place, name))]
        return sorted(found)

    def has(self, name: str) -> bool:
        """Whether a file has this name."""
        return (self._root / name).is_file()

    def size(self, name: str) -> int:
        """The number of bytes of one file, or DataError."""
        with reading(f"'{name}' in {self._root} cannot be read", OSError):
            return (self._root / name).stat().st_size

    def read(self, name: str) -> bytes:
        """The bytes of one file, or DataError."""
        path = self._root / name
        if not path.is_file():  # To open a pipe would wait for ever.
            link = f"a link to '{path.readlink()}', which is not there" if path.is_symlink() else "missing, or no file"
            raise DataError(f"'{name}' in {self._root} cannot be read: it is {link}. Replace or remove it.")
        with reading(f"'{name}' in {self._root} cannot be read", OSError), open(path, "rb") as file:
            # `read` allocates as much memory as it is asked for.
            content = file.read(min(os.fstat(file.fileno()).st_size, self._max_bytes) + 1)
        check_size(name, len(content), self._max_bytes)
        return content

    def position(self, name: str) -> int:
        """0: files of a folder may be read in any order."""
        return 0

    def close(self) -> None:
        """Nothing: no file stays open."""


def _leads_up(folder: Path) -> bool:
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


class ZipFiles:
    """The members of a zip, all of them checked before the first is read; `max_bytes` bounds each."""

    sequential = False

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

    def size(self, name: str) -> int:
        """The number of bytes of one member, or DataError."""
        return self._member(name).file_size

    def _member(self, name: str) -> zipfile.ZipInfo:
        if name not in self._members:
            raise DataError(f"'{name}' is not in the archive '{self._path}'. Get a fresh copy of it.")
        return self._members[name]

    def read(self, name: str) -> bytes:
        """The bytes of one member, or DataError."""
        member = self._member(name)
        check_size(name, member.file_size, self._max_bytes)
        content = bytearray()
        errors = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, OSError)
        with reading(f"'{name}' in the archive cannot be read", *errors), self._open().open(member) as file:
            # By pieces: zipfile yields as many bytes as the header declares, but decompresses as many as it is asked
            # for, so a header that lies would be a bomb.
            while piece := file.read(_PIECE):
                content += piece
        return bytes(content)

    def position(self, name: str) -> int:
        """0: members of a zip may be read in any order."""
        return 0

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


ImageFiles: TypeAlias = FolderFiles | ZipFiles | TarFiles


def files_at(path: Path, max_bytes: int) -> ImageFiles:
    """The files of a folder, a zip, a tar or a tar.gz; DataError if none is there, or a member is unsafe."""
    if path.is_dir():
        return FolderFiles(path, max_bytes)
    if not path.is_file():
        raise DataError(f"There is no folder and no zip or tar file at '{path}'.")
    with reading(f"'{path}' cannot be read", OSError), open(path, "rb") as file:
        head = file.read(512)
    check_no_page(head, str(path))
    is_zip = head.startswith(b"PK") or path.suffix.lower() == ".zip"
    return ZipFiles(path, max_bytes) if is_zip else TarFiles(path, max_bytes)
