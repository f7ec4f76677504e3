"""Batch norm, ReLU and max-pooling with the pooling first: against the loop by hand, and against finite differences."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from face import assert_step_equals_oracle, build
from models import class_tasks, seeded
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrize

from metawrap.layers import per_step_norm, quick_forms
from metawrap.layers.norm_of_pooled import normalised, pooled_with_moments
from metawrap.layers.quick_forms import QuickForms

LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each time that a pooling ran first, on inputs of any size."""
    seen: list[Any] = []
    for name in ("pooled_with_moments", "max_pool2d"):
        own = getattr(per_step_norm, name)
        monkeypatch.setattr(per_step_norm, name, lambda *args, own=own, name=name: (seen.append(name), own(*args))[1])
    monkeypatch.setattr(quick_forms, "LARGE_NORM", 0)
    return seen


def network(
    activation: type[nn.Module] = nn.ReLU, norm: type[nn.Module] = nn.BatchNorm2d, **pooling: Any
) -> nn.Sequential:
    block = nn.Sequential(nn.Conv2d(2, 4, 3), norm(4), activation(), nn.MaxPool2d(2, **pooling))
    return nn.Sequential(block, nn.Flatten(), nn.LazyLinear(3))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("window", [([2, 2], [2, 2], [0, 0], [1, 1], False), ([3, 3], [2, 2], [1, 1], [1, 1], True)])
def test_moments_and_pooled_numbers_equal_finite_differences(window: Any, layout: torch.memory_format) -> None:
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 3
    x = x.contiguous(memory_format=layout).requires_grad_()
    assert gradcheck(lambda x: pooled_with_moments(x, window), x)
    assert gradgradcheck(lambda x: pooled_with_moments(x.sin() + x, window), x)


@pytest.mark.parametrize("affine", [0, 1, 2])
def test_the_norm_equals_finite_differences(affine: int) -> None:
    torch.manual_seed(0)
    values = [torch.randn(2, 3, 3, 2), torch.randn(3), torch.rand(3) + 0.3, *torch.randn(affine, 3)]
    values = [value.double().requires_grad_() for value in values]
    run = lambda *values: normalised(*values, *[None] * (2 - affine), 1e-3)
    assert gradcheck(run, values)
    assert gradgradcheck(run, values)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("window", [{}, {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}], ids=str)
@pytest.mark.parametrize(("norm", "first"), [("batch", "pooled_with_moments"), ("support", "max_pool2d")])
def test_a_meta_step_equals_the_loop_by_hand(norm: str, first: str, window: Any, last: bool, runs: list[Any]) -> None:
    def made() -> nn.Module:
        model = network(nn.LeakyReLU)
        model[0][3] = nn.MaxPool2d(**{"kernel_size": 2} | window)
        model(torch.zeros(2, 2, 9, 8))
        return model

    learner = build(seeded(made), norm=norm, multi_step_loss=True, msl_epochs=5, channels_last=last)
    batch = class_tasks((2, 9, 8))
    assert_step_equals_oracle(learner, seeded(made), batch, [0.5, 0.5], norm=norm)
    assert first in runs


def of_learner(norm: type[nn.Module] = nn.BatchNorm2d, parametrization: nn.Module | None = None, **pooling: Any) -> Any:
    """The block of a learner's network, in training mode, whose norm follows the batch."""
    model = network(norm=norm, **pooling)
    if parametrization is not None:
        parametrize.register_parametrization(model[0][1], "weight", parametrization)
    model[2] = nn.Linear(1, 1)
    learner = build(model.double())
    learner.wrapped.clock.statistics = "batch"
    return learner.model[0]


def lent(block: Any) -> Tensor:
    x = torch.randn(3, 2, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = block(x)
    with QuickForms((module, module) for module in block.modules()).lent(twice=False):
        found: Any = block(x)
    torch.testing.assert_close(found, expected)
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("stride", [2, None, np.int64(2)], ids=repr)
def test_a_block_is_lent_it(stride: Any, runs: list[Any]) -> None:
    block = of_learner()
    block[3].stride = stride
    assert lent(block).grad_fn is not None
    assert runs == ["pooled_with_moments"]
    assert "forward" not in vars(block)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_a_hook_sees_what_its_layer_gives(layer: int, runs: list[Any]) -> None:
    block, shapes = of_learner(), []
    block[layer].register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    lent(block)
    assert shapes[0] == shapes[1]
    assert not runs


class Called(nn.BatchNorm2d):
    """Has a `__call__` of its own."""

    def __call__(self, x: Tensor) -> Tensor:
        return 3 * super().__call__(x)


class Wrapper(nn.Module):
    """Shows the attributes of what it holds, and does more."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)

    def forward(self, x: Tensor) -> Tensor:
        return 3 * self.inner(x)


OTHERS = ["negative scale", "negative slope", "indices", "gelu", "own forward", "small", "called", "wrapper", "dilated"]
OTHERS += ["forward mode"]


@pytest.mark.parametrize("case", OTHERS)
def test_other_blocks_run_as_they_are(case: str, runs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    block = of_learner(Called if case == "called" else nn.BatchNorm2d, return_indices=case == "indices")
    with torch.no_grad():
        block[1].weight[..., 1] = -1 if case == "negative scale" else 1
    if case == "negative slope":
        block[2] = nn.LeakyReLU(-0.5)
    elif case == "gelu":
        block[2] = nn.GELU()
    elif case == "own forward":
        block[2].forward = torch.tanh
    elif case == "small":
        monkeypatch.setattr(quick_forms, "LARGE_NORM", 3 * 4 * 7 * 6 + 1)
    elif case == "wrapper":
        block[1] = Wrapper(block[1])
    elif case == "dilated":
        block[3].dilation = 2
    with torch.autograd.forward_ad.dual_level() if case == "forward mode" else nullcontext():
        lent(block)
    assert not runs


def test_a_forward_that_the_user_gives_to_a_block_stays() -> None:
    block = of_learner()
    forms = QuickForms((module, module) for module in block.modules())
    block.forward = lambda x: 2 * x
    with forms.lent(twice=False):
        assert torch.equal(block(torch.ones(1)), torch.tensor([2.0]))
    assert "forward" in vars(block)


def test_a_scale_of_another_length_is_refused_by_torch(runs: list[Any]) -> None:
    block = of_learner()
    block[1].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    forms = QuickForms((module, module) for module in block.modules())
    with forms.lent(twice=False), pytest.raises(RuntimeError, match="weight should contain 4 elements not 2"):
        block(torch.rand(3, 2, 9, 8, dtype=torch.float64))
    assert not runs


def test_a_parametrized_scale_is_computed_once(runs: list[Any]) -> None:
    counted: list[Tensor] = []

    class Counted(nn.Module):
        def forward(self, scale: Tensor) -> Tensor:
            counted.append(scale)
            return scale

    block = of_learner(parametrization=Counted())
    counted.clear()
    lent(block)
    assert not runs
    assert len(counted) == 2  # Once in the plain call, once in the other.
