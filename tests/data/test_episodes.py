from __future__ import annotations

import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch
from data_helpers import checksum, numbered_images
from refusals import refuses

from metawrap.data import EpisodeSampler, LabelledImages
from metawrap.data.random_stream import RandomStream
from metawrap.errors import ArgumentError, DataError


def origins(images: LabelledImages) -> dict[bytes, tuple[int, int, int]]:
    """Pixels -> (class, image, quarter turns), made with NumPy, one image at a time."""
    return {
        np.rot90(picture, turns, axes=(1, 2)).tobytes(): (int(label), number, turns)
        for number, (picture, label) in enumerate(zip(images.images.numpy(), images.labels, strict=True))
        for turns in range(4)
    }


def as_bytes(x: torch.Tensor) -> list[bytes]:
    return [picture.tobytes() for picture in (x * 255).round().to(torch.uint8).numpy()]


@pytest.mark.parametrize("rotations", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_task_is_balanced_true_to_the_images_and_without_repeats(rotations, channels):
    images = numbered_images(classes=6, per_class=5, channels=channels)
    known = origins(images)
    sampler = EpisodeSampler(images, ways=4, shots=2, targets=3, tasks_per_batch=3, seed=1, rotations=rotations)
    for task in itertools.chain.from_iterable(sampler.batches(20)):
        assert task.support_x.shape == (8, channels, 4, 4)
        assert task.support_x.dtype == torch.float32
        assert task.support_y.dtype == torch.int64
        assert task.support_y.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert task.target_y.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
        found = [known[key] for key in as_bytes(task.support_x) + as_bytes(task.target_x)]
        assert len({(number, turns) for _, number, turns in found}) == 20
        class_of_label = {}
        for label, (cls, _, turns) in zip([*task.support_y.tolist(), *task.target_y.tolist()], found, strict=True):
            assert class_of_label.setdefault(label, (cls, turns)) == (cls, turns)
        assert len(set(class_of_label.values())) == 4
        assert rotations or all(turns == 0 for _, turns in class_of_label.values())


def test_all_classes_turns_images_and_labels_are_drawn_equally_often():
    images = numbered_images(classes=6, per_class=5)
    known = origins(images)
    sampler = EpisodeSampler(images, ways=4, tasks_per_batch=100, rotations=True, seed=5)
    classes, pictures = Counter(), Counter()
    for task in itertools.chain.from_iterable(sampler.batches(12)):
        for label, key in zip(task.support_y.tolist(), as_bytes(task.support_x), strict=True):
            cls, number, turns = known[key]
            classes[cls, turns, label] += 1
            pictures[number, turns] += 1
    assert len(classes) == 6 * 4 * 4
    assert len(pictures) == 30 * 4
    # 4800 draws: 50 and 40 expected in each cell; six standard deviations.
    assert max(abs(count - 50) for count in classes.values()) < 43
    assert max(abs(count - 40) for count in pictures.values()) < 38


def test_pixels_are_scaled_to_zero_and_one():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1)
    images = LabelledImages(pixels.repeat(2, 1, 1, 1), torch.tensor([0, 0, 0, 1, 1, 1]), ("a", "b"))
    seen = {
        round(value, 6)
        for task in itertools.chain.from_iterable(EpisodeSampler(images, ways=2).batches(20))
        for value in task.support_x.flatten().tolist()
    }
    assert seen == {0.0, 0.2, 1.0}


def test_same_seed_gives_the_episodes_recorded_once():
    sampler = EpisodeSampler(numbered_images(), ways=3, shots=2, tasks_per_batch=2, seed=7, rotations=True)
    assert [checksum(sampler.batch(index)) for index in (0, 1, 1000)] == RECORDED


def test_raw_draws_are_those_recorded_once():
    assert RandomStream(7, 3).raw(2).tolist() == RECORDED_RAW
    assert RandomStream("name").permutation(8).tolist() == RECORDED_PERMUTATION


def test_distinct_draws_are_distinct_and_in_range_in_every_row():
    sizes = np.array([3, 10, 4])
    drawn = RandomStream(1).distinct(sizes, 3)
    assert drawn.shape == (3, 3)
    for row, size in zip(drawn, sizes, strict=True):
        assert len(set(row.tolist())) == 3
        assert set(row.tolist()) <= set(range(size))


def test_a_batch_depends_on_its_index_alone():
    make = lambda seed: EpisodeSampler(numbered_images(), ways=3, tasks_per_batch=2, seed=seed)
    forward = [checksum(make(0).batch(index)) for index in range(6)]
    sampler = make(0)
    assert [checksum(sampler.batch(index)) for index in reversed(range(6))] == forward[::-1]
    assert [checksum(batch) for batch in sampler.batches(3, start=2)] == forward[2:5]
    assert [checksum(batch) for batch in itertools.islice(sampler, 4)] == forward[:4]
    assert len({*forward, checksum(make(1).batch(0))}) == 7


def test_writing_into_a_batch_changes_no_later_batch():
    sampler = EpisodeSampler(numbered_images(), ways=3, tasks_per_batch=2)
    before = checksum(sampler.batch(0))
    for task in sampler.batch(0):
        for part in task.parts():
            part.zero_()
    assert checksum(sampler.batch(0)) == before


def test_the_global_random_number_generators_are_not_moved():
    def states() -> list[object]:
        name, keys, *rest = np.random.get_state()
        return [torch.get_rng_state().tolist(), name, keys.tolist(), rest, random.getstate()]

    before = states()
    list(EpisodeSampler(numbered_images(), ways=3, rotations=True).batches(3))
    assert states() == before


def test_classes_of_unequal_size_are_drawn_within_their_own_images():
    labels = torch.tensor([0, 1, 1, 0, 1, 1, 2, 2, 2])
    images = LabelledImages(torch.arange(9, dtype=torch.uint8).view(9, 1, 1, 1), labels, ("a", "b", "c"))
    for task in itertools.chain.from_iterable(EpisodeSampler(images, ways=3, tasks_per_batch=9).batches(9)):
        support, target = ((x * 255).round().long().flatten() for x in (task.support_x, task.target_x))
        assert torch.equal(labels[support], labels[target])
        assert not torch.equal(support, target)


def test_too_few_classes_are_refused_with_the_number_there_is():
    with pytest.raises(DataError, match=r"ways=7, but the set has only 6 classes \(.* and 1 more\)\. Use ways=6"):
        EpisodeSampler(numbered_images(classes=6), ways=7)
    with pytest.raises(
        DataError, match=r"ways=25, but the set has only 6 classes \(.*, 24 with rotations\)\. Use ways=24"
    ):
        EpisodeSampler(numbered_images(classes=6), ways=25, rotations=True)
    assert EpisodeSampler(numbered_images(classes=6), ways=24, rotations=True).num_classes == 24


def test_a_class_with_too_few_images_is_named_with_both_numbers():
    with pytest.raises(
        DataError, match=r"shots \+ targets = 2 \+ 4 = 6 .* 6 with fewer: 'class0' \(5\).*Use shots=2, targets=3"
    ):
        EpisodeSampler(numbered_images(per_class=5), shots=2, targets=4)


def test_rotations_of_oblong_images_are_refused():
    oblong = LabelledImages(torch.zeros(4, 1, 2, 3, dtype=torch.uint8), torch.tensor([0, 0, 1, 1]), ("a", "b"))
    refuses(DataError, r"2x3.*rotations=False", EpisodeSampler, oblong, ways=2, rotations=True)


@pytest.mark.parametrize("name", ["ways", "shots", "targets", "tasks_per_batch"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2", None])
def test_counts_that_are_no_positive_integers_are_refused(name, value):
    with pytest.raises(ArgumentError, match=rf"{name}: expected an integer of at least 1"):
        EpisodeSampler(numbered_images(), **{"ways": 2, name: value})


def test_other_wrong_arguments_are_refused():
    refuses(ArgumentError, r"seed: expected an integer of at least 0", EpisodeSampler, numbered_images(), seed=-1)
    refuses(ArgumentError, r"images: expected LabelledImages", EpisodeSampler, torch.zeros(3))
    sampler = EpisodeSampler(numbered_images())
    refuses(ArgumentError, r"index: ", sampler.batch, -1)
    refuses(ArgumentError, r"count: ", sampler.batches, -1)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("free", [None, 0])
def test_cuda_episodes_equal_cpu_episodes_wherever_the_images_are_kept(free, monkeypatch):
    if free is not None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1))
    options = {"ways": 3, "shots": 2, "tasks_per_batch": 2, "rotations": True}
    on_gpu = EpisodeSampler(numbered_images(), device="cuda", **options).batch(4)
    assert all(part.is_cuda for task in on_gpu for part in task.parts())
    assert checksum(on_gpu) == checksum(EpisodeSampler(numbered_images(), **options).batch(4))


RECORDED = ["f795c5202c9a7257", "c81042308640bd2d", "b911d4c0d7acf386"]
RECORDED_RAW = [17986194428743177670, 16317385439118320161]
RECORDED_PERMUTATION = [2, 4, 1, 7, 6, 3, 0, 5]
