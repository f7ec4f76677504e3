from __future__ import annotations

import pytest
import torch
from data_helpers import numbered_images

from metawrap.data import LabelledImages
from metawrap.errors import DataError


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


@pytest.mark.parametrize(
    ("images", "labels", "names", "words"),
    [
        (torch.zeros(2, 1, 3, 3), torch.tensor([0, 1]), ("a", "b"), r"images: expected a uint8.*float32"),
        (torch.zeros(2, 3, 3, dtype=torch.uint8), torch.tensor([0, 1]), ("a", "b"), r"images: .*\(2, 3, 3\)"),
        (torch.zeros(0, 1, 3, 3, dtype=torch.uint8), torch.tensor([]).long(), (), r"at least one pixel"),
        (
            torch.zeros(2, 1, 3, 3, dtype=torch.uint8),
            torch.tensor([0.0, 1.0]),
            ("a", "b"),
            r"labels: expected an int64",
        ),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.tensor([0]), ("a",), r"1 labels for 2 images"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.tensor([0, 2]), ("a", "b"), r"from 0 to 2"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.tensor([0, 0]), ("a", "b"), r"no image, the first is 'b'"),
    ],
)
def test_broken_sets_are_refused_with_the_reason(images, labels, names, words):
    with pytest.raises(DataError, match=words):
        LabelledImages(images, labels, names)
