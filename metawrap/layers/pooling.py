"""Max-pooling that is quick in the usual layout, and whose second derivative is no more than it has to be.

torch's kernel for the usual layout takes five to ten times as long as that for channels_last, more than a copy there
and back. And its derivative is linear in the gradient that comes from above, and depends on the input through places
alone; but torch adds zeros to the gradient of the input in a second backward pass, in a layout of their own, which
slows whatever comes after them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Window = tuple[list[int], list[int], list[int], list[int], bool]
"""Kernel, stride, padding and dilation, of height and width each, and whether sizes are rounded up."""


def max_pool2d(
    x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Tensor:
    """As `torch.max_pool2d` of a batch.

    Args:
        x: (batch, channels, height, width).
        kernel_size, stride, padding, dilation: a number, or one each for height and width.
    """
    kernel = _pair(kernel_size)
    window = kernel, _pair(stride) if stride else kernel, _pair(padding), _pair(dilation), ceil_mode
    output: Tensor = _MaxPool.apply(x, window)
    return output


def _pair(value: Any) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, window: Window) -> Tensor:
        if x.is_contiguous():
            last = torch.ops.aten.max_pool2d_with_indices(x.contiguous(memory_format=torch.channels_last), *window)
            output, places = (each.contiguous() for each in last)
        else:
            output, places = torch.ops.aten.max_pool2d_with_indices(x, *window)
        ctx.save_for_backward(x, places)
        ctx.window = window
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, places = ctx.saved_tensors
        return torch.ops.aten.max_pool2d_with_indices_backward(g, x.detach(), *ctx.window, places), None
