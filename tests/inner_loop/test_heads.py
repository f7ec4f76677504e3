"""Where the head starts in each task, and outputs that a task does not use."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine_cases import ALL_ENGINES, ENGINES
from face import as_tasks, assert_same_values, build, gradients_of, in_dtype, last_only, rates_of, statistics_of
from keywords import grouped
from models import NormedMlp, class_tasks, seeded
from oracle import assert_same_gradients, meta_gradient
from torch import Tensor, nn

from metawrap import ArgumentError, MAMLPlusPlus, MetaWrapError, Task, TaskBatch, TaskError

BATCH = class_tasks((4,), tasks=2, shots=2)
TASKS = [Task(*parts, id=name) for parts, name in zip(as_tasks(BATCH), ("a", "b"), strict=True)]
HEAD = ("linear.weight", "linear.bias")


def learner_of(engine: str = "functional", model: nn.Module | None = None, **options: Any) -> Any:
    options = {"inner_steps": 2, "multi_step_loss": False, "per_step_norm_affine": False} | options
    return build(seeded(NormedMlp) if model is None else model, engine=engine, **options)


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


# --- the start of the head --------------------------------------------------------------------------------------------


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
        (NormedMlp, {"head_init": "ones"}, r"head_init: expected 'learned', 'zeros', 'random' or 'stored'"),
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


# --- outputs that a task does not use ---------------------------------------------------------------------------------

USED = (0, 2, 5)


def wide() -> nn.Module:
    return seeded(lambda: NormedMlp(ways=7))


def relabelled(tasks: list[Task]) -> list[Task]:
    classes = torch.tensor(USED)
    return [Task(t.support_x, classes[t.support_y], t.target_x, classes[t.target_y]) for t in tasks]


def narrow(model: Any) -> nn.Module:
    """The same network with nothing but the used outputs."""
    small = copy.deepcopy(model)
    small.linear = nn.Linear(6, 3).double()
    with torch.no_grad():
        small.linear.weight.copy_(model.linear.weight[list(USED)])
        small.linear.bias.copy_(model.linear.bias[list(USED)])
    return small


@pytest.mark.parametrize("engine", ENGINES)
def test_masked_outputs_train_as_a_network_without_them(engine: str) -> None:
    learner = learner_of(engine, wide(), mask_unused_outputs=True)
    small = narrow(learner.unwrap())
    values = dict(learner.model.named_parameters()) | {name: dict(small.named_parameters())[name] for name in HEAD}
    expected = meta_gradient(small, as_tasks(BATCH), rates=rates_of(learner), step_weights=last_only(2), values=values)
    metrics = learner.meta_step(relabelled(TASKS))
    assert metrics.loss == pytest.approx(float(expected.loss), rel=1e-12)
    found = gradients_of(learner)
    for name in HEAD:
        gradient = found[name]
        assert not gradient[[1, 3, 4, 6]].any()
        found[name] = gradient[list(USED)]
    assert_same_gradients(found, expected.gradients)


def test_masking_at_test_alone_is_asked_of_evaluate_and_adapt() -> None:
    learner = learner_of(model=wide())
    tasks = relabelled(TASKS)
    plain = learner.evaluate(tasks, keep_predictions=True)
    masked = learner.evaluate(tasks, mask_unused_outputs=True, keep_predictions=True)
    assert masked.loss < plain.loss
    assert all(set(p.argmax(1).tolist()) <= set(USED) for p in masked.predictions)
    assert all(bool(p[:, [1, 3, 4, 6]].isinf().all()) for p in masked.predictions)
    adapted = learner.adapt(tasks[0].support_x, tasks[0].support_y, mask_unused_outputs=True)
    outputs = adapted(tasks[0].target_x).detach()[:, list(USED)]
    torch.testing.assert_close(outputs, masked.predictions[0][:, list(USED)])
    assert learner.evaluate(tasks).loss == plain.loss


def test_masked_maps_of_pixels() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 6, 1)))
    learner = learner_of(model=model, mask_unused_outputs=True)
    generator = torch.Generator().manual_seed(0)
    labels = 2 * torch.randint(0, 2, (2, 4, 4), generator=generator)
    labels[0, 0] = -100  # ignored pixels are no class
    x = torch.randn(2, 1, 4, 4, generator=generator, dtype=torch.float64)
    result = learner.evaluate([Task(x, labels, x, labels)], keep_predictions=True)
    assert set(result.predictions[0].argmax(1).unique().tolist()) <= {0, 2}
    logits = learner.adapt(x, labels)(x)
    expected = F.cross_entropy(logits[:, [0, 2]], torch.where(labels > 0, labels // 2, labels)).detach()
    assert result.loss == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: Task(t.support_x, t.support_y.double(), t.target_x, t.target_y.double()), "regression"),
        (lambda t: Task(t.support_x, t.support_y, t.target_x, t.target_y + 1), r"classes \[3\]"),
        (lambda t: Task(t.support_x, t.support_y + 5, t.target_x, t.target_y + 5), r"labels 5\.\.7"),
    ],
)
def test_labels_that_cannot_be_masked_are_refused(change: Any, message: str) -> None:
    learner = learner_of(model=wide(), mask_unused_outputs=True)
    with pytest.raises(TaskError, match=message):
        learner.meta_step([change(TASKS[0])])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_any_whole_dtype_are_masked(dtype: torch.dtype) -> None:
    learner = learner_of(model=wide(), mask_unused_outputs=True, loss_fn=lambda p, y: F.cross_entropy(p, y.long()))
    tasks = relabelled(TASKS)
    expected = learner.evaluate(tasks).loss
    small = [Task(t.support_x, t.support_y.to(dtype), t.target_x, t.target_y.to(dtype)) for t in tasks]
    assert learner.evaluate(small).loss == expected


def test_the_losss_own_ignored_label_is_no_class() -> None:
    learner = learner_of(model=wide(), mask_unused_outputs=True, loss_fn=nn.CrossEntropyLoss(ignore_index=255))
    tasks = relabelled(TASKS)
    labels = tasks[0].support_y.clone()
    labels[0] = 255
    targets = tasks[0].target_y.clone()
    targets[:2] = 255
    result = learner.evaluate([Task(tasks[0].support_x, labels, tasks[0].target_x, targets)], keep_predictions=True)
    right = result.predictions[0].argmax(1)[2:] == targets[2:]
    assert result.accuracy == pytest.approx(float(right.double().mean()))


def test_label_smoothing_under_a_mask_is_refused_not_infinite() -> None:
    learner = learner_of(model=wide(), mask_unused_outputs=True, loss_fn=nn.CrossEntropyLoss(label_smoothing=0.1))
    with pytest.raises(TaskError, match="label smoothing"):
        learner.meta_step(relabelled(TASKS))
    assert learner.iteration == 0


def test_classes_on_another_axis_are_not_masked_in_silence() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6)))
    loss = lambda prediction, y: F.cross_entropy(prediction.transpose(1, 2), y)
    x, y = torch.randn(4, 3, 4, dtype=torch.float64), torch.randint(0, 3, (4, 3))
    with pytest.raises(TaskError, match=r"\(examples, classes, ...\)"):
        learner_of(model=model, loss_fn=loss, mask_unused_outputs=True).meta_step([Task(x, y, x, y)])


def test_task_ids_travel_with_their_tasks() -> None:
    batch = TaskBatch(tuple(TASKS)).to(torch.float64)
    assert [task.id for task in batch] == ["a", "b"]
    assert type(Task(*TASKS[0].parts(), id=np.int64(3)).id) is int
    with pytest.raises(TaskError, match="id"):
        Task(*TASKS[0].parts(), id=1.5)
