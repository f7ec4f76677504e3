"""Checks whether tasks can run at the same time: by a trial with two tasks, and by what a task leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from metawrap.engines import cannot
from metawrap.engines.batched import DRAWS, ONCE
from metawrap.engines.task_axis import DROPOUTS
from metawrap.errors import UnsupportedModuleError
from metawrap.snapshot.module_state import ModuleState, slots_of
from metawrap.surgery.copying import containers_in, enclosed
from metawrap.surgery.inspect import find_hooks
from metawrap.tasks import Task, map_tensors


def twin_of(task: Task) -> Task:
    """Another task of the same shapes: weaker inputs, and each label on its neighbour."""
    x = [map_tensors(part, _weaker) for part in (task.support_x, task.target_x)]
    y = [map_tensors(part, _rolled) for part in (task.support_y, task.target_y)]
    return replace(task, support_x=x[0], support_y=y[0], target_x=x[1], target_y=y[1])


def _weaker(tensor: Tensor) -> Tensor:
    return tensor * 0.9 if tensor.is_floating_point() or tensor.is_complex() else tensor


def _rolled(tensor: Tensor) -> Tensor:
    return tensor.roll(1, 0) if tensor.ndim else tensor


def refuse_impure(model: nn.Module, call: Callable[[], Any]) -> None:
    """Checks that a call has no side effect, apart from filling a cache.

    The engine makes the quick checks at every call; the checks here would take too long each time.

    Args:
        call: runs the engine on one batch, without dropout.
    Raises:
        UnsupportedModuleError: it has a side effect, which would happen once for all tasks instead of for each.
    """
    call()  # Fills the caches that a first call fills.
    named = list(model.named_modules())
    before = ModuleState(named, containers="all", device=next(model.parameters()).device)
    before.keep("a container that a hook writes to", _containers_of_hooks(model))
    weights = slots_of(named, "_parameters", copies=False)
    call()
    if changes := list(before.changes()):
        raise UnsupportedModuleError(cannot(f"each call of its forward changes {changes[-1].name}, {ONCE}"))
    if edited := [slot.name for slot in weights if slot.edited_in_place()]:
        raise UnsupportedModuleError(cannot(f"its forward edits the parameter '{edited[0]}', {ONCE}"))
    if before.generators.moved():
        raise UnsupportedModuleError(cannot(DRAWS))


def _containers_of_hooks(model: nn.Module) -> Iterator[Any]:
    """The containers that hooks enclose or hold as objects, where users keep features."""
    found: list[Any] = []
    for module in model.modules():
        for hook in [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]:
            function = getattr(hook, "__func__", hook)
            found += enclosed(function)
            holder = getattr(hook, "__self__", hook)
            found += () if isinstance(holder, nn.Module) else getattr(holder, "__dict__", {}).values()
            if isinstance(hook, partial):
                found += [*hook.args, *hook.keywords.values()]
    return containers_in(found)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Switches off the dropout of torch's modules and functions, for a check."""
    modules = list(model.modules())
    # Not in eval mode: cuDNN's recurrent networks have no gradient there.
    changes: list[tuple[nn.Module, str, Any]] = [
        (m, "dropout", 0.0) for m in modules if isinstance(m, (nn.MultiheadAttention, nn.RNNBase))
    ]
    changes += [(m, "training", False) for m in modules if isinstance(m, _DropoutNd)]
    before = [(module, name, module.__dict__[name]) for module, name, _ in changes]
    try:
        for module, name, value in changes:
            module.__dict__[name] = value
        with _NoDropout():
            yield
    finally:
        for module, name, value in before:
            module.__dict__[name] = value


class _NoDropout(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            return partial(_attention, func)(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    func: Any, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, *args: Any, **more: Any
) -> Any:
    return func(query, key, value, attn_mask, 0.0, *args, **more)


def left_behind(learner: Any) -> str | None:
    """What solving a task of a learner leaves behind for the next one, or None."""
    checks = learner.checks
    if learner.settings.outputs.head_init == "random":
        return "random heads come in the order of the tasks"
    if checks.edits.edited:
        return f"forward edits the buffer '{min(checks.edits.edited)}'"
    if nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return "torch has hooks on all modules, which may touch what is outside of it"
    if (hooked := find_hooks(learner.model)) is not None:
        return f"'{hooked or 'the model itself'}' has hooks, which may touch what is outside of it"
    return known.left_behind if (known := checks.findings.get(True)) else None
