"""First and second derivatives of a layer, for a comparison with those of another form of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def derivatives(run: Callable[..., Tensor], tensors: Sequence[Tensor], asked: list[int]) -> list[Tensor | None]:
    """The gradient with respect to the asked inputs, and its derivative along a direction with respect to all."""
    generator = torch.Generator().manual_seed(1)
    output = run(*tensors)
    upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64).requires_grad_()
    first = torch.autograd.grad(output, [tensors[i] for i in asked], upstream, create_graph=True)
    along = torch.stack([(g * torch.randn(g.shape, generator=generator).double()).sum() for g in first]).sum()
    return [output, *first, *torch.autograd.grad(along, [*tensors, upstream], create_graph=True, allow_unused=True)]


def assert_same_derivatives(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    """None stands for zero."""
    for one, other in zip(found, expected, strict=True):
        if one is None or other is None:
            assert all(g is None or not g.any() for g in (one, other))
        else:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
