"""A meta-gradient whose memory does not grow with inner steps: the graph of one step at a time, last step first.

The forward sweep stores where each inner step started, and no graph. The reverse sweep repeats each step with a graph
and pulls the gradient u back through it: u becomes u * d(step)/d(weights), and its products with d(step)/d(rates),
d(step)/d(others) and d(step)/d(inputs) are summed. This is reverse accumulation with a checkpoint at every step; it is
exact for any update rule. Where the order of passes does not matter, each target loss waits until the reverse sweep
uses its gradient, so that a step stores only its weights and the state of its update rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metawrap.inner_loop.inner_loop import (
    EagerTargetGradients,
    FastWeights,
    GradientSums,
    InnerLoop,
    Point,
    Unrolled,
    added,
    as_leaf,
    as_leaves,
    weighted_sum,
    with_gradients,
)
from metawrap.inner_loop.update_rules import OptimizerState
from metawrap.layers.step_clock import Moments
from metawrap.snapshot.module_state import ForwardState
from metawrap.tasks import tensors_in


class DisturbedError(Exception):
    """Passes or tasks that ran at the same time, or in another order, were not independent."""


def unrolled_flat(
    loop: InnerLoop,
    start: FastWeights,
    weights: Sequence[float],
    *,
    learned_by_update: Sequence[Tensor],
    learned_besides: Sequence[Tensor],
    modules: Iterable[nn.Module],
    device: torch.device,
    in_order: bool,
    whole_graph: bool,
) -> Unrolled:
    """As `unrolled`, with the graph of one inner step at a time; the loss is differentiable once.

    Args:
        learned_by_update: parameters of the inner update alone: rates, or an update network.
        learned_besides: parameters that a target loss depends on besides the fast weights.
        modules: every module that a pass runs.
        in_order: computes each target loss right after its inner step, as `unrolled` does.
        whole_graph: the loss is also differentiable with respect to what is not the learner's: the task's tensors, and
            through them the networks in front, and tensors that the model or the loss reads from elsewhere.
    Raises:
        DisturbedError: a pass changed something, so that the order of passes matters.
    """
    # As leaves: the graph in front of the task must be passed once, for the sums of all steps.
    given, task = loop.task, loop.task.map(lambda tensor: as_leaf(tensor) if tensor.requires_grad else tensor)
    pairs = zip(*map(tensors_in, (given.parts(), task.parts())), strict=True)
    inputs = [(tensor, leaf) for tensor, leaf in pairs if tensor.requires_grad and whole_graph]
    others = GradientSums([*learned_by_update, *learned_besides, *(leaf for _, leaf in inputs)], outside=whole_graph)
    eager = EagerTargetGradients(others, by_step=True)
    loop = replace(loop, task=task, eager=eager)
    forward = replace(loop, differentiable=False, second_order=False)
    again = replace(loop, moments=None)
    checkpoints = StepCheckpoints(modules, device, len(weights))
    last = len(weights) - 1
    losses: list[Tensor | None] = [None] * len(weights)
    # Steps whose target loss waits for the reverse sweep, each with the place of its statistics among the moments.
    waiting: dict[int, int] = {}
    point = Point(start, {})
    for step, weight in enumerate(weights):
        point = next(forward.inner_steps(checkpoints.begin(point), [loop.task], step))
        if weight and (in_order or step == last):
            prediction, losses[step] = loop.target_loss(point.fast, step, weight)
        elif weight:
            waiting[step] = len(loop.moments or ())
    fast = point.fast

    behind: dict[Any, Tensor | None] = {}
    for step in reversed(range(len(weights))):
        if step in waiting:
            seen: list[Moments] = []
            own = replace(loop, moments=None if loop.moments is None else seen)
            _, losses[step] = own.target_loss(checkpoints.weights_after(step), step, weights[step])
            if loop.moments is not None:
                loop.moments[waiting[step] : waiting[step]] = seen
        for name, gradient in eager.of_step(step).items():
            behind[name] = added(behind.get(name), gradient)
        with checkpoints.restored(step) as before:
            after = next(again.inner_steps(before, [loop.task], step))
        behind = pulled_through(before, after, behind, others)
        # Frees this step's graph before the next one is built.
        del before, after
    if waiting and (disturbed := checkpoints.taken_back()):
        raise DisturbedError(disturbed)
    total = weighted_sum(losses, weights)
    given_as = {id(leaf): tensor for tensor, leaf in inputs}
    found = [(start[name], behind[name]) for name in start]
    found += ((given_as.get(id(tensor), tensor), gradient) for tensor, gradient in others.pairs())
    return Unrolled(with_gradients(total.sum(), found), total, losses, prediction, fast)


class StepCheckpoints:
    """Where each inner step of one task started: its weights, the optimizer's state, and what a pass may read.

    Args:
        modules: every module that a pass runs. steps: how many inner steps there will be.
    """

    def __init__(self, modules: Iterable[nn.Module], device: torch.device, steps: int) -> None:
        self._modules, self._device, self._steps = list(modules), device, steps
        self._rows: dict[str, Tensor] = {}
        self._first = self._present()
        self._checkpoints: list[_Checkpoint] = []
        self._in_use: list[tuple[Tensor, int]] = []
        self._edited = False

    def begin(self, point: Point) -> Point:
        """Stores where the next inner step starts; returns it as leaves, without its graph."""
        self._note_edits()
        present = self._present()
        kept = self._checkpoints[-1].surroundings if self._checkpoints else self._first
        # Copies: a forward pass may edit its weights. One snapshot of the rest serves all steps if nothing changes.
        stored = {name: self._copy(name, weight.detach()) for name, weight in point.fast.items()}
        surroundings = present if kept.difference(present) else kept
        self._checkpoints.append(_Checkpoint(Point(stored, point.state), surroundings))
        leaves = _as_leaves(point)
        self._in_use = [(weight, weight._version) for weight in leaves.fast.values()]
        return leaves

    def weights_after(self, step: int) -> FastWeights:
        """The fast weights after an inner step that is not the last."""
        return self._checkpoints[step + 1].point.fast

    @contextmanager
    def restored(self, step: int) -> Iterator[Point]:
        """Random state, buffers and attributes as they were before a step; yields the point where it started.

        The present state is restored afterwards. The checkpoints of later steps are dropped.
        """
        checkpoint, present = self._checkpoints[step], self._present()
        del self._checkpoints[step + 1 :]
        try:
            checkpoint.surroundings.restore(copies=True)
            yield _as_leaves(checkpoint.point)
        finally:
            present.restore(copies=False)

    def taken_back(self) -> str | None:
        """What the passes changed since the first step began, in words, or None.

        Restores random state and attributes. The caller restores buffer values before it repeats the passes.
        """
        self._note_edits()
        changed = "forward edits its weights" if self._edited else self._first.difference(self._present())
        if changed:
            self._first.restore(copies=False)
        return changed

    def _copy(self, name: str, weight: Tensor) -> Tensor:
        """A copy in a block of memory for all steps: small blocks that stay between freed ones fragment the heap."""
        if weight.layout != torch.strided:
            return weight.clone()
        if name not in self._rows:
            self._rows[name] = weight.new_empty((self._steps, *weight.shape))
        row = self._rows[name][len(self._checkpoints)]
        return row.copy_(weight) if row.dtype == weight.dtype and row.shape == weight.shape else weight.clone()

    def _note_edits(self) -> None:
        self._edited = self._edited or any(weight._version != version for weight, version in self._in_use)
        self._in_use = []

    def _present(self) -> ForwardState:
        return ForwardState(self._modules, self._device)


class _Checkpoint(NamedTuple):
    point: Point
    surroundings: ForwardState


def pulled_through(
    before: Point, after: Point, behind: Mapping[Any, Tensor | None], others: GradientSums
) -> dict[Any, Tensor | None]:
    """The gradient before an inner step from the gradient after it; the step's own part in `others` is added there.

    Keys are names of fast weights and, for tensors of an optimizer's state, pairs of parameter name and key.
    """
    inputs: dict[Any, Tensor] = before.fast | _tensors_of(before.state)
    outputs: dict[Any, Tensor] = after.fast | _tensors_of(after.state)
    reached = [key for key in outputs if behind.get(key) is not None]
    wanted = [behind[key] for key in reached]
    return dict(zip(inputs, others.take([outputs[key] for key in reached], list(inputs.values()), wanted), strict=True))


def _as_leaves(point: Point) -> Point:
    state = {
        name: {key: as_leaf(value) if isinstance(value, Tensor) else value for key, value in values.items()}
        for name, values in point.state.items()
    }
    return Point(as_leaves(point.fast), state)


def _tensors_of(state: OptimizerState) -> dict[Any, Tensor]:
    return {
        (name, key): value
        for name, values in state.items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }
