"""Tasks in threads, the other layout, measured choices: the same meta-gradient, at whatever speed."""

from __future__ import annotations

import copy
import gc
import itertools
import random
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine_cases import ANNEAL_EPOCHS, CASES, POLICIES, STEPS, case_learner, case_reference
from face import (
    assert_equals_reference,
    assert_same_values,
    assert_step_equals_oracle,
    build,
    fingerprint,
    gradients_of,
    in_dtype,
    tensors,
    unchanged,
)
from keywords import grouped
from models import Conv4, NormedMlp, class_tasks, hooked_conv4, seeded
from oracle import assert_same_gradients, msl_weights
from stateful import EditsInput, Late, Watch, Watched
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from metawrap import ArgumentError, MAMLPlusPlus, MetaWrapWarning, Task, TaskBatch, UnsupportedModuleError
from metawrap.execution import parallel
from metawrap.execution.threads import in_threads
from metawrap.execution.tuning import Speed, fastest
from metawrap.inner_loop.task_layout import to_channels_last

FOUR = class_tasks((4,), tasks=4)
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
WORKERS_IN = ["threads", pytest.param("processes", marks=pytest.mark.skipif(sys.platform != "linux", reason="no fork"))]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if case.shape[-1] >= 32 else name for name, case in CASES.items()],
)
@pytest.mark.filterwarnings("ignore:workers=2")
def test_every_network_in_threads_equals_the_oracle(name: str) -> None:
    learner = case_learner(CASES[name], workers=2)
    assert_equals_reference(learner, learner.meta_step(CASES[name].batch()).loss, case_reference(name))


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


class Holding(Watched):
    """Calls what it holds, and adds what that gives."""

    def __init__(self, held: Any, call: Callable[[Any], Any]) -> None:
        super().__init__()
        self.held, self.call = held, call

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + 0.1 * float(self.call(self.held)))


class Counter:
    """An object of the user's own."""

    def __init__(self) -> None:
        self.calls = 0

    def count(self) -> int:
        self.calls += 1
        return self.calls


class Slotted:
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0

    count = Counter.count


def _array_count(array: Any) -> float:
    array[0] += 1
    return float(array[0])


class ByClass(Watched):
    total = 0

    def forward(self, x: Tensor) -> Tensor:
        ByClass.total += 1
        return super().forward(x)


LOG: list[float] = []


class ByGlobal(Watched):
    def forward(self, x: Tensor) -> Tensor:
        LOG.append(1.0)
        return super().forward(x)


HELD: dict[str, Callable[[], nn.Module]] = {
    "a numpy generator": lambda: Holding(np.random.default_rng(0), lambda g: g.normal()),
    "the second of two numpy generators": lambda: Holding(
        [np.random.default_rng(n) for n in (0, 1)], lambda g: g[1].normal()
    ),
    "a numpy random state": lambda: Holding(np.random.RandomState(0), lambda g: g.normal()),
    "a python generator": lambda: Holding(random.Random(0), lambda g: g.random()),
    "a torch generator": lambda: Holding(torch.Generator(), lambda g: torch.rand((), generator=g)),
    "an object": lambda: Holding(Counter(), lambda c: c.count()),
    "an object in a list": lambda: Holding([Counter()], lambda c: c[0].count()),
    "an object with slots": lambda: Holding(Slotted(), lambda c: c.count()),
    "an array": lambda: Holding(np.zeros(2), _array_count),
    "a bound method": lambda: Holding(Counter().count, lambda count: count()),
    "a partial": lambda: Holding(partial(Counter.count, Counter()), lambda count: count()),
    "an iterator": lambda: Holding(itertools.count(), next),
    "its class": ByClass,
    "a global": ByGlobal,
}


# Its reader keeps ids of values that are freed at once, so that the second generator is taken for the first.
UNSEEN = pytest.param("the second of two numpy generators", marks=pytest.mark.xfail(strict=False))


@pytest.mark.parametrize("held", [UNSEEN if "two numpy" in name else name for name in HELD])
@pytest.mark.parametrize("workers_in", WORKERS_IN)
def test_whatever_a_forward_changes_is_seen(held: str, workers_in: str) -> None:
    alone = build(seeded(HELD[held]), engine="functional")
    asked = build(seeded(HELD[held]), workers=2, workers_in=workers_in, engine="functional")
    ByClass.total = Watch.most = 0
    first = [alone.meta_step(FOUR).loss for _ in range(2)]
    ByClass.total = 0
    with pytest.warns(MetaWrapWarning, match="one after another"):
        second = [asked.meta_step(FOUR).loss for _ in range(2)]
    assert Watch.most == 1
    if held != "an iterator":  # Nothing can put an iterator back after the first look, with one worker or two.
        assert second == pytest.approx(first, rel=1e-12)


class Anneal:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, prediction: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return F.cross_entropy(prediction, y) / (1 + 0.1 * self.calls)


class Averaged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.ones((), dtype=torch.float64))

    def forward(self, prediction: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(prediction, y)
        self.average.mul_(0.9).add_(0.1 * loss.detach())
        return loss / self.average


@pytest.mark.parametrize("make", [Anneal, Averaged])
@pytest.mark.parametrize("way", [{"workers": "auto"}, {"tune": True}], ids=str)
def test_a_loss_with_state_is_called_in_order(make: Any, way: dict[str, Any]) -> None:
    plain, fast = (build(seeded(Late), loss_fn=make(), engine="functional", **w) for w in ({}, way))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(3):
            assert fast.meta_step(FOUR).loss == pytest.approx(plain.meta_step(FOUR).loss, rel=1e-12)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("change", ["drops", "counts", "averages"])
@pytest.mark.parametrize("memory", ["unrolled", "flat"])
@pytest.mark.parametrize("workers_in", WORKERS_IN)
def test_what_begins_after_the_first_step_is_seen(change: str, memory: str, workers_in: str) -> None:
    ways: list[dict[str, Any]] = [{}, {"workers": 2, "workers_in": workers_in}]
    plain, fast = (build(seeded(Watched), engine="functional", memory=memory, **way) for way in ways)
    for learner in (plain, fast):
        learner.meta_step(FOUR)
        learner.model.now = change
    torch.manual_seed(1)
    first = [plain.meta_step(FOUR).loss for _ in range(2)]
    torch.manual_seed(1)
    with pytest.warns(MetaWrapWarning, match="one after another"):
        second = [fast.meta_step(FOUR).loss for _ in range(2)]
    assert second == pytest.approx(first, rel=1e-12)
    assert_same_values(tensors(fast), tensors(plain))
    assert fast.model.calls == plain.model.calls


def test_what_cannot_be_copied_any_more_is_solved_in_order() -> None:
    plain, fast = (build(seeded(Watched), engine="functional", workers=n) for n in (1, 2))
    for learner in (plain, fast):
        learner.meta_step(FOUR)
    fast.model.guard = threading.Lock()
    with pytest.warns(MetaWrapWarning, match="copied"):
        fast.meta_step(FOUR)
    plain.meta_step(FOUR)
    assert_same_values(tensors(fast), tensors(plain))


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


def test_an_input_that_forward_edits_is_as_it_was_in_the_other_layout_too() -> None:
    plain, other = (build(seeded(EditsInput), channels_last=last) for last in (False, True))
    batch = class_tasks((2, 6, 6))
    assert other.meta_step(batch).loss == pytest.approx(plain.meta_step(batch).loss, rel=1e-12)
    assert_same_gradients(gradients_of(other), gradients_of(plain))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


class OnceOnly(Watched):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(super().forward(x))


@pytest.mark.filterwarnings("ignore:From epoch")
def test_tuning_does_not_ask_for_a_second_derivative_that_training_does_without() -> None:
    plain, tuned = (
        build(seeded(OnceOnly), tune=tune, engine="functional", first_order_epochs=9) for tune in (False, True)
    )
    assert tuned.meta_step(class_tasks((4,))).loss == pytest.approx(plain.meta_step(class_tasks((4,))).loss, rel=1e-12)


HAZARDS: dict[str, tuple[Any, str]] = {
    "random draws": (partial(Watched, "drops"), "random numbers"),
    "an attribute that changes": (partial(Watched, "counts"), "changes 'calls'"),
    "a list that grows": (partial(Watched, "lists"), "changes 'history'"),
    "an edited buffer": (partial(Watched, "averages"), "buffer 'average'"),
    "hooks": (hooked_conv4, "has hooks"),
}


@pytest.mark.parametrize("hazard", HAZARDS)
@pytest.mark.parametrize("workers_in", WORKERS_IN)
def test_a_model_with_state_is_solved_in_order_and_says_so(hazard: str, workers_in: str) -> None:
    make, reason = HAZARDS[hazard]
    batch = CASES["conv4"].batch() if make is hooked_conv4 else FOUR
    Watch.most = 0
    ways: list[dict[str, Any]] = [{}, {"workers": 2, "workers_in": workers_in}]
    alone, asked = (build(seeded(make), engine="functional", **way) for way in ways)
    torch.manual_seed(3)
    alone.meta_step(batch)
    torch.manual_seed(3)
    with pytest.warns(MetaWrapWarning, match=reason):
        asked.meta_step(batch)
    assert Watch.most <= 1
    assert reason in str(asked.describe()).replace("\n", " ").replace("             ", "")
    assert_same_values(tensors(asked), tensors(alone))


def test_auto_takes_one_worker_for_such_a_model_without_a_word() -> None:
    build(seeded(partial(Watched, "drops")), workers="auto").meta_step(class_tasks((4,)))


def test_a_hook_that_comes_later_is_seen() -> None:
    learner = build(seeded(Watched), workers=2)
    learner.meta_step(class_tasks((4,)))
    seen: list[Tensor] = []
    next(learner.parameters()).register_hook(seen.append)
    Watch.most = 0
    learner.meta_step(class_tasks((4,)))
    assert Watch.most == 1
    assert seen


class Torn(Watched):
    """Its copies compute something else."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Torn:
        copied = Torn()
        copied.__dict__.update(self.__dict__)
        copied._modules = {name: copy.deepcopy(m, memo) for name, m in self._modules.items()}
        copied.scale = getattr(self, "scale", 0.5) + 0.5
        return copied

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * getattr(self, "scale", 1.0)


def test_a_model_whose_copy_differs_is_solved_in_order() -> None:
    learner = build(seeded(Torn), workers=2)
    with pytest.warns(MetaWrapWarning, match="replica"):
        learner.meta_step(class_tasks((4,)))


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


class Viewing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 4, 3), nn.Linear(4 * 26 * 26, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.conv(x))
        return self.linear(hidden.view(len(hidden), -1))


def images() -> Any:
    return class_tasks((1, 28, 28), tasks=2)


def test_a_model_that_takes_only_the_usual_layout_is_refused_by_name() -> None:
    learner = build(seeded(Viewing), channels_last=True)
    with unchanged(learner), pytest.raises(UnsupportedModuleError, match=r"channels_last=True.*view.*reshape"):
        learner.meta_step(images())


def test_tuning_passes_over_a_layout_that_the_model_does_not_take() -> None:
    learner, plain = build(seeded(Viewing), tune=True), build(seeded(Viewing))
    learner.meta_step(images())
    plain.meta_step(images())
    assert not learner.executor.channels_last
    assert_same_gradients(gradients_of(learner), gradients_of(plain))


def test_channels_last_reaches_the_first_convolution() -> None:
    image = to_channels_last(torch.rand(3, 1, 8, 8))
    assert image.stride() == (64, 1, 8, 1)
    out = F.conv2d(image, torch.rand(4, 1, 3, 3))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert not out.is_contiguous()
    assert to_channels_last(torch.rand(2, 3, 4, 5, 6)).is_contiguous(memory_format=torch.channels_last_3d)
    for other in (torch.rand(3, 4), torch.randint(9, (2, 3, 4, 5)), torch.rand(2, 3, 4, 5).to_sparse()):
        assert to_channels_last(other) is other


def test_the_fastest_of_the_right_ways_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    cost = {(1, False): 10.0, (1, True): 9.0, (2, True): 8.0, (4, True): 7.9, (8, True): 2.0, "processes": 5.0}

    def run(speed: Speed) -> list[Tensor]:
        nonlocal clock
        if speed.workers == 8:
            raise RuntimeError("not this one")
        clock += cost["processes" if speed.processes else (speed.workers, speed.channels_last)]  # type: ignore[index]
        return [torch.tensor([1.0, 2.0 + speed.channels_last])]

    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    # Eight workers fail, and four gain too little over two.
    found = fastest(run, [True], [(2, False), (4, False), (8, False)])
    assert (found.workers, found.channels_last, found.processes) == (2, True, False)
    found = fastest(run, [True], [(2, False), (2, True)])
    assert (found.workers, found.channels_last, found.processes) == (2, True, True)
    found = fastest(run, [True], [(2, False), (4, False), (8, False)])
    assert "8" in found.why
    assert "10" in found.why


def test_what_was_measured_is_shown_kept_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = Speed(2, True, why="measured: so")
    calls: list[Any] = []

    def choose(run: Any, layouts: Any, workers: Any) -> Speed:
        calls.append((list(layouts), list(workers)))
        for speed in (Speed(1, False), chosen):
            run(speed)
        return chosen

    monkeypatch.setattr(parallel, "fastest", choose)
    learner = build(seeded(Conv4), tune=True)
    assert "measured in the first meta-step" in str(learner.describe())
    batch = CASES["conv4"].batch()
    plain = build(seeded(Conv4))
    plain.meta_step(batch)
    learner.meta_step(batch)
    learner.meta_step(batch)
    plain.meta_step(batch)
    assert len(calls) == 1
    assert_same_values(tensors(learner), tensors(plain))
    assert "2 threads" in str(learner.describe())
    assert "channels_last" in str(learner.describe())
    resumed = build(seeded(Conv4), tune=True)
    resumed.load_state_dict(learner.state_dict())
    resumed.optimizer.load_state_dict(copy.deepcopy(learner.optimizer.state_dict()))
    assert resumed.executor.speed == chosen
    resumed.meta_step(batch)
    learner.meta_step(batch)
    assert_same_values(tensors(resumed), tensors(learner), tolerance=0)
    assert len(calls) == 1
    untuned = build(seeded(Conv4))
    untuned.load_state_dict(learner.state_dict())
    assert untuned.describe().speed == str(Speed())


@pytest.mark.parametrize("change", ["images", "parameters"])
def test_the_outer_update_is_right_in_any_layout(change: str) -> None:
    # torch's fused Adam reads gradient and state as if they lay in memory as the parameter does.
    plain, other = build(seeded(Conv4)), build(seeded(Conv4))
    batch = CASES["conv4"].batch()
    for _ in range(3):
        plain.meta_step(batch)
        other.meta_step([t.map(to_channels_last) for t in TaskBatch.stacked(*batch)] if change == "images" else batch)
        if change == "parameters":
            other.to(memory_format=torch.channels_last)
    assert_same_values(tensors(other), tensors(plain))


class ByStrides(nn.Module):
    """Computes something else in the other layout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(2, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        factor = 1.0 if x.stride(-1) == 1 else 1.5
        return self.linear(torch.tanh(factor * self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize(("make", "right"), [(ByStrides, False), (Viewing, False), (Conv4, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_layout_is_tried_only_where_it_is_right(
    make: Any, right: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered: list[bool] = []

    def choose(run: Any, layouts: Any, workers: Any) -> Speed:
        offered.extend(layouts)
        return Speed()

    monkeypatch.setattr(parallel, "fastest", choose)
    side = 28 if make is Viewing else 16
    batch = in_dtype(class_tasks((2 if make is ByStrides else 1, side, side)), dtype)
    learner = build(seeded(make).to(dtype), tune=True)
    learner.meta_step(batch)
    plain = build(seeded(make).to(dtype), engine="functional")
    plain.meta_step(batch)
    assert offered == ([True] if right else [])
    assert_same_values(tensors(learner), tensors(plain), tolerance=0)


def test_tuning_draws_no_random_numbers_and_changes_nothing() -> None:
    learners = [build(seeded(partial(Watched, "drops")), tune=tune) for tune in (False, True)]
    for learner in learners:
        torch.manual_seed(5)
        learner.meta_step(class_tasks((4,)))
    assert_same_values(tensors(learners[0]), tensors(learners[1]))


def test_a_first_order_phase_is_tuned_for_what_follows_and_stays_first_order() -> None:
    tuned, plain = (build(seeded(NormedMlp), tune=tune, first_order_epochs=2) for tune in (True, False))
    for learner in (tuned, plain):
        learner.meta_step(class_tasks((4,)))
    assert tuned.settings.first_order_epochs == 2
    assert_same_values(tensors(tuned), tensors(plain))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": True}, "workers: expected"),
        ({"workers": 2, "engine": "higher"}, "workers: expected 1 with engine"),
        ({"workers": 2, "tune": True}, "workers: is chosen by measurement"),
        ({"workers_in": "processes", "tune": True}, "workers_in: is chosen by measurement"),
        ({"workers_in": "processes"}, "workers_in: has no effect with workers=1"),
        ({"workers": 2, "workers_in": "fibres"}, "workers_in: expected 'threads' or 'processes'"),
        ({"channels_last": True, "tune": True}, "channels_last: is chosen by measurement"),
        ({"allocator": "tuned"}, "allocator: expected True or False"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        MAMLPlusPlus(seeded(NormedMlp), **grouped(**options))


def test_a_measured_choice_of_threads_is_left_without_a_word_when_tasks_begin_to_depend_on_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parallel, "fastest", lambda *_: Speed(2))
    plain, tuned = (build(seeded(Watched), engine="functional", tune=tune) for tune in (False, True))
    for learner in (plain, tuned):
        learner.meta_step(FOUR)
        learner.model.now = "counts"
        learner.meta_step(FOUR)
    assert_same_values(tensors(tuned), tensors(plain))
    assert "one task after another: forward changes" in " ".join(str(tuned.describe()).split())
