"""What is fuzzed: a name -> seeds made by code, and a function that hands bytes to one reader."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import pickle
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from metawrap.data import load_data
from metawrap.training.checkpoints import load_checkpoint

FOLDER = Path(tempfile.mkdtemp(prefix="metawrap-fuzz-"))
(FOLDER / "run").mkdir()


class Harness(NamedTuple):
    """needs: the module that has the reader, where not every version of the package has it."""

    run: Callable[[bytes], object]
    seeds: Callable[[], Iterator[bytes]]
    needs: str = "metawrap"

    @property
    def available(self) -> bool:
        return importlib.util.find_spec(self.needs) is not None


def _file(name: str, content: bytes) -> Path:
    path = FOLDER / name
    path.write_bytes(content)
    return path


def _checkpoint(content: bytes) -> object:
    return load_checkpoint(_file("epoch-0001.pt", content))


def _archive_of(opcodes: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, part in {"data.pkl": opcodes, "byteorder": b"little", "data/0": bytes(24), "version": b"3\n"}.items():
            archive.writestr(f"a/{name}", part)
    return buffer.getvalue()


def _checkpoint_pickle(content: bytes) -> object:
    # The pickle alone: a fuzzer does not guess the checksum that zip has of it.
    return _checkpoint(_archive_of(content))


def _checkpoint_seeds() -> Iterator[bytes]:
    fields = ("settings", "learner", "optimizer", "scheduler", "rng", "history", "seconds")
    for learner in ({}, {"w": torch.zeros(2, 3)}, {"w": torch.zeros(1).expand(4), "n": {"i": 3}}):
        buffer = io.BytesIO()
        content = {"format": "metawrap-checkpoint", "version": 1} | {name: {} for name in fields}
        torch.save(content | {"learner": learner}, buffer)
        yield buffer.getvalue()


def _pickle_seeds() -> Iterator[bytes]:
    for whole in _checkpoint_seeds():
        with zipfile.ZipFile(io.BytesIO(whole)) as archive:
            yield archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _omniglot(content: bytes) -> object:
    return load_data("omniglot", root=_file("omniglot-py.zip", content), image_size=8)


def _omniglot_seeds() -> Iterator[bytes]:
    for folder in ("images_background", "omniglot-py/images_background"):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for character in range(3):
                archive.writestr(f"{folder}/Latin/character{character:02d}/0001_01.png", _png())
        yield buffer.getvalue()


def _cache(content: bytes) -> object:
    from metawrap.data.pickles import read_pickle  # type: ignore[import-not-found,unused-ignore]

    def read(value: object, deep: int = 0) -> None:
        if hasattr(value, "read"):
            value.read()
        elif isinstance(value, dict | list | tuple) and deep < 4:
            for part in value.values() if isinstance(value, dict) else value:
                read(part, deep + 1)

    return read(read_pickle(content))


def _cache_seeds() -> Iterator[bytes]:
    images = np.arange(48, dtype=np.uint8).reshape(2, 2, 4, 3)
    for protocol in range(5):
        yield pickle.dumps({"image_data": images, "class_dict": {"n01": [0, 1], "n02": [2]}}, protocol)
        yield pickle.dumps([images.astype(np.float32), np.array(["a", "b"]), b"x" * 30, -1, 2.5, None], protocol)


def _table(content: bytes) -> object:
    from metawrap.data.text_files import decoded, read_table  # type: ignore[import-not-found,unused-ignore]

    return read_table(decoded(content, "train.csv"), "train.csv", ("filename", "label"))


def _table_seeds() -> Iterator[bytes]:
    yield b"filename,label\na.jpg,n01\nb.jpg,n02\n"
    yield '\ufeff"filename","label"\r\n"a ""x"".jpg",n01\r\n'.encode()


def _split(content: bytes) -> object:
    from metawrap.data.class_split import split_as_given  # type: ignore[import-not-found,unused-ignore]

    kind = ("csv", "json", "yaml")[content[0] % 3] if content else "csv"
    return split_as_given(["a", "b", "c"], _file(f"split.{kind}", content[1:]))


def _split_seeds() -> Iterator[bytes]:
    yield b"\x00class,split\na,train\nb,val\nc,test\n"
    yield b'\x01{"train": ["a"], "val": ["b"], "test": ["c"]}'
    yield b"\x02train: [a]\nval: [b]\ntest: &x [c]\n"


def _cifar(content: bytes) -> object:
    return load_data("cifar-fs", root=_file("cifar-100-python.tar.gz", content))


def _cifar_seeds() -> Iterator[bytes]:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in ("meta", "train", "test"):
            part = pickle.dumps({"fine_labels": [0], "data": np.zeros((1, 3072), np.uint8)}, 2)
            entry = tarfile.TarInfo(f"cifar-100-python/{name}")
            entry.size = len(part)
            archive.addfile(entry, io.BytesIO(part))
    yield buffer.getvalue()
    # Opened as a tar that is not packed where the reader goes by content: gzip's checksum would hide everything.
    yield gzip.decompress(buffer.getvalue())


_RECORDS = ("run.json", "log.jsonl", "insight.jsonl", "result.json", "final_insight.json")


def _run(content: bytes) -> object:
    from metawrap.report.records import read_records  # type: ignore[import-not-found,unused-ignore]

    for name, part in zip(_RECORDS, (*content.split(b"\0"), b"", b"", b"", b"", b""), strict=False):
        _file(f"run/{name}", part)
    return read_records(FOLDER / "run")


def _run_seeds() -> Iterator[bytes]:
    score = {"mean": 0.5, "accuracy": 0.5, "interval": 0.1, "loss": 1.0}
    test = {"epoch": 1, "tasks": 2, "norms": {"support": {"before": score, "after": score}}}
    quarters = {"low": [0.1], "median": [0.2], "high": [0.3]}
    example = {"label": 0, "prediction": 1, "probability": 0.5, "png": "aGk=", "at": [0.1, 0.2]}
    final = {
        "tasks": 2,
        "steps": [{"steps": 1} | score],
        "classes": {
            "count": 1,
            "shown": [{"class": "a", "targets": 2, "right": 1}],
            "confusions": [{"class": "a", "taken_for": "b", "times": 1, "targets": 2}],
        },
        "episodes": [{"task": 1, "why": "first", "classes": ["a", "b"], "support": [example], "target": [example]}],
    }
    files: list[object] = [
        {"settings": {"method": "maml++", "epochs": 1}, "command": "metawrap train"},
        {"epoch": 1, "loss": 1.0, "accuracy": 0.5, "validation_accuracy": 0.5, "seconds": 1},
        {"epoch": 1, "step_weights": [0.5], "step_losses": [1.0], "rates": {"w": quarters}, "norms": {"n": quarters}},
        {"settings": {"epochs": 1}, "test": test, "trained_norm": "support", "machine": {"cores": 2}, "seconds": 1},
        final,
    ]
    yield b"\0".join(json.dumps(each).encode() for each in files)
    yield b'{"settings": {}, "seeds": [0, 1]}\0\0'


def _classifier(content: bytes) -> object:
    from metawrap.classifier import Classifier  # type: ignore[import-not-found,unused-ignore]

    _file("classifier.json", content)
    return Classifier.load(FOLDER)


def _classifier_seeds() -> Iterator[bytes]:
    yield _deployed("classifier.json")


def _program(content: bytes) -> object:
    # The description alone, for the same reason as above.
    from metawrap.classifier.program import load_program  # type: ignore[import-not-found,unused-ignore]

    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(_deployed("network.pt2"))) as whole, zipfile.ZipFile(buffer, "w") as archive:
        for member in whole.infolist():
            described = member.filename.endswith("models/model.json")
            archive.writestr(member, content if described else whole.read(member))
    return load_program(_file("fuzzed.pt2", buffer.getvalue()))


def _program_seeds() -> Iterator[bytes]:
    with zipfile.ZipFile(io.BytesIO(_deployed("network.pt2"))) as archive:
        yield archive.read(next(name for name in archive.namelist() if name.endswith("models/model.json")))


@cache
def _deployed(name: str) -> bytes:
    """A file of the smallest classifier."""
    from metawrap.classifier import Classifier
    from metawrap.data import Preprocessing

    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
    folder = FOLDER / "made"
    Classifier.of(network, ("a", "b"), Preprocessing(size=(2, 2))).save(folder)
    return (folder / name).read_bytes()


HARNESSES = {
    "checkpoint": Harness(_checkpoint, _checkpoint_seeds),
    "checkpoint_pickle": Harness(_checkpoint_pickle, _pickle_seeds),
    "archive": Harness(_omniglot, _omniglot_seeds),
    "pickle_cache": Harness(_cache, _cache_seeds, "metawrap.data.pickles"),
    "csv": Harness(_table, _table_seeds, "metawrap.data.text_files"),
    "split": Harness(_split, _split_seeds, "metawrap.data.class_split"),
    "tar": Harness(_cifar, _cifar_seeds, "metawrap.data.cifar"),
    "run": Harness(_run, _run_seeds, "metawrap.report.records"),
    "classifier": Harness(_classifier, _classifier_seeds, "metawrap.classifier"),
    "program": Harness(_program, _program_seeds, "metawrap.classifier"),
}
