"""TaskNorm against its equations in numpy (Bronskill et al. 2020, arXiv:2003.03284, section 4)."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from metawrap import ArgumentError, FineTune, MAMLPlusPlus, MultiTask, ProtoNet, Task, TaskError
from metawrap.layers.task_norm import blended

SHAPES = [(5, 3, 4, 4), (6, 3, 7), (5, 3)]


def by_equations(x: Any, mean: Any, variance: Any, share: float, *, layer: bool, eps: float = 1e-5) -> Any:
    """One number at a time, in numpy."""
    out = np.empty_like(x)
    for example in range(len(x)):
        for channel in range(x.shape[1]):
            own = x[example] if layer else x[example, channel]
            mu_i, var_i = own.mean(), own.var()
            mu = share * mean[channel] + (1 - share) * mu_i
            var = share * (variance[channel] + (mean[channel] - mu) ** 2) + (1 - share) * (var_i + (mu_i - mu) ** 2)
            out[example, channel] = (x[example, channel] - mu) / np.sqrt(var + eps)
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("blend", ["instance", "layer"])
def test_blend_is_that_of_the_equations(blend: Any, shape: tuple[int, ...]) -> None:
    drawn = np.random.default_rng(0)
    x, mean, variance = drawn.normal(size=shape), drawn.normal(size=3), drawn.uniform(0.5, 2, size=3)
    parts = [torch.tensor(part, dtype=torch.float64) for part in (x, mean, variance, 0.3)]
    centre, scale = blended(*parts, blend, 1e-5)
    found = (parts[0] - centre) * scale
    expected = by_equations(x, mean, variance, 0.3, layer=blend == "layer")
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("norm", ["task", "task_layer"])
@pytest.mark.parametrize("shots", [1, 3])
def test_the_share_depends_on_the_size_of_the_support_set(norm: str, shots: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 2)).double()
    learner = ProtoNet(net, norm=norm)
    with torch.no_grad():
        learner.model[1].blend_scale.fill_(0.2)
        learner.model[1].blend_offset.fill_(-0.5)
    support_x = torch.randn(2 * shots, 1, 6, 6, dtype=torch.float64)
    adapted = learner.adapt(support_x, torch.arange(2 * shots) % 2)
    hidden, image = net[0](support_x).detach().numpy(), torch.randn(1, 1, 6, 6, dtype=torch.float64)
    share = 1 / (1 + np.exp(-(0.2 * 2 * shots - 0.5)))
    axes = (0, 2, 3)
    expected = by_equations(
        net[0](image).detach().numpy(), hidden.mean(axes), hidden.var(axes), share, layer=norm == "task_layer"
    )
    np.testing.assert_allclose(adapted[1](adapted[0](image)).detach().numpy(), expected, rtol=1e-9)
    assert torch.equal(adapted.train()(image), adapted.eval()(image)), "it has no training mode"
    again = pickle.loads(pickle.dumps(adapted))
    assert torch.equal(again(image), adapted(image))


def test_scale_and_offset_are_learned_by_the_outer_loop_alone() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).double()
    learner = MAMLPlusPlus(net, norm="task", inner_steps=2)
    task = Task(torch.randn(6, 4).double(), torch.arange(6) % 2, torch.randn(4, 4).double(), torch.arange(4) % 2)
    learner.meta_step([task])
    assert {"1.blend_scale", "1.blend_offset"} <= set(learner.describe().learned_only)
    assert learner.model[1].blend_scale.item() != 0
    assert learner.model[1].blend_offset.item() != 0


@pytest.mark.parametrize("method", [FineTune, MultiTask])
def test_methods_that_fit_plain_networks_refuse_it(method: Any) -> None:
    with pytest.raises(ArgumentError, match=r'fits plain networks.*Use "support" or "running"'):
        method(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)), norm="task")


def test_one_value_per_channel_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    with pytest.raises(TaskError, match="one value per channel has no variance"):
        MAMLPlusPlus(net, norm="task").adapt(torch.randn(1, 4), torch.zeros(1, dtype=torch.long))
