"""Samplers under torch's DataLoader, over a user's own data set, as a benchmark, and at a prompt."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from data_helpers import checksum, numbered_images
from refusals import refuses
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torch.utils.data._utils.pin_memory import pin_memory

import metawrap
from metawrap import ProtoNet
from metawrap.backbones import Conv4
from metawrap.data import DataSplits, EpisodeBatchSampler, EpisodeSampler, load_glyphs, splits_from
from metawrap.data.episode_splits import TEST_SEED, VALIDATION_SEED
from metawrap.errors import ArgumentError, DataError, TaskError
from metawrap.training.experiment import fixed_tasks
from metawrap.training.run_settings import RunSettings


def sampler(**how) -> EpisodeSampler:
    return EpisodeSampler(numbered_images(), ways=3, tasks_per_batch=2, seed=7, **how)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_loader_gives_each_batch_once_and_in_order_whatever_the_workers() -> None:
    tasks = sampler()
    expected = [checksum(tasks.batch(index)) for index in range(7)]
    assert len(set(expected)) == 7
    for workers in (0, 3):
        loader = DataLoader(tasks[2:7], batch_size=None, num_workers=workers)
        assert len(loader) == 5
        assert [checksum(batch) for batch in loader] == expected[2:]
    endless = DataLoader(tasks, batch_size=None, num_workers=2)
    assert [checksum(batch) for batch in itertools.islice(endless, 7)] == expected


def test_a_sampler_with_workers_of_its_own_starts_none_inside_a_loaders() -> None:
    images = splits_from(numbered_images(8).images, numbered_images(8).labels, stream=True).train
    tasks = EpisodeSampler(images, ways=2, workers=1)
    found = [checksum(batch) for batch in DataLoader(tasks[:3], batch_size=None, num_workers=1)]
    assert found == [checksum(tasks.batch(index)) for index in range(3)]


def test_a_data_set_around_a_sampler_is_not_divided_among_the_workers() -> None:
    """A class that divides by itself would lose tasks if the sampler divided a second time."""

    class Own(IterableDataset):
        def __iter__(self):
            worker = torch.utils.data.get_worker_info()
            return iter(sampler().batches(2, start=2 * worker.id))

    found = [checksum(batch) for batch in DataLoader(Own(), batch_size=None, num_workers=2)]
    assert sorted(found) == sorted(checksum(sampler().batch(index)) for index in range(4))


def test_a_loader_finds_how_to_pin_every_tensor_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)  # As a machine without a GPU cannot.
    [plain, _], [pinned, _] = (batch := sampler().batch(0)), pin_memory(batch)
    for before, after in zip(plain.parts(), pinned.parts(), strict=True):
        assert torch.equal(after, before + 1)
    assert pinned.classes == plain.classes


def test_loaders_without_an_end_and_slices_that_are_none_are_refused() -> None:
    learner = ProtoNet(Conv4(filters=2, image_size=16, ways=3))
    images = EpisodeSampler(numbered_images(side=16), ways=3)
    labels = EpisodeBatchSampler([0, 0, 1, 1], ways=2)
    data = TensorDataset(torch.rand(4, 1, 16, 16))
    for loader in (DataLoader(images, batch_size=None), DataLoader(data, batch_sampler=labels)):
        refuses(TaskError, "DataLoader never ends", learner.evaluate, loader)
    assert len(learner.evaluate(DataLoader(images[:3], batch_size=None)).per_task) == 3
    for wrong in (3, slice(5), slice(2, None)):
        with pytest.raises(ArgumentError, match=r"place: expected a slice such as \[:100\]"):
            images[wrong if isinstance(wrong, int) else slice(wrong.start, None)]
    with pytest.raises(ArgumentError, match=r"start: expected an integer of at least 0"):
        images[-2:3]
    elsewhere = EpisodeSampler(numbered_images(), ways=3, device="meta")
    with pytest.raises(ArgumentError, match=r"device: expected 'cpu' in the workers .*batch\.to\(device\)"):
        list(DataLoader(elsewhere[:2], batch_size=None, num_workers=1))


class Words(Dataset):
    """Items of two inputs; the first is the item's own number, so that a task tells its items."""

    def __init__(self, labels) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: int):
        return {"place": torch.tensor([place]), "noise": torch.rand(2, 3)}, self.labels[place]


LABELS = [*"cabbacdddabcabcddcba", "rare"]


@pytest.mark.parametrize("workers", [0, 1])
def test_tasks_of_the_users_own_data_set_are_balanced_and_the_same_for_any_workers(workers: int) -> None:
    tasks = EpisodeBatchSampler(LABELS, ways=3, shots=2, targets=1, tasks_per_batch=2, seed=3, classes=list("abcd"))
    loader = DataLoader(Words(LABELS), batch_sampler=tasks[4:24], collate_fn=tasks.collate, num_workers=workers)
    assert (len(loader), tasks.num_classes) == (20, 4)
    seen = Counter()
    for number, batch in enumerate(loader, 4):
        assert len(batch) == 2
        places = [task.support_x["place"].tolist() + task.target_x["place"].tolist() for task in batch]
        by_task = torch.tensor(tasks.batch(number)).view(2, 3, 3)
        drawn = [(t[:, :2].reshape(-1, 1).tolist(), t[:, 2:].reshape(-1, 1).tolist()) for t in by_task]
        assert places == [support + target for support, target in drawn]
        for task, [*place] in zip(batch, places, strict=True):
            assert (task.support_y.tolist(), task.target_y.tolist()) == ([0, 0, 1, 1, 2, 2], [0, 1, 2])
            assert task.support_x["noise"].shape == (6, 2, 3)
            names = [LABELS[each] for [each] in place]
            assert names == [name for name in names[:6:2] for _ in range(2)] + names[:6:2]
            assert len({each for [each] in place}) == 9
            assert ["abcd"[one] for one in task.classes] == names[:6:2]
            seen.update(names[:6:2])
    assert set(seen) == set("abcd")


def test_whole_numbers_of_any_kind_are_labels_and_the_items_must_have_them() -> None:
    labels = torch.tensor([30, 4, 4, 30, 9, 9])
    tasks = EpisodeBatchSampler(labels, ways=2, seed=1)
    same = [EpisodeBatchSampler(form, ways=2, seed=1).batch(5) for form in (labels.numpy(), labels.tolist())]
    assert same == [tasks.batch(5)] * 2
    loader = DataLoader(TensorDataset(torch.rand(6, 2), labels), batch_sampler=tasks[:9], collate_fn=tasks.collate)
    classes = {task.classes for batch in loader for task in batch}
    assert {number for pair in classes for number in pair} == {0, 1, 2}
    shuffled = TensorDataset(torch.rand(6, 2), labels.roll(1))
    with pytest.raises(DataError, match=r"labels: the items of a batch have the labels .* in its order"):
        list(DataLoader(shuffled, batch_sampler=tasks[:9], collate_fn=tasks.collate))
    refuses(ArgumentError, r"items: expected 4 pairs \(x, y\).*one sampler", tasks.collate, [(1, 30), (1, 30)])
    refuses(ArgumentError, "labels: expected a list, array or tensor of labels", EpisodeBatchSampler, "abc")
    refuses(ArgumentError, "labels: expected whole numbers alone or texts", EpisodeBatchSampler, [1, "a"])
    refuses(ArgumentError, "labels: expected whole numbers alone or texts", EpisodeBatchSampler, torch.rand(4))
    refuses(ArgumentError, "classes: expected labels of the data set", EpisodeBatchSampler, labels, classes=[5])
    refuses(DataError, "ways=4, but the set has only 3 classes", EpisodeBatchSampler, labels, ways=4)
    refuses(DataError, r"shots \+ targets = 2 \+ 1", EpisodeBatchSampler, labels, ways=3, shots=2)


def test_a_benchmark_has_the_split_and_the_evaluation_tasks_of_a_run() -> None:
    train, validation, test = metawrap.benchmark("glyphs", ways=4, shots=2, targets=3, classes=(6, 4, 5), seed=9)
    assert [part.num_classes for part in (train, validation, test)] == [6, 4, 5]
    settings, splits = RunSettings(data="glyphs", ways=4, shots=2, targets=3), load_glyphs((6, 4, 5))
    of_a_run = fixed_tasks(settings, splits.test, 600, TEST_SEED, torch.device("cpu"))
    assert checksum(test.batch(29)) == checksum(of_a_run.batch(29))
    of_a_run = fixed_tasks(settings, splits.validation, 200, VALIDATION_SEED, torch.device("cpu"))
    assert checksum(validation.batch(9)) == checksum(of_a_run.batch(9))
    assert (train.seed, train.rotations, train.tasks_per_batch) == (9, False, 4)
    turned = metawrap.benchmark("glyphs", classes=(6, 5, 5), rotations=True, tasks_per_batch=2)
    assert [part.num_classes for part in turned] == [24, 5, 5]
    refuses(DataError, "ways=5, but validation has only 4 classes", metawrap.benchmark, "glyphs", classes=(6, 4, 5))
    refuses(DataError, "Did you mean 'mini-imagenet'", metawrap.benchmark, "miniimagenet", "here")


def test_omniglot_and_photographs_are_prepared_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    images = numbered_images(classes=5, per_class=16, channels=3)
    monkeypatch.setattr("metawrap.data.episode_splits.load_data", lambda *_, **__: DataSplits(*[images] * 3))
    omniglot, photographs = (metawrap.benchmark(name, "root") for name in ("omniglot", "mini-imagenet"))
    assert [part.num_classes for part in omniglot] == [20, 5, 5]
    assert [part.num_classes for part in photographs] == [5, 5, 5]
    mean, deviation = (torch.tensor(each).view(3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    plain, normal = (each.test.batch(0)[0].support_x for each in (omniglot, photographs))
    torch.testing.assert_close(normal, (plain - mean) / deviation)


def test_data_objects_show_themselves_in_at_most_three_short_lines() -> None:
    images = numbered_images(classes=4, per_class=20)
    parts = splits_from(
        images.images,
        [*images.labels.tolist()[:-1], 0],
        stream=True,
        split={p: [i] for i, p in enumerate(("train", "val", "test"))},
    )
    tasks, own = sampler(rotations=True), EpisodeBatchSampler(LABELS[:-1], ways=2)
    batch = tasks.batch(0)
    names = "'class0', 'class1', 'class2' and 1 more"
    assert repr(images) == f"LabelledImages: 4 classes, 80 images of 1 x 4 x 4\n20 images in a class; {names}"
    assert repr(parts.train) == "StreamedImages: 1 class, 21 images of 1 x 4 x 4\n21 images in a class; '0'"
    assert repr(parts).splitlines()[1] == "validation: 1 class, 20 images of 1 x 4 x 4"
    assert repr(tasks) == (
        "EpisodeSampler(ways=3, shots=1, targets=1, tasks_per_batch=2, seed=7)\n"
        "6 classes, 30 images of 1 x 4 x 4, 24 classes with rotations"
    )
    assert repr(batch).startswith(
        "TaskBatch of 2 tasks, the first with\nsupport_x: a torch.float32 tensor of shape (3, 1"
    )
    assert repr(batch[0]).startswith(f"Task(classes={batch[0].classes})\nsupport_x: ")
    benchmark = metawrap.benchmark("glyphs", classes=(5, 5, 5))
    assert repr(benchmark).startswith("train:      ways=5, shots=1, targets=15, tasks_per_batch=4, num_classes=5\n")
    for each in (images, parts, parts.test, tasks, tasks[:9], own, own[3:9], batch, batch[0], benchmark):
        assert len(lines := repr(each).splitlines()) <= 3
        assert max(map(len, lines)) <= 120
