"""Each photo is left out once, and predicted by what the others taught; intervals by Wilson's formula."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from photos import network
from torch import Tensor

from metawrap import MAML, R2D2
from metawrap.classifier.estimate import Estimate, left_out


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
    assert found == Estimate(4, 6, 3, (("b", "a", 1), ("a", "b", 1)))
    assert "4 of 6 right, 66.7 %" in str(found)


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


@pytest.mark.parametrize("method", [R2D2, MAML])
def test_an_estimate_equals_adapting_by_hand(method: Any) -> None:
    torch.manual_seed(0)
    inputs, labels = torch.randn(9, 3, 8, 8), torch.arange(3).repeat(3)
    learner = method(network(), norm="support").eval()
    right = 0
    for number in range(3):
        out = torch.zeros(9, dtype=torch.bool)
        out[[number * 3, number * 3 + 1, number * 3 + 2]] = True
        module = learner.adapt(inputs[~out], labels[~out])
        with torch.no_grad():
            found: Tensor = module(inputs[out])
        right += int((found.argmax(1) == labels[out]).sum())
    estimate = left_out(learner, inputs, labels, "abc", "support")
    assert estimate is not None
    assert (estimate.right, estimate.examples) == (right, 9)
