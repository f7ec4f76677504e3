"""Text files of data sets, of bounded size: bytes -> text -> rows of a CSV, or a mapping of JSON or YAML."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from metawrap.data.problems import check_no_page, reading
from metawrap.errors import DataError

MAX_TEXT_BYTES = 2**26  # mini-ImageNet's train.csv has 1.2 MB


def read_regular(path: str | Path, most: int) -> bytes:
    """The content of a file of at most so many bytes.

    Raises:
        OSError: it cannot be read, is larger, or is no plain file. A pipe would block for ever.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is no file but a folder, a pipe or a device", str(path))
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most} bytes", str(path))
    return content


def read_text(path: Path) -> str:
    """A text file in UTF-8, or DataError."""
    with reading(f"'{path}' cannot be read", OSError, fix="Name an existing file."):
        return decoded(read_regular(path, MAX_TEXT_BYTES), str(path))
    raise AssertionError


def decoded(content: bytes, name: str) -> str:
    """Bytes in UTF-8 as text without a byte-order mark, or DataError."""
    check_no_page(content[:512], name)
    if len(content) > MAX_TEXT_BYTES:
        raise DataError(f"'{name}' holds more than {MAX_TEXT_BYTES} bytes, too many for a list of names. Check it.")
    with reading(f"'{name}' is not text in UTF-8", UnicodeDecodeError, fix="Save it as UTF-8."):
        return content.decode("utf-8-sig")
    raise AssertionError


def read_table(text: str, name: str, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """The named columns of a CSV with a header, row by row; or DataError that names the line."""
    with reading(f"'{name}' is not a readable CSV file", csv.Error):
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    header = [cell.strip() for cell in rows[0]] if rows else []
    if missing := [column for column in columns if column not in header]:
        raise DataError(
            f"'{name}': expected the header {','.join(columns)}, but {missing[0]} is missing from "
            f"'{','.join(header)[:80]}'. Add it as the first line."
        )
    places = [header.index(column) for column in columns]
    for number, row in enumerate(rows[1:], start=2):
        if row and len(row) <= max(places):
            raise DataError(f"'{name}' line {number}: expected {len(header)} columns, but got {len(row)}. Correct it.")
    return [tuple(row[place].strip() for place in places) for row in rows[1:] if row]


def parsed(text: str, path: Path) -> Any:
    """The value of a JSON text, or of a YAML text without tags, by the file's suffix; or DataError."""
    kind, parse = ("JSON", json.loads) if path.suffix.lower() == ".json" else ("YAML", yaml.safe_load)
    errors = (yaml.YAMLError, ValueError, RecursionError)
    with reading(f"'{path}' is not readable {kind}", *errors, fix="Correct it there."):
        return parse(text)
