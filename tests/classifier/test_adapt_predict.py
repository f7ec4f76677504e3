"""From a folder of photos to a classifier and to names, by the shell."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import photos as made
import pytest
from PIL import Image

from metawrap.cli import main
from metawrap.training import RunSettings, train

NETWORK = """
import photos

def build(ways=3):
    network = photos.network(ways)
    network.preprocessing = photos.WAY
    return network

def blank(ways=3):
    return photos.network(ways)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with photos, a file with networks, and a classifier in clf; it is the present folder meanwhile."""
    folder = tmp_path_factory.mktemp("shell")
    made.folder(folder / "photos")
    (folder / "networks_for_photos.py").write_text(NETWORK)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        assert main(["adapt", "networks_for_photos:build", "--support", "photos", "--method", "protonet", "-q"]) == 0
        yield folder


def _said(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    found = capsys.readouterr()
    return found.out, found.err


def test_adapt_says_what_it_found(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapt", "networks_for_photos:build", "--support", "photos", "--out", "auto"]) == 0
    out, _ = _said(capsys)
    assert "Photos: 12 of 3 classes (4 each), 24 x 24 pixels" in out
    assert "by method: R2D2 " in out
    assert "12 of 12 right, 100.0 %" in out
    assert "predict auto PHOTO" in out
    about = json.loads((place / "auto" / "classifier.json").read_text())
    assert about["classes"] == ["blue", "green", "red"]
    assert about["estimate"]["accuracy"] == 1
    assert about["photos"] == {"blue": 4, "green": 4, "red": 4}


def test_predict_names_files_and_folders(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "clf", "photos/red/0.png", "photos/blue", "--top", "1"]) == 0
    lines = _said(capsys)[0].splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["photos/red/0.png", "red"],
        *([f"photos/blue/{number}.png", "blue"] for number in range(4)),
    ]


def test_predict_writes_json_and_csv_and_reads_names(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["predict", "clf", "photos/red/0.png", "--json"]) == 0
    found = json.loads(_said(capsys)[0])
    assert found["photo"] == "photos/red/0.png"
    assert found["classes"][0]["name"] == "red"
    assert sum(each["probability"] for each in found["classes"]) == pytest.approx(1, abs=1e-5)
    monkeypatch.setattr("sys.stdin", io.StringIO("photos/green/1.png\nphotos/red/2.png\n"))
    assert main(["predict", "clf", "-", "--csv", "--top", "2"]) == 0
    rows = list(csv.DictReader(io.StringIO(_said(capsys)[0])))
    assert [(row["photo"], row["class1"]) for row in rows] == [
        ("photos/green/1.png", "green"),
        ("photos/red/2.png", "red"),
    ]


def test_a_broken_photo_does_not_stop_the_others(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "broken\x1b[2J.png").write_bytes(b"no picture")
    assert main(["predict", "clf", "photos/red/0.png", "broken\x1b[2J.png", "nowhere.png", "photos/blue/1.png"]) == 2
    out, err = _said(capsys)
    assert [line.split()[1] for line in out.splitlines()] == ["red", "blue"]
    assert "2 of 4 photos" in err
    assert "nowhere.png" in err
    assert "\x1b" not in err


def test_near_duplicates_and_single_photos_are_said(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made.folder(tmp_path / "few", 1)
    with Image.open(folder / "red" / "0.png") as image:
        image.save(folder / "blue" / "copy.png")
    build = ["adapt", "networks_for_photos:build", "--method", "ProtoNet", "--support"]
    assert main([*build, str(folder), "--out", str(tmp_path / "a")]) == 0
    assert "copy.png and red/0.png look the same, and lie in two classes." in _said(capsys)[1]
    assert main([*build, str(made.folder(tmp_path / "one", 1)), "--out", str(tmp_path / "b")]) == 0
    assert "Estimate: none" in _said(capsys)[0]


@pytest.mark.parametrize("method", ["maml", "r2d2"])
def test_a_run_becomes_a_classifier(
    method: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = RunSettings(
        method=method, filters=4, image_size=28, ways=3, epochs=1, iterations_per_epoch=1, tasks_per_batch=1,
        validation_tasks=2, test_tasks=2, inner_steps=1 if method == "maml" else None,
    )  # fmt: skip
    train(settings, tmp_path / "run")
    capsys.readouterr()
    assert main(["adapt", str(tmp_path / "run"), "--support", "photos", "--out", str(tmp_path / "clf")]) == 0
    assert f"run '{tmp_path / 'run'}'" in _said(capsys)[0]
    about = json.loads((tmp_path / "clf" / "classifier.json").read_text())
    assert about["preprocessing"]["channels"] == 1
    assert about["norm"] == ("support" if method == "maml" else "running")
    assert main(["predict", str(tmp_path / "clf"), "photos/red/0.png"]) == 0


WRONG: dict[str, tuple[list[str], str]] = {
    "no run": (["adapt", "photos", "--support", "photos"], "no run"),
    "no preprocessing": (["adapt", "networks_for_photos:blank", "--support", "photos"], "--image-size"),
    "no such network": (["adapt", "networks_for_photos:nothing", "--support", "photos"], "no function or class"),
    "no photos": (["adapt", "networks_for_photos:build", "--support", "nowhere"], "no folder"),
    "another folder": (["adapt", "networks_for_photos:build", "--support", "photos", "--out", "photos"], "other files"),
    "an option of no method": (
        ["adapt", "networks_for_photos:build", "--support", "photos", "--method", "r2d2", "--set", "ridge=1"],
        "ridge",
    ),
    "no classifier": (["predict", "photos", "photos/red/0.png"], "no classifier"),
    "nothing to name": (["predict", "clf", "clf"], "no photo"),
    "top": (["predict", "clf", "photos", "--top", "0"], "top: expected"),
    "onnx that was not written": (["predict", "clf", "photos", "--runtime", "onnx"], "--format onnx"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_errors_say_what_to_do(wrong: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, words = WRONG[wrong]
    assert main(arguments) == 2
    assert words in _said(capsys)[1]
