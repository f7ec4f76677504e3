"""A convolution of all tasks at once: values and three derivatives of each task's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metawrap.engines import BatchedEngine


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2},
        {"stride": (2, 1), "padding": (0, 2)},
        {"dilation": (1, 2), "bias": False},
        {"kernel_size": 3, "padding": "same"},
    ],
    ids=str,
)
def test_a_convolution_of_all_tasks_equals_the_convolution_of_each(options: Any) -> None:
    model = nn.Conv2d(2, 3, **{"kernel_size": (3, 2)} | options).double()
    x = torch.randn(4, 2, 2, 6, 5, dtype=torch.float64)
    weights = {name: torch.randn(4, *p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    found = BatchedEngine(model).call(weights, x)
    for task in range(4):
        own = {name: weight[task] for name, weight in weights.items()}
        torch.testing.assert_close(found[task], torch.func.functional_call(model, own, (x[task],)))


@pytest.mark.parametrize("wanted", ["both", "x", "weight"])
@pytest.mark.parametrize(
    "options", [{}, {"stride": (2, 1), "padding": (0, 1), "dilation": (1, 2), "groups": 2}], ids=str
)
def test_a_grouped_convolution_has_the_three_derivatives_of_each_tasks_own(options: Any, wanted: str) -> None:
    model = nn.Conv2d(2, 4, (3, 2), bias=False, **options).double()
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(3, 2, 2, 6, 5, generator=generator, dtype=torch.float64, requires_grad=wanted != "weight")
    ws = torch.randn(3, *model.weight.shape, generator=generator, dtype=torch.float64, requires_grad=wanted != "x")
    asked = [tensor for tensor in (xs, ws) if tensor.requires_grad]

    def derivatives(output: Tensor) -> list[Tensor]:
        found, value = [], output.pow(4).sum()
        for _ in range(3):
            found += torch.autograd.grad(value, asked, create_graph=True)
            value = sum(g.pow(2).sum() for g in found[-len(asked) :])  # type: ignore[assignment]
        return found

    ours = derivatives(BatchedEngine(model).call({"weight": ws}, xs))
    each = torch.stack([F.conv2d(x, w, **options) for x, w in zip(xs, ws, strict=True)])
    for found, expected in zip(ours, derivatives(each), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
