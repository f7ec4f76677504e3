"""State of modules: kept, compared with a later state, and put back.

Slot: one tensor of a module. ModuleState: attributes, containers and random states. ForwardState: all that a forward
pass may read besides its weights. The context managers at the end are made of these; the last holds signals back.
"""

from __future__ import annotations

import operator
import signal
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from metawrap.errors import UnsupportedModuleError
from metawrap.layers.per_step_norm import PerStepNorm
from metawrap.snapshot.generators import Generators
from metawrap.surgery.copying import containers_in

Modules = Iterable[tuple[str, nn.Module]]
_MISSING = object()
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device)
_TORCH_OWN = frozenset(vars(nn.Module()))


class Slot(NamedTuple):
    """A place in a module's table of parameters or buffers, and the tensor that it held.

    version: the tensor's version then. value: a copy of the tensor, None without one.
    """

    name: str
    table: dict[str, Any]
    local: str
    tensor: Tensor | None
    version: int
    value: Tensor | None

    def edited_in_place(self) -> bool:
        """Whether the tensor has changed. Edits that keep its version, as batch_norm's, show only beside a copy."""
        if self.tensor is None or _version(self.tensor) != self.version:
            return self.tensor is not None
        return self.value is not None and not same_value(self.tensor, self.value)

    def edited(self) -> bool:
        """Whether the place holds another tensor, or the tensor has changed."""
        return self.table[self.local] is not self.tensor or self.edited_in_place()

    def put_back(self) -> None:
        """Puts the tensor into its place, with its value of then."""
        if self.tensor is not None and self.value is not None and self.edited_in_place():
            with torch.no_grad():
                self.tensor.copy_(self.value)
            if self.tensor.grad_fn is not None and not self.tensor._is_view():
                self.tensor.detach_()  # From the graph that a forward wrote into it.
        self.table[self.local] = self.tensor


def slots_of(
    modules: Modules, table: Literal["_buffers", "_parameters"] = "_buffers", copies: bool = True, norms: bool = True
) -> list[Slot]:
    """Every place in one table of the modules; a tensor in several places is copied once.

    Args:
        copies: whether the tensors are copied.
        norms: False leaves out per-step norms, whose statistics are folded as values after a step.
    """
    values: dict[int, Tensor] = {}
    slots = []
    for path, module in modules:
        places: dict[str, Any] = module.__dict__[table] if norms or not isinstance(module, PerStepNorm) else {}
        for local, tensor in places.items():
            value = values.get(id(tensor))
            if copies and value is None and tensor is not None:
                value = values[id(tensor)] = tensor.clone() if table == "_buffers" else tensor.detach().clone()
            version = 0 if tensor is None else _version(tensor)
            slots.append(Slot(f"{path}.{local}" if path else local, places, local, tensor, version, value))
    return slots


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def same_value(tensor: Tensor, value: Tensor) -> bool:
    """Whether two tensors are equal in all respects; sparse ones, which torch cannot compare, count as equal."""
    if tensor.layout != torch.strided or value.layout != torch.strided:
        return tensor.layout == value.layout
    return tensor.dtype == value.dtype and tensor.device == value.device and torch.equal(tensor, value)


class Change(NamedTuple):
    """One difference between two states of a module.

    name: the changed thing, for an error. value: its present value. key: equal for all changes that one cache makes for
    inputs of one form; None where the change cannot be a cache's.
    """

    name: str
    value: Any
    key: Hashable


class ModuleState:
    """Attributes and containers of modules, and all random states; tensors by identity, not by content.

    Args:
        modules: the modules with their paths.
        buffers: whether the tables of buffers are kept with the attributes.
        containers: which plain containers are kept: none, those in the modules' "own" attributes, or "all", torch's
            tables of hooks, parameters, buffers and submodules included. Generators in these attributes are kept too.
        device: a CUDA device's generator is kept too.
    """

    def __init__(
        self,
        modules: Modules,
        buffers: bool = False,
        containers: Literal["own", "all"] | None = None,
        device: torch.device | None = None,
    ) -> None:
        named = list(modules)
        tables = ("__dict__", "_buffers") if buffers else ("__dict__",)
        self._tables = [(p, m, live, live.copy()) for p, m in named for live in (getattr(m, name) for name in tables)]
        values = [
            (path, [v for key, v in module.__dict__.items() if containers == "all" or key not in _TORCH_OWN])
            for path, module in (named if containers else ())
        ]
        self._containers: list[tuple[str, Any, Any]] = []
        for path, own in values:
            self.keep(f"a container of '{path or 'the model itself'}'", containers_in(own))
        self.generators = Generators(device, held=chain.from_iterable(own for _, own in values))

    def keep(self, name: str, containers: Iterable[Any]) -> None:
        """Keeps more containers, under a name for errors."""
        self._containers += ((name, live, live.copy()) for live in containers)

    def changes(self, now: ModuleState | None = None) -> Iterator[Change]:
        """Attributes, buffers and containers that differ in `now`, at present if None; not generators."""
        for place, (path, module, live, kept) in enumerate(self._tables):
            present = live if now is None else now._tables[place][3]
            for key in [*present, *(kept.keys() - present.keys())]:
                value = present.get(key, _MISSING)
                # A recurrent module caches its weights; the engine renews the cache after each call.
                cached = key.startswith("_flat_weight") and isinstance(module, nn.RNNBase)
                if not _same(value, kept.get(key, _MISSING)) and not cached:
                    name = f"'{path}.{key}'" if path else f"'{key}'"
                    yield Change(name, value, (name, value if type(value) in _PLAIN else None))
        for name, live, kept in self._containers if now is None else ():
            items, old = _items(live), _items(kept)
            grown = len(items) != len(old)
            if grown or not (live == kept if isinstance(live, set) else all(map(_same, items, old))):
                yield Change(name, items, None if grown else id(live))

    def put_back(self) -> None:
        """Restores attributes, containers and generators."""
        _refill((live, kept) for *_, live, kept in [*self._tables, *self._containers])
        self.generators.put_back()


def _refill(containers: Iterable[tuple[Any, Any]]) -> None:
    for live, kept in containers:
        items, old = _items(live), _items(kept)
        if len(items) != len(old) or not all(map(operator.is_, items, old)):
            live.clear()
            (live.update if hasattr(live, "update") else live.extend)(kept)


def _items(container: Any) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, dict) else list(container)


def _same(one: Any, other: Any) -> bool:
    """Whether two values are one object, or equal plain values."""
    if isinstance(one, tuple) and type(one) is type(other):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or (type(one) is type(other) and isinstance(one, _PLAIN) and one == other)


class ForwardState:
    """All that a forward pass may read and change besides its weights: buffers, plain attributes, random states."""

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        named = [("", module) for module in modules]
        self._modules = ModuleState(named, device=device)
        self._buffers = slots_of(named, norms=False)

    def restore(self, copies: bool) -> None:
        """Restores all of it; `copies` puts copies of the buffers' values into their places, for a pass to edit."""
        self._modules.put_back()
        made: dict[int, Tensor] = {}
        for slot in self._buffers:
            if copies and slot.value is not None and id(slot.value) not in made:
                made[id(slot.value)] = slot.value.clone()
            slot.table[slot.local] = made.get(id(slot.value), slot.tensor)

    def difference(self, other: ForwardState) -> str | None:
        """The first difference in words, or None. On a GPU an edit shows by the buffer's version, without a wait."""
        if self._modules.generators != other._modules.generators:
            return "it draws random numbers, which come in the order of the calls"
        if len(self._buffers) != len(other._buffers):
            return "forward adds or removes a buffer"
        for one, two in zip(self._buffers, other._buffers, strict=True):
            same = one.local == two.local and one.tensor is two.tensor and one.version == two.version
            if same and one.value is not None and two.value is not None and one.value.device.type == "cpu":
                same = same_value(one.value, two.value)
            if not same:
                return f"forward edits the buffer '{one.local}'"
        changed = next(self._modules.changes(other._modules), None)
        return None if changed is None else f"forward changes the attribute {changed.name}"


@dataclass
class BufferEdits:
    """Buffers, by name, that forward was seen to edit; a learner's engines and first looks add to one such object.

    aliased: buffers that are held in a second place too, with the error that is due if forward edits one. edited:
    buffers that forward edits in place. carried: those of them that forward left with a graph.
    """

    aliased: dict[str, str] = field(default_factory=dict)
    edited: set[str] = field(default_factory=set)
    carried: set[str] = field(default_factory=set)

    def add(self, edited: set[str]) -> None:
        """Adds edited buffers.

        Raises:
            UnsupportedModuleError: one is aliased: a copy in its place would leave the alias behind.
        """
        if refused := edited & self.aliased.keys():
            raise UnsupportedModuleError(self.aliased[min(refused)])
        self.edited |= edited


@contextmanager
def restored_buffers(*models: nn.Module) -> Iterator[Callable[[Tensor], None]]:
    """Restores the user's own buffers on an exception, and where the function that it yields is told to.

    The function takes a bool scalar on the model's device, so that nothing synchronises. Per-step norms are left out.
    """
    named = chain.from_iterable(model.named_modules() for model in models)
    slots = [slot for slot in slots_of(named, norms=False) if slot.tensor is not None]

    @torch.no_grad()
    def restore(where: Tensor | None = None) -> None:
        for slot in slots:
            present = slot.table[slot.local]
            assert slot.value is not None
            if where is None or present is None:
                slot.table[slot.local] = slot.value
            elif present.layout != torch.strided or present.shape != slot.value.shape:  # torch.where takes neither.
                slot.table[slot.local] = slot.value if bool(where) else present
            else:
                present.copy_(torch.where(where, slot.value, present))

    try:
        yield restore
    except BaseException:
        restore()
        raise


@contextmanager
def untouched_buffers(model: nn.Module, when: bool = True) -> Iterator[None]:
    """Restores every buffer, edited or replaced, and the embeddings that `max_norm` edits."""
    named = list(model.named_modules()) if when else []
    slots = slots_of(named)
    slots += slots_of(((p, m) for p, m in named if getattr(m, "max_norm", None) is not None), "_parameters")
    try:
        yield
    finally:
        for slot in slots:
            slot.put_back()


@contextmanager
def unchanged(model: nn.Module, device: torch.device, edits: BufferEdits | None = None) -> Iterator[None]:
    """Restores all that a forward may change: buffers, weights, attributes, containers and random states.

    Args:
        edits: gets the buffers that were edited in place, through `.data` too, which raises no version.
    """
    named = list(model.named_modules())
    state = ModuleState(named, containers="all", device=device)
    buffers, weights = slots_of(named), slots_of(named, "_parameters")
    edited: set[str] = set()
    try:
        yield
        edited = {slot.name for slot in buffers if slot.edited_in_place()}
    finally:
        for slot in [*buffers, *weights]:
            slot.put_back()
        state.put_back()
    if edits is not None:
        edits.add(edited)


@contextmanager
def attributes_put_back(own: dict[str, Any]) -> Iterator[None]:
    """Restores an object's attributes, and the contents of the plain containers among them."""
    kept = [(live, live.copy()) for live in [own, *containers_in(own.values())]]
    try:
        yield
    finally:
        _refill(kept)


@contextmanager
def signals_deferred() -> Iterator[Callable[[], None]]:
    """Delays both signals from the call of the function that it yields until the block ends, and raises them then."""
    received: list[int] = []
    before: dict[int, Any] = {}

    def defer() -> None:
        if threading.current_thread() is threading.main_thread():  # Other threads get no signals.
            for number in (signal.SIGINT, signal.SIGTERM):
                if (handler := signal.getsignal(number)) is not None:
                    before[number] = handler
                    signal.signal(number, lambda number, _: received.append(number))

    try:
        yield defer
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])
