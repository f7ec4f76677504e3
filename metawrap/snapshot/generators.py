"""Random states of python, numpy, torch and a GPU: kept, compared, and put back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Generators:
    """Random states of python, numpy and torch, of a GPU, and of the generators among some values.

    >>> before = Generators()
    >>> _ = torch.rand(1)
    >>> before.moved()
    {'torch'}
    >>> before.put_back()

    Args:
        device: a CUDA device's generator is kept too.
        held: values; those that are generators are kept too, under the name of their library.
        shared: whether the global generators are kept.

    `put_back_in_all`: how many generators were put back in this process. Draws of one thread cannot be seen in the
    state of a generator that another thread has put back.
    """

    put_back_in_all = 0
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, device: torch.device | None = None, held: Iterable[Any] = (), shared: bool = True) -> None:
        ways: list[tuple[str, Callable[[], Any], Callable[[Any], Any]]] = []
        if shared:
            ways += [("python", random.getstate, random.setstate), ("numpy", np.random.get_state, np.random.set_state)]
            ways += [("torch", torch.get_rng_state, torch.set_rng_state)]
        if device is not None and device.type == "cuda":
            read = partial(torch.cuda.get_rng_state, device)
            ways += [("device", read, lambda state: torch.cuda.set_rng_state(state, device))]
        for value in held:
            if isinstance(value, random.Random):
                ways += [("python", value.getstate, value.setstate)]
            elif isinstance(value, np.random.RandomState):
                ways += [("numpy", value.get_state, value.set_state)]
            elif isinstance(value, np.random.Generator):
                source: Any = value.bit_generator
                ways += [("numpy", partial(getattr, source, "state"), partial(setattr, source, "state"))]
            elif isinstance(value, torch.Generator):
                ways += [("torch", value.get_state, value.set_state)]
        self._kept = [(name, read, write, read()) for name, read, write in ways]

    def moved(self, now: Generators | None = None) -> set[str]:
        """Libraries whose generators have another state in `now`, at present if None."""
        present = [read() for _, read, _, _ in self._kept] if now is None else [state for *_, state in now._kept]
        return {name for (name, *_, state), new in zip(self._kept, present, strict=True) if not _same_state(state, new)}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Generators) and not self.moved(other)

    def put_back(self) -> None:
        """Sets every generator that has moved to the state that was kept."""
        for _, read, write, state in self._kept:
            if not _same_state(state, read()):
                Generators.put_back_in_all += 1
                write(state)


def _same_state(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same_state(one[key], other[key]) for key in one)
    if isinstance(one, tuple) and any(isinstance(part, np.ndarray) for part in one):
        return all(map(_same_state, one, other))
    return bool(one == other)
