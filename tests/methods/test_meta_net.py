"""Meta networks against numpy: the gradients by differences, both kinds of fast weights, and attention, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from by_hand import sigmoid
from keywords import grouped
from models import NormedMlp, class_tasks, seeded
from torch import Tensor, nn

from metawrap import MetaNet, Task, TaskError
from metawrap.layers.learned_update import preprocessed


def entropy(logits: np.ndarray, label: int) -> float:
    return float(np.log(np.exp(logits).sum()) - logits[label])


def by_differences(loss: Any, weight: np.ndarray) -> np.ndarray:
    gradient, step = np.zeros_like(weight), 1e-6
    for place in np.ndindex(weight.shape):
        shift = np.zeros_like(weight)
        shift[place] = step
        gradient[place] = (loss(weight + shift) - loss(weight - shift)) / (2 * step)
    return gradient


def features(gradient: np.ndarray) -> np.ndarray:
    size, sign = np.empty_like(gradient), np.empty_like(gradient)
    for place, g in np.ndenumerate(gradient):
        large = abs(g) >= np.exp(-7)
        size[place] = np.log(abs(g)) / 7 if large else -1
        sign[place] = np.sign(g) if large else np.exp(7) * g
    return np.stack([size, sign], -1)


def lstm(steps: np.ndarray, part: nn.LSTM) -> np.ndarray:
    """The last output: (time, coordinates, 2) to (coordinates, hidden), in torch's order of gates."""
    wi, wh, bi, bh = (p.detach().numpy() for p in part.parameters())
    hidden = cell = np.zeros((steps.shape[1], part.hidden_size))
    for x in steps:
        i, f, g, o = np.split(x @ wi.T + bi + hidden @ wh.T + bh, 4, axis=1)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        hidden = sigmoid(o) * np.tanh(cell)
    return hidden


def numpy_of(module: Any) -> np.ndarray:
    return module.weight.detach().numpy()  # type: ignore[no-any-return]


def small(**options: Any) -> MetaNet:
    """Its embedding is its input, of two numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        learner = MetaNet(
            nn.Sequential(nn.Identity(), nn.Linear(2, 2)).double(), representation=3, hidden=4, **grouped(**options)
        )
        learner.evaluate([task_of(torch.eye(2, dtype=torch.float64), [0, 1])])
    return learner


def task_of(x: Tensor, labels: list[int]) -> Task:
    return Task(x, torch.tensor(labels), x + 0.25, torch.tensor(labels))


X = torch.tensor([[0.5, -1.0], [1.5, 0.3], [-0.7, 0.9]], dtype=torch.float64)
LABELS = [0, 1, 1]


@pytest.mark.parametrize("steps", [2, 5])
def test_logits_equal_those_by_hand(steps: int) -> None:
    learner = small(representation_steps=steps)
    q, o, w = (numpy_of(part) for part in (learner.representation, learner.representation_rows, learner.rows))
    x = X.numpy()
    # Gradients of the losses as losses, by differences, without the closed form.
    of_u = [by_differences(lambda v, i=i: entropy(o @ np.maximum(v @ x[i], 0), LABELS[i]), q) for i in range(len(x))]
    of_b = [by_differences(lambda v, i=i: entropy(v @ x[i], LABELS[i]), w) for i in range(len(x))]
    parts = [of_u[:2], of_u[2:]] if steps == 2 else [[g] for g in of_u]
    read = lstm(np.stack([features(np.mean(part, 0).ravel()) for part in parts]), learner.task_fast)
    out = learner.task_fast_out
    layer = q + (read @ numpy_of(out).T + out.bias.detach().numpy()).reshape(q.shape)

    def perceptron(values: np.ndarray) -> np.ndarray:
        for index in (0, 2, 4):
            linear = learner.example_fast[index]
            values = values @ numpy_of(linear).T + linear.bias.detach().numpy()
            values = np.maximum(values, 0) if index < 4 else values
        return values[..., 0]

    stored = [perceptron(features(g)) for g in of_b]
    keys = x @ layer.T
    expected = []
    for target in x + 0.25:
        r = layer @ target
        cosines = keys @ r / (np.linalg.norm(keys, axis=1) * np.linalg.norm(r))
        attention = np.exp(cosines) / np.exp(cosines).sum()
        expected.append((w + sum(a * f for a, f in zip(attention, stored, strict=True))) @ target)
    found = learner.evaluate([task_of(X, LABELS)], keep_predictions=True).predictions[0]
    # Differences leave 1e-9 of the gradient, its logarithm keeps that.
    np.testing.assert_allclose(found.numpy(), np.stack(expected), rtol=1e-7, atol=1e-8)


def test_the_gradients_equal_those_of_autograd() -> None:
    """To the last digits, where differences stop."""
    learner = small()
    truth = nn.functional.one_hot(torch.tensor(LABELS), 2).double()
    seen: list[Tensor] = []
    learner.task_fast.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    learner.example_fast.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    learner._fit_head(X, torch.tensor(LABELS), 2)
    q, o, w = (part.weight for part in (learner.representation, learner.representation_rows, learner.rows))
    for i in range(3):
        loss = nn.functional.cross_entropy((o @ (q @ X[i]).relu())[None], truth[i : i + 1])
        expected = features(torch.autograd.grad(loss, q)[0].numpy().ravel())
        np.testing.assert_allclose(seen[0][i].detach().numpy(), expected, rtol=1e-9, atol=1e-12)
        loss = nn.functional.cross_entropy((w @ X[i])[None], truth[i : i + 1])
        expected = features(torch.autograd.grad(loss, w)[0].numpy())
        np.testing.assert_allclose(seen[1][i].detach().numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["task_fast_out.bias", "rows.weight", "representation.weight", "task_fast.weight_ih_l0"]
)
def test_the_meta_gradient_equals_differences_with_the_support_gradients_held(name: str) -> None:
    learner, task = small(), task_of(X, LABELS)
    seen: dict[str, Tensor] = {}
    for part in ("task_fast", "example_fast"):
        # From the second pass on, d and m are given what they were given in the first.
        hook = lambda _, args, part=part: (seen.setdefault(part, args[0].detach()),)
        learner.get_submodule(part).register_forward_pre_hook(hook)
    learner([task]).loss.backward()
    parameter, values = learner.get_parameter(name), []
    place = (0,) * parameter.ndim
    for sign in (1, -1):
        with torch.no_grad():
            parameter[place] += sign * 1e-6
            values.append(float(learner([task]).loss.detach()))
            parameter[place] -= sign * 1e-6
    assert parameter.grad is not None
    assert float(parameter.grad[place]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6, abs=1e-9)
    # What shapes the support gradients alone stays as it was drawn.
    assert learner.representation_rows.weight.grad is None


def test_features_of_tiny_and_vanished_gradients_are_finite() -> None:
    found = preprocessed(torch.tensor([0.0, 1e-300, -1e-4, 0.5], dtype=torch.float64), 7.0).numpy()
    np.testing.assert_allclose(found, features(np.array([1e-320, 1e-300, -1e-4, 0.5])), rtol=1e-12, atol=1e-310)


def test_fewer_ways_use_the_first_rows_and_more_are_refused() -> None:
    learner = MetaNet(seeded(NormedMlp), ways=5)
    task = Task(*(part[0] for part in class_tasks((4,), tasks=1, ways=2, shots=2)))
    learner.meta_step([task])
    assert learner.rows.weight.shape == (5, 6)
    assert learner.adapt(task.support_x[1:], task.support_y[1:])(task.target_x).shape == (4, 2)
    more = Task(*(part[0] for part in class_tasks((4,), tasks=1, ways=7)))
    with pytest.raises(TaskError, match=r"7 classes, but this MetaNet has learned weights for 5, as ways= says"):
        learner.meta_step([more])
    other = MetaNet(seeded(NormedMlp))
    other.meta_step([task])
    with pytest.raises(TaskError, match=r"for 2, the number in its first task. Build it with ways=7"):
        other.evaluate([more])
