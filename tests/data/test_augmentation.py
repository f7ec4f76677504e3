"""Random images: refused where memory would freeze them; `augment` changes training episodes, by seed."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from data_helpers import checksum, make_image_folder, numbered_images
from published import noise
from refusals import refuses
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from metawrap.data import EpisodeSampler, splits_from
from metawrap.errors import ArgumentError
from metawrap.snapshot.generators import Generators

IMAGES = noise(16, 12, 12, 3)
OWN, CALLS = np.random.default_rng(0), itertools.count()


class Birds(Dataset):
    targets = list(range(4)) * 4

    def __init__(self, transform) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 16

    def __getitem__(self, place: int):
        return self.transform(torch.from_numpy(IMAGES[place]).permute(2, 0, 1)), self.targets[place]


@pytest.mark.parametrize(
    "transform",
    [
        v2.RandomResizedCrop(12, antialias=True),
        v2.RandomErasing(0.01),
        v2.RandomHorizontalFlip(),
        lambda image: image if np.random.rand() < 0.01 else image.flip(2),
        lambda image: image.roll(random.randrange(3), 2),
        lambda image: image.roll(int(OWN.integers(12)), 1),
    ],
    ids=["crop", "rare erasing", "flip", "NumPy", "Python", "a generator of its own"],
)
def test_a_data_set_of_random_images_is_refused_in_memory(transform) -> None:
    for stream in (None, False):
        refuses(ArgumentError, r"is random: .*augment=.*stream=True", splits_from, Birds(transform), stream=stream)
    splits_from(Birds(transform), stream=True)


def test_a_folder_with_a_random_crop_is_refused_and_without_it_is_not(tmp_path) -> None:
    root = make_image_folder(tmp_path, range(4))
    crop = v2.Compose([v2.ToImage(), v2.RandomResizedCrop(6, antialias=True)])
    refuses(ArgumentError, "is random", splits_from, ImageFolder(root, crop))
    fixed = v2.Compose([v2.ToImage(), v2.Resize((6, 6), antialias=True)])
    assert splits_from(ImageFolder(root, fixed)).train.image_shape == (3, 6, 6)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_streamed_random_images_differ_from_batch_to_batch_and_follow_the_seed(workers: int) -> None:
    """Every image is one number, so the set of numbers tells the draws."""
    images = splits_from(Birds(lambda image: image * 0 + int(torch.randint(256, ()))), stream=True).train
    before = Generators()
    batches = [EpisodeSampler(images, ways=1, seed=seed, workers=workers).batches(6) for seed in (3, 3, 4)]
    one, same, other = ([checksum(batch) for batch in each] for each in batches)
    assert one == same == [checksum(EpisodeSampler(images, ways=1, seed=3).batch(index)) for index in range(6)]
    assert len({*one, *other}) == 12
    assert not before.moved()


def plain_and_augmented(augment, **how: object) -> tuple[EpisodeSampler, EpisodeSampler]:
    images = numbered_images(channels=3, side=6, classes=8)
    how = {"ways": 4, "shots": 2, "targets": 2, "tasks_per_batch": 2, "seed": 7, **how}
    return EpisodeSampler(images, **how), EpisodeSampler(images, **how, augment=augment)


@pytest.mark.parametrize("rotations", [False, True])
def test_each_support_and_target_image_is_augmented_by_a_draw_of_its_own(rotations: bool) -> None:
    plain, augmented = plain_and_augmented(v2.RandomHorizontalFlip(), rotations=rotations)
    flipped: dict[str, list[bool]] = {"support_x": [], "target_x": []}
    for index in range(3):
        for before, after in zip(plain.batch(index), augmented.batch(index), strict=True):
            assert before.classes == after.classes
            for part, found in flipped.items():
                for old, new in zip(getattr(before, part), getattr(after, part), strict=True):
                    assert torch.equal(new, old) or torch.equal(new, old.flip(2))
                    found.append(torch.equal(new, old.flip(2)))
    for found in flipped.values():  # 48 fair coins
        assert 10 < sum(found) < 38
    assert flipped["support_x"] != flipped["target_x"]


@pytest.mark.parametrize("source", ["torch", "numpy", "python"])
def test_the_same_seed_gives_the_same_augmented_episodes_with_any_number_of_workers(source: str) -> None:
    draw = {"torch": lambda: float(torch.rand(())), "numpy": np.random.rand, "python": random.random}[source]

    def augment(image: torch.Tensor) -> torch.Tensor:
        return image.float() / 255 * draw()

    first = plain_and_augmented(augment)[1]
    expected = [checksum(first.batch(index)) for index in range(4)]
    before = Generators()
    assert len(set(expected)) == 4
    for workers in (0, 2):
        images = first.images
        how = {"ways": 4, "shots": 2, "targets": 2, "tasks_per_batch": 2, "augment": augment, "workers": workers}
        assert [checksum(batch) for batch in EpisodeSampler(images, **how, seed=7).batches(4)] == expected
    assert checksum(plain_and_augmented(augment, seed=8)[1].batch(0)) != expected[0]
    assert not before.moved()


def test_augmented_images_are_normalised_after_it_and_may_have_another_size() -> None:
    crop = v2.CenterCrop(4)
    plain, cropped = plain_and_augmented(lambda image: crop(image).float() / 255, normalise="imagenet")
    expected = plain.batch(1)[0].support_x[:, :, 1:5, 1:5]
    torch.testing.assert_close(cropped.batch(1)[0].support_x, expected, rtol=1e-5, atol=1e-6)


def test_an_augmentation_that_changes_nothing_gives_the_plain_episodes() -> None:
    for rotations in (False, True):
        plain, same = plain_and_augmented(lambda image: image, rotations=rotations)
        assert checksum(plain.batch(3)) == checksum(same.batch(3))


@pytest.mark.parametrize(
    ("augment", "what"),
    [
        ("flip", "augment: expected a function"),
        (lambda image: image.numpy(), r"a tensor \(3, height, width\).*but got .*(array|shape)"),
        (lambda image: image[0], r"a tensor \(3, height, width\)"),
        (lambda image: image[:1], r"a tensor \(3, height, width\)"),
        (lambda image: image.float(), r"floats in \[0, 1\].*normalise="),
        (lambda image: image.float() / 127.5 - 1, r"floats in \[0, 1\].*normalise="),
        (lambda image: image.size, r"a tensor \(3, height, width\)"),
        (v2.ToPILImage(), r"a tensor \(3, height, width\)"),
        (lambda image: image[:, : random.randint(1, 6)], "images of one size"),
        (lambda image: image.roll(int(OWN.integers(6)), 1), "generator, not from one of its own"),
        (lambda image: image.flip(2) if OWN.random() < 0.03 else image, "generator, not from one of its own"),
        (lambda image: image.flip(2) if next(CALLS) % 8 == 0 else image, "generator, not from one of its own"),
        (lambda image: 1 / 0, "it fails on a uint8 tensor of shape .*division by zero"),
    ],
)
def test_an_augmentation_that_cannot_work_is_refused_before_the_first_episode(augment, what: str) -> None:
    refuses(ArgumentError, what, plain_and_augmented, augment)
