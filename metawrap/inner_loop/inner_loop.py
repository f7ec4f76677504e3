"""THE DATA PATH of gradient-based meta-learning, from a task to its weighted target loss.

task -> initial fast weights -> inner step (support loss, gradient, update with the rate of this tensor and step)
     -> target loss after each inner step -> weighted sum over the steps

Read `unrolled` first: it draws the path. `InnerLoop.inner_steps` is the only forward inner loop of the package:
training, evaluation, `adapt`, flat memory, Reptile, ANIL's head and `find_trouble` consume it. Several tasks of one
shape may go through it as one stack: fast weights, inputs, predictions and losses then have a leading task axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metawrap.engines import Engine
from metawrap.engines.calling import autograd, dense, leaves_behind
from metawrap.inner_loop.masking import Mask
from metawrap.inner_loop.update_rules import InnerOptimizer, OptimizerState, clipped
from metawrap.layers.norm_policies import PASSES, Passes, Statistics
from metawrap.layers.step_clock import Moments, StepClock
from metawrap.tasks import Inputs, Task, map_tensors

FastWeights = dict[str, Tensor]
TaskLoss = Callable[..., Tensor]


class Point(NamedTuple):
    """Where an inner loop stands: fast weights by parameter name, and the state of the inner optimizer."""

    fast: FastWeights
    state: OptimizerState


@dataclass(frozen=True)
class InnerLoop:
    """The inner loop of one task, or of a stack of tasks; made for one call and used once.

    engine: runs the module; it takes a task axis where the task has one.
    loss: `loss(prediction, y, part)` to a scalar; `part` names the examples in errors.
    rates: a row of learning rates for each step, by parameter name; the last row serves all later steps.
    passes: the statistics that normalise in each pass.
    differentiable: the fast weights keep the graph back to where they started.
    second_order: the inner gradients keep their graph, too.
    max_norm, max_value: clipping of the inner gradient.
    moments: the statistics that the norms saw are appended here; None records nothing.
    mask: of the outputs of classes that the task lacks; None masks nothing.
    eager: computes target-loss gradients eagerly; None leaves them to autograd.
    losses_in: the mode of the model for passes that a loss is taken of; None takes losses and predictions in one pass.
    """

    task: Task
    engine: Engine
    optimizer: InnerOptimizer
    rates: Mapping[str, Sequence[Tensor]]
    loss: TaskLoss
    clock: StepClock = field(default_factory=StepClock)
    stacked: bool = False
    passes: Passes = PASSES["batch"]
    differentiable: bool = False
    second_order: bool = False
    max_norm: float | None = None
    max_value: float | None = None
    moments: list[Moments] | None = None
    mask: Mask | None = None
    eager: EagerTargetGradients | None = None
    clone_inputs: bool = False
    examples: str = "support"
    losses_in: Callable[[], AbstractContextManager[None]] | None = None

    def inner_steps(self, start: Point, support: Iterable[Task], first: int = 0) -> Iterator[Point]:
        """Yields the point after each inner step.

        Args:
            start: where the first step begins.
            support: the task whose support set each step is taken on; one item is one step.
            first: index of the first step, from 0.
        """
        point = start
        for step, task in enumerate(support, first):
            point = self._updated(point, *self._support_gradient(point.fast, task, step), step)
            yield point

    def adapted(self, start: Point, steps: int) -> Point:
        """The point after so many inner steps on the task's support set; earlier points are freed."""
        point = start
        for point in self.inner_steps(start, repeat(self.task, steps)):  # noqa: B007
            pass
        return point

    def _support_gradient(self, fast: FastWeights, task: Task, step: int) -> tuple[Sequence[Tensor | None], Tensor]:
        with autograd(True):
            loss = self.support_loss(fast, task, step)
            # With respect to the fast weights alone: any other parameter would lead back through all earlier steps.
            # Of the sum over a stack: the loss of each task depends on its own fast weights alone.
            found = torch.autograd.grad(
                loss.sum(), tuple(fast.values()), create_graph=self.second_order, allow_unused=True
            )
        return found, loss

    def support_loss(self, fast: FastWeights, task: Task, step: int) -> Tensor:
        """The loss on a task's support set at an inner step: a scalar, or (tasks,) for a stack."""
        with self.losses_in() if self.losses_in else nullcontext():
            prediction = self.predict(fast, task.support_x, step, self.passes.support, twice=self.second_order)
        return self._judged(prediction, task.support_y, self.examples)[1]

    def embedded(self, fast: FastWeights, head: str) -> Tensor:
        """The input of the module `head` on the support set, its norms as in the first inner step; not recorded."""
        inputs = map_tensors(self.task.support_x, Tensor.clone) if self.clone_inputs else self.task.support_x
        with self.losses_in() if self.losses_in else nullcontext(), self.clock.at(0, self.passes.support):
            found: Tensor = self.engine.call(fast, inputs, head=head)
        return found

    def _updated(self, point: Point, gradients: Sequence[Tensor | None], losses: Tensor, step: int) -> Point:
        fast = point.fast
        rates = {name: rows[min(step, len(rows) - 1)] for name, rows in self.rates.items()}
        with autograd(self.differentiable):
            named = {name: None if g is None else dense(g) for name, g in zip(fast, gradients, strict=True)}
            # An update rule treats a complex entry as two real numbers, as torch's optimizers do.
            pairs = {name: torch.view_as_real(weight) for name, weight in fast.items() if weight.is_complex()}
            named |= {name: torch.view_as_real(g) for name in pairs if (g := named[name]) is not None}
            named = clipped(named, self.max_norm, self.max_value, self.stacked)
            updated, state = self.optimizer.step({**fast, **pairs}, named, rates, losses, point.state)
            updated |= {name: torch.view_as_complex(updated[name]) for name in pairs}
        return Point(updated if self.differentiable else as_leaves(updated), state)

    def target_loss(self, fast: FastWeights, step: int, weight: float = 1.0) -> tuple[Any, Tensor]:
        """Prediction on the target set after an inner step, and its loss: a scalar, or (tasks,) for a stack.

        Args:
            weight: of this step in the meta-loss; scales the gradient that `eager` takes.
        """
        if self.losses_in is not None:
            with self.losses_in():
                _, loss = replace(self, losses_in=None).target_loss(fast, step, weight)
            prediction = self._predict_target(fast, step)
            return prediction if self.mask is None else self.mask.masked(prediction, self.task.target_y), loss
        if self.eager is None:
            return self._judged(self._predict_target(fast, step), self.task.target_y, "target")
        leaves = as_leaves(fast)
        with autograd(True):
            prediction, loss = self._judged(self._predict_target(leaves, step), self.task.target_y, "target")
            self.eager.take((weight * loss).sum(), fast, leaves, step)
        return prediction, loss.detach()

    def _predict_target(self, fast: FastWeights, step: int) -> Any:
        if self.passes.context is not None:
            # The context pass is recorded in place of the target pass, which has no statistics of its own.
            self.predict(fast, self.task.support_x, step, self.passes.context)
        return self.predict(fast, self.task.target_x, step, self.passes.target)

    def predict(self, fast: FastWeights, inputs: Inputs, step: int, statistics: Statistics, twice: bool = False) -> Any:
        """Prediction of the user's module with fast weights, its norms at this step's row."""
        if self.clone_inputs:
            inputs = map_tensors(inputs, Tensor.clone)
        with self.clock.at(step, statistics, self.moments):
            return self.engine.call(fast, inputs, twice)

    def _judged(self, prediction: Any, y: Any, part: str) -> tuple[Any, Tensor]:
        """The prediction, masked if there is a `mask`, and its loss."""
        loss = partial(self.loss, part=part)
        if self.mask is not None:
            return self.mask.judged(prediction, y, loss)
        return prediction, self.engine.each(loss, prediction, y)


@dataclass
class Unrolled:
    """Result of an inner loop and its target losses.

    loss: scalar with its graph; the sum over tasks of a stack.
    losses: the weighted loss of each task, (tasks,) for a stack, else a scalar.
    step_losses: the target loss after each inner step, shaped as `losses`; None where it was not computed.
    fast: the last fast weights.
    """

    loss: Tensor
    losses: Tensor
    step_losses: list[Tensor | None]
    prediction: Any
    fast: FastWeights


def unrolled(loop: InnerLoop, start: FastWeights, weights: Sequence[float]) -> Unrolled:
    """Runs one inner step for each weight, and the weighted target losses.

    Args:
        start: initial fast weights.
        weights: weight of the target loss after each inner step; a loss of weight 0 is not computed. Without weights
            no step is taken, and the initial weights are judged.
    """
    step_losses: list[Tensor | None] = [None] * len(weights)
    fast = start
    points = loop.inner_steps(Point(start, {}), repeat(loop.task, len(weights)))
    for step, (weight, (fast, _)) in enumerate(zip(weights, points, strict=True)):
        if weight:
            prediction, step_losses[step] = loop.target_loss(fast, step, weight)
    if weights:
        losses = weighted_sum(step_losses, weights)
    else:
        prediction, losses = loop.target_loss(fast, 0)
    total = losses.sum()
    if loop.eager is not None:
        total = with_gradients(total, loop.eager.pairs())
    return Unrolled(total, losses, step_losses, prediction, fast)


def weighted_sum(losses: Sequence[Tensor | None], weights: Sequence[float]) -> Tensor:
    """The weighted sum over steps; a loss that was not computed has no weight."""
    return torch.stack([w * loss for w, loss in zip(weights, losses, strict=True) if loss is not None]).sum(0)


class GradientSums:
    """Sums of gradients, from several backward passes, of the tensors that losses depend on besides the fast weights.

    Args:
        tensors: the tensors.
        outside: also every other leaf in a graph, such as a parameter that a loss function reads from a closure.
    """

    def __init__(self, tensors: Iterable[Tensor], outside: bool = False) -> None:
        self._sums: dict[int, tuple[Tensor, Tensor | None]] = {id(tensor): (tensor, None) for tensor in tensors}
        self._outside = outside

    def take(
        self, outputs: Sequence[Tensor], own: Sequence[Tensor], gradients: Sequence[Tensor | None] | None = None
    ) -> tuple[Tensor | None, ...]:
        """The gradient of outputs with respect to `own`; that with respect to the tensors is added to the sums.

        Args:
            gradients: of each output; 1 if None.
        """
        if self._outside:
            known = {id(tensor) for tensor in own} | self._sums.keys()
            self._sums |= {id(leaf): (leaf, None) for leaf in leaves_behind(outputs) if id(leaf) not in known}
        tensors = [tensor for tensor, _ in self._sums.values()]
        # The graph between two outside tensors may serve several passes.
        again = self._outside or None
        with hooks_removed(tensors):
            found = torch.autograd.grad(outputs, [*own, *tensors], gradients, allow_unused=True, retain_graph=again)
        for tensor, gradient in zip(tensors, found[len(own) :], strict=True):
            self._sums[id(tensor)] = tensor, added(self._sums[id(tensor)][1], gradient)
        return found[: len(own)]

    def pairs(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Each tensor with the sum of its gradients."""
        yield from self._sums.values()


class EagerTargetGradients:
    """Computes the gradient of each target loss right after its forward pass.

    Args:
        others: sums of gradients of what a target loss depends on besides the fast weights, without the part that flows
            through the fast weights.
        by_step: stores the gradients of each step for the reverse sweep of flat memory.
    """

    def __init__(self, others: GradientSums, by_step: bool = False) -> None:
        self._others, self._by_step = others, by_step
        self._of_steps: dict[int, dict[str, Tensor | None]] = {}
        self._of_fast_weights: list[tuple[Tensor, Tensor | None]] = []

    def take(self, loss: Tensor, fast: Mapping[str, Tensor], leaves: Mapping[str, Tensor], step: int) -> None:
        """Computes the gradient of a weighted target loss.

        Args:
            loss: scalar, computed on `leaves`.
            fast: the fast weights with their graph; `leaves` are the same values without it.
        """
        gradients = dict(zip(leaves, self._others.take([loss], list(leaves.values())), strict=True))
        if self._by_step:
            self._of_steps[step] = gradients
        else:
            self._of_fast_weights += ((fast[name], gradient) for name, gradient in gradients.items())

    def of_step(self, step: int) -> dict[str, Tensor | None]:
        """The gradient with respect to the fast weights after one step; removes it from the store."""
        return self._of_steps.pop(step, {})

    def pairs(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Each tensor that a target loss was computed from, with its gradient."""
        yield from self._of_fast_weights
        yield from self._others.pairs()


def as_leaves(fast: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values without their graph, as leaves that require a gradient."""
    return {name: as_leaf(weight) for name, weight in fast.items()}


def as_leaf(tensor: Tensor) -> Tensor:
    """The same values without their graph, as a leaf that requires a gradient."""
    return tensor.detach().requires_grad_()


def with_gradients(value: Tensor, pairs: Iterable[tuple[Tensor, Tensor | None]]) -> Tensor:
    """The value, with a given gradient for each given tensor; differentiable once.

    Args:
        pairs: tensors with their gradients; None and tensors that require no gradient are left out.
    """
    present = [(tensor, g) for tensor, g in pairs if g is not None and tensor.requires_grad]
    return _WithGradients.apply(value, [g for _, g in present], *(tensor for tensor, _ in present))  # type: ignore[no-any-return]


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> Any:
        return None, None, *(outer * gradient for gradient in ctx.gradients)


def added(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """The sum of two gradients; None counts as zero."""
    if old is None or new is None:
        return new if old is None else old
    return old + new


@contextmanager
def hooks_removed(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Removes the gradient hooks of the tensors for a while: a hook is due once, for the whole gradient."""
    hooked = [(tensor, tensor._backward_hooks) for tensor in tensors if tensor._backward_hooks]
    try:
        for tensor, _ in hooked:
            tensor._backward_hooks = None
        yield
    finally:
        for tensor, hooks in hooked:
            tensor._backward_hooks = hooks
