"""Heads that start from one vector for all classes, or from the prototypes; the order of the labels does not matter."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from differences import assert_every_entry_is_a_difference
from engine_cases import ALL_ENGINES
from face import gradients_of, rates_of
from head_cases import HEAD, TASKS, learner_of
from keywords import grouped
from models import NormedMlp, class_tasks, seeded
from oracle import assert_same_gradients
from torch import Tensor, nn

from metawrap import MAML, ArgumentError, MetaWrapError, Reptile, Task, TaskError, UnsupportedModuleError

Values = dict[str, Tensor]
BODY = ("first.weight", "first.bias", "norm.weight", "norm.bias")


def forward(values: Values, x: Tensor, stored: Values | None = None) -> tuple[Tensor, Tensor]:
    """NormedMlp's embeddings and logits, by hand; normalised by the batch, or by stored statistics."""
    hidden = x @ values["first.weight"].T + values["first.bias"]
    mean, variance = hidden.mean(0), hidden.var(0, correction=0)
    if stored is not None:
        mean, variance = stored["norm.running_mean"], stored["norm.running_var"]
    normed = (hidden - mean) / (variance + 1e-5).sqrt() * values["norm.weight"] + values["norm.bias"]
    embedded = torch.tanh(normed)
    return embedded, embedded @ values["linear.weight"].T + values["linear.bias"]


def prototypes_of(embedded: Tensor, y: Tensor, ways: int = 3) -> Tensor:
    return torch.stack([torch.stack([e for e, label in zip(embedded, y, strict=True) if label == k]).mean(0)
                        for k in range(ways)])  # fmt: skip


def head_of(kind: str, learned: Values, embedded: Tensor, y: Tensor) -> Values:
    if kind == "prototypes":
        centres = prototypes_of(embedded, y)
        rows = [(2 * centre, -(centre * centre).sum()) for centre in centres]
    else:
        rows = [(sum(learned["linear.weight"]) / 3, sum(learned["linear.bias"]) / 3)] * 3
    return {"linear.weight": torch.stack([w for w, _ in rows]), "linear.bias": torch.stack([b for _, b in rows])}


def by_hand(learner: Any, kind: str, tasks: list[Task], second_order: bool = True) -> tuple[Tensor, Values]:
    """The mean target loss after the inner steps, and its gradient, with respect to the rates too."""
    start = {name: p.detach().clone().requires_grad_() for name, p in learner.model.named_parameters()}
    rates = {name: rate.clone().requires_grad_() for name, rate in rates_of(learner).items()}
    losses = []
    for task in tasks:
        embedded, _ = forward(start, task.support_x)
        fast = {name: p.clone() for name, p in start.items()} | head_of(kind, start, embedded, task.support_y)
        for step in range(2):
            loss = F.cross_entropy(forward(fast, task.support_x)[1], task.support_y)
            names = list(rates)
            found = torch.autograd.grad(loss, [fast[name] for name in names], create_graph=second_order)
            fast |= {name: fast[name] - rates[name][step] * g for name, g in zip(names, found, strict=True)}
        losses.append(F.cross_entropy(forward(fast, task.target_x)[1], task.target_y))
    total = torch.stack(losses).mean()
    leaves = start | {f"lr/{name}": rate for name, rate in rates.items()}
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return total.detach(), dict(zip(leaves, found, strict=True))


@pytest.mark.sampled(15)
@pytest.mark.parametrize("order", [0, math.inf])
@pytest.mark.parametrize("memory", ["unrolled", "flat"])
@pytest.mark.parametrize("engine", ALL_ENGINES)
@pytest.mark.parametrize("kind", ["prototypes", "shared"])
def test_the_meta_gradient_equals_that_of_a_loop_by_hand(kind: str, engine: str, memory: str, order: float) -> None:
    learner = learner_of(engine, head_init=kind, memory=memory, first_order_epochs=order)
    loss, expected = by_hand(learner, kind, TASKS, second_order=order == 0)
    assert learner.meta_step(TASKS).loss == pytest.approx(float(loss), rel=1e-12)
    found = gradients_of(learner)
    assert_same_gradients(found, expected)
    assert all((found[name] is None) == (kind == "prototypes") for name in HEAD), "the learned head"
    assert all(found[name] is not None for name in BODY)


@pytest.mark.parametrize("workers_in", ["threads", "processes"])
def test_workers_make_the_same_gradient(workers_in: str) -> None:
    learner = learner_of(head_init="prototypes", head="linear", workers=2, workers_in=workers_in)
    loss, expected = by_hand(learner, "prototypes", TASKS)
    assert learner.meta_step(TASKS).loss == pytest.approx(float(loss), rel=1e-12)
    assert_same_gradients(gradients_of(learner), expected)


def test_first_order_still_learns_through_the_prototypes() -> None:
    learner = learner_of(head_init="prototypes", head="linear", first_order_epochs=math.inf, inner_lr=1e-12)
    expected = by_hand(learner, "prototypes", TASKS)[1]
    learner.meta_step(TASKS)
    torch.testing.assert_close(gradients_of(learner)["first.weight"], expected["first.weight"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["prototypes", "shared"])
def test_the_meta_gradient_equals_finite_differences(kind: str) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 3)))
    learner = MAML(model, inner_steps=2, inner_lr=0.5, learn_inner_lr=True, **grouped(head_init=kind, head="2"))
    batch = class_tasks((2,), tasks=2, shots=2)
    assert_every_entry_is_a_difference(learner, batch)


def permuted(task: Task, order: Tensor) -> Task:
    return Task(task.support_x, order[task.support_y], task.target_x, order[task.target_y])


@pytest.mark.parametrize("kind", ["prototypes", "shared", "zeros", "learned"])
@pytest.mark.parametrize("engine", ["functional", "batched"])
def test_the_order_of_the_labels_does_not_matter(kind: str, engine: str) -> None:
    order, found = torch.tensor([2, 0, 1]), []
    for tasks in (TASKS, [permuted(task, order) for task in TASKS]):
        learner = learner_of(engine, head_init=kind)
        output = learner(tasks)
        output.loss.backward()
        found.append((torch.stack(output.predictions), gradients_of(learner)))
    (first, gradients), (second, others) = found
    same = torch.allclose(second[..., order], first, rtol=1e-9, atol=1e-12)
    assert same == (kind != "learned")
    if same:
        assert_same_gradients(others, gradients)


@pytest.mark.parametrize("norm", ["batch", "support"])
def test_before_the_first_step_a_prototype_head_classifies_as_protonet_does(norm: str) -> None:
    learner, task = learner_of(head_init="prototypes", norm=norm), TASKS[0]
    learner.meta_step(TASKS)
    values = {name: p.detach() for name, p in learner.model.named_parameters()}
    centres = prototypes_of(forward(values, task.support_x)[0], task.support_y)
    hidden, stored = task.support_x @ values["first.weight"].T + values["first.bias"], None
    if norm == "support":
        stored = {"norm.running_mean": hidden.mean(0), "norm.running_var": hidden.var(0, correction=0)}
    away = torch.cdist(forward(values, task.target_x, stored)[0], centres) ** 2
    [prediction] = learner.evaluate([task], steps=0, keep_predictions=True).predictions
    torch.testing.assert_close(prediction.softmax(1), (-away).softmax(1), rtol=1e-9, atol=1e-12)
    adapted = learner.adapt(task.support_x, task.support_y, steps=0)
    torch.testing.assert_close(adapted.linear.weight.detach(), 2 * centres, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(adapted(task.target_x).detach(), prediction, rtol=1e-9, atol=1e-12)
    stepped = learner.evaluate([task], keep_predictions=True).predictions[0]
    adapted = learner.adapt(task.support_x, task.support_y)
    torch.testing.assert_close(adapted(task.target_x).detach(), stepped, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("engine", ALL_ENGINES)
def test_the_pass_for_the_prototypes_is_in_no_statistics(engine: str) -> None:
    learner = learner_of(engine, head_init="prototypes")
    learner.meta_step(TASKS)
    assert learner.model.norm.num_batches_tracked.tolist() == [2, 4], "no target pass after the first step"


def test_unwrap_and_adapt_start_the_shared_head_alike() -> None:
    learner = learner_of(head_init="shared")
    with pytest.raises(MetaWrapError, match=r"not known before the first task.*head="):
        learner.unwrap()
    learner.meta_step(TASKS)
    head, learned = learner.unwrap().linear, learner.model.linear
    torch.testing.assert_close(head.weight, learned.weight.mean(0).expand(3, 6))
    assert torch.equal(learner.adapt(*TASKS[0].parts()[:2], steps=0).linear.weight, head.weight)
    assert not torch.equal(learned.weight[0], learned.weight[1]), "the learned rows are left alone"


class Map(nn.Module):
    """A prediction for each place: a 1x1 convolution is the head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


@pytest.mark.parametrize("engine", ["functional", "batched"])
def test_a_convolution_of_single_places_starts_from_the_prototypes_of_places(engine: str) -> None:
    x, y = torch.randn(2, 3, 1, 4, 4).double(), torch.arange(96).view(2, 3, 4, 4) % 2
    y[:, 0, 0, 0] = -100
    learner = MAML(seeded(Map), inner_steps=1, engine=engine, **grouped(head_init="prototypes"))
    learner.meta_step((x, y, x, y))
    embedded = torch.tanh(learner.model.body(x[0])).movedim(1, -1).reshape(-1, 4)
    centres = prototypes_of(embedded, y[0].flatten(), 2)
    adapted = learner.adapt(x[0], y[0], steps=0).head
    torch.testing.assert_close(adapted.weight, 2 * centres[:, :, None, None])
    torch.testing.assert_close(adapted.bias, -centres.square().sum(1))


def test_a_head_may_be_a_layer_behind_others_of_the_named_module() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 3))))
    learner, task = MAML(model, inner_steps=1, **grouped(head_init="prototypes", head="1")), TASKS[0]
    learner.meta_step(TASKS)
    centres = prototypes_of(torch.tanh(learner.model[0](task.support_x)), task.support_y)
    torch.testing.assert_close(learner.adapt(task.support_x, task.support_y, steps=0)[1][1].weight, 2 * centres)


def test_classes_that_a_task_lacks_start_at_zero_and_are_masked() -> None:
    few = class_tasks((4,), tasks=2, ways=2, shots=2)
    model = seeded(NormedMlp)
    wide = MAML(model, inner_steps=2, **grouped(head_init="prototypes", mask_unused_outputs=True))
    model.linear = nn.Linear(6, 2).double()
    narrow = MAML(model, inner_steps=2, **grouped(head_init="prototypes"))
    assert wide.meta_step(few).loss == pytest.approx(narrow.meta_step(few).loss, rel=1e-12)
    for name in BODY:
        torch.testing.assert_close(gradients_of(wide)[name], gradients_of(narrow)[name], rtol=1e-9, atol=1e-12)


REGRESSION = Task(TASKS[0].support_x, TASKS[0].support_y.double(), TASKS[0].target_x, TASKS[0].target_y.double())


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Task(*[part[0] for part in class_tasks((4,), ways=2)]), r"classes \[2\].*no prototype.*mask_unused_outputs"),
        (Task(*[part[0] for part in class_tasks((4,), ways=5)]), r"labels \[3, 4\].*3 outputs.*Relabel"),
        (REGRESSION, r"whole numbers as labels.*support_y.*\"learned\""),
    ],
)
def test_labels_without_prototypes_are_refused_and_nothing_changes(task: Task, message: str, known: bool) -> None:
    def square(prediction: Tensor, y: Tensor) -> Tensor:
        return (prediction.sum(1) - y).square().mean()

    learner = learner_of(head_init="prototypes", loss_fn=square, head="linear" if known else None)
    before = copy.deepcopy(learner.state_dict())
    with pytest.raises(TaskError, match=message):
        learner.meta_step([task])
    with pytest.raises(TaskError, match=message):
        learner.evaluate([task])
    with pytest.raises(TaskError, match=message):
        learner.adapt(task.support_x, task.support_y)
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items() if "extra" not in name)


class Pooled(Map):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean((2, 3))


class Twice(NormedMlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.linear(torch.tanh(self.first(x)))


def test_a_head_whose_input_is_no_embedding_of_one_example_is_refused() -> None:
    x, y = torch.randn(1, 6, 1, 4, 4).double(), torch.arange(6).view(1, 6) % 2
    learner = MAML(seeded(Pooled), inner_steps=1, **grouped(head_init="prototypes", head="head"))
    with pytest.raises(TaskError, match=r"one embedding for each label.*'head'.*head="):
        learner.meta_step((x, y, x, y))
    learner = MAML(seeded(Twice), inner_steps=1, **grouped(head_init="prototypes", head="linear"))
    with pytest.raises(UnsupportedModuleError, match=r"got 2 of them"):
        learner.meta_step(TASKS)


def without_bias() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3, bias=False))


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.normalize(x, dim=1))


@pytest.mark.parametrize(
    ("make", "head", "kind", "message"),
    [
        (without_bias, "1", "prototypes", r"with a bias, but got Linear.*bias=True"),
        (lambda: nn.Sequential(nn.Conv2d(1, 3, 2)), "0", "prototypes", r"1x1 convolution.*but got Conv2d"),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.Bilinear(3, 3, 3)), "1", "shared", r"but got Bilinear.*zeros"),
        (lambda: nn.Sequential(nn.Linear(4, 6), Scaled(6, 3)), "1", "prototypes", r"but got Scaled.*Name that layer"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)), "0", "shared", r"without groups"),
        (lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))), "0", "shared", r"several layers"),
    ],
)  # fmt: skip
def test_a_head_without_a_row_for_each_class_is_refused(
    make: Callable[[], nn.Module], head: str, kind: str, message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        MAML(seeded(make), **grouped(head=head, head_init=kind))


def test_reptile_moves_the_shared_vector_and_refuses_prototypes() -> None:
    with pytest.raises(ArgumentError, match=r"cannot be \"prototypes\" in Reptile"):
        Reptile(seeded(NormedMlp), outputs={"head_init": "prototypes"})
    learner = Reptile(seeded(NormedMlp), inner_steps=2, outputs={"head_init": "shared"}, head="linear")
    [adapted] = [learner.model.linear.weight.detach().clone()]
    learner.meta_step(TASKS[:1])
    moved = learner.model.linear.weight - adapted
    torch.testing.assert_close(moved, moved[:1].expand(3, 6))
    assert bool(moved.any())
