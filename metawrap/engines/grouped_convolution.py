"""A convolution in groups, one for each task, whose second derivative is in groups too.

torch's own goes group by group. With y = x * w, and dx = g *' w, dw = g . x its gradients along g, all three are linear
in each of their two arguments, so the gradients of <dx, v> + <dw, u> are

    d/d g = v * w + x * u,    d/d x = g *' u,    d/d w = g . v.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Geometry = tuple[list[int], list[int], list[int], int]
"""Stride, padding, dilation and groups."""


def grouped_convolution(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """As `F.conv1d`, `conv2d` or `conv3d` without a bias, differentiable twice."""
    output: Tensor = _Forward.apply(x, weight, geometry)
    return output


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return _convolved(x, weight, geometry)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        dx, dw = _Backward.apply(g, x, weight, ctx.geometry, ctx.needs_input_grad[:2])
        return dx, dw, None


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: tuple[bool, bool]) -> Any:
        ctx.save_for_backward(g, x, weight)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        return _gradients(g, x, weight, geometry, *wanted)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, u: Tensor | None) -> Any:
        return *_Twice.apply(v, u, ctx.geometry, ctx.needs_input_grad[:3], *ctx.saved_tensors), None, None


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Any, u: Any, geometry: Geometry, wanted: Any, g: Any, x: Any, weight: Any) -> Any:
        to_g = to_x = to_weight = None
        if v is not None:
            to_g = _convolved(v, weight, geometry) if wanted[0] else None
            to_weight = _gradients(g, v, weight, geometry, False, True)[1] if wanted[2] else None
        if u is not None:
            more = _convolved(x, u, geometry) if wanted[0] else None
            to_g = more if to_g is None or more is None else to_g + more
            to_x = _gradients(g, x, u, geometry, True, False)[0] if wanted[1] else None
        return to_g, to_x, to_weight

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("a convolution of several tasks at once has no third derivative")


def _convolved(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    stride, padding, dilation, groups = geometry
    return torch.ops.aten.convolution(  # type: ignore[no-any-return]
        x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups
    )


def _gradients(g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, of_x: bool, of_weight: bool) -> Any:
    stride, padding, dilation, groups = geometry
    zeros = [0] * len(stride)
    wanted = [of_x, of_weight, False]
    return torch.ops.aten.convolution_backward(
        g, x, weight, None, stride, padding, dilation, False, zeros, groups, wanted
    )[:2]
