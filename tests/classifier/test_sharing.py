"""Sharing a classifier: its folder and card, what is uploaded, and what comes from a stranger's repository."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import photos as made
import pytest
import torch
import yaml

from metawrap import ArgumentError, DataError, MetaWrapError, ProtoNet
from metawrap.classifier import Classifier, Photos, fit_classifier
from metawrap.classifier.sharing import card_of

hub = pytest.importorskip("huggingface_hub", reason="sharing needs huggingface_hub")
PICTURES = np.stack([made.WAY.pixels(made.photo(name, 7)) for name in made.COLOURS])


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    photos = Photos.read(made.folder(tmp_path_factory.mktemp("photos") / "photos"), made.WAY)
    about = {"network": "a small network", "command": "metawrap adapt /home/me/secret"}
    return fit_classifier(ProtoNet(made.network(), norm="running"), photos, made.WAY, about)[0]


@pytest.fixture(scope="module")
def place(classifier: Classifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the classifier, as `save` writes it."""
    return classifier.save(tmp_path_factory.mktemp("saved") / "clf")


FILES = ["README.md", "classifier.json", "network.pt2", "predict.py", "weights.safetensors"]


@pytest.mark.parametrize("loaded", [True, False])
def test_a_folder_with_a_card_is_loaded_again(
    loaded: bool, classifier: Classifier, place: Path, tmp_path: Path
) -> None:
    shared = Classifier.load(place) if loaded else classifier
    assert shared.save_pretrained(tmp_path / "shared") == tmp_path / "shared"
    assert sorted(each.name for each in (tmp_path / "shared").iterdir()) == FILES
    assert "command" not in json.loads((tmp_path / "shared" / "classifier.json").read_text())
    found = Classifier.from_pretrained(tmp_path / "shared")
    np.testing.assert_allclose(found.of_prepared(PICTURES), classifier.of_prepared(PICTURES), atol=1e-6)
    found.save_pretrained(tmp_path / "shared")  # A copy onto itself.
    assert Classifier.from_pretrained(str(tmp_path / "shared")).classes == classifier.classes
    with pytest.raises(ArgumentError, match="other files"):
        found.save_pretrained(made.folder(tmp_path / "photos", 1))


def test_the_card_states_what_is_known(classifier: Classifier) -> None:
    front, text = classifier.card("me/fruit").split("---\n", 2)[1:]
    assert yaml.safe_load(front)["pipeline_tag"] == "image-classification"
    for words in (
        "blue (4), green (4), red (4)",
        "12 photos of 3 classes",
        "a small network",
        "ProtoNet",
        "running",
        "12 of 12 right, 100.0 % (95 % interval 75.7 to 100.0 %)",  # Wilson: 12 / (12 + 1.96²)
        "Classifier.from_pretrained('me/fruit').predict(['photo.jpg'])",
        "python predict.py photo.jpg",
    ):
        assert words in text.replace("\\", ""), words
    assert "secret" not in text


def test_a_card_of_texts_and_one_without_an_estimate() -> None:
    text = card_of({"texts": {"a": 1, "b": 1}, "estimate": None}, ("a", "b"), "texts")
    assert "no estimate" in text
    assert "torch and tokenizers" in text
    assert 'predict(["a text"])' in text
    assert "network | not recorded" in text


STRANGE = "a|b\n\n# <script>alert(1)</script> [x](http://evil) `c` ![i](j) \x1b[2J"


def test_texts_of_a_stranger_are_no_markup() -> None:
    about = {"network": STRANGE, "method": {STRANGE: 1}, "norm": [STRANGE], "photos": {STRANGE: STRANGE}}
    text = card_of(about | {"estimate": {"right": STRANGE}}, (STRANGE, "b"), "photos")
    table = text[text.index("| --- |") : text.index("The accuracy")]
    assert len(table.strip().splitlines()) == 7
    assert "\x1b" not in text
    inside = re.sub(r"\\.", "", "\n".join(row[2:-2].partition(" | ")[2] for row in table.strip().splitlines()[1:]))
    assert not set(inside) & set("<>[]`|!*_#")


def test_many_classes_are_cut() -> None:
    text = card_of({}, [f"class{number}" for number in range(10_000)], "photos")
    assert len(text) < 10_000
    assert "9900 more" in text


@pytest.mark.parametrize("name", ["README.md", "config.json"])
def test_a_folder_of_ones_own_is_left_alone(name: str, classifier: Classifier, place: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text("# My thesis")
    for save in (classifier.save, classifier.save_pretrained, Classifier.load(place).save_pretrained):
        with pytest.raises(ArgumentError, match="other files"):
            save(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "# My thesis"


def test_a_new_classifier_takes_the_place_of_one_with_a_card(
    classifier: Classifier, place: Path, tmp_path: Path
) -> None:
    Classifier.load(place).save_pretrained(tmp_path / "clf")
    classifier.save(tmp_path / "clf")
    assert not (tmp_path / "clf" / "README.md").exists()  # Its figures were another's.


def test_the_hub_gets_the_folder(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None = None) -> None:
            asked["token"] = token

        def create_repo(self, repo_id: str, private: bool | None, **_: Any) -> Any:
            asked["private"] = private
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, folder_path: Path, **options: Any) -> str:
            shutil.copytree(folder_path, tmp_path / "uploaded")
            asked.update(options)
            return "https://a.commit"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    found = Classifier.load(place).push_to_hub("me/fruit", private=True, token="t", branch="next")
    assert found == "https://a.commit"
    assert (asked["repo_id"], asked["private"], asked["token"], asked["revision"]) == ("me/fruit", True, "t", "next")
    assert sorted(each.name for each in (tmp_path / "uploaded").iterdir()) == FILES
    assert "from_pretrained('me/fruit')" in (tmp_path / "uploaded" / "README.md").read_text()
    assert Classifier.from_pretrained(tmp_path / "uploaded").classes == ("blue", "green", "red")


class Touch:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def _hostile(program: Path, mark: Path) -> None:
    """Puts a pickle that runs code into a program."""
    with zipfile.ZipFile(program) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    buffer = io.BytesIO()
    torch.save(((Touch(mark),), {}), buffer)
    [name] = [each for each in members if each.endswith("sample_inputs/model.pt")]
    with zipfile.ZipFile(program, "w") as archive:
        for each, content in (members | {name: buffer.getvalue()}).items():
            archive.writestr(each, content)


def test_a_repository_of_a_stranger_runs_no_code(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark, repository = tmp_path / "ran", tmp_path / "repository"
    shutil.copytree(place, repository)
    (repository / "predict.py").write_text(f"open({str(mark)!r}, 'w')")
    (repository / "__init__.py").write_text(f"open({str(mark)!r}, 'w')")
    (repository / "config.json").write_text(json.dumps({"runtime": "onnx", "load": "os.system", "self": 1}))
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(repository)

    monkeypatch.setattr(hub, "snapshot_download", download)
    found = Classifier.from_pretrained("a/stranger", revision="v1")
    assert (asked["name"], asked["revision"]) == ("a/stranger", "v1")
    assert not [each for each in asked["allow_patterns"] if each.endswith((".py", "*"))]
    assert found.classes == ("blue", "green", "red")
    found.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "predict.py").read_text() == (place / "predict.py").read_text()

    _hostile(repository / "network.pt2", mark)
    with pytest.raises(DataError, match="not the file"):
        Classifier.from_pretrained("a/stranger")
    about = json.loads((repository / "classifier.json").read_text())
    about["sha256"]["network.pt2"] = hashlib.sha256((repository / "network.pt2").read_bytes()).hexdigest()
    (repository / "classifier.json").write_text(json.dumps(about))
    for name in ("a/stranger", str(repository)):
        with pytest.raises(DataError, match=r"network\.pt2"):
            Classifier.from_pretrained(name)
    assert not mark.exists()


def test_a_link_in_a_strangers_folder_is_not_uploaded(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path / "clf")
    (tmp_path / "secret").write_text("a key")
    (tmp_path / "clf" / "weights.safetensors").unlink()
    (tmp_path / "clf" / "weights.safetensors").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match="not the file"):
        Classifier.load(tmp_path / "clf").save_pretrained(tmp_path / "shared")
    assert not any(file.read_bytes() == b"a key" for file in (tmp_path / "shared").rglob("*"))


def test_what_the_hub_does_not_give_is_said(monkeypatch: pytest.MonkeyPatch, classifier: Classifier) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(ArgumentError, match=r"'a/b' cannot be loaded .*no route to host"):
        Classifier.from_pretrained("a/b")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: Classifier.from_pretrained("a/b"), lambda: classifier.push_to_hub("a/b")):
        with pytest.raises(MetaWrapError, match=r"metawrap\[hub\]"):
            call()
