"""engine="batched" on tasks of unequal sizes: padded where that is exact, else grouped; equal to the oracle."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from batched_learners import batched, weights_of
from face import (
    as_tasks,
    assert_equals_reference,
    assert_same_state,
    assert_same_values,
    assert_step_equals_oracle,
    gradients_of,
    reference_for,
    spied,
)
from models import Conv4, NormedMlp, class_tasks, seeded
from test_batched import IMAGE, Dropping, Net, _Reads, image_net
from torch import Tensor, nn

from metawrap import MAML, Reptile, Task
from metawrap.engines import BatchedEngine
from metawrap.engines.batched import Padded

SIZES = {"support": [(2, 1), (3, 1), (4, 1)], "target": [(1, 2), (1, 3), (1, 2)], "both": [(2, 3), (3, 2), (2, 2)]}


def tasks_of(shape: tuple[int, ...], sizes: str = "both", **options: Any) -> list[Any]:
    """Tasks with so many rows per class in support and target sets."""
    return [
        as_tasks(class_tasks(shape, tasks=1, shots=s, targets=t, seed=seed, **options))[0]
        for seed, (s, t) in enumerate(SIZES[sizes])
    ]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """How many tasks each call of the batched engine runs, and whether they are padded."""

    def note(engine: Any, weights: Any, inputs: Any, *_: Any) -> tuple[int, bool]:
        padded = isinstance(inputs, Padded)
        return len(inputs.values if padded else inputs), padded

    return spied(monkeypatch, BatchedEngine, "call", note)


def assert_padded(learner: Any, model: nn.Module, tasks: list[Any], at_once: list[Any], **options: Any) -> None:
    learner.checks.prepare(learner, Task(*tasks[0]))
    assert "padded: a trial had the same gradient" in learner.describe().speed
    at_once.clear()
    assert_step_equals_oracle(learner, model, tasks, weights_of(learner), **options)
    assert {number for number, _ in at_once} == {len(tasks)}
    assert any(padded for _, padded in at_once)


def assert_grouped(learner: Any, model: nn.Module, tasks: list[Any], at_once: list[Any], **options: Any) -> str:
    """Returns the reason why."""
    learner.checks.prepare(learner, Task(*tasks[0]))
    at_once.clear()
    assert_step_equals_oracle(learner, model, tasks, weights_of(learner), **options)
    assert not any(padded for _, padded in at_once)
    return learner.describe().speed


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (partial(nn.Linear, 4, 3), (4,)),
    "Conv4": (partial(Conv4, filters=3), (1, 16, 16)),
    "BatchNorm1d": (NormedMlp, (4,)),
    "BatchNorm2d without affine": (image_net(partial(nn.BatchNorm2d, 4, affine=False), nn.Tanh), IMAGE),
    "BatchNorm2d without statistics": (image_net(partial(nn.BatchNorm2d, 4, track_running_stats=False)), IMAGE),
    "InstanceNorm": (image_net(partial(nn.InstanceNorm2d, 4, affine=True), nn.Tanh), IMAGE),
    "LayerNorm": (image_net(partial(nn.LayerNorm, (4, 6, 6)), nn.Tanh), IMAGE),
    "GroupNorm": (image_net(partial(nn.GroupNorm, 2, 4), nn.Tanh), IMAGE),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", NETS)
def test_padded_tasks_equal_the_oracle(name: str, at_once: list[Any]) -> None:
    make, shape = NETS[name]
    assert_padded(batched(seeded(make)), seeded(make), tasks_of(shape), at_once)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("memory", ["unrolled", "flat"])
@pytest.mark.parametrize("second_order", [True, False], ids=["second order", "first order"])
@pytest.mark.parametrize("norm", ["batch", "running", "support", "task", "task_layer"])
def test_every_norm_policy_order_and_memory_equals_the_oracle(
    norm: str, second_order: bool, memory: str, at_once: list[Any]
) -> None:
    make = image_net(partial(nn.BatchNorm2d, 4), partial(nn.LeakyReLU, 0.01), partial(nn.MaxPool2d, 2), width=4 * 9)
    learner = batched(
        seeded(make), norm=norm, memory=memory, inner_steps=3, first_order_epochs=0 if second_order else 99
    )
    tasks = tasks_of(IMAGE)
    assert_padded(learner, seeded(make), tasks, at_once, norm=norm, second_order=second_order)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("norm", ["batch", "running", "support", "task"])
def test_unequal_support_sets_target_sets_and_both(norm: str, sizes: str, at_once: list[Any]) -> None:
    tasks = tasks_of((4,), sizes)
    assert_padded(batched(seeded(NormedMlp), norm=norm), seeded(NormedMlp), tasks, at_once, norm=norm)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("norm", ["batch", "running", "task"])
@pytest.mark.parametrize("multi_step", [True, False])
def test_losses_predictions_and_state_are_those_of_tasks_one_by_one(norm: str, multi_step: bool) -> None:
    make = image_net(partial(nn.BatchNorm2d, 4), partial(nn.MaxPool2d, 2), width=4 * 9)
    tasks, found = [Task(*task) for task in tasks_of(IMAGE)], {}
    for engine in ("batched", "functional"):
        steps_that_count = {} if multi_step else {"multi_step_loss": False, "msl_epochs": None}
        learner = batched(seeded(make), norm=norm, engine=engine, **steps_that_count)
        output = learner(tasks)
        metrics = [learner.meta_step(tasks) for _ in range(2)]
        steps = [each.step_losses for each in (output, *metrics)]
        accuracies = [float(output.accuracy), *(each.accuracy for each in metrics)]
        found[engine] = (steps, output.predictions, accuracies, dict(learner.model.named_buffers()))
    (steps, predictions, accuracies, buffers), (own_steps, own, expected, own_buffers) = found.values()
    torch.testing.assert_close(steps, own_steps, rtol=1e-9, atol=0, equal_nan=True)
    assert_same_values(predictions, own)
    assert [len(each) for each in predictions] == [len(task.target_y) for task in tasks]
    assert accuracies == expected
    torch.testing.assert_close(buffers, own_buffers, rtol=1e-9, atol=1e-11)


WEIGHT = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
CLASS_LOSSES = {
    "sum": partial(F.cross_entropy, reduction="sum"),
    "weights and smoothing": nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1),
    "an ignored label of the tasks": partial(F.cross_entropy, ignore_index=1),
}


@pytest.mark.parametrize("name", CLASS_LOSSES)
def test_losses_on_classes_leave_padded_rows_out(name: str, at_once: list[Any]) -> None:
    loss_fn = CLASS_LOSSES[name]
    learner = batched(seeded(NormedMlp), loss_fn=loss_fn)
    assert_padded(learner, seeded(NormedMlp), tasks_of((4,)), at_once, loss_fn=loss_fn)


def numbers(tasks: list[Any]) -> list[Any]:
    """The tasks with three numbers between 0 and 1 as each label."""
    return [(sx, sx[:, :3].sigmoid(), tx, tx[:, :3].sigmoid()) for sx, _, tx, _ in tasks]


@pytest.mark.parametrize(
    "loss_fn",
    [
        F.mse_loss,
        nn.MSELoss(reduction="sum"),
        partial(F.huber_loss, delta=0.3),
        nn.BCEWithLogitsLoss(pos_weight=WEIGHT),
    ],
    ids=["mse", "sum of squares", "huber", "binary cross-entropy"],
)
def test_losses_on_numbers_leave_padded_rows_out(loss_fn: Any, at_once: list[Any]) -> None:
    learner = batched(seeded(NormedMlp), loss_fn=loss_fn)
    assert_padded(learner, seeded(NormedMlp), numbers(tasks_of((4,))), at_once, loss_fn=loss_fn)


def test_the_gradient_of_the_tasks_own_tensors_is_that_of_one_by_one() -> None:
    found = {}
    for engine in ("batched", "functional"):
        tasks = [Task(*(p.clone().requires_grad_(p.is_floating_point()) for p in task)) for task in tasks_of((4,))]
        batched(seeded(NormedMlp), engine=engine)(tasks).loss.backward()
        found[engine] = [x.grad for task in tasks for x in (task.support_x, task.target_x)]
    torch.testing.assert_close(found["batched"], found["functional"], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("head_init", ["prototypes", "shared", "zeros"])
def test_heads_with_a_start_of_their_own_are_those_of_one_by_one(head_init: str) -> None:
    tasks, found = [Task(*task) for task in tasks_of((4,))], {}
    for engine in ("batched", "functional"):
        learner = batched(seeded(NormedMlp), head_init=head_init, head="linear", engine=engine)
        losses = learner.meta_step(tasks).step_losses
        found[engine] = losses, gradients_of(learner)
        assert engine == "functional" or "padded: a trial" in learner.describe().speed
    torch.testing.assert_close(found["batched"], found["functional"], rtol=1e-9, atol=1e-11)


def test_tasks_of_far_sizes_and_of_one_row_stay_apart(at_once: list[Any]) -> None:
    rows = [(2, 2), (3, 2), (5, 2), (9, 2), (1, 1), (1, 2)]
    whole = as_tasks(class_tasks((4,), tasks=6, shots=3, targets=1))
    tasks = [(sx[:s], sy[:s], tx[:t], ty[:t]) for (s, t), (sx, sy, tx, ty) in zip(rows, whole, strict=True)]
    learner = batched(nn.Linear(4, 3).double())
    learner([Task(*whole[0])])
    at_once.clear()
    assert_step_equals_oracle(learner, nn.Linear(4, 3).double(), tasks, weights_of(learner))
    assert {number for number, _ in at_once} == {2}  # (2, 3) and (5, 9); those of one row are solved alone.


def test_a_set_of_one_row_is_refused_by_a_batch_norm_as_it_is_alone() -> None:
    sx, sy, tx, ty = tasks_of((4,))[0]
    learner = batched(seeded(NormedMlp))
    learner([Task(sx, sy, tx, ty)])
    with pytest.raises(Exception, match="one value per channel has no variance"):
        learner([Task(sx, sy, tx, ty), Task(sx, sy, tx[:2], ty[:2]), Task(sx, sy, tx[:1], ty[:1])])


def test_nothing_is_read_from_the_device_for_padding() -> None:
    tasks = [Task(*task) for task in tasks_of((1, 16, 16))]
    learner = batched(seeded(partial(Conv4, filters=3)))
    learner(tasks)
    with _Reads() as reads:
        learner(tasks).loss.backward()
    assert reads.found == []


# --- what is not padded ----------------------------------------------------------------------------------------------


def test_a_loss_of_ones_own_is_grouped(at_once: list[Any]) -> None:
    def loss_fn(prediction: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(prediction, y) * len(y)

    learner = batched(seeded(NormedMlp), loss_fn=loss_fn)
    reason = assert_grouped(learner, seeded(NormedMlp), tasks_of((4,)), at_once, loss_fn=loss_fn)
    assert "not padded: inputs or labels are not one tensor each, or loss_fn is no loss of torch" in reason


@pytest.mark.parametrize(
    "loss_fn", [partial(F.cross_entropy, weight=None), nn.MultiLabelSoftMarginLoss()], ids=["probabilities", "margins"]
)
def test_labels_and_losses_that_cannot_leave_rows_out_are_grouped(loss_fn: Any, at_once: list[Any]) -> None:
    tasks = [(sx, F.one_hot(sy).double(), tx, F.one_hot(ty).double()) for sx, sy, tx, ty in tasks_of((4,))]
    learner = batched(seeded(NormedMlp), loss_fn=loss_fn)
    assert_grouped(learner, seeded(NormedMlp), tasks, at_once, loss_fn=loss_fn)


def test_other_labels_than_the_first_tasks_are_grouped(at_once: list[Any]) -> None:
    tasks = tasks_of((4,))
    learner = batched(seeded(NormedMlp))
    learner([Task(*task) for task in tasks])
    assert any(padded for _, padded in at_once)
    at_once.clear()
    soft = [(sx, F.one_hot(sy).double(), tx, F.one_hot(ty).double()) for sx, sy, tx, ty in tasks]
    assert_step_equals_oracle(learner, seeded(NormedMlp), soft, weights_of(learner))
    assert not any(padded for _, padded in at_once)


def test_a_first_task_with_a_set_of_one_row_shows_nothing(at_once: list[Any]) -> None:
    tasks = tasks_of((4,))
    tasks[0] = (*tasks[0][:2], tasks[0][2][:1], tasks[0][3][:1])
    make = partial(nn.Linear, 4, 3)
    assert "a set of one row" in assert_grouped(batched(seeded(make)), seeded(make), tasks, at_once)


class Acting(nn.Module):
    """Rows act on each other by `mix`."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.linear, self.mix = nn.Linear(4, 6), nn.Linear(6, 3), mix

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.mix(torch.tanh(self.first(x))))


class Sidelong(nn.Module):
    """A batch norm over another axis than the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.linear = nn.Linear(4, 6), nn.BatchNorm1d(2), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).view(-1, 3, 2)
        return self.linear(self.norm(h.transpose(0, 1).reshape(-1, 2)).view(3, -1, 2).transpose(0, 1).flatten(1))


ACTING: dict[str, Callable[[], nn.Module]] = {
    "mean of the rows": lambda: Acting(lambda h: h - h.mean(0)),
    "number of rows": lambda: Acting(lambda h: h / len(h)),
    "softmax over rows": lambda: Acting(lambda h: h.softmax(0)),
    "attention between rows": lambda: Acting(lambda h: (h @ h.T).softmax(1) @ h),
    "the row before": lambda: Acting(lambda h: h + h.roll(1, 0)),
    "batch norm of another axis": Sidelong,
}


@pytest.mark.parametrize("name", ACTING)
def test_models_whose_rows_act_on_each_other_are_grouped(name: str, at_once: list[Any]) -> None:
    make = ACTING[name]
    assert "of one shape at once in meta_step and forward, unequal ones not padded: " in assert_grouped(
        batched(seeded(make)), seeded(make), tasks_of((4,)), at_once
    )


class Named(NormedMlp):
    def forward(self, x: Tensor) -> Any:
        return {"logits": super().forward(x), "penalty": x.square().mean()}


def test_an_output_of_several_tensors_is_grouped(at_once: list[Any]) -> None:
    def loss_fn(output: Any, y: Tensor) -> Tensor:
        return F.cross_entropy(output["logits"], y)

    tasks = tasks_of((4,))
    learner = batched(seeded(Named))
    learner([Task(*task) for task in tasks[:1]])
    at_once.clear()
    reference = reference_for(seeded(Named), learner, tasks, weights_of(learner), loss_fn=loss_fn)
    assert_equals_reference(learner, learner.meta_step([Task(*task) for task in tasks]).loss, reference)
    assert not any(padded for _, padded in at_once)


def test_reptile_whose_steps_draw_rows_is_grouped() -> None:
    tasks, found = [Task(*task) for task in tasks_of((4,))], {}
    for engine in ("batched", "functional"):
        learner = Reptile(seeded(NormedMlp), inner_steps=2, engine=engine)
        learner.meta_step(tasks)
        found[engine] = gradients_of(learner)
        assert engine == "functional" or "draws rows of its own" in learner.describe().speed
    torch.testing.assert_close(found["batched"], found["functional"], rtol=1e-9, atol=1e-11)


def test_dropout_draws_for_each_task_and_the_trial_leaves_generators_alone() -> None:
    task = Task(*tasks_of((4,))[0])
    shorter = Task(task.support_x[:5], task.support_y[:5], task.target_x, task.target_y)
    learner = batched(seeded(Dropping))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    learner.checks.prepare(learner, task)
    assert torch.equal(torch.get_rng_state(), before)
    first, second = learner([task, shorter]).predictions
    assert "padded: a trial" in learner.describe().speed
    assert float((first - second).abs().max()) > 1e-3


def test_the_trial_leaves_the_model_alone() -> None:
    learner = batched(Net(nn.Flatten(), nn.Linear(4, 5), nn.BatchNorm1d(5), width=5).double())
    before = {name: value.clone() for name, value in learner.state_dict().items() if isinstance(value, Tensor)}
    learner.checks.prepare(learner, Task(*tasks_of((4,))[0]))
    assert learner.checks.not_padded is None
    assert_same_state({name: learner.state_dict()[name] for name in before}, before)


def test_describe_says_nothing_of_padding_before_a_task_was_seen() -> None:
    assert "not padded: no task was tried yet" in MAML(nn.Linear(4, 3), engine="batched").describe().speed
