"""norm="running": rows of how target passes differ from their support sets, as they are folded and used."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from differences import difference_error
from engine_cases import ALL_ENGINES
from face import assert_same_state, build, gradients_of, rates_of
from torch import nn

from metawrap import MAML, ArgumentError, MAMLPlusPlus, MetaWrapWarning, Reptile, Task

STEPS = 2


def network(momentum: float | None = 0.1) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(6, momentum=momentum)
    return nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), nn.Linear(6, 3)).double()


def tasks(seed: int) -> list[Task]:
    drawn = torch.Generator().manual_seed(seed)

    def inputs(count: int) -> torch.Tensor:
        return torch.randn(count, 4, generator=drawn, dtype=torch.float64)

    return [Task(inputs(6), torch.arange(6) % 3, 2 * inputs(9) + 1, torch.arange(9) % 3) for _ in range(3)]


def frozen_learner(momentum: float | None = 0.1) -> Any:
    """Inner and outer rates of zero: every pass sees the weights of the start, so that moments are known by hand."""
    learner = MAMLPlusPlus(
        network(momentum),
        norm="running",
        inner_steps=STEPS,
        inner_lr=0.0,
        learn_inner_lr=False,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
    )
    return learner


@pytest.mark.parametrize("momentum", [0.1, 0.9, None])
def test_rows_are_averages_over_meta_steps_of_the_mean_over_tasks(momentum: float | None) -> None:
    learner, eps = frozen_learner(momentum), 1e-5
    first, shift, ratio = learner.model[0], np.zeros(6), np.zeros(6)
    for step in range(12):
        seen = []
        for task in tasks(step):
            support, target = (first(x).detach().numpy() for x in (task.support_x, task.target_x))
            deviation, own = (np.sqrt(x.var(0) + eps) for x in (support, target))
            seen.append(((target.mean(0) - support.mean(0)) / deviation, np.log(own / deviation)))
        share = max(1 / (step + 1), 0.0 if momentum is None else momentum / 5)
        shift = (1 - share) * shift + share * np.mean([one for one, _ in seen], 0)
        ratio = (1 - share) * ratio + share * np.mean([one for _, one in seen], 0)
        learner.meta_step(tasks(step))
    for row in range(STEPS):
        np.testing.assert_allclose(learner.model[1].target_shift[row].numpy(), shift, rtol=1e-9)
        np.testing.assert_allclose(learner.model[1].target_log_ratio[row].numpy(), ratio, rtol=1e-9)
    assert learner.model[1].shifts_folded.tolist() == [12, 12]


def test_targets_that_differ_from_support_sets_in_the_same_way_are_brought_back() -> None:
    learner = frozen_learner()
    for step in range(20):
        learner.meta_step(tasks(step))
    task = tasks(99)[0]
    held = learner.adapt(task.support_x, task.support_y)[1]
    # The targets are twice as far apart as the support examples, and moved.
    hidden = learner.model[0](torch.cat([one.target_x for seed in range(200, 240) for one in tasks(seed)])).detach()
    away = ((hidden.mean(0) - held.running_mean) / held.running_var.sqrt()).abs()
    support = learner.model[0](task.support_x).detach()
    without = ((hidden.mean(0) - support.mean(0)) / held.running_var.sqrt()).abs()
    assert away.mean() < 0.6 * without.mean()


def test_a_skipped_meta_step_folds_nothing() -> None:
    learner = frozen_learner()
    learner.meta_step(tasks(0))
    before = copy.deepcopy(learner.model[1].state_dict())
    bad = tasks(1)
    bad[1].target_x[0, 0] = float("inf")
    assert bool(learner.meta_step(bad).skipped)
    assert all(torch.equal(value, before[name]) for name, value in learner.model[1].state_dict().items())


@pytest.mark.parametrize("norm", ["running", "task", "task_layer"])
@pytest.mark.parametrize("engine", ALL_ENGINES)
def test_meta_gradient_is_that_of_finite_differences(engine: str, norm: str) -> None:
    made: dict[str, Any] = {"method": MAML, "norm": norm, "engine": engine, "learn_inner_lr": True}
    learner, batch = build(network(), **made), tasks(0)
    values = {name: value.detach().clone() for name, value in learner.model.named_parameters()}
    values |= {f"lr/{name}": rate for name, rate in rates_of(learner).items()}
    state = copy.deepcopy(learner.state_dict())

    def put(present: Any) -> None:
        # The statistics as they were: each forward in training folds.
        learner.load_state_dict(copy.deepcopy(state))
        with torch.no_grad():
            for name, value in learner.model.named_parameters():
                value.copy_(present[name])
            for name, rate in learner.learning_rates.items():
                rate.copy_(present[f"lr/{name}"])

    def loss(present: Any) -> float:
        put(present)
        return float(learner(batch).loss.detach())

    put(values)
    learner(batch).loss.backward()
    assert difference_error(loss, values, gradients_of(learner)) < 1e-6


def test_without_rows_it_is_the_support_policy_and_the_warning_says_so() -> None:
    learner, batch = MAMLPlusPlus(network(), inner_steps=STEPS, norm="batch"), tasks(0)
    learner.meta_step(batch)
    with pytest.warns(MetaWrapWarning, match='no shifts of targets either, so this equals norm="support"'):
        found = learner.evaluate(batch, norm="running")
    with pytest.warns(MetaWrapWarning, match="trained for these statistics"):
        assert found.loss == learner.evaluate(batch, norm="support").loss


def test_reptile_refuses_it() -> None:
    with pytest.raises(ArgumentError, match=r'norm: cannot be "running" in Reptile.*Use "support"'):
        Reptile(network(), norm="running")


def test_a_stored_learner_goes_on_bit_for_bit() -> None:
    whole, half = (MAMLPlusPlus(network(), norm="running", inner_steps=STEPS) for _ in range(2))
    for step in range(3):
        whole.meta_step(tasks(step))
        half.meta_step(tasks(step))
    resumed = MAMLPlusPlus(network(), norm="running", inner_steps=STEPS)
    resumed.load_state_dict(half.state_dict())
    resumed.optimizer.load_state_dict(half.optimizer.state_dict())
    for step in range(3, 5):
        whole.meta_step(tasks(step))
        resumed.meta_step(tasks(step))
    assert_same_state(dict(resumed.state_dict()), dict(whole.state_dict()))
