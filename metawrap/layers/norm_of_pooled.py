"""Max-pooling that runs before the batch norm and the ReLU in front of it; most few-shot networks have these blocks.

A batch norm with positive scales, and a ReLU, keep the order of numbers. So the max-pooling can run first. Norm and
ReLU then run on its output, which has a quarter of the numbers for windows of 2x2. A graph then keeps one tensor of the
full size in place of three.
Where the norm would round two numbers of a window to the same, the gradient goes to the larger one, not to the first.

With m and v the mean and variance of x, p its pooled numbers, n the numbers of a channel, and S(p) zeros but for p at
the places of the maxima, the backward pass is dx = 2 dv / n (x - m) + dm / n + S(dp).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metawrap.layers.moments import moments_over
from metawrap.layers.quick_forms import Window, pooled_with_places

_OVER, _WIDE = [0, 2, 3], (1, -1, 1, 1)


def pooled_with_moments(x: Tensor, window: Window) -> tuple[Tensor, Tensor, Tensor]:
    """The mean and the biased variance of each channel, (channels,) each, and max-pooled x; all are differentiable.

    Args:
        x: (batch, channels, height, width).
    """
    found: tuple[Tensor, Tensor, Tensor] = _PooledWithMoments.apply(x, window)
    return found


class _PooledWithMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, window: Window) -> Any:
        pooled, places = pooled_with_places(x, window)
        if x.is_contiguous():
            mean, variance = (moment.flatten() for moment in moments_over(x, _OVER))
        else:
            mean, variance = torch.batch_norm_update_stats(x, None, None, 1.0)
        ctx.save_for_backward(x, mean, places)
        return mean, variance, pooled

    @staticmethod
    def backward(ctx: Any, dm: Tensor, dv: Tensor, dp: Tensor) -> Any:
        x, mean, places = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        slope = (2 / count) * dv
        if torch.is_grad_enabled():  # The mean, too, depends on x.
            dx = (x - x.mean(_OVER, keepdim=True)) * slope.view(_WIDE) + (dm / count).view(_WIDE)
        else:
            dx = torch.addcmul((dm / count - slope * mean).view(_WIDE), x, slope.view(_WIDE))
        # Places count within height and width as one axis: behind the channels, or before them in channels_last.
        if x.is_contiguous():
            dx.view(*dx.shape[:2], -1).scatter_add_(2, places.flatten(2), dp.flatten(2))
        else:
            last, at, numbers = (each.permute(0, 2, 3, 1) for each in (dx, places, dp))
            last.view(len(x), -1, x.shape[1]).scatter_add_(1, at.flatten(1, 2), numbers.flatten(1, 2))
        return dx, None


def normalised(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Computes (x - mean) / sqrt(variance + eps) * weight + bias, differentiable by all five tensors.

    Args:
        x: (batch, channels, height, width). The others: (channels,), or None.
    """
    output: Tensor = _Normalised.apply(x, mean, variance, weight, bias, eps)
    return output


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, variance: Tensor, weight: Any, bias: Any, eps: float) -> Tensor:
        ctx.save_for_backward(x, mean, variance, weight)
        ctx.eps, ctx.has_bias = eps, bias is not None
        return torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)[0]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, mean, variance, weight = ctx.saved_tensors
        r = (variance + ctx.eps).rsqrt()
        scale = r if weight is None else r * weight
        if torch.is_grad_enabled():
            to_x, to_bias = g * scale.view(_WIDE), g.sum(_OVER)
            to_weight = (g * (x - mean.view(_WIDE))).sum(_OVER) * r
        else:
            to_x, to_weight, to_bias = torch.ops.aten.native_batch_norm_backward(
                g, x, weight, mean, variance, None, None, False, ctx.eps, [True] * 3
            )
        affine = (None if weight is None else to_weight, to_bias if ctx.has_bias else None)
        return to_x, -scale * to_bias, -0.5 * r * scale * to_weight, *affine, None
