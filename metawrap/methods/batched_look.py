"""Whether a model can be run for several tasks at once, found by doing so, with two tasks and nothing drawn."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from metawrap.engines import BatchedEngine, cannot
from metawrap.errors import UnsupportedModuleError
from metawrap.methods.first_look import containers_of
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


def refuse_impure(model: nn.Module, engine: BatchedEngine, call: Callable[[], Any]) -> None:
    """Checks that a call does no more than return its prediction, apart from filling a cache.

    Args:
        call: runs the engine on one batch, without dropout.
    Raises:
        UnsupportedModuleError: it does: once for all tasks, where it is due for each.
    """
    call()  # Fills what is filled at a first call.
    engine.changed.clear()
    containers = [
        (live, list(live.values()) if isinstance(live, dict) else list(live))
        for live in containers_of(*model.modules())
    ]
    drawn, others = torch.get_rng_state(), (random.getstate(), np.random.get_state())
    device = next(model.parameters()).device
    drawn_there = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    call()
    if engine.changed:
        raise UnsupportedModuleError(
            cannot(f"each call of its forward changes '{min(engine.changed)}', once for all tasks, not for each")
        )
    for live, kept in containers:
        now = list(live.values()) if isinstance(live, dict) else list(live)
        if len(now) != len(kept) or any(new is not old for new, old in zip(now, kept, strict=True)):
            held = (name for name, m in model.named_modules() if any(live is c for c in containers_of(m)))
            raise UnsupportedModuleError(
                cannot(
                    f"each call of its forward changes a container in '{next(held) or 'the model itself'}', once for "
                    "all tasks, not for each"
                )
            )
    moved = not torch.equal(drawn, torch.get_rng_state())
    if drawn_there is not None:
        moved = moved or not torch.equal(drawn_there, torch.cuda.get_rng_state(device))
    if moved:
        raise UnsupportedModuleError(
            cannot("its forward draws random numbers, not through torch's dropout, so that it cannot be checked")
        )
    if others[0] != random.getstate() or not all(map(np.array_equal, others[1], np.random.get_state())):
        raise UnsupportedModuleError(
            cannot("its forward draws from random or numpy: one draw would serve all tasks. Draw with torch's dropout")
        )


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Dropout of torch's modules and functions leaves everything as it is; for a look, which puts flags back."""
    modules = [m for m in model.modules() if isinstance(m, (_DropoutNd, nn.MultiheadAttention, nn.RNNBase))]
    flags = [(module, module.training) for module in modules]
    try:
        for module in modules:
            module.training = False
        with _NoDropout():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


class _NoDropout(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            return partial(_attention, func)(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    func: Any, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, *args: Any, **more: Any
) -> Any:
    return func(query, key, value, attn_mask, 0.0, *args, **more)


_DROPOUTS = {
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
    torch.dropout,
    torch.dropout_,
    torch.feature_dropout,
    torch.feature_dropout_,
    torch.alpha_dropout,
    torch.alpha_dropout_,
    torch.feature_alpha_dropout,
    torch.feature_alpha_dropout_,
}
