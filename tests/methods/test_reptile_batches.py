"""Reptile's mini-batches: how they are drawn, that they repeat, and what cannot be joined."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from face import as_tasks, assert_same_values, gradients_of
from keywords import grouped
from models import Mlp, NormedMlp, class_tasks, seeded
from reptile_by_hand import BATCH, LR, fitted, whole
from torch import Tensor, nn

from metawrap import Reptile, Task, TaskError


def recorded(learner: Any) -> list[Tensor]:
    seen: list[Tensor] = []
    learner.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    return seen


def test_mini_batches_go_through_all_examples_before_any_comes_again() -> None:
    task = as_tasks(BATCH)[0]
    x, y = whole(task)  # 12 examples
    model = seeded(NormedMlp)
    learner = Reptile(model, inner_steps=5, inner_lr=LR, inner_batch_size=4, engine="functional")
    learner.meta_step([Task(*task)])
    seen = recorded(learner)
    before = copy.deepcopy(learner.model)
    learner.meta_step([Task(*task)])
    batches = seen[:5]
    places = [[int((x == row).all(1).nonzero()) for row in batch] for batch in batches]
    assert all(len(batch) == 4 for batch in places)
    assert sorted(place for batch in places[:3] for place in batch) == list(range(12))
    assert len({place for batch in places[3:] for place in batch}) == 8
    assert places[0] != sorted(places[0]) or places[1] != sorted(places[1])
    end = fitted_on(before, [(x[rows], y[rows]) for rows in places])
    assert_same_values(learner.model.parameters(), end.parameters())


def fitted_on(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    plain = seeded(NormedMlp)
    plain.load_state_dict(
        {name: value.reshape(plain.state_dict()[name].shape) for name, value in model.state_dict().items()}
    )
    return fitted(plain, batches)


def test_mini_batches_are_the_same_for_every_engine_and_whenever_the_run_is_repeated() -> None:
    def trained(**options: Any) -> Any:
        learner = Reptile(seeded(NormedMlp), inner_steps=4, inner_lr=LR, inner_batch_size=5, **grouped(**options))
        before = torch.random.get_rng_state()
        for seed in range(2):
            learner.meta_step(class_tasks((4,), tasks=4, shots=2, seed=seed))
        assert torch.equal(torch.random.get_rng_state(), before)
        return learner

    first = trained(engine="functional")
    for options in ({"engine": "higher"}, {"engine": "batched"}, {"engine": "functional", "workers": 2}):
        assert_same_values(trained(**options).parameters(), first.parameters())
    resumed = Reptile(seeded(NormedMlp), inner_steps=4, inner_lr=LR, inner_batch_size=5)
    resumed.load_state_dict(first.state_dict())
    for learner in (resumed, first):
        learner.meta_step(BATCH)
    assert_same_values(resumed.parameters(), first.parameters(), tolerance=0.0)


def test_in_a_loop_of_ones_own_each_call_draws_other_mini_batches_and_a_resumed_one_the_same() -> None:
    def make() -> Any:
        return Reptile(seeded(NormedMlp), inner_steps=3, inner_lr=LR, inner_batch_size=4, engine="functional")

    def drawn(learner: Any) -> list[list[Tensor]]:
        learner(task)  # The first look.
        seen = recorded(learner)
        calls = []
        for _ in range(4):
            seen.clear()
            learner(task)
            calls.append(seen[:3])
        return calls

    task = [Task(*as_tasks(BATCH)[0])]
    learner = make()
    calls = drawn(learner)
    assert len({torch.cat(call).numpy().tobytes() for call in calls}) == 4
    assert learner.forwards == 5
    for one, other in zip(calls, drawn(make()), strict=True):
        assert torch.equal(torch.cat(one), torch.cat(other))
    # Saved and restored; a copy has it too; evaluation does not count, nor does a call that fails.
    resumed = make()
    resumed.load_state_dict(learner.state_dict())
    twin = copy.deepcopy(learner)
    learner.evaluate(task)
    learner.eval()(task)
    with pytest.raises(TaskError, match="inner_batch_size"):
        Reptile.forward(learner.train(), [task[0].map(lambda tensor: tensor[:1])])
    losses = [float(one(task).loss.detach()) for one in (learner, resumed, twin)]
    assert losses[0] == losses[1] == losses[2]
    assert learner.forwards == resumed.forwards == twin.forwards == 6


def test_forwards_do_not_change_what_a_meta_step_draws_and_an_old_state_has_none() -> None:
    def make(**options: Any) -> Any:
        return Reptile(seeded(NormedMlp), inner_steps=3, inner_lr=LR, inner_batch_size=4, **grouped(**options))

    batch = class_tasks((4,), tasks=4, shots=2, seed=0)
    plain = make(engine="functional")
    for _ in range(2):
        plain.meta_step(batch)
    for options in ({"engine": "functional"}, {"engine": "batched"}, {"engine": "functional", "workers": 2}):
        learner = make(**options)
        for _ in range(2):
            for _ in range(3):
                learner(batch)
            learner.meta_step(batch)
        assert learner.forwards == 6
        assert_same_values(learner.parameters(), plain.parameters())
    old = learner.state_dict()
    assert old["_extra_state"].pop("forwards") == 6
    learner.load_state_dict(old)
    assert learner.forwards == 0


def test_the_first_forward_is_the_gradient_of_a_meta_step_with_mini_batches() -> None:
    learner = Reptile(seeded(NormedMlp), inner_steps=3, inner_lr=LR, inner_batch_size=4)
    learner.meta_step(BATCH)
    twin = copy.deepcopy(learner)
    learner.zero_grad()
    learner(BATCH).loss.backward()
    twin.meta_step(BATCH)
    for name, expected in gradients_of(twin).items():
        if expected is not None:
            torch.testing.assert_close(gradients_of(learner)[name], expected, rtol=1e-9, atol=1e-12)


def test_tasks_that_cannot_be_joined_are_refused_and_nothing_moves() -> None:
    learner = Reptile(seeded(lambda: Mlp(4, 6, 3)), inner_batch_size=13, engine="functional")
    before = copy.deepcopy(learner.state_dict())
    with pytest.raises(TaskError, match=r"inner_batch_size: expected at most the 12 examples"):
        learner.meta_step(BATCH)
    learner = Reptile(Sized(), engine="functional")
    task = Task(torch.randn(3, 4), torch.arange(3), torch.randn(3, 5), torch.arange(3))
    with pytest.raises(TaskError, match=r"one shape, but got"):
        learner.meta_step([task])
    assert before.keys() == Reptile(seeded(lambda: Mlp(4, 6, 3))).state_dict().keys()


class Sized(nn.Module):
    """Takes vectors of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean(1, keepdim=True))


def test_inputs_that_are_not_one_by_example_are_refused() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
            return self.linear(edges @ nodes)[:3]

    learner = Reptile(Graph().double(), engine="functional")
    x = (torch.randn(5, 4, dtype=torch.float64), torch.eye(5, dtype=torch.float64))
    with pytest.raises(TaskError, match=r"support_x: Reptile takes examples one by one.*\[3, 5\]"):
        learner.meta_step([Task(x, torch.arange(3), x, torch.arange(3))])
