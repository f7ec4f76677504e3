"""SimpleShot against numpy: the centre, the lengths, the nearest mean; what the centre is in each state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from by_hand import LABELS, embedded, mlp, prediction, task_with

from metawrap import SimpleShot, Task


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)  # type: ignore[no-any-return]


def distances(model: Any, task: Task, centre: np.ndarray) -> np.ndarray:
    """Squared distances (targets, ways) to the class means of centred embeddings of length 1."""
    support, target = (unit(embedded(model, x) - centre) for x in (task.support_x, task.target_x))
    means = np.stack([support[task.support_y.numpy() == way].mean(0) for way in range(int(task.support_y.max()) + 1)])
    return ((target[:, None] - means) ** 2).sum(-1)  # type: ignore[no-any-return]


def assert_same_differences(logits: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(logits - logits[:, :1], expected - expected[:, :1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_without_training_the_centre_is_the_mean_of_the_support_set(scale: float) -> None:
    model, task = mlp(), task_with()
    expected = -scale * distances(model, task, embedded(model, task.support_x).mean(0))
    learner = SimpleShot(model, scale=scale)
    assert_same_differences(prediction(learner, task), expected)
    adapted = learner.adapt(task.support_x, task.support_y)(task.target_x)
    assert_same_differences(adapted.detach().numpy(), expected)


def test_after_training_the_centre_is_the_mean_of_the_training_tasks() -> None:
    model, tasks, new = mlp(), [task_with(seed=seed) for seed in range(3)], task_with(seed=7)
    learner = SimpleShot(model, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    learner.meta_step(tasks[:2])
    learner.meta_step(tasks[2:])
    assert float(learner.centre.seen) == 3
    centre = np.mean([embedded(model, task.support_x).mean(0) for task in tasks], 0)
    np.testing.assert_allclose(learner.centre.mean.numpy(), centre, rtol=1e-9)
    expected = -10 * distances(model, new, centre)
    assert_same_differences(prediction(learner, new), expected)
    assert_same_differences(learner.adapt(new.support_x, new.support_y)(new.target_x).detach().numpy(), expected)


def test_after_a_hundred_tasks_the_mean_forgets() -> None:
    model, first, second = mlp(), task_with(seed=0), task_with(seed=1)
    learner = SimpleShot(model, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    learner.meta_step([first] * 100)
    learner.meta_step([second] * 2)
    one, other = (embedded(model, task.support_x).mean(0) for task in (first, second))
    np.testing.assert_allclose(learner.centre.mean.numpy(), 0.99**2 * one + (1 - 0.99**2) * other, rtol=1e-9)


def test_a_training_task_is_centred_by_its_own_support_set() -> None:
    model, task = mlp(), task_with()
    learner = SimpleShot(model, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    logits = -10 * distances(model, task, embedded(model, task.support_x).mean(0))
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -log_p[np.arange(len(log_p)), task.target_y.numpy()].mean()
    for other in (task_with(seed=3), task):
        loss = learner.meta_step([other]).loss
    assert loss == pytest.approx(expected, rel=1e-9)


def test_a_skipped_step_adds_nothing_to_the_centre() -> None:
    learner, task = SimpleShot(mlp()), task_with()
    learner.meta_step([task])
    before = learner.centre.mean.clone()
    assert learner.meta_step([task.map(lambda t: t * torch.inf if t.is_floating_point() else t)]).skipped
    assert torch.equal(learner.centre.mean, before)
    assert float(learner.centre.seen) == 1


def test_half_precision_and_one_class_give_finite_logits() -> None:
    task = task_with(torch.zeros(1, dtype=torch.long)).map(lambda t: t.bfloat16() if t.is_floating_point() else t)
    found = SimpleShot(mlp().bfloat16()).evaluate([task], keep_predictions=True).predictions[0]
    assert (found.dtype, found.shape) == (torch.bfloat16, (4, 1))
    assert found.isfinite().all()


def test_the_scale_is_learned_and_shown() -> None:
    learner, task = SimpleShot(mlp(), scale=3.0), task_with(LABELS)
    learner.meta_step([task])
    assert float(learner.log_scale.detach().exp()) != pytest.approx(3.0, rel=1e-9)
    assert learner.describe().settings["scale"] == 3.0


def frozen(model: Any, **keywords: Any) -> SimpleShot:
    return SimpleShot(model, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0), **keywords)


@pytest.mark.parametrize("strength", [0.1, 1.0])
def test_whitening_divides_by_the_spread_within_the_classes_of_training_tasks(strength: float) -> None:
    model, tasks, new = mlp(), [task_with(seed=seed) for seed in range(3)], task_with(seed=7)
    learner = frozen(model, whitening=strength)
    plain = -10 * distances(model, new, embedded(model, new.support_x).mean(0))
    assert_same_differences(prediction(learner, new), plain)  # Before training.
    learner.meta_step(tasks)
    spreads = []
    for task in tasks:
        every = np.concatenate([embedded(model, task.support_x), embedded(model, task.target_x)])
        labels = np.concatenate([task.support_y.numpy(), task.target_y.numpy()])
        apart = np.concatenate([every[labels == c] - every[labels == c].mean(0) for c in np.unique(labels)])
        spreads.append(apart.T @ apart / (len(every) - len(np.unique(labels))))
    spread = np.mean(spreads, 0)
    loaded = spread + strength * np.trace(spread) / len(spread) * np.eye(len(spread))
    # Another root of the inverse than the learner's: the symmetric one.
    values, vectors = np.linalg.eigh(loaded)
    root = vectors / np.sqrt(values) @ vectors.T
    centre = np.mean([embedded(model, task.support_x).mean(0) for task in tasks], 0)
    support, target = (unit((embedded(model, x) - centre) @ root) for x in (new.support_x, new.target_x))
    means = np.stack([support[new.support_y.numpy() == c].mean(0) for c in range(int(new.support_y.max()) + 1)])
    expected = -10 * ((target[:, None] - means) ** 2).sum(-1)
    assert_same_differences(prediction(learner, new), expected)
    assert_same_differences(learner.adapt(new.support_x, new.support_y)(new.target_x).detach().numpy(), expected)
    loaded_learner = frozen(mlp(), whitening=strength)
    loaded_learner.load_state_dict(learner.state_dict())
    assert_same_differences(prediction(loaded_learner, new), expected)


def test_targets_without_a_class_do_not_count_in_the_spread() -> None:
    task = task_with()
    kept = torch.arange(len(task.target_y)) % 2 == 0
    one, other = frozen(mlp(), whitening=1.0), frozen(mlp(), whitening=1.0)
    one.meta_step([Task(task.support_x, task.support_y, task.target_x[kept], task.target_y[kept])])
    other.meta_step([Task(task.support_x, task.support_y, task.target_x, task.target_y.where(kept, -100))])
    assert one.centre.within is not None
    assert other.centre.within is not None
    torch.testing.assert_close(one.centre.within, other.centre.within)


def test_whitening_in_half_precision_is_finite() -> None:
    task = task_with().map(lambda t: t.bfloat16() if t.is_floating_point() else t)
    learner = SimpleShot(mlp().bfloat16(), whitening=1.0)
    learner.meta_step([task])
    assert learner.evaluate([task], keep_predictions=True).predictions[0].isfinite().all()
