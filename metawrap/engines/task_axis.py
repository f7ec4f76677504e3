"""Operations under `torch.func.vmap` whose rules in torch are wrong, slow or missing, in forms of their own.

torch's rule for `embedding` with a `padding_idx` loses that the padding's gradient is zero. Batch norm with a scale per
task becomes one norm over (tasks * channels) channels, which takes a third of the passes. Recurrent networks and
weight norm have no rule in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import decomposition_table
from torch.overrides import TorchFunctionMode

from metawrap.engines.calling import weight_norm
from metawrap.layers.moments import batch_norm, scale_beside
from metawrap.layers.quick_forms import convolution, for_each

_PLANE = 4  # Axes of a batch of images.


class TaskAxis(TorchFunctionMode):
    """Runs operations in their own forms for the time of a call under vmap.

    may_drop: whether an operation was called that may have drawn a dropout mask.
    """

    def __init__(self) -> None:
        super().__init__()
        self.may_drop = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every call of a torch function passes here."""
        self.may_drop |= func in _MAY_DROP
        return _FORMS.get(func, func)(*args, **(kwargs or {}))


def is_batched(value: Any) -> bool:
    """Whether a value is a tensor with a task axis that vmap hides."""
    return isinstance(value, Tensor) and torch._C._functorch.is_batchedtensor(value)


class _InSight(torch.autograd.Function):
    """Runs a function on whole tensors, with their task axis, and lets autograd record it."""

    @staticmethod
    def forward(*_: Any) -> Any:
        raise AssertionError("only called with tensors that vmap has batched")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing to keep."""

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], function: Callable[..., Any], *args: Any) -> Any:
        return function(info.batch_size, in_dims[1:], *args)


def _normalised(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm over the batch's own statistics, its mean and its unbiased variance."""
    wide = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    mean, variance = (torch.zeros(x.shape[1], dtype=wide, device=x.device) for _ in range(2))
    weight = scale_beside(bias, weight)
    own = all(t is None or t.dtype == wide for t in (x, weight, bias)) and (weight is None) == (bias is None)
    if own and not torch.is_autocast_enabled(x.device.type):
        return batch_norm(x, weight, bias, mean, variance, eps), mean, variance
    return F.batch_norm(x, mean, variance, weight, bias, True, 1.0, eps), mean, variance


def _normalised_each(
    tasks: int, dims: Sequence[int | None], x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Any:
    x_dim, *affine_dims = dims[:3]
    x = _beside_channels(tasks, x_dim, x)
    scale, shift = (
        None if value is None else value.repeat(tasks) if dim is None else value.movedim(dim, 0).flatten()
        for value, dim in zip((weight, bias), affine_dims, strict=True)
    )
    output, mean, variance = _normalised(x, scale, shift, eps)
    return (_apart(tasks, output), mean.view(tasks, -1), variance.view(tasks, -1)), (1, 0, 0)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    F._verify_batch_size(input.size())  # type: ignore[attr-defined]
    tensors = (input, weight, bias)
    if any(is_batched(tensor) for tensor in tensors):
        output, mean, variance = _InSight.apply(_normalised_each, *tensors, eps)
    else:
        output, mean, variance = _normalised(*tensors, eps)
    for stored, seen in ((running_mean, mean), (running_var, variance)):
        if stored is not None:
            with torch.no_grad():
                stored.copy_((1 - momentum) * stored + momentum * seen)
    return output  # type: ignore[no-any-return]


def _torch_batch_norm(
    input: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float, cudnn: bool
) -> Tensor:
    return _batch_norm(input, mean, var, weight, bias, training, momentum, eps)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if running_mean is not None or running_var is not None:
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    count, channels, *space = input.shape
    wide = (1, channels, *(1,) * len(space))
    # Each image's channels are channels of their own; scale and shift are shared by the images.
    output = _batch_norm(input.reshape(1, count * channels, *space), None, None, training=True, eps=eps)
    output = output.reshape(input.shape)
    if weight is not None:
        output = output * weight.view(wide)
    return output if bias is None else output + bias.view(wide)


def _torch_instance_norm(
    input: Tensor, weight: Any, bias: Any, mean: Any, var: Any, use: bool, momentum: float, eps: float, cudnn: bool
) -> Tensor:
    return _instance_norm(input, mean, var, weight, bias, use, momentum, eps)


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    rows = F.embedding(input, weight, None, max_norm, norm_type, scale_grad_by_freq, sparse)
    if padding_idx is None:
        return rows
    padding = input == (padding_idx if padding_idx >= 0 else weight.shape[0] + padding_idx)
    return torch.where(padding.unsqueeze(-1), rows.detach(), rows)


def _torch_embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Tensor:
    # Here -1 means none; in F.embedding, the last row.
    named = padding_idx if padding_idx >= 0 else None
    return _embedding(indices, weight, named, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse)


def _beside_channels(tasks: int, dim: int | None, x: Tensor) -> Tensor:
    """(images, tasks * channels, ...), the layout in which a grouped convolution leaves the tasks."""
    x = x.unsqueeze(1).expand(-1, tasks, *x.shape[1:]) if dim is None else x.movedim(dim, 1)
    return x.flatten(1, 2)


def _apart(tasks: int, x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], tasks, -1, *x.shape[2:])


def _grouped(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    cast = torch.is_autocast_enabled(input.device.type)
    if not is_batched(weight) or input.ndim != _PLANE or padding == "same" or cast:
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    sizes = [for_each(size, 2) for size in (stride, 0 if padding == "valid" else padding, dilation)]
    output: Tensor = _InSight.apply(_grouped_each, input, weight, sizes, groups)
    return output if bias is None else output + bias.view(1, -1, 1, 1)


def _grouped_each(
    tasks: int, dims: Sequence[int | None], x: Tensor, weight: Tensor, sizes: Sequence[list[int]], groups: int
) -> Any:
    assert dims[1] is not None
    weight = weight.movedim(dims[1], 0)
    stride, padding, dilation = sizes
    x, weight = _beside_channels(tasks, dims[0], x), weight.flatten(0, 1)
    # torch's own second derivative would go group by group.
    output = convolution(x, weight, None, stride, padding, dilation, tasks * groups)
    return _apart(tasks, output), 1


def _pooled(func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A pooling with the tasks beside the channels: it treats each channel alone."""

    def pool(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not is_batched(input) or input.ndim != _PLANE:
            return func(input, *args, **kwargs)
        output: Tensor = _InSight.apply(_pooled_each, input, partial(func, **kwargs), args)
        return output

    return pool


def _pooled_each(tasks: int, dims: Sequence[int | None], x: Tensor, func: Callable[..., Tensor], args: Any) -> Any:
    return _apart(tasks, func(_beside_channels(tasks, dims[0], x), *args)), 1


def _recurrent(name: str) -> Callable[..., Any]:
    packet = getattr(torch.ops.aten, name)

    def run(*args: Any) -> Any:
        # The fourth is a tensor of packed lengths, or a flag of the plain form.
        packed = isinstance(args[1], Tensor) and isinstance(args[3], tuple | list)
        return decomposition_table[packet.data if packed else packet.input](*args)

    return run


_FORMS: dict[Any, Callable[..., Any]] = {
    torch.conv2d: _grouped,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _torch_batch_norm,
    F.instance_norm: _instance_norm,
    torch.instance_norm: _torch_instance_norm,
    F.embedding: _embedding,
    torch.embedding: _torch_embedding,
    torch._weight_norm: weight_norm,
    **{func: _pooled(func) for func in (torch.max_pool2d, F.avg_pool2d)},
    **{getattr(torch, name): _recurrent(name) for name in ("gru", "lstm", "rnn_tanh", "rnn_relu")},
}
_CHANNELS = ("dropout1d", "dropout2d", "dropout3d")
_KINDS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
DROPOUTS = {
    *(getattr(F, name) for name in (*_CHANNELS, "dropout", "alpha_dropout", "feature_alpha_dropout")),
    *(getattr(torch, f"{name}{place}") for name in _KINDS for place in ("", "_")),
}
_RECURRENT = [getattr(torch, name) for name in ("gru", "lstm", "rnn_tanh", "rnn_relu")]
_MAY_DROP = {*DROPOUTS, *_RECURRENT, F.scaled_dot_product_attention, F.multi_head_attention_forward}
