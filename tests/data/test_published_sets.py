"""mini-ImageNet, tieredImageNet, CUB, CIFAR-FS and FC100 in their published formats, against independent readers."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import zipped
from PIL import Image
from published import (
    CIFAR_COARSE,
    MINI,
    cifar_archive,
    cifar_folder,
    cub_folder,
    mini_caches,
    mini_csv,
    noise,
    tiered_pickles,
)
from refusals import refuses

from metawrap.data import (
    LabelledImages,
    StreamedImages,
    load_cifar_fs,
    load_cub,
    load_fc100,
    load_mini_imagenet,
    load_tiered_imagenet,
)
from metawrap.data.cifar import CIFAR_FS, FC100
from metawrap.errors import ArgumentError, DataError


def images_of(part: LabelledImages, name: str) -> np.ndarray:
    """(images, height, width, channels) of one class."""
    chosen = part.images[part.labels == part.class_names.index(name)]
    return chosen.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("layout", ["folder", "nested", "zip", "zip with a folder"])
def test_the_csv_split_of_ravi_and_larochelle_is_read(tmp_path: Path, layout: str) -> None:
    root = tmp_path / "mini"
    pixels = mini_csv(root, nested=layout == "nested")
    if layout.startswith("zip"):
        root = zipped(root, tmp_path / "mini.zip", "mini-imagenet/" if layout == "zip with a folder" else "")
    splits = load_mini_imagenet(root)
    assert [part.class_names for part in splits] == [tuple(names) for names in MINI.values()]
    for part in splits:
        for name in part.class_names:
            expected = [pixels[file] for file in sorted(pixels) if file.startswith(name)]
            np.testing.assert_array_equal(images_of(part, name), np.stack(expected))


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("kind", ["class_dict", "labels"])
def test_both_pickle_caches_are_read(tmp_path: Path, kind: str, protocol: int) -> None:
    arrays = mini_caches(tmp_path, kind, protocol)
    for part, array, names in zip(load_mini_imagenet(tmp_path), arrays.values(), MINI.values(), strict=True):
        np.testing.assert_array_equal(part.images.permute(0, 2, 3, 1).numpy(), array)
        assert part.num_classes == len(names)
        assert part.labels.tolist() == np.repeat(np.arange(len(names)), 4).tolist()
        if kind == "class_dict":
            assert part.class_names == tuple(names)


def test_a_class_dict_in_any_order_keeps_image_and_class_together(tmp_path: Path) -> None:
    arrays = mini_caches(tmp_path, "class_dict")
    rows = {"b": [11, 0, 5], "a": np.array([3, 2])}
    cache = {"image_data": arrays["train"], "class_dict": rows}
    (tmp_path / "mini-imagenet-cache-train.pkl").write_bytes(pickle.dumps(cache))
    train = load_mini_imagenet(tmp_path).train
    for name, places in rows.items():
        np.testing.assert_array_equal(images_of(train, name), arrays["train"][places])


def test_what_is_wrong_with_mini_imagenet_is_named(tmp_path: Path) -> None:
    refuses(DataError, "not mini-ImageNet in a layout", load_mini_imagenet, tmp_path)
    refuses(DataError, "was not found at", load_mini_imagenet, tmp_path / "none")
    mini_csv(tmp_path)
    (tmp_path / "images" / "n0153282900000002.png").unlink()
    refuses(DataError, r"'train\.csv' names 'n0153282900000002\.png'", load_mini_imagenet, tmp_path)
    for text, what in (
        ("file,label\na,b\n", "expected the header filename,label"),
        ("filename,label\na.png\n", "line 2: expected 2 columns"),
        ("filename,label\n../../etc/passwd,n1\n", r"'train\.csv' holds the unsafe name"),
        ("filename,label\n/etc/passwd,n1\n", r"'train\.csv' holds the unsafe name"),
        ("filename,label\n", "names no image"),
        ('filename,label\n"a', "not a readable CSV"),
    ):
        (tmp_path / "train.csv").write_text(text)
        refuses(DataError, what, load_mini_imagenet, tmp_path)
    (tmp_path / "train.csv").write_bytes(b"\xff\xfe")
    refuses(DataError, "not text in UTF-8", load_mini_imagenet, tmp_path)


def test_a_class_in_two_csv_files_is_refused(tmp_path: Path) -> None:
    mini_csv(tmp_path)
    shutil.copy(tmp_path / "train.csv", tmp_path / "val.csv")
    refuses(DataError, r"'val\.csv': the class 'n01532829' is in train as well", load_mini_imagenet, tmp_path)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"image_data": noise(4, 84, 84)}, "expected images as a uint8 array"),
        ({"image_data": noise(4, 84, 84, 3).astype(np.float32)}, "expected images as a uint8 array"),
        ({"image_data": [1]}, "expected a dict with the array image_data"),
        ({"class_dict": {"a": [0, 99]}}, r"class_dict\['a'\] to list places of images in 0..11"),
        ({"class_dict": {"a": [0], "b": [0]}}, "lists an image twice"),
        ({"class_dict": {}}, "class_dict to be a dict of class names"),
        ({"class_dict": {"a": []}}, "at least one"),
        ({"class_dict": {"a": ["0"]}}, "places of images"),
    ],
)
def test_a_cache_of_another_form_is_refused(tmp_path: Path, change: dict, what: str) -> None:
    mini_caches(tmp_path, "class_dict")
    path = tmp_path / "mini-imagenet-cache-train.pkl"
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes().replace(b"numpy.core", b"numpy._core")) | change))
    refuses(DataError, what, load_mini_imagenet, tmp_path)


def test_labels_that_do_not_fit_the_images_are_refused(tmp_path: Path) -> None:
    mini_caches(tmp_path, "labels")
    path = tmp_path / "miniImageNet_category_split_train_phase_train.pickle"
    for labels in ([0, 1], [0] * 11 + [-1], [0] * 11 + ["a"], None, np.zeros(12)):
        path.write_bytes(pickle.dumps({"data": noise(12, 84, 84, 3), "labels": labels}))
        refuses(DataError, "whole number of at least 0 for each of 12 images", load_mini_imagenet, tmp_path)
    path.unlink()
    refuses(DataError, r"train_phase_train\.pickle' is missing", load_mini_imagenet, tmp_path)


@pytest.mark.parametrize("layout", ["folder", "archive", "python 3"])
def test_cifar_images_are_those_that_torchvision_reads(tmp_path: Path, layout: str, monkeypatch) -> None:
    from torchvision.datasets import CIFAR100

    root = cifar_archive(tmp_path) if layout == "archive" else cifar_folder(tmp_path, 4 if layout == "python 3" else 2)
    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setitem(CIFAR100.meta, "md5", None)
    held = root.parent / "unpacked" if layout == "archive" else tmp_path
    reference: dict[str, list[np.ndarray]] = {}
    for train in (True, False):
        theirs = CIFAR100(held, train=train)
        for image, label in zip(theirs.data, theirs.targets, strict=True):
            reference.setdefault(theirs.classes[label], []).append(image)
    for load in (load_cifar_fs, load_fc100):
        for place in (root, root.parent):
            splits = load(place)
            assert sum(part.num_classes for part in splits) == 100
            for part in splits:
                for name in part.class_names:
                    np.testing.assert_array_equal(images_of(part, name), np.stack(reference[name]))


def test_the_published_splits_hold_each_class_once() -> None:
    every = sorted(name for names in CIFAR_COARSE.values() for name in names.split())
    assert sorted(name for names in CIFAR_FS.values() for name in names) == every
    assert [len(names) for names in CIFAR_FS.values()] == [64, 16, 20]
    assert sorted(name for names in FC100.values() for name in names) == sorted(CIFAR_COARSE)
    assert [len(names) for names in FC100.values()] == [12, 4, 4]
    # The numbers of the superclasses in the authors' program, in alphabetical order.
    order = sorted(CIFAR_COARSE)
    assert {order.index(name) for name in FC100["validation"]} == {8, 11, 13, 16}
    assert {order.index(name) for name in FC100["test"]} == {0, 7, 12, 14}


def test_fc100_parts_are_whole_superclasses(tmp_path: Path) -> None:
    splits = load_fc100(cifar_folder(tmp_path))
    assert [part.num_classes for part in splits] == [60, 20, 20]
    people = {"baby", "boy", "girl", "man", "woman"}
    assert people <= set(splits.test.class_names)
    assert set(CIFAR_COARSE["small_mammals"].split()) <= set(splits.validation.class_names)


def test_what_is_wrong_with_cifar_is_named(tmp_path: Path) -> None:
    refuses(DataError, "CIFAR-100 was not found at", load_cifar_fs, tmp_path)
    folder = cifar_folder(tmp_path)
    meta = pickle.loads((folder / "meta").read_bytes())
    train = pickle.loads((folder / "train").read_bytes())
    for content, file, what in (
        ({"fine_label_names": meta["fine_label_names"]}, "meta", "'coarse_label_names'"),
        (meta | {"fine_label_names": ["apple"] * 100}, "meta", "list of different names"),
        (meta | {"fine_label_names": meta["fine_label_names"][:50]}, "meta", "meta names 50 classes"),
        (train | {"data": train["data"][:, :10]}, "train", "uint8 of shape"),
        (train | {"fine_labels": train["fine_labels"][:9]}, "train", "each of 200 images"),
    ):
        (folder / "meta").write_bytes(pickle.dumps(meta))
        (folder / "train").write_bytes(pickle.dumps(train))
        (folder / file).write_bytes(pickle.dumps(content))
        refuses(DataError, what, load_cifar_fs, tmp_path)


@pytest.mark.parametrize("layout", ["pickles", "npz", "folders"])
@pytest.mark.parametrize("stream", [False, True])
def test_tiered_imagenet_is_read_in_its_layouts(tmp_path: Path, layout: str, stream: bool) -> None:
    root = tmp_path / "tiered-imagenet"
    arrays = tiered_pickles(root)
    for part, array in arrays.items():
        if layout != "pickles":
            (root / f"{part}_images_png.pkl").unlink()
        if layout == "npz":
            np.savez(root / f"{part}_images.npz", images=array)
        elif layout == "folders":
            for place, image in enumerate(array):
                folder = root / part / f"{part} class {place // 3}"
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(folder / f"{place:03d}.png")
    for part, (name, array) in zip(load_tiered_imagenet(tmp_path, stream=stream), arrays.items(), strict=True):
        assert isinstance(part, StreamedImages if stream else LabelledImages)
        assert part.class_names == tuple(f"{name} class {i}" for i in range(len(array) // 3))
        pixels = part.gather(np.arange(len(part)))
        np.testing.assert_array_equal(pixels.permute(0, 2, 3, 1).numpy(), array)
        assert part.labels.tolist() == np.repeat(np.arange(len(array) // 3), 3).tolist()


def test_what_is_wrong_with_tiered_imagenet_is_named(tmp_path: Path) -> None:
    refuses(DataError, "tieredImageNet was not found", load_tiered_imagenet, tmp_path)
    arrays = tiered_pickles(tmp_path)
    (tmp_path / "val_labels.pkl").unlink()
    refuses(DataError, r"val_labels\.pkl' is missing", load_tiered_imagenet, tmp_path)
    tiered_pickles(tmp_path)
    (tmp_path / "val_images_png.pkl").write_bytes(pickle.dumps([np.zeros(3)]))
    refuses(DataError, "expected a list of PNG pictures", load_tiered_imagenet, tmp_path)
    for part in arrays:
        (tmp_path / f"{part}_images_png.pkl").unlink()
        np.savez_compressed(tmp_path / f"{part}_images.npz", images=arrays[part])
    refuses(DataError, r"is compressed.*np\.savez,", load_tiered_imagenet, tmp_path)
    np.savez(tmp_path / "train_images.npz", images=np.array([{}, None], dtype=object))
    refuses(DataError, "holds Python objects", load_tiered_imagenet, tmp_path)


@pytest.mark.parametrize("layout", ["folder", "zip"])
def test_cub_is_split_by_the_rule_of_a_closer_look(tmp_path: Path, layout: str) -> None:
    root = cub_folder(tmp_path)
    if layout == "zip":
        root = zipped(root, tmp_path / "cub.zip", "CUB_200_2011/")
    splits = load_cub(root, image_size=16)
    kept = [[int(name[:3]) - 1 for name in part.class_names] for part in splits]
    assert kept == [[0, 2, 4, 6], [1, 5], [3, 7]]
    for part, classes in zip(splits, kept, strict=True):
        colours = part.images.float().mean((1, 2, 3)).numpy()
        np.testing.assert_allclose(colours, np.repeat([20 * i for i in classes], 3), atol=2)


def test_cub_takes_a_split_by_name_and_names_what_is_wrong(tmp_path: Path) -> None:
    folder = cub_folder(tmp_path)
    given = {"train": ["001.Bird_0", "004.Bird_3"], "val": ["003.Bird_2"], "test": ["002.Bird_1"]}
    splits = load_cub(tmp_path, split=given, image_size=8)
    assert [part.class_names for part in splits] == [tuple(names) for names in given.values()]
    refuses(ArgumentError, r"expected a \.csv, \.json or \.yaml", load_cub, tmp_path, split="random")
    (folder / "images.txt").write_text("1 ../../secret.jpg\n")
    refuses(DataError, r"'images\.txt' holds the unsafe name", load_cub, tmp_path)
    (folder / "images.txt").write_text("1\n")
    refuses(DataError, "line 1: expected a number and a value", load_cub, tmp_path)


def test_other_sizes_are_lanczos_of_the_original(tmp_path: Path) -> None:
    arrays = mini_caches(tmp_path, "class_dict")
    small = load_mini_imagenet(tmp_path, image_size=20).train
    expected = np.asarray(Image.fromarray(arrays["train"][0]).resize((20, 20), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(small.images[0].permute(1, 2, 0).numpy(), expected)
    assert small.images.dtype == torch.uint8
