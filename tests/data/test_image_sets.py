"""Image sets in memory and streamed: the same episodes, with any number of workers; normalisation."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import checksum, make_image_folder, numbered_images, zipped
from published import mini_caches, mini_csv, noise, tiered_pickles
from refusals import refuses

from metawrap.data import (
    EpisodeSampler,
    LabelledImages,
    StreamedImages,
    image_sets,
    load_cub,
    load_data,
    load_image_folder,
    load_mini_imagenet,
    load_tiered_imagenet,
    splits_from,
)
from metawrap.errors import ArgumentError, DataError


def streamed(root: Path, junk: bool = False, classes: int = 4) -> StreamedImages:
    """The train part of a folder, streamed; `junk` breaks every file."""
    make_image_folder(root, range(classes))
    for file in root.rglob("*.png") if junk else ():
        file.write_bytes(b"junk")
    return load_image_folder(root, image_size=6, stream=True).train


def children_beside(before: set) -> set:
    return set(multiprocessing.active_children()) - before


def sets(tmp_path: Path) -> dict[str, tuple]:
    mini_csv(tmp_path / "csv")
    (tmp_path / "cache").mkdir()
    mini_caches(tmp_path / "cache", "class_dict", protocol=4)
    (tmp_path / "text").mkdir()
    mini_caches(tmp_path / "text", "labels", protocol=0)
    tiered_pickles(tmp_path / "tiered")
    return {
        "folder": (load_image_folder, make_image_folder(tmp_path / "folder", range(5), images=4)),
        "csv": (load_mini_imagenet, tmp_path / "csv"),
        "zip": (load_mini_imagenet, zipped(tmp_path / "csv", tmp_path / "csv.zip")),
        "cache": (load_mini_imagenet, tmp_path / "cache"),
        "cache of protocol 0": (load_mini_imagenet, tmp_path / "text"),
        "pictures in a pickle": (load_tiered_imagenet, tmp_path / "tiered"),
    }


def test_streaming_equals_memory_batch_for_batch_with_and_without_workers(tmp_path: Path) -> None:
    for name, (load, root) in sets(tmp_path).items():
        in_memory, on_disk = (load(root, image_size=12, stream=stream).train for stream in (False, True))
        assert in_memory.labels.equal(on_disk.labels)
        assert in_memory.images_per_class == on_disk.images_per_class
        how = {"ways": 3, "shots": 1, "targets": 2, "tasks_per_batch": 2, "seed": 5, "rotations": True}
        expected = [checksum(batch) for batch in EpisodeSampler(in_memory, **how).batches(5, start=3)]
        for workers in (0, 2) if name in ("zip", "cache") else (0,):
            sampler = EpisodeSampler(on_disk, **how, workers=workers)
            assert [checksum(batch) for batch in sampler.batches(5, start=3)] == expected, name
            assert checksum(sampler.batch(4)) == expected[1]
        assert expected[0] != expected[1]


def test_one_batch_does_not_depend_on_the_ones_before_or_the_number_of_workers(tmp_path: Path) -> None:
    images = streamed(tmp_path)
    one, three = (EpisodeSampler(images, ways=2, seed=1, workers=workers) for workers in (1, 3))
    endless = iter(three)
    assert [checksum(next(endless)) for _ in range(4)] == [checksum(batch) for batch in one.batches(4)]


def test_workers_leave_the_global_random_state_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    list(EpisodeSampler(streamed(tmp_path), ways=2, workers=1).batches(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_subset_streams_its_own_classes(tmp_path: Path) -> None:
    on_disk = streamed(tmp_path, classes=9)
    in_memory = load_image_folder(tmp_path, image_size=6, stream=False).train
    for part in (in_memory, on_disk):
        refuses(DataError, "class_indices", part.subset, [0, 0])
    first, second = in_memory.subset([4, 1]), on_disk.subset([4, 1])
    assert first.class_names == second.class_names == (in_memory.class_names[4], in_memory.class_names[1])
    assert torch.equal(first.images, second.in_memory().images)
    assert torch.equal(second.subset([1]).in_memory().images, in_memory.subset([1]).images)


def test_a_broken_image_is_named_when_it_is_drawn_in_a_worker_too_and_no_worker_stays(tmp_path: Path) -> None:
    images, before = streamed(tmp_path, junk=True), set(multiprocessing.active_children())
    for workers, count in ((0, 1), (1, 1), (2, 9)):
        with pytest.raises(DataError, match=r"^'class00\d/\d\.png' is not a readable image: no known format") as error:
            list(EpisodeSampler(images, ways=2, workers=workers).batches(count))
        assert not children_beside(before)
        assert error.traceback
    refuses(DataError, "not a readable image", load_image_folder, tmp_path, image_size=6, stream=False)


class _Deadly:
    """A source whose reader is killed, as by the kernel when memory runs out; but only in a worker."""

    def __init__(self) -> None:
        self.main = os.getpid()

    def __len__(self) -> int:
        return 12

    def pixels(self, place: int) -> np.ndarray:
        if os.getpid() != self.main:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.zeros((1, 4, 4), np.uint8)

    def name(self, place: int) -> str:
        return str(place)


def test_a_worker_that_is_killed_is_an_error_that_says_what_to_do() -> None:
    images = StreamedImages(_Deadly(), torch.arange(4).repeat(3), tuple("abcd"), (1, 4, 4))
    with pytest.raises(DataError, match=r"process that loads images died.*--loader-workers 1"):
        list(EpisodeSampler(images, ways=2, workers=1).batches(3))


def test_a_loop_that_stops_early_leaves_no_worker_behind(tmp_path: Path) -> None:
    before = set(multiprocessing.active_children())
    batches = EpisodeSampler(streamed(tmp_path), ways=2, workers=2).batches(50)
    next(batches)
    assert len(children_beside(before)) == 2
    batches.close()
    del batches
    assert not children_beside(before)


def test_workers_are_for_streamed_images() -> None:
    refuses(ArgumentError, "workers: expected 0 for images in memory", EpisodeSampler, numbered_images(), workers=2)
    refuses(ArgumentError, "workers: expected an integer of at least 0", EpisodeSampler, numbered_images(), workers=-1)


def test_memory_decides_unless_told(tmp_path: Path, monkeypatch) -> None:
    root = make_image_folder(tmp_path, range(4))
    for less in (0, 2):
        monkeypatch.setattr(image_sets, "free_memory", lambda: 3 * 6 * 6 * 8 * 2 - less)  # noqa: B023
        assert isinstance(load_image_folder(root, image_size=6).train, StreamedImages) is bool(less)
    monkeypatch.setattr(image_sets, "free_memory", lambda: 100)
    refuses(DataError, r"stream: 4 images .*Leave stream=False", load_image_folder, root, image_size=6, stream=False)
    assert image_sets.free_memory() == 100


def test_free_memory_is_a_number_of_this_machine() -> None:
    assert 2**20 < image_sets.free_memory() < 2**50


@pytest.mark.parametrize("normalise", ["imagenet", ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])])
def test_normalised_images_are_those_of_the_formula(normalise) -> None:
    images = numbered_images(channels=3, classes=8)
    mean, deviation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if normalise == "imagenet" else normalise
    plain = EpisodeSampler(images, ways=3, targets=2, seed=2).batch(0)[0]
    mine = EpisodeSampler(images, ways=3, targets=2, seed=2, normalise=normalise).batch(0)[0]
    for part in ("support_x", "target_x"):
        pixels = np.rint(getattr(plain, part).numpy().astype(np.float64) * 255) / 255
        expected = (pixels - np.reshape(mean, (3, 1, 1))) / np.reshape(deviation, (3, 1, 1))
        np.testing.assert_allclose(getattr(mine, part).numpy(), expected, rtol=2e-6, atol=1e-6)
    assert plain.support_y.equal(mine.support_y)


def test_normalisation_is_torchvisions() -> None:
    from torchvision.transforms import Normalize
    from torchvision.transforms.functional import to_tensor

    image = noise(1, 4, 4, 3)[0]
    part = splits_from(np.stack([image] * 6), list("aabbcc")).train
    mine = EpisodeSampler(part, ways=1, normalise="imagenet").batch(0)[0].support_x[0]
    theirs = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(to_tensor(image))
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "normalise", ["cifar", ((0.5,), (0.5,)), ((0.5,) * 3, (0.0,) * 3), (0.5, 0.5), 3, ((0.5,) * 3,), (("a",) * 3,) * 2]
)
def test_a_normalisation_that_does_not_fit_is_refused(normalise) -> None:
    refuses(ArgumentError, "normalise: expected", EpisodeSampler, numbered_images(channels=3), normalise=normalise)


def test_cub_and_names_stream(tmp_path: Path) -> None:
    from published import cub_folder

    folder = cub_folder(tmp_path)
    assert isinstance(load_cub(folder, stream=True).test, StreamedImages)
    assert isinstance(load_data("cub", root=folder, stream=True).test, StreamedImages)


def test_subset_holds_exactly_the_images_of_its_classes_in_the_order_given():
    whole = numbered_images(classes=5, per_class=3)
    part = whole.subset([4, 1])
    assert part.class_names == ("class4", "class1")
    assert part.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(part.images[:3], whole.images[whole.labels == 4])
    assert torch.equal(part.images[3:], whole.images[whole.labels == 1])


def test_counts_are_per_class():
    images = LabelledImages(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor([1, 0, 1]), ("a", "b"))
    assert (len(images), images.num_classes, images.images_per_class) == (3, 2, (1, 2))


@pytest.mark.parametrize("indices", [[], [0, 0], [-1], [9]])
def test_impossible_subsets_are_refused(indices):
    with pytest.raises(DataError, match=r"class_indices.*0\.\.5"):
        numbered_images(classes=6).subset(indices)


TWO = torch.zeros(2, 1, 3, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "names", "words"),
    [
        (torch.zeros(2, 1, 3, 3), torch.tensor([0, 1]), ("a", "b"), r"images: expected a uint8.*float32"),
        (torch.zeros(2, 3, 3, dtype=torch.uint8), torch.tensor([0, 1]), ("a", "b"), r"images: .*\(2, 3, 3\)"),
        (torch.zeros(0, 1, 3, 3, dtype=torch.uint8), torch.tensor([]).long(), (), r"at least one pixel"),
        (TWO, torch.tensor([0.0, 1.0]), ("a", "b"), r"labels: expected an int64"),
        (TWO, torch.tensor([0]), ("a",), r"1 labels for 2 images"),
        (TWO, torch.tensor([0, 2]), ("a", "b"), r"from 0 to 2"),
        (TWO, torch.tensor([0, 0]), ("a", "b"), r"1 classes have no image: 'b'"),
    ],
)
def test_broken_sets_are_refused_with_the_reason(images, labels, names, words):
    refuses(DataError, words, LabelledImages, images, labels, names)
