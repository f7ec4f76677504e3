"""Reading a pickle as data: bytes -> checked opcodes -> plain values and descriptions of arrays. Nothing of it is run.

First, the opcodes are walked over with the table of `pickletools`: only listed opcodes pass, each length is held
against the size of the file, and long texts and bytes are replaced by references to their place in the file. Then the
standard library's `Unpickler` reads the short copy. Its `find_class` imports nothing: the names that NumPy 1 and 2
write for arrays, and those of a few containers, stand for methods of `_Reader`, and any other name is refused. So a
file's claims cost no memory, and one image of a large cache can be read alone.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metawrap.data.problems import check_no_page
from metawrap.data.stored_arrays import FileContent, FileSpan, RefusedPickleError, Sealed, StoredArray
from metawrap.errors import DataError

MAX_VALUES = 2**22  # opcodes; a cache of 60,000 labelled images has a tenth of them
MAX_DIMENSIONS = 8
_LONG = 1024  # Texts and bytes of more bytes than that stay in the file.
_MAX_TEXT_ITEM = 4096  # characters of one item of an array of texts

# Opcodes of texts and bytes, and their encoding; then all others that are read.
_TEXTS = {
    **{"STRING": "string-escape", "BINSTRING": "bytes", "SHORT_BINSTRING": "bytes", "UNICODE": "unicode-escape"},
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), "utf-8"),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), "bytes"),
}
_OTHERS = """
    NONE NEWTRUE NEWFALSE INT LONG BININT BININT1 BININT2 LONG1 FLOAT BINFLOAT MARK POP POP_MARK DUP EMPTY_LIST LIST
    APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS PUT BINPUT LONG_BINPUT
    MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD PROTO FRAME STOP"""
# Code -> name, and the size of the argument: bytes, or a negative number of pickletools if the file tells the size.
OPCODES = {
    ord(opcode.code): (opcode.name, opcode.arg.n if opcode.arg else 0)
    for opcode in pickletools.opcodes
    if opcode.name in {*_TEXTS, *_OTHERS.split()}
}
_SIZE_LAYOUTS = {
    pickletools.TAKEN_FROM_ARGUMENT1: "<B",
    pickletools.TAKEN_FROM_ARGUMENT4: "<i",
    pickletools.TAKEN_FROM_ARGUMENT4U: "<I",
    pickletools.TAKEN_FROM_ARGUMENT8U: "<Q",
}
# Opcodes that write into a dict become calls of `persistent_load`, opcode Q, with the pair (dict, (key, value, ...)).
_DICT_STEPS = {"SETITEM": b"\x86\x86Q", "SETITEMS": b"t\x86Q", "DICT": b"tN\x86Q"}
# The known names, and the method of `_Reader` that a call of each runs.
_KNOWN = {
    "numpy.ndarray": "",
    "numpy.dtype": "make_dtype",
    "numpy.core.multiarray._reconstruct": "make_array",
    "numpy.core.multiarray.scalar": "make_number",
    "numpy.core.numeric._frombuffer": "make_filled_array",
    "_codecs.encode": "encode",
    "collections.OrderedDict": "make_dict",
    "collections.defaultdict": "make_dict",
    "builtins.bytes": "make_bytes",
    "builtins.list": "",
}
_NUMBERS = frozenset({"b1", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)), "f2", "f4", "f8"})


def read_pickle(source: Path | bytes, name: str = "", max_values: int = MAX_VALUES) -> Any:
    """The value that a pickle describes, with `StoredArray` for arrays; nothing of the pickle is run.

    Numbers, text, bytes, lists, tuples and dicts come back as themselves, the strings of Python 2 as text in latin-1.
    Bytes or text of more than 1024 bytes outside of an array become a `FileSpan`.

    Args:
        source: a file, or its bytes.
        name: the file's name in errors; by default its path.
        max_values: opcodes that are read before the file is refused.
    Raises:
        DataError: a name other than NumPy's for arrays, an array of objects, a size that the file does not bear out,
            too many values, or a file that is cut short or no pickle, such as a web page.
    """
    path, held = (None, source) if isinstance(source, bytes) else (source, None)
    content = FileContent(path, name or ("the pickle" if path is None else str(path)), held)
    check_no_page(content.view()[:512], content.name)
    try:
        value = _Reader(content, *_condensed(content, max_values)).load()
        if isinstance(value, _Name):
            raise RefusedPickleError(f"is the name '{value.name}'")
        return value
    except RefusedPickleError as error:
        raise DataError(
            f"'{content.name}' {error}. Only arrays of numbers or text, and plain lists, dicts, numbers and text are "
            "read from a pickle, and nothing of it is run. Get it from its publisher, or convert it to images."
        ) from error
    except DataError:
        raise
    # The errors of a file that is no pickle, or is cut short. RuntimeError: values nested too deep for a message.
    except (pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, TypeError,
            ValueError) as error:  # fmt: skip
        raise DataError(
            f"'{content.name}' is not a readable pickle ({type(error).__name__}: {str(error)[:80]}). It is cut short "
            "or broken: get a fresh copy of it."
        ) from error


def _condensed(content: FileContent, max_values: int) -> tuple[bytearray, list[FileSpan]]:
    """A short pickle of listed opcodes, and the long texts and bytes that it refers to by number."""
    data, at = content.view(), 0
    short, spans = bytearray(), list[FileSpan]()
    for count in range(max_values):
        if at >= len(data):
            raise EOFError
        name, size = OPCODES.get(data[at], ("", 0))
        if not name:
            raise RefusedPickleError(f"uses the opcode {data[at : at + 1]!r}, which no cache of images needs")
        begin, end = _argument(data, at + 1, size, lines=2 if name == "GLOBAL" else 1)
        if not begin <= end <= len(data):
            raise EOFError
        if end - begin > _LONG:
            short += b"J" + struct.pack("<i", len(spans)) + b"Q"  # BININT and BINPERSID
            spans.append(_span(content, begin, end, name))
        elif name in _DICT_STEPS:
            short += _DICT_STEPS[name]
        elif name == "BYTEARRAY8":
            short += b"B" + struct.pack("<I", end - begin) + data[begin:end]
        elif name != "FRAME":
            short += data[at:end]
        if name in ("PUT", "LONG_BINPUT"):
            place = int(data[begin:end]) if name == "PUT" else int.from_bytes(data[begin:end], "little")
            if place > count:  # Writers count from 0 or 1. Unpickler would allocate memory for all places below.
                raise ValueError(f"place {place} of the memo after {count} opcodes")
        if name == "STOP":
            return short, spans
        at = end
    raise RefusedPickleError(f"holds more than {max_values} values")


def _argument(data: Any, at: int, size: int, lines: int) -> tuple[int, int]:
    """Begin and end of an opcode's argument, with its line feed, but without the field that holds its size."""
    if size >= 0:
        return at, at + size
    if size != pickletools.UP_TO_NEWLINE:
        begin = at + struct.calcsize(_SIZE_LAYOUTS[size])
        return begin, begin + (struct.unpack(_SIZE_LAYOUTS[size], data[at:begin])[0] if begin <= len(data) else -1)
    end = at
    for _ in range(lines):
        end = data.find(b"\n", end) + 1 or len(data) + 1
    return at, end


def _span(content: FileContent, begin: int, end: int, opcode: str) -> FileSpan:
    if opcode not in _TEXTS:
        raise ValueError(f"a number or name of {end - begin} bytes")
    if opcode in ("STRING", "UNICODE"):
        end -= 1  # the line feed
    if opcode == "STRING":
        data = content.view()
        if data[begin] != data[end - 1] or data[begin] not in b"'\"":
            raise ValueError("a text without quotes")
        begin, end = begin + 1, end - 1
    return FileSpan(content, begin, end - begin, _TEXTS[opcode])


@dataclass(slots=True)
class _Name(Sealed):
    """A known name of a pickle. A call of it runs `function`, a method of `_Reader`, or is refused."""

    name: str
    function: Callable[..., Any] | None

    def __call__(self, *arguments: Any) -> Any:
        made = None if self.function is None else self.function(*arguments)
        if made is None:
            raise RefusedPickleError(f"calls '{self.name}' in a way that NumPy does not")
        return made


@dataclass(slots=True)
class _DType(Sealed):
    """The type of an array: NumPy's code, and the order of bytes."""

    code: str
    order: str = "="

    def __setstate__(self, state: Any) -> None:
        order, *parts = state[1:5]
        if order not in ("<", ">", "|", "=") or parts != [None, None, None]:
            raise RefusedPickleError("has an array of records")
        self.order = order

    def real(self) -> np.dtype[Any]:
        return np.dtype(self.code if self.order in "|=" else self.order + self.code)


class PickledArray(StoredArray):
    """A stored array whose fields the pickle sets, once, after it is made."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        if self.raw is not None or not isinstance(state, tuple):
            super().__setstate__(state)
        self.fill(*state[-4:])  # Before them stands a version; NumPy before 1.0 wrote none.

    def fill(self, shape: Any, dtype: Any, fortran: Any, raw: Any) -> PickledArray:
        """Sets the fields, or refuses them."""
        if not isinstance(dtype, _DType):
            raise RefusedPickleError("has an array without a type")
        if isinstance(raw, str):  # the bytes of Python 2
            raw = raw.encode("latin-1")
        if not isinstance(raw, bytes | FileSpan):
            raise RefusedPickleError(f"has an array whose items are a {type(raw).__name__}")
        plain = isinstance(shape, tuple) and len(shape) <= MAX_DIMENSIONS
        if not plain or not all(type(side) is int and side >= 0 for side in shape):
            raise RefusedPickleError(f"has an array of shape {shape!r:.60}")
        self.shape, self.dtype, self.fortran, self.raw = shape, dtype.real(), bool(fortran), raw
        # An escaped character takes one byte or more in the file, so this holds for every encoding.
        needed, there = math.prod(shape) * self.dtype.itemsize, raw.length if isinstance(raw, FileSpan) else len(raw)
        if needed > there:
            raise RefusedPickleError(f"claims an array of {needed} bytes where there are {there}")
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredArray, super().__reduce__()[1]


class _Reader(pickle.Unpickler):
    """Reads a condensed pickle; a call of a known name runs a method, and a method's None refuses the call."""

    def __init__(self, content: FileContent, short: bytearray, spans: list[FileSpan]) -> None:
        super().__init__(io.BytesIO(short), encoding="latin-1", fix_imports=False)
        self._file, self._spans = content.name, spans
        self._encoded: dict[str, bytes] = {}

    def find_class(self, module: str, name: str) -> _Name:
        """The stand-in for a known name; nothing is imported."""
        full = f"{module}.{name}"
        method = _KNOWN.get(full.replace("numpy._core.", "numpy.core.").replace("__builtin__.", "builtins."))
        if method is None:
            raise RefusedPickleError(f"asks for '{full}'"[:200])
        return _Name(full, getattr(self, method) if method else None)

    def persistent_load(self, reference: Any) -> Any:
        """A reference of `_condensed`: the number of a span, or (dict, (key, value, ...)), items to set."""
        if isinstance(reference, int):
            return self._spans[reference]
        target, items = ({}, reference[0]) if reference[1] is None else reference
        if type(target) is not dict:
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing a nested tuple would recurse as deep as the file wants.
            if not isinstance(key, str | bytes | int | float):
                raise RefusedPickleError(f"has a dict with a key of type {type(key).__name__}")
            target[key] = value
        return target

    def make_array(self, kind: Any, *_: Any) -> PickledArray | None:
        return PickledArray(self._file) if isinstance(kind, _Name) and kind.name == "numpy.ndarray" else None

    def make_filled_array(self, raw: Any, dtype: Any, shape: Any, order: Any) -> PickledArray:
        return PickledArray(self._file).fill(shape, dtype, order == "F", raw)

    def make_number(self, dtype: Any, raw: Any) -> Any:
        return PickledArray(self._file).fill((), dtype, False, raw).read().item()

    def make_dtype(self, code: Any, *_: Any) -> _DType:
        kind, digits = (code[:1], code[1:]) if isinstance(code, str) else ("", "")
        text = kind in ("S", "U") and digits.isdecimal() and len(digits) < 5 and 0 < int(digits) <= _MAX_TEXT_ITEM
        if not isinstance(code, str) or not (text or code in _NUMBERS):
            objects = " (Python objects)" if kind == "O" else ""
            raise RefusedPickleError(f"has an array of type {code!r:.40}{objects}")
        return _DType(code)

    def make_dict(self, pairs: Any = (), *_: Any) -> Any:
        items = [part for key, value in pairs for part in (key, value)] if isinstance(pairs, list) else []
        if items:
            pairs.clear()  # Else a short file could ask for any number of copies of a long list.
        return self.persistent_load(({}, items))

    def make_bytes(self, *arguments: Any) -> bytes | None:
        return None if arguments else b""

    def encode(self, text: Any, encoding: Any = None) -> Any:
        if encoding not in ("latin1", "latin-1", "iso-8859-1"):
            raise RefusedPickleError(f"encodes text as {encoding!r:.40}")
        if isinstance(text, FileSpan):  # Its `read` gives the encoded bytes.
            return text
        if not isinstance(text, str):
            raise RefusedPickleError(f"encodes a {type(text).__name__}")
        # Kept, so that a text that is encoded often takes its memory once.
        return self._encoded.setdefault(text, text.encode("latin-1"))
