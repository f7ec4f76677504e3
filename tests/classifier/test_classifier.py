"""A classifier from photos: what it predicts in memory, from its files, and in a process without metawrap."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import photos as made
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from metawrap import MAML, ArgumentError, DataError, MetaWrapWarning, ProtoNet, UnsupportedModuleError
from metawrap.classifier import Classifier, Photos, choose_method, fit_classifier
from metawrap.data.preprocessing import Preprocessing

WITHOUT = """
import sys
class Blocked:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("metawrap", "higher"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    photos = Photos.read(made.folder(folder / "photos"), made.WAY)
    learner = ProtoNet(made.network(), norm="running").eval()
    classifier, estimate = fit_classifier(learner, photos, made.WAY)
    assert estimate is not None
    classifier.save(folder / "clf", examples=photos.pictures)
    np.save(folder / "expected.npy", _by_hand(learner, photos, estimate.temperature))
    return folder


def _by_hand(learner: Any, photos: Photos, temperature: float) -> Any:
    inputs = torch.stack([made.WAY(Image.fromarray(picture)) for picture in photos.pictures])
    module = learner.adapt(inputs, photos.labels)
    with torch.no_grad():
        return torch.softmax(module(inputs) / temperature, 1).numpy()


def _files(place: Path) -> list[Path]:
    return sorted((place / "photos").rglob("*.png"))


def test_a_loaded_classifier_predicts_what_the_adapted_network_does(place: Path) -> None:
    classifier = Classifier.load(place / "clf")
    assert classifier.classes == ("blue", "green", "red")
    found = classifier.probabilities(_files(place))
    np.testing.assert_allclose(found, np.load(place / "expected.npy"), atol=1e-5)
    [first] = classifier.predict([Image.open(place / "photos" / "red" / "1.png")])
    assert first.name == "red"
    assert [p for _, p in first.ranking] == sorted((p for _, p in first.ranking), reverse=True)
    assert sum(p for _, p in first.ranking) == pytest.approx(1, abs=1e-6)
    assert classifier.probabilities([]).shape == (0, 3)
    with pytest.raises(ArgumentError, match="list of photos"):
        classifier.predict(str(_files(place)[0]))


def _formats(folder: Path) -> list[Path]:
    """One scene in the forms that photos come in."""
    folder.mkdir(exist_ok=True)
    image = made.photo("green", 3, (40, 53))
    image.save(folder / "a.png")
    image.save(folder / "b.jpg", quality=90)
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[274] = 6
    turned.save(folder / "c.jpg", exif=exif)
    image.convert("L").save(folder / "d.png")
    alpha = image.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(image.size))
    alpha.save(folder / "e.png")
    wide = np.asarray(image.convert("L")).astype(np.uint16) * 257
    Image.fromarray(wide).save(folder / "f.png")
    image.convert("P").save(folder / "g.gif")
    return sorted(folder.iterdir())


def test_a_process_without_metawrap_predicts_the_same_for_every_form_of_photo(place: Path, tmp_path: Path) -> None:
    files = [*_files(place)[::4], *_formats(tmp_path / "forms")]
    expected = Classifier.load(place / "clf").predict(files)
    script = [sys.executable, "-c", WITHOUT, str(place / "clf" / "predict.py"), *map(str, files)]
    run = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=True)
    rows = [line.split("\t") for line in run.stdout.splitlines()]
    assert [row[0] for row in rows] == list(map(str, files))
    assert [row[1] for row in rows] == [each.name for each in expected]
    assert [float(row[2]) for row in rows] == pytest.approx([each.probability for each in expected], abs=6e-5)


def test_onnx_predicts_the_same(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    photos = Photos.read(place / "photos", made.WAY)
    classifier, _ = fit_classifier(ProtoNet(made.network(), norm="running"), photos, made.WAY)
    classifier.save(tmp_path / "clf", ("onnx",))
    found = Classifier.load(tmp_path / "clf", "onnx").probabilities(_files(place))
    np.testing.assert_allclose(found, np.load(place / "expected.npy"), atol=1e-5)


def test_the_script_goes_on_after_a_broken_photo(place: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    good = str(_files(place)[0])
    command = [sys.executable, str(place / "clf" / "predict.py")]
    done = subprocess.run([*command, str(tmp_path / "broken.png"), good], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout.startswith(f"{good}\tblue\t")
    assert "broken.png: cannot identify" in done.stderr
    assert "Traceback" not in done.stderr


def test_weights_are_those_of_the_adapted_network(place: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(place / "clf" / "weights.safetensors")
    assert torch.equal(weights["network.body.0.weight"], made.network().body[0].weight)


def test_a_learner_under_batch_is_deployed_for_single_photos(place: Path) -> None:
    photos = Photos.read(place / "photos", made.WAY)
    learner = MAML(made.network(), norm="batch", inner_steps=2)
    with pytest.warns(MetaWrapWarning, match='norm="support"'):
        classifier, estimate = fit_classifier(learner, photos, made.WAY)
    assert estimate is not None
    assert classifier.about["norm"] == "support"
    together = classifier.of_prepared(photos.pictures)
    alone = np.concatenate([classifier.of_prepared(one[None]) for one in photos.pictures])
    np.testing.assert_allclose(alone, together, atol=1e-6)


class Centres(nn.Module):
    """Subtracts the mean of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        return self.head(x - x.mean(0))


def test_a_network_that_reads_its_whole_batch_is_named(place: Path) -> None:
    photos = Photos.read(place / "photos", made.WAY)
    with pytest.warns(MetaWrapWarning, match="depends on the photos"):
        fit_classifier(ProtoNet(Centres()), photos, made.WAY)


class OneByOne(nn.Module):
    """Looks at the number of its images in Python, so that a program of it takes one number alone."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.head(x[place].mean((1, 2))[None]) for place in range(x.shape[0])])


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        rows = x.mean((2, 3))[:, :2]
        return rows if float(rows.sum()) > 0 else -rows


def test_a_network_for_one_photo_at_a_time_and_one_that_cannot_be_exported(tmp_path: Path) -> None:
    way = Preprocessing(size=(8, 8))
    classifier = Classifier.of(OneByOne().eval(), ("a", "b"), way)
    pictures = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    loaded = Classifier.load(classifier.save(tmp_path / "clf"))
    assert loaded.at_once == 1
    np.testing.assert_allclose(loaded.of_prepared(pictures), classifier.of_prepared(pictures), atol=1e-6)
    with pytest.raises(UnsupportedModuleError, match="cannot export"):
        Classifier.of(Branches(), ("a", "b"), way).save(tmp_path / "other")


def test_what_save_refuses_leaves_the_folder_as_it_was(place: Path, tmp_path: Path) -> None:
    classifier = Classifier.of(made.network(), ("a", "b", "c"), made.WAY)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for out, words in (("mine", "other files"), ("link", "no folder")):
        with pytest.raises(ArgumentError, match=words):
            classifier.save(tmp_path / out)
    assert [each.name for each in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(ArgumentError, match="formats"):
        classifier.save(tmp_path / "new", ("pickle",))
    with pytest.raises(ArgumentError, match="loaded from files"):
        Classifier.load(place / "clf").save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("missing", ["classifier.json", "network.pt2"])
def test_a_folder_that_is_not_whole(place: Path, tmp_path: Path, missing: str) -> None:
    shutil.copytree(place / "clf", tmp_path / "clf")
    (tmp_path / "clf" / missing).unlink()
    with pytest.raises(DataError, match=missing):
        Classifier.load(tmp_path / "clf")
    with pytest.raises(DataError, match=r"onnx" if missing != "classifier.json" else missing):
        Classifier.load(tmp_path / "clf", "onnx")
    with pytest.raises(ArgumentError, match="runtime"):
        Classifier.load(tmp_path / "clf", "tensorflow")


DESCRIPTIONS: dict[str, Any] = {
    "no object": [],
    "another format": {"format": 2},
    "classes that are no list": {"classes": "abc"},
    "one class": {"classes": ["a"]},
    "too few classes": {"classes": ["a", "b"]},
    "classes that are no names": {"classes": ["a", 1, None]},
    "no preprocessing": {"preprocessing": None},
    "a preprocessing of wrong types": {"preprocessing": {"size": "large"}},
    "an unknown preprocessing": {"preprocessing": {"size": [24, 24], "hook": "os.system"}},
    "examples at once": {"at_once": 0},
    "another digest": {"sha256": {"network.pt2": "0" * 64}},
    "no digest": {"sha256": None},
}


@pytest.mark.parametrize("wrong", DESCRIPTIONS)
def test_a_description_of_another_kind_is_refused(place: Path, tmp_path: Path, wrong: str) -> None:
    shutil.copytree(place / "clf", tmp_path / "clf")
    path = tmp_path / "clf" / "classifier.json"
    change = DESCRIPTIONS[wrong]
    path.write_text(json.dumps(json.loads(path.read_text()) | change if isinstance(change, dict) else change))
    with pytest.raises(DataError):
        Classifier.load(tmp_path / "clf")


def test_auto_takes_the_method_that_does_best_on_photos_left_out(place: Path) -> None:
    photos = Photos.read(place / "photos", made.WAY)

    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.mean((2, 3)) * 0)

    made_by = {"bad": ProtoNet(Blind()), "good": ProtoNet(made.network(), norm="running")}
    learner, estimates = choose_method(made_by.__getitem__, photos, made.WAY, ("bad", "good"))
    assert learner is made_by["good"]
    assert estimates["good"].right > estimates["bad"].right  # type: ignore[union-attr]
