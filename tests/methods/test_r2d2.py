"""R2D2 against numpy's solution of the primal system."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from by_hand import LABELS, embedded, mlp, one_hot, prediction, task_with
from keywords import grouped
from torch import nn

from metawrap import R2D2, MetaOptNet


@pytest.mark.parametrize("width", [2, 5, 6, 40])
def test_logits_equal_those_of_the_primal_system_whichever_is_solved(width: int) -> None:
    model, task = mlp(width), task_with()
    learner = R2D2(model, regularizer=0.3, scale=4.0)
    with torch.no_grad():
        learner.bias.fill_(0.2)
    x, target = (embedded(model, x) for x in (task.support_x, task.target_x))
    x, target = (np.hstack([e, np.ones((len(e), 1))]) for e in (x, target))
    strength = 0.3 * len(x) * np.eye(width + 1)
    weights = np.linalg.solve(x.T @ x + strength, x.T @ one_hot(task.support_y))
    np.testing.assert_allclose(prediction(learner, task), 4 * target @ weights + 0.2, rtol=1e-9)


def test_the_regulariser_the_scale_and_the_bias_are_learned_and_the_first_stays_positive() -> None:
    learner, task = R2D2(mlp(), meta_lr=0.5, regularizer=1e-3), task_with()
    before = {name: float(getattr(learner, name).detach()) for name in ("log_regularizer", "scale", "bias")}
    losses = [learner.meta_step([task]).loss for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    after = {name: float(getattr(learner, name).detach()) for name in before}
    assert all(after[name] != before[name] for name in before)
    assert float(learner.log_regularizer.exp().detach()) > 0


@pytest.mark.parametrize(("method", "options"), [(R2D2, {}), (MetaOptNet, {}), (MetaOptNet, {"solver": "ridge"})])
@pytest.mark.parametrize("ways", [2, 7])
def test_the_deployed_head_is_a_plain_linear_layer_of_as_many_ways(method: Any, options: Any, ways: int) -> None:
    learner, task = method(mlp(), **grouped(**options)), task_with(torch.arange(ways), targets=9)
    learner.meta_step([task])
    module = learner.adapt(task.support_x, task.support_y)
    if method is MetaOptNet:
        assert float(learner.scale.detach()) != 10
    linear = [part for part in module.modules() if isinstance(part, nn.Linear)][-1]
    assert type(linear) is nn.Linear
    assert (linear.in_features, linear.out_features) == (5, ways)
    assert not linear.training


def test_one_regulariser_suits_every_number_of_shots() -> None:
    learner, task, twice = R2D2(mlp()), task_with(), task_with()
    doubled = type(task)(torch.cat([twice.support_x] * 2), torch.cat([LABELS] * 2), twice.target_x, twice.target_y)
    np.testing.assert_allclose(prediction(learner, doubled), prediction(learner, task), rtol=1e-9)


def test_half_precision_is_solved_in_single() -> None:
    model, task = mlp(), task_with()
    exact = prediction(R2D2(model), task)
    found = R2D2(model.bfloat16()).evaluate(
        [task.map(lambda t: t.bfloat16() if t.is_floating_point() else t)], keep_predictions=True
    )
    assert found.predictions[0].dtype == torch.bfloat16
    np.testing.assert_allclose(found.predictions[0].float().numpy(), exact, atol=0.1)


def test_it_says_what_it_was_built_with() -> None:
    assert R2D2(mlp(), regularizer=7.0).describe().settings["regularizer"] == 7.0
