"""`metawrap adapt`: a run or a pretrained network, and a few photos of each class -> a classifier in a folder.

`metawrap predict`: a classifier and photos -> names with probabilities.
"""

from __future__ import annotations

import csv
import json
import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from metawrap.classifier import Classifier, Estimate, Photos, Prediction
from metawrap.cli.sources import source_of
from metawrap.data.class_folders import visible
from metawrap.data.pictures import IMAGE_SUFFIXES
from metawrap.data.problems import listed
from metawrap.errors import ArgumentError, DataError, printable
from metawrap.training.machine import program
from metawrap.training.progress import say

_SHOWN = 5  # confusions, near-duplicates
_COMPARED = 1_000  # pairs of near-duplicates: of equal photos there are as many as their square
_AT_ONCE = 64


def run_adapt(arguments: Namespace) -> None:
    """Prints the estimate and writes the classifier."""
    source = source_of(arguments, "auto")
    preprocessing = source.preprocessing
    photos = Photos.read(arguments.support, preprocessing)
    print(f"Photos: {_counts(photos)}, {preprocessing.size[1]} x {preprocessing.size[0]} pixels")
    print(f"Network: {source.words}")
    learner, estimates = source.choose(photos)
    if any(estimates.values()):
        words = (
            f"{name} {'-' if found is None else f'{100 * found.accuracy:.1f} %'}" for name, found in estimates.items()
        )
        print(f"Photos left out, by method: {', '.join(words)}")
    classifier, estimate = source.fit(learner, photos)
    trained, norm = learner.settings.norm, classifier.about["norm"]
    moved = f', because "{trained}", of its training, needs a batch of photos' if norm != trained else ""
    print(f'Method: {classifier.about["method"]}, norm="{norm}"{moved}')
    _say_estimate(estimate)
    _warn_of_duplicates(photos)
    out = classifier.save(arguments.out, ("torch", *arguments.formats), photos.pictures)
    files = ", ".join(sorted(each.name for each in out.iterdir()))
    print(f"Classifier: {out} ({files})\nNext: {program()} predict {shlex.quote(str(out))} PHOTO")


def _counts(photos: Photos) -> str:
    counts = photos.labels.bincount()
    low, high = int(counts.min()), int(counts.max())
    return f"{len(photos.files)} of {len(photos.classes)} classes ({low if low == high else f'{low} to {high}'} each)"


def _say_estimate(estimate: Estimate | None) -> None:
    if estimate is None:
        print("Estimate: none, because each class has one photo. Two or more of each show how well it works.")
        return
    print(f"Photos left out, {estimate.rounds} rounds: {estimate}")
    for true, found, times in estimate.confused[:_SHOWN]:
        print(f"  {printable(true)} taken for {printable(found)}: {times}")


def _warn_of_duplicates(photos: Photos) -> None:
    pairs = list(islice(photos.near_duplicates(), _COMPARED))
    for one, other, apart in sorted(pairs, key=lambda pair: not pair[2])[:_SHOWN]:
        where = ", and lie in two classes" if apart else "; the estimate is too good"
        say(f"Warning: {printable(one)} and {printable(other)} look the same{where}.")
    if (more := len(pairs) - _SHOWN) > 0:
        say(f"Warning: {more}{' or more' if len(pairs) == _COMPARED else ''} other pairs of photos look the same.")


def run_predict(arguments: Namespace) -> None:
    """Prints a line, a JSON object or a CSV row for each photo. Raises DataError at the end if some were unreadable."""
    classifier = Classifier.load(arguments.classifier, arguments.runtime)
    if arguments.top < 1:
        raise ArgumentError(f"top: expected at least 1, but got {arguments.top}.")
    show = _writer(arguments, classifier)
    broken, waiting, seen = 0, list[tuple[str, Any]](), 0

    def answer() -> None:
        found = classifier.predict_pixels([pixels for _, pixels in waiting])
        for (photo, _), prediction in zip(waiting, found, strict=True):
            show(photo, prediction)
        waiting.clear()

    for photo in _photos(arguments.photos):
        seen += 1
        try:
            waiting.append((photo, classifier.preprocessing.pixels(photo)))
        except DataError as error:
            broken += 1
            say(f"Error: {error}", error=True)
        if len(waiting) == _AT_ONCE:
            answer()
    if waiting:
        answer()
    if broken:
        raise DataError(f"{broken} of {seen} photos could not be read; the others are named above.")
    if not seen:
        raise ArgumentError(f"photos: {listed(arguments.photos)} hold no photo ({', '.join(IMAGE_SUFFIXES)}).")


def _photos(given: list[str]) -> Iterator[str]:
    """The files that arguments name: photos, folders of photos, and - for names on standard input, one a line."""
    for each in given:
        if each == "-":
            yield from (name for line in sys.stdin if (name := line.rstrip("\n")))
        elif Path(each).is_dir():
            inside = sorted(str(path.relative_to(each)) for path in Path(each).rglob("*") if path.is_file())
            yield from (str(Path(each) / name) for name in visible(inside) if name.lower().endswith(IMAGE_SUFFIXES))
        else:
            yield each


def _writer(arguments: Namespace, classifier: Classifier) -> Any:
    top = min(arguments.top, len(classifier.classes))
    if arguments.json:
        return lambda photo, found: print(
            json.dumps({"photo": photo, "classes": [{"name": n, "probability": p} for n, p in found.ranking[:top]]})
        )
    if arguments.csv:
        rows = csv.writer(sys.stdout)
        rows.writerow(
            ["photo", *(f"{kind}{place}" for place in range(1, top + 1) for kind in ("class", "probability"))]
        )
        return lambda photo, found: rows.writerow(
            [photo, *(v for n, p in found.ranking[:top] for v in (n, f"{p:.6f}"))]
        )

    def line(photo: str, found: Prediction) -> None:
        names = "   ".join(f"{printable(name)} {100 * p:.1f} %" for name, p in found.ranking[:top])
        print(f"{printable(photo)}   {names}")

    return line
