"""Moments of a batch, those of a support set that normalise its targets, and how targets differ (norm="running").

With m and s the mean and deviation of a support set in one channel, and m' and s' those of its targets: the shift is
(m' - m) / s, the log ratio log(s' / s).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metawrap.errors import UnsupportedModuleError
from metawrap.layers.quick_norm import moments_over

# Rows of the shifts and log ratios, and how often each was folded.
SHIFTS = ("target_shift", "target_log_ratio", "shifts_folded")


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
    """Mean and unbiased variance from the biased variance, without gradient; `rows` as in `moments_of`."""
    count = input.numel() // input.shape[1]
    if rows is None:
        return mean.detach(), variance.detach() * (count / max(count - 1, 1))
    # In the variance's own precision: a quotient of whole numbers would be float32.
    counted = (rows.sum() * (count // len(input))).to(variance.dtype)
    return mean.detach(), variance.detach() * (counted / (counted - 1).clamp(min=1))


def shifted(mean: Tensor, variance: Tensor, shift: Tensor, ratio: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The moments of a support set, moved to where targets lie; all (channels,)."""
    # A clone: a backward pass may still need the row after the next fold.
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
    buffers: Sequence[Tensor | None],
    row: Any,
    seen: Sequence[tuple[Tensor, Tensor]],
    momentum: float | None,
    keep: Tensor,
) -> None:
    """Moves a row towards the mean over the target passes of one meta-step.

    All tasks of a meta-step together count as one observation, because they share their weights. A new observation
    gets a fifth of the norm's momentum. The first ones get equal parts, so that the zeros of the start are forgotten.

    Args:
        buffers: those named by `SHIFTS`. row: index of the row; ... where the norm has one for all steps.
        seen: shift and log ratio of each target pass. momentum: of the norm; None averages all meta-steps equally.
        keep: bool scalar; where it is false, because the meta-step was skipped, nothing changes.
    """
    shift, ratio, count = buffers
    assert shift is not None
    assert ratio is not None
    assert count is not None
    share = 1 / (count[row] + 1).to(shift.dtype)
    if momentum is not None:
        share = share.clamp(min=momentum / 5)
    for stored, values in zip((shift, ratio), zip(*seen, strict=True), strict=True):
        folded = torch.lerp(stored[row], torch.stack(values).mean(0).to(stored.dtype), share)
        stored[row] = torch.where(keep, folded, stored[row])
    count[row] += keep
