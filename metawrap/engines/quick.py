"""Convolutions and max-poolings in the forms whose derivatives are quick, in the place of torch's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metawrap.layers.convolution import convolution
from metawrap.layers.pooling import max_pool2d

# Multiplications and additions of a convolution; below, what Python takes is more than what the form saves. It saves
# more in channels_last, and of images: torch's second derivative makes their gradient, too, which nobody asks for.
LARGE, LARGE_AT_BEST = 10**8, 4 * 10**6
# Numbers that a max-pooling in the usual layout reads: a quick one copies them to channels_last.
LARGE_POOLING = 2**15


class QuickForms:
    """Lends the quick forms to torch's own convolution and max-pooling modules, for the time of a call.

    They take plain CPU tensors in single and double precision; everything else runs as it is. Lent to modules, as a
    `TorchFunctionMode` would slow every operation of the call.

    Args:
        modules: pairs of a module as the user has it, and the one that runs in its place.
    """

    def __init__(self, modules: Iterable[tuple[nn.Module, nn.Module]]) -> None:
        self._always: list[tuple[dict[str, Any], str, Callable[..., Tensor]]] = []
        self._twice = []
        for module, runs in modules:
            # Of the exact class: a subclass may read other attributes, or be somebody else's own form.
            if type(module) is nn.MaxPool2d and "forward" not in vars(module):
                self._always.append((vars(runs), "forward", partial(_max_pooling, runs, False)))
                self._twice.append((vars(runs), "forward", partial(_max_pooling, runs, True)))
            elif type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and "_conv_forward" not in vars(module):
                self._twice.append((vars(runs), "_conv_forward", partial(_convolution, runs)))

    @contextmanager
    def lent(self, twice: bool) -> Iterator[None]:
        """Args: twice: whether what runs inside will be differentiated twice."""
        forms = self._twice if twice else self._always
        try:
            for attributes, name, form in forms:
                attributes[name] = form
            yield
        finally:
            for attributes, name, _ in forms:
                attributes.pop(name, None)


def _max_pooling(module: Any, twice: bool, input: Tensor) -> Tensor:
    if (
        not module.return_indices
        and input.requires_grad
        and input.ndim == 4
        and (input.numel() >= LARGE_POOLING if input.is_contiguous() else twice)
        and _plain(input)
    ):
        return max_pool2d(input, module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)
    return type(module).forward(module, input)  # type: ignore[no-any-return]


def _convolution(module: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if (
        module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and weight.requires_grad
        and input.ndim == weight.ndim
        and _pays(input, weight, module.stride)
        and _plain(*(tensor for tensor in (input, weight, bias) if tensor is not None))
    ):
        return convolution(input, weight, bias, module.stride, module.padding, module.dilation, module.groups)
    return type(module)._conv_forward(module, input, weight, bias)  # type: ignore[no-any-return]


def _pays(input: Tensor, weight: Tensor, stride: tuple[int, ...]) -> bool:
    """By about how many multiplications and additions it takes, however the edges are padded."""
    work = 2.0 * len(input) * math.prod(input.shape[2:]) / math.prod(stride) * weight.numel()
    return work >= (LARGE if input.requires_grad and input.is_contiguous() else LARGE_AT_BEST)


def _plain(*tensors: Tensor) -> bool:
    """Whether torch would do with them what it says, and keep a graph of it: in no mode that does otherwise."""
    dtype = tensors[0].dtype
    return (
        dtype in (torch.float32, torch.float64)
        and all(type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.dtype == dtype for t in tensors)
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
    )
