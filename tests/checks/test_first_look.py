"""`differ`: how far two gradients may be apart before an engine is refused, for each precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from metawrap.checks.first_look import differ

# dtype, given tolerance, largest relative error that counts as rounding, share of the largest gradient that an entry's
# own size is raised to
LIMITS: list[Any] = [
    (torch.float32, None, 1e-4, 1e-1),
    (torch.complex64, None, 1e-4, 1e-1),
    (torch.float64, None, 1e-9, 1e-3),
    (torch.complex128, None, 1e-9, 1e-3),
    (torch.float32, 1e-2, 1e-2, 1e-3),
    (torch.float64, 1e-6, 1e-6, 1e-3),
]


@pytest.mark.parametrize(("factor", "expected"), [(-1.1, True), (-0.9, False), (0.9, False), (1.1, True)])
@pytest.mark.parametrize(("dtype", "tolerance", "limit", "floor"), LIMITS, ids=str)
def test_gradients_differ_from_the_tolerance_of_their_precision_on(
    dtype: torch.dtype, tolerance: float | None, limit: float, floor: float, factor: float, expected: bool
) -> None:
    large, small = torch.tensor([3.0, -4.0], dtype=dtype), torch.tensor([1e-6, 0.0], dtype=dtype)

    def off(tensor: Tensor, by: float) -> Tensor:
        return tensor + torch.tensor([0.0, by], dtype=dtype)

    assert differ([off(large, factor * limit * 4), small], [large, small], tolerance) is expected
    # An entry that is zero up to rounding, a bias before a norm, is held to the largest gradient.
    assert differ([large, off(small, factor * limit * floor * 4)], [large, small], tolerance) is expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_missing_or_infinite_gradient_differs_and_a_reference_that_is_not_finite_says_nothing(
    dtype: torch.dtype,
) -> None:
    one = torch.ones(2, dtype=dtype)
    assert differ([None], [one])
    assert differ([one], [None])
    assert not differ([None, one], [None, one])
    assert differ([one / 0], [one])
    assert differ([one * torch.nan], [one])
    assert not differ([one], [one * torch.nan])
    assert not differ([one[:0]], [one[:0]])
