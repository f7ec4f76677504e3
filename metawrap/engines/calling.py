"""Calls of a model: its inputs, the buffers that it edits, operations without a second derivative, graphs behind it."""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from metawrap.errors import UnsupportedModuleError
from metawrap.layers.moments import scale_beside
from metawrap.snapshot.module_state import BufferEdits, same_value
from metawrap.tasks import call_model, describe_value


class EditedBuffers:
    """Lends each call a copy of the buffers that forward edits in place, and keeps the call's values.

    A backward pass through several calls needs the values that each call saw. A buffer is known to be edited from the
    first look at a task or from the first call that edits it; the graph of that call keeps the buffer itself, and the
    module goes on with a copy.
    """

    def __init__(self, model: nn.Module, edits: BufferEdits | None = None) -> None:
        modules = model.named_modules()
        self._tables = [(f"{path}." if path else "", module._buffers) for path, module in modules]
        self._edits = edits or BufferEdits()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Replaces edited buffers by copies during one call."""
        known = self._edits.edited
        slots = [(path, table, name, b) for path, table in self._tables for name, b in table.items() if b is not None]
        copies = {id(b): b.clone() for path, _, name, b in slots if path + name in known} if known else {}
        versions = [b._version for *_, b in slots]
        for _, table, name, buffer in slots if copies else ():
            table[name] = copies.get(id(buffer), buffer)
        fresh: dict[int, Tensor] = {}
        found: set[str] = set()
        try:
            yield
        finally:
            for (path, table, name, buffer), version in zip(slots, versions, strict=True):
                lent = copies.get(id(buffer))
                if lent is not None and table[name] is lent:
                    self._note_graph(path + name, lent)
                    with torch.no_grad():
                        # An edit through .data, or by batch_norm, does not raise the version.
                        table[name] = buffer.copy_(lent) if lent._version or not same_value(lent, buffer) else buffer
                elif buffer._version != version and table[name] is buffer:
                    self._note_graph(path + name, buffer)
                    table[name] = fresh.setdefault(id(buffer), buffer.detach().clone())
                    found.add(path + name)
        if found:
            self._edits.add(found)

    def _note_graph(self, name: str, buffer: Tensor) -> None:
        if buffer.grad_fn is not None:
            self._edits.carried.add(name)


def run_model(model: nn.Module, inputs: Any, head: nn.Module | None) -> Any:
    """The output of a model; with `head`, one of its modules, what enters that: the embeddings, (examples, ...).

    Raises:
        UnsupportedModuleError: the head does not run exactly once, or not on a floating-point tensor.
    """
    if head is None:
        return call_model(model, inputs)
    entered: list[Any] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(next(iter((*args, *kwargs.values())), None))

    with head.register_forward_pre_hook(note, with_kwargs=True):
        call_model(model, inputs)
    if len(entered) != 1 or not isinstance(entered[0], Tensor) or not entered[0].is_floating_point():
        found = describe_value(entered[0]) if len(entered) == 1 else f"{len(entered)} of them"
        raise UnsupportedModuleError(
            f"Expected one floating-point tensor to enter the head ({type(head).__name__}) in a forward pass, as its "
            f"embedding, but got {found}. Name the module that an embedding enters with head=."
        )
    return entered[0]


class _OfTheProcess:
    """A setting of the whole process: the first thread that needs it makes it, and the last one undoes it.

    A thread that left earlier would undo it under the others, and one that left later would leave it behind.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make, self._lock, self._inside, self._undo = make, threading.Lock(), 0, ExitStack()

    @contextmanager
    def made(self) -> Iterator[None]:
        """Inside, the setting is made."""
        with self._lock:
            if not self._inside:
                self._undo.enter_context(self._make())
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._undo.close()


PLAIN_ATTENTION = _OfTheProcess(lambda: sdpa_kernel(SDPBackend.MATH))
WITHOUT_CUDNN = _OfTheProcess(lambda: torch.backends.cudnn.flags(enabled=False))


def _compiled_part(model: nn.Module) -> str | None:
    """In words, the first module that torch.compile runs by a method of its own, or None."""
    for name, module in model.named_modules():
        own = [value for value in module.__dict__.values() if type(value) is types.FunctionType]
        compiled = any(isinstance(_before_compile(value), types.MethodType) for value in own)
        if module._compiled_call_impl is not None or compiled or _has_compiled_methods(module.__class__):
            return _place(name)
    return None


@functools.cache
def _has_compiled_methods(cls: Any) -> bool:
    return any(_before_compile(value) is not None for base in cls.__mro__ for value in vars(base).values())


def _before_compile(value: Any) -> Any:
    return getattr(value, "_torchdynamo_orig_callable", None) if type(value) is types.FunctionType else None


def refuse_wrappers(model: nn.Module) -> None:
    """Raises UnsupportedModuleError where torch.compile was put around a module since the model was wrapped."""
    for name, module in model.named_modules():
        if "_orig_mod" in module._modules:
            raise UnsupportedModuleError(
                f"{_place(name)} of learner.model was replaced by torch.compile(...), which renames its parameters. "
                "Put its _orig_mod back, and compile the module that adapt or unwrap returns."
            )


def _place(name: str) -> str:
    return f"'{name}'" if name else "the model"


@contextmanager
def differentiable_twice(model: nn.Module, plain: bool) -> Iterator[None]:
    """Makes differentiable twice: fused attention, recurrent networks, and, if `plain`, what `PlainForms` replaces.

    Fused attention runs as plain matrix products, recurrent networks without cuDNN.

    Raises:
        UnsupportedModuleError: torch.compile runs a module.
    """
    if compiled := _compiled_part(model):
        raise UnsupportedModuleError(
            f"{compiled} runs through torch.compile, which differentiates fast weights wrongly or not twice. For "
            "second-order gradients, undo it (after module.compile(): module._compiled_call_impl = None) and compile "
            "the module that adapt or unwrap returns. First order works: FOMAML, first_order_epochs=math.inf."
        )
    with ExitStack() as stack:
        stack.enter_context(PLAIN_ATTENTION.made())
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(WITHOUT_CUDNN.made())
        if plain:
            stack.enter_context(PlainForms())
        yield


def _hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    return _placed(x, F.relu6(x + 3) / 6, inplace)


def _hardswish(x: Tensor, inplace: bool = False) -> Tensor:
    # Of a clone: the gate's own backward must not need the values that it overwrites.
    x_kept = x.clone() if inplace else x
    return _placed(x, x_kept * F.relu6(x_kept + 3) / 6, inplace)


def _placed(x: Tensor, value: Tensor, inplace: bool) -> Tensor:
    return x.copy_(value) if inplace else value


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """As `torch._weight_norm`, by plain operations.

    Args:
        v, g: direction and magnitude. dim: the axis whose slices each have a norm; -1: one norm for all.
    """
    norms: Tensor = torch.linalg.vector_norm(v)
    if dim != -1:
        dim %= v.ndim
        # torch.norm_except_dim has no rule under vmap.
        norms = torch.linalg.vector_norm(v.movedim(dim, 0).reshape(v.shape[dim], -1), dim=1)
        norms = norms.view([-1 if axis == dim else 1 for axis in range(v.ndim)])
    return v * (g / norms)


_FORMS: dict[Any, Callable[..., Tensor]] = {
    F.hardsigmoid: _hardsigmoid,
    F.hardswish: _hardswish,
    torch._C._nn.hardsigmoid: _hardsigmoid,
    torch._C._nn.hardswish: _hardswish,
    torch._C._nn.hardsigmoid_: functools.partial(_hardsigmoid, inplace=True),
    torch._C._nn.hardswish_: functools.partial(_hardswish, inplace=True),
    torch._weight_norm: weight_norm,
}
# As the graphs of torch.export call them.
for _name, _form in [("hardsigmoid", _hardsigmoid), ("hardswish", _hardswish), ("_weight_norm", weight_norm)]:
    _packet = getattr(torch.ops.aten, _name)
    _FORMS |= {_packet: _form, _packet.default: _form}


# Norms, with the place of the scale among their arguments; the shift follows.
_NORMS: dict[Any, int] = {torch.batch_norm: 1, torch.instance_norm: 1, torch.layer_norm: 2}
for _norm, _at in list(_NORMS.items()):
    _packet = getattr(torch.ops.aten, _norm.__name__)
    _NORMS |= {_packet: _at, _packet.default: _at}
_NORMS |= {F.batch_norm: 3, F.instance_norm: 3, F.layer_norm: 2}


def _with_scale(place: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """Returns a norm's arguments with a scale of ones, if it has a shift and no scale; returns None for any other norm.

    Args:
        place: of the scale among the arguments.
    """
    given: dict[str, Any] = {**dict(zip(("weight", "bias"), args[place:], strict=False)), **kwargs}
    scale = scale_beside(given.get("bias"), given.get("weight"))
    if scale is given.get("weight"):
        return None
    if len(args) > place:
        return (*args[:place], scale, *args[place + 1 :]), kwargs
    return args, {**kwargs, "weight": scale}


class PlainForms(TorchFunctionMode):
    """Computes by plain operations what torch cannot differentiate twice, or differentiates wrongly.

    Hard gates run by `relu6`. Weight norm runs by a norm and a product: the second derivative of `torch._weight_norm`
    is wrong where its norm keeps the first or the last axis. A norm with a shift and no scale gets a scale of ones:
    else torch leaves out the second derivative by the shift. The mode slows every operation a little.

    seen: whether such an operation ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every call of a torch function passes here."""
        kwargs = kwargs or {}
        if func in _NORMS and (scaled := _with_scale(_NORMS[func], args, kwargs)):
            self.seen, (args, kwargs) = True, scaled
        self.seen |= func in _FORMS
        return _FORMS.get(func, func)(*args, **kwargs)


def graph_behind(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """Every node of autograd's graph behind the tensors."""
    waiting: list[Any] = [tensor.grad_fn for tensor in tensors]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [before for before, _ in node.next_functions]


def leaves_behind(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The leaves that require a gradient in the graph behind the tensors."""
    return [node.variable for node in graph_behind(tensors) if hasattr(node, "variable")]


def dense(gradient: Tensor) -> Tensor:
    """The gradient as an ordinary tensor: some embeddings have sparse gradients."""
    return gradient.to_dense() if gradient.is_sparse else gradient


@contextmanager
def autograd(enabled: bool = True) -> Iterator[None]:
    """Gradients on or off, whatever mode the caller is in, inference mode too; autocast runs without its cache.

    That cache keeps casts of leaf tensors until the autocast block ends: one of every fast weight, and stale ones after
    an optimizer step in the block.
    """
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(enabled):
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
