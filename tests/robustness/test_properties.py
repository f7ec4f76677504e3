"""Properties that hold for every task shape and every episode, tried on what hypothesis thinks of."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import NormedMlp, TwoInputs, seeded
from torch import Tensor

from metawrap import MAML, Task, TaskBatch, TaskError
from metawrap.data import EpisodeSampler, LabelledImages
from metawrap.tasks import as_task_batch

# The same examples at every run, few enough to be quick.
quick = settings(deadline=None, derandomize=True, max_examples=25, database=None)
counts = st.integers(1, 4)
FORMS = {"tensor": lambda x: x, "tuple": lambda x: (x, x.flip(-1)), "dict": lambda x: {"left": x, "right": x * 2}}


def numbered(*shape: int) -> Tensor:
    """Each number is its own place, so that a number that moved is seen."""
    return torch.arange(int(np.prod(shape)), dtype=torch.float64).reshape(shape)


@quick
@given(
    tasks=counts,
    ways=counts,
    shots=counts,
    targets=counts,
    dims=st.lists(counts, max_size=3),
    form=st.sampled_from(sorted(FORMS)),
)
def test_a_stacked_batch_is_its_tasks_in_order(tasks, ways, shots, targets, dims, form) -> None:
    sx, tx = numbered(tasks, ways * shots, *dims), numbered(tasks, ways * targets, *dims)
    sy, ty = (torch.arange(ways).repeat_interleave(n).repeat(tasks, 1) for n in (shots, targets))
    batch = as_task_batch((FORMS[form](sx), sy, FORMS[form](tx), ty))
    assert len(batch) == tasks
    for place, task in enumerate(batch):
        expected = FORMS[form](sx[place]) if dims else None
        if dims:
            flat = lambda x: list(x.values()) if isinstance(x, dict) else list(x) if isinstance(x, tuple) else [x]
            assert all(torch.equal(a, b) for a, b in zip(flat(task.support_x), flat(expected), strict=True))
        assert task.support_y.tolist() == [label for label in range(ways) for _ in range(shots)]
        assert len(task.target_y) == ways * targets


@quick
@given(sizes=st.lists(st.tuples(counts, counts), min_size=1, max_size=5), chunk=st.integers(1, 6))
def test_a_list_of_tasks_of_any_sizes_keeps_them_and_its_chunks_are_all_of_it(sizes, chunk) -> None:
    tasks = [
        Task(numbered(a, 2), torch.zeros(a), numbered(b, 2), torch.zeros(b), id=i) for i, (a, b) in enumerate(sizes)
    ]
    batch = as_task_batch(tasks)
    assert [len(task.support_y) for task in batch] == [a for a, _ in sizes]
    assert [task.id for part in batch.chunks(chunk) for task in part] == list(range(len(sizes)))
    assert max(map(len, batch.chunks(chunk))) <= chunk


@quick
@given(examples=st.integers(1, 5), labels=st.integers(0, 5))
def test_a_task_is_made_if_and_only_if_each_example_has_a_label(examples, labels) -> None:
    make = lambda: Task(numbered(examples, 2), torch.zeros(labels), numbered(1, 2), torch.zeros(1))
    if examples == labels:
        assert len(make().support_x) == examples
    else:
        with pytest.raises(TaskError, match="support"):
            make()


@cache
def learner(form: str) -> Any:
    return MAML(seeded(NormedMlp if form == "tensor" else TwoInputs), inner_steps=1, engine="functional", norm="batch")


@settings(quick, max_examples=12)
@given(data=st.data(), form=st.sampled_from(sorted(FORMS)))
@pytest.mark.filterwarnings("ignore:The network has")
def test_the_loss_of_a_batch_is_the_mean_of_its_tasks_alone_whatever_their_shapes(data, form) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    inputs = {
        "tensor": lambda n: draw(n, 4),
        "tuple": lambda n: (draw(n, 2), draw(n, 3)),
        "dict": lambda n: {"right": draw(n, 3), "left": draw(n, 2)},
    }[form]
    sizes = data.draw(st.lists(st.tuples(st.integers(2, 5), st.integers(2, 5)), min_size=1, max_size=3))
    tasks = [Task(inputs(a), torch.arange(a) % 3, inputs(b), torch.arange(b) % 3) for a, b in sizes]
    whole = learner(form)(tasks).loss.detach()
    alone = [learner(form)([task]).loss.detach() for task in tasks]
    assert float(whole) == pytest.approx(float(torch.stack(alone).mean()), rel=1e-12)


def images_of(per_class: list[int], side: int) -> LabelledImages:
    """Each image's first pixels hold its number, and they differ in every quarter turn."""
    total = sum(per_class)
    pixels = torch.zeros(total, 1, side, side, dtype=torch.uint8)
    pixels[:, 0, 0, 0] = torch.arange(1, total + 1)
    pixels[:, 0, 0, 1] = 200
    labels = torch.repeat_interleave(torch.arange(len(per_class)), torch.tensor(per_class))
    return LabelledImages(pixels, labels, tuple(f"c{place}" for place in range(len(per_class))))


def read(image: Tensor) -> tuple[int, int]:
    """The number of an image, and its quarter turns, found by turning it back with numpy."""
    pixels = (image[0] * 255).round().to(torch.uint8).numpy()
    found = [
        (int(back[0, 0]), turns) for turns in range(4) if (back := np.rot90(pixels, -turns))[0, 1] == 200 and back[0, 0]
    ]
    assert len(found) == 1
    return found[0]


@settings(quick, max_examples=40)
@given(
    per_class=st.lists(st.integers(3, 6), min_size=2, max_size=6),
    ways=st.integers(1, 8),
    shots=st.integers(1, 2),
    targets=st.just(1),
    rotations=st.booleans(),
    tasks=st.integers(1, 3),
    seed=st.integers(0, 2**40),
    index=st.integers(0, 2**40),
)
def test_an_episode_is_balanced_repeats_nothing_and_depends_on_seed_and_index_alone(
    per_class, ways, shots, targets, rotations, tasks, seed, index
) -> None:
    images = images_of(per_class, 3)
    ways = min(ways, len(per_class) * (4 if rotations else 1))
    options: dict[str, Any] = {"ways": ways, "shots": shots, "targets": targets, "tasks_per_batch": tasks}
    sampler = EpisodeSampler(images, seed=seed, rotations=rotations, **options)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    batch = sampler.batch(index)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()
    assert len(batch) == tasks
    for task in batch:
        seen: list[tuple[int, int]] = []
        classes: dict[int, set[tuple[int, int]]] = {}
        for x, y, count in ((task.support_x, task.support_y, shots), (task.target_x, task.target_y, targets)):
            assert y.bincount(minlength=ways).tolist() == [count] * ways
            for image, label in zip(x, y.tolist(), strict=True):
                number, turns = read(image)
                assert rotations or turns == 0
                seen.append((number, turns))
                classes.setdefault(label, set()).add((int(images.labels[number - 1]), turns))
        assert len(set(seen)) == len(seen)  # No image twice,
        assert all(len(each) == 1 for each in classes.values())  # one class and turn to a label,
        kinds = [next(iter(classes[label])) for label in range(ways)]
        assert len(set(kinds)) == ways  # and no class twice.
        assert task.classes == tuple(kind + turns * len(per_class) for kind, turns in kinds)
    # Another sampler, asked for other batches first, gives the same.
    again = EpisodeSampler(images, seed=seed, rotations=rotations, **options)
    again.batch(index + 1)
    same(again.batch(index), batch)


def same(found: TaskBatch, expected: TaskBatch) -> None:
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.parts(), other.parts(), strict=True))
