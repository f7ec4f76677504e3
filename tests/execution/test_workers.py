"""Tasks in threads and processes: the same meta-gradient, in order, with the caller's context and modes."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from contextvars import ContextVar
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from engine_cases import ANNEAL_EPOCHS, CASES, POLICIES, STEPS, case_learner, case_reference
from face import assert_equals_reference, assert_step_equals_oracle, build, fingerprint, in_dtype, unchanged
from models import Conv4, NormedMlp, class_tasks, seeded
from oracle import msl_weights
from stateful import Watch, Watched, watched
from torch import Tensor, nn
from ways_to_work import FOUR, WORKERS_IN

from metawrap import Task, TaskBatch
from metawrap.execution.threads import in_threads

WAYS: dict[str, dict[str, Any]] = {
    "threads": {"workers": 2},
    "more threads than tasks": {"workers": 7},
    "one a core": {"workers": "auto"},
    "two tasks each": {"workers": 2, "tasks_per_backward": 2},
    "flat": {"workers": 2, "memory": "flat"},
    "channels_last": {"channels_last": True},
    "both": {"workers": 2, "channels_last": True},
    "processes": {"workers": 2, "workers_in": "processes"},
    "more processes than tasks": {"workers": 7, "workers_in": "processes"},
    "two tasks in each process": {"workers": 2, "workers_in": "processes", "tasks_per_backward": 2},
    "flat in processes": {"workers": 2, "workers_in": "processes", "memory": "flat"},
    "channels_last in processes": {"workers": 2, "workers_in": "processes", "channels_last": True},
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if case.shape[-1] >= 32 else name for name, case in CASES.items()],
)
@pytest.mark.filterwarnings("ignore:workers=2")
def test_every_network_in_threads_equals_the_oracle(name: str) -> None:
    learner = case_learner(CASES[name], workers=2)
    assert_equals_reference(learner, learner.meta_step(CASES[name].batch()).loss, case_reference(name))


@pytest.mark.sampled(5)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("second_order", [True, False], ids=["second order", "first order"])
def test_every_way_equals_the_oracle(way: str, second_order: bool) -> None:
    model, batch = seeded(Conv4), CASES["conv4"].batch()
    learner = build(
        model, inner_steps=STEPS, first_order_epochs=0 if second_order else 99, msl_epochs=ANNEAL_EPOCHS, **WAYS[way]
    )
    threads = torch.get_num_threads()
    weights = msl_weights(STEPS, 0, ANNEAL_EPOCHS)
    assert_step_equals_oracle(learner, model, batch, weights, second_order=second_order)
    assert torch.get_num_threads() == threads


@pytest.mark.sampled(5)
@pytest.mark.parametrize("norm", POLICIES)
@pytest.mark.parametrize("workers_in", WORKERS_IN)
def test_every_norm_policy_in_workers_equals_the_oracle(norm: str, workers_in: str) -> None:
    model, batch = seeded(NormedMlp), class_tasks((4,))
    learner = build(model, norm=norm, inner_steps=STEPS, workers=2, workers_in=workers_in, msl_epochs=ANNEAL_EPOCHS)
    assert_step_equals_oracle(learner, model, batch, msl_weights(STEPS, 0, ANNEAL_EPOCHS), norm=norm)


@pytest.mark.parametrize("workers_in", WORKERS_IN)
def test_workers_are_bit_for_bit_one_thread(workers_in: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ways: list[dict[str, Any]] = [{}, {"workers": 2, "workers_in": workers_in}]
        learners = [build(seeded(Conv4).float(), **way) for way in ways]
        for _ in range(3):
            for learner in learners:
                learner.meta_step(in_dtype(CASES["conv4"].batch()))
        assert fingerprint(learners[0], ids=False) == fingerprint(learners[1], ids=False)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("workers", [1, 3])
def test_as_many_tasks_run_at_once_as_there_are_workers(workers: int) -> None:
    Watch.most = 0
    learner = build(seeded(Watched), workers=workers, engine="functional")
    learner.meta_step(class_tasks((4,), tasks=8))
    assert Watch.most == workers


class Mark:
    """Lives as long as the graph that it is in."""


class Graphs:
    alive: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()
    most = 0


class Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mark: Mark) -> Tensor:
        ctx.mark = mark
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g, None


@pytest.mark.parametrize("workers", [1, 2])
def test_graphs_of_no_more_tasks_than_workers_are_alive(workers: int) -> None:
    Graphs.alive, Graphs.most = weakref.WeakSet(), 0

    def loss_fn(prediction: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(Noted.apply(prediction, mark := Mark()), y)
        with Watch.lock:
            Graphs.alive.add(mark)
            del mark
            gc.collect()
            Graphs.most = max(Graphs.most, len(Graphs.alive))
        return loss

    learner = build(seeded(Watched), workers=workers, engine="functional", loss_fn=loss_fn, multi_step_loss=False)
    gc.freeze()  # Else each collection goes through all that the other tests keep.
    try:
        learner.meta_step(class_tasks((4,), tasks=5))
    finally:
        gc.unfreeze()
    # Of one task: a support loss for each step, and a target loss.
    assert Graphs.most <= workers * (learner.settings.inner_steps + 1)


def test_random_heads_come_in_the_order_of_the_tasks() -> None:
    batch, losses = class_tasks((4,), tasks=6), []
    for workers in (1, "auto"):
        learner = build(seeded(Watched), head="linear", head_init="random", workers=workers, engine="functional")
        torch.manual_seed(5)
        losses.append([learner.meta_step(batch).loss for _ in range(3)])
    assert losses[0] == losses[1]


FACTOR: ContextVar[float] = ContextVar("FACTOR", default=1.0)


class InContext(Watched):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * FACTOR.get()


def test_workers_see_the_callers_context() -> None:
    plain, fast = (build(seeded(InContext), engine="functional", workers=n) for n in (1, 2))
    Watch.most = 0
    token = FACTOR.set(3.0)
    try:
        batch = class_tasks((4,), tasks=6)
        assert fast.meta_step(batch).loss == pytest.approx(plain.meta_step(batch).loss, rel=1e-12)
    finally:
        FACTOR.reset(token)
    assert Watch.most == 2


@pytest.mark.parametrize("workers_in", WORKERS_IN)
def test_a_failing_task_leaves_all_as_it_was(workers_in: str) -> None:
    learner = build(seeded(NormedMlp), workers=2, workers_in=workers_in)
    learner.meta_step(FOUR)
    threads, speed = torch.get_num_threads(), learner.describe().speed
    tasks = TaskBatch.stacked(*FOUR).tasks
    broken = Task(tasks[2].support_x, tasks[2].support_y + 50, tasks[2].target_x, tasks[2].target_y)
    with unchanged(learner), pytest.raises(Exception, match="support_y"):
        learner.meta_step([tasks[0], tasks[1], broken, tasks[3]])
    assert torch.get_num_threads() == threads
    assert not [t for t in threading.enumerate() if t.name.startswith("metawrap-worker")]
    assert learner.describe().speed == speed, "it was the task's fault, so the next step has workers again"


def test_results_come_in_order_and_modes_are_the_callers() -> None:
    def work(_: nn.Module, item: int) -> tuple[int, bool, bool, torch.dtype]:
        time.sleep(0.01 * (item % 3 == 0))
        return item, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        found = list(in_threads(work, range(7), [nn.Identity() for _ in range(3)]))
    assert found == [(item, False, True, torch.float16) for item in range(7)]


class WatchedNorm(NormedMlp):
    forward = watched(NormedMlp.forward)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("norm", POLICIES)
@pytest.mark.parametrize("workers_in", WORKERS_IN)
def test_evaluation_uses_the_threads_with_the_same_result(norm: str, workers_in: str) -> None:
    learner, plain = (
        build(seeded(WatchedNorm), norm=norm, **how)
        for how in ({"workers": 2, "workers_in": workers_in}, {"workers": 1, "tune": False})
    )
    found = []
    for each in (plain, learner):
        for _ in range(2):
            each.meta_step(FOUR)
        each.evaluate(FOUR)  # The first in eval mode looks at the model.
        Watch.most = 0
        with unchanged(each):
            found.append(each.evaluate(FOUR, keep_predictions=True))
        assert Watch.most == (1 if each is plain else 2)
    one, two = found
    assert (one.loss, one.accuracy, one.norm) == (two.loss, two.accuracy, two.norm)
    for first, second in zip(one.predictions, two.predictions, strict=True):
        assert torch.equal(first, second)


class DrawsInEvaluation(NormedMlp):
    draws: ClassVar[bool] = False

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        return found * torch.rand(()) if self.draws and not self.training else found


def test_evaluation_that_begins_to_draw_goes_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for how in ({"workers": 1, "tune": False}, {"workers": 2}):
        learner = build(seeded(DrawsInEvaluation), **how)
        learner.meta_step(FOUR)
        learner.evaluate(FOUR)
        monkeypatch.setattr(DrawsInEvaluation, "draws", True)
        torch.manual_seed(3)
        results.append((learner.evaluate(FOUR).loss, learner.evaluate(FOUR).loss, torch.rand(())))
        monkeypatch.undo()
    assert results[0] == results[1]
    assert "random" in learner.executor.in_order_because or "torch" in learner.executor.in_order_because


def test_a_task_that_fails_in_an_evaluation_in_threads_is_named() -> None:
    learner = build(seeded(NormedMlp), workers=2)
    learner.meta_step(FOUR)
    learner.evaluate(FOUR)
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    wrong = Task(x, y, x.expand(2, -1, -1)[0][:, :3], y)
    with unchanged(learner), pytest.raises(Exception, match=r"shape|size"):
        learner.evaluate([Task(x, y, x, y), wrong, Task(x, y, x, y)])
