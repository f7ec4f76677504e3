"""A CSV of texts and classes, or a folder with a file of texts per class -> tokens and labels; and the duplicates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from metawrap.classifier.photos import check_classes
from metawrap.data.problems import reading
from metawrap.data.text_files import read_table, read_text
from metawrap.data.text_preprocessing import TextPreprocessing, Tokens
from metawrap.errors import DataError, shown

_COLUMNS = ("text", "class")


@dataclass(frozen=True)
class Texts:
    """Texts of known classes.

    classes: their names. texts: as they were read. labels: (texts,), places among `classes`. prepared: of each text,
    token ids and mask, as `TextPreprocessing.prepare` gives them.
    """

    classes: tuple[str, ...]
    texts: tuple[str, ...]
    labels: Tensor
    prepared: list[Tokens]

    @staticmethod
    def are_at(place: str | Path) -> bool:
        """Whether a path is a CSV file, or a folder with .txt files in it."""
        path = Path(place).expanduser()
        return path.suffix.lower() == ".csv" or (path.is_dir() and any(path.glob("*.txt")))

    @classmethod
    def read(cls, place: str | Path, preprocessing: TextPreprocessing) -> Texts:
        """Reads a CSV file with the columns text and class, or a folder with NAME.txt for each class, a text a line.

        Raises:
            DataError: there is no such file, or fewer than two classes, a class without a text, an empty text, two
                classes whose names look the same, or content that is no text in UTF-8.
        """
        path = Path(place).expanduser()
        rows = _of_folder(path) if path.is_dir() else _of_table(path)
        classes = sorted({name for name, _ in rows})
        check_classes(classes, place)
        places = {name: number for number, name in enumerate(classes)}
        labels = torch.tensor([places[name] for name, _ in rows])
        texts = tuple(text for _, text in rows)
        return cls(tuple(classes), texts, labels, [preprocessing.prepare(text) for text in texts])

    def near_duplicates(self) -> Iterator[tuple[str, str, bool]]:
        """Pairs of texts that differ in blanks and capitals at most, and whether their classes differ."""
        alike = defaultdict[str, list[int]](list)
        for place, text in enumerate(self.texts):
            alike[" ".join(text.casefold().split())].append(place)
        for one, other in (pair for places in alike.values() for pair in pairwise(places)):
            yield shown(self.texts[one]), shown(self.texts[other]), bool(self.labels[one] != self.labels[other])


def _of_table(path: Path) -> list[tuple[str, str]]:
    """(class, text) of each row."""
    rows = read_table(read_text(path), str(path), _COLUMNS)
    for number, row in enumerate(rows, start=1):
        if not all(row):
            raise DataError(f"'{path}': example {number} has no {_COLUMNS[row.index('')]}. Fill it in or delete it.")
    if not rows:
        raise DataError(f"'{path}' holds no example. Add rows of a text and its class.")
    return [(name, text) for text, name in rows]


def _of_folder(path: Path) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    with reading(f"'{path}' cannot be read", OSError, fix="Correct the path."):
        files = sorted(path.glob("*.txt"))
    for file in files:
        lines = [line.strip() for line in read_text(file).split("\n") if line.strip()]
        if not lines:
            raise DataError(f"support: '{file}' holds no text. Add a line for each example, or delete it.")
        rows += [(file.stem, line) for line in lines]
    if not rows:
        raise DataError(f"support: '{path}' holds no .txt file. Add one for each class, with a text a line.")
    return rows
