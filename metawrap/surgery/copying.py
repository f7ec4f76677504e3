"""A faithful copy of a module: nothing in it may still point at the original."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from metawrap.errors import UnsupportedModuleError

_WRAPPERS: tuple[type, ...] = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def duplicate(model: nn.Module) -> nn.Module:
    """A deep copy, in two points deeper than `copy.deepcopy`.

    Computed tensors kept as plain attributes (legacy weight_norm leaves one), which deepcopy refuses, are copied
    without their graph. Functions, which deepcopy keeps as they are, are rebuilt over the copy where they enclose a
    part of the model: a closure or lambda on a module would go on calling the original.
    """
    memo: dict[int, Any] = {}
    spare_cached_results(model, memo)
    copied = copy.deepcopy(model, memo)
    rebind_functions(copied, memo)
    return copied


def spare_cached_results(model: nn.Module, memo: dict[int, Any]) -> None:
    """Tells a `copy.deepcopy` with this memo how to copy computed tensors that are kept as plain attributes."""
    for module in model.modules():
        for attribute, value in module.__dict__.items():
            if attribute not in ("_modules", "_parameters", "_buffers"):
                for tensor in held_tensors(value):
                    if not tensor.is_leaf:
                        memo[id(tensor)] = tensor.detach().clone()


def held_tensors(value: Any, depth: int = 3) -> Iterator[Tensor]:
    """Every tensor in nested plain containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple | set) and depth:
        for item in value.values() if isinstance(value, dict) else value:
            yield from held_tensors(item, depth - 1)


def rebind_functions(copied: nn.Module, memo: dict[int, Any]) -> None:
    """Rebuilds the functions and hooks on a copy's modules over the copy, where they enclose parts of the original."""
    for module in copied.modules():
        for name, value in list(module.__dict__.items()):
            if isinstance(value, types.FunctionType):
                module.__dict__[name] = _rebound(value, memo)
            elif name.endswith("_hooks") and isinstance(value, dict):
                for key, hook in value.items():
                    if isinstance(hook, types.FunctionType):
                        value[key] = _rebound(hook, memo)


def copy_model(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """Copies the user's module, out of any wrapper (`DataParallel`, `DistributedDataParallel`, `torch.compile`).

    Returns:
        The copy, and a note for each wrapper that was taken off.
    Raises:
        UnsupportedModuleError: the module cannot be copied.
    """
    notes: list[str] = []
    model = _unwrapped(model, "the model", notes)
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
                module._modules[child_name] = _unwrapped(child, f"'{path}'", notes)
    return copied, notes


def _unwrapped(model: nn.Module, where: str, notes: list[str]) -> nn.Module:
    while True:
        inner = getattr(model, "_orig_mod", None) or (model.module if isinstance(model, _WRAPPERS) else None)
        if not isinstance(inner, nn.Module):
            return model
        notes.append(f"{where} was taken out of its {type(model).__name__}")
        model = inner


def _rebound(function: types.FunctionType, memo: dict[int, Any], depth: int = 3) -> types.FunctionType:
    """The function with every enclosed original replaced by its copy; the function itself if it encloses none."""

    def translate(value: Any) -> Any:
        if isinstance(value, nn.Module | nn.Parameter):
            return memo.get(id(value), value)
        if isinstance(value, types.MethodType) and id(value.__self__) in memo:
            return types.MethodType(value.__func__, memo[id(value.__self__)])
        if isinstance(value, types.FunctionType) and depth:
            return _rebound(value, memo, depth - 1)
        return value

    def contents(cell: types.CellType) -> Any:
        try:
            return cell.cell_contents
        except ValueError:  # A variable that was not assigned yet.
            return cell

    cells = function.__closure__ or ()
    defaults = function.__defaults__ or ()
    keywords = function.__kwdefaults__ or {}
    before = [*map(contents, cells), *defaults, *keywords.values()]
    after = [translate(value) for value in before]
    if all(old is new for old, new in zip(before, after, strict=True)):
        return function
    new_cells = tuple(types.CellType(value) for value in after[: len(cells)])
    new_defaults = tuple(after[len(cells) : len(cells) + len(defaults)]) or None
    rebuilt = types.FunctionType(function.__code__, function.__globals__, function.__name__, new_defaults, new_cells)
    rebuilt.__kwdefaults__ = dict(zip(keywords, after[len(cells) + len(defaults) :], strict=True)) or None
    rebuilt.__dict__.update(function.__dict__)
    return rebuilt
