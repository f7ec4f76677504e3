from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import checksum, omniglot_files, png, write_folder, write_zip
from PIL import Image
from refusals import refuses

from metawrap.data import DataSplits, EpisodeSampler, load_omniglot
from metawrap.errors import ArgumentError, DataError

REAL = Path(__file__).parents[2].parent / "shared/data/omniglot-py.zip"
COUNTS = (5, 2, 3)


def names(splits: DataSplits) -> list[tuple[str, ...]]:
    return [part.class_names for part in splits]


@pytest.fixture
def files() -> dict[str, bytes]:
    return omniglot_files()


def load(tmp_path, files, write=write_zip, **options) -> DataSplits:
    return load_omniglot(write(tmp_path / "o.zip", files), **{"counts": COUNTS} | options)


def test_zip_and_folder_and_every_way_to_name_them_give_the_same_tensors(tmp_path, files):
    roots = [
        write_zip(tmp_path / "any-name.zip", files),
        write_folder(tmp_path / "plain", files),
        tmp_path / "plain" / "omniglot-py",
        write_zip(tmp_path / "omniglot-py.zip", files).parent,
        str(tmp_path / "any-name.zip"),
    ]
    first, *others = (load_omniglot(root, counts=COUNTS) for root in roots)
    for other in others:
        assert names(other) == names(first)
        for part, expected in zip(other, first, strict=True):
            assert torch.equal(part.images, expected.images)
            assert torch.equal(part.labels, expected.labels)


def test_pixels_equal_a_nearest_neighbour_resize_by_hand(tmp_path, files):
    # The source pixel under the centre of each target pixel.
    picked = np.floor((np.arange(28) + 0.5) * 105 / 28).astype(int)
    for part in load(tmp_path, files):
        assert part.images.shape[1:] == (1, 28, 28)
        assert set(part.images.unique().tolist()) == {0, 255}
        for label, name in enumerate(part.class_names):
            members = sorted(member for member in files if f"/{name}/" in member)
            for image, member in zip(part.images[part.labels == label], members, strict=True):
                full = np.array(Image.open(io.BytesIO(files[member]))).astype(np.uint8) * 255
                assert np.array_equal(image[0].numpy(), full[picked][:, picked])


def test_paper_split_cuts_one_shuffle_of_all_classes(tmp_path, files):
    parts = names(load(tmp_path, files))
    assert [len(part) for part in parts] == list(COUNTS)
    assert len({name for part in parts for name in part}) == 10
    assert parts == names(load(tmp_path, files, image_size=5))
    assert parts != names(load(tmp_path, files, seed=1))
    assert names(load(tmp_path, files, counts=(5, 1, 1)))[0] == parts[0] == RECORDED_TRAIN


def test_alphabet_split_shares_no_alphabet(tmp_path, files):
    parts = names(load(tmp_path, files, split="alphabet", validation_alphabets=1))
    train, validation, test = ({name.split("/")[0] for name in part} for part in parts)
    assert test == {"Braille", "Ogham"}
    assert len(validation) == 1
    assert train | validation == {"Greek", "Latin", "Runes"}
    assert not train & validation
    with pytest.raises(DataError, match=r"more than 3 alphabets in images_background \(found 3\)"):
        load(tmp_path, files, split="alphabet", validation_alphabets=3)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"counts": (1150, 50, 423)}, DataError, r"asks for 1623 classes, but the data set has 10"),
        ({"counts": (5, 0, 3)}, ArgumentError, r"counts \(validation\): expected an integer of at least 1"),
        ({"counts": (5, 3)}, ArgumentError, r"counts: expected three"),
        ({"split": "lake"}, ArgumentError, r"split: expected 'paper' or 'alphabet'.*'lake'"),
    ],
)
def test_options_that_do_not_fit_are_refused_with_the_numbers(tmp_path, files, options, error, words):
    refuses(error, words, load, tmp_path, files, **options)


def test_a_missing_data_set_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("METAWRAP_DATA", str(tmp_path / "cache"))
    for root in (None, tmp_path / "nothing", tmp_path / "nothing.zip"):
        refuses(DataError, r"not found.*download=True.*'glyphs'", load_omniglot, root)
    (tmp_path / "empty" / "images_background").mkdir(parents=True)
    refuses(DataError, r"No image at images_background", load_omniglot, tmp_path / "empty")


def test_download_fetches_both_parts_into_the_cache_and_only_once(tmp_path, monkeypatch):
    calls: list[bool] = []

    def fake(root: str, background: bool, download: bool) -> None:
        assert download
        calls.append(background)
        part = "images_background" if background else "images_evaluation"
        write_folder(Path(root), {name: content for name, content in omniglot_files().items() if part in name})

    monkeypatch.setenv("METAWRAP_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr("torchvision.datasets.Omniglot", fake)
    first = names(load_omniglot(counts=COUNTS, download=True))
    assert names(load_omniglot(counts=COUNTS, download=True)) == first
    assert names(load_omniglot(counts=COUNTS)) == first
    assert calls == [True, False]


def test_a_failed_download_says_what_else_to_do(tmp_path, monkeypatch):
    def broken(*args: object, **options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.Omniglot", broken)
    refuses(DataError, r"could not be downloaded.*no route to host.*'glyphs'", load_omniglot, tmp_path, download=True)


@pytest.mark.parametrize("content", [b"", b"not a picture", png(1)[:60], png(1)[:40] + bytes(30) + png(1)[70:]])
@pytest.mark.parametrize("write", [write_zip, write_folder])
def test_a_broken_image_is_named(tmp_path, files, content, write):
    files[next(name for name in files if "Runes" in name)] = content
    refuses(DataError, r"Runes/character01/\d+_01\.png' is not a readable image", load, tmp_path, files, write)


def test_a_missing_image_is_named(tmp_path, files):
    del files[next(name for name in files if "Runes/character02" in name and "_02.png" in name)]
    refuses(DataError, r"'Runes/character02' has 2 of 3 images; \*_02\.png is missing", load, tmp_path, files)


def test_a_class_in_both_parts_is_refused(tmp_path, files):
    copies = {name.replace("background", "evaluation"): content for name, content in files.items() if "Greek" in name}
    refuses(DataError, r"'Greek/character01' lies in both", load, tmp_path, files | copies)


def test_a_huge_header_is_refused_before_its_pixels_are_decoded(tmp_path, files):
    bomb = io.BytesIO()
    Image.new("1", (3000, 3000)).save(bomb, "PNG")
    files[next(iter(files))] = bomb.getvalue()
    refuses(DataError, r"claims 3000 x 3000 pixels; at most 1048576", load, tmp_path, files)


def test_other_files_are_left_alone(tmp_path, files):
    hidden = "omniglot-py/images_background/Greek/character01/._0001_01.png"
    others = dict.fromkeys((f"__MACOSX/{hidden}", hidden, "omniglot-py/README.md"), b"x")
    assert sum(len(part) for part in load(tmp_path, files | others)) == 30


@pytest.mark.skipif(not REAL.is_file(), reason="the real Omniglot zip is not here")
def test_the_real_data_set_splits_as_in_the_paper():
    splits = load_omniglot(REAL, image_size=28)
    assert [part.num_classes for part in splits] == [1150, 50, 423]
    assert {count for part in splits for count in part.images_per_class} == {20}
    everything = {name for part in splits for name in part.class_names}
    assert len(everything) == 1623
    assert len({name.split("/")[0] for name in everything}) == 50
    assert splits.train.images.shape == (23000, 1, 28, 28)
    assert 0.90 < splits.train.images.float().mean() / 255 < 0.94  # paper is white
    assert splits.train.class_names[0] == "Malayalam/character47"
    sampler = EpisodeSampler(splits.train, ways=20, shots=5, tasks_per_batch=2, rotations=True, seed=0)
    assert checksum(sampler.batch(0)) == RECORDED_REAL


RECORDED_TRAIN = tuple(
    f"{name}/character{number}"
    for name, number in (("Greek", "03"), ("Latin", "02"), ("Braille", "01"), ("Ogham", "01"), ("Runes", "02"))
)
RECORDED_REAL = "779829ce56f6fab4"
