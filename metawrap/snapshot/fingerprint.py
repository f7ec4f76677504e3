"""All that a call can reach, as bytes: while they are equal, the call does the same as before.

Read are objects of any depth, functions with their code, the variables that they enclose and the globals that they
name, classes, and the settings of torch. torch, torchvision, numpy, the standard library and metawrap count as fixed.
"""

from __future__ import annotations

import builtins
import dis
import functools
import io
import os
import pickle
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from metawrap.surgery.copying import slot_names

_LIBRARIES = sys.stdlib_module_names | {"torch", "torchvision", "numpy", "metawrap", "higher", "pydantic"}
_CONTAINERS = (dict, list, set, frozenset, tuple)
_SCALARS = (int, float, complex, str, bytes)
# They reach what no reader of the code can tell.
_UNKNOWN = {"globals", "locals", "vars", "eval", "exec", "compile", "__import__"}
_LOADS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
_OF_EACH_CLASS = {"__dict__", "__weakref__", "__doc__", "_abc_impl", "__annotations__", "__module__", "__qualname__"}
_GLOBAL_HOOKS = [name for name in vars(module_hooks) if name.startswith("_global_") and name.endswith("hooks")]
_SMALLEST = torch.tensor(torch.finfo(torch.float32).tiny)
_POINTER = tuple.__itemsize__
_LARGEST = 1 << 20  # Bytes of a tensor that is read by value.


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """content: of everything. kept: objects that stand in it by identity, which must not be freed before it is."""

    content: bytes
    kept: Sequence[Any]


def fingerprint(root: Any, free: Sequence[Tensor] = ()) -> Fingerprint | None:
    """What a call of `root` can reach, or None where something cannot be read.

    Args:
        free: tensors whose values may change; only their shapes and the like are read.
    """
    file = io.BytesIO()
    reader = _Reader(file, free)
    try:
        reader.dump((root, _settings()))
    except Exception:  # Of a lock, a file, an object of a C library, code that imports at each call.
        return None
    return Fingerprint(file.getvalue(), reader.kept)


def _settings() -> tuple[Any, ...]:
    return (
        *(torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        *(torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()),
        *(torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()),
        *(torch.is_anomaly_enabled(), torch.backends.mkldnn.enabled, torch.backends.mkldnn.deterministic),
        _SMALLEST / 2,  # 0 where numbers below the smallest normal one are flushed to 0.
        *(getattr(module_hooks, name) for name in _GLOBAL_HOOKS),
        *(dict(os.environ), os.getcwd()),
    )


class _UnreadError(Exception):
    """Nothing can tell whether it changes."""


class _Read:
    """Stands in the bytes for what was taken apart; nothing reads them back."""


class _Reader(pickle.Pickler):
    """Writes by value what pickle writes by name or not at all; state that `__getstate__` leaves out is written too."""

    def __init__(self, file: io.BytesIO, free: Sequence[Tensor]) -> None:
        super().__init__(file, protocol=5)
        self._free = {id(tensor): place for place, tensor in enumerate(free)}
        self.kept: list[Any] = []

    def reducer_override(self, obj: Any) -> Any:
        """How an object is written; called for all but exact containers, numbers and texts."""
        if isinstance(obj, Tensor):
            return self._tensor(obj)
        if isinstance(obj, type):
            return NotImplemented if _is_fixed(obj) else _taken_apart("class", obj.__qualname__, tuple(_class(obj)))
        if isinstance(obj, types.FunctionType):
            return NotImplemented if _is_fixed(obj) else _taken_apart("function", obj.__qualname__, self._function(obj))
        if isinstance(obj, types.ModuleType):
            known = obj.__name__.partition(".")[0] in _LIBRARIES
            return _taken_apart("module", obj.__name__, None if known else _without_dunders(vars(obj)))
        for kind, parts in _PARTS:
            if isinstance(obj, kind):
                return _taken_apart(kind.__name__, "", parts(obj))
        return self._object(obj)

    def _tensor(self, tensor: Tensor) -> Any:
        form = type(tensor), tuple(tensor.shape), tensor.stride(), str(tensor.dtype), str(tensor.device)
        own = tensor.requires_grad, dict(vars(tensor))
        place = self._free.get(id(tensor))
        if tensor.layout != torch.strided or tensor.is_inference() or tensor.grad_fn is not None:
            raise _UnreadError
        if place is not None:
            return _taken_apart("tensor", place, (form, own))
        if tensor.nbytes > _LARGEST or type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
            raise _UnreadError
        flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8)
        return _taken_apart("tensor", "", (form, own, flat.numpy().tobytes()))

    def _function(self, function: types.FunctionType) -> tuple[Any, ...]:
        code = function.__code__
        self.kept.append(code)
        for name in _imports(code):
            if name.partition(".")[0] not in _LIBRARIES:
                raise _UnreadError
        named = {}
        for name in sorted(_names(code)):
            value = function.__globals__.get(name, _SEEN_NOWHERE)
            if value is _SEEN_NOWHERE and name in _UNKNOWN:
                raise _UnreadError
            named[name] = vars(builtins).get(name) if value is _SEEN_NOWHERE else value
        cells = [cell.cell_contents for cell in function.__closure__ or ()]  # An empty one raises.
        return id(code), named, cells, function.__defaults__, function.__kwdefaults__, vars(function)

    def _object(self, obj: Any) -> Any:
        cls = type(obj)
        if not all(base in (object, *_CONTAINERS, *_SCALARS) or _is_python(base) for base in cls.__mro__):
            return NotImplemented  # An object of C, which says itself how it is written, or that it cannot be.
        slots = [(name, getattr(obj, name, None)) for name in slot_names(obj) if name not in _OF_EACH_CLASS]
        items: Any = None
        if isinstance(obj, _CONTAINERS):
            items = list(dict.items(obj)) if isinstance(obj, dict) else list(obj)
        elif isinstance(obj, _SCALARS):
            items = repr(obj)
        own = object.__getattribute__(obj, "__dict__") if hasattr(obj, "__dict__") else None
        if own and _is_fixed(cls):  # What follows from other attributes may have been asked for or not.
            own = {name: value for name, value in own.items() if not _is_cached(cls, name)}
        return _taken_apart("object", "", (cls, own, slots, items))


_SEEN_NOWHERE = object()
_PARTS: list[tuple[type, Callable[[Any], Any]]] = [
    (types.MethodType, lambda method: (method.__func__, method.__self__)),
    (property, lambda own: (own.fget, own.fset, own.fdel)),
    (staticmethod, lambda own: own.__wrapped__),
    (classmethod, lambda own: own.__wrapped__),
    (functools._lru_cache_wrapper, lambda own: (own.__wrapped__, vars(own))),
    (functools.cached_property, lambda own: own.func),  # Its lock cannot be read.
    (types.MappingProxyType, dict),
    (weakref.ref, lambda reference: reference()),
    (types.MemberDescriptorType, lambda slot: slot.__qualname__),
    (types.GetSetDescriptorType, lambda slot: slot.__qualname__),
]


def _taken_apart(kind: str, name: Any, parts: Any) -> Any:
    # The parts as state: pickle has noted the object before it writes them, so they may lead back to it.
    return _Read, (kind, name), (parts,)


def _is_fixed(obj: Any) -> bool:
    """Whether a class or function of a library can be found under its name."""
    if str(obj.__module__).partition(".")[0] not in _LIBRARIES:
        return False
    found: Any = sys.modules.get(obj.__module__)
    for part in obj.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is obj


def _is_python(cls: type) -> bool:
    """Whether objects of a class have, beyond those of its base, no state but attributes and slots."""
    own = vars(cls)
    declared = own.get("__slots__", ())
    slots = len({declared} if isinstance(declared, str) else set(declared) - _OF_EACH_CLASS)
    room = slots + ("__dict__" in own) + ("__weakref__" in own)
    return cls.__base__ is not None and cls.__basicsize__ - cls.__base__.__basicsize__ <= room * _POINTER


def _is_cached(cls: type, name: str) -> bool:
    return isinstance(getattr(cls, name, None), functools.cached_property)


def _class(cls: type) -> Iterator[Any]:
    yield type(cls), cls.__bases__
    for name, value in vars(cls).items():
        if name not in _OF_EACH_CLASS:
            yield name, value


def _without_dunders(names: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in names.items() if not name.startswith("__")}


@functools.cache
def _names(code: types.CodeType) -> frozenset[str]:
    """The globals that a function and those within it name."""
    own = {step.argval for step in dis.get_instructions(code) if step.opname.startswith(_LOADS)}
    return frozenset(own.union(*(_names(inner) for inner in code.co_consts if isinstance(inner, types.CodeType))))


@functools.cache
def _imports(code: types.CodeType) -> frozenset[str]:
    own = {step.argval for step in dis.get_instructions(code) if step.opname == "IMPORT_NAME"}
    return frozenset(own.union(*(_imports(inner) for inner in code.co_consts if isinstance(inner, types.CodeType))))
