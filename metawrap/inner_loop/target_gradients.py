"""Target-loss gradients taken as values, so that the graph of a target pass is freed before the next inner step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class EagerTargetGradients:
    """Computes the gradient of each target loss right after its forward pass.

    others: parameters that a target loss depends on besides the fast weights.
    direct: the gradient with respect to each of them, without the part that flows through the fast weights.
    by_step: stores the gradients of each step for the reverse sweep of flat memory.
    """

    def __init__(self, others: Sequence[Tensor], by_step: bool = False) -> None:
        self.others, self._by_step = others, by_step
        self.direct: list[Tensor | None] = [None] * len(others)
        self._of_steps: dict[int, dict[str, Tensor | None]] = {}
        self._of_fast_weights: list[tuple[Tensor, Tensor | None]] = []

    def take(self, loss: Tensor, fast: Mapping[str, Tensor], leaves: Mapping[str, Tensor], step: int) -> None:
        """Computes the gradient of a weighted target loss.

        Args:
            loss: scalar, computed on `leaves`.
            fast: the fast weights with their graph; `leaves` are the same values without it.
        """
        with hooks_removed(self.others):
            found = torch.autograd.grad(loss, [*leaves.values(), *self.others], allow_unused=True)
        gradients: dict[str, Tensor | None] = dict(zip(leaves, found, strict=False))
        if self._by_step:
            self._of_steps[step] = gradients
        else:
            self._of_fast_weights += ((fast[name], gradient) for name, gradient in gradients.items())
        self.direct = [added(old, new) for old, new in zip(self.direct, found[len(leaves) :], strict=True)]

    def of_step(self, step: int) -> dict[str, Tensor | None]:
        """The gradient with respect to the fast weights after one step; removes it from the store."""
        return self._of_steps.pop(step, {})

    def pairs(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Each tensor that a target loss was computed from, with its gradient."""
        yield from self._of_fast_weights
        yield from zip(self.others, self.direct, strict=True)


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
