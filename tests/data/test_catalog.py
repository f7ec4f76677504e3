from __future__ import annotations

import pytest
import torch
from data_helpers import make_image_folder, omniglot_files, write_zip
from refusals import refuses

import metawrap.data
from metawrap.data import DATASETS, load_data, load_glyphs, load_image_folder, load_omniglot
from metawrap.errors import ArgumentError, DataError


def same(first: metawrap.data.DataSplits, second: metawrap.data.DataSplits) -> bool:
    return all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.class_names == b.class_names
        for a, b in zip(first, second, strict=True)
    )


def test_names_and_paths_reach_their_loaders(tmp_path):
    archive = write_zip(tmp_path / "o.zip", omniglot_files())
    folder = make_image_folder(tmp_path / "mine", range(4))
    assert same(load_data("glyphs", classes=(2, 1, 1), seed=5), load_glyphs((2, 1, 1), seed=5))
    assert same(load_data("omniglot", root=archive, counts=(5, 2, 3)), load_omniglot(archive, counts=(5, 2, 3)))
    assert same(load_data(folder, image_size=3), load_image_folder(folder, image_size=3))
    assert same(load_data(str(folder), image_size=3), load_image_folder(folder, image_size=3))


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(
        DataError,
        match=r"'imagenet' is neither a data set \(cifar-fs, cub, .*\) nor an existing folder.*mean 'mini-imagenet'",
    ):
        load_data("imagenet")
    refuses(DataError, r"root is only for named data sets", load_data, tmp_path, root=tmp_path)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("mini_imagenet", "mini-imagenet"),
        ("tiered-imagenet", "tieredimagenet"),
        ("CIFARFS", "cifar-fs"),
        ("Fc100", "fc100"),
    ],
)
def test_a_name_that_is_nearly_right_is_set_right(written, meant):
    refuses(DataError, f"Did you mean '{meant}'", load_data, written)


def test_a_set_that_needs_files_says_so():
    refuses(ArgumentError, "'mini-imagenet' needs root", load_data, "mini-imagenet")


def test_options_that_a_data_set_does_not_take_are_named():
    with pytest.raises(ArgumentError, match=r"'glyphs' does not take root, ways\. It takes classes, images_per_class"):
        load_data("glyphs", root="here", ways=5)


def test_everything_listed_is_there():
    assert sorted(metawrap.data.__all__) == metawrap.data.__all__
    assert all(hasattr(metawrap.data, name) for name in metawrap.data.__all__)
    assert set(DATASETS) == {
        "cifar-fs",
        "cub",
        "fc100",
        "glyphs",
        "grocery",
        "mini-imagenet",
        "omniglot",
        "tieredimagenet",
    }
