"""A digest of all that a call can reach: while it is the same, the call does the same as before.

Read are objects of any depth, functions with their code, the variables that they enclose and the globals that they
name, classes, and the settings of torch. Of torch, torchvision, numpy, the standard library and metawrap, which objects
stand under the names that are used is read, and not what these objects hold.
"""

from __future__ import annotations

import abc
import array
import builtins
import dis
import functools
import hashlib
import os
import pickle
import sys
import sysconfig
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

_PACKAGES = {"torch", "torchvision", "numpy", "metawrap", "higher", "pydantic"}
_STANDARD = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib"))
_CONTAINERS = (dict, list, set, frozenset, tuple)
_SCALARS = (int, float, complex, str, bytes)
# Through these modules, builtins and attributes, code can reach any object at all; its text does not tell which.
_REACHING_MODULES = {"sys", "inspect", "importlib", "gc", "ctypes", "logging", "decimal", "locale"}
_REACHING_BUILTINS = {"globals", "locals", "vars", "eval", "exec", "compile", "__import__"}
_REACHING_ATTRIBUTES = {"__subclasses__", "__globals__", "f_globals", "_getframe"}
_GLOBAL_LOADS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
_OF_EACH_CLASS = {"__dict__", "__weakref__", "__doc__", "_abc_impl", "__annotations__", "__module__", "__qualname__"}
_GLOBAL_HOOKS = [name for name in vars(module_hooks) if name.startswith("_global_") and name.endswith("hooks")]
_SMALLEST = torch.tensor(torch.finfo(torch.float32).tiny)
_POINTER = tuple.__itemsize__
_LARGEST = 1 << 20  # Bytes of a tensor or an array that is read by value.
_LONGEST = 1 << 24  # Bytes of everything.


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """content: the digest. kept: objects that stand in it by identity, which must not be freed before it is."""

    content: bytes
    kept: Sequence[Any]


def fingerprint(root: Any, free: Sequence[Tensor] = ()) -> Fingerprint | None:
    """What a call of `root` can reach, or None where something cannot be read or there is too much.

    Args:
        free: tensors whose values may change; only their shapes and the like are read.
    """
    digest = _Digest()
    reader = _Reader(digest, free)
    try:
        reader.dump((root, _settings(), *map(reader.identities, _WATCHED)))
    except Exception:  # Of a lock, a file, an object of a C library, code that imports at each call.
        return None
    return Fingerprint(digest.of.digest(), reader.kept)


class _Digest:
    def __init__(self) -> None:
        self.of, self.length = hashlib.blake2b(), 0

    def write(self, part: Any) -> None:
        self.length += len(memoryview(part).cast("B"))
        if self.length > _LONGEST:
            raise _UnreadError
        self.of.update(part)


def _settings() -> tuple[Any, ...]:
    return (
        *(torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        *(torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()),
        *(torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()),
        *(torch.is_anomaly_enabled(), torch.backends.mkldnn.enabled, torch.backends.mkldnn.deterministic),
        _SMALLEST / 2,  # 0 where numbers below the smallest normal one are flushed to 0.
        *(getattr(module_hooks, name) for name in _GLOBAL_HOOKS),
        *(dict(os.environ), os.getcwd(), np.geterr()),
    )


# Their functions are used by modules of torch, too.
_WATCHED: list[Any] = [torch, F, Tensor]


class _UnreadError(Exception):
    """Nothing can tell whether it changes."""


class _Reader(pickle.Pickler):
    """Writes by value what pickle writes by name or not at all; state that `__getstate__` leaves out is written too."""

    def __init__(self, file: Any, free: Sequence[Tensor]) -> None:
        super().__init__(file, protocol=5)
        self._free = {id(tensor): place for place, tensor in enumerate(free)}
        self._storages: dict[int, int] = {}
        self.kept: list[Any] = []

    def identities(self, owner: Any) -> bytes:
        """Which objects stand under the names of a class or module; modules are found later, and do not count."""
        values = [v for k, v in vars(owner).items() if k not in _OF_EACH_CLASS and not isinstance(v, types.ModuleType)]
        self.kept += values
        return array.array("Q", map(id, values)).tobytes()

    def reducer_override(self, obj: Any) -> Any:
        """How an object is written; called for all but exact containers, numbers and texts."""
        if isinstance(obj, Tensor):
            return self._tensor(obj)
        if isinstance(obj, type):
            return self._class(obj)
        if isinstance(obj, types.FunctionType):
            return NotImplemented if _is_fixed(obj) else _taken_apart("function", obj.__qualname__, self._function(obj))
        if type(obj) is types.ModuleType:
            return _taken_apart("module", obj.__name__, None if _is_library(obj.__name__) else _own_names(obj))
        if isinstance(obj, types.ModuleType | functools._lru_cache_wrapper):
            raise _UnreadError  # A module that is not one, such as torch.ops, and results that nobody can see.
        if isinstance(obj, np.ndarray) and obj.nbytes > _LARGEST:
            raise _UnreadError
        for kind, parts in _PARTS:
            if isinstance(obj, kind):
                return _taken_apart(kind.__name__, "", parts(obj))
        return self._object(obj)

    def _tensor(self, tensor: Tensor) -> Any:
        form = type(tensor), tuple(tensor.shape), tensor.stride(), str(tensor.dtype), str(tensor.device)
        place = self._free.get(id(tensor))
        if tensor.layout != torch.strided or tensor.is_inference() or tensor.grad_fn is not None:
            raise _UnreadError
        # Tensors on one storage change together.
        storage = self._storages.setdefault(tensor.untyped_storage().data_ptr(), len(self._storages))
        own = tensor.requires_grad, dict(vars(tensor)), storage, tensor.storage_offset()
        if place is not None:
            return _taken_apart("tensor", place, (form, own))
        if tensor.nbytes > _LARGEST or type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
            raise _UnreadError
        flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8)
        return _taken_apart("tensor", "", (form, own, flat.numpy().tobytes()))

    def _class(self, cls: type) -> Any:
        if cls.__module__ == "builtins":
            return NotImplemented
        if _is_fixed(cls):
            return _taken_apart("class of a library", f"{cls.__module__}.{cls.__qualname__}", self.identities(cls))
        if isinstance(cls, abc.ABCMeta) and abc._get_dump(cls)[0]:  # type: ignore[attr-defined]
            raise _UnreadError  # Other classes are registered as its own.
        own = [(name, value) for name, value in vars(cls).items() if name not in _OF_EACH_CLASS]
        notes = repr(vars(cls).get("__annotations__"))
        return _taken_apart("class", cls.__qualname__, (type(cls), cls.__bases__, own, notes))

    def _function(self, function: types.FunctionType) -> tuple[Any, ...]:
        code = function.__code__
        self.kept.append(code)
        names, used = _names(code)
        if used & _REACHING_ATTRIBUTES or not all(map(_is_library, _imports(code))):
            raise _UnreadError
        named = {}
        for name in sorted(names):
            value = function.__globals__.get(name, _MISSING)
            if value is _MISSING and name in _REACHING_BUILTINS:
                raise _UnreadError
            named[name] = vars(builtins).get(name) if value is _MISSING else value
        theirs = [(name, _used_of(value, used)) for name, value in named.items() if isinstance(value, types.ModuleType)]
        cells = [cell.cell_contents for cell in function.__closure__ or ()]  # An empty one raises.
        theirs += [("", _used_of(value, used)) for value in cells if isinstance(value, types.ModuleType)]
        return id(code), named, theirs, cells, function.__defaults__, function.__kwdefaults__, vars(function)

    def _object(self, obj: Any) -> Any:
        cls = type(obj)
        kinds = [base for base in cls.__mro__ if base in (*_CONTAINERS, *_SCALARS)]
        if not all(base is object or base in kinds or _is_python(base) for base in cls.__mro__):
            if not _is_library(cls.__module__):
                raise _UnreadError  # A class of the user's own on one of C: neither shows all of its state.
            return NotImplemented  # An object of C, which says itself how it is written, or that it cannot be.
        items = [_items(kind, obj) for kind in kinds]
        own = object.__getattribute__(obj, "__dict__") if hasattr(obj, "__dict__") else None
        if own and _is_fixed(cls):  # What follows from other attributes may have been asked for or not.
            own = {name: value for name, value in own.items() if not _is_cached(cls, name)}
        return _taken_apart("object", "", (cls, own, list(_slots(obj)), items))


_MISSING = object()
_PARTS: list[tuple[type, Callable[[Any], Any]]] = [
    (types.MethodType, lambda method: (method.__func__, method.__self__)),
    (property, lambda own: (own.fget, own.fset, own.fdel)),
    (staticmethod, lambda own: own.__wrapped__),
    (classmethod, lambda own: own.__wrapped__),
    (functools.cached_property, lambda own: own.func),  # Its lock cannot be read.
    (types.MappingProxyType, dict),
    (weakref.ref, lambda reference: reference()),
    (types.MemberDescriptorType, lambda slot: slot.__qualname__),
    (types.GetSetDescriptorType, lambda slot: slot.__qualname__),
]


def _taken_apart(kind: str, name: Any, parts: Any) -> Any:
    # The parts as state: pickle has noted the object before it writes them, so they may lead back to it.
    return object, (kind, name), (parts,)


def _is_library(name: str) -> bool:
    """Whether a module belongs to a library whose objects count as fixed; raises for a reaching one."""
    top = name.partition(".")[0]
    if top in _REACHING_MODULES:
        raise _UnreadError
    return top in _PACKAGES or (top in sys.stdlib_module_names and _is_standard(top))


def _is_standard(top: str) -> bool:
    # A module of the user's own may have the name of one of the standard library.
    source = getattr(sys.modules.get(top), "__file__", None)
    return source is None or source.startswith(_STANDARD)


def _is_fixed(obj: Any) -> bool:
    """Whether a class or function of a library can be found under its name."""
    if not _is_library(str(obj.__module__)):
        return False
    found: Any = sys.modules.get(obj.__module__)
    for part in obj.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is obj


def _used_of(module: types.ModuleType, used: frozenset[str], depth: int = 4) -> dict[str, Any] | None:
    """What a library holds now under the names that a function uses: a user may have put other objects there."""
    if not _is_library(module.__name__) or not depth:
        return None
    found = {name: value for name, value in vars(module).items() if name in used}
    return {n: _used_of(v, used, depth - 1) if type(v) is types.ModuleType else v for n, v in found.items()}


def _items(kind: Any, obj: Any) -> Any:
    """What an object holds as a container, or is as a number or text, past methods of a class of the user's own."""
    if kind in _SCALARS:
        return kind.__repr__(obj)
    return list(kind.items(obj)) if kind is dict else list(kind.__iter__(obj))


def _slots(obj: Any) -> Iterator[tuple[str, Any]]:
    for base in type(obj).__mro__:
        for name, slot in vars(base).items():
            if isinstance(slot, types.MemberDescriptorType) and base.__module__ != "builtins":
                try:
                    yield name, slot.__get__(obj)
                except AttributeError:  # Nothing was put there yet.
                    yield name, None


def _is_python(cls: type) -> bool:
    """Whether a class adds attributes and slots to its base, and nothing else, as a class statement does."""
    own = vars(cls)
    declared = own.get("__slots__", ())
    slots = len({declared} if isinstance(declared, str) else set(declared) - _OF_EACH_CLASS)
    room = slots + ("__dict__" in own) + ("__weakref__" in own)
    return cls.__base__ is not None and cls.__basicsize__ - cls.__base__.__basicsize__ <= room * _POINTER


def _is_cached(cls: type, name: str) -> bool:
    return isinstance(getattr(cls, name, None), functools.cached_property)


def _own_names(module: types.ModuleType) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if not name.startswith("__")}


def _within(code: types.CodeType) -> Iterable[types.CodeType]:
    return (inner for inner in code.co_consts if isinstance(inner, types.CodeType))


@functools.cache
def _names(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Two sets of names in a function and the functions within it: globals that they load, and all names."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname.startswith(_GLOBAL_LOADS)}
    inner = [_names(each) for each in _within(code)]
    return frozenset(names.union(*(n for n, _ in inner))), frozenset(code.co_names).union(*(u for _, u in inner))


@functools.cache
def _imports(code: types.CodeType) -> frozenset[str]:
    """What a function imports; "." for something next to its own module."""
    steps = list(dis.get_instructions(code))
    own = {
        "." if steps[place - 2].argval else step.argval  # Two steps before stands how many folders up.
        for place, step in enumerate(steps)
        if step.opname == "IMPORT_NAME"
    }
    return frozenset(own.union(*map(_imports, _within(code))))
