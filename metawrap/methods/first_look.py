"""The first look at a task: what inspection cannot see, a gradient shows. Changes nothing, and runs once per mode."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metawrap.errors import MetaWrapWarning, UnsupportedModuleError
from metawrap.methods.solved import untouched_buffers

Gradients = Sequence[Tensor | None]
_HOOKS_REFUSED = "metawrap: saved-tensor hooks are refused here"


@dataclass
class FirstLook:
    """What the first task showed.

    unused: adapted parameters that the support loss does not depend on.
    """

    unused: list[str]


def support_gradient(fast: Mapping[str, Tensor], support_loss: Callable[[Mapping[str, Tensor]], Tensor]) -> list[str]:
    """Runs one support pass and its gradient; returns the names that get none.

    Raises:
        UnsupportedModuleError: the model checkpoints activations, or no adapted parameter gets a gradient.
    """
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(_HOOKS_REFUSED):
            loss = support_loss(fast)
            if not loss.requires_grad:
                raise UnsupportedModuleError(_NO_GRADIENT)
            gradients = torch.autograd.grad(loss, tuple(fast.values()), allow_unused=True)
    except RuntimeError as error:
        if _HOOKS_REFUSED in str(error) or "checkpoint" in str(error).lower():
            raise UnsupportedModuleError(
                "The model checkpoints activations (torch.utils.checkpoint): the backward pass would run it again, "
                "with other weights than the fast ones. Switch checkpointing off in the model; tasks_per_backward=1 "
                "holds memory down."
            ) from error
        raise
    unused = [name for name, gradient in zip(fast, gradients, strict=True) if gradient is None]
    if len(unused) == len(fast):
        raise UnsupportedModuleError(_NO_GRADIENT)
    return unused


def differ(found: Gradients, reference: Gradients) -> bool:
    """Whether two gradients of the same parameters differ by more than rounding."""
    pairs = list(zip(found, reference, strict=True))
    if any((a is None) != (b is None) for a, b in pairs):
        return True
    present = [(a, b) for a, b in pairs if a is not None and b is not None]
    largest = max((float(b.detach().abs().max()) for _, b in present if b.numel()), default=0.0)
    if not math.isfinite(largest):
        return False  # A loss that is not finite says nothing about the engine; meta_step skips it.
    tight = all(b.dtype in (torch.float64, torch.complex128) for _, b in present)
    for a, b in present:
        # A bias before a norm has a gradient of zero up to rounding: hence the floor.
        allowed = (1e-9 if tight else 1e-4) * max(float(b.abs().max()) if b.numel() else 0.0, 1e-3 * largest)
        if not torch.allclose(a, b, rtol=0, atol=allowed):
            return True
    return False


def warn_unused(unused: list[str]) -> None:
    """Reports adapted parameters that play no part in the support loss."""
    if unused:
        warnings.warn(
            f"The support loss does not depend on {', '.join(unused)}: they are not adapted. Freeze them before "
            "wrapping, or leave them out with adapt=, to silence this.",
            MetaWrapWarning,
            stacklevel=5,
        )


def warn_fallback(reason: str) -> None:
    """Reports that `auto` leaves `higher` for `functional`."""
    warnings.warn(
        f"engine='auto' falls back to 'functional': {reason}. Pass engine='functional' to silence this.",
        MetaWrapWarning,
        stacklevel=5,
    )


@contextmanager
def unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Puts back random state, buffers, and plain attributes that forward sets: a look must not count as a call."""
    index: list[Any] = [device] if device.type == "cuda" else []
    before = [(module, dict(module.__dict__)) for module in model.modules()]
    try:
        with torch.random.fork_rng(index), untouched_buffers(model):
            yield
    finally:
        for module, attributes in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)


_NO_GRADIENT = (
    "No adapted parameter gets a gradient from the support loss. The model may compute under no_grad, detach its "
    "output, or run on parameters other than its own (a closure over another module, say). Make forward read its "
    "parameters from the module itself."
)
