"""Calls that do not learn share one learner from any thread; a call that learns is alone (design.md, invariant 14)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from face import fingerprint
from models import Conv4, NormedMlp, class_tasks, seeded
from torch import Tensor

import metawrap
from metawrap import MAMLPlusPlus, MetaWrapError, Task

THREADS, ROUNDS = 4, 5
FEW = {"inner_steps": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "MAMLPlusPlus": FEW,
    "FOMAML": FEW,
    "MetaSGD": FEW,
    "Reptile": FEW | {"evaluation_steps": 2},
    "LSTMMetaLearner": FEW | {"hidden_size": 5},
    "ANIL": FEW,
    "BOIL": FEW,
    "FineTune": FEW | {"classes": 3},
    "MultiTask": FEW | {"classes": 3},
    "MANN": {"hidden": 16, "slots": 8},
    "MatchingNet": {},
    "MemoryModule": {},
    "MetaNet": {},
    "MetaOptNet": {},
    "ProtoNet": {},
    "R2D2": {},
    "RelationNet": {},
    "SiameseNet": {},
    "ZeroStep": {},
}


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """The results of calls that begin together, each in a thread of its own."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(run, call) for call in calls]]


def tasks_of(seed: int) -> list[Task]:
    return tasks((4,), 2, seed)


def tasks(shape: tuple[int, ...], count: int, seed: int) -> list[Task]:
    parts = class_tasks(shape, tasks=count, shots=2, seed=seed)
    return [Task(*each, classes=(0, 1, 2)) for each in zip(*parts, strict=True)]


def predictions(learner: Any, task: Task) -> Tensor:
    with torch.no_grad():
        return learner.adapt(task.support_x, task.support_y)(task.target_x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", OPTIONS)
def test_adapt_and_evaluate_in_threads_give_what_a_lone_call_gives(name: str) -> None:
    torch.manual_seed(0)
    learner = getattr(metawrap, name)(seeded(NormedMlp), **OPTIONS[name])
    learner.meta_step(tasks_of(0))
    batches = [tasks_of(seed) for seed in range(1, THREADS + 1)]
    alone = [(predictions(learner, batch[0]), learner.evaluate(batch).mean) for batch in batches]
    before = fingerprint(learner)
    for _ in range(ROUNDS):
        found = at_once(*(lambda b=b: (predictions(learner, b[0]), learner.evaluate(b).mean) for b in batches))  # type: ignore[misc]
        for (one, mean), (expected, expected_mean) in zip(found, alone, strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-9)
            assert mean == pytest.approx(expected_mean, rel=1e-9)
    assert fingerprint(learner) == before


@pytest.mark.parametrize("engine", ["functional", "higher"])
@pytest.mark.parametrize("norm", ["batch", "running", "support"])
def test_every_engine_and_norm_policy_adapts_in_threads(engine: str, norm: str) -> None:
    learner = MAMLPlusPlus(seeded(Conv4), inner_steps=3, engine=engine, norm=norm)
    batches = [tasks((1, 16, 16), 1, seed) for seed in range(THREADS)]
    learner.meta_step(batches[0])
    alone = [predictions(learner, batch[0]) for batch in batches]
    for _ in range(ROUNDS):
        found = at_once(*(lambda b=b: predictions(learner, b[0]) for b in batches))  # type: ignore[misc]
        for one, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-9)


def test_forward_in_eval_mode_shares_too_and_its_gradient_reaches_the_learner() -> None:
    learner = MAMLPlusPlus(seeded(NormedMlp), inner_steps=2)
    batches = [tasks_of(seed) for seed in range(THREADS)]
    learner.eval()
    names = [name for name, _ in learner.named_parameters()]

    def gradient(batch: list[Task]) -> list[Tensor | None]:
        return list(torch.autograd.grad(learner(batch).loss, list(learner.parameters()), allow_unused=True))

    alone = [gradient(batch) for batch in batches]
    for found, expected in zip(at_once(*(lambda b=b: gradient(b) for b in batches)), alone, strict=True):  # type: ignore[misc]
        for name, one, other in zip(names, found, expected, strict=True):
            assert (one is None) == (other is None), name
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_meta_step_waits_for_adapt_and_adapt_for_meta_step() -> None:
    learner, twin = (MAMLPlusPlus(seeded(NormedMlp), inner_steps=2) for _ in range(2))
    batch = tasks_of(0)
    states = [predictions(twin, batch[0])]
    for _ in range(ROUNDS):
        twin.meta_step(batch)
        states.append(predictions(twin, batch[0]))
    stop = threading.Event()

    def train() -> None:
        try:
            for _ in range(ROUNDS):
                learner.meta_step(batch)
        finally:
            stop.set()

    def adapt() -> list[Tensor]:
        found = [predictions(learner, batch[0])]
        while not stop.is_set():
            found.append(predictions(learner, batch[0]))
        return found

    _, *found = at_once(train, adapt, adapt)
    for one in (each for thread in found for each in thread):
        assert any(torch.allclose(one, state, rtol=1e-9, atol=1e-9) for state in states)
    torch.testing.assert_close(predictions(learner, batch[0]), states[-1], rtol=0, atol=0)


def test_a_metric_may_adapt_and_tasks_may_be_drawn_by_a_meta_step() -> None:
    learner, batch = MAMLPlusPlus(seeded(NormedMlp), inner_steps=2), tasks_of(0)

    def metric(prediction: Tensor, y: Tensor) -> float:
        return float(predictions(learner, batch[0]).sum())

    assert learner.evaluate(batch, metric=metric).tasks == len(batch)
    with learner.calls.shared(), learner.calls.modules(learner) as used:
        assert used is learner  # One thread alone uses the learner's own modules.


def test_a_model_that_cannot_be_replicated_serves_one_call_after_another() -> None:
    learner = MAMLPlusPlus(seeded(NormedMlp), inner_steps=2)
    batches = [tasks_of(seed) for seed in range(THREADS)]
    alone = [predictions(learner, batch[0]) for batch in batches]
    learner.model.lock = threading.Lock()  # No deep copy of it.
    evaluate = partial(learner.evaluate, keep_predictions=True)
    found = at_once(*(lambda b=b: evaluate(b[:1]).predictions[0] for b in batches))  # type: ignore[misc]
    for one, expected in zip(found, alone, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-9)


def test_a_call_that_waits_to_be_alone_and_is_interrupted_hinders_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, batch = MAMLPlusPlus(seeded(NormedMlp), inner_steps=2), tasks_of(0)
    learner.evaluate(batch)
    monkeypatch.setattr(learner.calls._changed, "wait_for", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        learner.meta_step(batch)
    monkeypatch.undo()
    found = at_once(*[lambda: learner.evaluate(batch).tasks] * 2)
    assert found == [len(batch)] * 2
    learner.meta_step(batch)


def test_a_call_that_learns_inside_of_one_that_shares_is_refused_while_threads_meet() -> None:
    learner, batch = MAMLPlusPlus(seeded(NormedMlp), inner_steps=2), tasks_of(0)
    learner.evaluate(batch)

    def learns(prediction: Tensor, y: Tensor) -> float:
        learner.train()
        learner.meta_step(batch)
        return 0.0

    learner.calls._sharing = 1  # As where another thread is in a call.
    with pytest.raises(MetaWrapError, match="both would wait for ever"):
        learner.evaluate(batch, metric=learns)


def test_an_error_in_one_thread_leaves_the_others_alone() -> None:
    learner, batch = MAMLPlusPlus(seeded(NormedMlp), inner_steps=2), tasks_of(0)
    expected = predictions(learner, batch[0])

    def wrong() -> str:
        try:
            learner.adapt(torch.zeros(2, 9, dtype=torch.float64), torch.tensor([0, 1]))
        except ValueError as error:
            return str(error)
        return ""

    for _ in range(ROUNDS):
        words, found, again = at_once(wrong, lambda: predictions(learner, batch[0]), wrong)
        assert "cannot take this task" in words
        assert "cannot take this task" in again
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
