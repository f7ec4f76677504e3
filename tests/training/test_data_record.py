"""A run stays tied to its data: classes that it was trained on are never tested as unseen."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bird_runs import CLASSES, FLAGS, write_birds, write_class
from data_helpers import omniglot_files, write_folder, write_zip, zipped
from PIL import Image
from published import cifar_archive, cifar_folder, cub_folder, grocery_files, mini_caches, mini_csv, tiered_pickles
from tiny_runs import refusal

import metawrap.training.run_evaluation
from metawrap.cli import main
from metawrap.data import load_data, load_image_folder
from metawrap.errors import DataError
from metawrap.training.comparison import compare
from metawrap.training.data_record import record_of
from metawrap.training.run_folder import read_run


def parts(folder: str | Path) -> list[tuple[str, ...]]:
    return [part.class_names for part in load_image_folder(folder, image_size=16)]


def unfinished(run: Path) -> None:
    (run / "checkpoints" / "epoch-0002.pt").unlink()
    (run / "result.json").unlink()


def test_the_record_names_the_classes_of_each_part(place: Path) -> None:
    record = json.loads(Path("run/data.json").read_text())
    assert [tuple(record[part]) for part in ("train", "validation", "test")] == parts("birds")


def replaced(path: Path) -> None:
    """Other pixels in a file of the same size: a reader stops at the end of a PNG."""
    length = path.stat().st_size
    Image.new("RGB", (16, 16)).save(path)
    path.write_bytes(path.read_bytes().ljust(length, b"\0"))


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a class added": (lambda birds: write_class(birds, "crow"), "added: 'crow'"),
    "many classes added": (
        lambda birds: [write_class(birds, f"crow{number:02d}") for number in range(14)],
        "'crow08', 'crow09' and 4 more",
    ),
    "a class removed": (lambda birds: shutil.rmtree(birds / "bird03"), "missing: 'bird03'"),
    "a class renamed": (lambda birds: (birds / "bird03").rename(birds / "crow"), "renamed: 'bird03 (now crow)'"),
    "an image replaced": (lambda birds: replaced(birds / "bird05" / "1.png"), "with other images: 'bird05'"),
    "an image added": (lambda birds: Image.new("RGB", (9, 9)).save(birds / "bird07/9.png"), "other images: 'bird07'"),
}


@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES)
def test_a_run_whose_data_changed_is_neither_tested_nor_resumed(
    place: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], Any], words: str
) -> None:
    change(place / "birds")
    resume = ["train", "--resume", "--out", "run"]
    for command in (["evaluate", "run"], resume):  # A finished run too: its result would stand beside other ones.
        assert words in refusal(capsys, command)
    unfinished(place / "run")
    assert words in refusal(capsys, resume)
    assert sorted(path.name for path in (place / "run").glob("*.jsonl")) == ["insight.jsonl", "log.jsonl"]


def test_classes_that_moved_between_parts_are_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = parts("birds")
    write_class(place / "birds", "albatross")
    now = parts("birds")
    leaked = sorted(set(before[0]) & set(now[2]))
    assert leaked, "the new split would have tested classes that were trained on"
    message = refusal(capsys, ["evaluate", "run"])
    [said] = [phrase for phrase in message.split("; ") if phrase.startswith("moved from train to test: ")]
    assert [name for name in CLASSES if f"'{name}'" in said] == leaked


def test_new_classes_are_tested_without_any_class_of_training_or_validation(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, _, test = parts("birds")
    for name in ("crow", "dove"):
        write_class(place / "birds", name)
    birds = place / "birds"  # Three new names for images that were trained on: all but one, with one more, and a few.
    (birds / train[0]).rename(birds / "alias")
    (birds / "alias" / "0.png").rename(birds / train[1] / "9.png")
    shutil.copytree(birds / train[1], birds / "copy")
    write_class(birds, "half")
    shutil.move(birds / train[2] / "1.png", birds / "half" / "9.png")
    assert refusal(capsys, ["evaluate", "run"]).endswith("metawrap evaluate run --new-classes.")
    drawn, real = [], metawrap.training.run_evaluation.fixed_tasks
    monkeypatch.setattr(
        metawrap.training.run_evaluation, "fixed_tasks", lambda *args: drawn.append(args[1]) or real(*args)
    )
    assert main(["evaluate", "run", "--new-classes", "--out", "result.json"]) == 0
    assert sorted(drawn[0].class_names) == sorted([*test, "crow", "dove"])
    for name, image in zip(drawn[0].class_names, drawn[0].images[:: drawn[0].images_per_class[0]], strict=True):
        expected = np.asarray(Image.open(place / "birds" / name / "0.png")).transpose(2, 0, 1)
        np.testing.assert_array_equal(image.numpy(), expected)
    words = json.loads(Path("result.json").read_text())["tested"]
    assert words.startswith("6 classes that were in neither training nor validation: ")
    assert words in capsys.readouterr().out


def test_a_run_without_new_classes_says_so(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in parts("birds")[2]:
        shutil.rmtree(place / "birds" / name)
    assert "was trained or validated on each class of 'birds'" in refusal(capsys, ["evaluate", "run", "--new-classes"])
    assert "--new-classes" not in refusal(capsys, ["evaluate", "run"])  # A remedy that would not help.


@pytest.mark.sampled(1)
@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_the_same_data_in_another_folder_with_other_times_go_on(
    place: Path, capsys: pytest.CaptureFixture[str], stream: str
) -> None:
    assert main(["evaluate", "run"]) == 0
    first = capsys.readouterr().out
    unfinished(place / "run")
    (place / "birds").rename(place / "elsewhere")
    for path in (place / "elsewhere").rglob("*"):
        os.utime(path, (1, 1))
    assert "'birds' is neither a data set" in refusal(capsys, ["evaluate", "run"])
    assert main(["train", "--resume", "--out", "run", "--data", "elsewhere", stream]) == 0
    capsys.readouterr()
    assert main(["evaluate", "run"]) == 0
    assert capsys.readouterr().out == first.replace("birds", "elsewhere")


def test_other_data_are_tested_unless_their_test_classes_were_trained_on(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_birds(place / "fish", [name.replace("bird", "fish") for name in CLASSES])
    assert main(["evaluate", "run", "--data", "fish"]) == 0
    assert "Tested: the test classes of 'fish', after training on 'birds'" in capsys.readouterr().out
    for name in CLASSES[4:]:  # A name says little in other data.
        (place / "fish" / name.replace("bird", "fish")).rename(place / "fish" / name)
    assert main(["evaluate", "run", "--data", "fish"]) == 0
    alike = {*parts("fish")[2]} & {*parts("birds")[0], *parts("birds")[1]}
    assert f"'birds'; {len(alike)} have names of classes of that training, but other" in capsys.readouterr().out
    shutil.copytree(place / "birds", place / "copy")
    write_class(place / "copy", "albatross")
    leaked = sorted({*parts("birds")[0], *parts("birds")[1]} & {*parts("copy")[2]})
    message = refusal(capsys, ["evaluate", "run", "--data", "copy"])
    assert f"{len(leaked)} of the {len(parts('copy')[2])} test classes of 'copy'" in message
    assert [name for name in CLASSES if f"'{name}'" in message] == leaked


def test_a_run_of_an_older_version_is_tested_with_a_word_and_has_no_new_classes(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run/data.json").unlink()
    assert main(["evaluate", "run"]) == 0
    assert "no record of its data" in capsys.readouterr().err
    assert "no record of its data" in refusal(capsys, ["evaluate", "run", "--new-classes"])
    unfinished(place / "run")
    assert main(["train", "--out", "run", "--resume"]) == 0
    assert not Path("run/data.json").exists()  # The first epoch may have seen other data than the second.


@pytest.mark.parametrize("content", ["", "[]", '{"train": {}}', '{"train": 1, "validation": {}, "test": {}}', "\xff"])
def test_a_damaged_record_is_refused(place: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    Path("run/data.json").write_bytes(content.encode("latin1"))
    assert "data.json' is damaged" in refusal(capsys, ["evaluate", "run"])
    Path("run/data.json").unlink()
    assert main(["evaluate", "run"]) == 0


def test_seeds_are_not_continued_on_other_data(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", *FLAGS, "--out", "seeds", "--seeds", "0,1"]
    assert main(command) == 0
    shutil.rmtree(place / "seeds/seed-1")
    write_class(place / "birds", "crow")
    capsys.readouterr()
    assert main([*command, "--resume"]) == 2
    assert "'seeds/seed-0' was trained on: added: 'crow'" in capsys.readouterr().err
    assert not Path("seeds/seed-1").exists()
    (place / "birds").rename("moved")
    assert main([*command, "--resume", "--data", "moved"]) == 2
    with pytest.raises(DataError, match="'run' was trained on: added: 'crow'"):
        compare({"run": replace(read_run(Path("run"))[0], data="moved")}, ".")
    assert {read_run(Path(name))[0].data for name in ("seeds", "run")} == {"birds"}


def test_a_split_by_file_is_part_of_the_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"train": CLASSES[:10], "validation": CLASSES[10:14], "test": CLASSES[14:]}
    Path("split.json").write_text(json.dumps(names))
    assert main(["train", *FLAGS, "--split", "split.json", "--out", "named"]) == 0
    for changed, words in (
        ({"train": CLASSES[1:10], "test": [*CLASSES[14:], CLASSES[0]]}, "moved from train to test: 'bird00'"),
        ({"train": CLASSES[1:10]}, "missing: 'bird00'"),
        ({"train": CLASSES[9::-1]}, "another order"),
    ):
        Path("split.json").write_text(json.dumps(names | changed))
        capsys.readouterr()
        assert words in refusal(capsys, ["evaluate", "named"])


# Data set -> what makes its files in a folder, in each of its layouts; and options. Layouts of one line hold the same.
SOURCES: dict[str, tuple[list[Callable[[Path], Any]], dict[str, Any]]] = {
    "omniglot": (
        [lambda root: write_folder(root, omniglot_files()), lambda root: write_zip(root / "o.zip", omniglot_files())],
        {"split": "alphabet", "validation_alphabets": 1},
    ),
    "cub": ([lambda root: cub_folder(root), lambda root: zipped(cub_folder(root / "in").parent, root / "cub.zip")], {}),
    "grocery": (
        [lambda root: write_folder(root, grocery_files()), lambda root: write_zip(root / "g.zip", grocery_files())],
        {"image_size": 8},
    ),
    "cifar-fs": ([lambda root: cifar_folder(root), lambda root: cifar_archive(root)], {}),
    "mini-imagenet": ([lambda root: mini_csv(root), lambda root: mini_csv(root, nested=True)], {"image_size": 8}),
    "mini-imagenet caches": (
        [lambda root: mini_caches(root, "class_dict"), lambda root: mini_caches(root, "class_dict", protocol=4)],
        {"image_size": 8},
    ),
    "tieredimagenet": ([lambda root: tiered_pickles(root)], {"image_size": 8}),
}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", SOURCES)
def test_a_record_is_the_same_in_each_layout_place_and_memory_and_changes_with_the_images(
    name: str, tmp_path: Path
) -> None:
    layouts, options = SOURCES[name]
    found = []
    for number, make in enumerate([*layouts, layouts[0]]):
        root = tmp_path / str(number)
        root.mkdir()
        made = make(root)
        root = made if isinstance(made, Path) and made.is_file() else root
        streams = ({"stream": True}, {"stream": False}) if name not in ("omniglot", "cifar-fs") else ({},)
        found += [record_of(load_data(name.split()[0], root, **options, **stream)) for stream in streams]
    assert all(record == found[0] for record in found[1:])
    marks = [mark for part in found[0].values() for mark in part.values()]
    assert len(set(marks)) == len(marks)


def test_glyphs_of_another_seed_are_other_data() -> None:
    one, same, other = (
        record_of(load_data("glyphs", classes=(3, 1, 1), image_size=size, seed=seed))
        for size, seed in ((28, 0), (16, 0), (28, 1))
    )
    assert one == same
    assert [list(part) for part in one.values()] == [list(part) for part in other.values()]
    assert not {*one["train"].values()} & {*other["train"].values()}
