"""Each photo is left out once, and predicted by what the others taught; intervals by Wilson's formula."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from photos import network
from torch import Tensor, nn

import metawrap
from metawrap import MAML, R2D2, LogisticRegression, ProtoNet
from metawrap.classifier import choose_method
from metawrap.classifier.estimate import Estimate, embedded, left_out, temperature_of


class Nearest:
    """A learner by hand: a photo has the class of the support photo whose number is nearest; notes what it saw."""

    def __init__(self) -> None:
        self.out: list[float] = []
        self.kept: list[set[int]] = []

    def evaluate(self, tasks: list[Any], *, norm: str | None, keep_predictions: bool) -> Any:
        [task] = tasks
        assert not set(task.support_x.flatten().tolist()) & set(task.target_x.flatten().tolist())
        self.out += task.target_x.flatten().tolist()
        self.kept.append(set(task.support_y.tolist()))
        nearest = (task.target_x - task.support_x.T).abs().argmin(1)
        logits = torch.nn.functional.one_hot(task.support_y[nearest], 9).float()  # more outputs than classes
        return SimpleNamespace(predictions=[logits])


@pytest.mark.parametrize("counts", [(2, 2), (1, 5), (3, 1, 4), (25, 12)])
def test_each_photo_is_left_out_once_but_for_the_only_one_of_a_class(counts: tuple[int, ...]) -> None:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    inputs, learner = torch.arange(len(labels)).float()[:, None], Nearest()
    found = left_out(learner, inputs, labels, "abc")
    several = [place for place, label in enumerate(labels.tolist()) if counts[label] > 1]
    assert sorted(learner.out) == several
    assert all(kept == set(range(len(counts))) for kept in learner.kept)
    assert found is not None
    assert (found.examples, found.rounds) == (len(several), min(10, max(counts)))


def test_wrong_ones_are_counted_by_pairs() -> None:
    # By hand: 0 1 2 | 3 4 5: leaving out the photos 0, 3, then 1, 4, then 2, 5 of classes a, b.
    labels, inputs = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([[0.0], [1], [7], [8], [9], [20]])
    found = left_out(Nearest(), inputs, labels, ("a", "b"))
    # 0 -> 1 (a). 8 -> 7 (a), wrong. 1 -> 0 (a). 9 -> 8 (b). 7 -> 8 (b), wrong. 20 -> 9 (b).
    # Platt's targets are 7/8 and 1/8; over the logits (1, 0) they are (4 * 7/8 + 2 * 1/8) / 6 = 5/8 for the larger one.
    assert found is not None
    assert found == Estimate(4, 6, 3, (("b", "a", 1), ("a", "b", 1)), found.temperature)
    assert found.temperature == pytest.approx(1 / math.log(5 / 3), rel=0.02)
    assert "4 of 6 right, 66.7 %" in str(found)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_the_scale_of_logits_does_not_matter_and_all_right_is_no_certainty(scale: float) -> None:
    labels = torch.tensor([0, 1, 2] * 5)
    logits = scale * torch.nn.functional.one_hot(labels, 3).double()
    sure = (logits / temperature_of(logits, labels)).softmax(1)[torch.arange(15), labels]
    torch.testing.assert_close(sure, torch.full((15,), 16 / 17, dtype=torch.float64), atol=0.005, rtol=0)


def test_what_is_right_six_times_of_ten_has_such_a_probability() -> None:
    # 1,000 sure logits of three classes, 600 of them right: by far too sure as they are.
    guess = torch.arange(1_000) % 3
    logits = 20 * torch.nn.functional.one_hot(guess, 3).double()
    labels = torch.where(torch.arange(1_000) < 600, guess, (guess + 1 + torch.arange(1_000) % 2) % 3)
    sure = (logits / temperature_of(logits, labels)).softmax(1).amax(1)
    assert sure.mean() == pytest.approx(0.6, abs=0.01)


def test_logits_that_say_nothing_leave_the_temperature_at_one() -> None:
    labels = torch.tensor([0, 1, 2] * 5)
    logits = torch.nn.functional.one_hot(labels, 3).double()
    assert temperature_of(torch.zeros(15, 3), labels) == 1
    assert temperature_of(torch.full((15, 3), torch.nan), labels) == 1
    broken = torch.cat([logits, torch.full((2, 3), torch.nan)])
    assert temperature_of(broken, torch.cat([labels, labels[:2]])) == temperature_of(logits, labels)


def test_one_photo_of_each_class_gives_no_estimate() -> None:
    assert left_out(Nearest(), torch.zeros(3, 1), torch.arange(3), "abc") is None


@pytest.mark.parametrize(
    ("right", "examples", "interval"),  # R: binom::binom.wilson
    [
        (10, 10, (0.7224672, 1.0)),
        (0, 10, (0.0, 0.2775328)),
        (81, 263, (0.2552958, 0.3662173)),
        (33, 35, (0.8139, 0.9842)),
    ],
)
def test_interval(right: int, examples: int, interval: tuple[float, float]) -> None:
    assert Estimate(right, examples, 5, ()).interval == pytest.approx(interval, abs=1e-4)


@pytest.mark.parametrize(
    ("method", "norm"),
    [(MAML, "support"), (R2D2, "support"), *((method, "running") for method in (R2D2, ProtoNet, LogisticRegression))],
)
def test_an_estimate_equals_adapting_by_hand(method: Any, norm: str) -> None:
    torch.manual_seed(0)
    inputs, labels = torch.randn(9, 3, 8, 8), torch.arange(3).repeat(3)
    learner = method(network(), norm=norm).eval()
    right = 0
    for number in range(3):
        out = torch.zeros(9, dtype=torch.bool)
        out[[number * 3, number * 3 + 1, number * 3 + 2]] = True
        module = learner.adapt(inputs[~out], labels[~out])
        with torch.no_grad():
            found: Tensor = module(inputs[out])
        right += int((found.argmax(1) == labels[out]).sum())
    rows = embedded(learner, inputs, labels, norm)
    assert (rows is not None) == (norm == "running")
    for known in (None, rows):
        estimate = left_out(learner, inputs, labels, "abc", norm, known)
        assert estimate is not None
        assert (estimate.right, estimate.examples) == (right, 9)


class Centred(nn.Module):
    """A network that reads its whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x - x.mean(0))  # type: ignore[no-any-return]


def test_examples_that_act_on_each_other_are_not_embedded_once() -> None:
    inputs, labels = torch.randn(6, 4), torch.arange(3).repeat(2)
    assert embedded(ProtoNet(Centred()), inputs, labels) is None
    assert embedded(ProtoNet(nn.Sequential(nn.Flatten(), nn.Linear(4, 3))), inputs, labels) is not None


@pytest.mark.parametrize("another", [False, True])
def test_equal_networks_run_once_for_each_example_whatever_methods_are_tried(another: bool) -> None:
    inputs, labels = torch.randn(40, 3, 8, 8), torch.arange(2).repeat(20)
    seen: list[int] = []
    examples: Any = SimpleNamespace(prepared=inputs, labels=labels, classes=("a", "b"))
    way: Any = SimpleNamespace(inputs=lambda prepared: prepared)

    def make(name: str) -> Any:
        model = network(2)
        if another and name == "ProtoNet":
            torch.nn.init.ones_(model.body[0].bias)  # type: ignore[arg-type]
        learner = getattr(metawrap, name)(model, norm="running").eval()
        learner.model.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
        return learner

    choose_method(make, examples, way)
    assert seen.count(40) == 1 + another
    assert max(each for each in seen if each != 40) <= 4  # Trials of a few examples.
