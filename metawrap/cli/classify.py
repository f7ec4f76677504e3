"""`metawrap adapt`: a run or a pretrained network, and a few photos or texts of each class -> a classifier in a folder.

`metawrap predict`: a classifier and photos or texts -> names with probabilities.
"""

from __future__ import annotations

import csv
import json
import shlex
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from metawrap.classifier import Classifier, Estimate, Photos, Prediction, Texts
from metawrap.classifier.fitting import Examples
from metawrap.cli.sources import source_of
from metawrap.data.class_folders import visible
from metawrap.data.pictures import IMAGE_SUFFIXES
from metawrap.data.preprocessing import Preprocessing
from metawrap.data.problems import listed, reading
from metawrap.errors import ArgumentError, DataError, printable
from metawrap.training.machine import program
from metawrap.training.progress import say

_SHOWN = 5  # confusions, near-duplicates
_COMPARED = 1_000  # pairs of near-duplicates: of equal photos there are as many as their square
_AT_ONCE = 64


def run_adapt(arguments: Namespace) -> None:
    """Prints the estimate and writes the classifier."""
    source = source_of(arguments, texts=Texts.are_at(arguments.support))
    way, kind = source.preprocessing, source.preprocessing.kind
    if isinstance(way, Preprocessing):
        examples: Examples = Photos.read(arguments.support, way)
        form = f"{way.size[1]} x {way.size[0]} pixels"
    else:
        examples = Texts.read(arguments.support, way)
        form = f"up to {max(each.shape[1] for each in examples.prepared)} tokens"
    print(f"{kind.title()}: {_counts(examples)}, {form}")
    print(f"Network: {source.words}")
    learner, estimates = source.choose(examples)
    if any(estimates.values()):
        words = (
            f"{name} {'-' if found is None else f'{100 * found.accuracy:.1f} %'}" for name, found in estimates.items()
        )
        print(f"{kind.title()} left out, by method: {', '.join(words)}")
    classifier, estimate = source.fit(learner, examples)
    trained, norm = learner.settings.norm, classifier.about["norm"]
    moved = f', because "{trained}", of its training, needs a batch of photos' if norm != trained else ""
    print(f'Method: {classifier.about["method"]}, norm="{norm}"{moved}')
    _say_estimate(estimate, kind)
    _warn_of_duplicates(examples, kind)
    out = classifier.save(arguments.out, ("torch", *arguments.formats), examples.prepared)
    files = ", ".join(sorted(each.name for each in out.iterdir()))
    print(f"Classifier: {out} ({files})\nNext: {program()} predict {shlex.quote(str(out))} {kind[:-1].upper()}")


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
    pairs = list(islice(examples.near_duplicates(), _COMPARED))
    for one, other, apart in sorted(pairs, key=lambda pair: not pair[2])[:_SHOWN]:
        where = ", and lie in two classes" if apart else "; the estimate is too good"
        say(f"Warning: {printable(one)} and {printable(other)} look the same{where}.")
    if (more := len(pairs) - _SHOWN) > 0:
        say(f"Warning: {more}{' or more' if len(pairs) == _COMPARED else ''} other pairs of {kind} look the same.")


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
        raise DataError(f"{broken} of {seen} {kind} could not be read; the errors above name them.")
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
