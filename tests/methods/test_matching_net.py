"""MatchingNet against attention and LSTMs in numpy."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from by_hand import (
    assert_deployed_is_evaluated,
    assert_gradient_is_that_of_differences,
    assert_relabelled_is_permuted,
    embedded,
    mlp,
    one_hot,
    prediction,
    task_with,
)
from face import assert_same_state
from torch import Tensor, nn

from metawrap import ArgumentError, MatchingNet, Task


def softmax(scores: np.ndarray) -> np.ndarray:
    raised = np.exp(scores)
    return raised / raised.sum(-1, keepdims=True)  # type: ignore[no-any-return]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))  # type: ignore[no-any-return]


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


@pytest.mark.parametrize("options", VARIANTS)
def test_the_gradient_of_every_part_is_that_of_differences(options: dict[str, Any]) -> None:
    learner, task = MatchingNet(mlp(3), **options), task_with()
    learner.evaluate([task])
    assert_gradient_is_that_of_differences(learner, task)


@pytest.mark.parametrize("options", VARIANTS)
def test_each_variant_learns_and_is_deployed_as_evaluated(options: dict[str, Any]) -> None:
    learner, task = MatchingNet(mlp(), meta_lr=0.05, **options), task_with()
    losses = [learner.meta_step([task]).loss for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]
    assert_relabelled_is_permuted(learner, task, [1, 2, 0])
    module = assert_deployed_is_evaluated(learner, task)
    with torch.no_grad():
        again = pickle.loads(pickle.dumps(module))(task.target_x)
    np.testing.assert_allclose(again.numpy(), prediction(learner, task), rtol=1e-12)
    own = {id(t) for t in (*learner.parameters(), *learner.buffers())}
    assert not own & {id(t) for t in (*module.parameters(), *module.buffers())}


@pytest.mark.parametrize("ways", [2, 7])
def test_ways_are_those_of_the_task(ways: int) -> None:
    task = task_with(torch.arange(ways), targets=9)
    for options in VARIANTS:
        assert prediction(MatchingNet(mlp(), **options), task).shape == (9, ways)


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


def test_with_full_context_a_fresh_learner_takes_a_trained_ones_state_before_any_task() -> None:
    learner, task = MatchingNet(mlp(), full_context=True), task_with()
    for _ in range(2):
        learner.meta_step([task])
    fresh = MatchingNet(mlp(seed=4), full_context=True)
    fresh.load_state_dict(learner.state_dict())
    fresh.optimizer.load_state_dict(copy.deepcopy(learner.optimizer.state_dict()))
    assert (prediction(fresh, task) == prediction(learner, task)).all()
    for one in (learner, fresh):
        one.meta_step([task])
    assert_same_state(dict(fresh.state_dict()), dict(learner.state_dict()))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda learner: pickle.loads(pickle.dumps(learner))])
def test_with_full_context_a_copy_learns_as_the_learner_does(trained: bool, way: Any) -> None:
    learner, task = MatchingNet(mlp(), full_context=True), task_with()
    if trained:
        learner.meta_step([task])
    twin = way(learner)
    with torch.random.fork_rng(devices=[]):
        for one in (twin, learner):
            torch.manual_seed(2)
            one.meta_step([task])
    assert_same_state(dict(twin.state_dict()), dict(learner.state_dict()))


@pytest.mark.parametrize("trained", [False, True])
def test_with_full_context_it_moves_to_another_precision(trained: bool) -> None:
    learner, task = MatchingNet(mlp().float(), full_context=True), task_with()
    single = task.map(lambda t: t.float() if t.is_floating_point() else t)
    if trained:
        learner.meta_step([single])
    learner.double()
    learner.meta_step([task])
    assert {p.dtype for p in learner.parameters()} == {torch.float64}


def test_describe_works_before_and_after_the_cells_have_sizes() -> None:
    learner = MatchingNet(mlp(), full_context=True)
    assert learner.describe().settings["processing_steps"] == 5
    learner.meta_step([task_with()])
    assert "MatchingNet" in str(learner.describe())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"processing_steps": 3}, r"processing_steps: has no effect without full_context=True"),
        ({"full_context": True, "processing_steps": 0}, r"processing_steps: expected a whole number of at least 1"),
        ({"full_context": 1}, r"full_context: expected True or False, but got 1"),
        ({"learn_scale": "yes"}, r"learn_scale: expected True or False, but got 'yes'"),
        ({"scale": 0.0}, r"scale: expected a positive number"),
    ],
)
def test_a_wrong_argument_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        MatchingNet(mlp(), **options)
