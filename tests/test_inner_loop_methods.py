"""What holds for every method on the inner loop of maml.py, in the ways a user meets it."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from face import as_tasks, assert_same_state, assert_same_values, fingerprint, gradients_of, snapshot
from models import NormedMlp, class_tasks, seeded
from oracle import assert_same_gradients
from test_engines import ENGINES
from test_invariants import poisoned
from torch import Tensor

from metawrap import LSTMMetaLearner, MetaSGD, Reptile

METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "meta-sgd": (MetaSGD, {"inner_steps": 2}),
    "reptile": (Reptile, {"inner_steps": 3, "evaluation_steps": 4, "inner_batch_size": 4}),
    "lstm": (LSTMMetaLearner, {"inner_steps": 2, "inner_lr": 0.1, "hidden_size": 5}),
}
BATCH = class_tasks((4,), tasks=3, seed=4)
every_method = pytest.mark.parametrize("name", METHODS)
every_engine = pytest.mark.parametrize("engine", [*ENGINES, "batched"])


def learner_of(name: str, **options: Any) -> Any:
    method, own = METHODS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return method(seeded(NormedMlp), **own | options)


def whole_gradient(learner: Any) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in learner.named_parameters() if p.requires_grad}


@every_engine
@every_method
def test_a_meta_step_moves_all_that_is_learned_and_never_the_users_module(name: str, engine: str) -> None:
    model = seeded(NormedMlp)
    before = fingerprint(model)
    learner = METHODS[name][0](model, engine=engine, **METHODS[name][1])
    start = {key: value.detach().clone() for key, value in learner.named_parameters()}
    metrics = learner.meta_step(BATCH)
    assert not metrics.skipped
    assert 0 <= metrics.accuracy <= 1
    # The bias before the norm has no effect, and so no gradient, but for rounding.
    still = {key for key, value in learner.named_parameters() if value.requires_grad and torch.equal(value, start[key])}
    assert still <= {"model.first.bias", "learning_rates.first/bias"}
    assert fingerprint(model) == before


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


@every_engine
@every_method
def test_forward_and_backward_leave_meta_steps_gradient(name: str, engine: str) -> None:
    one, other = (learner_of(name, engine=engine, max_grad_norm=None) for _ in range(2))
    output = one(BATCH)
    output.loss.backward()
    assert float(output.loss.detach()) == pytest.approx(other.meta_step(BATCH).loss, rel=1e-12)
    assert_same_gradients(whole_gradient(one), whole_gradient(other))


@pytest.mark.parametrize("norm", ["batch", "running", "support"])
@every_method
def test_evaluate_adapt_and_unwrap_change_nothing(name: str, norm: str) -> None:
    learner = learner_of(name, norm=norm)
    learner.meta_step(BATCH)
    before, state, rng = fingerprint(learner), snapshot(dict(learner.state_dict())), torch.get_rng_state()
    optimizer = snapshot(learner.optimizer.state_dict())
    with torch.no_grad():
        learner.evaluate(BATCH)
    learner.adapt(BATCH[0][0], BATCH[1][0])
    learner.unwrap()
    learner.describe()
    assert fingerprint(learner) == before
    assert_same_state(dict(learner.state_dict()), state)
    assert_same_state(learner.optimizer.state_dict(), optimizer)
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("norm", ["batch", "running", "support"])
@every_method
def test_adapt_returns_a_plain_module_that_predicts_what_evaluate_saw(name: str, norm: str) -> None:
    learner = learner_of(name, norm=norm)
    learner.meta_step(BATCH)
    predictions = learner.evaluate(BATCH, keep_predictions=True).predictions
    for task, prediction in zip(as_tasks(BATCH), predictions, strict=True):
        with torch.no_grad():
            adapted = learner.adapt(task[0], task[1])
        assert type(adapted) is NormedMlp
        loaded = pickle.loads(pickle.dumps(adapted))
        torch.testing.assert_close(loaded(task[2]).detach(), prediction, rtol=1e-12, atol=1e-12)
    assert type(learner.unwrap()) is NormedMlp


@every_method
def test_training_goes_on_from_a_state_dict_and_from_a_copy(name: str) -> None:
    learner = learner_of(name)
    learner.meta_step(BATCH)
    copied, buffer = copy.deepcopy(learner), io.BytesIO()
    torch.save({"learner": learner.state_dict(), "optimizer": learner.optimizer.state_dict()}, buffer)
    buffer.seek(0)
    loaded, stored = METHODS[name][0](seeded(NormedMlp, 8), **METHODS[name][1]), torch.load(buffer, weights_only=True)
    loaded.load_state_dict(stored["learner"])
    loaded.optimizer.load_state_dict(stored["optimizer"])
    for other in (copied, loaded):
        assert not {id(p) for p in other.parameters()} & {id(p) for p in learner.parameters()}
    after = [each.meta_step(BATCH).loss for each in (learner, copied, loaded)]
    assert after[0] == after[1] == after[2]
    for other in (copied, loaded):
        assert_same_values(other.parameters(), learner.parameters(), tolerance=0.0)


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


@every_method
def test_it_learns(name: str) -> None:
    learner = learner_of(name, engine="batched", **({} if name == "reptile" else {"meta_lr": 0.02}))
    tasks = class_tasks((4,), tasks=4, shots=2, targets=4, seed=9)
    before = learner.evaluate(tasks).loss
    for _ in range(8):
        learner.meta_step(tasks)
    assert learner.evaluate(tasks).loss < before - 0.02
