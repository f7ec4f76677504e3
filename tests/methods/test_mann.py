"""MANN against numpy: a sequence of three steps by hand, reads, writes, usage and the label that comes late."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from by_hand import sigmoid
from keywords import grouped
from models import NormedMlp, class_tasks, seeded
from torch import Tensor, nn

from metawrap import MANN, Task, TaskError
from metawrap.methods.mann import Controller, ControllerState, least_used

X = torch.tensor([[0.5, -1.0], [1.5, 0.3], [-0.7, 0.9]], dtype=torch.float64)
LABELS = torch.tensor([1, 0, 1])
TARGET = torch.tensor([[0.2, 0.8], [-1.0, 0.1]], dtype=torch.float64)


def small(**options: Any) -> MANN:
    """Its embedding is its input, of two numbers."""
    sizes = {"hidden": 3, "slots": 4, "width": 2, "reads": 2, "decay": 0.9, "key_strength": 3.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        learner = MANN(nn.Sequential(nn.Identity(), nn.Linear(2, 2)).double(), **grouped(**sizes | options))
        learner.evaluate([Task(X[:2], torch.arange(2), X[:2], torch.arange(2))])
    with torch.no_grad():
        learner.controller.alpha.copy_(torch.tensor([[0.4], [-0.6]]))
    return learner


def read_by_hand(keys: np.ndarray, memory: np.ndarray, strength: float) -> np.ndarray:
    weights = np.empty((len(keys), len(memory)))
    for head, key in enumerate(keys):
        lengths = [np.linalg.norm(row) or 1.0 for row in memory]
        cosines = [row @ key / length / np.linalg.norm(key) for row, length in zip(memory, lengths, strict=True)]
        weights[head] = np.exp(strength * np.array(cosines)) / np.exp(strength * np.array(cosines)).sum()
    return weights


def by_hand(learner: MANN, x: np.ndarray, labels: list[int], target: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray]:
    """State after the support set, logits of the support examples, and of the targets; in loops."""
    p = {name: value.detach().numpy() for name, value in learner.controller.named_parameters()}
    rows, gate = learner.rows.weight.detach().numpy(), sigmoid(p["alpha"])
    hidden, cell, memory = np.zeros(3), np.zeros(3), np.zeros((4, 2))
    read, last, usage = np.zeros((2, 2)), np.zeros((2, 4)), np.zeros(4)

    def think(embedding: np.ndarray, told: np.ndarray) -> tuple[np.ndarray, ...]:
        gates = p["embedding.weight"] @ embedding + p["embedding.bias"] + p["label.weight"] @ told
        gates = gates + p["state.weight"] @ np.concatenate([hidden, read.ravel()])
        take, forget, give, new = gates[:3], gates[3:6], gates[6:9], gates[9:]
        next_cell = sigmoid(forget + 1) * cell + sigmoid(take) * np.tanh(new)
        next_hidden = sigmoid(give) * np.tanh(next_cell)
        keys = np.tanh(p["key.weight"] @ next_hidden + p["key.bias"]).reshape(2, 2)
        weights = read_by_hand(keys, memory, 3.0)
        return next_hidden, next_cell, keys, weights, weights @ memory

    told, guesses = np.zeros(2), []
    for embedding, label in zip(x, labels, strict=True):
        hidden, cell, keys, weights, read = think(embedding, told)
        guesses.append(rows @ np.concatenate([hidden, read.ravel()]))
        order, memory, write = np.argsort(usage, kind="stable"), memory.copy(), np.zeros((2, 4))
        for head in range(2):
            write[head] = gate[head] * last[head]
            write[head, order[head]] += 1 - gate[head, 0]
            memory[order[head]] = 0
        for row in range(4):
            memory[row] += write[0, row] * keys[0] + write[1, row] * keys[1]
        usage = 0.9 * usage + weights.sum(0) + write.sum(0)
        last, told = weights, np.eye(2)[label]
    logits = []
    for embedding in target:
        after, _, _, _, found = think(embedding, told)
        logits.append(rows @ np.concatenate([after, found.ravel()]))
    return (memory, usage, last, hidden, cell), np.stack(guesses), np.stack(logits)


def test_three_steps_equal_those_by_hand() -> None:
    learner = small(order="given")
    (memory, usage, last, hidden, cell), guesses, logits = by_hand(learner, X.numpy(), LABELS.tolist(), TARGET.numpy())
    head, found, _ = learner._presented(X, LABELS, 2)
    for name, expected in {
        "memory": memory,
        "usage": usage,
        "read_weights": last,
        "hidden": hidden,
        "cell": cell,
    }.items():
        np.testing.assert_allclose(head.get_buffer(name)[0].detach().numpy(), expected, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(found.detach().numpy(), guesses, rtol=1e-10)
    np.testing.assert_allclose(head(TARGET).detach().numpy(), logits, rtol=1e-10)


def test_writes_go_to_what_was_read_and_to_the_least_used_which_is_emptied() -> None:
    """One head, four slots, numbers that can be followed."""
    controller = Controller(3, 4, 2, 1, 0.5, 1.0).double()
    with torch.no_grad():
        controller.alpha.fill_(float(np.log(3)))  # sigma = 3 / 4
    memory = torch.tensor([[[1.0, 1.0], [2.0, 0.0], [0.0, 4.0], [8.0, 8.0]]], dtype=torch.float64)
    usage = torch.tensor([[0.6, 0.2, 0.9, 0.4]], dtype=torch.float64)
    last = torch.tensor([[[0.0, 0.0, 1.0, 0.0]]], dtype=torch.float64)
    now = torch.tensor([[[1.0, 0.0, 0.0, 0.0]]], dtype=torch.float64)
    state = controller.start(usage)._replace(memory=memory, usage=usage, last_weights=last, read_weights=now)
    after = controller.written(state, torch.tensor([[[4.0, -4.0]]], dtype=torch.float64))
    assert isinstance(after, ControllerState)
    expected = torch.tensor([[[1.0, 1.0], [1.0, -1.0], [3.0, 1.0], [8.0, 8.0]]], dtype=torch.float64)
    torch.testing.assert_close(after.memory, expected)
    torch.testing.assert_close(after.usage, torch.tensor([[1.3, 0.35, 1.2, 0.2]], dtype=torch.float64))


def test_the_nth_head_has_the_nth_least_used_slot() -> None:
    found = least_used(torch.tensor([[0.6, 0.2, 0.9, 0.4], [0.0, 0.0, 0.0, 0.0]]), 2)
    assert found.argmax(2).tolist() == [[1, 3], [0, 1]]
    assert torch.equal(found.sum(2), torch.ones(2, 2))


def test_the_loss_is_on_targets_and_on_the_support_set_where_asked_for() -> None:
    task = Task(X, LABELS, TARGET, torch.tensor([0, 1]))
    _, guesses, logits = by_hand(small(order="given"), X.numpy(), LABELS.tolist(), TARGET.numpy())

    def entropy(values: np.ndarray, labels: Tensor) -> float:
        return float(nn.functional.cross_entropy(torch.from_numpy(values), labels))

    expected = entropy(logits, task.target_y)
    assert float(small(order="given")([task]).loss.detach()) == pytest.approx(expected, rel=1e-10)
    expected += entropy(guesses, LABELS)
    assert float(small(order="given", support_loss=True)([task]).loss.detach()) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("order", ["sorted", "given", "shuffled"])
def test_the_order_of_the_support_set(order: Any) -> None:
    learner, turn = small(order=order), torch.tensor([2, 0, 1])
    one, other = (Task(X[i], LABELS[i], TARGET, torch.tensor([0, 1])) for i in (torch.tensor([1, 0, 2]), turn))
    found = [learner.evaluate([task], keep_predictions=True).predictions[0] for task in (one, other)]
    assert torch.equal(*found) is False
    # Sorted by class, what is listed class by class and what is not come to the same, example by example.
    mixed = Task(X[[0, 1, 2]], LABELS[[0, 1, 2]], TARGET, torch.tensor([0, 1]))
    listed = learner.evaluate([mixed], keep_predictions=True).predictions[0]
    assert torch.equal(listed, found[0]) is (order == "sorted")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        losses = {float(learner([one]).loss.detach()) for _ in range(8)}
    assert (len(losses) > 1) is (order == "shuffled")


@pytest.mark.parametrize("ways", [2, 7])
def test_fewer_ways_use_the_first_rows_and_more_are_refused(ways: int) -> None:
    learner = MANN(seeded(NormedMlp), ways=5, hidden=8, slots=6)
    task = Task(*(part[0] for part in class_tasks((4,), tasks=1, ways=ways, shots=2)))
    if ways > 5:
        with pytest.raises(TaskError, match=r"7 classes, but this MANN has learned weights for 5, as ways= says"):
            learner.meta_step([task])
        learner = MANN(seeded(NormedMlp), hidden=8, slots=6)
    learner.meta_step([task])
    assert len(learner.rows.weight) == max(ways, 5)
    assert learner.adapt(task.support_x[1:], task.support_y[1:])(task.target_x).shape == (2 * ways, ways)
