"""Deep copies of a module in which nothing points at the original."""

from __future__ import annotations

import copy
import functools
import operator
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from metawrap.errors import UnsupportedModuleError

_CONTAINERS = (dict, OrderedDict, defaultdict, Counter, list, set, deque)
_TABLES = ("_modules", "_parameters", "_buffers")
_PLAIN = (bool, int, float, str, type(None))
_WRAPPERS: tuple[type, ...] = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def duplicate(model: nn.Module) -> nn.Module:
    """A deep copy that also copies four things that `copy.deepcopy` does not.

    Computed tensors in plain attributes (legacy weight_norm leaves one), which deepcopy refuses: without their graph.
    Values in `__slots__`. Functions that enclose a part of the model: a closure on a module would go on calling the
    original. And the classes that torch makes for parametrized modules, one for each module.
    """
    memo: dict[int, Any] = {}
    spare_cached_results(model, memo)
    copied = copy.deepcopy(model, memo)
    _copy_slots(model, memo)
    rebind_functions(copied, memo)
    for module in copied.modules():
        give_own_class(module)
    return copied


def give_own_class(module: nn.Module) -> None:
    """Gives a parametrized module a class that no other module has; any other module keeps the user's."""
    if parametrize.is_parametrized(module):
        # remove_parametrizations deletes the parameter's property from the class, for all modules that share it.
        cls: Any = type(module)
        module.__class__ = type(cls)(cls.__name__, cls.__bases__, dict(vars(cls)))


def spare_cached_results(model: nn.Module, memo: dict[int, Any]) -> None:
    """Enters copies of the computed tensors in plain attributes into the memo of a `copy.deepcopy`."""
    for module in model.modules():
        for attribute, value in module.__dict__.items():
            if attribute not in _TABLES and not _is_plain(value):
                for tensor in held_tensors(value):
                    if not tensor.is_leaf:
                        memo[id(tensor)] = tensor.detach().clone()


def _is_plain(value: Any) -> bool:
    return type(value) in _PLAIN or (type(value) in _CONTAINERS and not value)


def held_tensors(value: Any, depth: int = 3) -> Iterator[Tensor]:
    """Every tensor in nested plain containers and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value) and not isinstance(value, type) and depth:
        for part in fields(value):
            yield from held_tensors(getattr(value, part.name, None), depth - 1)
    elif isinstance(value, dict | list | tuple | set) and depth:
        for item in value.values() if isinstance(value, dict) else value:
            yield from held_tensors(item, depth - 1)


def containers_in(values: Iterable[Any]) -> Iterator[Any]:
    """The plain containers among the values, and those in them."""
    seen: set[int] = set()
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if type(value) in _CONTAINERS and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value
            yield value


def rebind_functions(copied: nn.Module, memo: dict[int, Any]) -> None:
    """Makes functions and hooks on a copy's modules, also in containers and partials, enclose the copy's parts."""
    for module in copied.modules():
        for name, value in list(module.__dict__.items()):
            if name not in _TABLES and not _is_plain(value):
                module.__dict__[name] = _translated(value, memo)


def free_hooks(root: nn.Module) -> Iterator[Any]:
    """The hooks of modules, and the objects that they are methods of, that hold no part of the root."""
    parts = {id(part): object() for part in [*root.modules(), *root.parameters(), *root.buffers()]}
    for module in root.modules():
        for table, hooks in module.__dict__.items():
            for hook in hooks.values() if table.endswith("_hooks") and isinstance(hooks, dict) else ():
                if _translated(hook, dict(parts)) is hook:
                    yield from (hook, *([hook.__self__] if isinstance(hook, types.MethodType) else []))


def copy_model(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """Copies the user's module without its wrappers (`DataParallel`, `DistributedDataParallel`, `torch.compile`).

    Returns:
        The copy, and a note for each wrapper that was taken off.
    Raises:
        UnsupportedModuleError: the module cannot be copied.
    """
    notes: list[str] = []
    model = _unwrapped(model, _place(""), notes)
    compiled = [name for name, module in model.named_modules() if module.__dict__.get("_compiled_call_impl")]
    notes += [f"{_place(name)} was taken out of its compile()" for name in compiled]
    try:
        copied = duplicate(model)
    except Exception as error:
        raise UnsupportedModuleError(
            f"{type(model).__name__} cannot be copied: {error}. metawrap works on a copy of the model; make "
            "copy.deepcopy(model) work, for instance by not keeping files, locks or generators on it."
        ) from error
    for original, parameter in zip(model.parameters(), copied.parameters(), strict=True):
        # deepcopy leaves the hooks of a tensor behind.
        for hook in (original._backward_hooks or {}).values():
            parameter.register_hook(hook)  # type: ignore[no-untyped-call]
    for name, module in copied.named_modules():
        module.__dict__.pop("_compiled_call_impl", None)
        for child_name, child in list(module._modules.items()):
            if child is not None:
                path = f"{name}.{child_name}" if name else child_name
                module._modules[child_name] = _unwrapped(child, _place(path), notes)
    return copied, notes


def _place(name: str) -> str:
    return f"'{name}'" if name else "the model"


def _copy_slots(model: nn.Module, memo: dict[int, Any]) -> None:
    for module in model.modules():
        names = slot_names(module)
        twin = memo.get(id(module))
        for name in names:
            if twin is not None and hasattr(module, name) and not hasattr(twin, name):
                setattr(twin, name, copy.deepcopy(getattr(module, name), memo))


def slot_names(value: Any) -> list[str]:
    """The names in the `__slots__` of an object's classes."""
    slots = [vars(cls).get("__slots__", ()) for cls in type(value).__mro__]
    return [name for names in slots for name in ((names,) if isinstance(names, str) else names)]


def enclosed(function: Any) -> list[Any]:
    """The values that a function encloses, by variable; None for a variable that was not assigned yet."""
    cells = getattr(function, "__closure__", None) or ()
    return [None if cell == types.CellType() else cell.cell_contents for cell in cells]


def _unwrapped(model: nn.Module, where: str, notes: list[str]) -> nn.Module:
    while True:
        inner = dict(model.named_children()).get("_orig_mod") or (
            model.module if isinstance(model, _WRAPPERS) else None
        )
        if not isinstance(inner, nn.Module):
            return model
        notes.append(f"{where} was taken out of its {type(model).__name__}")
        model = inner


def _translated(value: Any, memo: dict[int, Any], depth: int = 4) -> Any:
    """The value with every original in it replaced by its copy; the value itself if it holds none."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, nn.Module | Tensor | list | dict | set) and id(value) in memo:
        return memo[id(value)]
    if isinstance(value, types.MethodType) and id(value.__self__) in memo:
        return types.MethodType(value.__func__, memo[id(value.__self__)])
    if not depth:
        return value
    if isinstance(value, types.FunctionType):
        return _rebound(value, memo, depth - 1)
    if isinstance(value, dict):
        items = {key: _translated(item, memo, depth - 1) for key, item in value.items()}
        if all(items[key] is item for key, item in value.items()):
            return value
        changed = copy.copy(value)
        changed.update(items)
        return changed
    if type(value) in (list, tuple, set):
        parts = [_translated(item, memo, depth - 1) for item in value]
        return value if all(map(operator.is_, parts, value)) else type(value)(parts)
    if type(value) is functools.partial:
        whole = (value.func, value.args, value.keywords)
        function, arguments, keywords = (_translated(part, memo, depth - 1) for part in whole)
        same = function is value.func and arguments is value.args and keywords is value.keywords
        return value if same else functools.partial(function, *arguments, **keywords)
    if isinstance(value, type | types.ModuleType | nn.Module) or not hasattr(value, "__dict__"):
        return value
    if id(value) in memo:
        return memo[id(value)]
    # An object of the user's own that holds a module; deepcopy misses one that only a closure holds.
    held = {name: _translated(item, memo, depth - 1) for name, item in vars(value).items()}
    if all(held[name] is item for name, item in vars(value).items()):
        return value
    memo[id(value)] = changed = copy.copy(value)
    changed.__dict__.update(held)
    return changed


def _rebound(function: types.FunctionType, memo: dict[int, Any], depth: int) -> types.FunctionType:
    """The function with every enclosed original replaced by its copy; the function itself if it encloses none."""
    cells = function.__closure__ or ()
    defaults = function.__defaults__ or ()
    keywords = function.__kwdefaults__ or {}
    before = [*enclosed(function), *defaults, *keywords.values()]
    after = [_translated(value, memo, depth) for value in before]
    if all(map(operator.is_, after, before)):
        return function
    values = zip(cells, after, strict=False)
    new_cells = tuple(cell if cell == types.CellType() else types.CellType(value) for cell, value in values)
    new_defaults = tuple(after[len(cells) : len(cells) + len(defaults)]) or None
    rebuilt = types.FunctionType(function.__code__, function.__globals__, function.__name__, new_defaults, new_cells)
    rebuilt.__kwdefaults__ = dict(zip(keywords, after[len(cells) + len(defaults) :], strict=True)) or None
    rebuilt.__dict__.update(function.__dict__)
    return rebuilt
