"""Four bare parts are tasks or one task: read as tasks where shapes leave no doubt, else refused with both ways out."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from models import Mlp, class_tasks, seeded
from torch import Tensor, nn

from metawrap import MAML, ProtoNet, Task, TaskBatch, TaskError
from metawrap.backbones import Conv4
from metawrap.data import EpisodeSampler, load_data

CALLS = {"meta_step": lambda it, b: it.meta_step(b), "forward": lambda it, b: it(b)}
CALLS |= {
    "evaluate": lambda it, b: it.evaluate(b),
    "evaluate, a loader": lambda it, b: it.evaluate([list(b)]),
    "find_trouble": lambda it, b: it.find_trouble(b),
}


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def whole(*shape: int) -> Tensor:
    return torch.arange(int(np.prod(shape))).reshape(shape) % 3


def twice(x: Any, y: Tensor) -> tuple[Any, ...]:
    return x, y, x, y


def squares(found: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(found, y)


DOUBTFUL = {
    "(10, 1) each": twice(numbers(10, 1), numbers(10, 1)),
    "several numbers in, several out": twice(numbers(12, 3), numbers(12, 2)),
    "multi-hot": twice(numbers(12, 3), whole(12, 3).bool()),
    "images to images": twice(numbers(4, 3, 8, 8), numbers(4, 3, 8, 8)),
    "images to as many numbers as channels": twice(numbers(4, 3, 8, 8), numbers(4, 3)),
    "one channel": twice(numbers(10, 1, 5), numbers(10, 1)),
    "one channel, a column of classes": twice(numbers(10, 1, 5), whole(10, 1)),
    "tokens and their tags": twice(whole(8, 12), whole(8, 12)),
    "tokens and their tags, of unlike lengths": (whole(8, 12), whole(8, 12), whole(8, 9), whole(8, 9)),
    "maps of classes": twice(numbers(4, 8, 8), whole(4, 8, 8)),
    "a dict": twice({"x": numbers(10, 4)}, numbers(10, 4)),
}
TASKS = {
    "classes": (twice(numbers(4, 6, 3), whole(4, 6)), 4),
    "classes of images": (twice(numbers(4, 6, 1, 8, 8), whole(4, 6)), 4),
    "classes of sentences": (twice(whole(2, 6, 5), whole(2, 6)), 2),
    "curves": (twice(numbers(5, 10, 1), numbers(5, 10, 1)), 5),
    "curves of unlike sizes": ((numbers(5, 10, 1), numbers(5, 10, 1), numbers(5, 7, 1), numbers(5, 7, 1)), 5),
    "one number each, unlike sizes": ((numbers(5, 4, 2), numbers(5, 4), numbers(5, 7, 2), numbers(5, 7)), 5),
    "maps of classes": (twice(numbers(2, 3, 1, 8, 8), whole(2, 3, 8, 8)), 2),
    "a dict": (twice({"x": numbers(4, 6, 3)}, whole(4, 6)), 4),
}


class Sum(nn.Module):
    """Takes all inputs there are, and gives one number for the whole of them, which any loss can take."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x.double().mean()


def learner() -> Any:
    return MAML(Sum(), inner_steps=1, engine="functional", loss_fn=lambda p, y: (p - y.double().mean()) ** 2)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("form", DOUBTFUL)
def test_parts_that_can_be_one_task_are_refused_and_both_ways_out_work(form: str, call: str) -> None:
    parts, it = DOUBTFUL[form], learner()
    with pytest.raises(TaskError, match=r"count tasks.*TaskBatch\.stacked\(\*parts\).*or Task\(\*parts\)"):
        CALLS[call](it, parts)
    assert it.iteration == 0
    assert it.evaluate(Task(*parts)).per_task.shape == (1,)
    if form != "several numbers in, several out":
        assert it.evaluate(TaskBatch.stacked(*parts)).per_task.shape == (len(parts[1]),)


@pytest.mark.parametrize("form", TASKS)
def test_parts_that_can_only_be_tasks_are_read_as_tasks(form: str) -> None:
    parts, tasks = TASKS[form]
    for given in (parts, list(parts), [list(parts)], (each for each in [parts])):
        assert learner().evaluate(given).per_task.shape == (tasks,)


def test_one_task_of_numbers_has_the_loss_that_numpy_computes() -> None:
    sx, sy, tx, ty = (numbers(size, 1).numpy() for size in (10, 11, 12, 13))
    sy, ty = sy[:10], ty[:12]
    model = nn.Linear(1, 1).double()
    w, b = (float(p.detach()) for p in model.parameters())
    wrong = w * sx + b - sy
    w, b = w - 0.1 * 2 * (wrong * sx).mean(), b - 0.1 * 2 * wrong.mean()
    expected = float(((w * tx + b - ty) ** 2).mean())
    parts = [torch.from_numpy(part) for part in (sx, sy, tx, ty)]
    it = MAML(model, inner_steps=1, inner_lr=0.1, loss_fn=nn.functional.mse_loss)
    with pytest.raises(TaskError, match=r"number of tasks|count tasks"):
        it.meta_step(tuple(parts))
    assert it.evaluate(Task(*parts)).loss == pytest.approx(expected, rel=1e-12)
    assert it.meta_step(Task(*parts)).loss == pytest.approx(expected, rel=1e-12)


def test_four_batches_in_a_list_are_four_batches() -> None:
    parts, it = class_tasks((4,), tasks=2), MAML(seeded(lambda: Mlp(4, 6, 3)), inner_steps=1, engine="functional")
    for batch in (TaskBatch.stacked(*parts), parts, list(parts)):
        assert it.evaluate([batch] * 4).per_task.shape == (8,)


class Finite(EpisodeSampler):
    def __iter__(self) -> Any:
        return self.batches(2)


def test_what_never_ends_is_refused_by_name_and_the_advice_works() -> None:
    images = load_data("glyphs").train
    sampler, it = EpisodeSampler(images), ProtoNet(Conv4(filters=2))
    with pytest.raises(TaskError, match=r"EpisodeSampler never ends.*tasks\.batches\(100\)"):
        it.evaluate(sampler)
    assert len(it.evaluate(sampler.batches(3)).per_task) == 3
    batch = sampler.batch(0)
    for tasks in (itertools.cycle([batch]), itertools.repeat(batch), itertools.count()):
        with pytest.raises(TaskError, match=rf"{type(tasks).__name__} never ends.*itertools\.islice\(tasks, 100\)"):
            it.evaluate(tasks)
    for ends in (itertools.islice(itertools.cycle([batch]), 2), itertools.repeat(batch, 2), Finite(images)):
        assert len(it.evaluate(ends).per_task) == 2
