"""What a call of a model leaves behind besides its result: attributes, buffers, containers, moved generators."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from metawrap.surgery.copying import containers_in


class Change(NamedTuple):
    """One thing that is not as it was.

    name: how an error calls it. value: what it is now. key: the same for what one cache holds for inputs of one form;
    None for what no cache does twice.
    """

    name: str
    value: Any
    key: Hashable


class Before:
    """A model's state before a call, to see afterwards what is another, or to put it back.

    Left out are the contents of tensors, which the engine watches, and torch's own tables.
    """

    def __init__(self, modules: Sequence[tuple[str, nn.Module]]) -> None:
        self._tables = [(path, module, dict(module.__dict__), dict(module._buffers)) for path, module in modules]
        own = [(path, [v for k, v in values.items() if k not in _TORCHS]) for path, _, values, _ in self._tables]
        self._containers = [(path, live, live.copy()) for path, values in own for live in containers_in(values)]
        self._draws = [(*way, way[0]()) for way in _generators([v for _, values in own for v in values])]
        self._torch = torch.get_rng_state()

    def changes(self) -> Iterator[Change]:
        """What was replaced, added, removed or extended."""
        for path, module, *tables in self._tables:
            for now, then in zip((module.__dict__, module._buffers), tables, strict=True):
                new = [key for key, value in now.items() if not _same(value, then.get(key, _NOTHING))]
                for key in [*new, *(then.keys() - now.keys())]:
                    # A recurrent module's own cache of its weights, which is made anew after each call.
                    if not (isinstance(module, nn.RNNBase) and key.startswith("_flat_weight")):
                        value = now.get(key, _NOTHING)
                        name = f"'{path}.{key}'" if path else f"'{key}'"
                        yield Change(name, value, (name, value if type(value) in _PLAIN else None))
        for path, live, kept in self._containers:
            items, old_items = _items(live), _items(kept)
            grown = len(items) != len(old_items)
            if grown or not all(map(_same, items, old_items)):
                yield Change(f"a container of '{path or 'the model itself'}'", items, None if grown else id(live))

    def has_drawn(self) -> bool:
        """Whether python's, numpy's or the model's own generators have moved."""
        return not all(_same_state(read(), state) for read, _, state in self._draws)

    def torch_has_drawn(self) -> bool:
        """Whether torch's global generator of the CPU has."""
        return not torch.equal(self._torch, torch.get_rng_state())

    def put_back(self) -> None:
        """Undoes all of it."""
        for _, module, attributes, buffers in self._tables:
            for table, values in ((module.__dict__, attributes), (module._buffers, buffers)):
                for key in table.keys() - values.keys():
                    del table[key]
                table.update(values)
        for _, live, kept in self._containers:
            live.clear()
            (live.update if hasattr(live, "update") else live.extend)(kept)
        for _, write, state in self._draws:
            write(state)
        torch.set_rng_state(self._torch)


def _generators(values: Sequence[Any]) -> Iterator[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """How the state of each generator is read and written."""
    yield random.getstate, random.setstate
    yield np.random.get_state, np.random.set_state
    for value in values:
        if isinstance(value, random.Random):
            yield value.getstate, value.setstate
        elif isinstance(value, np.random.RandomState):
            yield value.get_state, value.set_state
        elif isinstance(value, np.random.Generator):
            source: Any = value.bit_generator
            yield lambda s=source: s.state, lambda state, s=source: setattr(s, "state", state)  # type: ignore[misc]


def _items(container: Any) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, dict) else list(container)


def _same(value: Any, old: Any) -> bool:
    return value is old or (type(value) in _PLAIN and type(old) in _PLAIN and value == old)


def _same_state(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, dict):
        return _same_state(tuple(one.values()), tuple(other.values()))
    if isinstance(one, tuple) and any(isinstance(part, np.ndarray | dict) for part in one):
        return all(map(_same_state, one, other))
    return bool(one == other)


_NOTHING = object()
_PLAIN = (int, float, bool, str, type(None), torch.Size)
_TORCHS = frozenset(nn.Module().__dict__)
