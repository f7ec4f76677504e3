"""Reads the user's module: its norms, parameters, hazards and head. Changes nothing."""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Iterator, Mapping
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from metawrap.outputs import candidates, in_words, prediction_in
from metawrap.surgery.copying import held_tensors
from metawrap.tasks import tensors_in


def find_problems(model: nn.Module, keep: Collection[str] = (), affine: bool = True) -> list[str]:
    """Reasons why no engine could adapt the model correctly, each with module, cause and fix; empty when all is well.

    >>> find_problems(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    []

    Args:
        keep: names of batch norms that will be left alone.
        affine: whether the scale and shift of the other norms will be per step.
    """
    swapped = {name: norm for name, norm in batch_norms(model).items() if name not in keep}
    problems = [*_unfit_modules(model), *_unnamed(model), *_aliases(model)]
    problems += _norms_that_cannot_be_per_step(model, swapped)
    return problems + list(_norm_parameters_used_elsewhere(model, swapped) if affine else ())


def find_higher_hazards(model: nn.Module) -> list[str]:
    """Parts of the model that `higher` gets wrong or fails on, with the cause; `functional` carries them."""
    return list(_higher_hazards(model))


def find_hooks(model: nn.Module) -> str | None:
    """The name of a module with forward hooks, or None; `higher` hands such hooks its twin of the module."""
    hooked = (name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks)
    return next(hooked, None)


def registered_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every buffer of every module by name; a tensor that several modules register comes for each of them.

    `named_buffers(remove_duplicate=False)` would walk a module that holds itself for ever.
    """
    for path, module in model.named_modules():
        for local, buffer in module._buffers.items():
            if buffer is not None:
                yield f"{path}.{local}" if path else local, buffer


def find_buffer_aliases(model: nn.Module) -> dict[str, str]:
    """Buffers that are held in a second place, with the error that is due if forward edits them in place.

    A tensor that is registered as several buffers is no such case.
    """
    buffers = [(name, buffer) for name, buffer in registered_buffers(model) if type(buffer) is Tensor]
    held: dict[int, list[tuple[str, Tensor, bool]]] = {}
    for name, buffer in buffers:
        held.setdefault(_storage(buffer), []).append((f"the buffer '{name}'", buffer, True))
    for path, module in model.named_modules() if buffers else ():
        for attribute, value in vars(module).items():
            for tensor in held_tensors(value) if attribute not in _TORCH_OWN else ():
                if type(tensor) is Tensor:
                    where = f"{_label(path, module)} in its plain attribute '{attribute}'"
                    held.setdefault(_storage(tensor), []).append((where, tensor, False))
    return {
        name: (
            f"The buffer '{name}', which forward edits in place, is also held by {where}. Each call is lent a copy of "
            "it, which would not stand there. Read it from the module that owns it, or register the same tensor there "
            "as a buffer (register_buffer)."
        )
        for name, buffer in buffers
        for where, other, is_buffer in held[_storage(buffer)]
        if (not is_buffer if other is buffer else _overlap(buffer, other))
    }


def _storage(tensor: Tensor) -> int:
    strided = tensor.layout == torch.strided and not tensor.is_meta
    return tensor.untyped_storage().data_ptr() if strided else id(tensor)


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Of two tensors in one storage."""
    (start, end), (other_start, other_end) = _memory(one), _memory(other)
    return start < other_end and other_start < end


def _memory(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + tensor.element_size() * (last + 1) if tensor.numel() else start


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Every batch norm of the model by name; one that is registered twice appears once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


class FoundHead(NamedTuple):
    """The module that makes the prediction.

    name: None where no module ran or the output is ambiguous. exact: whether the prediction is exactly that module's
    output; if not, the name is that of the last module that ran. ambiguous: the output in words, where the prediction
    in it is not known.
    """

    name: str | None
    exact: bool
    ambiguous: str = ""


def find_head(model: nn.Module, call: Callable[[], Any]) -> FoundHead:
    """Finds the module that makes the prediction by watching one forward pass.

    Args:
        call: runs the model once and returns its output.
    """
    seen: list[tuple[str, list[Tensor]]] = []

    def watch(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.append((name, tensors_in(output)))

    leaves = [(name, m) for name, m in model.named_modules() if m._parameters and not any(m.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        output = call()
    finally:
        for handle in handles:
            handle.remove()

    def maker(tensor: Tensor | None) -> str | None:
        return next((name for name, outputs in reversed(seen) if any(out is tensor for out in outputs)), None)

    found = candidates(output)
    if (prediction := prediction_in(output)) is None and len(found) > 1:
        makers = {path: f" of '{name}'" for path, tensor in found.items() if (name := maker(tensor)) is not None}
        return FoundHead(None, False, in_words(output, makers))
    name = maker(prediction)
    return FoundHead(name if name is not None else (seen[-1][0] if seen else None), name is not None)


def _label(name: str, module: nn.Module) -> str:
    return f"'{name or 'the model itself'}' ({type(module).__name__})"


def _unfit_modules(model: nn.Module) -> Iterator[str]:
    scripted = False
    for name, module in model.named_modules():
        where, kind = _label(name, module), type(module).__module__
        if isinstance(module, torch.jit.ScriptModule) and not scripted:
            scripted = True  # So are all modules in it.
            yield (
                f"{where} is TorchScript, whose parameters cannot be replaced by fast weights. "
                "Wrap the Python module that it was scripted from."
            )
        if kind.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
            yield (
                f"{where} is quantised: its weights are whole numbers, and no gradient passes through it. Wrap the "
                "model before quantising it, and quantise what adapt() or unwrap() returns."
            )
        if any(is_lazy(p) for p in module._parameters.values()):
            yield (
                f"{where} is lazy and not initialised yet. Run the model once on an example input before wrapping it."
            )
        if isinstance(module, _InstanceNorm) and module.track_running_stats:
            yield (
                f"{where} keeps running statistics that would mix the inner steps of all tasks. Build it with "
                f"track_running_stats=False, or pass wrapping={{'swap': {{{type(module).__name__}: your_factory}}}}."
            )


def _unnamed(model: nn.Module) -> Iterator[str]:
    own = {id(parameter) for _, parameter in model.named_parameters()}
    unnamed = [name for name, parameter in nn.Module.named_parameters(model) if id(parameter) not in own]
    if unnamed:
        yield (
            f"{_label('', model)} has a named_parameters() of its own, which leaves out {', '.join(unnamed)}. Take it "
            "away; freeze what should not be trained with requires_grad_(False), and choose what to adapt with adapt=."
        )


def _aliases(model: nn.Module) -> Iterator[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for path, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute in _TORCH_OWN or (isinstance(module, nn.RNNBase) and attribute.startswith("_flat_weight")):
                continue
            for tensor in held_tensors(value):
                if id(tensor) in names:
                    yield (
                        f"{_label(path, module)} keeps the parameter '{names[id(tensor)]}' a second time in its plain "
                        f"attribute '{attribute}', where no fast weight can replace it. Read it from the module that "
                        "owns it, or use nn.ParameterList or nn.ParameterDict."
                    )


def _norms_that_cannot_be_per_step(model: nn.Module, norms: Mapping[str, _BatchNorm]) -> Iterator[str]:
    for name, norm in norms.items():
        if reason := refuses_per_step(norm):
            yield (
                f"{_label(name, norm)} {reason}. Pass wrapping={{'swap': {{{type(norm).__name__}: your_factory}}}}, "
                f'or leave it alone with wrapping={{"keep_norm": ["{name}"]}}.'
            )


def _norm_parameters_used_elsewhere(model: nn.Module, swapped: Mapping[str, _BatchNorm]) -> Iterator[str]:
    norms = {id(p): name for name, norm in swapped.items() for p in norm._parameters.values()}
    own = {id(norm) for norm in swapped.values()}
    for name, module in model.named_modules():
        for local, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in norms and id(module) not in own:
                yield (
                    f"{_label(name, module)} shares its '{local}' with the batch norm '{norms[id(parameter)]}', whose "
                    "parameters become per-step. Give each its own parameter, or leave the norm alone with "
                    f'wrapping={{"keep_norm": ["{norms[id(parameter)]}"]}}.'
                )


_TORCH_OWN = frozenset(vars(nn.Module()))


def _higher_hazards(model: nn.Module) -> Iterator[str]:
    inside = {id(module) for module in model.modules()}
    for name, module in model.named_modules():
        where = _label(name, module)
        if "forward" in vars(module):
            yield f"{where} has its forward replaced on the instance"
        if any(child is None for child in module._modules.values()):
            yield f"{where} has a child registered as None"
        if type(module) is nn.Module:
            yield f"{where} is a bare nn.Module"
        if type(type(module)) is not type:
            yield f"{where} has the metaclass {type(type(module)).__name__}"
        if any("__slots__" in vars(cls) for cls in type(module).__mro__[:-1] if cls is not nn.Module):
            yield f"{where} has __slots__"
        if "params" in getattr(getattr(type(module).forward, "__code__", None), "co_varnames", ()):
            yield f"{where} has a forward argument or variable named 'params'"
        if hasattr(module, "parametrizations"):
            yield f"{where} is parametrized"
        for attribute, value in vars(module).items():
            if attribute not in _TORCH_OWN and _reaches_module(value, inside):
                yield f"{where} keeps a module, bound method or closure in its plain attribute '{attribute}'"


def _reaches_module(value: Any, inside: set[int], depth: int = 3) -> bool:
    if isinstance(value, nn.Module):
        return id(value) in inside
    if isinstance(value, types.MethodType):
        return isinstance(value.__self__, nn.Module)
    if isinstance(value, types.FunctionType):
        return bool(value.__closure__)
    if isinstance(value, dict | list | tuple | set) and depth:
        items = value.values() if isinstance(value, dict) else value
        return any(_reaches_module(item, inside, depth - 1) for item in items)
    return hasattr(value, "func") and _reaches_module(value.func, inside, depth - 1) if depth else False


def refuses_per_step(module: nn.Module) -> str | None:
    """Why a batch norm cannot become per-step, or None."""
    forward = type(module).forward
    if isinstance(module, nn.SyncBatchNorm) and forward is not nn.SyncBatchNorm.forward:
        return "is a SyncBatchNorm with a forward of its own, which would synchronise across processes in an inner loop"
    if "forward" in vars(module):
        return "has its forward replaced on the instance, so this step's rows cannot be lent to it"
    if not [p for p in signature(forward).parameters.values() if p.name != "self"]:
        return "has a forward without an input"
    return None
