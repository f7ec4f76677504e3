"""RelationNet: scores and loss against numpy on loops over pairs; maps, vectors, and modules of the user's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from face import fingerprint
from keywords import grouped
from method_cases import MapNet, numbers, predict, step
from models import Conv4, NormedMlp, class_tasks, seeded
from torch import Tensor, nn

from metawrap import RelationNet, Task, UnsupportedModuleError


class _Gain(nn.Module):
    """The user's own relation module: (pairs, 2 * numbers) to (pairs,)."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, pairs: Tensor) -> Tensor:
        one, other = pairs.flatten(1).chunk(2, 1)
        return self.gain * (one * other).sum(1)


def convolved(maps: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """3x3, padding 1, by the definition."""
    n, _, h, w = maps.shape
    padded = np.pad(maps, ((0, 0), (0, 0), (1, 1), (1, 1)))
    out = np.empty((n, len(weight), h, w))
    for i in range(h):
        for j in range(w):
            out[:, :, i, j] = np.tensordot(padded[:, :, i : i + 3, j : j + 3], weight, ([1, 2, 3], [1, 2, 3])) + bias
    return out


def pooled(maps: np.ndarray) -> np.ndarray:
    h, w = maps.shape[2] // 2, maps.shape[3] // 2
    return maps[:, :, : 2 * h, : 2 * w].reshape(*maps.shape[:2], h, 2, w, 2).max((3, 5))


def relation_by_hand(pairs: np.ndarray, parts: dict[str, np.ndarray]) -> np.ndarray:
    for block in "01":
        weight, bias = parts[f"{block}.weight"], parts[f"{block}.bias"]
        if pairs.ndim == 4 and weight.shape[-1] == 3:
            pairs = convolved(pairs, weight, bias)
        else:
            pairs = pairs.reshape(len(pairs), -1) @ weight.reshape(len(weight), -1).T + bias
        pairs = np.maximum(pairs, 0)
        if pairs.ndim == 4:
            pairs = pooled(pairs)
    pairs = np.maximum(pairs.reshape(len(pairs), -1) @ parts["3.weight"].T + parts["3.bias"], 0)
    return (pairs @ parts["5.weight"].T + parts["5.bias"])[:, 0]


def own_parts(learner: Any) -> dict[str, np.ndarray]:
    with torch.no_grad():
        for index, parameter in enumerate(learner.relation.parameters()):
            parameter.add_(0.1 * numbers(*parameter.shape, seed=index + 10))
    return {name: value.detach().numpy() for name, value in learner.relation.named_parameters()}


@pytest.mark.parametrize("shape", [(6,), (3, 1, 1), (3, 5, 4), (2, 3)])
def test_scores_and_loss_equal_numpy_on_a_loop_over_pairs(shape: tuple[int, ...]) -> None:
    learner = RelationNet(nn.Linear(1, 1).double(), embedding="output", hidden=4)
    support, labels = numbers(5, *shape), torch.tensor([0, 1, 1, 2, 2])
    target, target_y = numbers(4, *shape, seed=1), torch.tensor([2, 0, 1, 1])
    predict(learner, support, labels, 3, target, target_y)
    parts = own_parts(learner)
    prediction, loss = predict(learner, support, labels, 3, target, target_y)
    expected, error = np.empty((4, 3)), 0.0
    for row in range(4):
        for way in range(3):
            shown = sum(support[i].numpy() for i in range(5) if labels[i] == way)
            pair = np.concatenate([shown, target[row].numpy()])[None]
            expected[row, way] = relation_by_hand(pair, parts)[0]
            error += (1 / (1 + np.exp(-expected[row, way])) - (target_y[row] == way).item()) ** 2
    np.testing.assert_allclose(prediction.detach().numpy(), expected, rtol=1e-9, atol=1e-9)
    assert loss.item() == pytest.approx(error / 12, rel=1e-9)


def test_the_first_block_starts_on_the_difference() -> None:
    learner = RelationNet(nn.Linear(1, 1).double(), embedding="output")
    x, y = numbers(3, 6), torch.arange(3)
    found, _ = predict(learner, x, y, 3, x, y)
    shifted, _ = predict(learner, x + 5, y, 3, x + 5, y)
    torch.testing.assert_close(found, shifted, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found, predict(learner, x + 5, y, 3, x, y)[0])


def test_a_map_gets_convolutions_and_a_vector_gets_none() -> None:
    for model, shape, sides, options in (
        (seeded(MapNet), (1, 10, 10), (3, 3), {"head": "head"}),
        (seeded(Conv4), (1, 16, 16), (1, 1), {}),
    ):
        learner = RelationNet(model, **grouped(**options))
        step(learner, class_tasks(shape))
        assert learner.relation[0].weight.shape == (64, 8, *sides)
        assert learner.evaluate(class_tasks(shape)).accuracy is not None


def test_a_map_that_is_the_networks_output_reaches_the_fitted_head_as_it_is() -> None:
    batch = class_tasks((1, 10, 10), shots=2)
    learner = RelationNet(seeded(MapNet).body, embedding="output")
    step(learner, batch)
    found = learner.evaluate(batch, keep_predictions=True).predictions[0]
    adapted = learner.adapt(batch[0][0], batch[1][0])
    torch.testing.assert_close(adapted(batch[2][0]), found, rtol=1e-12, atol=1e-12)


def test_the_users_own_relation_module_is_copied_and_learned() -> None:
    relation = _Gain()
    learner = RelationNet(seeded(NormedMlp), relation=relation)
    before = fingerprint(relation)
    step(learner, class_tasks((4,)))
    assert fingerprint(relation) == before
    assert learner.relation.gain.dtype == torch.float64
    assert learner.relation.gain.item() != 1
    assert "_Gain" in str(learner.describe().settings)


def test_a_loss_of_the_users_own_gets_the_scores_before_the_sigmoid() -> None:
    batch = class_tasks((4,), tasks=1)
    learner = RelationNet(seeded(NormedMlp), loss_fn=F.cross_entropy)
    output = learner(batch)
    expected = F.cross_entropy(output.predictions[0], batch[3][0])
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_relation_module_with_another_number_of_scores_is_refused() -> None:
    learner = RelationNet(NormedMlp(), relation=nn.Linear(12, 2))
    with pytest.raises(UnsupportedModuleError, match=r"relation: expected one number for each of the 9 pairs"):
        learner.meta_step(class_tasks_single())


def class_tasks_single() -> list[Task]:
    return [Task(*(part[0].float() if part.is_floating_point() else part[0] for part in class_tasks((4,))))]
