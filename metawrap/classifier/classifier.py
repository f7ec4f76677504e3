"""A classifier of photos or texts: an adapted network, its classes and preprocessing, in memory or in a folder.

The folder holds classifier.json (classes, preprocessing, how it was made), network.pt2 (a program of torch.export),
weights.safetensors, predict.py, which runs it without metawrap; of texts, tokenizer.json; model.onnx if asked for.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from metawrap.classifier.program import (
    Deployed,
    Run,
    Way,
    exported,
    in_batches,
    load_onnx,
    load_program,
    save_onnx,
    save_program,
)
from metawrap.classifier.sharing import CARD, Shared, card_of, is_card
from metawrap.data.preprocessing import Preprocessing
from metawrap.data.text_files import read_text
from metawrap.data.text_preprocessing import TextPreprocessing
from metawrap.engines import first_line
from metawrap.errors import ArgumentError, DataError, UnsupportedModuleError, shown, writing

FORMATS = ("torch", "onnx")
ABOUT, PROGRAM, ONNX, WEIGHTS, SCRIPT, TOKENIZER = (
    "classifier.json",
    "network.pt2",
    "model.onnx",
    "weights.safetensors",
    "predict.py",
    "tokenizer.json",
)
# Of each kind of example, the source of predict.py.
_SCRIPTS = {"photos": "predict.py", "texts": "predict_texts.py"}
_VERSION = 1
_MAX_ABOUT_BYTES = 16 * 2**20
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Prediction:
    """What one photo shows, or one text is. ranking: (class, probability) of every class, the most probable first."""

    ranking: tuple[tuple[str, float], ...]

    @property
    def name(self) -> str:
        """The most probable class."""
        return self.ranking[0][0]

    @property
    def probability(self) -> float:
        """Its probability, in 0..1."""
        return self.ranking[0][1]


@dataclass
class Classifier(Shared):
    """Names the classes of photos or texts.

    classes: their names, in the order of the outputs. preprocessing: the way from a photo or text to the network's
    input. run: what `preprocessing.stack` gives to probabilities (examples, classes). about: how it was made, plain
    values. at_once: how many examples `run` takes at once at most. network: the adapted network, where it is known.
    folder: where it was loaded from.

    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    >>> classifier = Classifier.of(network, ("day", "night"), Preprocessing(size=(2, 2)))
    >>> [prediction] = classifier.predict([np.zeros((2, 2, 3), np.uint8)])
    >>> prediction.name in ("day", "night")
    True
    """

    classes: tuple[str, ...]
    preprocessing: Way
    run: Run
    about: dict[str, Any] = field(default_factory=dict)
    at_once: int = 64
    network: nn.Module | None = None
    folder: Path | None = None

    files: ClassVar[tuple[str, ...]] = (ABOUT, PROGRAM, WEIGHTS, SCRIPT, ONNX, TOKENIZER, CARD)

    @classmethod
    def of(
        cls,
        network: nn.Module,
        classes: Sequence[str],
        preprocessing: Way,
        about: Mapping[str, Any] | None = None,
        temperature: float = 1.0,
    ) -> Classifier:
        """The classifier of an adapted network, whose outputs are the logits of the classes, times the temperature."""
        deployed = Deployed(network, preprocessing, temperature).eval()
        return cls(tuple(classes), preprocessing, deployed, dict(about or {}), network=deployed)

    def probabilities(self, examples: Iterable[Any]) -> NDArray[np.float32]:
        """The probability of each class, (examples, classes).

        Args:
            examples: texts; or photos: paths, PIL images, arrays or the bytes of files, see `Preprocessing.pixels`.
        Raises:
            DataError: one of them is no readable picture, or an empty text.
        """
        if isinstance(examples, str | Path | bytes):
            kind = self.preprocessing.kind
            raise ArgumentError(f"Expected a list of {kind}, but got one: {shown(examples)}. Put it into a list.")
        return self.of_prepared([self.preprocessing.prepare(each) for each in examples])

    def of_prepared(self, prepared: Sequence[Any]) -> NDArray[np.float32]:
        """As `probabilities`, of what `preprocessing.prepare` gave for each example."""
        if not len(prepared):
            return np.zeros((0, len(self.classes)), np.float32)
        found: NDArray[np.float32] = in_batches(self.run, self.preprocessing, prepared, self.at_once).numpy()
        return found

    def predict(self, examples: Iterable[Any]) -> list[Prediction]:
        """What each photo shows, or each text is; see `probabilities`."""
        return self._ranked(self.probabilities(examples))

    def predict_prepared(self, prepared: Sequence[Any]) -> list[Prediction]:
        """As `predict`, of what `preprocessing.prepare` gave for each example."""
        return self._ranked(self.of_prepared(prepared))

    def _ranked(self, rows: NDArray[np.float32]) -> list[Prediction]:
        orders = np.argsort(-rows, axis=1, kind="stable")
        return [
            Prediction(tuple((self.classes[k], float(row[k])) for k in order))
            for row, order in zip(rows, orders, strict=True)
        ]

    def save(
        self, folder: str | Path, formats: Sequence[str] = ("torch",), examples: Sequence[Any] | None = None
    ) -> Path:
        """Writes the classifier into a new folder, or over a classifier in it; returns the folder.

        Args:
            formats: of "torch" and "onnx". examples: what `preprocessing.prepare` gave, on which the programs are
                compared with the network; some that are made up if None.
        Raises:
            ArgumentError: an unknown format, or a classifier that was loaded; copy its folder.
            CheckpointError: the folder holds something else, or cannot be written.
            UnsupportedModuleError: the network cannot be exported, or a program does not give the same probabilities.
        """
        out = Path(folder)
        if unknown := [name for name in formats if name not in FORMATS]:
            raise ArgumentError(f"formats: expected some of {', '.join(FORMATS)}, but got {shown(unknown[0])}.")
        if self.network is None:
            raise ArgumentError(f"save: this classifier was loaded from files. Copy its folder to '{out}'.")
        self.check_free(out)
        way = self.preprocessing
        examples = way.examples() if examples is None else list(examples[:8])
        several = way.stack([*examples, *examples][: max(2, len(examples))])
        program, at_once = exported(self.network, several, getattr(way, "max_tokens", None))
        with writing("out", out):
            out.mkdir(parents=True, exist_ok=True)
            for name in self.files:
                (out / name).unlink(missing_ok=True)
            save_program(program, out / PROGRAM)
            _save_weights(self.network, out / WEIGHTS)
            shutil.copyfile(Path(__file__).with_name(_SCRIPTS[way.kind]), out / SCRIPT)
            if isinstance(way, TextPreprocessing):
                (out / TOKENIZER).write_text(way.tokenizer.to_str(), encoding="utf-8")
        runs = {PROGRAM: load_program(out / PROGRAM)}
        if "onnx" in formats:
            save_onnx(program, out / ONNX, "tokens" if way.kind == "texts" else "pictures")
            runs[ONNX] = load_onnx(out / ONNX)
        for name, run in runs.items():
            for some in (examples, examples[:1]):
                expected = in_batches(self.run, way, some, self.at_once)
                _check_same(name, in_batches(run, way, some, at_once or self.at_once), expected)
        about = self.about | {
            "format": _VERSION,
            "kind": way.kind,
            "classes": list(self.classes),
            "preprocessing": way.to_dict(),
            "at_once": at_once,
            "sha256": {name: _digest(out / name) for name in (*runs, WEIGHTS, TOKENIZER) if (out / name).exists()},
        }
        with writing("out", out):  # Last: a folder with this file is whole.
            _write_about(about, out)
        return out

    @classmethod
    def load(cls, folder: str | Path, runtime: str = "torch") -> Classifier:
        """The classifier in a folder of `save`. No code of the folder runs.

        Args:
            runtime: "torch", or "onnx" for model.onnx by onnxruntime.
        Raises:
            ArgumentError: another runtime.
            DataError: the folder holds no classifier, or a file of it is missing, changed, or of another form.
        """
        if runtime not in FORMATS:
            raise ArgumentError(f"runtime: expected one of {', '.join(FORMATS)}, but got {shown(runtime)}.")
        place = Path(folder)
        about = _read_about(place)
        file = place / (PROGRAM if runtime == "torch" else ONNX)
        if not file.is_file():
            fix = "Write it with: metawrap adapt ... --format onnx" if runtime == "onnx" else "Get a fresh copy of it."
            raise DataError(f"'{place}' has no {file.name}. {fix}")
        _check_digest(about, file)
        run = load_program(file) if runtime == "torch" else load_onnx(file)
        classes, way = about.pop("classes"), about.pop("preprocessing")
        made = cls(classes, way, run, about, about.get("at_once") or cls.at_once, folder=place)
        try:
            found = made.of_prepared(way.examples()[:1])
        except (RuntimeError, ValueError, IndexError, MemoryError) as error:
            raise DataError(f"'{file}' does not take {way.kind} as {ABOUT} has them: {first_line(error)}.") from error
        if found.shape != (1, len(classes)):
            raise DataError(
                f"'{file}' gives {found.shape[-1]} probabilities, but {ABOUT} names {len(classes)} classes. Get a "
                "fresh copy of both."
            )
        return made

    def check_free(self, out: Path) -> None:
        """Raises ArgumentError if a folder holds files that are none of a classifier's, or is a link elsewhere."""
        if out.is_symlink() or (out.exists() and not out.is_dir()):
            raise ArgumentError(f"out: '{out}' is no folder. Name a new one.")
        for each in sorted(out.iterdir()) if out.exists() else ():
            if each.name not in self.files or (each.name == CARD and not is_card(each)):
                raise ArgumentError(f"out: '{out}' holds other files, such as {shown(each.name)}. Name a new folder.")

    def card(self, repository: str = ".") -> str:
        """The model card, in Markdown. repository: as `from_pretrained` takes it."""
        return card_of(self.about, self.classes, self.preprocessing.kind, repository)

    def write_shared(self, out: Path) -> None:
        """Writes all files but the card, without the command line."""
        if self.network is not None:
            about = {name: value for name, value in self.about.items() if name != "command"}
            replace(self, about=about).save(out)
            return
        assert self.folder is not None
        about = json.loads((self.folder / ABOUT).read_text(encoding="utf-8"))
        about.pop("command", None)
        found = [file for name in (PROGRAM, WEIGHTS, ONNX, TOKENIZER) if (file := self.folder / name).exists()]
        for file in found:
            _check_digest(about, file)  # A link of a stranger's folder may lead to a file of yours.
        with writing("out", out):
            (out / CARD).unlink(missing_ok=True)
            for file in found:
                if not (out / file.name).exists() or not file.samefile(out / file.name):
                    shutil.copyfile(file, out / file.name)
            shutil.copyfile(Path(__file__).with_name(_SCRIPTS[self.preprocessing.kind]), out / SCRIPT)
            _write_about(about, out)


def _read_about(place: Path) -> dict[str, Any]:
    """classifier.json, with the classes as a tuple and the preprocessing as such; DataError unless it is whole."""
    path = place / ABOUT
    if not path.is_file():
        raise DataError(f"'{place}' holds no classifier: there is no {ABOUT}. Make one with: metawrap adapt")
    wrong = f"'{path}' is no description of a classifier"
    try:
        if path.stat().st_size > _MAX_ABOUT_BYTES:
            raise DataError(f"{wrong}: it is too large. Get a fresh copy of it.")
        about: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{wrong} ({error}). Get a fresh copy of it.") from error
    if not isinstance(about, dict) or about.get("format") != _VERSION:
        version = about.get("format") if isinstance(about, dict) else None
        raise DataError(
            f"{wrong}: expected format {_VERSION}, but it has {shown(version)}. Use the metawrap that wrote it."
        )
    classes, at_once, kind = about.get("classes"), about.get("at_once"), about.get("kind")
    if not isinstance(classes, list) or len(classes) < 2 or not all(isinstance(name, str) for name in classes):
        raise DataError(f"{wrong}: expected a list of two or more names as classes, but it has {shown(classes)}.")
    if at_once not in (None, 1) or isinstance(at_once, bool | float):
        raise DataError(f"{wrong}: expected at_once null or 1, but it has {shown(at_once)}.")
    if not isinstance(kind, str) or kind not in _SCRIPTS:
        raise DataError(f"{wrong}: expected the kind {' or '.join(_SCRIPTS)}, but it has {shown(kind)}.")
    stored = about.get("preprocessing", {})
    preprocessing: Way
    try:
        if kind == "texts":
            _check_digest(about, place / TOKENIZER)
            preprocessing = TextPreprocessing.from_dict(stored, read_text(place / TOKENIZER))
        else:
            preprocessing = Preprocessing.from_dict(stored)
    except ArgumentError as error:
        raise DataError(f"{wrong}: {error}") from error
    return about | {"classes": tuple(classes), "preprocessing": preprocessing}


def _write_about(about: Mapping[str, Any], out: Path) -> None:
    (out / ABOUT).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_digest(about: Mapping[str, Any], file: Path) -> None:
    """Raises DataError unless a file is there, and is the one that classifier.json was written for."""
    digests = about.get("sha256")
    if not file.is_file() or not isinstance(digests, dict) or digests.get(file.name) != _digest(file):
        raise DataError(f"'{file}' is not the file that {ABOUT} beside it was written for. Get a fresh copy of both.")


def _check_same(name: str, found: Tensor, expected: Tensor) -> None:
    worst = float((found - expected).abs().max())
    if not worst <= _TOLERANCE:  # Not a number, too.
        raise UnsupportedModuleError(
            f"{name}: the exported program gives other probabilities than the network, by {worst:.1e}; expected "
            f"at most {_TOLERANCE:.0e}. Its forward depends on more than its input: deploy the module of learner.adapt."
        )


def _save_weights(network: nn.Module, path: Path) -> None:
    from safetensors.torch import save

    # Copies: tied weights share memory, which the format refuses.
    path.write_bytes(save({name: value.detach().clone().contiguous() for name, value in network.state_dict().items()}))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
