"""The batch norm with its own second derivative: against the formula, and against finite differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from derivatives import assert_same_derivatives, derivatives
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from metawrap.layers import quick_norm
from metawrap.layers.quick_norm import batch_norm, moments_over

SHAPES = [(7, 3), (4, 3, 5), (3, 2, 4, 3), (2, 2, 3, 2, 2)]


def inputs(shape: tuple[int, ...], affine: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()

    return [draw(*shape), *([draw(shape[1]), draw(shape[1])] if affine else [])]


def ours(x: Tensor, weight: Any = None, bias: Any = None) -> Tensor:
    return batch_norm(x, weight, bias, None, None, 1e-3)


def formula(x: Tensor, weight: Any = None, bias: Any = None) -> Tensor:
    over, wide = [0, *range(2, x.ndim)], (1, -1, *(1,) * (x.ndim - 2))
    centred = x - x.mean(over, keepdim=True)
    normal = centred / (centred.square().mean(over, keepdim=True) + 1e-3).sqrt()
    return normal if weight is None else normal * weight.view(wide) + bias.view(wide)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("asked", [[0], [1], [2], [0, 1], [1, 2], [0, 1, 2]], ids=str)
def test_both_derivatives_equal_those_of_the_formula(shape: tuple[int, ...], asked: list[int]) -> None:
    assert_same_derivatives(derivatives(ours, inputs(shape), asked), derivatives(formula, inputs(shape), asked))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_derivatives_equal_finite_differences(shape: tuple[int, ...], affine: bool) -> None:
    assert gradcheck(ours, inputs(shape, affine))
    assert gradgradcheck(ours, inputs(shape, affine), atol=1e-4)


@pytest.mark.parametrize("over", [[0, 2, 3], [2, 3], [1, 2, 3], [2]], ids=str)
def test_moments_and_both_their_derivatives_equal_finite_differences(over: list[int]) -> None:
    def both(x: Tensor) -> tuple[Tensor, ...]:
        return moments_over(x, over)

    x = inputs((3, 2, 4, 3), affine=False)[0]
    mean, variance = both(x)
    array = x.detach().numpy()
    np.testing.assert_allclose(mean.detach(), array.mean(tuple(over), keepdims=True), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(variance.detach(), array.var(tuple(over), keepdims=True), rtol=1e-12)
    assert gradcheck(both, [x])
    assert gradgradcheck(both, [x])


@pytest.mark.parametrize("offset", [0.0, 300.0], ids=["near zero", "far from zero"])
def test_single_precision_is_as_near_to_double_as_torchs_own(offset: float) -> None:
    """The large form of the forward pass; a mean of squares less a squared mean would fail far from zero."""
    x = torch.randn(8, 4, 40, 40, generator=torch.Generator().manual_seed(0)) + offset
    exact = formula(x.double())
    errors = [(run(x) - exact).abs().max().item() for run in (ours, _torchs)]
    assert errors[0] <= 2 * errors[1] + 1e-6


def _torchs(x: Tensor) -> Tensor:
    return torch.batch_norm(x, None, None, None, None, True, 1.0, 1e-3, False)


def test_small_inputs_take_torchs_kernel_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    large = derivatives(ours, inputs((3, 2, 4, 3)), [0, 1, 2])
    monkeypatch.setattr(quick_norm, "LARGE", 10**9)
    assert_same_derivatives(derivatives(ours, inputs((3, 2, 4, 3)), [0, 1, 2]), large)


def test_a_scale_of_zero_has_a_derivative_too() -> None:
    x, weight, bias = inputs((5, 3, 2))
    with torch.no_grad():
        weight[1] = 0
    assert gradgradcheck(ours, [x, weight, bias])


def test_channels_last_gives_the_same() -> None:
    x, weight, bias = inputs((3, 2, 4, 3))
    last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    found, expected = derivatives(ours, [last, weight, bias], [0]), derivatives(formula, [x, weight, bias], [0])
    assert_same_derivatives(found, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_are_the_batchs_mean_and_unbiased_variance(shape: tuple[int, ...]) -> None:
    x, weight, bias = inputs(shape)
    mean, variance = torch.zeros(shape[1]).double(), torch.zeros(shape[1]).double()
    batch_norm(x, weight, bias, mean, variance, 1e-3)
    flat = x.detach().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, flat.mean(1), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(variance, flat.var(1, unbiased=True), rtol=1e-12, atol=1e-14)


def test_a_third_derivative_is_refused_as_torch_refuses_it() -> None:
    x, weight, bias = inputs((5, 3, 2))
    first = torch.autograd.grad(ours(x, weight, bias).square().sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="third derivative"):
        torch.autograd.grad(second.sum(), [x, weight], allow_unused=True)
