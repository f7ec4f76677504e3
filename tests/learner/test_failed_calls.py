"""A failed call leaves the learner as it was, and options without effect are refused."""

from __future__ import annotations

import copy
import gc
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from face import assert_same_state, snapshot
from models import NormedMlp, class_tasks, seeded
from torch import Tensor, nn

from metawrap import MAML, ArgumentError, DivergedError, MAMLPlusPlus, Reptile, Task
from metawrap.inner_loop.inner_loop import Point


def batch_of(seed: int = 0) -> list[Task]:
    return [Task(*parts) for parts in zip(*class_tasks((4,), seed=seed), strict=True)]


def state_of(learner: Any) -> dict[str, Any]:
    return snapshot({"state": dict(learner.state_dict()), "optimizer": learner.optimizer.state_dict()})  # type: ignore[no-any-return]


def with_nan(batch: list[Task]) -> list[Task]:
    return [task.map(lambda x: x * float("nan") if x.is_floating_point() else x) for task in batch]


def test_divergence_leaves_weights_optimizer_and_counters_as_they_were() -> None:
    learner = MAMLPlusPlus(seeded(NormedMlp), inner_steps=2, outer_update={"max_skipped_steps": 2})
    learner.meta_step(batch_of())
    learner.meta_step(batch_of())
    assert learner.meta_step(with_nan(batch_of())).skipped
    before, iteration = state_of(learner), learner.iteration
    with pytest.raises(DivergedError, match="At least 2 meta-steps in a row"):
        learner.meta_step(with_nan(batch_of()))
    after = state_of(learner)
    skipped, expected = (state["state"].pop("skipped_steps") for state in (after, before))
    assert int(skipped[0]) == int(expected[0])
    assert_same_state(after, before)
    assert learner.iteration == iteration
    assert not learner.meta_step(batch_of()).skipped


def test_a_row_of_skipped_steps_that_has_ended_is_no_divergence() -> None:
    learner = MAMLPlusPlus(seeded(NormedMlp), inner_steps=2, outer_update={"max_skipped_steps": 4})
    bad, good = with_nan(batch_of()), batch_of()
    assert [learner.meta_step(each).skipped for each in (bad, bad, bad, good, bad, bad, bad, good)] == [
        *(True, True, True, False),
        *(True, True, True, False),
    ]


class Fails(torch.optim.lr_scheduler.LambdaLR):
    broken = False

    def step(self, epoch: int | None = None) -> None:
        if self.broken:
            self.last_epoch += 1
            self.optimizer.param_groups[0]["lr"] = 99.0
            raise RuntimeError("the user's own")
        super().step()


def with_scheduler() -> MAML:
    scheduler = lambda optimizer: Fails(optimizer, lambda _: 1.0)
    return MAML(seeded(NormedMlp), inner_steps=1, iterations_per_epoch=2, scheduler=scheduler)


def test_a_scheduler_that_raises_undoes_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, twin = (with_scheduler() for _ in range(2))
    learner.meta_step(batch_of())
    before, buffers = state_of(learner), copy.deepcopy(dict(learner.named_buffers()))
    monkeypatch.setattr(Fails, "broken", True)
    with pytest.raises(RuntimeError, match="the user's own"):
        learner.meta_step(batch_of(1))
    assert_same_state(state_of(learner), before)
    assert all(torch.equal(value, buffers[name]) for name, value in learner.named_buffers())
    assert learner.scheduler.last_epoch == twin.scheduler.last_epoch  # type: ignore[union-attr]
    monkeypatch.setattr(Fails, "broken", False)
    for seed in (0, 1):
        twin.meta_step(batch_of(seed))
    learner.meta_step(batch_of(1))
    assert_same_state(dict(learner.state_dict()), dict(twin.state_dict()))


def test_a_scheduler_sees_the_epoch_that_begins() -> None:
    seen: list[int] = []
    watched: list[MAML] = []

    class Watches(torch.optim.lr_scheduler.LambdaLR):
        def step(self, epoch: int | None = None) -> None:
            seen.extend(each.epoch for each in watched)
            super().step()

    scheduler = lambda optimizer: Watches(optimizer, lambda _: 1.0)
    learner = MAML(seeded(NormedMlp), inner_steps=1, iterations_per_epoch=2, scheduler=scheduler)
    watched.append(learner)
    steps = [learner.meta_step(batch_of()) for _ in range(4)]
    assert seen == [1, 2]
    assert [(step.epoch, step.iteration) for step in steps] == [(0, 0), (0, 1), (1, 2), (1, 3)]


def test_a_learner_with_nothing_to_learn_is_named() -> None:
    learner = MAML(seeded(NormedMlp), inner_steps=1)
    learner.requires_grad_(False)
    with pytest.raises(ArgumentError, match=r"all are frozen.*requires_grad_\(\)"):
        learner.meta_step(batch_of())
    assert learner.evaluate(batch_of()).tasks == len(batch_of())


class Scaled(nn.Module):
    """Its loss has a gradient of any size: weight * scale."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"max_grad_value": 1.0}])
def test_finite_gradients_whose_squares_overflow_are_no_skipped_step(options: dict[str, float]) -> None:
    x = torch.tensor([[3e30, 4e30, 0.0]])
    learner = MAML(
        Scaled(),
        inner_steps=1,
        inner_lr=0.0,
        loss_fn=lambda prediction, y: prediction.sum(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        outer_update=options,
    )
    metrics = learner.meta_step([Task(x, torch.zeros(1), x, torch.zeros(1))])
    assert not metrics.skipped
    assert metrics.gradient_norm == pytest.approx(5e30, rel=1e-5)
    moved = 1 - learner.model.weight.detach()
    expected = {"max_grad_norm": [0.6, 0.8, 0.0], "max_grad_value": [1.0, 1.0, 0.0]}.get(
        next(iter(options), ""), x[0].tolist()
    )
    torch.testing.assert_close(moved, torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_adam_takes_no_gradient_whose_square_is_infinite() -> None:
    x = torch.tensor([[3e30, 4e30, 0.0]])
    learner = MAML(Scaled(), inner_steps=1, inner_lr=0.0, loss_fn=lambda prediction, y: prediction.sum())
    assert learner.meta_step([Task(x, torch.zeros(1), x, torch.zeros(1))]).skipped
    small = torch.ones(1, 3)
    assert not learner.meta_step([Task(small, torch.zeros(1), small, torch.zeros(1))]).skipped
    state = learner.optimizer.state[learner.model.weight]
    assert bool(state["exp_avg_sq"].isfinite().all())
    clipped = MAML(
        Scaled(),
        inner_steps=1,
        inner_lr=0.0,
        loss_fn=lambda prediction, y: prediction.sum(),
        outer_update={"max_grad_norm": 1.0},
    )
    metrics = clipped.meta_step([Task(x, torch.zeros(1), x, torch.zeros(1))])
    assert not metrics.skipped
    assert bool(clipped.optimizer.state[clipped.model.weight]["exp_avg_sq"].isfinite().all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_with_an_entry_that_is_not_finite_is_skipped(value: float) -> None:
    x = torch.tensor([[value, 1e30, 0.0]])
    learner = MAML(Scaled(), inner_steps=1, inner_lr=0.0, loss_fn=lambda prediction, y: prediction.sum())
    assert learner.meta_step([Task(x, torch.zeros(1), x, torch.zeros(1))]).skipped
    assert torch.equal(learner.model.weight, torch.ones(3))


def test_find_trouble_follows_reptile_through_its_target_examples() -> None:
    """Reptile's inner steps take support and target examples; the trouble is in the first step, not after the last."""
    task = batch_of()[0]
    task = Task(task.support_x, task.support_y, task.target_x * 1e300, task.target_y)
    learner = Reptile(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double(), inner_steps=3, inner_lr=1e30)
    [trouble] = learner.find_trouble([task])
    assert trouble.step in (0, 1)


class PowerAtZero(nn.Module):
    """Its second derivative is NaN where its input is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x)
        return hidden + (hidden * 0).pow(1.5)


def test_anomaly_detection_names_the_operation_although_probes_of_the_first_task_fail_under_it() -> None:
    learner = MAML(PowerAtZero(), inner_steps=1, outer_update={"detect_anomaly": True})
    with pytest.raises(DivergedError, match="PowBackward"):
        learner.meta_step(batch_of())


def test_probes_of_the_first_task_take_plain_inner_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from metawrap.checks import first_task

    spy = Mock(side_effect=first_task.inner_optimizer)
    monkeypatch.setattr(first_task, "inner_optimizer", spy)
    MAML(seeded(NormedMlp), inner_steps=1, engine="higher", inner_update={"rule": "adam"}).meta_step(batch_of())
    assert {call.kwargs["options"].rule for call in spy.call_args_list} == {"sgd"}


def test_adapt_keeps_the_weights_of_one_inner_step_at_a_time() -> None:
    learner, task = MAML(seeded(NormedMlp), inner_steps=1), batch_of()[0]
    learner.adapt(task.support_x, task.support_y)
    gc.collect()
    alive: list[int] = []

    def count(module: nn.Module, args: Any) -> None:
        alive.append(sum(type(each) is Point for each in gc.get_objects()))

    handle = learner.model.register_forward_pre_hook(count)
    learner.adapt(task.support_x, task.support_y, steps=8)
    handle.remove()
    assert max(alive) <= 4


def test_adapt_refuses_a_task_id_that_has_no_effect() -> None:
    learner, task = MAML(seeded(NormedMlp), inner_steps=1), batch_of()[0]
    with pytest.raises(ArgumentError, match=r'task_id.*"head_init": "stored"'):
        learner.adapt(task.support_x, task.support_y, task_id="mine")


@pytest.mark.parametrize("workers_in", ["threads", "processes"])
def test_describe_does_not_say_threads_where_processes_run(workers_in: str) -> None:
    learner = MAML(seeded(NormedMlp), execution={"workers": 2, "workers_in": workers_in})
    described = learner.describe()
    assert "thread" not in described.engine_reason
    assert workers_in[:-1].rstrip("e") in described.speed
