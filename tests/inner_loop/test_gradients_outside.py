"""Gradients of what is not the learner's: networks in front of it, labels, tensors that a loss reads from a closure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from differences import AT_MOST, difference_error
from engine_cases import ALL_ENGINES
from face import as_tasks, build, gradients_of, unchanged
from models import class_tasks, seeded
from oracle import assert_same_gradients
from torch import Tensor, nn

from metawrap import MetaWrapWarning, Reptile, Task, TaskError
from metawrap.execution import cuda_graphs

TASKS = as_tasks(class_tasks((4,), targets=2))


class Scaled(nn.Module):
    """tanh between two layers; its hidden values can be scaled by a second input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        return self.last(scale * torch.tanh(self.first(x)))


class Front(nn.Module):
    """What may stand in front of a learner."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.scale, self.labels = nn.Linear(4, 4), nn.Linear(4, 6), nn.Linear(4, 3)
        self.warmth = nn.Parameter(torch.tensor(1.3))


Parts = tuple[Tensor, Tensor, Tensor, Tensor]
PLACES: dict[str, Callable[[Front, Any, Parts], Task]] = {
    "support": lambda front, _, t: Task(front.encoder(t[0]), *t[1:]),
    "target": lambda front, _, t: Task(t[0], t[1], front.encoder(t[2]), t[3]),
    "one tensor as both": lambda front, _, t: Task(*2 * (front.encoder(t[2]), t[3])),
    "one of two inputs": lambda front, _, t: Task((t[0], front.scale(t[0])), t[1], {"x": t[2], "scale": 2.0}, t[3]),
    "soft labels": lambda front, _, t: Task(t[0], front.labels(t[0]).softmax(1), t[2], front.labels(t[2]).softmax(1)),
    "the learner's own layer": lambda front, own, t: Task(own.model.first(front.encoder(t[0]))[:, :4].tanh(), *t[1:]),
    "closure": lambda front, _, t: Task(*t),
    "closure with a graph": lambda front, _, t: Task(*t),
}
CASES = [(place, "functional") for place in PLACES]
CASES += [(place, engine) for engine in ALL_ENGINES[1:] for place in ("support", "soft labels", "closure")]


@pytest.mark.sampled(7)
@pytest.mark.parametrize(("place", "engine"), CASES)
def test_flat_memory_has_the_gradient_of_finite_differences(place: str, engine: str) -> None:
    found = []
    for memory in ("unrolled", "flat"):
        front = seeded(Front)
        warmth = torch.tanh(front.warmth) if place == "closure with a graph" else front.warmth
        loss_fn = lambda prediction, y, w=warmth: F.cross_entropy(
            w * prediction if "closure" in place else prediction, y
        )
        learner = build(seeded(Scaled), engine=engine, memory=memory, loss_fn=loss_fn, inner_steps=3, inner_lr=0.3)
        learned = {f"front.{name}": p for name, p in front.named_parameters()}
        learned |= {name: p for name, p in learner.named_parameters() if p.requires_grad}
        learner([PLACES[place](front, learner, task) for task in TASKS]).loss.backward()
        found.append({name: None if p.grad is None else p.grad.clone() for name, p in learned.items()})
    assert any(g is not None and bool(g.abs().max() > 0) for name, g in found[1].items() if name.startswith("front."))
    assert {name for name, g in found[1].items() if g is None} == {name for name, g in found[0].items() if g is None}
    assert_same_gradients(found[1], found[0])

    @torch.no_grad()
    def loss(values: dict[str, Tensor]) -> float:
        for name, parameter in learned.items():
            parameter.copy_(values[name])
        warmth.copy_(torch.tanh(front.warmth) if place == "closure with a graph" else front.warmth)
        return float(learner([PLACES[place](front, learner, task) for task in TASKS]).loss)

    values = {name: p.detach().clone() for name, p in learned.items()}
    assert difference_error(loss, values, found[1]) <= AT_MOST


@pytest.mark.parametrize("way", [{}, {"memory": "flat"}, {"engine": "higher"}, {"engine": "batched"}, {"workers": 2}])
def test_meta_step_has_the_gradient_of_a_loss_that_reads_the_initial_weights(way: dict[str, Any]) -> None:
    weights: list[Tensor] = []
    penalised = lambda prediction, y: F.cross_entropy(prediction, y) + 0.1 * sum(w.square().sum() for w in weights)
    learner = build(seeded(Scaled), inner_steps=2, inner_lr=0.3, loss_fn=penalised, **{"engine": "functional", **way})
    weights += learner.model.parameters()
    values = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    learner.meta_step(TASKS)
    gradients = {name: p.grad.clone() for name, p in learner.model.named_parameters()}
    learner.load_state_dict(build(seeded(Scaled), inner_steps=2, inner_lr=0.3, engine="functional").state_dict())

    @torch.no_grad()
    def loss(moved: dict[str, Tensor]) -> float:
        for name, parameter in learner.model.named_parameters():
            parameter.copy_(moved[name])
        return float(learner(TASKS).loss)

    assert difference_error(loss, values, gradients) <= AT_MOST


def test_flat_memory_follows_a_graph_over_a_parameter_that_is_not_adapted() -> None:
    found = []
    for memory in ("unrolled", "flat"):
        extra: list[Tensor] = []
        loss_fn = lambda prediction, y, extra=extra: F.cross_entropy(prediction, y) + sum(extra)
        learner = build(seeded(Scaled), engine="functional", memory=memory, adapt="last.*", loss_fn=loss_fn)
        learner(TASKS)
        extra.append(0.1 * learner.model.first.weight.square().sum())
        learner(TASKS).loss.backward()
        found.append(gradients_of(learner))
    assert_same_gradients(found[1], found[0])


WAYS: list[dict[str, Any]] = [
    {},
    {"memory": "flat"},
    {"engine": "batched"},
    {"workers": 2},
    {"workers": 2, "workers_in": "processes"},
    {"cuda_graphs": True},
]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())) or "plain")
def test_meta_step_says_that_it_does_not_follow_graphs(way: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cuda_graphs.RECORDERS, "cpu", lambda run: (run, run()))
    options = {"engine": "functional", "multi_step_loss": False, **way}
    plain, learner = (build(seeded(Scaled), **options) for _ in range(2))
    front = seeded(Front)
    tasks = [PLACES["support"](front, None, task) for task in TASKS]
    with pytest.warns(MetaWrapWarning, match=r"support_x was computed with a graph.*detach.*backward"):
        learner.meta_step(tasks)
    plain.meta_step([task.map(Tensor.detach) for task in tasks])
    assert_same_gradients(gradients_of(learner), gradients_of(plain), 1e-12)
    assert front.encoder.weight.grad is None
    # A leaf, which a model may differentiate itself: no graph, no warning.
    learner.meta_step([task.map(lambda t: t.detach().requires_grad_(t.requires_grad)) for task in tasks])


def test_meta_step_refuses_inputs_of_the_learners_own_parameters() -> None:
    learner = build(seeded(Scaled))
    tasks = [PLACES["the learner's own layer"](seeded(Front), learner, task) for task in TASKS]
    with unchanged(learner), pytest.raises(TaskError, match=r"support_x.*'model\.first\..*detach"):
        learner.meta_step(tasks)
    learner.meta_step([task.map(Tensor.detach) for task in tasks])


def test_reptile_refuses_graphs_where_it_is_asked_for_a_gradient() -> None:
    learner, front = Reptile(seeded(Scaled)), seeded(Front)
    tasks = [PLACES["target"](front, learner, task) for task in TASKS]
    with pytest.raises(TaskError, match=r"target_x.*Reptile.*detach"):
        learner(tasks)
    learner([task.map(Tensor.detach) for task in tasks]).loss.backward()
