"""What holds for every method that learns parts of its own on an embedding; each check takes the method's class."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from face import assert_same_state, fingerprint
from models import Conv4, NormedMlp, class_tasks, seeded
from torch import Tensor, nn

from metawrap import Task, TaskError

SHAPES: dict[str, tuple[Any, tuple[int, ...]]] = {"images": (Conv4, (1, 16, 16)), "vectors": (NormedMlp, (4,))}


class MapNet(nn.Module):
    """Its head takes a map: (examples, 4, 5, 5) enters it."""

    def __init__(self, ways: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Conv2d(4, ways, 5)
        self.flat = nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(self.head(self.body(x)))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(learner: Any, batch: Any, seed: int = 5) -> Any:
    torch.manual_seed(seed)
    return learner.meta_step(batch)


def uneven(shape: tuple[int, ...], ways: int = 3) -> Task:
    labels = torch.cat([torch.full((way + 1,), way) for way in range(ways)])
    asked = torch.arange(ways).repeat(2)
    return Task(numbers(len(labels), *shape), labels, numbers(len(asked), *shape, seed=1), asked)


def check_learns(method: Any, steps: int = 60, **options: Any) -> None:
    batch = class_tasks((4,), targets=4)
    torch.manual_seed(0)  # Of what a method has of its own.
    learner = method(seeded(NormedMlp), meta_lr=0.01, **options)
    first = step(learner, batch).loss
    for seed in range(steps):
        last = step(learner, batch, seed).loss
    assert last < 0.9 * first if first > 0 else last < first, (first, last)


def check_adapted_is_evaluated(method: Any, norm: str, name: str, **options: Any) -> None:
    make, shape = SHAPES[name]
    batch = class_tasks(shape, shots=2)
    learner = method(seeded(make), norm=norm, **options)
    step(learner, batch)
    found = learner.evaluate(batch, keep_predictions=True)
    for task in range(2):
        adapted = pickle.loads(pickle.dumps(learner.adapt(batch[0][task], batch[1][task])))
        torch.testing.assert_close(adapted(batch[2][task]), found.predictions[task], rtol=1e-12, atol=1e-12)


def check_evaluation_changes_nothing(method: Any, **options: Any) -> None:
    batch = class_tasks((1, 16, 16))
    learner = method(seeded(Conv4), **options)
    step(learner, batch)
    before, random = fingerprint(learner), torch.random.get_rng_state()
    first = learner.evaluate(batch)
    learner.adapt(batch[0][0], batch[1][0])
    assert fingerprint(learner) == before
    assert torch.equal(torch.random.get_rng_state(), random)
    assert learner.evaluate(batch).loss == first.loss


def check_own_loop_has_the_gradient_of_meta_step(method: Any, **options: Any) -> None:
    batch = class_tasks((1, 16, 16), tasks=3)
    learner = method(seeded(Conv4), **options)
    step(learner, batch)
    other = copy.deepcopy(learner)
    metrics = step(learner, batch)
    torch.manual_seed(5)
    output = other(batch)
    other.zero_grad()
    output.loss.backward()
    assert metrics.loss == pytest.approx(output.loss.item(), rel=1e-12)
    for (name, one), two in zip(learner.named_parameters(), other.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-9, atol=1e-12)


def check_chunks_do_not_matter(method: Any, **options: Any) -> None:
    batch = class_tasks((4,), tasks=3)
    made = []
    for count in (1, 3):
        torch.manual_seed(0)
        made.append(method(seeded(NormedMlp), execution={"tasks_per_backward": count}, **options))
    one, other = made
    assert step(one, batch).loss == pytest.approx(step(other, batch).loss, rel=1e-12)
    assert_same_gradients(one, other)


def assert_same_gradients(one: Any, other: Any) -> None:
    for (name, first), second in zip(one.named_parameters(), other.parameters(), strict=True):
        if first.grad is not None:
            torch.testing.assert_close(first.grad, second.grad, rtol=1e-9, atol=1e-12, msg=name)


def check_copies_go_on_alike(method: Any, name: str, before: bool, **options: Any) -> None:
    """Copies made before or after the first task, whose size the method's parts take, learn what the learner does."""
    make, shape = SHAPES[name]
    batch = class_tasks(shape, shots=2)
    learner = method(seeded(make), **options)
    if not before:
        step(learner, batch)
    copies = [copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))]
    for _ in range(2):
        step(learner, batch)
    for copied in copies:
        for _ in range(2):
            step(copied, batch)
        assert {p.dtype for p in copied.parameters()} == {torch.float64}
        assert_same_state(tensors(copied), tensors(learner))


def check_state_loads_before_any_task(method: Any, name: str, **options: Any) -> None:
    make, shape = SHAPES[name]
    batch = class_tasks(shape, shots=2)
    learner = method(seeded(make), **options)
    step(learner, batch)
    fresh = method(seeded(make, seed=3), **options)
    fresh.load_state_dict(learner.state_dict())
    fresh.optimizer.load_state_dict(copy.deepcopy(learner.optimizer.state_dict()))
    assert_same_state(tensors(fresh), tensors(learner))
    step(learner, batch)
    step(fresh, batch)
    assert_same_state(tensors(fresh), tensors(learner))


def tensors(learner: Any) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in learner.state_dict().items() if isinstance(value, Tensor)}


def check_precision_follows(method: Any, **options: Any) -> None:
    batch = class_tasks((4,))
    learner = method(seeded(NormedMlp).float(), **options).double()
    step(learner, batch)
    assert {p.dtype for p in learner.parameters()} == {torch.float64}


def check_permuted_labels_permute_logits(method: Any, **options: Any) -> None:
    task = uneven((4,))
    learner = method(seeded(NormedMlp), **options)
    order = torch.tensor([2, 0, 1])
    turned = Task(task.support_x, order[task.support_y], task.target_x, order[task.target_y])
    one, other = learner.evaluate([task, turned], keep_predictions=True).predictions
    torch.testing.assert_close(other[:, order], one, rtol=1e-12, atol=1e-12)


def check_any_ways(method: Any, **options: Any) -> None:
    learner = method(seeded(NormedMlp), **options)
    for ways in (2, 7, 1):
        task = uneven((4,), ways)
        assert torch.isfinite(torch.tensor(step(learner, [task]).loss))
        assert learner.evaluate([task], keep_predictions=True).predictions[0].shape == (2 * ways, ways)


def check_ignored_targets_do_not_count(method: Any, **options: Any) -> None:
    task = uneven((4,))
    labels = task.target_y.clone()
    labels[0] = -100
    learner = method(seeded(NormedMlp), norm="support", **options)
    hidden = Task(task.support_x, task.support_y, task.target_x, labels)
    without = Task(task.support_x, task.support_y, task.target_x[1:], labels[1:])
    one, other = learner.evaluate([hidden]), learner.evaluate([without])
    assert one.loss == pytest.approx(other.loss, rel=1e-12)


def check_regression_is_refused(method: Any, **options: Any) -> None:
    learner = method(seeded(NormedMlp), **options)
    x, y = numbers(4, 4), numbers(4)
    with pytest.raises(TaskError, match="support_y"):
        learner.meta_step([Task(x, y, x, y)])


CONTRACT = (
    check_evaluation_changes_nothing,
    check_own_loop_has_the_gradient_of_meta_step,
    check_chunks_do_not_matter,
    check_precision_follows,
    check_permuted_labels_permute_logits,
    check_any_ways,
    check_ignored_targets_do_not_count,
    check_regression_is_refused,
)
