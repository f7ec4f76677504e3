"""A meta-gradient whose memory does not grow with inner steps: the graph of one step at a time, last step first.

The forward sweep keeps what each inner step started from, and no graph. The reverse sweep takes each step again, with a
graph, and pulls the gradient back through it: u becomes u * d(step)/d(weights), and its products with d(step)/d(rates)
and d(step)/d(others) add up. Exact, whatever the update rule: reverse accumulation with a checkpoint at every step.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metawrap.engines.inner_optimizer import State
from metawrap.layers.per_step_norm import PerStepNorm
from metawrap.methods.solved import added

_TABLES = ("_parameters", "_buffers", "_modules")


class Judge:
    """Takes the gradient of each target loss at once, as values, so that its graph is freed before the next step.

    others: parameters that a target loss may depend on besides the fast weights. direct: the gradient of each of them,
    past the fast weights. With `rows` it keeps no more than values; without, also what the fast weights came from.
    """

    def __init__(self, others: Sequence[Tensor], rows: Rows | None = None) -> None:
        self.others, self._rows = others, rows
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
        if self._rows is not None:
            gradients = self._rows.kept(step, gradients)
        else:
            self._judged += ((fast[name], g) for name, g in gradients.items())
        self._taken[step] = gradients
        self.direct = [added(old, new) for old, new in zip(self.direct, found[len(leaves) :], strict=True)]

    def of_step(self, step: int) -> dict[str, Tensor | None]:
        """The gradient with respect to the fast weights after that step."""
        return self._taken.get(step, {})

    def pairs(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Each tensor that a target loss was computed from, with its gradient."""
        yield from self._judged
        yield from zip(self.others, self.direct, strict=True)


class Rows:
    """The values of all steps, in memory that is taken once for all of them.

    Small blocks that stay, taken one by one between large ones that go, tear the memory of a process to pieces.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._rows: dict[str, Tensor] = {}

    def kept(self, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values as this step's rows; what is not an ordinary tensor stays as it is."""
        return {name: self._row(name, step, value) for name, value in values.items()}

    def _row(self, name: str, step: int, value: Any) -> Any:
        if value is None or value.layout != torch.strided:
            return value
        if name not in self._rows:
            self._rows[name] = value.new_empty((self._steps, *value.shape))
        rows = self._rows[name]
        return rows[step].copy_(value.detach()) if rows.dtype == value.dtype else value


@dataclass
class _Start:
    """What an inner step started from."""

    fast: Mapping[str, Tensor]
    state: State
    surroundings: _Surroundings


@dataclass
class Tape:
    """What every inner step of one task started from."""

    model: nn.Module
    device: torch.device
    rows: Rows
    starts: list[_Start] = field(default_factory=list)

    def remember(self, fast: Mapping[str, Tensor], state: State) -> None:
        """Called before each inner step."""
        kept = self.rows.kept(len(self.starts), fast)
        self.starts.append(_Start(kept, state, _Surroundings(self.model, self.device)))

    @contextmanager
    def replayed(self, step: int) -> Iterator[tuple[dict[str, Tensor], State]]:
        """Random state, buffers and plain attributes as they were before that step; yields its weights as leaves.

        All is put back afterwards: a replay is no call.
        """
        start, present = self.starts[step], _Surroundings(self.model, self.device)
        try:
            start.surroundings.restore(copies=True)
            yield {name: _leaf(weight) for name, weight in start.fast.items()}, _leaves_of(start.state)
        finally:
            present.restore(copies=False)


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


def _leaves_of(state: State) -> dict[str, dict[str, Any]]:
    """The state with its tensors as leaves of a graph."""
    return {
        name: {key: _leaf(value) if isinstance(value, Tensor) else value for key, value in values.items()}
        for name, values in state.items()
    }


def tensors_of(state: State) -> dict[Any, Tensor]:
    """The tensors of a state, by pairs of parameter name and key."""
    return {
        (name, key): value
        for name, values in state.items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


class _Surroundings:
    """Everything besides the weights that a forward pass may read and change."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        self._random = (random.getstate(), np.random.get_state(), torch.get_rng_state())
        self._on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        modules = list(model.modules())
        # Per-step norms see the batch in training; their statistics are folded as values, after the step.
        self._buffers = [
            (m, name, buffer, None if buffer is None else buffer.clone())
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
        for module, name, buffer, value in self._buffers:
            module._buffers[name] = value if copies else buffer
        for module, attributes in self._attributes:
            for name in module.__dict__.keys() - attributes.keys() - set(_TABLES):
                del module.__dict__[name]
            module.__dict__.update(attributes)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()
