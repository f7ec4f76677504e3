"""What the tests of the methods on the user's own head share: tiny tasks, gradients by name, and common claims."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from face import assert_same_state, fingerprint
from torch import Tensor, nn

from metawrap import MetaWrapWarning, Task, TaskError

TOLERANCE = 1e-9


def conv_tasks(count: int = 2, ways: int = 3, shots: int = 2, targets: int = 3, **extra: Any) -> list[Task]:
    """Noisy images of as many patterns as there are ways, in double precision; the same at each call."""
    generator = torch.Generator().manual_seed(7)
    tasks = []
    for index in range(count):
        patterns = torch.randn(ways, 1, 16, 16, generator=generator, dtype=torch.float64)
        support_y, target_y = (torch.arange(ways).repeat_interleave(n) for n in (shots, targets))
        support, target = (
            patterns[y] + 0.7 * torch.randn(len(y), 1, 16, 16, generator=generator, dtype=torch.float64)
            for y in (support_y, target_y)
        )
        own = {name: value[index] for name, value in extra.items()}
        tasks.append(Task(support, support_y, target, target_y, **own))
    return tasks


class MLP(nn.Module):
    """Vectors (examples, 4) through a body without norms to a linear head."""

    def __init__(self, ways: int = 3, width: int = 5) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, width), nn.Tanh())
        self.head = nn.Linear(width, ways)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


def vector_tasks(count: int = 2, ways: int = 3, shots: int = 2, targets: int = 2, **extra: Any) -> list[Task]:
    generator = torch.Generator().manual_seed(11)
    tasks = []
    for index in range(count):
        support_y, target_y = (torch.arange(ways).repeat(n) for n in (shots, targets))
        centres = torch.randn(ways, 4, generator=generator, dtype=torch.float64)
        support, target = (
            centres[y] + 0.3 * torch.randn(len(y), 4, generator=generator, dtype=torch.float64)
            for y in (support_y, target_y)
        )
        own = {name: value[index] for name, value in extra.items()}
        tasks.append(Task(support, support_y, target, target_y, **own))
    return tasks


def gradients(learner: Any) -> dict[str, Tensor | None]:
    """Of everything that is learned, after a meta_step or a backward pass."""
    found = {name: p.grad for name, p in learner.named_parameters() if p.requires_grad}
    return {name: None if g is None else g.detach().clone() for name, g in found.items()}


def assert_evaluation_is_the_deployed_module(learner: Any, task: Task, **keywords: Any) -> None:
    """What evaluate predicts is what the adapted module predicts, under every norm policy; nothing is touched."""
    before, state = fingerprint(learner), copy.deepcopy(learner.state_dict())
    found = learner.evaluate(task, keep_predictions=True, **keywords).predictions[0]
    module = learner.adapt(task.support_x, task.support_y, **keywords)
    assert type(module) is type(learner.unwrap())
    assert not any(parameter.grad is not None for parameter in module.parameters())
    with torch.no_grad():
        torch.testing.assert_close(module(task.target_x), found, rtol=1e-9, atol=1e-9)
        again = pickle.loads(pickle.dumps(module))
        torch.testing.assert_close(again(task.target_x), found, rtol=1e-9, atol=1e-9)
    assert fingerprint(learner) == before
    assert_same_state(learner.state_dict(), state)


def assert_survives_storage(build: Any, learner: Any, batches: list[Any]) -> None:
    """A state_dict in a fresh learner before any task, a deep copy and a pickle all go on as the learner does."""
    learner.meta_step(batches[0])
    fresh = build()
    fresh.load_state_dict(learner.state_dict())
    fresh.optimizer.load_state_dict(copy.deepcopy(learner.optimizer.state_dict()))
    others = [fresh, copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))]
    for batch in batches[1:]:
        loss = learner.meta_step(batch).loss
        for other in others:
            assert other.meta_step(batch).loss == loss
    for other in others:
        assert_same_state(other.state_dict(), learner.state_dict())


def assert_same_gradient_however_it_is_run(build: Any, batch: list[Task]) -> None:
    """meta_step in chunks of any size, forward and backward, and the mean of single tasks: one gradient."""
    found = []
    for chunk in (1, 2, len(batch)):
        learner = build(tasks_per_backward=chunk)
        learner.meta_step(batch)
        found.append(gradients(learner))
    learner = build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MetaWrapWarning)  # What it learns besides the network is made then.
        learner(batch).loss.backward()
    found.append(gradients(learner))
    single = []
    for task in batch:
        learner = build()
        learner.meta_step([task])
        single.append(gradients(learner))
    for name, expected in found[0].items():
        for other in found[1:]:
            if expected is None:
                assert other[name] is None, name
            else:
                torch.testing.assert_close(other[name], expected, rtol=1e-9, atol=1e-12)
        parts = [one[name] for one in single if one.get(name) is not None]
        if expected is not None and all(part.shape == expected.shape for part in parts):
            torch.testing.assert_close(sum(parts) / len(batch), expected, rtol=1e-9, atol=1e-12)


def assert_a_failed_call_changes_nothing(learner: Any, call: Any, batch: Any, *, raises: Any = TaskError) -> None:
    """Everything that is learned, by identity and value, and the optimizer: its groups, their order, its state."""

    def known() -> Any:
        groups = [[id(p) for p in group["params"]] for group in learner.optimizer.param_groups]
        return fingerprint(learner), groups, set(map(id, learner.optimizer.state))

    before, state, head = known(), copy.deepcopy(learner.state_dict()), learner.head
    optimizer = copy.deepcopy(learner.optimizer.state_dict())
    with pytest.raises(raises):
        call(batch)
    assert known() == before
    assert learner.head == head
    assert_same_state(dict(learner.state_dict()), dict(state))
    assert_same_state(learner.optimizer.state_dict(), optimizer)


def assert_learns(learner: Any, batch: Any, steps: int, factor: float) -> None:
    first = learner.meta_step(batch).loss
    for _ in range(steps):
        last = learner.meta_step(batch).loss
    assert last < factor * first, (first, last)
