"""Where the head starts in each task."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import ALL_ENGINES, ENGINES
from face import assert_same_values, gradients_of, in_dtype, last_only, rates_of, statistics_of
from head_cases import BATCH, HEAD, TASKS, learner_of
from keywords import grouped
from models import NormedMlp, class_tasks, seeded
from oracle import assert_same_gradients, meta_gradient
from torch import Tensor, nn

from metawrap import ArgumentError, MAMLPlusPlus, MetaWrapError, Task, TaskBatch, TaskError


def stored() -> Any:
    return learner_of(head_init="stored", head="linear")


def in_float32(tasks: list[Task]) -> list[Task]:
    return [Task(*in_dtype(task.parts()), id=task.id) for task in tasks]


def reference(learner: Any, tasks: list[Any], head: dict[str, Tensor], **options: Any) -> Any:
    """The oracle on the learner's values, with this head in place of the learned one."""
    values = dict(learner.model.named_parameters()) | head
    return meta_gradient(
        learner.unwrap() if options.pop("unwrapped", False) else seeded(NormedMlp),
        [task.parts() for task in tasks],
        rates=rates_of(learner),
        step_weights=last_only(2),
        values=values,
        statistics=statistics_of(learner),
        **options,
    )


def zeros(learner: Any) -> dict[str, Tensor]:
    return {name: torch.zeros_like(dict(learner.model.named_parameters())[name]) for name in HEAD}


@pytest.mark.parametrize("head", [None, "linear"])
@pytest.mark.parametrize("engine", ALL_ENGINES)
def test_a_zero_head_starts_at_zero_and_is_not_learned(engine: str, head: str | None) -> None:
    learner = learner_of(engine, head_init="zeros", head=head)
    expected = reference(learner, TASKS, zeros(learner))
    metrics = learner.meta_step(TASKS)
    assert metrics.loss == pytest.approx(float(expected.loss), rel=1e-12)
    found = gradients_of(learner)
    assert all(found[name] is None for name in HEAD)
    assert_same_gradients(found, expected.gradients | dict.fromkeys(HEAD))


def test_adapt_evaluate_and_unwrap_start_from_the_zero_head() -> None:
    learner = learner_of(head_init="zeros", head="linear")
    assert not learner.unwrap().linear.weight.any()
    before = learner.evaluate(TASKS, steps=0, keep_predictions=True)
    assert all(not prediction.any() for prediction in before.predictions)
    assert not learner.adapt(*TASKS[0].parts()[:2], steps=0).linear.weight.any()
    after = learner.evaluate(TASKS[:1], keep_predictions=True).predictions[0]
    torch.testing.assert_close(learner.adapt(*TASKS[0].parts()[:2])(TASKS[0].target_x).detach(), after)
    assert learner.model.linear.weight.any(), "the learner's own head is left alone"


def test_a_zero_head_that_is_not_known_yet_cannot_be_unwrapped() -> None:
    learner = learner_of(head_init="zeros")
    with pytest.raises(MetaWrapError, match=r"head="):
        learner.unwrap()
    learner.meta_step(TASKS)
    assert not learner.unwrap().linear.bias.any()


def drawn_as_linear(count: int, seed: int) -> list[dict[str, Tensor]]:
    """nn.Linear(6, 3)'s own start: both from U(-1/sqrt(6), 1/sqrt(6)), weight first."""
    torch.manual_seed(seed)
    bound = 6**-0.5
    return [
        {name: torch.empty(shape, dtype=torch.float64).uniform_(-bound, bound)
         for name, shape in zip(HEAD, ((3, 6), (3,)), strict=True)}
        for _ in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("engine", ALL_ENGINES)
def test_a_random_head_is_drawn_anew_for_each_task(engine: str) -> None:
    learner = learner_of(engine, head_init="random", head="linear")
    first, second = drawn_as_linear(2, seed=5)
    expected = [reference(learner, [task], head) for task, head in zip(TASKS, (first, second), strict=True)]
    torch.manual_seed(5)
    metrics = learner.meta_step(TASKS)
    assert metrics.loss == pytest.approx(sum(float(one.loss) for one in expected) / 2, rel=1e-12)
    halves = [one.gradients for one in expected]
    mean = {name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0] if name not in HEAD}
    found = gradients_of(learner)
    assert all(found.pop(name) is None for name in HEAD)
    assert_same_gradients(found, mean)


@pytest.mark.parametrize("engine", ALL_ENGINES)
def test_a_stored_head_goes_on_from_where_its_task_left_it(engine: str) -> None:
    learner = learner_of(engine, head_init="stored", head="linear")
    first = reference(learner, TASKS, {})
    learner.meta_step(TASKS)
    assert_same_gradients(gradients_of(learner), first.gradients)  # the first time a head starts as learned
    left = first.fast_weights[1]
    second = reference(learner, TASKS[1:], {name: left[name] for name in HEAD})
    metrics = learner.meta_step([TASKS[1]])
    assert metrics.loss == pytest.approx(float(second.loss), rel=1e-9)
    assert gradients_of(learner)["linear.weight"] is None
    adapted = learner.adapt(*TASKS[1].parts()[:2], steps=0, task_id="b")
    assert_same_values([adapted.linear.weight], [second.fast_weights[0]["linear.weight"]])
    stranger = learner.adapt(*TASKS[1].parts()[:2], steps=0, task_id="nobody")
    assert torch.equal(stranger.linear.weight, learner.model.linear.weight)


def test_evaluation_reads_stored_heads_and_stores_none() -> None:
    learner = stored()
    learner.meta_step(TASKS[:1])
    before = copy.deepcopy(learner.head_start.stored)
    named = learner.evaluate(TASKS[:1], steps=0).loss
    assert named != learner.evaluate([Task(*TASKS[0].parts())], steps=0).loss
    assert learner.evaluate(TASKS[1:]).tasks == 1
    assert set(learner.head_start.stored) == set(before) == {"a"}
    assert_same_values(learner.head_start.stored["a"].values(), before["a"].values(), 0)


def test_a_skipped_step_stores_no_head() -> None:
    learner = stored()
    learner.meta_step(TASKS[:1])
    before = copy.deepcopy(learner.head_start.stored["a"])
    spoilt = Task(TASKS[0].support_x, TASKS[0].support_y, TASKS[0].target_x * torch.nan, TASKS[0].target_y, id="a")
    assert learner.meta_step([spoilt, TASKS[1]]).skipped
    assert set(learner.head_start.stored) == {"a"}
    assert_same_values(learner.head_start.stored["a"].values(), before.values(), 0)


@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_stored_heads_are_saved_with_the_learner(how: str) -> None:
    learner = stored()
    learner.meta_step(TASKS)
    if how == "state_dict":
        file = io.BytesIO()
        torch.save(learner.state_dict(), file)
        file.seek(0)
        other = stored()
        other.load_state_dict(torch.load(file, weights_only=True))
    else:
        other = pickle.loads(pickle.dumps(learner)) if how == "pickle" else copy.deepcopy(learner)
    assert other.evaluate(TASKS, steps=0).loss == learner.evaluate(TASKS, steps=0).loss
    assert other.meta_step(TASKS).loss == learner.meta_step(TASKS).loss


def test_stored_heads_follow_to_another_dtype() -> None:
    learner = stored()
    learner.meta_step(TASKS)
    learner.float()
    assert not learner.meta_step(in_float32(TASKS)).skipped


def test_tasks_without_an_id_are_refused_before_anything_changes() -> None:
    learner = stored()
    with pytest.raises(TaskError, match=r"id="):
        learner.meta_step([TASKS[0], Task(*TASKS[1].parts())])
    assert learner.iteration == 0
    assert not learner.head_start.stored


class GatedOutput(nn.Module):
    """Its prediction is no module's output, and the last module to run is not the head."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.gate = nn.Linear(4, 3), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) * torch.sigmoid(self.gate(x))


@pytest.mark.parametrize("start", ["zeros", "random", "stored"])
def test_a_head_that_is_a_guess_must_be_named(start: str) -> None:
    guessing = learner_of(model=seeded(GatedOutput), head_init=start)
    for _ in range(2):  # Asking again is no way past it.
        with pytest.raises(ArgumentError, match=r"not known for sure.*head="):
            guessing.meta_step(TASKS)
    assert guessing.head is None
    learner = learner_of(model=seeded(GatedOutput), head_init=start, head="head")
    learner.meta_step(TASKS)
    assert set(learner.head_start.names) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_stored_heads_need_no_id_outside_of_training(engine: str) -> None:
    learner = learner_of(engine, head_init="stored")
    support_x, support_y, *_ = TASKS[0].parts()
    fresh = learner.adapt(support_x, support_y, steps=0)
    assert torch.equal(fresh.linear.weight, learner.model.linear.weight)
    assert learner.evaluate(BATCH).tasks == 2


def test_a_head_that_is_not_finite_is_not_stored() -> None:
    learner = stored()
    spoilt = Task(TASKS[0].support_x * torch.nan, *TASKS[0].parts()[1:], id="a")
    learner([spoilt, TASKS[1]])
    assert set(learner.head_start.stored) == {"b"}


def test_stored_heads_of_another_dtype_are_loaded() -> None:
    learner = stored()
    learner.meta_step(TASKS)
    state = learner.state_dict()
    learner.meta_step(TASKS)
    assert not torch.equal(
        state["head_start._extra_state"]["stored"]["a"]["linear.bias"], learner.head_start.stored["a"]["linear.bias"]
    ), "a saved state does not change"
    other = stored().float()
    other.load_state_dict(state)
    assert not other.meta_step(in_float32(TASKS)).skipped


def tied_output() -> nn.Module:
    model = nn.Sequential(OrderedDict(first=nn.Linear(4, 4), squash=nn.Tanh(), second=nn.Linear(4, 4)))
    model.second.weight = model.first.weight
    return model


class OwnHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale = nn.Linear(4, 3), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.body(x)


def deep_head() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)))


def spectral_head() -> nn.Module:
    model = NormedMlp()
    nn.utils.spectral_norm(model.linear)
    return model


def normed_head() -> nn.Module:
    model = NormedMlp()
    nn.utils.parametrizations.weight_norm(model.linear)
    return model


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (tied_output, {"head": "second", "head_init": "zeros"}, r"'second' shares 'first.weight'"),
        (NormedMlp, {"head": "linear", "head_init": "zeros", "adapt": "first.*"}, r"'linear' has no adapted parameter"),
        (OwnHead, {"head": "", "head_init": "random"}, r"OwnHead, which owns 'scale', has no reset_parameters"),
        (deep_head, {"head": "1", "head_init": "zeros"}, r"several layers, with 1.0.weight, 1.0.bias, 1.2.weight"),
        (NormedMlp, {"head": "linear", "head_init": "zeros", "adapt": "*.weight"}, r"bias of the head is not adapted"),
        (spectral_head, {"head": "linear", "head_init": "zeros"}, r"computes a weight from its parameters"),
        (spectral_head, {"head": "linear", "head_init": "random"}, r"computes a weight from its parameters"),
        (normed_head, {"head": "linear", "head_init": "zeros"}, r"original0', computes a weight"),
        (NormedMlp, {"head_init": "ones"}, r"head_init: expected .*'stored', 'shared' or 'prototypes'"),
    ],
)
def test_a_head_that_cannot_start_anew_is_refused_by_name(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        MAMLPlusPlus(seeded(model), **grouped(**options))


def test_a_head_found_at_the_first_task_is_checked_then_and_nothing_changes() -> None:
    learner = learner_of(model=seeded(tied_output), head_init="zeros")
    before = copy.deepcopy(learner.state_dict())
    with pytest.raises(ArgumentError, match="shares"):
        learner.meta_step(class_tasks((4,), ways=3))
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items() if "extra" not in name)


def test_task_ids_travel_with_their_tasks() -> None:
    batch = TaskBatch(tuple(TASKS)).to(torch.float64)
    assert [task.id for task in batch] == ["a", "b"]
    assert type(Task(*TASKS[0].parts(), id=np.int64(3)).id) is int
    with pytest.raises(TaskError, match="id"):
        Task(*TASKS[0].parts(), id=1.5)
