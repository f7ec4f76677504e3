"""A run is used: loaded for adaptation, and tested on other ways, parts and folders."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bird_runs import CLASSES, FLAGS, write_class
from PIL import Image
from tiny_runs import refusal
from torch import nn

import metawrap
import metawrap.training.run_evaluation
from metawrap.cli import main
from metawrap.data import EpisodeSampler, load_image_folder
from metawrap.errors import ArgumentError, CheckpointError, DataError
from metawrap.snapshot.generators import Generators
from metawrap.training.experiment import TEST_SEED, load_splits


def parts(folder: str) -> list[tuple[str, ...]]:
    return [part.class_names for part in load_image_folder(folder, image_size=16)]


def test_a_loaded_learner_has_the_accuracy_of_the_final_test(place: Path) -> None:
    for name, shown in (("run", 2), ("maml", 3)):
        loaded = metawrap.load(name, device="cpu")
        assert loaded.result == json.loads(Path(name, "result.json").read_text())
        best = loaded.result["test"]
        assert (loaded.epoch, loaded.settings.ways, loaded.learner.training) == (best["epoch"], shown, False)
        images = load_splits(loaded.settings).test
        tasks = EpisodeSampler(images, shown, 1, 1, 2, seed=TEST_SEED).batch(0)
        score = loaded.learner.evaluate(tasks)
        assert score.accuracy == best["norms"][loaded.result["trained_norm"]]["after"]["accuracy"]


def test_loading_needs_no_images_and_leaves_files_and_generators_alone(place: Path) -> None:
    named = dict(zip(("train", "validation", "test"), parts("birds"), strict=True))
    (place / "birds").rename("elsewhere")
    files, before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}, Generators()
    loaded = metawrap.load("run")
    assert before.moved() == set()
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == files
    assert loaded.classes == named


@pytest.mark.parametrize("normalise", [None, "imagenet"])
def test_the_preprocessing_of_a_run_is_that_of_its_training(place: Path, normalise: str | None) -> None:
    record = json.loads(Path("run/run.json").read_text())
    record["settings"]["normalise"] = normalise
    Path("run/run.json").write_text(json.dumps(record))
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 256, (16, 16, 3), dtype=np.uint8))
    picture.save("photo.png")
    found = metawrap.load("run").preprocessing
    expected = np.asarray(picture).transpose(2, 0, 1).astype(np.float32) * np.float32(1 / 255)
    if normalise:
        mean, deviation = (np.float32(x).reshape(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        expected = (expected - mean) / deviation
    for given in ("photo.png", place / "photo.png", picture):
        tensor = found(given)
        assert tensor.dtype == torch.float32
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-6)
    large = found(picture.resize((40, 32), Image.Resampling.NEAREST))
    assert large.shape == (3, 16, 16)
    with pytest.raises(DataError, match=r"'gone\.png' cannot be read"):
        found("gone.png")


def test_a_checkpoint_is_named_by_word_or_number(place: Path) -> None:
    kept = {epoch: torch.load(f"run/checkpoints/epoch-000{epoch}.pt")["learner"] for epoch in (1, 2)}
    for name, epoch in (("newest", 2), (1, 1), (2, 2)):
        loaded = metawrap.load("run", name)
        assert loaded.epoch == epoch
        for key, value in loaded.learner.named_parameters():
            assert torch.equal(value, kept[epoch][key])
    for name in ("bets", 3, True):
        with pytest.raises(CheckpointError, match=r"checkpoint: expected 'best', 'newest' or an epoch .*\(1, 2\)"):
            metawrap.load("run", name)


def test_a_run_of_seeds_names_one_of_its_runs(place: Path) -> None:
    record = json.loads(Path("run/run.json").read_text())
    Path("seeds").mkdir()
    Path("seeds/run.json").write_text(json.dumps(record | {"seeds": [4, 5]}))
    with pytest.raises(CheckpointError, match=r"one run per seed\. Name one of them, such as 'seeds/seed-4'"):
        metawrap.load("seeds")


def _forget_preprocessing() -> None:
    record = json.loads(Path("run/data.json").read_text())
    assert record.pop("preprocessing")["size"] == [16, 16]
    Path("run/data.json").write_text(json.dumps(record))


def test_an_older_run_has_the_preprocessing_of_its_settings(place: Path) -> None:
    before = metawrap.load("run").preprocessing
    _forget_preprocessing()
    assert metawrap.load("run").preprocessing == before
    Path("run/data.json").unlink()
    assert metawrap.load("run").classes == {}


def test_the_package_loads_no_room_of_runs_before_it_is_asked() -> None:
    top = ast.parse(Path(metawrap.__file__).read_text()).body
    imported = [each.module for each in top if isinstance(each, ast.ImportFrom)]
    assert not [name for name in imported if name.startswith("metawrap.training")]
    with pytest.raises(AttributeError, match="no attribute 'loads'"):
        metawrap.loads  # noqa: B018


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found, real = [], metawrap.training.run_evaluation.fixed_tasks
    name = "metawrap.training.run_evaluation.fixed_tasks"
    monkeypatch.setattr(name, lambda *args: found.append(real(*args)) or found[-1])
    return found


def test_a_new_folder_of_three_classes_is_tested_whole(
    place: Path, capsys: pytest.CaptureFixture[str], drawn: list[Any]
) -> None:
    names = ["fish", "frog", "newt"]
    for name in names:
        write_class(place / "pond", name, images=4)
    flags = ["--data", "pond", "--ways", "3", "--shots", "2", "--targets", "2", "--part", "all"]
    assert main(["evaluate", "run", *flags, "--out", "result.json"]) == 0
    assert "Tested: all classes of 'pond', after training on 'birds'" in capsys.readouterr().out
    [sampler] = drawn
    task = sampler.batch(0)[0]
    assert (sorted(sampler.images.class_names), len(task.support_y), len(task.target_y)) == (names, 6, 6)
    result = json.loads(Path("result.json").read_text())
    assert (result["settings"]["ways"], result["classes"]) == (3, "unseen classes")
    asked = refusal(capsys, ["evaluate", "run", *flags, "--ways", "4"])
    assert asked.startswith("ways=4, but the whole of 'pond' has only 3 classes")
    assert "shots + targets = 2 + 3 = 5 images" in refusal(capsys, ["evaluate", "run", *flags, "--targets", "3"])


def test_a_whole_folder_with_classes_of_training_is_refused_with_their_names(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, validation, test = parts("birds")
    for data in ("birds", "copy"):
        if data == "copy":
            shutil.copytree("birds", "copy")
        said = refusal(capsys, ["evaluate", "run", "--part", "all", "--data", data])
        assert f"trained or validated on images of 16 of the 20 classes of '{data}'" in said
        assert [name for name in CLASSES if f"'{name}'" in said] == sorted([*train, *validation])[:10]
    for name in (*train, *validation):
        shutil.rmtree(place / "copy" / name)
    assert main(["evaluate", "run", "--part", "all", "--data", "copy", "--out", "all.json"]) == 0
    assert sorted(path.name for path in Path("copy").iterdir()) == sorted(test)


@pytest.mark.parametrize(("part", "place_of"), [("train", 0), ("validation", 1)])
def test_the_classes_of_training_are_tested_on_request_and_called_so(
    place: Path, capsys: pytest.CaptureFixture[str], drawn: list[Any], part: str, place_of: int
) -> None:
    assert main(["evaluate", "run", "--part", part]) == 0
    printed = capsys.readouterr()
    kind = "training" if part == "train" else part
    assert f"2 tasks of classes of {kind}, best epoch" in printed.out
    assert "unseen" not in printed.out + printed.err
    assert drawn[0].images.class_names == parts("birds")[place_of]
    assert "Leave it out" in refusal(capsys, ["evaluate", "run", "--part", part, "--new-classes"])


def test_fewer_ways_leave_outputs_without_a_class_out_and_more_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "maml", "--ways", "2", "--tasks", "20", "--out", "two.json", "--norm", "batch"]) == 0
    loaded = metawrap.load("maml", device="cpu")
    tasks = EpisodeSampler(load_splits(loaded.settings).test, 2, 1, 1, 20, seed=TEST_SEED).batch(0)
    hits = []
    for task in tasks:
        adapted = loaded.learner.adapt(task.support_x, task.support_y, mask_unused_outputs=True)
        with torch.no_grad():
            hits.append((adapted(task.target_x)[:, :2].argmax(1) == task.target_y).double().mean())
    after = json.loads(Path("two.json").read_text())["test"]["norms"]["batch"]["after"]
    assert after["accuracy"] == pytest.approx(float(torch.stack(hits).mean()))
    capsys.readouterr()
    said = refusal(capsys, ["evaluate", "maml", "--ways", "4"])
    assert said.startswith("ways: ")
    assert "use --ways 3 or fewer" in said


PAYLOAD = """
from pathlib import Path
Path({marker!r}).touch()
from torch import nn
def build(): return nn.Flatten()
"""


@pytest.mark.parametrize("name", ["payload:build", "inner.payload:build", "payload", "run.payload:build"])
def test_nothing_is_imported_because_a_file_of_a_run_names_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    marker, run = place / "ran", place / "run"
    record = json.loads((run / "run.json").read_text())
    record["settings"]["model"] = name
    (run / "run.json").write_text(json.dumps(record))
    (run / "inner").mkdir()
    for file in ("payload.py", "run/payload.py", "run/inner/payload.py", "inner/payload.py"):
        (place / file).parent.mkdir(exist_ok=True)
        (place / file).write_text(PAYLOAD.format(marker=str(marker)))
    (run / "recipe.yaml").write_text(f'model: "{name}"\nepochs: 1\n')
    monkeypatch.setattr(sys, "path", list(sys.path))
    for folder, out in ((place, "run"), (run, ".")):
        monkeypatch.chdir(folder)
        for command in (
            ["evaluate", out],
            ["evaluate", out, "--data", str(place / "birds"), "--new-classes"],
            ["train", "--resume", "--out", out],
            ["train", "--recipe", str(run / "recipe.yaml"), "--out", "another"],
        ):
            assert f"--model {name}" in refusal(capsys, command)
        with pytest.raises(ArgumentError, match="nothing is imported because a file names it"):
            metawrap.load(out)
        assert main(["report", out, "--out", str(place / "report.html")]) == 0
        capsys.readouterr()
        assert str(folder) not in sys.path
    assert not marker.exists()


def test_a_network_of_the_users_is_named_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = "bird_networks:build"
    Path("bird_networks.py").write_text(
        "from torch import nn\n"
        "def build(): return nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.ReLU(), nn.Linear(8, 2))\n"
    )
    assert main(["train", *FLAGS, "--model", model, "--out", "own"]) == 0
    first = capsys.readouterr().out
    assert main(["evaluate", "own", "--model", model]) == 0
    assert capsys.readouterr().out.strip().splitlines()[2:5] == first.strip().splitlines()[2:5]
    assert "has the network 'bird_networks:build', but got 'torch.nn:Flatten'" in refusal(
        capsys, ["evaluate", "own", "--model", "torch.nn:Flatten"]
    )
    network = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.ReLU(), nn.Linear(8, 2))
    for given in (model, network):
        learner = metawrap.load("own", model=given).learner
        saved = torch.load(f"own/checkpoints/epoch-000{metawrap.load('own', model=given).epoch}.pt")["learner"]
        assert all(torch.equal(value, saved[name]) for name, value in learner.named_parameters())
    with pytest.raises(CheckpointError, match="The network is not the one"):
        metawrap.load("own", model=nn.Linear(3, 4))
    for given in (model, network):
        with pytest.raises(ArgumentError, match="one of metawrap's own networks"):
            metawrap.load("run", model=given)
