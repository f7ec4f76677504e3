"""How inputs reach a model, and what stands in for operations that have no second derivative."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


def call_model(model: Any, inputs: Any) -> Any:
    """`model(x)`, `model(*x)` for a tuple (or a list: a DataLoader makes one of it), `model(**x)` for a dict."""
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


class EditedBuffers:
    """Lends each call a copy of the buffers that forward edits in place, and keeps what the call left in them.

    A backward pass through several calls needs the values that each of them saw. A buffer is known from the first call
    that edits it; the graph of that call keeps the buffer itself, and the module goes on with a copy.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tables = [module._buffers for module in model.modules()]
        self._edited: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """For the time of one call."""
        slots = [(table, name, b) for table in self._tables for name, b in table.items() if b is not None]
        copies = {id(b): b.clone() for _, _, b in slots if id(b) in self._edited} if self._edited else {}
        versions = [b._version for _, _, b in slots]
        for table, name, buffer in slots if copies else ():
            table[name] = copies.get(id(buffer), buffer)
        try:
            yield
        finally:
            fresh: dict[int, Tensor] = {}
            for (table, name, buffer), version in zip(slots, versions, strict=True):
                lent = copies.get(id(buffer))
                if lent is not None and table[name] is lent:
                    with torch.no_grad():
                        table[name] = buffer.copy_(lent) if lent._version else buffer
                elif buffer._version != version and table[name] is buffer:
                    table[name] = fresh.setdefault(id(buffer), buffer.detach().clone())
            for buffer in fresh.values():
                self._edited[id(buffer)] = buffer


@contextmanager
def differentiable_twice(model: nn.Module, hard: bool) -> Iterator[None]:
    """Makes what runs inside differentiable twice: fused attention, recurrent networks, and, if `hard`, hard gates.

    Fused attention runs as plain matrix products, recurrent networks without cuDNN, and hardsigmoid and hardswish,
    whose derivative torch cannot differentiate, as relu6(x + 3) / 6.
    """
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if hard:
            stack.enter_context(HardGates())
        yield


def _hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    return _placed(x, F.relu6(x + 3) / 6, inplace)


def _hardswish(x: Tensor, inplace: bool = False) -> Tensor:
    # Of a clone: the gate's own backward must not need the values that it overwrites.
    x_kept = x.clone() if inplace else x
    return _placed(x, x_kept * F.relu6(x_kept + 3) / 6, inplace)


def _placed(x: Tensor, value: Tensor, inplace: bool) -> Tensor:
    return x.copy_(value) if inplace else value


_GATES: dict[Any, Callable[..., Tensor]] = {
    F.hardsigmoid: _hardsigmoid,
    F.hardswish: _hardswish,
    torch._C._nn.hardsigmoid: _hardsigmoid,
    torch._C._nn.hardswish: _hardswish,
    torch._C._nn.hardsigmoid_: partial(_hardsigmoid, inplace=True),
    torch._C._nn.hardswish_: partial(_hardswish, inplace=True),
}


class HardGates(TorchFunctionMode):
    """Computes hard gates by `relu6`; `seen` tells whether there was one. The mode slows every operation a little."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every call of a torch function passes here."""
        gate = _GATES.get(func)
        if gate is None:
            return func(*args, **(kwargs or {}))
        self.seen = True
        return gate(*args, **(kwargs or {}))
