"""Convolutions in the form whose second derivative is quick, put in the place of torch's."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from metawrap.layers.convolution import convolution

_NATIVE: dict[Any, int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


# Multiplications and additions of a convolution; below, what Python takes is more than what the form saves.
LARGE = 10**8


class QuickConvolutions(TorchFunctionMode):
    """Takes large convolutions of plain CPU tensors in single and double precision; everything else runs as it is.

    The mode slows every operation a little; `seen` tells whether there was anything for it to do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every call of a torch function passes here."""
        if func not in _NATIVE:
            return func(*args, **(kwargs or {}))
        return self._convolution(func, *args, **(kwargs or {}))

    def _convolution(
        self,
        native: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        quick = (
            weight.requires_grad
            and torch.is_grad_enabled()
            and not isinstance(padding, str)
            and input.ndim == _NATIVE[native] + 2
            and _work(input, weight, stride) >= LARGE
            and all(_plain(tensor, weight.dtype) for tensor in (input, weight, bias) if tensor is not None)
            and not torch.is_autocast_enabled("cpu")
            and not torch._C._are_functorch_transforms_active()
        )
        if not quick:
            return native(input, weight, bias, stride, padding, dilation, groups)  # type: ignore[no-any-return]
        self.seen = True
        return convolution(input, weight, bias, stride, padding, dilation, groups)


def _work(input: Tensor, weight: Tensor, stride: Any) -> float:
    """About how many multiplications and additions it takes, however the edges are padded."""
    strides = [stride] * (input.ndim - 2) if isinstance(stride, int) else list(stride) * (input.ndim - 2)
    skipped = math.prod(strides[: input.ndim - 2])
    return 2.0 * len(input) * math.prod(input.shape[2:]) / skipped * weight.numel()


def _plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype == dtype
        and dtype in (torch.float32, torch.float64)
    )
