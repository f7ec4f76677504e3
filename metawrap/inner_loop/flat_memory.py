"""A meta-gradient whose memory does not grow with inner steps: the graph of one step at a time, last step first.

The forward sweep keeps what each inner step started from, and no graph. The reverse sweep takes each step again, with a
graph, and pulls the gradient back through it: u becomes u * d(step)/d(weights), and its products with d(step)/d(rates)
and d(step)/d(others) add up. Exact, whatever the update rule: reverse accumulation with a checkpoint at every step. In
`meta_step`, where nothing depends on the order of calls, the target losses are taken on the way back too, each where
its gradient is used, so that no more of a step is kept than its weights and the state of its update rule.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metawrap.engines.calling import same_value
from metawrap.inner_loop.outcome import added
from metawrap.inner_loop.update_rules import State
from metawrap.layers.per_step_norm import PerStepNorm

_TABLES = ("_parameters", "_buffers", "_modules")


class Judge:
    """Takes the gradient of each target loss at once, as values, so that its graph is freed before the next step.

    others: parameters that a target loss may depend on besides the fast weights. direct: the gradient of each of them,
    past the fast weights. With `by_step` a step's gradient is kept for who goes back through the steps; without, for
    the graph that the fast weights came from.
    """

    def __init__(self, others: Sequence[Tensor], by_step: bool = False) -> None:
        self.others, self._by_step = others, by_step
        self.direct: list[Tensor | None] = [None] * len(others)
        self._taken: dict[int, dict[str, Tensor | None]] = {}
        self._judged: list[tuple[Tensor, Tensor | None]] = []

    @staticmethod
    def apart(fast: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The fast weights, cut from what they came from."""
        return {name: _leaf(weight) for name, weight in fast.items()}

    def take(self, loss: Tensor, fast: Mapping[str, Tensor], leaves: Mapping[str, Tensor], step: int) -> None:
        """Takes the gradient of a weighted target loss that was computed on `leaves`."""
        with without_hooks(self.others):
            found = torch.autograd.grad(loss, [*leaves.values(), *self.others], allow_unused=True)
        gradients: dict[str, Tensor | None] = dict(zip(leaves, found, strict=False))
        if self._by_step:
            self._taken[step] = gradients
        else:
            self._judged += ((fast[name], g) for name, g in gradients.items())
        self.direct = [added(old, new) for old, new in zip(self.direct, found[len(leaves) :], strict=True)]

    def of_step(self, step: int) -> dict[str, Tensor | None]:
        """The gradient with respect to the fast weights after that step; forgets it."""
        return self._taken.pop(step, {})

    def pairs(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Each tensor that a target loss was computed from, with its gradient."""
        yield from self._judged
        yield from zip(self.others, self.direct, strict=True)


Point = tuple[dict[str, Tensor], State]
"""Fast weights, and the state of the inner optimizer."""


@dataclass
class _Start:
    """What an inner step started from."""

    point: Point
    surroundings: _Surroundings


class Tape:
    """What every inner step of one task started from.

    roots: the modules that a pass runs, the loss if it is one. steps: how many there will be.
    """

    def __init__(self, roots: Iterable[nn.Module], device: torch.device, steps: int) -> None:
        self._steps, self._rows = steps, dict[str, Tensor]()
        self._modules, self._device = [module for root in roots for module in root.modules()], device
        self._first = self._surroundings()
        self._starts: list[_Start] = []
        self._in_use: list[tuple[Tensor, int]] = []
        self._edited = False

    def begin(self, fast: Mapping[str, Tensor], state: State) -> Point:
        """Called before each inner step; where it is to start from, cut from what came before."""
        self._look_for_edits()
        present = self._surroundings()
        kept = self._starts[-1].surroundings if self._starts else self._first
        # Copies: a forward pass may edit its weights. Most models leave nothing else behind, and one snapshot then
        # stands for all steps.
        start = {name: self._copy(name, weight.detach()) for name, weight in fast.items()}
        self._starts.append(_Start((start, state), present if kept.difference(present) else kept))
        point = _leaves(fast, state)
        self._in_use = [(weight, weight._version) for weight in point[0].values()]
        return point

    def weights_after(self, step: int) -> dict[str, Tensor]:
        """The fast weights behind an inner step that is not the last."""
        return self._starts[step + 1].point[0]

    @contextmanager
    def replayed(self, step: int) -> Iterator[Point]:
        """Random state, buffers and plain attributes as they were before that step; yields where it started from.

        All is put back afterwards: a replay is no call. Forgets the steps behind it.
        """
        start, present = self._starts[step], self._surroundings()
        del self._starts[step + 1 :]
        try:
            start.surroundings.restore(copies=True)
            yield _leaves(*start.point)
        finally:
            present.restore(copies=False)

    def taken_back(self) -> str | None:
        """What the passes have changed since the first step began, in words, or None.

        Puts random state and attributes back; the values of buffers whoever runs the passes again puts back.
        """
        self._look_for_edits()
        changed = "forward edits its weights" if self._edited else self._first.difference(self._surroundings())
        if changed:
            self._first.restore(copies=False)
        return changed

    def _copy(self, name: str, weight: Tensor) -> Tensor:
        """In memory that is taken once for all steps: blocks that stay, between such that go, tear it to pieces."""
        if weight.layout != torch.strided:
            return weight.clone()
        if name not in self._rows:
            self._rows[name] = weight.new_empty((self._steps, *weight.shape))
        row = self._rows[name][len(self._starts)]
        return row.copy_(weight) if row.dtype == weight.dtype and row.shape == weight.shape else weight.clone()

    def _look_for_edits(self) -> None:
        self._edited = self._edited or any(weight._version != version for weight, version in self._in_use)
        self._in_use = []

    def _surroundings(self) -> _Surroundings:
        return _Surroundings(self._modules, self._device)


def pulled_through(
    before: Point, after: Point, behind: Mapping[Any, Tensor | None], others: Sequence[Tensor]
) -> tuple[dict[Any, Tensor | None], tuple[Tensor | None, ...]]:
    """The gradient before an inner step from that behind it, and the step's own part in that of the others.

    By names of fast weights, and of the tensors of a state by pairs of parameter name and key.
    """
    inputs: dict[Any, Tensor] = before[0] | _tensors_of(before[1])
    outputs: dict[Any, Tensor] = after[0] | _tensors_of(after[1])
    reached = [key for key in outputs if behind.get(key) is not None]
    with without_hooks(others):
        found = torch.autograd.grad(
            [outputs[key] for key in reached],
            [*inputs.values(), *others],
            [behind[key] for key in reached],
            allow_unused=True,
        )
    return dict(zip(inputs, found, strict=False)), found[len(inputs) :]


@contextmanager
def without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Takes off the hooks on the tensors' gradients for a while: they belong to the whole, not to each part of it."""
    hooked = [(tensor, tensor._backward_hooks) for tensor in tensors if tensor._backward_hooks]
    try:
        for tensor, _ in hooked:
            tensor._backward_hooks = None
        yield
    finally:
        for tensor, hooks in hooked:
            tensor._backward_hooks = hooks


def _leaves(fast: Mapping[str, Tensor], state: State) -> Point:
    """The same values, as leaves of a graph."""
    return {name: _leaf(weight) for name, weight in fast.items()}, {
        name: {key: _leaf(value) if isinstance(value, Tensor) else value for key, value in values.items()}
        for name, values in state.items()
    }


def _tensors_of(state: State) -> dict[Any, Tensor]:
    return {
        (name, key): value
        for name, values in state.items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


class _Surroundings:
    """Everything besides the weights that a forward pass may read and change."""

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        self._device = device
        self._random = (random.getstate(), np.random.get_state(), torch.get_rng_state())
        self._on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        # Per-step norms see the batch in training; their statistics are folded as values, after the step.
        self._buffers = [
            (m, name, buffer, None if buffer is None else (buffer.clone(), buffer._version))
            for m in modules
            if not isinstance(m, PerStepNorm)
            for name, buffer in m._buffers.items()
        ]
        self._attributes = [(m, {k: v for k, v in m.__dict__.items() if k not in _TABLES}) for m in modules]

    def restore(self, copies: bool) -> None:
        """Puts all back: the buffers' values as copies, for a pass that may edit them, or the buffers themselves."""
        state, numpy_state, torch_state = self._random
        random.setstate(state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if self._on_device is not None:
            torch.cuda.set_rng_state(self._on_device, self._device)
        for module, name, buffer, kept in self._buffers:
            module._buffers[name] = kept[0].clone() if copies and kept else buffer
        for module, attributes in self._attributes:
            for name in module.__dict__.keys() - attributes.keys() - set(_TABLES):
                del module.__dict__[name]
            module.__dict__.update(attributes)

    def difference(self, other: _Surroundings) -> str | None:
        """What differs, in words, or None. Does not wait for a GPU: there, an edit shows by the buffer's version."""
        ours, theirs = self._random, other._random
        same = ours[0] == theirs[0] and _equal_states(ours[1], theirs[1]) and torch.equal(ours[2], theirs[2])
        if not same or not _same_bytes(self._on_device, other._on_device):
            return "it draws random numbers, which come in the order of the calls"
        if len(self._buffers) != len(other._buffers):
            return "forward adds or removes a buffer"
        for (_, name, buffer, kept), (_, other_name, present, value) in zip(self._buffers, other._buffers, strict=True):
            if name != other_name or buffer is not present or not _same_buffer(kept, value):
                return f"forward edits the buffer '{name}'"
        for (module, before), (_, after) in zip(self._attributes, other._attributes, strict=True):
            for name in before.keys() | after.keys():
                # A recurrent module caches its weights; the engine puts the cache right after each call.
                if isinstance(module, nn.RNNBase) and name.startswith("_flat_weight"):
                    continue
                if not _same_attribute(before.get(name, _MISSING), after.get(name, _MISSING)):
                    return f"forward changes the attribute '{name}'"
        return None


_MISSING = object()
_PLAIN = (bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)


def _same_attribute(one: Any, other: Any) -> bool:
    """Whether it is the same object, or a plain value that is equal."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same_attribute, one, other))
    return one is other or (type(one) is type(other) and isinstance(one, _PLAIN) and one == other)


def _equal_states(one: Any, other: Any) -> bool:
    """Whether two states of numpy's generator are equal."""
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def _same_bytes(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _same_buffer(one: tuple[Tensor, int] | None, other: tuple[Tensor, int] | None) -> bool:
    if one is None or other is None:
        return one is other
    return one[1] == other[1] and (one[0].device.type != "cpu" or same_value(one[0], other[0]))


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()
