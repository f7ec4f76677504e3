"""Folders and archives as people have them: each image in its class and part, or an error that says what to do."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import checksum, make_image_folder, omniglot_files, write_folder, write_zip, zipped
from PIL import Image
from published import MINI, cifar_folder, cub_folder, mini_caches, mini_csv, tiered_pickles
from refusals import refuses

from metawrap.data import (
    DataSplits,
    EpisodeSampler,
    LabelledImages,
    StreamedImages,
    load_cifar_fs,
    load_cub,
    load_data,
    load_image_folder,
    load_mini_imagenet,
    load_omniglot,
    load_tiered_imagenet,
)
from metawrap.errors import ArgumentError, DataError


def tarred(folder: Path, path: Path, mode: str = "w", prefix: str = "") -> Path:
    with tarfile.open(path, mode) as archive:
        for file in sorted(folder.rglob("*"), reverse=True):  # not in the order of reading
            archive.add(file, prefix + file.relative_to(folder).as_posix(), recursive=False)
    return path


def colours(splits: DataSplits) -> dict[str, dict[str, set[int]]]:
    """The red of all images, by part and class; `make_image_folder` gives class i the red i."""
    found = {}
    for part, images in splits._asdict().items():
        reds = images.gather(np.arange(len(images)))[:, 0].flatten(1)
        assert torch.equal(reds.amin(1), reds.amax(1))
        found[part] = {
            name: set(reds[images.labels == label, 0].tolist()) for label, name in enumerate(images.class_names)
        }
    return found


@pytest.mark.parametrize(
    "names",
    [
        ("Train", "Val", "Test"),
        ("meta-train", "meta-val", "meta-test"),
        ("train", "dev", "test"),
        ("TRAINING", "Meta_Validation", "testing"),
    ],
)
@pytest.mark.parametrize("inside", ["", "images/birds/"])
def test_part_folders_go_by_many_names(tmp_path: Path, names: tuple[str, ...], inside: str) -> None:
    for place, name in enumerate(names):
        make_image_folder(tmp_path / inside / name, [10 * place, 10 * place + 1])
    expected = {
        part: {f"class{number:03d}": {number} for number in (10 * place, 10 * place + 1)}
        for place, part in enumerate(("train", "validation", "test"))
    }
    assert colours(load_image_folder(tmp_path, image_size=4)) == expected
    if not inside:
        assert colours(load_mini_imagenet(tmp_path, image_size=4)) == expected


def test_without_a_validation_folder_a_share_of_the_training_classes_validates(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "train", range(10))
    make_image_folder(tmp_path / "test", [20, 21])
    splits = load_image_folder(tmp_path, image_size=4)
    assert [part.num_classes for part in splits] == [8, 2, 2]  # 0.16 of 0.80
    found = colours(splits)
    assert found["test"] == {"class020": {20}, "class021": {21}}
    assert found["train"] | found["validation"] == {f"class{number:03d}": {number} for number in range(10)}
    assert "2 of 10 train classes, drawn by seed, are the validation part" in splits.train.origin
    same, other = (load_image_folder(tmp_path, image_size=4, seed=seed) for seed in (0, 1))
    assert same.validation.class_names == splits.validation.class_names != other.validation.class_names
    half = load_image_folder(tmp_path, image_size=4, splits=(0.4, 0.4, 0.2))
    assert [part.num_classes for part in half] == [5, 5, 2]
    refuses(DataError, "val is missing", load_mini_imagenet, tmp_path)
    for number in range(1, 10):
        shutil.rmtree(tmp_path / "train" / f"class{number:03d}")
    refuses(DataError, "too few to draw validation classes from", load_image_folder, tmp_path)


def test_classes_in_groups_are_called_group_and_class(tmp_path: Path) -> None:
    for place, group in enumerate(("Greek", "Latin", "Runes")):
        make_image_folder(tmp_path / "a" / group, [2 * place, 2 * place + 1])
    expected = {
        f"{group}/class{2 * i + j:03d}": {2 * i + j}
        for i, group in enumerate(("Greek", "Latin", "Runes"))
        for j in (0, 1)
    }
    for root in (tmp_path, tmp_path / "a", zipped(tmp_path / "a", tmp_path / "b.zip")):
        parts = colours(load_image_folder(root, image_size=4))
        assert parts["train"] | parts["validation"] | parts["test"] == expected
    split = {"train": ["Greek/class000", "Latin/class002"], "val": ["Greek/class001"], "test": ["Runes/class005"]}
    named = load_image_folder(tmp_path, image_size=4, split=split)
    assert [part.class_names for part in named] == [tuple(names) for names in split.values()]
    for part in ("train", "test"):
        shutil.copytree(tmp_path / "a", tmp_path / "parts" / part)
    shutil.rmtree(tmp_path / "parts" / "train" / "Runes")
    refuses(DataError, "'Greek/class000'.* lie in both train and test", load_image_folder, tmp_path / "parts")


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (
            lambda root: make_image_folder(root / "class000" / "more", [7]),
            "holds images, and so does its folder 'more'",
        ),
        (
            lambda root: make_image_folder(root / "cat" / "train", [7]),
            "'.*cat' holds the folder 'train'.*pass '.*cat'.*is one, rename",
        ),
        (
            lambda root: write_folder(root, {"phone/a.dng": b"", "phone/b.dng": b""}),
            r"phone' holds no image.*2 of \.dng",
        ),
        (
            lambda root: [make_image_folder(root / n, [i]) for i, n in enumerate(("val", "Valid", "train", "test"))],
            "two fold",
        ),
        (
            lambda root: [write_folder(root / n, {"0.png": b""}) for n in ("train", "test")],
            "hold images and no class fold",
        ),
        (
            lambda root: write_folder(root, dict.fromkeys(("train/a/0.png", "test/b/0.png", "val/0.png"), b"")),
            "has the parts test, train, and images in 'class000', 'class001', 'class002', 'val', which",
        ),
        (lambda root: write_folder(root, {"/".join("abcdefghi") + "/0.png": b""}), "more than 8 folders"),
    ],
    ids=["nested", "parts in a class", "raw", "two for a part", "flat parts", "beside parts", "deep"],
)
def test_a_folder_that_can_mean_two_things_is_refused(tmp_path: Path, make, what: str) -> None:
    make(make_image_folder(tmp_path, range(3)))
    refuses(DataError, what, load_image_folder, tmp_path, image_size=4)


def test_files_of_file_managers_and_folders_without_images_in_a_class_are_left_out(tmp_path: Path) -> None:
    make_image_folder(tmp_path, range(3), suffix="JPG")
    junk = {"__MACOSX/class000/._0.png": b"", "class000/._0.png": b"", ".git/a/0.png": b"", "class001/boxes/0.xml": b""}
    write_folder(tmp_path, {**junk, "read me.png": b""})
    assert sum(len(part) for part in load_image_folder(tmp_path, image_size=4)) == 6


def test_links_to_folders_are_followed_and_a_link_upwards_ends(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "real", range(3))
    (tmp_path / "birds").mkdir()
    for number in range(3):
        os.symlink(tmp_path / "real" / f"class{number:03d}", tmp_path / "birds" / f"class{number:03d}")
    os.symlink("..", tmp_path / "real" / "class001" / "up")
    assert sum(len(part) for part in load_image_folder(tmp_path / "birds", image_size=4)) == 6


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tgz"])
@pytest.mark.parametrize("prefix", ["", "./", "birds/"])
def test_an_archive_of_class_folders_is_the_folder(tmp_path: Path, kind: str, prefix: str) -> None:
    root, path = make_image_folder(tmp_path / "birds", range(5)), tmp_path / f"a.{kind}"
    if kind == "zip":
        zipped(root, path, prefix.removeprefix("./"))
    else:
        tarred(root, path, "w" if kind == "tar" else "w:gz", prefix)
    expected = load_image_folder(root, image_size=4)
    assert colours(load_data(path, image_size=4)) == colours(expected)
    if kind in ("zip", "tar"):
        streamed = load_data(path, image_size=4, stream=True).train
        assert isinstance(streamed, StreamedImages)
        batches = EpisodeSampler(streamed, ways=2, workers=2).batches(3)
        assert [checksum(b) for b in batches] == [
            checksum(b) for b in EpisodeSampler(expected.train, ways=2).batches(3)
        ]
    else:
        refuses(DataError, "the archive is compressed.*Unpack it", load_data, path, image_size=4, stream=True)


def webdataset(path: Path, **more: bytes) -> Path:
    files = {}
    for number in range(12):
        buffer = io.BytesIO()
        Image.new("RGB", (5, 5), (number % 4, 0, 0)).save(buffer, "PNG")
        files[f"shard/{number:06d}.png"], files[f"shard/{number:06d}.cls"] = buffer.getvalue(), b"%d\n" % (number % 4)
        files[f"shard/{number:06d}.json"] = b"{}"
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in {**files, **{name.replace("__", "."): own for name, own in more.items()}}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_a_webdataset_is_split_by_its_labels(tmp_path: Path, name: str) -> None:
    splits = load_data(webdataset(tmp_path / name), image_size=5)
    parts = colours(splits)
    assert parts["train"] | parts["validation"] | parts["test"] == {str(number): {number} for number in range(4)}
    assert {len(part) // part.num_classes for part in splits} == {3}
    assert splits.train.origin == "webdataset, split by seed"
    named = load_data(tmp_path / name, image_size=5, split={"train": [3, 0], "val": [1], "test": [2]})
    assert colours(named)["train"] == {"3": {3}, "0": {0}}
    with tarfile.open(tmp_path / name) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    assert colours(load_data(tmp_path / "unpacked", image_size=5)) == parts


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"x__jpg": b""}, r"'x\.jpg': there is no 'x\.cls' with its label"),
        ({"x__jpg": b"", "x__png": b"", "x__cls": b"1"}, "two images of this key"),
        ({"x__jpg": b"", "x__cls": b"\0\1"}, "name or number of a class"),
        ({"x__jpg": b"", "x__cls": b"7" * 300}, "name or number of a class"),
        ({"x__jpg": b"", "x__cls": b"\xff\xfe"}, "not text in UTF-8"),
    ],
)
def test_a_broken_webdataset_is_named(tmp_path: Path, more: dict, what: str) -> None:
    refuses(DataError, what, load_data, webdataset(tmp_path / "a.tar", **more), image_size=5)


@pytest.mark.parametrize("word", ["validation", "valid"])
@pytest.mark.parametrize("kind", ["cache", "csv"])
def test_the_validation_part_of_mini_imagenet_has_three_names(tmp_path: Path, kind: str, word: str) -> None:
    if kind == "cache":
        pattern, arrays = "mini-imagenet-cache-{}.pkl", mini_caches(tmp_path, "class_dict")
        expected = arrays["val"]
    else:
        pattern, pixels = "{}.csv", mini_csv(tmp_path)
        expected = np.stack([pixels[name] for name in sorted(pixels) if name.startswith(MINI["val"][0])])
    (tmp_path / pattern.format("val")).rename(tmp_path / pattern.format(word))
    splits = load_mini_imagenet(tmp_path)
    assert [part.class_names for part in splits] == [tuple(names) for names in MINI.values()]
    np.testing.assert_array_equal(splits.validation.images.permute(0, 2, 3, 1).numpy(), expected)
    shutil.copy(tmp_path / pattern.format(word), tmp_path / pattern.format("val"))
    refuses(DataError, "both there for validation", load_mini_imagenet, tmp_path)
    for name in ("val", word):
        (tmp_path / pattern.format(name)).unlink()
    refuses(DataError, r"val\.(csv|pkl)' is missing beside other parts", load_mini_imagenet, tmp_path)


@pytest.mark.parametrize("place", ["{part}/{label}", "{part}", "{label}", ".", "validation-named"])
@pytest.mark.parametrize("archive", [None, "zip", "tar"])
def test_csv_images_may_lie_beside_the_tables_by_part_or_class(tmp_path: Path, place: str, archive: str | None) -> None:
    root = tmp_path / "mini"
    pixels = mini_csv(root)
    for part, labels in MINI.items():
        for label in labels:
            folder = "valid" if place == "validation-named" and part == "val" else part
            target = root / (place if place != "validation-named" else "{part}/{label}").format(
                part=folder, label=label
            )
            target.mkdir(parents=True, exist_ok=True)
            for file in (root / "images").glob(f"{label}*"):
                file.rename(target / file.name)
    if archive:
        root = (zipped if archive == "zip" else tarred)(root, tmp_path / f"a.{archive}", prefix="mini-imagenet/")
    for part, labels in zip(load_mini_imagenet(root), MINI.values(), strict=True):
        expected = [pixels[file] for label in labels for file in sorted(pixels) if file.startswith(label)]
        np.testing.assert_array_equal(part.images.permute(0, 2, 3, 1).numpy(), np.stack(expected))


def test_the_published_archive_of_cub_is_read(tmp_path: Path) -> None:
    folder = cub_folder(tmp_path / "unpacked")
    expected = load_cub(folder, image_size=8)
    path = tarred(folder, tmp_path / "CUB_200_2011.tgz", "w:gz", "CUB_200_2011/")
    for root in (path, tmp_path):
        splits = load_cub(root, image_size=8)
        for part, own in zip(splits, expected, strict=True):
            assert isinstance(part, LabelledImages)
            assert part.class_names == own.class_names
            assert torch.equal(part.images, own.images)
            assert torch.equal(part.labels, own.labels)


@pytest.mark.parametrize("inside", ["", "omniglot/", "python/"])
@pytest.mark.parametrize("archive", [False, True])
def test_omniglot_with_all_alphabets_side_by_side_is_split_as_torchvisions(
    tmp_path: Path, inside: str, archive: bool
) -> None:
    published = omniglot_files()
    expected = load_omniglot(write_zip(tmp_path / "tv.zip", published), counts=(5, 2, 3))
    nested = {inside + name.split("/", 2)[2]: content for name, content in published.items()}
    root = write_zip(tmp_path / "n.zip", nested) if archive else write_folder(tmp_path / "n", nested)
    for part, own in zip(load_omniglot(root, counts=(5, 2, 3)), expected, strict=True):
        assert part.class_names == own.class_names
        assert torch.equal(part.images, own.images)
    refuses(DataError, "needs images_evaluation", load_omniglot, root, split="alphabet")


def test_folders_that_are_no_omniglot_are_not_taken_for_it(tmp_path: Path) -> None:
    write_folder(tmp_path, {"birds/a/x_1.png": b"", "fish/pond/b/y_1.png": b""})
    refuses(DataError, "No image at images_background", load_omniglot, tmp_path)


PAGE = b"\n <!DOCTYPE html>\n<html><head><title>Google Drive - Virus scan warning</title></head></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(("content", "what"), [(PAGE, "is a web page"), (POINTER, "a pointer of Git LFS")])
@pytest.mark.parametrize(
    ("make", "file", "load"),
    [
        (lambda root: mini_caches(root, "class_dict"), "mini-imagenet-cache-val.pkl", load_mini_imagenet),
        (mini_csv, "train.csv", load_mini_imagenet),
        (tiered_pickles, "test_labels.pkl", load_tiered_imagenet),
        (cifar_folder, "cifar-100-python/train", load_cifar_fs),
        (lambda root: None, "cifar-100-python.tar.gz", load_cifar_fs),
        (lambda root: None, "CUB_200_2011.tgz", load_cub),
        (lambda root: None, "omniglot-py.zip", load_omniglot),
        (
            lambda root: (root / "train_labels.pkl").write_bytes(pickle.dumps({})),
            "train_images.npz",
            load_tiered_imagenet,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_web_page_saved_as_a_file_is_called_so(tmp_path: Path, make, file, load, content: bytes, what: str) -> None:
    make(tmp_path)
    for name in ("val", "test") if file.endswith("npz") else ():
        (tmp_path / f"{name}_images.npz").write_bytes(b"")
    (tmp_path / file).write_bytes(content)
    refuses(DataError, rf"{Path(file).name}' {what}|{Path(file).name}' is {what}", load, tmp_path)


def test_a_path_that_is_neither_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    refuses(DataError, "not a readable zip, tar or tar.gz", load_data, tmp_path / "a.txt")
    refuses(DataError, "neither a data set", load_data, tmp_path / "none.zip")
    make_image_folder(tmp_path / "train", range(2))
    make_image_folder(tmp_path / "test", [3])
    split = {"train": ["class000"], "val": ["class001"], "test": ["class003"]}
    refuses(ArgumentError, "has train and test folders already", load_data, tmp_path, split=split)
