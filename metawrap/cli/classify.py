"""`metawrap adapt`: a run or a pretrained network, and a few photos or texts of each class -> a classifier in a folder.

`metawrap predict`: a classifier and photos or texts -> names with probabilities.
"""

from __future__ import annotations

import csv
import json
import shlex
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from metawrap import methods
from metawrap.classifier import Classifier, Estimate, Photos, Prediction, Texts, choose_method, fit_classifier
from metawrap.classifier.fitting import EMBEDDING_METHODS, Examples
from metawrap.classifier.program import Way
from metawrap.data.class_folders import visible
from metawrap.data.pictures import IMAGE_SUFFIXES
from metawrap.data.preprocessing import Preprocessing
from metawrap.data.problems import listed, reading
from metawrap.errors import ArgumentError, DataError, MetaWrapWarning, printable
from metawrap.pretrained import DEFAULT, load_network
from metawrap.sentence_encoder import load_encoder
from metawrap.settings.keywords import nested
from metawrap.training.experiment import find_device
from metawrap.training.loaded_run import load
from metawrap.training.machine import command_line, program
from metawrap.training.progress import say
from metawrap.training.run_settings import METHODS

_SHOWN = 5  # confusions, near-duplicates
_AT_ONCE = 64


def run_adapt(arguments: Namespace) -> None:
    """Prints the estimate and writes the classifier."""
    is_run = (Path(arguments.source) / "run.json").exists()
    if is_run and Texts.are_at(arguments.support):
        raise ArgumentError(f"support: '{arguments.support}' holds texts, but the run '{arguments.source}' has photos.")
    make = _from_run if is_run else _from_encoder if Texts.are_at(arguments.support) else _from_network
    learner, examples, way, words = make(arguments)
    kind = way.kind
    if isinstance(way, Preprocessing):
        form = f"{way.size[1]} x {way.size[0]} pixels"
    else:
        form = f"up to {max(each.shape[1] for each in examples.prepared)} tokens"
    print(f"{kind.title()}: {_counts(examples)}, {form}")
    print(f"Network: {words}")
    if isinstance(learner, dict):
        learner = _chosen(learner, examples, way)
    about = {"network": words, "command": command_line()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "norm=", MetaWrapWarning)  # The line below says it.
        classifier, estimate = fit_classifier(learner, examples, way, about)
    trained, norm = learner.settings.norm, classifier.about["norm"]
    moved = f', because "{trained}", of its training, needs a batch of photos' if norm != trained else ""
    print(f'Method: {classifier.about["method"]}, norm="{norm}"{moved}')
    _say_estimate(estimate, kind)
    _warn_of_duplicates(examples, kind)
    out = classifier.save(arguments.out, ("torch", *arguments.formats), examples.prepared)
    files = ", ".join(sorted(each.name for each in out.iterdir()))
    print(f"Classifier: {out} ({files})\nNext: {program()} predict {shlex.quote(str(out))} {kind[:-1].upper()}")


def _from_run(arguments: Namespace) -> tuple[Any, Examples, Way, str]:
    given = [name for name in ("method", "weights", "image_size", "options") if name in arguments]
    if given:
        flag = "set" if given[0] == "options" else given[0].replace("_", "-")
        raise ArgumentError(
            f"{flag}: '{arguments.source}' is a run, which has its method, weights and images. Leave --{flag} out."
        )
    run = load(arguments.source, arguments.checkpoint, arguments.model, arguments.device)
    photos = Photos.read(arguments.support, run.preprocessing)
    settings = run.settings
    words = f"run '{arguments.source}' (trained on {settings.data}, epoch {run.epoch})"
    return run.learner, photos, run.preprocessing, words


def _from_encoder(arguments: Namespace) -> tuple[Any, Examples, Way, str]:
    """As `_from_network`, of texts."""
    if "image_size" in arguments:
        raise ArgumentError(f"image_size: '{arguments.support}' holds texts. Leave --image-size out.")
    weights = getattr(arguments, "weights", DEFAULT)
    encoder, way, words = load_encoder(arguments.source, weights)
    texts = Texts.read(arguments.support, way)
    model = nn.Sequential(encoder, nn.Linear(encoder.width, len(texts.classes)))
    return _learners(arguments, model, lambda: model), texts, way, words


def _from_network(arguments: Namespace) -> tuple[Any, Examples, Way, str]:
    """As `_from_run`; under "auto" the learner is a dict of learners by the name of their class."""
    source = arguments.source
    if Path(source).is_dir() and ":" not in source:
        raise ArgumentError(
            f"'{source}' is a folder without run.json: no run. Name a run, or a network as module:name."
        )
    weights = getattr(arguments, "weights", None)
    network = load_network(source, weights)
    preprocessing = network.preprocessing
    if (size := getattr(arguments, "image_size", None)) is not None:
        preprocessing = (
            Preprocessing(size=(size, size)) if preprocessing is None else replace(preprocessing, size=(size, size))
        )
    if preprocessing is None:
        raise ArgumentError(
            f"image_size: nothing says which images '{source}' takes. Pass --image-size N, or set its attribute "
            "'preprocessing'."
        )
    photos = Photos.read(arguments.support, preprocessing)
    # A method on an embedding keeps the statistics of the pretrained norms; another learns a new head.
    learners = _learners(
        arguments, network.model, lambda: load_network(source, weights, ways=len(photos.classes)).model
    )
    return learners, photos, preprocessing, network.words


def _learners(arguments: Namespace, model: nn.Module, with_head: Callable[[], nn.Module]) -> Any:
    """The learner of the method; under "auto" a dict of learners by the name of their class.

    model: for methods on an embedding. with_head: the same with an output for each class, for the others.
    """
    name, device = getattr(arguments, "method", "auto"), find_device(arguments.device)
    options = nested(dict(getattr(arguments, "options", [])))
    classes = EMBEDDING_METHODS if name == "auto" else (METHODS[name],)
    if set(classes) <= set(EMBEDDING_METHODS):
        options = {"norm": "running", **options}
    else:
        model = with_head()
    learners = {each: getattr(methods, each)(model, **options).to(device).eval() for each in classes}
    return learners if name == "auto" else learners[classes[0]]


def _chosen(learners: dict[str, Any], examples: Examples, way: Way) -> Any:
    learner, estimates = choose_method(lambda name: learners[name], examples, way, tuple(learners))
    if any(estimates.values()):
        words = (
            f"{name} {'-' if found is None else f'{100 * found.accuracy:.1f} %'}" for name, found in estimates.items()
        )
        print(f"{way.kind.title()} left out, by method: {', '.join(words)}")
    return learner


def _counts(examples: Examples) -> str:
    counts = examples.labels.bincount()
    low, high, classes = int(counts.min()), int(counts.max()), len(examples.classes)
    return f"{len(examples.labels)} of {classes} classes ({low if low == high else f'{low} to {high}'} each)"


def _say_estimate(estimate: Estimate | None, kind: str) -> None:
    if estimate is None:
        print(f"Estimate: none, because each class has one {kind[:-1]}. Two or more of each show how well it works.")
        return
    print(f"{kind.title()} left out, {estimate.rounds} rounds: {estimate}")
    for true, found, times in estimate.confused[:_SHOWN]:
        print(f"  {printable(true)} taken for {printable(found)}: {times}")


def _warn_of_duplicates(examples: Examples, kind: str) -> None:
    pairs = list(examples.near_duplicates())
    for one, other, apart in sorted(pairs, key=lambda pair: not pair[2])[:_SHOWN]:
        where = " lie in two classes" if apart else ""
        say(f"Warning: {printable(one)} and {printable(other)} look the same{where or '; the estimate is too good'}.")
    if len(pairs) > _SHOWN:
        say(f"Warning: {len(pairs) - _SHOWN} more pairs of {kind} look the same.")


def run_predict(arguments: Namespace) -> None:
    """Prints a line, a JSON object or a CSV row for each. Raises DataError at the end if some could not be read."""
    classifier = Classifier.load(arguments.classifier, arguments.runtime)
    way, kind = classifier.preprocessing, classifier.preprocessing.kind
    if arguments.top < 1:
        raise ArgumentError(f"top: expected at least 1, but got {arguments.top}.")
    show = _writer(arguments, classifier)
    broken, waiting, seen = 0, list[tuple[str, Any]](), 0

    def answer() -> None:
        found = classifier.predict_prepared([prepared for _, prepared in waiting])
        for (example, _), prediction in zip(waiting, found, strict=True):
            show(example, prediction)
        waiting.clear()

    for example in _named(arguments, kind):
        seen += 1
        try:
            waiting.append((example, way.prepare(example)))
        except DataError as error:
            broken += 1
            say(f"Error: {error}", error=True)
        if len(waiting) == _AT_ONCE:
            answer()
    if waiting:
        answer()
    if broken:
        raise DataError(f"{broken} of {seen} {kind} could not be read; the others are named above.")
    if not seen:
        hold = f"{listed(arguments.examples)} hold no photo ({', '.join(IMAGE_SUFFIXES)})"
        raise ArgumentError(f"{kind}: {hold if arguments.examples and kind == 'photos' else 'none was given'}.")


def _named(arguments: Namespace, kind: str) -> Iterator[str]:
    """The examples that arguments name: texts, photos and folders of photos; and lines of a file, or of "-"."""
    for each in arguments.examples:
        if each == "-":
            yield from _lines(sys.stdin)
        elif kind == "photos" and Path(each).is_dir():
            inside = sorted(str(path.relative_to(each)) for path in Path(each).rglob("*") if path.is_file())
            yield from (str(Path(each) / name) for name in visible(inside) if name.lower().endswith(IMAGE_SUFFIXES))
        else:
            yield each
    if arguments.lines == "-":
        yield from _lines(sys.stdin)
    elif arguments.lines is not None:
        with reading(f"'{arguments.lines}' cannot be read", OSError, UnicodeDecodeError, fix="Name a file in UTF-8."):
            yield from _lines(Path(arguments.lines).read_text(encoding="utf-8-sig").split("\n"))


def _lines(lines: Iterable[str]) -> Iterator[str]:
    yield from (text for line in lines if (text := line.rstrip("\r\n")))


def _writer(arguments: Namespace, classifier: Classifier) -> Any:
    top = min(arguments.top, len(classifier.classes))
    kind = classifier.preprocessing.kind[:-1]
    if arguments.json:
        return lambda given, found: print(
            json.dumps({kind: given, "classes": [{"name": n, "probability": p} for n, p in found.ranking[:top]]})
        )
    if arguments.csv:
        rows = csv.writer(sys.stdout)
        rows.writerow([kind, *(f"{name}{place}" for place in range(1, top + 1) for name in ("class", "probability"))])
        return lambda given, found: rows.writerow(
            [given, *(v for n, p in found.ranking[:top] for v in (n, f"{p:.6f}"))]
        )

    def line(given: str, found: Prediction) -> None:
        names = "   ".join(f"{printable(name)} {100 * p:.1f} %" for name, p in found.ranking[:top])
        print(f"{printable(given)}   {names}")

    return line
