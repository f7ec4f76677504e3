"""Members of a tar or tar.gz: names -> bytes. Nothing is extracted, and the decompressed size is bounded."""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from metawrap.data.image_files import check_name
from metawrap.data.problems import reading
from metawrap.errors import DataError

MAX_MEMBERS = 10_000
_PIECE = 2**20
_MAX_READ = 2**22  # tarfile reads members by pieces, but a header with a long name at once


def read_members(path: Path, names: Sequence[str], max_bytes: int) -> dict[str, bytes]:
    """The bytes of the named members, each at most `max_bytes`; the whole archive may have four times as many.

    Raises:
        DataError: a member whose name leaves the folder, a link or device, a named member that is missing, twice or
            too large, or an archive that is broken or decompresses to too much.
    """
    found: dict[str, bytes] = {}
    errors = (tarfile.TarError, zlib.error, EOFError, OSError, ValueError, OverflowError)
    with (
        reading(f"'{path}' is not a readable tar archive", *errors),
        open(path, "rb") as raw,
        tarfile.open(fileobj=_bounded(raw, path, 4 * max_bytes), mode="r:") as archive,
    ):
        for count, member in enumerate(archive):
            _check_member(member, count, path, max_bytes)
            name = member.name.removeprefix("./")
            if name in names:
                if name in found:
                    raise DataError(f"The archive '{path}' holds '{name}' twice. Get a fresh copy of it.")
                found[name] = _content(archive, member)
    if missing := [name for name in names if name not in found]:
        raise DataError(f"'{path}' does not hold '{missing[0]}'. Get a fresh copy of it.")
    return found


class _BoundedFile(io.RawIOBase):
    """A file that refuses large reads and places beyond `max_total`; seeking forward counts as reading."""

    def __init__(self, file: IO[bytes], path: Path, max_total: int) -> None:
        self._file, self._path, self._max_total = file, path, max_total

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

    def _check(self, place: int) -> None:
        # Headers and padding may reach a little beyond the last member.
        if place > self._max_total + _MAX_READ:
            raise DataError(
                f"'{self._path}' decompresses to more than {self._max_total} bytes, a bomb or no archive of this data "
                "set. It was not read further."
            )


def _bounded(raw: IO[bytes], path: Path, max_total: int) -> IO[bytes]:
    compressed = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    file = gzip.GzipFile(fileobj=raw, mode="rb") if compressed else raw
    return _BoundedFile(file, path, max_total)  # type: ignore[arg-type, return-value]


def _check_member(member: tarfile.TarInfo, count: int, path: Path, max_bytes: int) -> None:
    if count >= MAX_MEMBERS:
        raise DataError(f"'{path}' holds more than {MAX_MEMBERS} members; expected a few. It was not read further.")
    check_name(member.name)
    if member.islnk() or member.issym():
        raise DataError(f"The archive holds a link, {member.name!r}; expected ordinary files only. It was not read.")
    if not member.isfile() and not member.isdir():
        raise DataError(f"The archive holds a device or pipe, {member.name!r}; expected ordinary files only.")
    if member.size > max_bytes:
        raise DataError(f"'{member.name}' in '{path}' claims {member.size} bytes; at most {max_bytes} are accepted.")


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None
    content = bytearray()
    while piece := file.read(_PIECE):
        content += piece
    if len(content) != member.size:
        raise DataError(f"'{member.name}' in the archive is cut short. Get a fresh copy of it.")
    return bytes(content)
