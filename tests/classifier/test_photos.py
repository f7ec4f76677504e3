"""A folder of photos per class: what is read, what is refused, and which photos look the same."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import photos as made
import pytest
from PIL import Image, ImageEnhance

from metawrap import DataError
from metawrap.classifier import Photos
from metawrap.data.preprocessing import Preprocessing


def test_classes_labels_and_pixels(tmp_path: Path) -> None:
    found = Photos.read(made.folder(tmp_path / "photos", 2), made.WAY)
    assert found.classes == ("blue", "green", "red")
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert [Path(name).parts[-2:] for name in found.files[:2]] == [("blue", "0.png"), ("blue", "1.png")]
    with Image.open(tmp_path / "photos" / "red" / "1.png") as image:
        expected = np.asarray(image.resize((made.SIZE, made.SIZE), Image.Resampling.LANCZOS))
    assert np.array_equal(found.pictures[-1], expected)


def test_an_archive_is_read_alike(tmp_path: Path) -> None:
    folder = made.folder(tmp_path / "photos", 2)
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for file in folder.rglob("*.png"):
            archive.write(file, file.relative_to(folder))
    one, other = Photos.read(folder, made.WAY), Photos.read(tmp_path / "photos.zip", made.WAY)
    assert np.array_equal(one.pictures, other.pictures)
    assert one.classes == other.classes


def _only(place: Path) -> None:
    for name in ("green", "blue"):
        for file in (place / name).iterdir():
            file.unlink()
        (place / name).rmdir()


def _empty(place: Path) -> None:
    for file in (place / "red").iterdir():
        file.unlink()
    (place / "red" / "notes.txt").write_text("nothing")


def _again(name: str) -> Callable[[Path], None]:
    def add(place: Path) -> None:
        (place / name).mkdir()
        made.photo("red", 9).save(place / name / "9.png")

    return add


def _broken(place: Path) -> None:
    content = (place / "red" / "0.png").read_bytes()
    (place / "red" / "0.png").write_bytes(content[: len(content) // 2])


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "one class": (_only, "holds one class, 'red'"),
    "an empty class folder": (_empty, "holds no image"),
    "names in other cases": (_again("Red"), "names that look the same"),
    "names with other blanks": (_again("red "), "names that look the same"),
    "a broken photo": (_broken, r"red/0\.png.*not a readable image"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_refused(tmp_path: Path, wrong: str) -> None:
    folder = made.folder(tmp_path / "photos", 2)
    change, words = WRONG[wrong]
    change(folder)
    with pytest.raises(DataError, match=words):
        Photos.read(folder, made.WAY)


def test_a_folder_that_is_not_there_and_photos_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder"):
        Photos.read(tmp_path / "nowhere", made.WAY)
    with pytest.raises(DataError, match="GiB"):
        Photos.read(made.folder(tmp_path / "photos", 2), Preprocessing(size=(20_000, 20_000)))


def test_names_of_any_script(tmp_path: Path) -> None:
    names = ["яблоко", "りんご", "pomme d'api", "a & b <c>"]
    for number, name in enumerate(names):
        (tmp_path / name).mkdir()
        made.photo("red", number).save(tmp_path / name / f"{name[:5]}.png")
    assert set(Photos.read(tmp_path, made.WAY).classes) == set(names)


def test_photos_that_look_the_same_are_found(tmp_path: Path) -> None:
    folder = made.folder(tmp_path / "photos", 3)
    with Image.open(folder / "red" / "0.png") as image:
        ImageEnhance.Brightness(image).enhance(1.05).save(folder / "red" / "copy.jpg", quality=80)
        image.resize((64, 64)).save(folder / "green" / "moved.png")
    pairs = {
        (Path(one).name, Path(other).name, apart)
        for one, other, apart in Photos.read(folder, made.WAY).near_duplicates()
    }
    copies = {("0.png", "copy.jpg", False), ("moved.png", "0.png", True)}
    assert copies <= pairs <= copies | {("moved.png", "copy.jpg", True)}
