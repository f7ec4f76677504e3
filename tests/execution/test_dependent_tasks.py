"""Tasks that depend on each other, through state of the model or loss: solved in order, and said so."""

from __future__ import annotations

import copy
import itertools
import random
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import CASES
from face import assert_same_values, build, tensors
from models import class_tasks, hooked_conv4, seeded
from stateful import Watch, Watched
from torch import Tensor, nn
from ways_to_work import FOUR, WORKERS_IN

from metawrap import MetaWrapWarning
from metawrap.inner_loop.flat_memory import DisturbedError
from metawrap.snapshot.generators import Generators


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


@pytest.mark.sampled(9)
@pytest.mark.parametrize("held", HELD)
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


@pytest.mark.sampled(2)
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


class Attends(Watched):
    """Operations that could draw, and do not: attention and a recurrent network without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.recurrent = nn.MultiheadAttention(6, 2, batch_first=True), nn.LSTM(6, 6, batch_first=True)

    def bend(self, hidden: Tensor) -> Tensor:
        rows = hidden[:, None]
        return self.recurrent(self.attention(rows, rows, rows, need_weights=False)[0])[0][:, 0]


def test_attention_and_recurrent_networks_without_dropout_draw_nothing() -> None:
    learner = build(seeded(Attends), workers=2, engine="functional")
    learner.meta_step(FOUR)  # A warning is an error here.
    assert learner.executor.why_in_order(learner) is None
    assert "2 threads" in learner.executor.in_words(learner)


def test_draws_are_seen_although_another_thread_puts_the_generator_back() -> None:
    """As flat memory does; the last thread to do it may leave the state from before all draws."""
    learner = build(seeded(Watched), workers=2)
    learner.meta_step(FOUR)

    def solved(_: Any, task: int) -> float:
        before = Generators()
        drawn = float(torch.rand(()))
        before.put_back()
        return drawn

    with pytest.raises(DisturbedError, match="random numbers"):
        list(learner.executor._in_threads(learner, solved, range(4), 2))


def test_what_cannot_be_copied_any_more_is_solved_in_order() -> None:
    plain, fast = (build(seeded(Watched), engine="functional", workers=n) for n in (1, 2))
    for learner in (plain, fast):
        learner.meta_step(FOUR)
    fast.model.guard = threading.Lock()
    with pytest.warns(MetaWrapWarning, match="copied"):
        fast.meta_step(FOUR)
    plain.meta_step(FOUR)
    assert_same_values(tensors(fast), tensors(plain))


HAZARDS: dict[str, tuple[Any, str]] = {
    "random draws": (partial(Watched, "drops"), "random numbers"),
    "draws of a generator that is put back": (partial(Watched, "draws_the_same"), "random numbers"),
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
