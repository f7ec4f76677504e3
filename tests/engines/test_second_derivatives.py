"""Operations whose second derivative in torch is wrong: the meta-gradient is that of finite differences."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from differences import AT_MOST, difference_error
from face import build, gradients_of, rates_of, values_of
from models import class_tasks, seeded
from oracle import assert_same_gradients
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from metawrap.engines import PlainForms

Norm = Callable[..., nn.Module]


def legacy(module: nn.Module, dim: int | None = 0) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It is deprecated; people have it all the same.
        return nn.utils.weight_norm(module, dim=dim)


def perceptron(norm: Norm) -> nn.Module:
    return nn.Sequential(nn.Flatten(), norm(nn.Linear(12, 5)), nn.Tanh(), norm(nn.Linear(5, 3), dim=None))


class TemporalBlocks(nn.Module):
    """A temporal convolutional network: dilated causal convolutions, each with a weight norm, and a residual."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.first = norm(nn.Conv1d(2, 4, 2, padding=1))
        self.second = norm(nn.Conv1d(4, 4, 2, padding=2, dilation=2))
        self.beside, self.head = nn.Conv1d(2, 4, 1), norm(nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x)[..., :-1])
        return self.head(torch.tanh(self.second(hidden)[..., :-2] + self.beside(x))[..., -1])


class Waves(nn.Module):
    """Features, and a grouped positional convolution whose weight norm keeps the last axis, as in wav2vec 2.0."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.features = nn.Conv1d(2, 4, 3, stride=2)
        self.position = norm(nn.Conv1d(4, 4, 3, padding=1, groups=2), dim=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.head((x + nn.functional.gelu(self.position(x))).mean(2))


class ByFunction(nn.Module):
    """Calls torch's function itself."""

    def __init__(self, _: Norm) -> None:
        super().__init__()
        self.v, self.g = nn.Parameter(torch.randn(5, 12)), nn.Parameter(torch.rand(5, 1))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x.flatten(1) @ torch._weight_norm(self.v, self.g).T))


BATCH = class_tasks((2, 6))
NETWORKS = {"perceptron": perceptron, "temporal": TemporalBlocks, "waves": Waves, "function": ByFunction}
WAYS: list[tuple[Norm, dict[str, Any]]] = [
    (legacy, {"engine": "functional"}),
    (legacy, {"engine": "higher", "memory": "flat"}),
    (parametrizations.weight_norm, {"engine": "functional", "memory": "flat"}),
    (parametrizations.weight_norm, {"engine": "batched"}),
]


@pytest.mark.sampled(8)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("norm", "way"), WAYS, ids=[f"{n.__module__[-6:]}-{'-'.join(w.values())}" for n, w in WAYS])
def test_weight_norms_meta_gradient_is_that_of_finite_differences(
    network: str, norm: Norm, way: dict[str, Any]
) -> None:
    learner = build(seeded(partial(NETWORKS[network], norm)), inner_lr=0.5, **way)
    learner.train(network != "waves")  # Forward in eval mode has a meta-gradient, too.
    assert error_of(learner) <= AT_MOST


def error_of(learner: Any) -> float:
    """Of the meta-gradient along a random direction, against central differences of the meta-loss."""
    learner(BATCH).loss.backward()
    values = values_of(learner.model) | {f"lr/{name}": rate for name, rate in rates_of(learner).items()}

    @torch.no_grad()
    def loss(moved: dict[str, Tensor]) -> float:
        for name, parameter in learner.model.named_parameters():
            parameter.copy_(moved[name])
        for name, rate in learner.learning_rates.items():
            rate.copy_(moved[f"lr/{name}"])
        return float(learner(BATCH).loss)

    return difference_error(loss, values, gradients_of(learner))


@pytest.mark.parametrize(("network", "workers_in"), [(ByFunction, "threads"), (TemporalBlocks, "processes")])
def test_weight_norm_in_workers_has_the_same_meta_gradient(network: Norm, workers_in: str) -> None:
    found = []
    for options in ({}, {"workers": 2, "workers_in": workers_in}):
        model = seeded(partial(network, parametrizations.weight_norm))
        learner = build(model, engine="functional", **options)
        learner.meta_step(BATCH)
        found.append(gradients_of(learner))
    assert_same_gradients(found[1], found[0])


@pytest.mark.sampled(6)
@pytest.mark.parametrize("call", [torch._weight_norm, torch.ops.aten._weight_norm, torch.ops.aten._weight_norm.default])
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_weight_norm_stands_in_with_the_same_values_and_a_right_second_derivative(call: Any, dim: int) -> None:
    torch.manual_seed(0)
    v = torch.randn(3, 4, 2, dtype=torch.float64)
    g = 1.3 * torch.norm_except_dim(v, 2, dim)
    with PlainForms() as mode:
        torch.testing.assert_close(call(v, g, dim), torch._weight_norm(v, g, dim), rtol=1e-14, atol=0)
        assert torch.autograd.gradgradcheck(lambda *t: call(*t, dim), (v.requires_grad_(), g.requires_grad_()))
    assert mode.seen


class ShiftedNorms(nn.Module):
    """A norm with a shift and no scale, called as a function, on inputs that need no gradient."""

    def __init__(self, norm: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.shift, self.head = norm, nn.Parameter(torch.randn(2)), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(x, self.shift)).flatten(1))


SHIFTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "batch": lambda x, shift: F.batch_norm(x, None, None, bias=shift, training=True),
    "stored": lambda x, shift: F.batch_norm(x, x.new_zeros(2), x.new_ones(2), bias=shift),
    "instance": lambda x, shift: F.instance_norm(x, bias=shift),
    "layer": lambda x, shift: F.layer_norm(x.transpose(1, 2), (2,), bias=shift),
    "named": lambda x, shift: torch.layer_norm(x.transpose(1, 2), (2,), bias=shift),
    "aten": lambda x, shift: torch.ops.aten.layer_norm.default(x.transpose(1, 2), [2], None, shift),
}


@pytest.mark.parametrize("options", [{"engine": "functional"}, {"engine": "higher", "memory": "flat"}], ids=str)
@pytest.mark.parametrize("norm", SHIFTED)
def test_a_norm_with_a_shift_alone_has_the_meta_gradient_of_finite_differences(
    norm: str, options: dict[str, Any]
) -> None:
    learner = build(seeded(partial(ShiftedNorms, SHIFTED[norm])), inner_lr=0.5, **options)
    assert error_of(learner) <= AT_MOST
