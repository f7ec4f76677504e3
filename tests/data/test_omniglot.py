from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import checksum, omniglot_files, png, write_folder, write_zip
from PIL import Image

from metawrap.data import DataSplits, EpisodeSampler, load_omniglot
from metawrap.errors import ArgumentError, DataError

REAL = Path(__file__).parents[2].parent / "shared/data/omniglot-py.zip"
COUNTS = (5, 2, 3)


def names(splits: DataSplits) -> list[tuple[str, ...]]:
    return [part.class_names for part in splits]


def test_zip_and_folder_and_every_way_to_name_them_give_the_same_tensors(tmp_path):
    files = omniglot_files()
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


def test_pixels_equal_a_nearest_neighbour_resize_by_hand(tmp_path):
    files = omniglot_files()
    splits = load_omniglot(write_zip(tmp_path / "o.zip", files), counts=COUNTS)
    # The source pixel under the centre of each target pixel.
    picked = np.floor((np.arange(28) + 0.5) * 105 / 28).astype(int)
    for part in splits:
        assert part.images.shape[1:] == (1, 28, 28)
        assert set(part.images.unique().tolist()) == {0, 255}
        for label, name in enumerate(part.class_names):
            members = sorted(member for member in files if f"/{name}/" in member)
            for image, member in zip(part.images[part.labels == label], members, strict=True):
                full = np.array(Image.open(io.BytesIO(files[member]))).astype(np.uint8) * 255
                assert np.array_equal(image[0].numpy(), full[picked][:, picked])


def test_paper_split_cuts_one_shuffle_of_all_classes(tmp_path):
    root = write_zip(tmp_path / "o.zip", omniglot_files())
    parts = names(load_omniglot(root, counts=COUNTS))
    assert [len(part) for part in parts] == list(COUNTS)
    assert len({name for part in parts for name in part}) == 10
    assert parts == names(load_omniglot(root, counts=COUNTS, image_size=5))
    assert parts != names(load_omniglot(root, counts=COUNTS, seed=1))
    smaller = names(load_omniglot(root, counts=(5, 1, 1)))
    assert smaller[0] == parts[0]
    assert parts[0] == RECORDED_TRAIN


def test_alphabet_split_shares_no_alphabet(tmp_path):
    root = write_zip(tmp_path / "o.zip", omniglot_files())
    parts = names(load_omniglot(root, split="alphabet", validation_alphabets=1))
    train, validation, test = ({name.split("/")[0] for name in part} for part in parts)
    assert test == {"Braille", "Ogham"}
    assert len(validation) == 1
    assert train | validation == {"Greek", "Latin", "Runes"}
    assert not train & validation
    with pytest.raises(DataError, match=r"more than 3 alphabets in images_background \(found 3\)"):
        load_omniglot(root, split="alphabet", validation_alphabets=3)


def test_counts_that_do_not_fit_are_refused_with_both_numbers(tmp_path):
    root = write_zip(tmp_path / "o.zip", omniglot_files())
    with pytest.raises(DataError, match=r"asks for 1623 classes, but the data set has 10"):
        load_omniglot(root)
    with pytest.raises(ArgumentError, match=r"counts \(validation\): expected an integer of at least 1"):
        load_omniglot(root, counts=(5, 0, 3))
    with pytest.raises(ArgumentError, match=r"counts: expected three"):
        load_omniglot(root, counts=(5, 3))
    with pytest.raises(ArgumentError, match=r"split: expected 'paper' or 'alphabet'.*'lake'"):
        load_omniglot(root, split="lake")


def test_a_missing_data_set_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("METAWRAP_DATA", str(tmp_path / "cache"))
    for root in (None, tmp_path / "nothing", tmp_path / "nothing.zip"):
        with pytest.raises(DataError, match=r"not found.*download=True.*'glyphs'"):
            load_omniglot(root)
    (tmp_path / "empty" / "images_background").mkdir(parents=True)
    with pytest.raises(DataError, match=r"No image at images_background"):
        load_omniglot(tmp_path / "empty")


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
    with pytest.raises(DataError, match=r"could not be downloaded.*no route to host.*'glyphs'"):
        load_omniglot(tmp_path, download=True)


@pytest.mark.parametrize("content", [b"", b"not a picture", png(1)[:60], png(1)[:40] + bytes(30) + png(1)[70:]])
@pytest.mark.parametrize("write", [write_zip, write_folder])
def test_a_broken_image_is_named(tmp_path, content, write):
    files = omniglot_files()
    broken = next(name for name in files if "Runes" in name)
    root = write(tmp_path / "o.zip", {**files, broken: content})
    with pytest.raises(DataError, match=r"Runes/character01/\d+_01\.png' is not a readable image"):
        load_omniglot(root, counts=COUNTS)


def test_a_missing_image_is_named(tmp_path):
    files = omniglot_files()
    del files[next(name for name in files if "Runes/character02" in name and "_02.png" in name)]
    with pytest.raises(DataError, match=r"'Runes/character02' has 2 of 3 images; \*_02\.png is missing"):
        load_omniglot(write_zip(tmp_path / "o.zip", files), counts=COUNTS)


def test_a_class_in_both_parts_is_refused(tmp_path):
    files = omniglot_files()
    copies = {name.replace("background", "evaluation"): content for name, content in files.items() if "Greek" in name}
    with pytest.raises(DataError, match=r"'Greek/character01' lies in both"):
        load_omniglot(write_zip(tmp_path / "o.zip", files | copies), counts=COUNTS)


def test_a_huge_header_is_refused_before_its_pixels_are_decoded(tmp_path):
    files = omniglot_files()
    bomb = io.BytesIO()
    Image.new("1", (3000, 3000)).save(bomb, "PNG")
    files[next(iter(files))] = bomb.getvalue()
    with pytest.raises(DataError, match=r"claims 3000 x 3000 pixels; at most 1048576"):
        load_omniglot(write_zip(tmp_path / "o.zip", files), counts=COUNTS)


def test_other_files_are_left_alone(tmp_path):
    files = omniglot_files() | {
        "__MACOSX/omniglot-py/images_background/Greek/character01/._0001_01.png": b"x",
        "omniglot-py/images_background/Greek/character01/._0001_01.png": b"x",
        "omniglot-py/README.md": b"x",
    }
    splits = load_omniglot(write_zip(tmp_path / "o.zip", files), counts=COUNTS)
    assert sum(len(part) for part in splits) == 30


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


RECORDED_TRAIN = (
    "Greek/character03",
    "Latin/character02",
    "Braille/character01",
    "Ogham/character01",
    "Runes/character02",
)
RECORDED_REAL = "779829ce56f6fab4"
