"""Convolution and max-pooling whose second derivatives take fewer and faster passes than torch's.

Each is a `torch.autograd.Function` around torch's own kernels. `QuickForms` puts them in the place of the modules' own
code during a call. Where the result is differentiated once, a `Sequential` also runs a max-pooling before the norm and
the ReLU in front of it: see norm_of_pooled.py.

Convolution is bilinear, and so is its gradient: with C(x, w) the convolution, I(g, w) the gradient of x and W(g, x)
that of w, the derivative of (I(g, w), W(g, x)) along (v, u) is

    d/d g = C(v, w) + C(x, u),    (d/d x, d/d w) = (I(g, u), W(g, v)),

one more gradient of a convolution. torch computes W(g, v) as a convolution whose kernel is as large as the image, in
the wrong layout: up to three times as slow in channels_last.

Max-pooling: torch's kernel for the usual layout takes five to ten times as long as that for channels_last, more than a
copy there and back. The derivative depends on the input through the places of the maxima alone; but torch adds zeros to
the input's gradient in a second backward pass, in another layout, which slows the operations behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metawrap.layers.moments import own_derivatives_run

# Multiplications and additions of a convolution; below, Python costs more than the form saves. The form saves most in
# channels_last, and on images: torch's second derivative computes the images' gradient too, which is not needed.
LARGE, LARGE_AT_BEST = 10**8, 4 * 10**6
# Numbers that a max-pooling in the usual layout reads: a quick one copies them to channels_last.
LARGE_POOLING = 2**15
# A pooling runs before the norm in front of it where the norm's input has at least this many numbers. For a smaller
# input, the additional Python takes as long as the passes that are saved.
LARGE_NORM = 2**19

Geometry = tuple[list[int], list[int], list[int], int]
"""Stride, padding and dilation of each dimension, and groups."""
Window = tuple[list[int], list[int], list[int], list[int], bool]
"""Kernel, stride, padding and dilation, of height and width each, and whether sizes are rounded up."""


class QuickForms:
    """During a call, torch's own convolutions, max-poolings and sequences run the faster functions of this file.

    These take plain CPU tensors in single and double precision; every other call runs as it is. Each module gets its
    function as an attribute for the time of the call, as a `TorchFunctionMode` would slow every operation.

    Args:
        modules: pairs of a module as the user has it, and the module that runs in its place.
    """

    def __init__(self, modules: Iterable[tuple[nn.Module, nn.Module]]) -> None:
        self._always: list[tuple[dict[str, Any], str, Callable[..., Tensor]]] = []
        self._twice: list[tuple[dict[str, Any], str, Callable[..., Tensor]]] = []
        for module, runs in modules:
            # Of the exact class: a subclass may read other attributes, or have a form of its own.
            if type(module) is nn.MaxPool2d and "forward" not in vars(module):
                self._always.append((vars(runs), "forward", partial(_max_pooling, runs, False)))
                self._twice.append((vars(runs), "forward", partial(_max_pooling, runs, True)))
            elif type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and "_conv_forward" not in vars(module):
                self._twice.append((vars(runs), "_conv_forward", partial(_convolution, runs)))
            elif module is runs and getattr(type(module), "forward", None) is nn.Sequential.forward:
                layers: list[Any] = list(module)  # type: ignore[call-overload]
                if any(map(_norm_before_pooling, layers, layers[1:], layers[2:])):
                    self._always.append((vars(runs), "forward", partial(_sequence, runs)))

    @contextmanager
    def lent(self, twice: bool) -> Iterator[None]:
        """Args: twice: whether the result of the call will be differentiated twice."""
        # An attribute that the user has set in the meantime stays.
        forms = [form for form in (self._twice if twice else self._always) if form[1] not in form[0]]
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


def _sequence(sequence: Any, input: Any) -> Any:
    """Runs layers as `nn.Sequential` does, but a large max-pooling before the norm and the ReLU in front of it."""
    layers, at = list(sequence), 0
    while at < len(layers):
        pooled = _norm_of_pooled(input, *layers[at : at + 3])
        input, at = (layers[at](input), at + 1) if pooled is None else (layers[at + 1](pooled), at + 3)
    return input


def _norm_of_pooled(input: Any, norm: Any, activation: Any = None, pool: Any = None) -> Tensor | None:
    """Pools the input, then normalises it; None where the three layers have to run in their own order."""
    if not _norm_before_pooling(norm, activation, pool) or any(map(_observed, (norm, activation, pool))):
        return None
    if not (isinstance(input, Tensor) and input.ndim == 4 and input.numel() >= LARGE_NORM and _plain(input)):
        return None
    if not (input.is_contiguous() or input.is_contiguous(memory_format=torch.channels_last)):
        return None
    sides = (pool.kernel_size, pool.stride or pool.kernel_size, pool.padding, pool.dilation)
    window = [for_each(value, 2) for value in sides]
    return norm.of_pooled(input, (*window, pool.ceil_mode))  # type: ignore[no-any-return]


def _norm_before_pooling(norm: Any, activation: Any, pool: Any) -> bool:
    return (
        type(pool) is nn.MaxPool2d
        and not pool.return_indices
        and pool.dilation in (1, (1, 1))  # Else a window may lie in the padding alone.
        and type(activation) in (nn.ReLU, nn.LeakyReLU)
        and getattr(activation, "negative_slope", 0) >= 0
        and hasattr(type(norm), "of_pooled")
        and type(norm).__call__ is nn.Module.__call__
    )


def _observed(layer: Any) -> bool:
    """Whether a call of the layer runs anything besides torch's forward: hooks, the user's forward, compiled code."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_compiled_call_impl")
    forward = vars(layer).get("forward")
    return (
        any(getattr(layer, name) for name in hooks)
        or not (forward is None or getattr(forward, "func", None) is _max_pooling)
        or nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
    )


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
    """By its multiplications and additions, without the edges."""
    work = 2.0 * len(input) * math.prod(input.shape[2:]) / math.prod(stride) * weight.numel()
    return work >= (LARGE if input.requires_grad and input.is_contiguous() else LARGE_AT_BEST)


def _plain(*tensors: Tensor) -> bool:
    """Whether torch would run plain kernels on the tensors and keep a graph: no mode changes that."""
    dtype = tensors[0].dtype
    return (
        dtype in (torch.float32, torch.float64)
        and all(type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.dtype == dtype for t in tensors)
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and own_derivatives_run()
    )


def for_each(value: Any, dimensions: int) -> list[int]:
    """One number for each dimension, from a single number or one for each."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * dimensions if len(values) == 1 else values


def max_pool2d(
    x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Tensor:
    """As `torch.max_pool2d` of a batch.

    Args:
        x: (batch, channels, height, width).
        kernel_size, stride, padding, dilation: a number, or one each for height and width.
    """
    shape = [for_each(value, 2) for value in (kernel_size, stride or kernel_size, padding, dilation)]
    output: Tensor = _MaxPool.apply(x, (*shape, ceil_mode))
    return output


def pooled_with_places(x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """The largest number of each window, and its place."""
    if not x.is_contiguous():
        return torch.ops.aten.max_pool2d_with_indices(x, *window)  # type: ignore[no-any-return]
    last = torch.ops.aten.max_pool2d_with_indices(x.contiguous(memory_format=torch.channels_last), *window)
    output, places = (each.contiguous() for each in last)
    return output, places


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, window: Window) -> Tensor:
        output, places = pooled_with_places(x, window)
        ctx.save_for_backward(x, places)
        ctx.window = window
        return output

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, places = ctx.saved_tensors
        return torch.ops.aten.max_pool2d_with_indices_backward(g, x.detach(), *ctx.window, places), None


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """As `torch.conv1d`, `conv2d` or `conv3d` of a batch, by the weight's shape.

    Args:
        x: (batch, in, ...). weight: (out, in / groups, ...). bias: (out,), or None.
        stride, padding, dilation: a number, or one for each dimension.
    """
    shape = [for_each(value, weight.ndim - 2) for value in (stride, padding, dilation)]
    output: Tensor = _Convolution.apply(x, weight, bias, (*shape, groups))
    return output


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    stride, padding, dilation, groups = geometry
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)


def _gradients(g: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, ...], geometry: Geometry) -> Any:
    stride, padding, dilation, groups = geometry
    return torch.ops.aten.convolution_backward(
        g, x, weight, [len(weight)], stride, padding, dilation, False, [0] * len(stride), groups, list(wanted)
    )


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return _run(x, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        wanted = tuple(ctx.needs_input_grad[:3])
        first: Any = _ConvolutionGradients.apply if torch.is_grad_enabled() else _gradients
        return *first(g, *ctx.saved_tensors, wanted, ctx.geometry), None


class _ConvolutionGradients(torch.autograd.Function):
    """I(g, weight), W(g, x) and the sum of g, as far as they are wanted."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, ...], geometry: Geometry) -> Any:
        ctx.save_for_backward(g, x, weight)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        return _gradients(g, x, weight, wanted, geometry)

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, u: Tensor | None, b: Tensor | None) -> Any:
        g, x, weight = ctx.saved_tensors
        recorded = torch.is_grad_enabled()
        forward: Any = _Convolution.apply if recorded else _run
        gradients: Any = _ConvolutionGradients.apply if recorded else _gradients
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
