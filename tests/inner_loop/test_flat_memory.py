"""memory="flat": the same gradients, and memory that does not grow with inner steps."""

from __future__ import annotations

import gc
import warnings
import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from engine_cases import ALL_ENGINES, ANNEAL_EPOCHS, CASES, ENGINES, POLICIES, STEPS, case_learner, case_reference
from face import (
    as_tasks,
    assert_equals_reference,
    assert_step_equals_oracle,
    build,
    gradients_of,
    last_only,
    reference_for,
    spied,
)
from inner_rules import BATCH, RULES, by_hand, learner_of
from keywords import grouped
from models import Conv4, NormedMlp, class_tasks, seeded
from oracle import assert_same_gradients, msl_weights
from stateful import Late, Noisy, seed_all
from torch import Tensor, nn

from metawrap import MAMLPlusPlus, MetaWrapWarning, Task, UnsupportedModuleError

VECTORS = class_tasks((4,), targets=3)
MEMORIES = ("unrolled", "flat")
NETWORKS = ["conv4", "vision transformer", "lstm", "tied weights", "user hooks", "norm with activation"]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_meta_step_and_forward_equal_the_oracle(name: str, engine: str) -> None:
    step, whole = (case_learner(CASES[name], engine, memory="flat") for _ in range(2))
    assert_equals_reference(step, step.meta_step(CASES[name].batch()).loss, case_reference(name))
    output = whole(CASES[name].batch())
    output.loss.backward()
    assert_equals_reference(whole, output.loss.detach(), case_reference(name))


@pytest.mark.parametrize("norm", POLICIES)
@pytest.mark.parametrize("second_order", [True, False], ids=["second order", "first order"])
def test_every_norm_policy_and_order_equals_the_oracle(norm: str, second_order: bool) -> None:
    model, batch = seeded(NormedMlp), class_tasks((4,))
    learner = build(
        model, norm=norm, memory="flat", first_order_epochs=0 if second_order else 99, msl_epochs=ANNEAL_EPOCHS
    )
    weights = msl_weights(STEPS, 0, ANNEAL_EPOCHS)
    assert_step_equals_oracle(learner, model, batch, weights, norm=norm, second_order=second_order)


@pytest.mark.sampled(10)
@pytest.mark.parametrize("engine", ALL_ENGINES)
@pytest.mark.parametrize("rule", RULES)
def test_every_update_rule_equals_the_loop_by_hand(rule: str, engine: str) -> None:
    learner = learner_of(rule, engine, memory="flat")
    loss, expected = by_hand(learner, rule)
    assert learner.meta_step(BATCH).loss == pytest.approx(float(loss), rel=1e-12)
    assert_same_gradients(gradients_of(learner), expected)


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
    for memory in MEMORIES:
        learner = build(seeded(NormedMlp), memory=memory, head_init=head_init, head="linear", engine="functional")
        torch.manual_seed(0)
        tasks = [Task(*parts, id=index) for index, parts in enumerate(as_tasks(class_tasks((4,))))]
        for _ in range(2):
            learner.meta_step(tasks)
        found.append(gradients_of(learner))
    assert_same_gradients(found[1], found[0])


@pytest.mark.parametrize("memory", MEMORIES)
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


@pytest.mark.slow
def test_graphs_of_support_and_target_do_not_stand_together() -> None:
    def peak(**sizes: int) -> int:
        # Under "support" a target pass reads moments of a support pass, so that their graphs do stand together.
        return peak_of_graphs(3, sizes, memory="flat", norm="batch")

    both = peak(shots=6, targets=20)
    assert both <= 1.1 * max(peak(shots=6, targets=1), peak(shots=1, targets=20))


@pytest.mark.slow
def test_target_graphs_are_freed_step_by_step() -> None:
    with_all_targets = peak_of_graphs(5, multi_step_loss=True)
    with_the_last_only = peak_of_graphs(5, multi_step_loss=False)
    assert with_all_targets < 1.1 * with_the_last_only


def test_a_model_that_cannot_be_replayed_is_refused() -> None:
    learner = MAMLPlusPlus(seeded(Remembers), execution={"memory": "flat"}, engine="functional")
    with pytest.raises(UnsupportedModuleError, match=r'"memory": "unrolled"'):
        learner.meta_step(class_tasks((4,)))


class SharedNorm(NormedMlp):
    """Its norm keeps one average for all inner steps, which depends on the order of all passes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm.momentum = 0.4


def order_of_passes(learner: MAMLPlusPlus, monkeypatch: pytest.MonkeyPatch) -> str:
    """ "s" for each support pass, replays included, and "t" for each target pass, with its inner step."""
    batch = class_tasks((4,), tasks=1, targets=3)
    learner.meta_step(batch)  # The first look is over.
    kinds = {batch[0].shape[1]: "s", batch[2].shape[1]: "t"}
    note = lambda module, x: f"{kinds[len(x)]}{learner.wrapped.clock.step}"
    seen = spied(monkeypatch, type(learner.model), "forward", note)
    learner.meta_step(batch)
    return " ".join(seen)


@pytest.mark.parametrize("norm", ["batch", "support"])
@pytest.mark.parametrize("engine", ["functional", "batched"])
def test_statistics_of_all_passes_are_averaged_in_their_own_order(engine: str, norm: str) -> None:
    one_row = {"per_step_norm_statistics": False, "per_step_norm_affine": False}
    found = [
        build(seeded(SharedNorm), engine=engine, inner_steps=4, memory=memory, norm=norm, **one_row)
        for memory in MEMORIES
    ]
    for learner in found:
        for _ in range(2):
            learner.meta_step(VECTORS)
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


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "options",
    [{"workers": 2}, {"engine": "batched"}, {"tune": True}, {"workers": 2, "workers_in": "processes"}],
    ids=str,
)
@pytest.mark.parametrize("make", [Recurrent, Assigns])
def test_what_only_looks_like_a_change_is_none(make: Any, options: dict[str, Any]) -> None:
    if make is Assigns and "engine" in options:
        pytest.skip("the batched engine refuses it")
    found = []
    for more in ({}, {"memory": "flat", **options}):
        learner = build(seeded(make), **{"engine": "functional", **more})
        with warnings.catch_warnings():
            warnings.simplefilter("error", MetaWrapWarning)
            learner.meta_step(VECTORS)
        found.append(gradients_of(learner))
    assert_same_gradients(found[1], found[0])


@pytest.mark.parametrize("options", [{}, {"tune": True}, {"workers": 2}], ids=str)
def test_hidden_edits_of_the_weights_keep_the_order_of_passes(options: dict[str, Any]) -> None:
    found = []
    for more in ({}, {"memory": "flat", **options}):
        learner = build(seeded(partial(Late, "edits_its_weights_unseen")), engine="functional", **more)
        losses = [float(learner.meta_step(VECTORS).loss) for _ in range(2)]
        found.append((gradients_of(learner), losses))
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-12)
    assert_same_gradients(found[1][0], found[0][0])


@pytest.mark.parametrize("make", [NormedMlp, Recurrent, Assigns])
def test_targets_wait_until_their_gradient_is_used(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = build(seeded(make), inner_steps=3, memory="flat", engine="functional")
    assert order_of_passes(learner, monkeypatch) == "s0 s1 s2 t2 s2 t1 s1 t0 s0"


def test_passes_that_draw_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = build(seeded(Noisy), inner_steps=3, memory="flat", engine="functional")
    assert order_of_passes(learner, monkeypatch) == "s0 t0 s1 t1 s2 t2 s2 s1 s0"


@pytest.mark.parametrize("begun", ["drops", "counts", "averages", "edits_its_weights"])
def test_what_begins_later_is_seen_and_the_step_is_taken_again_in_order(begun: str) -> None:
    found = []
    for memory in MEMORIES:
        learner = build(seeded(Late), memory=memory, engine="functional")
        learner.meta_step(VECTORS)
        learner.model.now = begun
        seed_all()
        losses = [float(learner.meta_step(VECTORS).loss) for _ in range(2)]
        found.append((gradients_of(learner), losses, learner.model.average.clone(), learner.model.calls))
    (gradients, losses, average, calls), flat = found
    assert flat[1] == pytest.approx(losses, rel=1e-12)
    torch.testing.assert_close(flat[2], average, rtol=1e-12, atol=1e-15)
    assert_same_gradients(flat[0], gradients)
    assert flat[3] == calls
