"""Reading a pickle without running it: bytes -> opcodes -> plain values and descriptions of arrays.

Python's own unpickler imports and calls whatever the file names. This one knows a fixed list of names, none of which it
imports: those that NumPy 1 and 2 write for an array, a dtype and a number, and a few containers. They become values
here, and any other name is refused. Nothing that is long is copied: an array stays where it lies in the file until it
is read, so that a file's claims cost no memory, and an image of a large cache can be read alone.

Source of the opcodes: PEP 307, PEP 3154, PEP 574 and `pickletools` of the standard library.
"""

from __future__ import annotations

import codecs
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from metawrap.data.pickled_array import Content, PickledArray, Stretch
from metawrap.errors import DataError

MAX_VALUES = 2**22  # opcodes; a cache of 60,000 labelled images has a tenth of them
MAX_DIMENSIONS = 8
_LONG = 1024  # bytes: what is longer stays in the file
_MAX_TEXT_ITEM = 4096  # characters of one item of an array of texts

_ARRAY, _DTYPE, _NDARRAY, _NUMBER, _BUFFER, _ENCODE, _MAPPING, _BYTES, _LIST = range(9)
_KNOWN = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _DTYPE,
    ("_codecs", "encode"): _ENCODE,
    ("collections", "OrderedDict"): _MAPPING,
    ("collections", "defaultdict"): _MAPPING,
}
for _core in ("numpy.core", "numpy._core"):
    _KNOWN[f"{_core}.multiarray", "_reconstruct"] = _ARRAY
    _KNOWN[f"{_core}.multiarray", "scalar"] = _NUMBER
    _KNOWN[f"{_core}.numeric", "_frombuffer"] = _BUFFER
for _builtins in ("builtins", "__builtin__"):
    _KNOWN[_builtins, "bytes"] = _BYTES
    _KNOWN[_builtins, "list"] = _LIST


@dataclass(frozen=True, slots=True)
class _Name:
    module: str
    name: str
    kind: int


@dataclass(slots=True)
class _DType:
    code: str
    order: str = "="

    def real(self) -> np.dtype[Any]:
        return np.dtype(self.code if self.order in "|=" else self.order + self.code)


def read_pickle(source: Path | bytes, name: str = "", max_values: int = MAX_VALUES) -> Any:
    """The value that a pickle describes, with `PickledArray` for arrays; nothing of the pickle is run.

    Numbers, text, bytes, lists, tuples and dicts come back as themselves, those of Python 2 as text in latin-1.
    Anything of more than 1024 bytes that is not in an array is a `Stretch`.

    Args:
        source: a file, or its bytes.
        name: what errors call it; the file's name by default.
        max_values: opcodes that are read before the file is refused.
    Raises:
        DataError: a name other than NumPy's for arrays, an array of objects, a claim that the file does not bear out,
            too many values, or a file that is cut short or no pickle.
    """
    path = None if isinstance(source, bytes) else source
    held = source if isinstance(source, bytes) else None
    content = Content(path, name or ("the pickle" if held is not None else str(path)), held)
    return _Machine(content, max_values).run()


class _Machine:
    """The stack machine of the pickle format, without its calls."""

    def __init__(self, content: Content, max_values: int) -> None:
        self.content, self.data, self.at = content, content.view(), 0
        self.size, self.max_values = len(self.data), max_values
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        try:
            for _ in range(self.max_values):
                opcode = self.data[self.at]
                self.at += 1
                if opcode == 0x2E:  # STOP
                    return self.stack.pop()
                step = _STEPS.get(opcode)
                if step is None:
                    self.refuse(f"uses the opcode {bytes([opcode])!r}, which no cache of images needs")
                step(self)
        except DataError:
            raise
        # What a file that is no pickle, or is cut short, does to a stack machine.
        except (IndexError, KeyError, ValueError, TypeError, OverflowError, struct.error, SyntaxError) as error:
            raise DataError(
                f"'{self.content.name}' is not a readable pickle (at byte {self.at}: {type(error).__name__}). It is "
                "cut short or broken: get a fresh copy of it."
            ) from error
        self.refuse(f"holds more than {self.max_values} values")

    def refuse(self, what: str) -> NoReturn:
        raise DataError(
            f"'{self.content.name}' {what}. Only arrays of numbers or text, and plain lists, dicts, numbers and text "
            "are read from a pickle, and nothing of it is run. Get it from its publisher, or convert it to images."
        )

    # Bytes.

    def take(self, count: int) -> bytes:
        if count < 0 or self.at + count > self.size:
            raise IndexError
        self.at += count
        return self.data[self.at - count : self.at]

    def skip(self, count: int) -> None:
        self.take(count)

    def number(self, layout: str) -> int:
        return int(struct.unpack(layout, self.take(struct.calcsize(layout)))[0])

    def line(self) -> tuple[int, int]:
        """Where the next line starts, and its length without the line feed."""
        start, end = self.at, self.data.find(b"\n", self.at)
        if end < 0:
            raise IndexError
        self.at = end + 1
        return start, end - start

    def short_line(self) -> bytes:
        start, length = self.line()
        if length > _LONG:
            raise ValueError
        return self.data[start : start + length]

    def text(self, start: int, length: int, form: str) -> Any:
        """Text or bytes at hand if short, else where they lie; "python 2" is either, and read as text."""
        if length < 0 or start + length > self.size:
            raise IndexError
        self.at = max(self.at, start + length)
        if length > _LONG:
            return Stretch(self.content, start, length, "bytes" if form == "python 2" else form)
        raw = self.data[start : start + length]
        if form == "bytes":
            return raw
        if form == "string-escape":
            return codecs.escape_decode(raw)[0].decode("latin-1")
        encodings = {"utf-8": "utf-8", "unicode-escape": "raw-unicode-escape", "python 2": "latin-1"}
        # Some surrogates stand in real pickles; nothing here minds them.
        return raw.decode(encodings[form], "surrogatepass" if form == "utf-8" else "strict")

    def push_text(self, layout: str, form: str) -> None:
        length = self.number(layout)
        self.stack.append(self.text(self.at, length, form))

    def push_quoted(self) -> None:
        start, length = self.line()
        if length < 2 or self.data[start] != self.data[start + length - 1] or self.data[start] not in b"'\"":
            raise ValueError
        end, self.at = self.at, start
        self.stack.append(self.text(start + 1, length - 2, "string-escape"))
        self.at = end

    def push_unicode_line(self) -> None:
        start, length = self.line()
        end, self.at = self.at, start
        self.stack.append(self.text(start, length, "unicode-escape"))
        self.at = end

    def push_int_line(self) -> None:
        line = self.short_line()
        self.stack.append(line == b"01" if line in (b"00", b"01") else int(line.rstrip(b"L")))

    # Containers.

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def drop_mark(self) -> None:
        self.pop_mark()

    def collect(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        self.stack[len(self.stack) - count :] = [tuple(self.stack[len(self.stack) - count :])]

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise TypeError
        target.extend(items)

    def set_items(self, target: Any, items: list[Any]) -> dict[Any, Any]:
        if type(target) is not dict or len(items) % 2:
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing a tuple goes as deep as it is nested, which the file decides.
            if not isinstance(key, str | bytes | int | float):
                self.refuse(f"has a dict with a key of type {type(key).__name__}")
            target[key] = value
        return target

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items(self.stack[-1], [key, value])

    # Names, and what would be calls.

    def push_name(self, module: str, name: str) -> None:
        kind = _KNOWN.get((module, name))
        if kind is None:
            self.refuse(f"asks for '{module}.{name}'"[:200])
        self.stack.append(_Name(module, name, kind))

    def push_stacked_name(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise TypeError
        self.push_name(module, name)

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise TypeError
        self.stack.append(self.value_of(function, arguments))

    def value_of(self, function: _Name, arguments: tuple[Any, ...]) -> Any:
        kind = function.kind
        if kind == _ARRAY and isinstance(arguments[0], _Name) and arguments[0].kind == _NDARRAY:
            return PickledArray(self.content.name)
        if kind == _DTYPE:
            return self.dtype(arguments[0])
        if kind == _NUMBER and isinstance(arguments[0], _DType):
            return self.array((), arguments[0], False, arguments[1]).read().item()
        if kind == _BUFFER:
            raw, dtype, shape, order = arguments
            return self.array(shape, dtype, order == "F", raw)
        if kind == _ENCODE:
            return self.encoded(*arguments)
        if kind == _MAPPING:
            pairs = arguments[0] if arguments and isinstance(arguments[0], list) else []
            return self.set_items({}, [part for pair in pairs for part in _pair(pair)])
        if kind == _BYTES and arguments == ():
            return b""
        return self.refuse(f"calls '{function.module}.{function.name}' in a way that NumPy does not")

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, PickledArray) and target.raw is None and isinstance(state, tuple):
            # Version, shape, dtype, order, bytes; NumPy before 1.0 wrote no version.
            shape, dtype, fortran, raw = state[-4:]
            made = self.array(shape, dtype, bool(fortran), raw)
            target.shape, target.dtype, target.fortran, target.raw = made.shape, made.dtype, made.fortran, made.raw
        elif isinstance(target, _DType) and isinstance(state, tuple):
            order, *parts = state[1:5]
            if order not in ("<", ">", "|", "=") or parts != [None, None, None]:
                self.refuse("has an array of records")
            target.order = order
        else:
            self.refuse(f"sets the state of a {type(target).__name__}")

    def dtype(self, code: Any) -> _DType:
        kind, digits = (code[:1], code[1:]) if isinstance(code, str) else ("", "")
        text = kind in ("S", "U") and digits.isdecimal() and len(digits) < 5 and 0 < int(digits) <= _MAX_TEXT_ITEM
        if not text and code not in _NUMBERS:
            self.refuse(f"has an array of type {code!r:.40}{' (Python objects)' if kind == 'O' else ''}")
        return _DType(code)

    def array(self, shape: Any, dtype: Any, fortran: bool, raw: Any) -> PickledArray:
        if not isinstance(dtype, _DType):
            self.refuse("has an array without a type")
        if isinstance(raw, str):  # Bytes, as Python 2 calls them.
            raw = raw.encode("latin-1")
        if not isinstance(raw, bytes | Stretch):
            self.refuse(f"has an array whose items are a {type(raw).__name__}")
        counts = isinstance(shape, tuple) and len(shape) <= MAX_DIMENSIONS
        if not counts or not all(type(side) is int and side >= 0 for side in shape):
            self.refuse(f"has an array of shape {shape!r:.60}")
        real = dtype.real()
        # An escaped character takes one byte or more in the file, so this holds for every form.
        needed, there = math.prod(shape) * real.itemsize, raw.length if isinstance(raw, Stretch) else len(raw)
        if needed > there:
            self.refuse(f"claims an array of {needed} bytes where there are {there}")
        return PickledArray(self.content.name, shape, real, fortran, raw)

    def encoded(self, text: Any, encoding: Any = None) -> Any:
        if encoding not in ("latin1", "latin-1", "iso-8859-1"):
            self.refuse(f"encodes text as {encoding!r:.40}")
        # A stretch stays where it is: its `read` gives the bytes.
        if not isinstance(text, str | Stretch):
            self.refuse(f"encodes a {type(text).__name__}")
        return text if isinstance(text, Stretch) else text.encode("latin-1")

    def remember(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def recall(self, place: int) -> None:
        self.stack.append(self.memo[place])


_NUMBERS = frozenset({"b1", *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)), "f2", "f4", "f8"})


def _pair(pair: Any) -> tuple[Any, Any]:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise TypeError
    return pair[0], pair[1]


def _push(make: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        made = make(machine)  # First, because a mark changes which stack is on top.
        machine.stack.append(made)

    return step


def _make_tuple(machine: _Machine) -> tuple[Any, ...]:
    return tuple(machine.pop_mark())


def _make_dict(machine: _Machine) -> dict[Any, Any]:
    return machine.set_items({}, machine.pop_mark())


def _set_marked(machine: _Machine) -> None:
    items = machine.pop_mark()
    machine.set_items(machine.stack[-1], items)


def _name_in_lines(machine: _Machine) -> None:
    module, name = machine.short_line(), machine.short_line()
    machine.push_name(module.decode(), name.decode())


_STEPS: dict[int, Callable[[_Machine], None]] = {
    ord(opcode): step
    for opcode, step in {
        # Numbers and constants.
        "N": _push(lambda m: None),
        "\x88": _push(lambda m: True),
        "\x89": _push(lambda m: False),
        "I": _Machine.push_int_line,
        "L": _Machine.push_int_line,
        "J": _push(lambda m: m.number("<i")),
        "K": _push(lambda m: m.take(1)[0]),
        "M": _push(lambda m: m.number("<H")),
        "\x8a": _push(lambda m: int.from_bytes(m.take(m.take(1)[0]), "little", signed=True)),
        "F": _push(lambda m: float(m.short_line())),
        "G": _push(lambda m: struct.unpack(">d", m.take(8))[0]),
        # Text and bytes.
        "S": _Machine.push_quoted,
        "T": lambda m: m.push_text("<i", "python 2"),
        "U": lambda m: m.push_text("<B", "python 2"),
        "V": _Machine.push_unicode_line,
        "X": lambda m: m.push_text("<I", "utf-8"),
        "\x8c": lambda m: m.push_text("<B", "utf-8"),
        "\x8d": lambda m: m.push_text("<Q", "utf-8"),
        "B": lambda m: m.push_text("<I", "bytes"),
        "C": lambda m: m.push_text("<B", "bytes"),
        "\x8e": lambda m: m.push_text("<Q", "bytes"),
        "\x96": lambda m: m.push_text("<Q", "bytes"),
        # Containers.
        "(": _Machine.mark,
        "0": _Machine.pop,
        "1": _Machine.drop_mark,
        "2": lambda m: m.stack.append(m.stack[-1]),
        "]": _push(lambda m: []),
        "l": _push(lambda m: m.pop_mark()),
        "a": lambda m: m.append([m.stack.pop()]),
        "e": lambda m: m.append(m.pop_mark()),
        ")": _push(lambda m: ()),
        "t": _push(_make_tuple),
        "\x85": lambda m: m.collect(1),
        "\x86": lambda m: m.collect(2),
        "\x87": lambda m: m.collect(3),
        "}": _push(lambda m: {}),
        "d": _push(_make_dict),
        "s": _Machine.set_item,
        "u": _set_marked,
        # The memo.
        "p": lambda m: m.remember(int(m.short_line())),
        "q": lambda m: m.remember(m.take(1)[0]),
        "r": lambda m: m.remember(m.number("<I")),
        "\x94": lambda m: m.remember(len(m.memo)),
        "g": lambda m: m.recall(int(m.short_line())),
        "h": lambda m: m.recall(m.take(1)[0]),
        "j": lambda m: m.recall(m.number("<I")),
        # Names, and what would be calls.
        "c": _name_in_lines,
        "\x93": _Machine.push_stacked_name,
        "R": _Machine.reduce,
        "b": _Machine.build,
        # Framing.
        "\x80": lambda m: m.skip(1),
        "\x95": lambda m: m.skip(8),
    }.items()
}
