from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from refusals import refuses

from metawrap.data import EpisodeSampler, glyphs, load_glyphs
from metawrap.data.glyphs import _ink
from metawrap.errors import ArgumentError

SMALL = (6, 2, 3)


@pytest.fixture(autouse=True)
def _drawn_anew(monkeypatch):
    """The other tests share drawings (conftest.py)."""
    monkeypatch.setattr(glyphs, "draw_class", glyphs.draw_class.__wrapped__)


def digest(images: torch.Tensor) -> str:
    return hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16]


def test_sets_have_the_sizes_asked_for_and_share_no_class():
    splits = load_glyphs(SMALL, images_per_class=4, image_size=20)
    assert [part.num_classes for part in splits] == list(SMALL)
    assert [part.images.shape for part in splits] == [(4 * count, 1, 20, 20) for count in SMALL]
    assert len({name for part in splits for name in part.class_names}) == 11
    assert {count for part in splits for count in part.images_per_class} == {4}


def test_same_seed_gives_the_bytes_recorded_once():
    splits = load_glyphs(SMALL, images_per_class=4, seed=3)
    assert [digest(part.images) for part in splits] == RECORDED
    assert digest(load_glyphs(SMALL, images_per_class=4, seed=4).train.images) != RECORDED[0]


def test_more_classes_extend_the_family_without_changing_it():
    few, many = (load_glyphs((count, 1, 1)).train.images for count in (3, 5))
    assert torch.equal(few, many[: len(few)])


def test_characters_are_ink_on_paper_and_every_drawing_differs():
    images = load_glyphs((60, 1, 1)).train.images
    assert set(images.unique().tolist()) == {0, 255}
    ink = (images == 0).flatten(1).float().mean(1)
    assert ink.min() > 0.01
    assert ink.max() < 0.35
    assert len({picture.numpy().tobytes() for picture in images}) == len(images)


def test_raw_pixels_separate_classes_about_as_badly_as_on_omniglot():
    """Nearest neighbour on pixels reaches 40 % on 5-way 1-shot Omniglot; far above it would be a toy."""
    hits = [
        (torch.cdist(task.target_x.flatten(1), task.support_x.flatten(1)).argmin(1) == task.target_y).float().mean()
        for task in EpisodeSampler(load_glyphs((1, 1, 80)).test, tasks_per_batch=200).batch(0)
    ]
    assert 0.28 < torch.stack(hits).mean() < 0.55


def test_ink_covers_exactly_the_pixels_within_the_pen():
    rng = np.random.RandomState(0)
    points = np.round(rng.uniform(-4, 16, (3, 5, 2)) * 64) / 64
    pen = np.array([0.5, 1.25, 2.75])
    drawn = _ink(points, pen, 12)
    centres = np.arange(12) + 0.5
    for image in range(3):
        gaps = (centres[None, :, None] - points[image, :, 0]) ** 2 + (centres[:, None, None] - points[image, :, 1]) ** 2
        assert np.array_equal(drawn[image] == 0, (gaps <= pen[image] ** 2).any(2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"classes": (1, 2)}, r"classes: expected three"),
        ({"classes": (1, 0, 2)}, r"classes \(validation\)"),
        ({"images_per_class": 0}, r"images_per_class: "),
        ({"image_size": 4}, r"image_size: expected an integer of at least 8"),
        ({"seed": -1}, r"seed: "),
    ],
)
def test_wrong_arguments_are_named(options, words):
    refuses(ArgumentError, words, load_glyphs, **options)


RECORDED = ["0d2cc6144c740506", "0a1cc2de91d7ba9e", "f2295954653a602b"]
