"""TaskNorm: the moments of the support set, blended with those of each example; and the norms deployed with it.

Source: Bronskill et al. 2020, arXiv:2003.03284, section 4.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metawrap.layers.moments import moments_over, over_channels, scaled, wide_of

Blend = Literal["instance", "layer"]
# What the outer loop learns about the support set's share.
BLEND = ("blend_scale", "blend_offset")


def blended(
    input: Tensor, mean: Tensor, variance: Tensor, share: Tensor, blend: Blend, eps: float
) -> tuple[Tensor, Tensor]:
    """Centre and scale, (examples, channels, 1, ...), of an input by the moments of a support set and its own.

    Args:
        input: (examples, channels, ...). mean, variance: of the support set, (channels,).
        share: of the support set, a scalar from 0 to 1.
        blend: "instance" takes an example's moments by channel (TaskNorm-I), "layer" over all channels (TaskNorm-L).
    """
    shape, wide = over_channels(input), wide_of(input)
    own_mean, own_variance = moments_over(wide, list(range(1 if blend == "layer" else 2, input.ndim)))
    mean, variance = mean.view(shape), variance.view(shape)
    middle = share * mean + (1 - share) * own_mean
    spread = share * (variance + (mean - middle) ** 2) + (1 - share) * (own_variance + (own_mean - middle) ** 2)
    return middle, (spread + eps).rsqrt()


def share_of(norm: nn.Module, input: Tensor, rows: Tensor | None) -> Tensor:
    """The weight of the support set's moments in the blend, sigmoid(scale * examples + offset), a scalar.

    Args:
        input: (examples, channels, ...). rows: (examples,), True for the examples that count; None if all do.
    """
    examples = len(input) if rows is None else rows.sum()
    scale, offset = (getattr(norm, name) for name in BLEND)
    return torch.sigmoid(scale * examples + offset)


def neutral_statistics(norm: _BatchNorm, input: Tensor) -> dict[str, Tensor]:
    """Mean 0 and variance 1 - eps: the norm's forward then divides by one, and its scale and shift still apply."""
    # In the norm's own dtype: a norm in half precision takes no statistics in single precision.
    like = next((t for t in (norm._parameters.get("weight"), norm.running_mean) if t is not None), wide_of(input))
    neutral = {"running_mean": like.new_zeros(norm.num_features)}
    return neutral | {"running_var": like.new_full((norm.num_features,), 1 - norm.eps)}


class TaskNorm(_BatchNorm):
    """Mixed in front of the user's batch-norm class in a module that `adapt` returns under norm="task".

    support_mean, support_variance: moments of the support set, (channels,). support_share: scalar. It has no training
    mode, in which it would normalise a second time, by the batch: `train()` leaves it in eval mode.
    """

    blend: Blend

    def train(self, mode: bool = True) -> TaskNorm:
        """Stays in eval mode."""
        return super().train(False)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The user's own forward on the normalised input; input and output as the user's class has them."""
        mean, variance, share = (self._buffers[name] for name in _HELD)
        found = blended(input, mean, variance, share, self.blend, self.eps)  # type: ignore[arg-type]
        return super().forward(scaled(wide_of(input), *found, None).to(input.dtype), *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so pickle must be told how to make it again.
        parts: Any = super().__reduce_ex__(protocol)
        return (_new_task_norm, (type(self).original_class,), *parts[2:])  # type: ignore[attr-defined]


_HELD = ("support_mean", "support_variance", "support_share")


def task_norm(norm: _BatchNorm, blend: Blend, mean: Tensor, variance: Tensor, share: Tensor) -> None:
    """Turns a plain norm into a `TaskNorm` that holds the moments of a support set, in place."""
    neutral = neutral_statistics(norm, mean)
    norm.__class__ = _task_norm_class(type(norm))  # type: ignore[arg-type]
    norm.__dict__["blend"] = blend
    norm.track_running_stats = True
    norm._buffers.update(neutral)
    if norm._buffers.get("num_batches_tracked") is None:
        norm._buffers["num_batches_tracked"] = torch.zeros((), dtype=torch.long, device=mean.device)
    # Moments of half-precision inputs come in single precision.
    for name, value in zip(_HELD, (mean, variance, share), strict=True):
        norm.register_buffer(name, value.detach().to(neutral["running_mean"], copy=True))
    norm.eval()


@cache
def _task_norm_class(original: type[_BatchNorm]) -> type[TaskNorm]:
    name = f"Task{original.__name__}"
    return type(name, (TaskNorm, original), {"original_class": original, "__module__": __name__})


def _new_task_norm(original: type[_BatchNorm]) -> nn.Module:
    made = _task_norm_class(original)  # type: ignore[arg-type]
    return made.__new__(made)
