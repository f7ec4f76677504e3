"""engine="batched" and models with state: what is refused, each time by name, and what may be carried."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from batched_learners import THREE, VECTORS, batched, unequal, weights_of
from engine_cases import STEPS
from face import assert_same_state, assert_step_equals_oracle, fingerprint, in_dtype, snapshot, spied, unchanged
from models import Mlp, NormedMlp, seeded
from stateful import Late, OwnGenerator, state_of_generators
from torch import Tensor, nn

from metawrap import ArgumentError, MAMLPlusPlus, UnsupportedModuleError


class Hooked(Late):
    """A forward hook that keeps what it sees outside of the model."""

    def __init__(self) -> None:
        super().__init__()
        seen: list[Tensor] = []
        self.first.register_forward_hook(lambda module, args, output: seen.append(output))


class _WrongUnderVmap(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
        return x + x.detach(), in_dims[0]


class WrongGradient(Late):
    """The right value, and half of its gradient under vmap alone."""

    def bend(self, hidden: Tensor) -> Tensor:
        return _WrongUnderVmap.apply(hidden)


BUFFER = r"edits the buffer 'average'"
OUTSIDE = r"draws from random or numpy"
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    now: (partial(Late, now), words)
    for now, words in {
        "branches": r"data-dependent",
        "averages": BUFFER,
        "ticks": BUFFER,
        "counts": r"changes 'calls'",
        "keeps": r"keeps values of one task in 'kept'",
        "lists": r"changes a container of 'the model itself'",
        "draws_in_torch": r"draws random numbers",
        "draws_in_python": OUTSIDE,
    }.items()
}
REFUSED["a hook"] = (Hooked, r"changes a container that a hook writes to")
REFUSED["a gradient"] = (WrongGradient, r"its meta-gradient for two tasks at once is not that of one after the other")


def assert_refused(learner: Any, call: Callable[[Any], Any], batch: Any, reason: str) -> None:
    """Each time, by name and reason; nothing moves, and no random number is drawn."""
    own, state = fingerprint(learner, ids=False), snapshot(dict(learner.state_dict()))
    drawn, table = state_of_generators(learner.model), dict(learner.model.table)
    for _ in range(2):
        with pytest.raises(UnsupportedModuleError, match=rf'engine="batched".*{reason}.*engine="functional"'):
            call(batch)
        assert fingerprint(learner, ids=False) == own
        assert_same_state(dict(learner.state_dict()), state)
        assert state_of_generators(learner.model) == drawn
        held = (learner.model.calls, learner.model.kept, learner.model.history, learner.model.done)
        assert held == (0, None, [], [])
        assert learner.model.table == table


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_carried_is_refused_by_name_each_time_and_nothing_moves(name: str, dtype: torch.dtype) -> None:
    make, reason = REFUSED[name]
    user, batch = seeded(make).to(dtype), in_dtype(VECTORS, dtype)
    with unchanged(user):
        learner = batched(user)
        for call in (learner.meta_step, learner):
            assert_refused(learner, call, batch, reason)
        assert_refused(learner, learner.meta_step, batch, reason)


# --- what starts after the first look --------------------------------------------------------------------------------


LATE = {
    "counts": r"changes 'calls', once for all tasks",
    "counts_in_a_table": r"changes a container of 'the model itself'",
    "draws_in_python": OUTSIDE,
    "draws_in_numpy": OUTSIDE,
    "draws_from_its_own": OUTSIDE,
    "draws_in_torch": r"draws random numbers",
    "averages": f"{BUFFER}, once for all tasks",
    "ticks": f"{BUFFER}, once for all tasks",
    "keeps": r"keeps values of one task in 'kept'",
    "appends": r"keeps values of one task in a container of 'the model itself'",
    "deletes": r"changes 'again'",
    "branches": r"data-dependent",
    "reads_numpy": r"it fails with \w+: ",
    "fails_under_vmap": r"it fails with KeyError: 'only alone'",
}


def looked_at() -> Any:
    """A learner whose first look is over, and found nothing."""
    learner = batched(seeded(OwnGenerator))
    learner.meta_step(THREE)
    return learner


@pytest.mark.sampled(5)
@pytest.mark.parametrize("way", ["meta_step", "forward"])
@pytest.mark.parametrize("now", LATE)
def test_what_begins_after_the_first_look_is_refused_by_name_and_nothing_moves(now: str, way: str) -> None:
    learner, other = looked_at(), looked_at()
    learner.model.now = now
    assert_refused(learner, getattr(learner, way), THREE, LATE[now])
    learner.model.now = ""
    assert learner.meta_step(THREE).loss == other.meta_step(THREE).loss


def test_a_cache_that_begins_after_the_first_look_is_carried_and_costs_no_more_calls_once_it_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tasks, learner = unequal(), looked_at()
    learner.model.now = "caches"
    assert_step_equals_oracle(learner, copy.deepcopy(learner.model), tasks, weights_of(learner))
    forwards = spied(monkeypatch, Late, "bend", lambda *_: None)
    learner.meta_step(tasks)
    groups, passes = 2, 2  # Four tasks that are padded, and one.
    assert len(forwards) == groups * passes * STEPS


def test_a_draw_by_another_thread_during_a_call_is_not_the_models() -> None:
    learner, other = looked_at(), looked_at()
    draws: Any = iter([random.random, None, np.random.rand, None, partial(torch.rand, 1)])

    def elsewhere(module: Any, args: Any) -> None:
        if draw := next(draws, None):  # In every second call: the model draws in none.
            draw()

    learner.model.first.register_forward_pre_hook(elsewhere)
    assert learner.meta_step(THREE).loss == other.meta_step(THREE).loss
    assert next(draws, None) is None


def test_an_error_of_one_task_is_raised_as_it_is_and_nothing_moves() -> None:
    class Picky(Late):
        limit = 1e9

        def bend(self, hidden: Tensor) -> Tensor:
            self.average += 1
            if hidden.shape[-1] > self.limit:
                raise ValueError("the user's own")
            return hidden

    learner = looked_at()
    learner.model.__class__ = Picky
    learner.model.limit = 2
    own, state = fingerprint(learner, ids=False), snapshot(dict(learner.state_dict()))
    for call in (learner.meta_step, learner):
        with pytest.raises(ValueError, match="the user's own"):
            call(VECTORS)
        assert fingerprint(learner, ids=False) == own
        assert_same_state(dict(learner.state_dict()), state)


def test_evaluation_may_edit_a_buffer_and_training_goes_on() -> None:
    learner, other = looked_at(), looked_at()
    learner.model.now = "ticks"
    learner.evaluate(VECTORS)
    learner.model.now = ""
    assert learner.meta_step(VECTORS).loss == other.meta_step(VECTORS).loss


def test_a_loss_that_draws_later_draws_for_each_task() -> None:
    drawn: list[float] = []

    def loss_fn(prediction: Tensor, y: Tensor) -> Tensor:
        if not draws:
            return F.cross_entropy(prediction, y)
        drawn.append(random.random())
        return F.cross_entropy(prediction, y) * drawn[-1]

    draws = False
    learner = batched(seeded(NormedMlp), loss_fn=loss_fn, inner_steps=1)
    learner(THREE)
    draws = True
    random.seed(1)
    learner(THREE)
    expected = random.Random(1)
    # One for each task's support loss, then its target loss; the draw of each try under vmap was taken back.
    support, target = ([expected.random() for _ in range(3)] for _ in range(2))
    assert drawn == [support[0], *support, target[0], *target]


def test_masks_are_refused_at_construction_but_not_in_evaluation() -> None:
    with pytest.raises(ArgumentError, match=r'mask_unused_outputs.*engine="batched".*functional'):
        MAMLPlusPlus(Mlp(4, 6, 5), engine="batched", outputs={"mask_unused_outputs": True})
    learner = MAMLPlusPlus(Mlp(4, 6, 5).double(), engine="batched")
    plain = MAMLPlusPlus(Mlp(4, 6, 5).double(), engine="functional")
    plain.load_state_dict(learner.state_dict())
    found, expected = (one.evaluate(VECTORS, mask_unused_outputs=True).loss for one in (learner, plain))
    assert found == pytest.approx(expected, rel=1e-12)


class Caches(Late):
    """Keeps positions from call to call, anew for each length: it is the same after each call."""

    def bend(self, hidden: Tensor) -> Tensor:
        if self.kept is None or len(self.kept) != len(hidden):
            self.kept = torch.arange(len(hidden), dtype=hidden.dtype).unsqueeze(1)
        return hidden + 0.1 * self.kept


def test_a_cache_is_carried() -> None:
    tasks, learner = unequal(), batched(seeded(Caches))
    assert_step_equals_oracle(learner, seeded(Caches), tasks, weights_of(learner))
