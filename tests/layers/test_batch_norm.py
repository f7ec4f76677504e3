"""The batch norm with its own second derivative: against the formula, and against finite differences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from derivatives import assert_same_derivatives, derivatives
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from metawrap import MAMLPlusPlus, Task
from metawrap.layers import moments
from metawrap.layers.moments import batch_norm, moments_over, scaled
from metawrap.layers.step_clock import Moments, StepClock
from metawrap.surgery.swap import make_per_step

SHAPES = [(7, 3), (4, 3, 5), (3, 2, 4, 3), (2, 2, 3, 2, 2)]


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every input takes the form of large ones. Here alone: other tests compare bits with processes of their own."""
    monkeypatch.setattr(moments, "LARGE", 0)
    monkeypatch.setattr(moments, "LARGE_PLANE", 0)


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


@pytest.mark.parametrize("over", [[0, 2, 3], [2, 3], [1, 2, 3], [2], [0]], ids=str)
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


def test_a_difference_survives_far_from_zero() -> None:
    x = 1000 + torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0))
    mean, variance = moments_over(x.requires_grad_(), [0, 2])
    exact = x.detach().double()
    centre = exact.mean((0, 2), keepdim=True)
    found = scaled(x, centre.float(), torch.full((1, 4, 1), 3.0), None)
    assert (found - 3 * (exact - centre.float())).abs().max() < 1e-5
    (gradient,) = torch.autograd.grad(variance.sum(), x)
    assert (gradient - (exact - mean) * (2 / 30)).abs().max() < 1e-6


def test_small_inputs_take_torchs_kernel_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[list[Tensor], Tensor, Tensor]:
        x, weight, bias = inputs((3, 2, 4, 3))
        mean, variance = torch.zeros(2, 2).double()
        batch_norm(x, weight, bias, mean, variance, 1e-3)
        return derivatives(ours, inputs((3, 2, 4, 3)), [0, 1, 2]), mean, variance

    large, *statistics = run()
    monkeypatch.setattr(moments, "LARGE", 10**9)
    small, *others = run()
    assert_same_derivatives(small, large)
    torch.testing.assert_close(others, statistics, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("missing", [1, 2], ids=["no scale", "no shift"])
def test_scale_or_shift_may_be_missing_alone(missing: int) -> None:
    x, weight, bias = inputs((3, 2, 4))

    def run(x: Tensor, other: Tensor) -> Tensor:
        return ours(x, *((None, other) if missing == 1 else (other, None)))

    other = bias if missing == 1 else weight
    assert gradcheck(run, [x, other])
    assert gradgradcheck(run, [x, other], atol=1e-4)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # That torch itself calls in forward mode.
def test_forward_mode_and_batches_of_gradients_take_torchs_derivatives() -> None:
    x = inputs((3, 2, 4), affine=False)[0]

    def mean_of_squares(x: Tensor) -> Tensor:
        mean, variance = moments_over(x, [0, 2])
        return (mean.square() + variance).flatten()

    jacobian = torch.autograd.functional.jacobian
    expected = jacobian(mean_of_squares, x.detach())
    for found in (
        jacobian(mean_of_squares, x.detach(), vectorize=True, strategy="forward-mode"),
        jacobian(mean_of_squares, x.detach(), vectorize=True),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


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


def meta_gradients(change: Any, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 2)).double()
    change(net[1])
    learner = MAMLPlusPlus(net, inner_steps=2, **options)
    images, labels = torch.randn(6, 1, 6, 6, dtype=torch.float64), torch.arange(6) % 2
    task = Task(images[:4], labels[:4], images[4:], labels[4:])
    learner([task, replace(task, support_x=images[2:])]).loss.backward()
    return {name: p.grad for name, p in learner.model.named_parameters() if p.grad is not None}


POLICIES = [{"norm": norm} for norm in ("batch", "support", "running", "task")]
ADAPTED = [
    {"engine": engine, "norm": "batch", "adapt_norm": True, "per_step_norm_affine": False}
    for engine in ("functional", "higher", "batched")
]


@pytest.mark.parametrize("large", [0, 10**9], ids=["large", "small"])
@pytest.mark.parametrize("options", [*POLICIES, *ADAPTED], ids=str)
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_norm_without_a_scale_or_a_shift_is_one_where_it_is_fixed(
    name: str, options: dict[str, Any], large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "LARGE", large)
    missing = meta_gradients(lambda bn: setattr(bn, name, None), **options)
    fixed = meta_gradients(lambda bn: getattr(bn, name).requires_grad_(False), **options)
    assert missing.keys() == fixed.keys() - {f"1.{name}"}
    assert f"1.{'bias' if name == 'weight' else 'weight'}" in missing
    for key, gradient in missing.items():
        torch.testing.assert_close(gradient, fixed[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("missing", ["weight", "bias"])
def test_a_small_norm_without_a_scale_or_a_shift_equals_finite_differences(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "LARGE", 10**9)
    norm: Any = nn.BatchNorm1d(2).double()
    setattr(norm, missing, None)
    make_per_step(nn.Sequential(norm), StepClock(statistics="batch"), 1, affine=False, statistics=False)
    (other,) = {"weight", "bias"} - {missing}

    def run(x: Tensor, value: Tensor) -> Tensor:
        norm._parameters[other] = value
        output: Tensor = norm(x)
        return output

    assert gradgradcheck(run, inputs((4, 2, 3))[:2], atol=1e-4)


@pytest.mark.parametrize("norm", ["batch", "support", "task"])
def test_a_wrong_number_of_channels_is_refused_as_torch_refuses_it(norm: str) -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(48, 2)).double()
    learner = MAMLPlusPlus(net, inner_steps=1, norm=norm)
    images, labels = torch.randn(4, 1, 6, 6, dtype=torch.float64), torch.arange(4) % 2
    with pytest.raises(RuntimeError, match="should contain 3 elements not 1"):
        learner.meta_step([Task(images, labels, images, labels)])


@pytest.mark.parametrize("momentum", [0.1, None], ids=["decay", "average"])
@pytest.mark.parametrize("rows", [[0, 0, 1, 1, 2], [0, 2, 2], [1, 1, 2, 2]], ids=str)
@pytest.mark.parametrize("per_step", [True, False], ids=["row per step", "one row"])
def test_folds_of_all_rows_equal_one_fold_after_another(
    momentum: float | None, rows: list[int], per_step: bool
) -> None:
    norm = nn.BatchNorm1d(3, momentum=momentum).double()
    nn.init.normal_(norm.running_mean, generator=torch.Generator().manual_seed(0))
    (norm,) = make_per_step(nn.Sequential(norm), StepClock(), 3, affine=True, statistics=per_step)
    generator = np.random.default_rng(0)
    seen = [(row, generator.normal(size=3), generator.random(3)) for row in rows]
    expected = {name: norm._buffers[name].numpy().copy() for name in ("running_mean", "running_var")}
    counts = dict.fromkeys(range(3), 0)
    for row, *values in seen:
        at = row if per_step else 0
        counts[at] += 1
        share = 1 / counts[at] if momentum is None else momentum
        for stored, value in zip(expected.values(), values, strict=True):
            place = stored[row] if per_step else stored
            place += share * (value - place)
    passes = [Moments("0", row, torch.from_numpy(mean), torch.from_numpy(var)) for row, mean, var in seen]
    norm.fold(passes, torch.tensor(False))
    norm.fold(passes, torch.tensor(True))
    for name, value in expected.items():
        np.testing.assert_allclose(norm._buffers[name], value, rtol=1e-12)
    assert norm.num_batches_tracked.flatten().tolist() == (list(counts.values()) if per_step else [len(rows)])
