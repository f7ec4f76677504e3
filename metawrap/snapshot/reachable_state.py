"""All state that a call of a model or a loss can reach, read by value: what one task may leave behind for the next.

Read are attributes, buffers, random generators, the user's own objects, variables that functions enclose, class
attributes, and the globals that code names. A value that cannot be read is reported as such.
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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metawrap.snapshot.generators import Generators
from metawrap.surgery.copying import enclosed, slot_names

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
_RANDOM = "random numbers"
RANDOM_NUMBERS = "it draws random numbers, which come in the order of the tasks"


@dataclass
class ReachableState:
    """values: by name. unread: the first name whose value cannot be read, or None.

    outside: some of it lies in a class, a module or a function, which a deep copy of the parts shares with them.
    """

    values: dict[str, Any]
    unread: str | None = None
    outside: bool = False


def state_of(parts: Iterable[Any]) -> ReachableState:
    """Everything that a call of the parts could change; tensors count by identity and version."""
    reader, state = _Reader(), ReachableState({_RANDOM: Generators()})
    for part in parts:
        for path, owner in part.named_modules() if isinstance(part, nn.Module) else [("the loss", part)]:
            for local, value in _held(owner):
                name = f"{path}.{local}" if path else local
                state.values[name] = reader.read(value)
                state.outside |= reader.has_shared or local.startswith(("class ", "the global "))
                if reader.has_unread and state.unread is None:
                    state.unread = name
    return state


def difference(before: ReachableState, after: ReachableState) -> str | None:
    """The first difference between two states in words, or None."""
    for name in [*after.values, *before.values]:
        if before.values.get(name) != after.values.get(name):
            if name == _RANDOM:
                return RANDOM_NUMBERS
            return f"forward changes '{name}'"
    return None if after.unread is None else f"nothing can tell whether forward changes '{after.unread}'"


def _held(owner: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(owner, nn.Module):
        for name, value in owner.__dict__.items():
            # A recurrent module caches its weights; the engine renews the cache after each call.
            if name not in _TABLES and not (isinstance(owner, nn.RNNBase) and name.startswith("_flat_weight")):
                yield name, value
        yield from owner._buffers.items()
        yield from owner._parameters.items()
    else:
        yield "state", owner
    for cls in type(owner).__mro__:
        if cls.__module__.split(".")[0] not in ("builtins", "functools", "torch", "metawrap", "abc"):
            for name, value in vars(cls).items():
                if isinstance(value, types.FunctionType):
                    yield from _globals_of(value)
                elif not name.startswith("__"):
                    yield f"class {cls.__name__}.{name}", value


def _globals_of(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The globals that a function names, except classes, modules and functions."""
    for name in _global_names(function.__code__):
        value = function.__globals__.get(name)
        if name in function.__globals__ and not isinstance(value, (*_FIXED, types.FunctionType)):
            yield f"the global {name}", value


@functools.cache
def _global_names(code: types.CodeType) -> frozenset[str]:
    return frozenset(step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL")


class _Reader:
    """Reads values into plain tuples that can be compared; each object once.

    has_unread: whether a value could not be read, and only its identity counts. has_shared: whether a function holds a
    value, or a context variable does.
    """

    def __init__(self) -> None:
        # The values are kept, too: a new object could otherwise get the id of one that was freed.
        self._seen: dict[int, tuple[int, Any]] = {}
        self.has_unread = self.has_shared = False

    def read(self, value: Any, depth: int = _DEPTH) -> Any:
        if isinstance(value, _SIMPLE):
            return repr(value) if isinstance(value, float | complex | np.generic) else value
        if isinstance(value, _FIXED):
            return id(value)
        if id(value) in self._seen:
            return "again", self._seen[id(value)][0]
        self._seen[id(value)] = len(self._seen), value
        return self._read(value, depth - 1) if depth else id(value)

    def _read(self, value: Any, depth: int) -> Any:
        def read(part: Any) -> Any:
            return self.read(part, depth)

        if isinstance(value, Tensor):
            return id(value), None if value.is_inference() else value._version
        if isinstance(value, np.ndarray):
            return value.shape, str(value.dtype), value.tobytes() if value.dtype != object else read(value.tolist())
        if isinstance(value, np.random.Generator | np.random.RandomState | random.Random | torch.Generator):
            return Generators(held=[value], shared=False)
        if isinstance(value, dict | types.MappingProxyType):
            return tuple((read(key), read(item)) for key, item in value.items())
        if isinstance(value, list | tuple | deque):
            return tuple(map(read, value))
        if isinstance(value, set | frozenset):
            return frozenset(repr(item) for item in value)
        if isinstance(value, types.FunctionType):
            named = [item for _, item in _globals_of(value)]
            defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
            self.has_shared |= bool(enclosed(value) or named) or not all(isinstance(d, _SIMPLE) for d in defaults)
            return id(value), read(enclosed(value)), read(value.__defaults__), read(value.__kwdefaults__), read(named)
        if isinstance(value, types.MethodType):
            return id(value.__func__), read(value.__self__)
        if isinstance(value, contextvars.ContextVar):
            self.has_shared = True
            return read(value.get(None))
        if isinstance(value, functools.partial):
            return read(value.func), read(value.args), read(value.keywords)
        slots = slot_names(value)
        if hasattr(value, "__dict__") or slots:
            own = dict(getattr(value, "__dict__", {})) | {n: getattr(value, n, None) for n in slots if n != "__dict__"}
            own.pop("__weakref__", None)
            if own or type(value).__module__.split(".")[0] != "builtins":
                return tuple((name, read(item)) for name, item in own.items())
        self.has_unread = True
        return id(value)
