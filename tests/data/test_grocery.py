"""Grocery Store in both of its layouts: what is read, and that no kind or brand is in two parts."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from data_helpers import write_folder, write_zip
from PIL import Image
from published import GROCERY, grocery_files
from refusals import refuses

from metawrap.data import DataSplits, load_data, load_grocery, normalisation_of
from metawrap.errors import ArgumentError, DataError

_HERE = Path(__file__).parents[2].parent / "shared/data/grocery-store-128.zip"
REAL = Path(os.environ.get("METAWRAP_GROCERY", _HERE))
SIZES = [48, 13, 20]


def part_of(splits: DataSplits) -> dict[str, int]:
    return {name: part for part, images in enumerate(splits) for name in images.class_names}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("layout", ["zip", "named zip in a folder", "parent folder", "folder"])
def test_every_image_of_every_class_is_read_in_each_layout(tmp_path: Path, published: bool, layout: str) -> None:
    files = grocery_files(published)
    if layout == "zip":
        root = write_zip(tmp_path / "any.zip", files)
    elif layout == "named zip in a folder":
        root = write_zip(tmp_path / "grocery-store-128.zip", files).parent
    else:
        root = write_folder(tmp_path, files)
        if layout == "folder":
            root = root / ("GroceryStoreDataset-master/dataset" if published else "grocery-store")
    splits = load_grocery(root, image_size=8)
    assert [part.num_classes for part in splits] == SIZES
    for part in splits:
        for label, name in enumerate(part.class_names):
            own = [content for file, content in sorted(files.items()) if f"/{name}/" in file and "Iconic" not in file]
            pixels = np.stack([np.asarray(Image.open(io.BytesIO(content))) for content in own])
            np.testing.assert_array_equal(part.images[part.labels == label].permute(0, 2, 3, 1).numpy(), pixels)


def test_no_coarse_class_and_no_brand_is_in_two_parts(tmp_path: Path) -> None:
    splits = load_grocery(write_zip(tmp_path / "g.zip", grocery_files(images=1)), image_size=8)
    part = part_of(splits)
    assert len(part) == sum(SIZES) == 81
    groups = [names.split() for coarse in GROCERY.values() for group, names in coarse.items() if group]
    cartons = [name for names in GROCERY["Packages"].values() for name in names.split()]
    brands = {name.split("-")[0] for name in cartons}
    assert brands == {"Alpro", "Arla", "Bravo", "Garant", "God", "Oatly", "Tropicana", "Valio", "Yoggi"}
    groups += [[name for name in cartons if name.startswith(brand)] for brand in brands]
    assert all(len({part[name] for name in names}) == 1 for names in groups)
    kinds = {kind: {name for names in coarse.values() for name in names.split()} for kind, coarse in GROCERY.items()}
    assert all(names & set(images.class_names) for names in kinds.values() for images in splits)


def test_the_size_and_the_normalisation_are_those_of_photographs(tmp_path: Path) -> None:
    root = write_zip(tmp_path / "g.zip", grocery_files(images=1))
    assert load_data("grocery", root=root, stream=True).test.image_shape == (3, 84, 84)
    assert normalisation_of("grocery") == "imagenet"
    refuses(ArgumentError, "image_size: expected an integer", load_grocery, root, image_size=0)


def test_a_split_by_name_takes_some_classes(tmp_path: Path) -> None:
    root = write_zip(tmp_path / "g.zip", {n: c for n, c in grocery_files(images=1).items() if "Soy" not in n})
    given = {"train": ["Kiwi", "Leek"], "val": ["Lime"], "test": ["Mango"]}
    splits = load_grocery(root, split=given, image_size=8)
    assert [part.class_names for part in splits] == [tuple(names) for names in given.values()]
    refuses(ArgumentError, r"expected a \.csv, \.json or \.yaml", load_grocery, root, split="random")
    refuses(
        DataError, r"no image of the classes 'Alpro-Blueberry-Soyghurt', .*Get GroceryStoreDataset", load_grocery, root
    )


def test_files_that_are_missing_or_there_twice_are_named_with_the_remedy(tmp_path: Path) -> None:
    remedy = r"not found at .*Get GroceryStoreDataset .*MIT licence.* pass root=.*--data-root"
    for root in (tmp_path, tmp_path / "grocery.zip"):
        refuses(DataError, remedy, load_grocery, root)
    both = write_zip(tmp_path / "g.zip", grocery_files(images=1) | grocery_files(published=True))
    refuses(DataError, r"several places: 'GroceryStoreDataset-master/.*'grocery-store/.*Keep one", load_grocery, both)


@pytest.mark.skipif(not REAL.is_file(), reason="the real zip is not here; METAWRAP_GROCERY can name it")
def test_the_real_archive_has_81_classes_of_35_images_and_more() -> None:
    splits = load_grocery(REAL, stream=True)
    assert [part.num_classes for part in splits] == SIZES
    assert [len(part) for part in splits] == [3434, 787, 1200]
    assert [min(part.images_per_class) for part in splits] == [35, 39, 40]
    assert 60 < float(splits.test.gather(np.array([0, 600, 1199])).float().mean()) < 180
