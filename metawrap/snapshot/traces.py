"""What solving a task leaves behind besides its result: what the next task, or the user, might read.

All that the model and the loss hold is read, by value where a value can be read: attributes, buffers, generators of
random numbers, the user's own objects, what functions enclose, class attributes, and the globals that code names.
"""

from __future__ import annotations

import contextvars
import dis
import enum
import functools
import random
import re
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

State = dict[str, Any]
_TABLES = ("_parameters", "_buffers", "_modules")
_SIMPLE: tuple[type, ...] = (
    *(type(None), bool, int, float, complex, str, bytes, Decimal, Fraction, PurePath, range, slice, enum.Enum),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, re.Pattern, np.generic, np.dtype),
)
_FIXED: tuple[type, ...] = (
    *(type, types.ModuleType, types.BuiltinFunctionType, property, weakref.ref, torch.finfo, torch.iinfo),
    *(staticmethod, classmethod, types.MethodDescriptorType, types.GetSetDescriptorType, types.WrapperDescriptorType),
    types.MethodWrapperType,
)
_DEPTH = 8


class Traces:
    """`with Traces([model, loss_fn]) as traces: ...`; then `traces.found` says what has changed, or None."""

    def __init__(self, parts: Iterable[Any]) -> None:
        self._parts = list(parts)
        self.found: str | None = None

    def __enter__(self) -> Traces:
        self._before = state_of(self._parts)
        return self

    def __exit__(self, *error: Any) -> None:
        self.found = difference(self._before, state_of(self._parts))


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """What differs between two states, in words, or None."""
    for name in [*after, *before]:
        if before.get(name) != after.get(name):
            if name.startswith(_RANDOM):
                return "it draws random numbers, which come in the order of the tasks"
            return f"forward changes '{name}'"
    unread = next((name for name, value in after.items() if _has_unread(value)), None)
    return None if unread is None else f"nothing can tell whether forward changes '{unread}'"


def state_of(parts: Iterable[Any]) -> State:
    """All that a call of the parts could change, but for their parameters' values, by name."""
    reader = _Reader()
    state = dict(_generators())
    for part in parts:
        for path, owner in part.named_modules() if isinstance(part, nn.Module) else [("the loss", part)]:
            for name, value in _held(owner):
                state[f"{path}.{name}" if path else name] = reader.read(value)
    return state


_RANDOM = "random numbers of "


class Generators:
    """The states of the three generators that everybody shares, and of a GPU's."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.states = torch.get_rng_state(), np.random.get_state(legacy=True), random.getstate()
        self._device = device if device is not None and device.type == "cuda" else None
        self._on_device = None if self._device is None else torch.cuda.get_rng_state(self._device)

    def put_back(self) -> None:
        """Sets them to these states again."""
        torch.set_rng_state(self.states[0])
        np.random.set_state(self.states[1])
        random.setstate(self.states[2])
        if self._device is not None and self._on_device is not None:
            torch.cuda.set_rng_state(self._on_device, self._device)


def _generators() -> Iterator[tuple[str, Any]]:
    ours, numpys, pythons = Generators().states
    _, numbers, place, *_ = numpys
    yield f"{_RANDOM}torch", ours.numpy().tobytes()
    yield f"{_RANDOM}numpy", (numbers.tobytes(), place)  # type: ignore[union-attr]
    yield f"{_RANDOM}python", pythons


def _held(owner: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(owner, nn.Module):
        for name, value in owner.__dict__.items():
            # A recurrent module caches its weights; the engine puts the cache right after each call.
            if name not in _TABLES and not (isinstance(owner, nn.RNNBase) and name.startswith("_flat_weight")):
                yield name, value
        yield from owner._buffers.items()
        yield from owner._parameters.items()
    else:
        yield "state", owner
    for cls in type(owner).__mro__:
        if cls.__module__.split(".")[0] not in ("builtins", "torch", "metawrap", "abc"):
            for name, value in vars(cls).items():
                if isinstance(value, types.FunctionType):
                    yield from _globals_of(value)
                elif not name.startswith("__"):
                    yield f"class {cls.__name__}.{name}", value


def _globals_of(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The globals that a function names, but for what is code."""
    for name in _global_names(function.__code__):
        value = function.__globals__.get(name)
        if not isinstance(value, (*_FIXED, types.FunctionType)):
            yield f"the global {name}", value


@functools.cache
def _global_names(code: types.CodeType) -> frozenset[str]:
    return frozenset(step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL")


class _Unread:
    """In the place of what has no value that could be read."""

    def __init__(self, value: Any) -> None:
        self._id = id(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Unread) and other._id == self._id

    __hash__ = None  # type: ignore[assignment]


def _has_unread(value: Any) -> bool:
    return isinstance(value, _Unread) or (isinstance(value, tuple) and any(map(_has_unread, value)))


class _Reader:
    """Reads values into plain tuples that can be compared; each object once."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}

    def read(self, value: Any, depth: int = _DEPTH) -> Any:
        if isinstance(value, _SIMPLE):
            return repr(value) if isinstance(value, float | complex | np.generic) else value
        if isinstance(value, _FIXED):
            return id(value)
        if id(value) in self._seen:
            return "again", self._seen[id(value)]
        self._seen[id(value)] = len(self._seen)
        return self._read(value, depth - 1) if depth else id(value)

    def _read(self, value: Any, depth: int) -> Any:
        def read(part: Any) -> Any:
            return self.read(part, depth)

        if isinstance(value, Tensor):
            return id(value), None if value.is_inference() else value._version
        if isinstance(value, np.ndarray):
            return value.shape, str(value.dtype), value.tobytes() if value.dtype != object else read(value.tolist())
        if isinstance(value, np.random.Generator):
            return read(value.bit_generator.state)
        if isinstance(value, np.random.RandomState):
            return read(value.get_state(legacy=True))
        if isinstance(value, random.Random):
            return value.getstate()
        if isinstance(value, torch.Generator):
            return value.get_state().numpy().tobytes()
        if isinstance(value, dict | types.MappingProxyType):
            return tuple((read(key), read(item)) for key, item in value.items())
        if isinstance(value, list | tuple | deque):
            return tuple(map(read, value))
        if isinstance(value, set | frozenset):
            return frozenset(repr(item) for item in value)
        if isinstance(value, types.FunctionType):
            inside = [_content(cell) for cell in value.__closure__ or ()]
            named = [item for _, item in _globals_of(value)]
            return id(value), read(inside), read(value.__defaults__), read(value.__kwdefaults__), read(named)
        if isinstance(value, types.MethodType):
            return id(value.__func__), read(value.__self__)
        if isinstance(value, contextvars.ContextVar):
            return read(value.get(None))
        if isinstance(value, functools.partial):
            return read(value.func), read(value.args), read(value.keywords)
        slots = [name for cls in type(value).__mro__ for name in _names(vars(cls).get("__slots__", ()))]
        if hasattr(value, "__dict__") or slots:
            own = dict(getattr(value, "__dict__", {})) | {n: getattr(value, n, None) for n in slots if n != "__dict__"}
            own.pop("__weakref__", None)
            if own or type(value).__module__.split(".")[0] != "builtins":
                return tuple((name, read(item)) for name, item in own.items())
        return _Unread(value)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # A variable that was not assigned yet.
        return None


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)
