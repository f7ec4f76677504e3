"""Softmax regression as a differentiable function: Newton's method, each step by conjugate gradients.

With X (examples, numbers + 1), whose last column is ones, one-hot Y (examples, ways) and P = softmax(X W^T), the
solution W (ways, numbers + 1) is where the gradient of  sum_i CE(X W^T, Y) + strength |W'|^2 / 2  is zero:

    g(W, X) = (P - Y)^T X + strength W' = 0,   with W' = W, its last column set to 0.

The derivative of the solution is that of this condition: dW = -H^-1 dg, with H the second derivative of the objective.
Adding the same row to all rows of W changes no probability; the solution is the one whose rows add up to 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metawrap.errors import MetaWrapError

_STEPS = 100
# Of a gradient's entries, in units of its largest possible entry, the number of examples.
_PRECISION = 1e-11
Product = Callable[[Tensor], Tensor]


def softmax_regression(inputs: Tensor, targets: Tensor, strength: float) -> Tensor:
    """The solution: (examples, numbers), one-hot (examples, ways) to (ways, numbers + 1), the last column the bias.

    Works in double precision on the CPU, whatever the inputs are. Not finite where the inputs are not.

    Raises:
        MetaWrapError: the solution was not found to the precision of a gradient.
    """
    x, y = inputs.to("cpu", torch.float64), targets.detach().to("cpu", torch.float64)
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    if not bool(torch.isfinite(x).all()):
        return (targets.T @ torch.cat([inputs, inputs[:, :1]], 1)) * torch.nan
    solution, curvature = _newton(x.detach(), y, strength)
    found: Tensor = _AtOptimum.apply(_gradient(solution, x, y, strength), solution, curvature)
    return found.to(inputs)


class _AtOptimum(torch.autograd.Function):
    """The solution as a function of the objective's gradient, which is zero there: backward multiplies by -H^-1."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, solution: Tensor, curvature: Product) -> Tensor:
        ctx.curvature = curvature
        return solution.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, wanted: Tensor) -> tuple[Tensor, None, None]:
        return -_conjugate_gradients(ctx.curvature, wanted, 1e-12), None, None


def _newton(x: Tensor, y: Tensor, strength: float) -> tuple[Tensor, Product]:
    """The solution, and multiplication by the second derivative there."""
    found = x.new_zeros(y.shape[1], x.shape[1])
    for _ in range(_STEPS):
        gradient, curvature = _gradient(found, x, y, strength), _curvature(found, x, strength)
        size = float(gradient.abs().max()) / len(x)
        if size <= _PRECISION:
            return found, curvature
        step = _conjugate_gradients(curvature, -gradient, min(0.1, size))
        before, slope = _objective(found, x, y, strength), float((gradient * step).sum())
        length = 1.0
        # Near the solution a decrease is too small to be seen in the objective, and full steps are right.
        while size > 1e-6 and _objective(found + length * step, x, y, strength) > before + 1e-4 * length * slope:
            length /= 2
        found = found + length * step
    raise MetaWrapError(
        f"The logistic regression of a support set of {len(x)} examples could not be solved to the precision of a "
        f"gradient with regularizer={strength:g}. Raise it."
    )


def _penalised(found: Tensor) -> Tensor:
    return torch.cat([found[:, :-1], torch.zeros_like(found[:, -1:])], 1)


def _objective(found: Tensor, x: Tensor, y: Tensor, strength: float) -> float:
    loss = -(y * (x @ found.T).log_softmax(1)).sum()
    return float(loss + strength / 2 * _penalised(found).square().sum())


def _gradient(found: Tensor, x: Tensor, y: Tensor, strength: float) -> Tensor:
    return ((x @ found.T).softmax(1) - y).T @ x + strength * _penalised(found)


def _curvature(found: Tensor, x: Tensor, strength: float) -> Product:
    p = (x @ found.T).softmax(1)

    def product(direction: Tensor) -> Tensor:
        moved = p * (x @ direction.T)
        return (moved - p * moved.sum(1, keepdim=True)).T @ x + strength * _penalised(direction)

    return product


def _conjugate_gradients(product: Product, wanted: Tensor, precision: float) -> Tensor:
    """The solution of product(solution) = wanted, up to a residual of `precision` times the size of what is wanted."""
    # The same row in all rows has no curvature: without it, and what rounding adds of it, the system is regular.
    rest = wanted - wanted.mean(0)
    found, direction = torch.zeros_like(rest), rest
    square = start = rest.square().sum()
    for _ in range(10 * wanted.numel()):
        if float(square) <= precision**2 * float(start):
            break
        image = product(direction)
        image = image - image.mean(0)
        length = square / (direction * image).sum()
        found, rest = found + length * direction, rest - length * image
        before, square = square, rest.square().sum()
        direction = rest + square / before * direction
    return found
