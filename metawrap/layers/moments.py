"""Mean and variance of a batch, batch norm by them, and how targets differ from their support set (norm="running").

With m and s the mean and deviation of a support set in one channel, and m' and s' those of its targets: the shift is
(m' - m) / s, the log ratio log(s' / s).

Moments are a mean and a variance. They and batch norm are `torch.autograd.Function`s around torch's own kernels; their
derivatives take fewer and faster passes than torch's.

Batch norm: with x_hat = (x - mean) r, r = (var + eps)^(-1/2) and P(z) = z - mean(z) - x_hat mean(z x_hat), per channel,
the backward pass is dx = weight r P(dy), and P is symmetric. So its derivative along v needs weight r P(v), which is
the backward pass itself on v, and one product: with q = mean(v P(dy)),

    d/d dy = weight r P(v),    d/d weight = r n q,
    d/d x  = -r (mean(dy x_hat) weight r P(v) + mean(v x_hat) dx) - weight r^2 q x_hat.

torch takes some twenty passes over the data for the same.

Moments: with n numbers behind each mean and variance, dx = (2 dv / n) (x - mean) + dm / n.

On the CPU, torch's kernels for a variance add up number by number. They take 3 to 12 times as long as a mean, a
difference and the mean of its square. The kernel of batch norm in channels_last is an exception, and fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metawrap.errors import TaskError, UnsupportedModuleError
from metawrap.tasks import describe_value

# Rows of the shifts and log ratios, and how often each was folded.
SHIFTS = ("target_shift", "target_log_ratio", "shifts_folded")
# From these sizes on, batch norm finds its mean and variance by three fast kernels: the numbers in the whole input, and
# those in one channel of one example. A smaller input takes less time in torch's single kernel.
LARGE, LARGE_PLANE = 2**15, 25
# From this size on, an input in channels_last takes less time with the derivatives below; one in the usual layout from
# LARGE on.
LARGE_LAST = 2**13


def own_derivatives_run() -> bool:
    """False in torch.func, in a compiler or exporter, and in forward mode: these need the derivatives of torch."""
    return not (
        torch.compiler.is_compiling()  # First: a compiler then sees nothing of the others.
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or torch.autograd.forward_ad._current_level >= 0
    )


def own_form_pays(x: Tensor, *others: Tensor | None) -> bool:
    """Whether `batch_norm` serves, and takes less time than torch's own: for large plain CPU tensors of one dtype."""
    return (
        own_derivatives_run()
        and x.is_cpu
        and x.numel() >= (LARGE if x.is_contiguous() else LARGE_LAST)
        and x.dtype in (torch.float32, torch.float64)
        and all(other is None or other.dtype == x.dtype for other in others)
        and not torch.is_autocast_enabled("cpu")
    )


def scale_beside(shift: Tensor | None, scale: Tensor | None) -> Tensor | None:
    """Returns the scale of a norm. If the norm has a shift alone, returns a scale of ones.

    Without a scale, torch's second backward pass leaves out the derivative with respect to the shift.
    """
    return torch.ones_like(shift) if scale is None and shift is not None else scale


def check_size(name: str, input: Tensor) -> None:
    """Raises TaskError, with the norm's name, if its input has one value per channel, and so no variance."""
    if input.ndim > 1 and input.numel() == input.shape[1]:
        raise TaskError(
            f"'{name}' normalises by the statistics of its batch, but got {describe_value(input)}: "
            "one value per channel has no variance. Give support and target at least 2 examples each."
        )


def moments_over(input: Tensor, over: list[int]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over some axes, which stay as axes of one entry.

    Args:
        input: (examples, channels, ...). over: numbers of the axes, 0 and up.
    """
    if not over:  # One number for each: it is its own mean.
        return input, torch.zeros_like(input)
    run: Any = _Moments.apply if input.numel() and own_derivatives_run() else _moments
    return run(input, over)  # type: ignore[no-any-return]


def scaled(input: Tensor, centre: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """(input - centre) * scale + shift.

    The centre is subtracted first: `input * scale - centre * scale` loses digits where the centre is far from zero.
    """
    output = torch.sub(input, centre) * scale
    if shift is None:
        return output
    # Under vmap, the sum may have a task axis that the product has not.
    return output + shift if torch._C._are_functorch_transforms_active() else output.add_(shift)


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, over: list[int]) -> tuple[Tensor, Tensor]:
        mean, variance = _moments(x, over)
        ctx.save_for_backward(x, mean)
        return mean, variance

    @staticmethod
    def backward(ctx: Any, dm: Tensor, dv: Tensor) -> Any:
        x, mean = ctx.saved_tensors
        count = x.numel() // mean.numel()
        return scaled(x, mean, dv * (2 / count), dm / count), None


def _moments(x: Tensor, over: list[int]) -> tuple[Tensor, Tensor]:
    if not x.is_cpu or torch._C._are_functorch_transforms_active():  # vmap has no rule for `square_`.
        variance, mean = torch.var_mean(x, over, correction=0, keepdim=True)
        return mean, variance
    mean = x.mean(over, keepdim=True)
    return mean, (x - mean).square_().mean(over, keepdim=True)


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, variance: Tensor | None, eps: float
) -> Tensor:
    """`F.batch_norm` with training=True and momentum=1, which writes the batch's moments into `mean` and `variance`.

    Args:
        x: (batch, channels, ...). The others: (channels,), or None. variance: receives the unbiased variance.
    """
    if torch.compiler.is_compiling():
        return torch.batch_norm(x, weight, bias, mean, variance, True, 1.0, eps, False)
    run: Any = _BatchNorm.apply if torch.is_grad_enabled() else _forward
    return run(x, weight, bias, mean, variance, eps)[0]  # type: ignore[no-any-return]


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, eps: float) -> Any:
        output, seen, r = _forward(x, weight, bias, mean, variance, eps)
        ctx.save_for_backward(x, weight, seen, r)
        ctx.eps, ctx.has_bias = eps, bias is not None
        ctx.mark_non_differentiable(seen, r)
        ctx.set_materialize_grads(False)
        return output, seen, r

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        if dy is None:
            return (None,) * 6
        x, weight, seen, r = ctx.saved_tensors
        first: Any = _BatchNormGradients.apply if torch.is_grad_enabled() else _projected
        dx, d_weight, d_bias = first(dy, x, weight, seen, r, ctx.eps)
        affine = (None if weight is None else d_weight, d_bias if ctx.has_bias else None)
        return dx, *affine, None, None, None


def _forward(x: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, eps: float) -> Any:
    """The output, the batch's mean, and r; mean and variance are overwritten."""
    large = x.numel() >= LARGE and math.prod(x.shape[2:]) >= LARGE_PLANE
    if not (large and x.is_cpu and x.is_contiguous()):
        return torch.native_batch_norm(x, weight, bias, mean, variance, True, 1.0, eps)
    seen, biased = (moment.flatten() for moment in _moments(x, [0, *range(2, x.ndim)]))
    if mean is not None:
        count = x.numel() // x.shape[1]
        mean.copy_(seen)
        torch.mul(biased, count / (count - 1), out=variance)
    output = torch.native_batch_norm(x, weight, bias, seen, biased, False, 0.0, eps)[0]
    return output, seen, (biased + eps).rsqrt()


class _BatchNormGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dy: Tensor, x: Tensor, weight: Any, seen: Tensor, r: Tensor, eps: float) -> Any:
        dx, d_weight, d_bias = _projected(dy, x, weight, seen, r, eps)
        ctx.save_for_backward(dy, x, weight, seen, r, dx, d_weight, d_bias)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return dx, d_weight, d_bias

    @staticmethod
    def backward(ctx: Any, v: Any, a: Any, b: Any) -> Any:
        along: Any = _BatchNormSecond.apply if torch.is_grad_enabled() else _along
        return *along(v, a, b, ctx.eps, *ctx.saved_tensors), None, None, None


class _BatchNormSecond(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        return _along(*args)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        # The second derivative takes mean and r as constants; a third one would need theirs.
        raise RuntimeError("batch norm over a batch's statistics has no third derivative")


def _along(
    v: Any, a: Any, b: Any, eps: float, dy: Any, x: Any, weight: Any, seen: Any, r: Any, dx: Any, dy_x: Any, dy_sum: Any
) -> Any:
    """The backward pass of the backward pass: gradients of dy, x and weight.

    Args:
        v, a, b: gradients of its results dx, d_weight and d_bias; None where there is none.
        dy_x, dy_sum: sum(dy x_hat) and sum(dy), which are d_weight and d_bias.
    """
    count, wide = x.numel() // x.shape[1], (1, -1, *(1,) * (x.ndim - 2))
    to_dy = to_x = to_weight = None
    if v is not None:
        # A pooling behind the norm gives v in another layout, which would slow every operation below.
        v = v if v.stride() == x.stride() else torch.empty_like(x).copy_(v)
        to_dy, v_x, v_sum = _projected(v, x, weight, seen, r, eps)
        q = (v * dy).sum([0, *range(2, x.ndim)])
        q = q.addcmul(v_sum, dy_sum, value=-1 / count).addcmul_(v_x, dy_x, value=-1 / count)
        rq, r_mean = r * q, r / count
        slope = r * rq * r_mean if weight is None else weight * r * rq * r_mean
        to_x = torch.addcmul((slope * seen).view(wide), x, slope.view(wide), value=-1)
        to_x.addcmul_(to_dy, (r_mean * dy_x).view(wide), value=-1).addcmul_(dx, (r_mean * v_x).view(wide), value=-1)
        to_weight = None if weight is None else rq
    # a and b are given only where an inner loop adapts the weight and bias of the norm (adapt_norm=True).
    if a is not None:
        x_hat = (x - seen.view(wide)) * r.view(wide)
        to_dy = _plus(to_dy, a.view(wide) * x_hat)
        to_x = _plus(to_x, a.view(wide) * _projected(dy, x, None, seen, r, eps)[0])
    if b is not None:
        to_dy = _plus(to_dy, b.view(wide).expand_as(x))
    return to_dy, to_x, to_weight


def _projected(z: Tensor, x: Tensor, weight: Tensor | None, seen: Tensor, r: Tensor, eps: float) -> Any:
    """weight r P(z), sum(z x_hat) and sum(z)."""
    return torch.ops.aten.native_batch_norm_backward(z, x, weight, None, None, seen, r, True, eps, [True] * 3)


def _plus(old: Tensor | None, new: Tensor) -> Tensor:
    return new if old is None else old + new


def over_channels(input: Tensor) -> tuple[int, ...]:
    """The shape in which (channels,) meets an input."""
    return (1, -1, *(1,) * (input.ndim - 2))


def wide_of(input: Tensor) -> Tensor:
    """The input in single precision at least."""
    return input.float() if input.dtype in (torch.float16, torch.bfloat16) else input


def moments_of(input: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, with gradient.

    Args:
        rows: (examples,), True for the examples that count; None if all do.
    """
    within = list(range(2, input.ndim))
    if rows is None:
        mean, variance = moments_over(wide_of(input), [0, *within])
        return mean.flatten(), variance.flatten()
    if len(rows) != len(input):
        raise UnsupportedModuleError(
            f"A batch norm gets {len(input)} rows for {len(rows)} padded examples, so it is unknown which rows count. "
            'Use engine="functional".'
        )
    own_mean, own_variance = (value.flatten(1) for value in moments_over(wide_of(input), within))
    share = rows.to(own_mean.dtype) / rows.sum()
    mean = share @ own_mean
    return mean, share @ (own_variance + (own_mean - mean) ** 2)


def unbiased(input: Tensor, mean: Tensor, variance: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The mean as it is, and the unbiased variance computed from the biased one, without gradient.

    Args:
        mean, variance, rows: results and argument of `moments_of`.
    """
    count = input.numel() // input.shape[1]
    if rows is None:
        return mean.detach(), variance.detach() * (count / max(count - 1, 1))
    # In the variance's own precision: a quotient of whole numbers would be float32.
    counted = (rows.sum() * (count // len(input))).to(variance.dtype)
    return mean.detach(), variance.detach() * (counted / (counted - 1).clamp(min=1))


def centre_and_scale(input: Tensor, mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation of each channel, in the shape in which `scaled` applies them to the input.

    Args:
        mean, variance: (channels,).
    """
    shape = over_channels(input)
    return mean.view(shape), (variance + eps).rsqrt().view(shape)


def shifted(mean: Tensor, variance: Tensor, shift: Tensor, ratio: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The moments of a support set, moved to where targets lie; all (channels,)."""
    # `shift` is a row of a buffer. The next meta-step overwrites it, when a backward pass may still need these values.
    moved = mean + shift.clone() * (variance + eps).sqrt()
    return moved, (variance + eps) * (2 * ratio).exp() - eps


@torch.no_grad()
def shift_of(
    input: Tensor, mean: Tensor, variance: Tensor, eps: float, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Shift and log ratio, (channels,) each, of a target batch; `mean` and `variance` are its support set's."""
    own_mean, own_variance = moments_of(input, rows)
    return (own_mean - mean) * (variance + eps).rsqrt(), 0.5 * ((own_variance + eps) / (variance + eps)).log()


@torch.no_grad()
def fold_shifts(
    buffers: Sequence[Any], row: Any, seen: Sequence[tuple[Tensor, Tensor]], momentum: float | None, keep: Tensor
) -> None:
    """Moves the stored shift and log ratio of one inner step towards the mean of those that a meta-step has seen.

    All tasks of a meta-step together count as one observation, because they share their weights. A new observation
    gets a fifth of the norm's momentum. The first ones get equal parts, so that the zeros of the start are forgotten.

    Args:
        buffers: those named by `SHIFTS`. row: index of the row; ... where the norm has one for all steps.
        seen: shift and log ratio of each target pass. momentum: of the norm; None averages all meta-steps equally.
        keep: bool scalar; where it is false, because the meta-step was skipped, nothing changes.
    """
    shift, ratio, count = buffers
    share = 1 / (count[row] + 1).to(shift.dtype)
    if momentum is not None:
        share = share.clamp(min=momentum / 5)
    for stored, values in zip((shift, ratio), zip(*seen, strict=True), strict=True):
        folded = torch.lerp(stored[row], torch.stack(values).mean(0).to(stored.dtype), share)
        stored[row] = torch.where(keep, folded, stored[row])
    count[row] += keep
