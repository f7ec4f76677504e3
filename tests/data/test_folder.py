from __future__ import annotations

import numpy as np
import pytest
import torch
from data_helpers import make_image_folder
from PIL import Image
from refusals import refuses

from metawrap.data import load_image_folder
from metawrap.errors import ArgumentError, DataError


def test_classes_are_split_by_share_and_keep_their_images(tmp_path):
    splits = load_image_folder(make_image_folder(tmp_path, range(25)), image_size=6)
    assert [part.num_classes for part in splits] == [16, 4, 5]
    seen = []
    for part in splits:
        assert part.images.shape == (2 * part.num_classes, 3, 6, 6)
        for image, label in zip(part.images, part.labels.tolist(), strict=True):
            number = int(part.class_names[label].removeprefix("class"))
            seen.append(number)
            colour = torch.tensor([number, 2 * number, 200], dtype=torch.uint8)
            assert torch.equal(image, colour[:, None, None].expand(3, 6, 6))
    assert sorted(seen) == sorted([*range(25), *range(25)])


def test_a_hundred_classes_make_the_64_16_20_of_mini_imagenet(tmp_path):
    splits = load_image_folder(make_image_folder(tmp_path, range(100), images=1), image_size=2, grayscale=True)
    assert [part.num_classes for part in splits] == [64, 16, 20]
    assert splits.train.images.shape == (64, 1, 2, 2)


def test_the_split_depends_on_the_seed_alone(tmp_path):
    root = make_image_folder(tmp_path, range(12))
    names = [[part.class_names for part in load_image_folder(root, image_size=2, seed=seed)] for seed in (0, 0, 1)]
    assert names[0] == names[1]
    assert names[0] != names[2]


def test_incomplete_or_leaking_split_folders_are_refused(tmp_path):
    make_image_folder(tmp_path / "val", [2])
    make_image_folder(tmp_path / "test", [1])
    refuses(DataError, r"split folders, but train with class folders inside is missing", load_image_folder, tmp_path)
    make_image_folder(tmp_path / "train", [0, 1])
    refuses(DataError, r"classes 'class001' lie in both train and test", load_image_folder, tmp_path)


def test_a_class_may_be_called_train(tmp_path):
    make_image_folder(tmp_path, range(3))
    (tmp_path / "class000").rename(tmp_path / "train")
    splits = load_image_folder(tmp_path, image_size=2)
    assert {name for part in splits for name in part.class_names} == {"train", "class001", "class002"}


def test_palette_and_transparent_images_become_plain_colour(tmp_path):
    make_image_folder(tmp_path, range(3), images=1)
    stripes = np.zeros((8, 8), dtype=np.uint8)
    stripes[:, ::2] = 1
    palette = Image.fromarray(stripes).convert("P")
    palette.putpalette([0, 0, 0, 200, 100, 50])
    palette.save(tmp_path / "class000" / "0.png")
    splits = load_image_folder(tmp_path, image_size=1)
    images = {part.class_names[0]: part.images[0].flatten().tolist() for part in splits}
    assert images["class000"] == pytest.approx([100, 50, 25], abs=6)  # a mean of the stripes, not one of them


def test_folders_that_cannot_be_used_are_refused(tmp_path):
    refuses(DataError, r"no folder at", load_image_folder, tmp_path / "none")
    refuses(DataError, r"holds no class folder", load_image_folder, tmp_path)
    make_image_folder(tmp_path, range(2))
    refuses(DataError, r"2 classes are too few", load_image_folder, tmp_path)
    (tmp_path / "empty").mkdir()
    refuses(DataError, r"empty' holds no image", load_image_folder, tmp_path)


def test_a_broken_image_is_named(tmp_path):
    make_image_folder(tmp_path, range(3))
    (tmp_path / "class001" / "1.png").write_bytes(b"GIF89a and no more")
    refuses(DataError, r"'class001/1\.png' is not a readable image", load_image_folder, tmp_path)


@pytest.mark.parametrize("splits", [(0.5, 0.5), (0.6, 0.6, -0.2), (0.5, 0.5, 0.5), ("a", "b", "c"), 3])
def test_shares_that_make_no_whole_are_refused(tmp_path, splits):
    refuses(ArgumentError, "splits: expected", load_image_folder, make_image_folder(tmp_path, range(3)), splits=splits)
