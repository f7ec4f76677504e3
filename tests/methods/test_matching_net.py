"""MatchingNet against attention and LSTMs in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from by_hand import embedded, mlp, one_hot, prediction, sigmoid, task_with
from torch import Tensor, nn

from metawrap import MatchingNet, Task


def softmax(scores: np.ndarray) -> np.ndarray:
    raised = np.exp(scores)
    return raised / raised.sum(-1, keepdims=True)  # type: ignore[no-any-return]


def lstm(cell: Any, x: np.ndarray, h: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    w, u, b, d = (getattr(cell, name).detach().numpy() for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    i, f, g, o = np.split(w @ x + b + u @ h + d, 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def log_probabilities(f: np.ndarray, g: np.ndarray, labels: Tensor, scale: float) -> np.ndarray:
    cosines = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in g] for a in f])
    return np.log(softmax(scale * cosines) @ one_hot(labels))  # type: ignore[no-any-return]


def full_context(learner: Any, support: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    zero, outputs = np.zeros(support.shape[1]), []
    for cell, order in ((learner.forwards, 1), (learner.backwards, -1)):
        h, c, seen = zero, zero, []
        for x in support[::order]:
            h, c = lstm(cell, x, h, c)
            seen.append(h)
        outputs.append(np.array(seen)[::order])
    g, f = outputs[0] + outputs[1] + support, []
    for x in target:
        h, c = zero, zero
        for _ in range(learner.processing_steps):
            read = softmax(g @ h) @ g
            output, c = lstm(learner.reader, np.concatenate([x, read]), h, c)
            h = output + x
        f.append(h)
    return np.array(f), g


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_predictions_are_logs_of_summed_attention(scale: float) -> None:
    model, task = mlp(), task_with()
    support, target = (embedded(model, x) for x in (task.support_x, task.target_x))
    learner = MatchingNet(model, scale=scale)
    found = prediction(learner, task)
    np.testing.assert_allclose(found, log_probabilities(target, support, task.support_y, scale), rtol=1e-9)
    np.testing.assert_allclose(np.exp(found).sum(1), 1, rtol=1e-12)
    expected = -found[np.arange(4), task.target_y.numpy()].mean()
    assert float(learner.evaluate([task]).loss) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("steps", [1, 3])
def test_full_context_is_two_lstms_and_a_reading_one(steps: int) -> None:
    model, task = mlp(), task_with()
    learner = MatchingNet(model, full_context=True, processing_steps=steps, scale=2.0)
    found = prediction(learner, task)  # The cells get their sizes here.
    support, target = (embedded(model, x) for x in (task.support_x, task.target_x))
    f, g = full_context(learner, support, target)
    np.testing.assert_allclose(found, log_probabilities(f, g, task.support_y, 2.0), rtol=1e-9)


def test_of_a_distant_class_the_log_is_finite() -> None:
    learner = MatchingNet(mlp(), scale=2000.0)
    found = prediction(learner, task_with())
    assert np.isfinite(found).all()
    assert found.min() < -800  # exp of it is zero


VARIANTS = [{}, {"learn_scale": True, "scale": 5.0}, {"full_context": True, "processing_steps": 2, "learn_scale": True}]


def test_only_with_full_context_does_the_order_of_the_support_set_matter() -> None:
    task = task_with()
    turned = Task(task.support_x.flip(0), task.support_y.flip(0), task.target_x, task.target_y)
    for whole in (False, True):
        learner = MatchingNet(mlp(), full_context=whole, scale=3.0)
        same = np.allclose(prediction(learner, turned), prediction(learner, task), rtol=1e-9)
        assert same is not whole


def test_cells_get_their_sizes_from_the_embedding_and_stay_the_optimizers() -> None:
    learner, task = MatchingNet(mlp(), full_context=True), task_with()
    held = [id(p) for group in learner.optimizer.param_groups for p in group["params"]]
    learner.meta_step([task])
    assert [id(p) for p in learner.parameters()] == held
    assert (learner.reader.input_size, learner.reader.hidden_size) == (10, 5)
    assert (learner.forwards.input_size, learner.forwards.hidden_size) == (5, 5)
    assert {type(cell) for cell in (learner.forwards, learner.backwards, learner.reader)} == {nn.LSTMCell}
    assert "LSTMCell(10, 5)" in repr(learner)


def test_describe_works_before_and_after_the_cells_have_sizes() -> None:
    learner = MatchingNet(mlp(), full_context=True)
    assert learner.describe().settings["processing_steps"] == 5
    learner.meta_step([task_with()])
    assert "MatchingNet" in str(learner.describe())
