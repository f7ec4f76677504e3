"""What holds for every method on the inner loop of maml.py, with every engine; the rest is in test_contract.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_cases import ALL_ENGINES
from face import assert_same_values, gradients_of, poisoned, unchanged, values_of
from keywords import grouped
from models import NormedMlp, class_tasks, seeded
from oracle import assert_same_gradients
from torch import Tensor

from metawrap import LSTMMetaLearner, MetaSGD, Reptile

METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "meta-sgd": (MetaSGD, {"inner_steps": 2}),
    "reptile": (Reptile, {"inner_steps": 3, "evaluation_steps": 4, "inner_batch_size": 4}),
    "lstm": (LSTMMetaLearner, {"inner_steps": 2, "inner_lr": 0.1, "hidden_size": 5}),
}
BATCH = class_tasks((4,), tasks=3, seed=4)
every_method = pytest.mark.parametrize("name", METHODS)
every_engine = pytest.mark.parametrize("engine", ALL_ENGINES)


def learner_of(name: str, **options: Any) -> Any:
    method, own = METHODS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return method(seeded(NormedMlp), **grouped(**own | options))


def whole_gradient(learner: Any) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in learner.named_parameters() if p.requires_grad}


@pytest.mark.sampled(5)
@every_engine
@every_method
def test_a_meta_step_moves_all_that_is_learned_and_never_the_users_module(name: str, engine: str) -> None:
    model = seeded(NormedMlp)
    with unchanged(model):
        learner = METHODS[name][0](model, engine=engine, **METHODS[name][1])
        start = values_of(learner)
        metrics = learner.meta_step(BATCH)
    assert not metrics.skipped
    assert 0 <= metrics.accuracy <= 1
    # The bias before the norm has no effect, and so no gradient, but for rounding.
    still = {key for key, value in learner.named_parameters() if value.requires_grad and torch.equal(value, start[key])}
    assert still <= {"model.first.bias", "learning_rates.first/bias"}


@pytest.mark.sampled(2)
@every_method
def test_every_engine_and_chunking_gives_the_same_gradient(name: str) -> None:
    first = learner_of(name, engine="functional", max_grad_norm=None)
    loss = first.meta_step(BATCH).loss
    for options in (
        {"engine": "higher"},
        {"engine": "batched"},
        {"engine": "batched", "tasks_per_backward": 2},
        {"engine": "functional", "tasks_per_backward": 3},
        {"engine": "functional", "workers": 2},
    ):
        other = learner_of(name, max_grad_norm=None, **options)
        assert other.meta_step(BATCH).loss == pytest.approx(loss, rel=1e-9)
        assert_same_gradients(whole_gradient(other), whole_gradient(first))


@pytest.mark.sampled(5)
@every_engine
@every_method
def test_forward_and_backward_leave_meta_steps_gradient(name: str, engine: str) -> None:
    one, other = (learner_of(name, engine=engine, max_grad_norm=None) for _ in range(2))
    output = one(BATCH)
    output.loss.backward()
    assert float(output.loss.detach()) == pytest.approx(other.meta_step(BATCH).loss, rel=1e-12)
    assert_same_gradients(whole_gradient(one), whole_gradient(other))


@pytest.mark.sampled(5)
@every_engine
@every_method
def test_a_step_that_is_not_finite_is_skipped(name: str, engine: str) -> None:
    learner = learner_of(name, engine=engine)
    learner.meta_step(BATCH)
    before = [p.detach().clone() for p in learner.parameters()]
    # Reptile's loss is no part of its gradient: the support set is poisoned, too.
    bad = poisoned(BATCH)
    bad[0][1, 0, 0] = float("inf")
    assert learner.meta_step((bad[0].clone(), *bad[1:])).skipped
    bad[0][1, 0, 0] = 0.0
    assert int(learner.skipped_steps[0]) == 1
    assert_same_values(learner.parameters(), before, tolerance=0.0)
    assert not learner.meta_step(class_tasks((4,), tasks=2)).skipped


@every_method
def test_a_frozen_parameter_stays_frozen(name: str) -> None:
    model = seeded(NormedMlp)
    model.first.weight.requires_grad_(False)
    learner = METHODS[name][0](model, **METHODS[name][1])
    learner.meta_step(BATCH)
    assert "first.weight" in learner.describe().frozen
    assert "first.weight" not in learner.learning_rates
    for module in (learner.model, learner.unwrap(), learner.adapt(BATCH[0][0], BATCH[1][0])):
        assert torch.equal(module.first.weight, model.first.weight)
    assert gradients_of(learner)["linear.weight"] is not None
    assert learner.model.first.weight.grad is None
