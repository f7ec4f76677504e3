"""SiameseNet: matches, loss and prediction against numpy on a loop over pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from keywords import grouped
from method_cases import numbers, predict, step, uneven
from models import NormedMlp, class_tasks, seeded
from torch import Tensor, nn

from metawrap import SiameseNet


def wrapped(size: int, **options: Any) -> SiameseNet:
    """Embeddings are the inputs, so that they can be chosen; weights and bias of the match unlike each other."""
    learner = SiameseNet(_Same(), **grouped(**options))
    predict(learner, numbers(1, size), torch.zeros(1, dtype=torch.long), 1, numbers(1, size), torch.tensor([0]))
    with torch.no_grad():
        learner.match.weight.copy_(numbers(1, size, seed=8))
        learner.match.bias.copy_(numbers(1, seed=9))
    return learner


class _Same(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def match(learner: SiameseNet, one: Tensor, other: Tensor) -> float:
    weight, bias = learner.match.weight.detach().numpy()[0], learner.match.bias.item()
    return float(np.sum(weight * np.abs(one.numpy() - other.numpy())) + bias)


def entropy(value: float, like: bool) -> float:
    return float(np.log1p(np.exp(-value if like else value)))


def test_prediction_and_loss_equal_a_loop_over_pairs() -> None:
    learner = wrapped(6, embedding="output")
    support, labels = numbers(5, 6), torch.tensor([0, 1, 1, 2, 2])
    target, target_y = numbers(4, 6, seed=1), torch.tensor([2, 0, 1, 1])
    prediction, loss = predict(learner, support, labels, 3, target, target_y)
    like, unlike = [], []
    expected = np.full((4, 3), -np.inf)
    for i in range(5):
        for t in range(4):
            value = match(learner, support[i], target[t])
            expected[t, labels[i]] = max(expected[t, labels[i]], value)
            (like if labels[i] == target_y[t] else unlike).append(value)
        for j in range(i):
            (like if labels[i] == labels[j] else unlike).append(match(learner, support[i], support[j]))
    assert len(like) + len(unlike) == 5 * 4 + 10
    by_hand = (np.mean([entropy(v, True) for v in like]) + np.mean([entropy(v, False) for v in unlike])) / 2
    np.testing.assert_allclose(prediction.detach().numpy(), expected, rtol=1e-9, atol=1e-9)
    assert loss.item() == pytest.approx(by_hand, rel=1e-9)


def test_a_task_without_like_pairs_has_the_mean_of_the_others() -> None:
    learner = wrapped(3, embedding="output")
    support, labels = numbers(3, 3), torch.tensor([0, 1, 2])
    _, loss = predict(learner, support, labels, 3, numbers(1, 3, seed=1), torch.tensor([-100]))
    pairs = [entropy(match(learner, support[i], support[j]), False) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert loss.item() == pytest.approx(np.mean(pairs), rel=1e-9)


def test_the_match_starts_as_minus_a_distance_undecided_at_half_a_unit() -> None:
    learner = SiameseNet(seeded(NormedMlp))
    task = uneven((4,))
    found = learner.evaluate([task], keep_predictions=True).predictions[0]
    with torch.no_grad():
        learner.eval()
        support, target = (learner.embedding.of(x, "running") for x in (task.support_x, task.target_x))
        distances = torch.cdist(target, support, p=1)
    nearest = torch.stack([distances[:, task.support_y == way].amin(1) for way in range(3)], 1)
    torch.testing.assert_close(found, 6**0.5 / 2 - nearest / 6**0.5, rtol=1e-9, atol=1e-9)


def test_a_loss_of_the_users_own_gets_the_prediction() -> None:
    batch = class_tasks((4,), tasks=1)
    learner = SiameseNet(seeded(NormedMlp), loss_fn=F.cross_entropy)
    output = learner(batch)
    assert output.loss.item() == pytest.approx(F.cross_entropy(output.predictions[0], batch[3][0]).item(), rel=1e-12)


def test_the_match_is_learned_with_the_network() -> None:
    learner = SiameseNet(seeded(NormedMlp))
    learner.evaluate(class_tasks((4,)))
    before = learner.match.weight.detach().clone()
    step(learner, class_tasks((4,)))
    assert not torch.equal(learner.match.weight, before)
