"""The memory module against numpy: three slots, both cases of the update, ages, logits and the loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from keywords import grouped
from torch import Tensor, nn

from metawrap import MemoryModule, Task, TaskError
from metawrap.methods.memory_module import KeyMemory


def unit(x: Any) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)  # type: ignore[no-any-return]


def learner_of(**options: Any) -> MemoryModule:
    """Its embedding is its input."""
    return MemoryModule(nn.Sequential(nn.Identity(), nn.Linear(2, 3)).double(), **grouped(**options))


def fitted(support: Tensor, labels: list[int], **options: Any) -> KeyMemory:
    learner = learner_of(**options).eval()
    return learner._fit_head(support, torch.tensor(labels), max(labels) + 1)


SUPPORT = torch.tensor([[1.0, 0.2], [0.1, 2.0], [3.0, 0.1], [-1.0, 0.3], [-2.0, -2.0]], dtype=torch.float64)


def test_each_write_equals_one_by_hand() -> None:
    """Free slot; free slot; nearest key of the class is averaged; free slot; the oldest, slot 1, is written over."""
    a, b, c, d, e = (unit(x) for x in SUPPORT.numpy())
    steps = [
        ([a], [0], [0]),
        ([a, b], [0, 1], [1, 0]),
        ([unit(a + c), b], [0, 1], [0, 1]),
        ([unit(a + c), b, d], [0, 1, 2], [1, 2, 0]),
        ([unit(a + c), e, d], [0, 1, 2], [2, 0, 1]),
    ]
    labels = [0, 1, 0, 2, 1]
    memory = KeyMemory(SUPPORT, 3, 3, 256, 40.0)
    for x, label, (keys, values, ages) in zip(SUPPORT, labels, steps, strict=True):
        memory.write(x, label, 0.0)
        used = len(keys)
        np.testing.assert_allclose(memory.keys[:used].numpy(), np.stack(keys), rtol=1e-12)
        assert memory.values.tolist() == values + [-1] * (3 - used)
        assert memory.ages[:used].tolist() == ages
    whole = fitted(SUPPORT, labels, slots=3)
    assert torch.equal(whole.keys, memory.keys)


def test_a_key_of_another_class_is_never_averaged_although_it_is_nearest() -> None:
    memory = fitted(SUPPORT[[0, 2]], [0, 1])
    np.testing.assert_allclose(memory.keys.numpy(), unit(SUPPORT[[0, 2]].numpy()), rtol=1e-12)
    assert memory.values.tolist() == [0, 1]


def test_loss_and_logits_equal_those_by_hand() -> None:
    target = torch.tensor([[1.0, 0.5], [-0.3, 1.0], [-1.0, -0.2]], dtype=torch.float64)
    target_y = torch.tensor([1, 1, 2])
    keys = unit(SUPPORT[[0, 1, 3]].numpy())
    cosines = unit(target.numpy()) @ keys.T
    hinge = [max(0.0, max(np.delete(row, y)) - row[y] + 0.3) for row, y in zip(cosines, target_y.tolist(), strict=True)]
    assert min(hinge[:1]) > 0
    assert hinge[2] == 0
    logits = 7.0 * cosines
    entropy = -np.log(np.exp(logits)[np.arange(3), target_y] / np.exp(logits).sum(1)).mean()
    task = Task(SUPPORT[[0, 1, 3]], torch.tensor([0, 1, 2]), target, target_y)
    for weight in (0.0, 0.5):
        learner = learner_of(margin=0.3, inverse_temperature=7.0, task_loss=weight).eval()
        found = learner([task])
        np.testing.assert_allclose(found.predictions[0].numpy(), logits, rtol=1e-12)
        assert float(found.loss.detach()) == pytest.approx(np.mean(hinge) + weight * entropy, rel=1e-12)


def test_only_the_nearest_keys_give_logits() -> None:
    memory = fitted(SUPPORT[[0, 1, 3]], [0, 1, 2], neighbours=2, inverse_temperature=5.0)
    found = memory(SUPPORT[:1]).numpy()[0]
    cosines = unit(SUPPORT[:1].numpy()) @ unit(SUPPORT[[0, 1, 3]].numpy()).T
    np.testing.assert_allclose(found, [5 * cosines[0, 0], 5 * cosines[0, 1], -5.0], rtol=1e-12)


def test_a_class_without_a_key_counts_as_cosine_zero_in_the_loss() -> None:
    memory = fitted(SUPPORT[:1], [0])
    cosine = 1 / np.sqrt(1.04)
    found = memory.loss(torch.tensor([[1.0, 0.0]]).double(), torch.tensor([0]), 2.0)
    assert float(found) == pytest.approx(2.0 - cosine, rel=1e-12)
    found = memory.loss(torch.tensor([[1.0, 0.0]]).double(), torch.tensor([1]), 2.0)
    assert float(found) == pytest.approx(2.0 + cosine, rel=1e-12)


@pytest.mark.parametrize("flow", [True, False])
def test_gradients_reach_the_support_set_only_if_keys_carry_them(flow: bool) -> None:
    support = SUPPORT[:3].clone().requires_grad_()
    learner = learner_of(key_gradients=flow)
    labels = torch.tensor([0, 1, 0])
    task = Task(support, labels, SUPPORT[3:].clone(), torch.tensor([0, 1]))
    _, loss = learner._predict(task, support, labels, 2, task.target_x)
    assert loss.requires_grad is flow
    if flow:
        found = torch.autograd.grad(loss, support)[0]
        step = torch.zeros_like(support)
        step[0, 1] = 1e-6
        values = [
            learner._predict(task, x, labels, 2, task.target_x)[1].item()
            for x in (support.detach() + step, support.detach() - step)
        ]
        assert float(found[0, 1]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6)


def test_noise_on_ages_chooses_among_the_old_in_training_only() -> None:
    learner, support = learner_of(slots=2, age_noise=50.0), SUPPORT[[0, 1, 3, 4]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for training in (True, False):
            learner.train(training)
            before = torch.get_rng_state()
            kept = {tuple(learner._fit_head(support, torch.tensor([0, 1, 0, 1]), 2).ages.tolist()) for _ in range(12)}
            assert (len(kept) > 1) is training
            assert torch.equal(before, torch.get_rng_state()) is not training
            # Where there is room for all, nothing is drawn.
            before = torch.get_rng_state()
            learner._fit_head(support[:2], torch.tensor([0, 1]), 2)
            assert torch.equal(before, torch.get_rng_state())


def test_targets_that_the_loss_ignores_are_left_out_of_the_memory_loss() -> None:
    target, y = SUPPORT[[0, 4]], torch.tensor([0, -100])
    task = Task(SUPPORT[:2], torch.tensor([0, 1]), target, y)
    alone = Task(SUPPORT[:2], torch.tensor([0, 1]), target[:1], y[:1])
    learner = learner_of(margin=1.5).eval()
    assert float(learner([task]).loss.detach()) == pytest.approx(float(learner([alone]).loss.detach()), rel=1e-12)


def test_a_memory_too_small_for_the_classes_is_refused() -> None:
    with pytest.raises(TaskError, match=r"3 classes, but the memory has 2 slots"):
        learner_of(slots=2).evaluate([Task(SUPPORT[:3], torch.arange(3), SUPPORT[:3], torch.arange(3))])
