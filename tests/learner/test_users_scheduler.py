"""A scheduler of the user is part of the learner's state: what docs/start.md saves is enough to train on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from face import assert_same_state
from models import NormedMlp, class_tasks, seeded
from torch.optim import lr_scheduler as schedulers

from metawrap import MAML, CheckpointError, MetaWrapWarning, ProtoNet, Task


class Halved:
    """A rate that is halved at each call."""

    rate = 1.0

    def __call__(self, epoch: int) -> float:
        self.rate /= 2
        return self.rate


FACTORIES: dict[str, Any] = {
    "LambdaLR of an object": lambda optimizer: schedulers.LambdaLR(optimizer, Halved()),
    "ChainedScheduler": lambda optimizer: schedulers.ChainedScheduler(
        [schedulers.LinearLR(optimizer), schedulers.ExponentialLR(optimizer, 0.5)]
    ),
    "LambdaLR": lambda optimizer: schedulers.LambdaLR(optimizer, lambda epoch: 0.1**epoch),
    "StepLR": lambda optimizer: schedulers.StepLR(optimizer, 2, gamma=0.1),
    "MultiStepLR": lambda optimizer: schedulers.MultiStepLR(optimizer, [1, 3]),
    "CosineAnnealingLR": lambda optimizer: schedulers.CosineAnnealingLR(optimizer, 5),
    "OneCycleLR": lambda optimizer: schedulers.OneCycleLR(optimizer, 0.1, total_steps=9),
    "CyclicLR": lambda optimizer: schedulers.CyclicLR(optimizer, 0.01, 0.1, 2, cycle_momentum=False),
    "SequentialLR": lambda optimizer: schedulers.SequentialLR(
        optimizer, [schedulers.LinearLR(optimizer), schedulers.ExponentialLR(optimizer, 0.5)], [2]
    ),
}


def learner_with(scheduler: Any, method: Any = MAML) -> Any:
    steps = {"inner_steps": 1} if method is MAML else {}
    return method(seeded(NormedMlp), iterations_per_epoch=2, meta_lr=0.01, scheduler=scheduler, **steps)


def train(learner: Any, epochs: range) -> list[float]:
    """The outer rate of each meta-step."""
    batches = [list(map(Task, *class_tasks((4,), tasks=2, shots=2, seed=step))) for step in range(2 * epochs.stop)]
    return [learner.meta_step(batch).meta_lr for batch in batches[2 * epochs.start :]]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("method", [MAML, ProtoNet])
def test_what_start_md_saves_is_enough_to_train_on_bit_for_bit(name: str, method: Any, tmp_path: Path) -> None:
    whole, half = (learner_with(FACTORIES[name], method) for _ in range(2))
    rates = train(whole, range(5))
    train(half, range(2))
    torch.save({"learner": half.state_dict(), "optimizer": half.optimizer.state_dict()}, tmp_path / "learner.pt")
    again = learner_with(FACTORIES[name], method)
    stored = torch.load(tmp_path / "learner.pt", weights_only=True)
    again.load_state_dict(stored["learner"])
    again.optimizer.load_state_dict(stored["optimizer"])
    assert train(again, range(2, 5)) == rates[4:]
    assert_same_state(again.state_dict(), whole.state_dict())
    assert_same_state(again.optimizer.state_dict(), whole.optimizer.state_dict())


def test_rates_after_loading_are_those_of_the_formula_with_and_without_the_optimizers_state() -> None:
    learner = learner_with(FACTORIES["LambdaLR"])
    train(learner, range(2))
    again = learner_with(FACTORIES["LambdaLR"])
    again.load_state_dict(learner.state_dict())
    expected = [0.01 * 0.1**epoch for epoch in (2, 2, 3, 3)]
    assert train(again, range(2, 4)) == pytest.approx(expected)
    assert learner.scheduler.last_epoch == 2  # Its own: the state was copied.


@pytest.mark.parametrize(
    ("saved", "words"), [("LambdaLR", "LambdaLR"), ("SequentialLR", "SequentialLR, LinearLR, ExponentialLR")]
)
def test_a_scheduler_of_another_kind_is_refused_and_nothing_is_loaded(saved: str, words: str) -> None:
    nested = lambda o: schedulers.SequentialLR(o, [schedulers.LinearLR(o), schedulers.StepLR(o, 3)], [2])
    learner = learner_with(FACTORIES[saved])
    other = learner_with(nested if saved == "SequentialLR" else FACTORIES["StepLR"])
    train(learner, range(1))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(
        CheckpointError, match=rf"saved with {words}, but has [\w, ]*StepLR\. Build it with the scheduler"
    ):
        other.load_state_dict(learner.state_dict())
    assert_same_state(other.state_dict(), before)


@pytest.mark.parametrize(("saved", "built"), [("StepLR", None), (None, "StepLR")])
def test_a_scheduler_on_one_side_alone_is_told(saved: str | None, built: str | None) -> None:
    learner, other = (learner_with(name and FACTORIES[name]) for name in (saved, built))
    other.load_state_dict(learner.state_dict())  # Nothing was trained yet.
    train(learner, range(1))
    with pytest.warns(MetaWrapWarning, match=f"saved with {saved or 'none'}, but has {built or 'none'}.*scheduler="):
        other.load_state_dict(learner.state_dict())


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", FACTORIES)
def test_a_failed_load_puts_the_scheduler_back(name: str) -> None:
    learner, other, fresh = (learner_with(FACTORIES[name]) for _ in range(3))
    train(learner, range(3))
    state = learner.state_dict()
    state.popitem()
    with pytest.raises(CheckpointError):
        other.load_state_dict(state)
    assert train(other, range(4)) == train(fresh, range(4))


def test_a_scheduler_that_holds_objects_is_left_out_with_a_word() -> None:
    class Warmup(schedulers.ExponentialLR):
        def __init__(self, optimizer: Any) -> None:
            self.after = schedulers.StepLR(optimizer, 1)
            super().__init__(optimizer, 0.5)

    learner = learner_with(Warmup)
    with pytest.warns(MetaWrapWarning, match="Warmup holds objects.*save the state of learner.scheduler"):
        state = learner.state_dict()
    assert "scheduler" not in state["_extra_state"]
