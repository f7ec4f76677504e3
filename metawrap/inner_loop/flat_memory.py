"""A meta-gradient whose memory does not grow with inner steps: the graph of one step at a time, last step first.

The forward sweep keeps what each inner step started from, and no graph. The reverse sweep takes each step again, with a
graph, and pulls the gradient back through it: u becomes u * d(step)/d(weights), and its products with d(step)/d(rates)
and d(step)/d(others) add up. Exact, whatever the update rule: reverse accumulation with a checkpoint at every step. In
`meta_step`, where nothing depends on the order of calls, the target losses are taken on the way back too, each where
its gradient is used, so that no more of a step is kept than its weights and the state of its update rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metawrap.inner_loop.outcome import added
from metawrap.inner_loop.update_rules import State
from metawrap.snapshot.module_state import ForwardState


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
    surroundings: ForwardState


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

    def _surroundings(self) -> ForwardState:
        return ForwardState(self._modules, self._device)


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


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()
