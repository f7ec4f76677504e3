"""The bodies of requests -> bytes and photos of known classes, in memory alone and within limits."""

from __future__ import annotations

import json
import time
import unicodedata
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import python_multipart  # noqa: F401  Starlette's parser is made of it.
from fastapi import HTTPException, Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from metawrap.errors import printable

_NAMES_BYTES = 2**16


@dataclass(frozen=True)
class Limits:
    """What strangers may send and hold.

    photo_bytes, photo_pixels: of one photo. photos, request_bytes: to learn from. classes, name_length: to tell apart.
    upload_bytes: of all requests that arrive at one time. seconds: for a request to arrive. decoders: photos that are
    read and predicted at one time. kept: fitted classifiers in memory; the one unused for longest is dropped.
    """

    photo_bytes: int = 16 * 2**20
    photo_pixels: int = 50_000_000
    photos: int = 200
    request_bytes: int = 128 * 2**20
    classes: int = 20
    name_length: int = 60
    upload_bytes: int = 512 * 2**20
    seconds: float = 60
    decoders: int = 4
    kept: int = 16


class Uploads:
    """Reads requests. What they hold counts until their block ends."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.held = limits, 0

    @asynccontextmanager
    async def photo(self, request: Request) -> AsyncIterator[bytes]:
        """The body, which is a file."""
        async with self._body(request, self.limits.photo_bytes) as chunks:
            content = b"".join([chunk async for chunk in chunks])
            if not content:
                raise HTTPException(400, "The request is empty. Send the content of a photo as its body.")
            yield content

    @asynccontextmanager
    async def labelled(self, request: Request) -> AsyncIterator[tuple[list[str], Iterator[tuple[int, str, bytes]]]]:
        """The names of classes, and (place among them, class/file, content) of each photo, of multipart/form-data.

        The field "classes" is a list of names in JSON; a file's field is the place of its class in the list.
        """
        kind, limits = request.headers.get("content-type", ""), self.limits
        # A charset could name a codec that is slow or fails. Browsers, which send UTF-8, name none.
        if not kind.lower().startswith("multipart/form-data") or "charset" in kind.lower():
            raise HTTPException(415, f"Expected multipart/form-data without a charset, but got {printable(kind)!r}.")
        async with self._body(request, limits.request_bytes) as chunks:
            parser = MultiPartParser(
                request.headers, chunks, max_files=limits.photos, max_fields=1, max_part_size=_NAMES_BYTES
            )
            parser.spool_max_size = limits.request_bytes + 1  # Never on disk.
            try:
                form = await parser.parse()
            except (MultiPartException, ValueError) as error:
                words = getattr(error, "message", error)
                raise HTTPException(400, f"No form of a list and up to {limits.photos} photos: {words}") from error
            try:
                fields = form.multi_items()
                names = _names([value for key, value in fields if key == "classes"], limits)
                files = [_file(key, value, len(names), limits) for key, value in fields if key != "classes"]
                yield names, ((label, f"{names[label]}/{name}", file.read()) for label, name, file in files)
            finally:
                await form.close()

    @asynccontextmanager
    async def _body(self, request: Request, most: int) -> AsyncIterator[Any]:
        told = request.headers.get("content-length", "")
        if told.isdecimal() and (len(told) > 15 or int(told) > most):
            raise _too_large(most)
        count, until = 0, time.monotonic() + self.limits.seconds

        async def chunks() -> AsyncIterator[bytes]:
            nonlocal count
            more = True
            while more:
                try:
                    with anyio.fail_after(until - time.monotonic()):
                        message = await request.receive()
                except TimeoutError as error:
                    raise HTTPException(408, f"The request took over {self.limits.seconds:g} s to arrive.") from error
                if message["type"] == "http.disconnect":
                    raise HTTPException(400, "The request ended early.")
                chunk, more = message.get("body", b""), message.get("more_body", False)
                count += len(chunk)
                self.held += len(chunk)
                if count > most:
                    raise _too_large(most)
                if self.held > self.limits.upload_bytes:
                    raise busy("Too many photos arrive at present")
                yield chunk

        try:
            yield chunks()
        finally:
            self.held -= count


def busy(why: str) -> HTTPException:
    """The answer to a request that may come again."""
    return HTTPException(503, f"{why}. Try again in some seconds.", {"Retry-After": "5"})


def _too_large(most: int) -> HTTPException:
    return HTTPException(413, f"The request is too large: at most {most / 2**20:.3g} MiB are accepted.")


def _names(given: list[Any], limits: Limits) -> list[str]:
    try:
        names = json.loads(given[0])
    except (IndexError, TypeError, ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise HTTPException(400, 'Expected a field "classes" with a list of names in JSON, such as ["apple", "pear"].')
    if len(names) > limits.classes:
        raise HTTPException(400, f"Expected at most {limits.classes} classes, but got {len(names)}.")
    names = [name.strip() for name in names]
    for place, name in enumerate(names, 1):
        if not 0 < len(name) <= limits.name_length or {unicodedata.category(c) for c in name} & {"Cc", "Cs"}:
            raise HTTPException(
                400,
                f"Class {place}: expected a name of 1 to {limits.name_length} characters, without control characters.",
            )
    return names


def _file(key: str, value: str | UploadFile, classes: int, limits: Limits) -> tuple[int, str, Any]:
    if not isinstance(value, UploadFile) or key not in map(str, range(classes)):
        raise HTTPException(400, f"Field {printable(key[:40])!r}: expected a file, under a number below {classes}.")
    name = printable(value.filename or "photo")[:80]
    if (value.size or 0) > limits.photo_bytes:
        raise HTTPException(413, f"'{name}' is too large: at most {limits.photo_bytes / 2**20:.3g} MiB are accepted.")
    return int(key), name, value.file
