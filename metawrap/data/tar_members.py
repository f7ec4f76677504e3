"""Members of a tar or tar.gz: names -> bytes. Nothing is extracted, and the decompressed size is bounded."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from metawrap.data.problems import check_name, check_no_page, check_size, reading
from metawrap.errors import DataError

MAX_MEMBERS = 10_000
MAX_IMAGES = 500_000  # tieredImageNet has 448,695
_ERRORS = (tarfile.TarError, zlib.error, EOFError, OSError, ValueError, OverflowError)
_LEAST_LIMIT, _MOST_COMPRESSED = 2**30, 100  # bytes of a decompressed archive, and their number for each byte of it
_PIECE = 2**20
_MAX_READ = 2**22  # tarfile reads members by pieces, but a header with a long name at once


def read_members(path: Path, names: Sequence[str], max_bytes: int) -> dict[str, bytes]:
    """The bytes of the named members, each at most `max_bytes`; the whole archive may have four times as many.

    Raises:
        DataError: a member whose name leaves the folder, a link or device, a named member that is missing, twice or
            too large, or an archive that is broken or decompresses to too much.
    """
    found: dict[str, bytes] = {}
    with (
        reading(f"'{path}' is not a readable tar archive", *_ERRORS),
        open(path, "rb") as raw,
        tarfile.open(fileobj=_bounded(raw, path, 4 * max_bytes), mode="r:") as archive,
    ):
        for count, member in enumerate(archive):
            _check_member(member, count, path, MAX_MEMBERS)
            if member.size > max_bytes:
                raise DataError(
                    f"'{member.name}' in '{path}' claims {member.size} bytes; at most {max_bytes} are accepted."
                )
            name = member.name.removeprefix("./")
            if name in names:
                if name in found:
                    raise DataError(f"The archive '{path}' holds '{name}' twice. Get a fresh copy of it.")
                found[name] = _content(archive, member)
    if missing := [name for name in names if name not in found]:
        raise DataError(f"'{path}' does not hold '{missing[0]}'. Get a fresh copy of it.")
    return found


class TarFiles:
    """The members of a tar or tar.gz, all of them checked before the first is read; `max_bytes` bounds each.

    sequential: the archive is compressed, so its members should be read in the order of their `position`.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path, self._max_bytes = path, max_bytes
        self._file: IO[bytes] | None = None
        self._opener = 0
        self._members: dict[str, tuple[int, int]] = {}  # name -> begin and size
        try:
            self._look(path)
        finally:  # A refused archive is no longer open, either.
            self.close()

    def _look(self, path: Path) -> None:
        with reading(f"'{path}' is not a readable zip, tar or tar.gz", *_ERRORS):
            self.sequential = is_compressed(path)
            with tarfile.open(fileobj=self._opened(), mode="r:") as archive:
                for count in range(MAX_IMAGES + 1):
                    if (member := archive.next()) is None:
                        break
                    archive.members.clear()  # type: ignore[attr-defined]  # It would keep a thousand bytes of each.
                    _check_member(member, count, path, MAX_IMAGES)
                    name = member.name.removeprefix("./")
                    if name in self._members:
                        raise DataError(f"The archive '{path}' holds '{name}' twice. Get a fresh copy of it.")
                    if member.isfile():
                        self._members[name] = member.offset_data, member.size

    def names(self) -> list[str]:
        """All member names without folders, sorted."""
        return sorted(self._members)

    def has(self, name: str) -> bool:
        """Whether a member has this name."""
        return name in self._members

    def position(self, name: str) -> int:
        """The place of a member in the decompressed archive."""
        return self._members[name][0]

    def size(self, name: str) -> int:
        """The number of bytes of one member, or DataError."""
        return self._member(name)[1]

    def _member(self, name: str) -> tuple[int, int]:
        if name not in self._members:
            raise DataError(f"'{name}' is not in the archive '{self._path}'. Get a fresh copy of it.")
        return self._members[name]

    def read(self, name: str) -> bytes:
        """The bytes of one member, or DataError."""
        begin, size = self._member(name)
        check_size(name, size, self._max_bytes)
        content = bytearray()
        with reading(f"'{name}' in the archive cannot be read", *_ERRORS):
            file = self._opened()
            file.seek(begin)
            while piece := file.read(min(_PIECE, size - len(content))):
                content += piece
        if len(content) != size:
            raise DataError(f"'{name}' in the archive is cut short. Get a fresh copy of it.")
        return bytes(content)

    def close(self) -> None:
        """Closes the file; another read opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self) -> IO[bytes]:
        # A forked process shares the position in an open file with its parent, so each process opens its own.
        if self._file is None or self._opener != os.getpid():
            limit = max(_LEAST_LIMIT, _MOST_COMPRESSED * self._path.stat().st_size)
            raw = open(self._path, "rb")  # noqa: SIM115  # It stays open for the reads that follow.
            self._file, self._opener = _bounded(raw, self._path, limit), os.getpid()
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}


class _BoundedFile(io.RawIOBase):
    """A file that refuses large reads and places beyond `max_total`; seeking forward counts as reading."""

    def __init__(self, file: IO[bytes], raw: IO[bytes], path: Path, max_total: int) -> None:
        self._file, self._raw, self._path, self._max_total = file, raw, path, max_total

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > _MAX_READ:
            raise DataError(
                f"'{self._path}' has a header of {size} bytes; expected an ordinary archive. It was not read."
            )
        self._check(self._file.tell() + size)
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._check(offset if whence == 0 else self._file.tell() + offset)
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        self._raw.close()
        super().close()

    def _check(self, place: int) -> None:
        # Headers and padding may reach a little beyond the last member.
        if place > self._max_total + _MAX_READ:
            raise DataError(
                f"'{self._path}' decompresses to more than {self._max_total} bytes, a bomb or no archive of this data "
                "set. It was not read further."
            )


def is_compressed(path: Path) -> bool:
    """Whether the file is a gzip."""
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _bounded(raw: IO[bytes], path: Path, max_total: int) -> IO[bytes]:
    try:
        check_no_page(raw.read(512), str(path))
    except BaseException:
        raw.close()
        raise
    raw.seek(0)
    file = gzip.GzipFile(fileobj=raw, mode="rb") if is_compressed(path) else raw
    return _BoundedFile(file, raw, path, max_total)  # type: ignore[arg-type, return-value]


def _check_member(member: tarfile.TarInfo, count: int, path: Path, max_members: int) -> None:
    if count >= max_members:
        raise DataError(f"'{path}' holds more than {max_members} members; expected fewer. It was not read further.")
    check_name(member.name)
    if member.islnk() or member.issym():
        raise DataError(f"The archive holds a link, {member.name!r}; expected ordinary files only. It was not read.")
    if member.issparse() or not (member.isfile() or member.isdir()):
        raise DataError(
            f"The archive holds a device or pipe, or a sparse file, {member.name!r}; expected ordinary files only."
        )


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None
    content = bytearray()
    while piece := file.read(_PIECE):
        content += piece
    if len(content) != member.size:
        raise DataError(f"'{member.name}' in the archive is cut short. Get a fresh copy of it.")
    return bytes(content)
