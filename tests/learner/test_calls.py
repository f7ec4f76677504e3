"""Calls that do not learn share one learner from any thread; a call that learns is alone (design.md, invariant 14)."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from face import fingerprint
from models import Conv4, NormedMlp, class_tasks, seeded
from torch import Tensor, nn

import metawrap
from metawrap import MAMLPlusPlus, MetaWrapError, Task
from metawrap.engines import differentiable_twice

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
    "LogisticRegression": {},
    "NeuralStatistician": {"hidden": 16},
    "ProtoNet": {},
    "R2D2": {},
    "RelationNet": {},
    "SiameseNet": {},
    "SimpleShot": {},
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


@pytest.mark.sampled(5)
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


@pytest.mark.sampled(2)
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


class Counts:
    """A hook that is the method of an object of the user's."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def add(self, *_: Any) -> None:
        self.calls.append(1)


def test_the_objects_that_hooks_belong_to_are_the_users_own_in_every_thread() -> None:
    learner, batch, counts = MAMLPlusPlus(seeded(NormedMlp), inner_steps=2), tasks_of(0), Counts()
    learner.evaluate(batch)
    learner.model.first.register_forward_hook(counts.add)
    learner.adapt(batch[0].support_x, batch[0].support_y)
    alone = len(counts.calls)
    at_once(*[lambda: learner.adapt(batch[0].support_x, batch[0].support_y)] * THREADS)
    assert len(counts.calls) == (THREADS + 1) * alone > 0


def test_a_hook_that_holds_the_model_serves_the_replica() -> None:
    model = seeded(NormedMlp)
    model.register_forward_pre_hook(lambda _, args, model=model: (args[0] * model.norm.weight.mean(),))
    learner = MAMLPlusPlus(model, inner_steps=2)
    batches = [tasks_of(seed) for seed in range(THREADS)]
    alone = [predictions(learner, batch[0]) for batch in batches]
    for one, expected in zip(at_once(*(lambda b=b: predictions(learner, b[0]) for b in batches)), alone, strict=True):  # type: ignore[misc]
        torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-9)


def test_evaluations_whose_metrics_wait_for_each_other_end() -> None:
    learner, batch = MAMLPlusPlus(seeded(NormedMlp), inner_steps=2), tasks_of(0)
    expected, barrier = learner.evaluate(batch).loss, threading.Barrier(2)

    def metric(prediction: Tensor, y: Tensor) -> float:
        barrier.wait(30)
        return 0.0

    found = at_once(*[lambda: learner.evaluate(batch, metric=metric)] * 2)
    assert [one.loss for one in found] == pytest.approx([expected] * 2, rel=1e-9)


LOOKS: dict[str, Callable[[Any], Any]] = {
    "state_dict": lambda learner: learner.state_dict()["model.first.weight"].clone(),
    "parameters": lambda learner: next(learner.parameters()).detach().clone(),
    "deepcopy": lambda learner: copy.deepcopy(learner).model.first.weight.detach().clone(),
    "train": lambda learner: [learner.train(), next(learner.parameters()).detach().clone()][1],
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_look_at_the_learner_never_meets_the_fast_weights_of_an_adapt(look: str) -> None:
    learner, batch = MAMLPlusPlus(seeded(NormedMlp), inner_steps=2), tasks_of(0)
    learner.evaluate(batch)
    learner.eval()
    expected, inside, looked = learner.model.first.weight.detach().clone(), threading.Event(), threading.Event()

    passes: list[int] = []

    def hold(*_: Any) -> None:
        passes.append(1)
        if len(passes) == 2:  # Of the second inner step, whose weights are not the learner's.
            inside.set()
            looked.wait(0.2)  # Without the wait of the other thread, it looks now.

    learner.model.first.register_forward_hook(hold)

    def read() -> Tensor:
        inside.wait(30)
        found: Tensor = LOOKS[look](learner)
        looked.set()
        return found

    _, found = at_once(lambda: learner.adapt(batch[0].support_x, batch[0].support_y), read)
    assert torch.equal(found, expected)
    assert learner.training == (look == "train")


def test_forward_in_training_mode_beside_an_adapt_trains() -> None:
    learner, batch = MAMLPlusPlus(seeded(NormedMlp), inner_steps=2, norm="running"), tasks_of(0)
    learner.evaluate(batch)
    twin = copy.deepcopy(learner)
    expected = twin(batch).step_losses
    inside, asked = threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        if not inside.is_set():
            inside.set()
            asked.wait(0.2)

    learner.model.first.register_forward_hook(hold)

    def forward() -> Any:
        inside.wait(30)
        return learner(batch)

    _, found = at_once(lambda: learner.adapt(batch[0].support_x, batch[0].support_y), forward)
    torch.testing.assert_close(found.step_losses, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(learner.model.norm.running_mean, twin.model.norm.running_mean, rtol=1e-9, atol=1e-9)


def test_settings_of_the_whole_process_are_undone_by_the_last_thread_that_needs_them() -> None:
    first, second = ExitStack(), ExitStack()
    for stack in (first, second):
        stack.enter_context(differentiable_twice(nn.LSTM(2, 2), plain=False))
    first.close()
    assert not torch.backends.cuda.flash_sdp_enabled()
    assert not torch.backends.cudnn.enabled
    second.close()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cudnn.enabled


def test_threads_in_inference_mode_adapt() -> None:
    learner = MAMLPlusPlus(seeded(NormedMlp), inner_steps=2, norm="running")
    batches = [tasks_of(seed) for seed in range(THREADS)]
    learner.meta_step(batches[0])
    alone = [predictions(learner, batch[0]) for batch in batches]

    @torch.inference_mode()
    def predict(batch: list[Task]) -> Tensor:
        return predictions(learner, batch[0])

    for one, expected in zip(at_once(*(lambda b=b: predict(b) for b in batches)), alone, strict=True):  # type: ignore[misc]
        torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-9)


def test_a_learner_changes_its_precision_when_no_call_runs() -> None:
    learner, batch = MAMLPlusPlus(seeded(NormedMlp), inner_steps=2), tasks_of(0)
    learner.evaluate(batch)
    barrier = threading.Barrier(2)

    def metric(prediction: Tensor, y: Tensor) -> float:
        with suppress(threading.BrokenBarrierError):
            barrier.wait(0.2)
        return float(prediction.dtype == torch.float64)

    def convert() -> None:
        with suppress(threading.BrokenBarrierError):
            barrier.wait(30)
        learner.float()

    _, found = at_once(convert, lambda: learner.evaluate(batch, metric={"double": metric}))
    assert found.mean == 1.0
    assert learner.model.first.weight.dtype == torch.float32


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
