"""memory="flat": the same gradients, and memory that does not grow with inner steps."""

from __future__ import annotations

import gc
import random
import warnings
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from face import as_tasks, assert_equals_reference, build, gradients_of, last_only, reference_for
from keywords import grouped
from models import Conv4, NormedMlp, class_tasks, seeded
from oracle import assert_same_gradients, msl_weights
from test_engines import ANNEAL_EPOCHS, CASES, ENGINES, EPOCH, STEPS, _learner, _reference
from test_inner_optimizers import BATCH, RULES, by_hand, learner_of
from torch import Tensor, nn

from metawrap import ArgumentError, MAMLPlusPlus, MetaWrapWarning, Task, UnsupportedModuleError

NETWORKS = ["conv4", "vision transformer", "lstm", "tied weights", "user hooks", "norm with activation"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_meta_step_and_forward_equal_the_oracle(name: str, engine: str) -> None:
    case = CASES[name]
    for way in ("meta_step", "forward"):
        learner = _learner(case, seeded(case.make), engine, memory="flat")
        learner.epoch = EPOCH
        if way == "meta_step":
            loss: Any = learner.meta_step(case.batch()).loss
        else:
            output = learner(case.batch())
            output.loss.backward()
            loss = output.loss.detach()
        assert_equals_reference(learner, loss, _reference(name))


@pytest.mark.parametrize("norm", ["batch", "support", "running"])
@pytest.mark.parametrize("second_order", [True, False], ids=["second order", "first order"])
def test_every_norm_policy_and_order_equals_the_oracle(norm: str, second_order: bool) -> None:
    model, batch = seeded(NormedMlp), class_tasks((4,))
    learner = build(
        model, norm=norm, memory="flat", first_order_epochs=0 if second_order else 99, msl_epochs=ANNEAL_EPOCHS
    )
    reference = reference_for(
        model, learner, batch, msl_weights(STEPS, 0, ANNEAL_EPOCHS), norm=norm, second_order=second_order
    )
    assert_equals_reference(learner, learner.meta_step(batch).loss, reference)


@pytest.mark.parametrize("engine", [*ENGINES, "batched"])
@pytest.mark.parametrize("rule", RULES)
def test_every_update_rule_equals_the_loop_by_hand(rule: str, engine: str) -> None:
    learner = learner_of(rule, engine, memory="flat")
    loss, expected = by_hand(learner, rule, second_order=True)
    assert learner.meta_step(BATCH).loss == pytest.approx(float(loss), rel=1e-12)
    assert_same_gradients(gradients_of(learner), expected)


class Noisy(nn.Module):
    """Draws from every generator, counts its calls, and keeps an average of what it saw: a replay must see the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.linear = nn.Linear(4, 6), nn.Linear(6, 3)
        self.drop = nn.Dropout(0.4)
        self.register_buffer("average", torch.zeros(6))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.drop(torch.tanh(self.first(x))) * (1 + random.random()) + float(np.random.rand())
        self.average.mul_(0.9).add_(0.1 * hidden.detach().mean(0))
        return self.linear(hidden - self.average) / (1 + 0.1 * self.calls)


def seed_all() -> None:
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_replay_sees_the_same_draws_counts_and_buffers(engine: str) -> None:
    model, batch = seeded(Noisy), class_tasks((4,))
    learner = build(model, engine=engine, inner_steps=3, memory="flat", multi_step_loss=False)
    seed_all()
    reference = reference_for(model, learner, batch, last_only(3))
    seed_all()
    assert_equals_reference(learner, learner.meta_step(batch).loss, reference)
    assert learner.model.calls == 8, "three support passes and one target pass for either task; replays do not count"


class Remembers(nn.Module):
    """Keeps its calls in a list, which nobody can put back."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen = nn.Linear(4, 3), [0]

    def forward(self, x: Tensor) -> Tensor:
        self.seen[0] += 1
        return self.linear(x) / self.seen[0]


@pytest.mark.parametrize("head_init", ["zeros", "random", "stored"])
def test_heads_that_start_per_task_have_the_unrolled_gradient(head_init: str) -> None:
    found = []
    for memory in ("unrolled", "flat"):
        learner = build(seeded(NormedMlp), memory=memory, head_init=head_init, head="linear", engine="functional")
        torch.manual_seed(0)
        tasks = [Task(*parts, id=index) for index, parts in enumerate(as_tasks(class_tasks((4,))))]
        for _ in range(2):
            learner.meta_step(tasks)
        found.append(gradients_of(learner))
    assert_same_gradients(found[1], found[0])


@pytest.mark.parametrize("memory", ["unrolled", "flat"])
@pytest.mark.parametrize("name", ["model.first.weight", "model.norm.weight", "model.linear.weight", "rate"])
def test_a_hook_on_a_parameter_sees_its_whole_gradient_once(name: str, memory: str) -> None:
    gradients, seen = [], []
    for hooked in (False, True):
        learner = build(seeded(NormedMlp), memory=memory, adapt="linear.*")
        rates = learner.learning_rates["linear.weight"]
        parameter = rates if name == "rate" else dict(learner.named_parameters())[name]
        if hooked:
            parameter.register_hook(lambda gradient: seen.append(gradient.clone()) or 0.5 * gradient)
        learner.meta_step(class_tasks((4,), tasks=1))
        gradients.append(parameter.grad.clone())
    # The first look differentiates too; the last call is the meta-step's.
    torch.testing.assert_close(seen[-1], gradients[0], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(gradients[1], 0.5 * gradients[0], rtol=1e-12, atol=1e-15)


@dataclass(eq=False)
class _Saved:
    tensor: Tensor


class LiveGraph:
    """Counts the bytes that graphs hold for their backward passes."""

    def __init__(self) -> None:
        self.live = self.peak = 0

    def pack(self, tensor: Tensor) -> _Saved:
        saved, size = _Saved(tensor), tensor.nbytes
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(saved, self.free, size)
        return saved

    def free(self, size: int) -> None:
        self.live -= size

    @staticmethod
    def unpack(saved: _Saved) -> Tensor:
        return saved.tensor


def peak_of_graphs(steps: int, sizes: dict[str, int] | None = None, **options: Any) -> int:
    learner = MAMLPlusPlus(seeded(Conv4), inner_steps=steps, engine="functional", **grouped(**options))
    batch = class_tasks((1, 16, 16), tasks=2, **(sizes or {"targets": 2}))
    learner.meta_step(batch)
    gc.collect()
    live = LiveGraph()
    with torch.autograd.graph.saved_tensors_hooks(live.pack, live.unpack):
        learner.meta_step(batch)
    assert live.peak > 0
    return live.peak


def test_graphs_of_ten_steps_hold_no_more_than_those_of_one() -> None:
    assert peak_of_graphs(10, memory="flat") <= 1.3 * peak_of_graphs(1, memory="flat")
    assert peak_of_graphs(10) > 3 * peak_of_graphs(1), "the unrolled graph does grow: the count counts"


def test_graphs_of_support_and_target_do_not_stand_together() -> None:
    def peak(**sizes: int) -> int:
        return peak_of_graphs(3, sizes, memory="flat")

    both = peak(shots=6, targets=20)
    assert both <= 1.1 * max(peak(shots=6, targets=1), peak(shots=1, targets=20))


def test_target_graphs_are_freed_step_by_step() -> None:
    with_all_targets = peak_of_graphs(5, multi_step_loss=True)
    with_the_last_only = peak_of_graphs(5, multi_step_loss=False)
    assert with_all_targets < 1.1 * with_the_last_only


def test_a_model_that_cannot_be_replayed_is_refused() -> None:
    learner = MAMLPlusPlus(seeded(Remembers), execution={"memory": "flat"}, engine="functional")
    with pytest.raises(UnsupportedModuleError, match=r'execution={"memory": "unrolled"}'):
        learner.meta_step(class_tasks((4,)))


def test_an_unknown_memory_is_refused() -> None:
    with pytest.raises(ArgumentError, match="memory"):
        MAMLPlusPlus(seeded(NormedMlp), execution={"memory": "little"})


class SharedNorm(nn.Module):
    """Its norm keeps one average for all inner steps, which depends on the order of all passes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.linear = nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=0.4), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.norm(self.first(x))))


def order_of_passes(learner: MAMLPlusPlus, batch: Any) -> str:
    """ "s" for each support pass, replays included, and "t" for each target pass, with its inner step."""
    support, seen = batch[0].shape[1], []
    learner.meta_step(batch)  # The first look is over.
    forward = type(learner.model).forward

    def noting(module: nn.Module, x: Tensor) -> Tensor:
        seen.append(f"{'s' if len(x) == support else 't'}{learner.wrapped.clock.step}")
        return forward(module, x)

    type(learner.model).forward = noting
    try:
        learner.meta_step(batch)
    finally:
        type(learner.model).forward = forward
    return " ".join(seen)


@pytest.mark.parametrize("norm", ["batch", "support"])
@pytest.mark.parametrize("engine", ["functional", "batched"])
def test_statistics_of_all_passes_are_averaged_in_their_own_order(engine: str, norm: str) -> None:
    batch, found = class_tasks((4,), targets=3), []
    for memory in ("unrolled", "flat"):
        learner = build(
            seeded(SharedNorm),
            engine=engine,
            inner_steps=4,
            memory=memory,
            norm=norm,
            per_step_norm_statistics=False,
            per_step_norm_affine=False,
        )
        for _ in range(2):
            learner.meta_step(batch)
        found.append(learner)
    unrolled, flat = (dict(learner.model.named_buffers()) for learner in found)
    assert any(name.endswith("running_mean") for name in unrolled)
    for name, value in unrolled.items():
        torch.testing.assert_close(flat[name], value, rtol=1e-9, atol=1e-12)
    assert_same_gradients(gradients_of(found[1]), gradients_of(found[0]))


class Recurrent(nn.Module):
    """torch's own recurrent modules keep lists of their weights, which an engine makes anew for each call."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.linear = nn.LSTM(2, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.lstm(x.view(len(x), 2, 2))[0][:, -1])


class Assigns(NormedMlp):
    """Sets attributes to what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shape = 0.5, (4,)

    def forward(self, x: Tensor) -> Tensor:
        self.scale, self.shape = len(x[0]) ** -0.5, tuple(x.shape[1:])
        return super().forward(x)


@pytest.mark.parametrize(
    "options",
    [{"workers": 2}, {"engine": "batched"}, {"tune": True}, {"workers": 2, "workers_in": "processes"}],
    ids=str,
)
@pytest.mark.parametrize("make", [Recurrent, Assigns])
def test_what_only_looks_like_a_change_is_none(make: Any, options: dict[str, Any]) -> None:
    if make is Assigns and "engine" in options:
        pytest.skip("the batched engine refuses it")
    batch, found = class_tasks((4,), targets=3), []
    for more in ({}, {"memory": "flat", **options}):
        learner = build(seeded(make), **{"engine": "functional", **more})
        with warnings.catch_warnings():
            warnings.simplefilter("error", MetaWrapWarning)
            learner.meta_step(batch)
        found.append(gradients_of(learner))
        assert learner._passes_in_order is None
    assert_same_gradients(found[1], found[0])


class HiddenEdits(nn.Module):
    """Edits its weights where torch does not count it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.linear = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        self.linear.weight.data.mul_(0.9)
        return self.linear(hidden)


@pytest.mark.parametrize("options", [{}, {"tune": True}, {"workers": 2}], ids=str)
def test_hidden_edits_of_the_weights_keep_the_order_of_passes(options: dict[str, Any]) -> None:
    batch, found = class_tasks((4,), targets=3), []
    for more in ({}, {"memory": "flat", **options}):
        learner = build(seeded(HiddenEdits), engine="functional", **more)
        losses = [float(learner.meta_step(batch).loss) for _ in range(2)]
        found.append((gradients_of(learner), losses))
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-12)
    assert_same_gradients(found[1][0], found[0][0])


@pytest.mark.parametrize("make", [NormedMlp, Recurrent, Assigns])
def test_targets_wait_until_their_gradient_is_used(make: Any) -> None:
    learner = build(seeded(make), inner_steps=3, memory="flat", engine="functional")
    order = order_of_passes(learner, class_tasks((4,), tasks=1, targets=3))
    assert order == "s0 s1 s2 t2 s2 t1 s1 t0 s0"


def test_passes_that_draw_keep_their_order() -> None:
    learner = build(seeded(Noisy), inner_steps=3, memory="flat", engine="functional")
    order = order_of_passes(learner, class_tasks((4,), tasks=1, targets=3))
    assert order == "s0 t0 s1 t1 s2 t2 s2 s1 s0"


class Late(nn.Module):
    """Does nothing that depends on the order of calls, until it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.linear = nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("average", torch.zeros(6))
        self.begun, self.calls = "", 0

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        if self.begun == "draws":
            hidden = nn.functional.dropout(hidden, 0.4)
        elif self.begun == "counts":
            self.calls += 1
            hidden = hidden / self.calls
        elif self.begun == "edits a buffer":
            self.average.mul_(0.9).add_(0.1 * hidden.detach().mean(0))
            hidden = hidden - self.average
        elif self.begun == "edits its weights":
            with torch.no_grad():
                self.linear.weight.mul_(0.9)
        return self.linear(hidden)


@pytest.mark.parametrize("begun", ["draws", "counts", "edits a buffer", "edits its weights"])
def test_what_begins_later_is_seen_and_the_step_is_taken_again_in_order(begun: str) -> None:
    batch, found = class_tasks((4,), targets=3), []
    for memory in ("unrolled", "flat"):
        learner = build(seeded(Late), memory=memory, engine="functional")
        learner.meta_step(batch)
        learner.model.begun = begun
        seed_all()
        losses = [float(learner.meta_step(batch).loss) for _ in range(2)]
        found.append((gradients_of(learner), losses, learner.model.average.clone(), learner.model.calls))
    (gradients, losses, average, calls), flat = found
    assert flat[1] == pytest.approx(losses, rel=1e-12)
    torch.testing.assert_close(flat[2], average, rtol=1e-12, atol=1e-15)
    assert_same_gradients(flat[0], gradients)
    assert flat[3] == calls
