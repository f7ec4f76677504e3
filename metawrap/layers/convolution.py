"""Convolution with a second derivative made of the kernels that its first derivative has.

A convolution is bilinear, and so is its gradient: with C(x, w) the convolution, I(g, w) the gradient of x and W(g, x)
that of w, the derivative of (I(g, w), W(g, x)) along (v, u) is

    d/d g = C(v, w) + C(x, u),    (d/d x, d/d w) = (I(g, u), W(g, v)),

one gradient of a convolution more. torch makes W(g, v) of a convolution whose kernel is as large as the image instead,
and gathers it in the wrong layout: up to three times as slow in channels_last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Geometry = tuple[list[int], list[int], list[int], int]
"""Stride, padding and dilation of each dimension, and groups."""


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """As `torch.conv1d`, `conv2d` or `conv3d` of a batch, whichever the weight's shape asks for.

    Args:
        x: (batch, in, ...). weight: (out, in / groups, ...). bias: (out,), or None.
        stride, padding, dilation: a number, or one for each dimension.
    """
    shape = [_each(value, weight.ndim - 2) for value in (stride, padding, dilation)]
    output: Tensor = _Forward.apply(x, weight, bias, (*shape, groups))
    return output


def _each(value: Any, dimensions: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dimensions if len(values) == 1 else values


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    stride, padding, dilation, groups = geometry
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)


def _gradients(g: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, ...], geometry: Geometry) -> Any:
    stride, padding, dilation, groups = geometry
    return torch.ops.aten.convolution_backward(
        g, x, weight, [len(weight)], stride, padding, dilation, False, [0] * len(stride), groups, list(wanted)
    )


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return _run(x, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        wanted = tuple(ctx.needs_input_grad[:3])
        first: Any = _Backward.apply if torch.is_grad_enabled() else _gradients
        return *first(g, *ctx.saved_tensors, wanted, ctx.geometry), None


class _Backward(torch.autograd.Function):
    """I(g, weight), W(g, x) and the sum of g, those that are wanted."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, ...], geometry: Geometry) -> Any:
        ctx.save_for_backward(g, x, weight)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        return _gradients(g, x, weight, wanted, geometry)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, u: Tensor | None, b: Tensor | None) -> Any:
        g, x, weight = ctx.saved_tensors
        forward, gradients = (_Forward.apply, _Backward.apply) if torch.is_grad_enabled() else (_run, _gradients)
        to_g = to_x = to_weight = None
        if ctx.needs_input_grad[0]:
            parts = [] if v is None else [forward(v, weight, b, ctx.geometry)]
            parts += [] if u is None else [forward(x, u, b if v is None else None, ctx.geometry)]
            if not parts and b is not None:
                parts = [b.view(1, -1, *(1,) * (g.ndim - 2)).expand_as(g)]
            to_g = parts[0] if len(parts) == 1 else parts[0] + parts[1] if parts else None
        wanted = (u is not None and ctx.needs_input_grad[1], v is not None and ctx.needs_input_grad[2], False)
        if any(wanted):
            like_x, like_weight = x if v is None else v, weight if u is None else u
            to_x, to_weight, _ = gradients(g, like_x, like_weight, wanted, ctx.geometry)
        return to_g, to_x, to_weight, None, None
