"""A classifier from texts: what is read, what its encoder computes, and what its files predict without metawrap."""

from __future__ import annotations

import io
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import texts as made
import torch

from metawrap import ArgumentError, DataError, MetaWrapWarning
from metawrap.classifier import Classifier, Texts
from metawrap.cli import main
from metawrap.data import TextPreprocessing

transformers = pytest.importorskip("transformers", reason="the tests of texts need transformers")
pytest.importorskip("tokenizers", reason="the tests of texts need tokenizers")
from metawrap.sentence_encoder import load_encoder  # noqa: E402

WITHOUT = """
import sys
class Blocked:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("metawrap", "higher", "transformers", "PIL"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import json, pathlib
from predict import load
print(json.dumps(load(pathlib.Path("."))[1](sys.argv[1:])))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encoder, texts.csv, and a classifier in clf."""
    folder = tmp_path_factory.mktemp("texts")
    made.encoder(folder / "encoder")
    made.table(folder / "texts.csv")
    arguments = ["--support", str(folder / "texts.csv"), "--out", str(folder / "clf"), "--method", "r2d2", "-q"]
    assert main(["adapt", f"hf:{folder / 'encoder'}", *arguments]) == 0
    return folder


@pytest.fixture(scope="module")
def way(place: Path) -> TextPreprocessing:
    return load_encoder(f"hf:{place / 'encoder'}")[1]


def test_vectors_are_the_means_of_each_texts_tokens(place: Path) -> None:
    encoder, way, words = load_encoder(f"hf:{place / 'encoder'}")
    assert "mean of its tokens, of length 1" in words
    assert way.max_tokens == made.MAX_TOKENS
    some = made.texts("music")
    model = transformers.AutoModel.from_pretrained(place / "encoder").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "encoder")
    with torch.no_grad():
        found = encoder.eval()(way.inputs([way.prepare(text) for text in some]))
        for row, text in zip(found, some, strict=True):
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
            torch.testing.assert_close(row, mean / mean.norm(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("pooling", ["cls_token", None])
def test_other_poolings(pooling: str | None, tmp_path: Path) -> None:
    encoder, way, words = load_encoder(f"hf:{made.encoder(tmp_path / 'encoder', pooling=pooling)}")
    assert ("cls of its tokens, of length 1" if pooling else "mean of its tokens") in words
    assert way.max_tokens == (made.MAX_TOKENS if pooling else 32)
    row = way.inputs([way.prepare("the song"), way.prepare("the loud song now")])
    with torch.no_grad():
        found = encoder.eval()(row)[0]
        states = encoder.encoder(row[:1, 0, :4]).last_hidden_state[0]
    expected = states[0] / states[0].norm() if pooling else states.mean(0)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def _change(file: str, **values: object) -> Callable[[Path], None]:
    return lambda folder: made.write(folder / file, json.loads((folder / file).read_text()) | values)


ENCODERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "two poolings": (_change("1_Pooling/config.json", pooling_mode_max_tokens=True), "pooling_mode_max_tokens"),
    "no pooling": (_change("1_Pooling/config.json", pooling_mode_mean_tokens=False), "not known"),
    "lower case": (_change("sentence_bert_config.json", do_lower_case=True), "not known"),
    "a dense layer": (
        lambda folder: made.write(folder / "modules.json", [{"type": "sentence_transformers.Dense", "path": "2"}]),
        "Dense",
    ),
    "a module elsewhere": (
        lambda folder: made.write(folder / "modules.json", [{"type": "a.Pooling", "path": "../../elsewhere"}]),
        "unsafe name",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
}


@pytest.mark.parametrize("wrong", ENCODERS)
def test_encoders_of_another_kind_are_refused(wrong: str, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "encoder", tmp_path / "encoder")
    change, words = ENCODERS[wrong]
    change(tmp_path / "encoder")
    with pytest.raises((ArgumentError, DataError), match=words):
        load_encoder(f"hf:{tmp_path / 'encoder'}")
    with pytest.raises(ArgumentError, match="hf:NAME"):
        load_encoder("torchvision.models:resnet18")


def test_files_alone_predict_the_same(place: Path) -> None:
    texts = [*made.texts("light"), "sun sun sun sun rain storm", "unheard words", "now " * 11]
    with pytest.warns(MetaWrapWarning, match="more than 12 tokens"):
        expected = Classifier.load(place / "clf").probabilities(texts)
    script = [sys.executable, "-c", WITHOUT, *texts]
    run = subprocess.run(script, cwd=place / "clf", capture_output=True, text=True, check=True)
    np.testing.assert_allclose(json.loads(run.stdout), expected, atol=1e-5)


def test_any_number_of_texts_of_any_length(place: Path) -> None:
    classifier = Classifier.load(place / "clf")
    assert classifier.at_once > 1
    texts = [" ".join(["song", "lamp", "rain"][number % 3] for _ in range(1 + number % 10)) for number in range(70)]
    together = classifier.probabilities(texts)
    alone = np.concatenate([classifier.probabilities([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    assert [each.name for each in classifier.predict(["song song", "rain", "lamp"])] == ["music", "weather", "light"]


def test_the_shell_names_arguments_and_lines(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clf = str(place / "clf")
    assert main(["predict", clf, "play the song", "cold rain now", "--top", "1"]) == 0
    rows = [line.split("   ") for line in capsys.readouterr().out.splitlines()]
    assert [text for text, _ in rows] == ["play the song", "cold rain now"]
    assert [name.split()[0] for _, name in rows] == ["music", "weather"]
    monkeypatch.setattr("sys.stdin", io.StringIO("a bright lamp\r\n\ncold storm\n"))
    assert main(["predict", clf, "--lines", "-", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(each["text"], each["classes"][0]["name"]) for each in found] == [
        ("a bright lamp", "light"),
        ("cold storm", "weather"),
    ]
    assert main(["predict", clf, "jazz", " "]) == 2
    out, err = capsys.readouterr()
    assert "music" in out
    assert "1 of 2 texts" in err
    for arguments in ([], ["--lines", str(place / "nowhere")]):
        assert main(["predict", clf, *arguments]) == 2


def test_auto_and_a_folder_of_files(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "intents").mkdir()
    for name in ("light", "music"):
        (tmp_path / "intents" / f"{name}.txt").write_text("\r\n".join([*made.texts(name), "", "The  lamp"]))
    arguments = ["--support", str(tmp_path / "intents"), "--out", str(tmp_path / "clf")]
    assert main(["adapt", f"hf:{place / 'encoder'}", *arguments]) == 0
    out, err = capsys.readouterr()
    assert "Texts: 10 of 2 classes (5 each), up to 8 tokens" in out
    assert "Texts left out, by method: R2D2 " in out
    assert "predict " in out.splitlines()[-1]
    assert out.endswith(" TEXT\n")
    assert "'The lamp' and 'The lamp' look the same, and lie in two classes" in " ".join(err.split())
    assert json.loads((tmp_path / "clf" / "classifier.json").read_text())["texts"] == {"light": 5, "music": 5}
    for wrong in (["--image-size", "8"], ["--method", "r2d2", "--set", "ridge=1"]):
        assert main(["adapt", f"hf:{place / 'encoder'}", *arguments, *wrong]) == 2


@pytest.mark.slow
def test_a_method_that_learns_a_head(place: Path, tmp_path: Path) -> None:
    arguments = ["--support", str(place / "texts.csv"), "--out", str(tmp_path / "clf"), "--method", "maml"]
    assert main(["adapt", f"hf:{place / 'encoder'}", *arguments, "--set", "inner_steps=1"]) == 0
    assert Classifier.load(tmp_path / "clf").probabilities(["the song"]).shape == (1, 3)


def test_a_table_and_a_folder_are_read_alike(place: Path, tmp_path: Path, way: TextPreprocessing) -> None:
    table = Texts.read(place / "texts.csv", way)
    for name in made.WORDS:
        (tmp_path / f"{name}.txt").write_text("\n".join(made.texts(name)))
    folder = Texts.read(tmp_path, way)
    assert table.classes == folder.classes == ("light", "music", "weather")
    assert table.texts == folder.texts == tuple(text for name in made.WORDS for text in made.texts(name))
    assert table.labels.tolist() == folder.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert [Texts.are_at(each) for each in (tmp_path, place / "texts.csv", place)] == [True, True, False]


def test_duplicates(tmp_path: Path, way: TextPreprocessing) -> None:
    (tmp_path / "a.csv").write_text("class,text\na,The sun\nb,the  SUN\na,rain\na,the sun\n")
    found = list(Texts.read(tmp_path / "a.csv", way).near_duplicates())
    assert found == [("'The sun'", "'the SUN'", True), ("'the SUN'", "'the sun'", True)]


TABLES = {
    "no header": ("the sun,weather\nrain,weather\n", "expected the header text,class"),
    "no class": ("text,class\nthe sun,\nrain,weather\n", "example 1 has no class"),
    "no text": ("text,class\nsun,a\n ,weather\n", "example 2 has no text"),
    "no rows": ("text,class\n", "no example"),
    "one class": ("text,class\nsun,a\nrain,a\n", "one class, 'a'"),
    "names that look the same": ("text,class\nsun,a\nrain,A\n", "look the same"),
    "another encoding": ("text,class\nsun,\xe4\n", "UTF-8"),
}


@pytest.mark.parametrize("wrong", TABLES)
def test_tables_that_are_refused(wrong: str, tmp_path: Path, way: TextPreprocessing) -> None:
    content, words = TABLES[wrong]
    (tmp_path / "a.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=words):
        Texts.read(tmp_path / "a.csv", way)


def test_folders_that_are_refused(tmp_path: Path, way: TextPreprocessing) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        Texts.read(tmp_path / "nowhere.csv", way)
    with pytest.raises(DataError, match=r"no \.txt file"):
        Texts.read(tmp_path, way)
    (tmp_path / "a.txt").write_text("\n\n")
    with pytest.raises(DataError, match="holds no text"):
        Texts.read(tmp_path, way)


def test_texts_that_are_refused(way: TextPreprocessing) -> None:
    with pytest.raises(ArgumentError, match="expected a string"):
        way.prepare(b"the sun")
    for text, words in (("", "empty"), ("\n ", "empty"), ("sun \udcff", "no characters")):
        with pytest.raises(DataError, match=words):
            way.prepare(text)
    again = TextPreprocessing.from_dict(way.to_dict(), way.tokenizer.to_str())
    assert np.array_equal(again.prepare("the sun"), way.prepare("The SUN"))


def _file(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


CHANGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "another tokenizer": (_file("tokenizer.json", "{}"), "not the file"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "not the file"),
    "another kind": (_change("classifier.json", kind=["texts"]), "expected the kind"),
    "photos": (_change("classifier.json", kind="photos"), "max_tokens"),
    "no number of tokens": (_change("classifier.json", preprocessing={"max_tokens": 1.5}), "max_tokens"),
    "too many tokens": (_change("classifier.json", preprocessing={"max_tokens": 10**9}), "max_tokens"),
    "a path": (_change("classifier.json", preprocessing={"max_tokens": 9, "tokenizer": "/etc/passwd"}), "max_tokens"),
}


@pytest.mark.parametrize("wrong", CHANGED)
def test_files_that_do_not_fit_are_refused(wrong: str, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "clf", tmp_path / "clf")
    change, words = CHANGED[wrong]
    change(tmp_path / "clf")
    with pytest.raises(DataError, match=words):
        Classifier.load(tmp_path / "clf")


@pytest.mark.slow
def test_onnx_predicts_the_same(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    arguments = ["--support", str(place / "texts.csv"), "--out", str(tmp_path / "clf"), "--method", "r2d2"]
    assert main(["adapt", f"hf:{place / 'encoder'}", *arguments, "--format", "onnx"]) == 0
    texts = ["the song", "please the cold storm now", "rain"]
    expected = Classifier.load(place / "clf").probabilities(texts)
    np.testing.assert_allclose(Classifier.load(tmp_path / "clf", "onnx").probabilities(texts), expected, atol=1e-5)
    (tmp_path / "clf" / "network.pt2").unlink()
    monkeypatch.setattr(sys, "modules", {**sys.modules, "torch": None})  # Importing it fails.
    probabilities = runpy.run_path(str(tmp_path / "clf" / "predict.py"))["load"](tmp_path / "clf")[1]
    np.testing.assert_allclose(probabilities(texts), expected, atol=1e-5)
