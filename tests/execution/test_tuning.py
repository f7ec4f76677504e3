"""The other layout and measured choices: the same meta-gradient, at whatever speed."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_cases import CASES
from face import assert_same_values, build, gradients_of, in_dtype, tensors, unchanged
from keywords import grouped
from models import Conv4, NormedMlp, class_tasks, seeded
from oracle import assert_same_gradients
from stateful import EditsInput, Late, Once, Watched
from torch import Tensor, nn
from ways_to_work import FOUR

from metawrap import ArgumentError, MAMLPlusPlus, Task, TaskBatch, UnsupportedModuleError
from metawrap.execution import measured
from metawrap.execution.tuning import Speed, fastest
from metawrap.inner_loop.task_layout import to_channels_last


def choose_by(monkeypatch: pytest.MonkeyPatch, choose: Callable[..., Speed]) -> None:
    """Chooses by this function where a learner would measure."""
    monkeypatch.setattr(measured, "fastest", choose)


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


@pytest.mark.sampled(2)
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


def test_an_input_that_forward_edits_is_as_it_was_in_the_other_layout_too() -> None:
    plain, other = (build(seeded(EditsInput), channels_last=last) for last in (False, True))
    batch = class_tasks((2, 6, 6))
    assert other.meta_step(batch).loss == pytest.approx(plain.meta_step(batch).loss, rel=1e-12)
    assert_same_gradients(gradients_of(other), gradients_of(plain))


class OnceOnly(Watched):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(super().forward(x))


@pytest.mark.filterwarnings("ignore:From epoch")
def test_tuning_does_not_ask_for_a_second_derivative_that_training_does_without() -> None:
    plain, tuned = (
        build(seeded(OnceOnly), tune=tune, engine="functional", first_order_epochs=9) for tune in (False, True)
    )
    assert tuned.meta_step(class_tasks((4,))).loss == pytest.approx(plain.meta_step(class_tasks((4,))).loss, rel=1e-12)


class Viewing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 4, 3), nn.Linear(4 * 26 * 26, 3)

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


def test_weights_of_convolutions_have_the_layout_of_the_images_and_adapt_returns_the_users() -> None:
    learner = MAMLPlusPlus(Conv4(), inner_steps=2, execution={"channels_last": True, "tune": False})
    met: list[tuple[int, ...]] = []
    learner.model.conv1.conv.register_forward_hook(lambda module, args, output: met.append(module.weight.stride()))
    images, labels = torch.rand(3, 1, 16, 16), torch.arange(3)
    learner.meta_step([(images, labels, images, labels)])
    assert set(met[-6:]) == {(36, 1, 12, 4)}  # of (4, 4, 3, 3): the four channels of a place side by side
    adapted = learner.adapt(images, labels)
    assert [p.stride() for p in adapted.parameters()] == [p.stride() for p in Conv4().parameters()]


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
    # Threads that are a little slower than intra-op threads are taken, processes that are so are not.
    cost |= {(2, True): 9.2, "processes": 9.1}
    found = fastest(run, [True], [(2, True), (2, False)])
    assert (found.workers, found.processes) == (2, False)
    # What follows them has to gain over the plain way, too.
    found = fastest(run, [True], [(2, False), (2, True)])
    assert (found.workers, found.processes) == (2, False)
    cost |= {(2, True): 9.4, "processes": 9.1}
    found = fastest(run, [True], [(2, True), (2, False)])
    assert (found.workers, found.channels_last) == (1, True)


@pytest.mark.parametrize(("third", "chosen", "runs"), [(7.0, True, 8), (8.1, False, 8), (None, True, 6)])
def test_two_ways_near_each_other_are_timed_three_times(
    monkeypatch: pytest.MonkeyPatch, third: float | None, chosen: bool, runs: int
) -> None:
    of_processes = iter([20.0, 9.0, 8.5, third] if third else [20.0, 6.0, 6.0])  # The first run forks them, untimed.
    taken: list[float] = []

    def run(speed: Speed) -> None:
        taken.append(next(of_processes) if speed.processes else 8.0 if speed.channels_last else 30.0)

    monkeypatch.setattr(time, "perf_counter", lambda: sum(taken))
    assert fastest(run, [True], [(2, True)]).processes == chosen
    assert len(taken) == runs


def test_what_was_measured_is_shown_kept_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = Speed(2, True, why="measured: so")
    calls: list[Any] = []

    def choose(run: Any, layouts: Any, workers: Any) -> Speed:
        calls.append((list(layouts), list(workers)))
        for speed in (Speed(1, False), chosen):
            run(speed)
        return chosen

    choose_by(monkeypatch, choose)
    learner = build(seeded(Conv4), tune=True)
    assert "until the first meta-step, which measures" in str(learner.describe())
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
    untuned = build(seeded(Conv4), tune=False)
    untuned.load_state_dict(learner.state_dict())
    assert untuned.describe().speed == str(Speed())


def never(*_: Any) -> Speed:
    raise AssertionError("a way was measured")


def test_short_meta_steps_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    choose_by(monkeypatch, never)
    learner = build(seeded(NormedMlp))
    assert "until the second meta-step" in learner.describe().speed
    for _ in range(3):
        learner.meta_step(class_tasks((4,)))
    assert "too small to divide" in learner.describe().speed
    assert learner.executor.speed.workers == 1
    assert "speed" not in learner.state_dict()["_extra_state"]


def test_the_work_of_a_meta_step_is_counted() -> None:
    learner = build(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 3)).double(), inner_steps=5)
    x, y = torch.randn(6, 1, 6, 6, dtype=torch.float64), torch.arange(6) % 3
    per_example = 2 * (4 * 16 * 9 + 64 * 3)  # A multiplication and an addition for each weight and place.
    batch = TaskBatch((Task(x, y, x[:3], y[:3]),) * 4)
    assert measured._work(learner, batch) == per_example * (6 + 3) * 5 * 4


def test_long_meta_steps_are_measured_once_also_after_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def choose(*_: Any) -> Speed:
        calls.append(learner.iteration)
        return Speed(2, True, why="measured: so")

    choose_by(monkeypatch, choose)
    monkeypatch.setattr(measured, "_WORTH_WHILE", 1.0)
    batch = CASES["conv4"].batch()
    learner, plain = build(seeded(Conv4)), build(seeded(Conv4), tune=False)
    for each in (learner, plain):
        each.meta_step(batch)
    assert_same_values(tensors(learner), tensors(plain), tolerance=0)
    optimizer = copy.deepcopy(learner.optimizer.state_dict())
    state = copy.deepcopy(learner.state_dict())
    learner = build(seeded(Conv4))
    learner.load_state_dict(state)
    learner.optimizer.load_state_dict(optimizer)
    for each in (learner, learner, plain, plain):
        each.meta_step(batch)
    assert calls == [1]
    assert learner.executor.speed == Speed(2, True, why="measured: so")
    assert_same_values(tensors(learner), tensors(plain))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "named",
    [
        {"workers": 2},
        {"workers": 2, "workers_in": "threads"},
        {"channels_last": True},
        {"tune": False},
        {"engine": "higher"},
        {"engine": "batched"},
    ],
    ids=str,
)
def test_what_is_named_is_not_measured(monkeypatch: pytest.MonkeyPatch, named: dict[str, Any]) -> None:
    choose_by(monkeypatch, never)
    monkeypatch.setattr(measured, "_WORTH_WHILE", 1.0)
    learner = build(seeded(Conv4), **named)
    for _ in range(3):
        learner.meta_step(CASES["conv4"].batch())


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

    choose_by(monkeypatch, choose)
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
    choose_by(monkeypatch, lambda *_: Speed(2))
    plain, tuned = (build(seeded(Watched), engine="functional", tune=tune) for tune in (False, True))
    for learner in (plain, tuned):
        learner.meta_step(FOUR)
        learner.model.now = "counts"
        learner.meta_step(FOUR)
    assert_same_values(tensors(tuned), tensors(plain))
    assert "one task after another: forward changes" in " ".join(str(tuned.describe()).split())
