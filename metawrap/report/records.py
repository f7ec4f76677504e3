"""A run's folder as typed values for display: values that are missing, damaged or of a wrong type are left out.

The files may come from a stranger or an older version, or be half-written. Nothing here trusts them; texts stay texts,
and a page that shows them must escape them.
"""

from __future__ import annotations

import base64
import binascii
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metawrap.errors import CheckpointError
from metawrap.training.run_folder import FINAL_INSIGHT, INSIGHT, LOG, read_json, read_lines

Number = float | None
_PNG = b"\x89PNG\r\n\x1a\n"
_LARGEST_IMAGE = 1_000_000
_LARGEST_NUMBER = 1e30  # Charts multiply by 100 and square.
_MOST, _MOST_COUNTS = 2**31, 1000
_CURVES = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "validation_interval")


@dataclass(frozen=True)
class Quartiles:
    """By inner step: the median and the quartiles around it; three equal values for a single number."""

    low: list[Number]
    median: list[Number]
    high: list[Number]


@dataclass(frozen=True)
class Epoch:
    """The records of one epoch (from 1).

    curves: the finite numbers of the log by name. step_weights, step_losses: by inner step, empty without a record.
    rates: by parameter. norms: by layer, then "running_mean", "running_var", "weight", "bias".
    """

    number: int
    curves: dict[str, float]
    step_weights: list[Number] = field(default_factory=list)
    step_losses: list[Number] = field(default_factory=list)
    rates: dict[str, Quartiles] = field(default_factory=dict)
    norms: dict[str, dict[str, Quartiles]] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """An accuracy and the half width of its 95 % interval, if known; fractions."""

    accuracy: float
    interval: Number = None


@dataclass(frozen=True)
class Example:
    """One image of an episode. png: the file's bytes, if stored. prediction, probability: only for targets. at: the
    place of its embedding in the plane of the episode, [x, y], if known.
    """

    label: int
    png: bytes | None = None
    prediction: int | None = None
    probability: Number = None
    at: list[Number] = field(default_factory=list)


@dataclass(frozen=True)
class Episode:
    """A test task with its predictions. task: its number, from 1. classes: names by label. shares: of the variance of
    its embeddings, by axis of the plane.
    """

    task: int
    why: str
    classes: list[str]
    support: list[Example]
    target: list[Example]
    shares: list[Number] = field(default_factory=list)


@dataclass(frozen=True)
class Count:
    """How many targets of a class were taken for a class, `times` of `targets`; for itself if they were right."""

    name: str
    taken_for: str
    times: int
    targets: int

    @property
    def percent(self) -> float:
        """Of the targets."""
        return 100 * self.times / self.targets


@dataclass(frozen=True)
class RunRecords:
    """The records of one run, finished or not.

    settings, machine: as stored. command: the command that started the run. has_insight: whether insight.jsonl has
    lines. scores: of the final test, by batch-norm policy, then "before", "after", "ensemble". steps: the score after
    each number of inner steps on the first `step_tasks` test tasks. right, confusions: the counts of each class on
    these tasks, the lowest accuracy and the most frequent confusion first. class_count: of all their classes.
    """

    path: Path
    settings: dict[str, Any]
    epochs: list[Epoch]
    has_insight: bool = False
    command: str | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    trained_norm: str | None = None
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)
    best_epoch: int | None = None
    test_tasks: int | None = None
    seconds: Number = None
    steps: dict[int, Score] = field(default_factory=dict)
    step_tasks: int | None = None
    class_count: int = 0
    right: list[Count] = field(default_factory=list)
    confusions: list[Count] = field(default_factory=list)
    episodes: list[Episode] = field(default_factory=list)

    @property
    def seed(self) -> Any:
        """As stored."""
        return self.settings.get("seed", 0)


def read_records(path: Path) -> list[RunRecords]:
    """All runs in a folder: one, one per seed, or those of a comparison. Raises CheckpointError if there is none."""
    found = _runs_in(path)
    if not found:
        inside = sorted(each.parent for each in path.glob("*/run.json"))
        found = [run for folder in inside for run in _runs_in(folder)]
    if not found:
        raise CheckpointError(
            f"There is no run in '{path}' (no run.json that can be read). Start one with: metawrap train --out "
            f"{shlex.quote(str(path))}"
        )
    return found


def _runs_in(path: Path) -> list[RunRecords]:
    content = read_json(path / "run.json")
    if not isinstance(content.get("settings"), dict):
        return []
    if not isinstance(seeds := content.get("seeds"), list):
        return [_read(path, content)]
    command = _text(content.get("command"))
    folders = [path / f"seed-{seed}" for seed in seeds if isinstance(seed, int)]
    return [_read(each, inner, command) for each in folders if (inner := read_json(each / "run.json"))]


def _read(path: Path, content: dict[str, Any], command: str | None = None) -> RunRecords:
    settings = content.get("settings")
    lines, insight = (_by_epoch(read_lines(path / name)) for name in (LOG, INSIGHT))
    result, final = read_json(path / "result.json"), read_json(path / FINAL_INSIGHT)
    if _table(result.get("settings")).get("epochs", planned := _table(settings).get("epochs")) != planned:
        result, final = {}, {}  # The run is being extended; these are of its shorter form.
    test, classes = _table(result.get("test")), _table(final.get("classes"))
    steps = [_table(each) for each in _list(final.get("steps"))]
    return RunRecords(
        path=path,
        settings=settings if isinstance(settings, dict) else {},
        epochs=[_epoch(number, lines[number], insight.get(number, {})) for number in sorted(lines)],
        has_insight=bool(insight),
        command=command or _text(content.get("command")) or _text(result.get("command")),
        machine=_table(result.get("machine")),
        trained_norm=_text(result.get("trained_norm")),
        scores={norm: _scores(scores) for norm, scores in _table(test.get("norms")).items()},
        best_epoch=_whole(test.get("epoch")),
        test_tasks=_whole(test.get("tasks")),
        seconds=_number(result.get("seconds")),
        steps={
            number: score
            for each in steps
            if (number := _whole(each.get("steps"))) is not None and (score := _score(each)) is not None
        },
        step_tasks=_whole(final.get("tasks")),
        class_count=_whole(classes.get("count")) or 0,
        right=_counts(classes.get("shown"), "class", "right"),
        confusions=_counts(classes.get("confusions"), "taken_for", "times"),
        episodes=[episode for each in _list(final.get("episodes")) if (episode := _episode(_table(each))) is not None],
    )


def _by_epoch(records: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {number: record for record in records if (number := _whole(record.get("epoch"))) is not None}


def _epoch(number: int, line: dict[str, Any], insight: dict[str, Any]) -> Epoch:
    curves = {name: value for name in _CURVES if (value := _number(line.get(name))) is not None}
    rates = {name: found for name, rows in _table(insight.get("rates")).items() if (found := _quartiles(rows))}
    norms = {
        layer: {part: found for part, rows in _table(parts).items() if (found := _quartiles(rows))}
        for layer, parts in _table(insight.get("norms")).items()
    }
    weights, losses = (_numbers(insight.get(name)) for name in ("step_weights", "step_losses"))
    return Epoch(number, curves, weights, losses, rates, {layer: parts for layer, parts in norms.items() if parts})


def _quartiles(value: Any) -> Quartiles | None:
    if isinstance(value, dict):
        low, median, high = (_numbers(value.get(name)) for name in ("low", "median", "high"))
        return Quartiles(low, median, high) if median and len(low) == len(median) == len(high) else None
    rows = _numbers(value)
    return Quartiles(rows, rows, rows) if rows else None


def _scores(value: Any) -> dict[str, Score]:
    return {name: score for name, each in _table(value).items() if (score := _score(_table(each))) is not None}


def _score(value: dict[str, Any]) -> Score | None:
    accuracy = _number(value.get("accuracy"))
    return None if accuracy is None else Score(accuracy, _number(value.get("interval")))


def _episode(value: dict[str, Any]) -> Episode | None:
    classes = [each if isinstance(each, str) else "?" for each in _list(value.get("classes"))]
    parts = []
    for name in ("support", "target"):
        examples = [_example(_table(each), len(classes)) for each in _list(value.get(name))]
        parts.append([example for example in examples if example is not None])
    support, target = parts
    if not target:
        return None
    task, why, shares = _whole(value.get("task")) or 0, _text(value.get("why")) or "", _numbers(value.get("shares"))
    return Episode(task, why, classes, support, target, shares)


def _example(value: dict[str, Any], classes: int) -> Example | None:
    label, prediction = _whole(value.get("label")), _whole(value.get("prediction"))
    if label is None or not 0 <= label < classes:
        return None
    at = _numbers(value.get("at"))
    at = at if len(at) == 2 and None not in at else []
    return Example(label, _png(value.get("png")), prediction, _number(value.get("probability")), at)


def _counts(value: Any, taken_for: str, times: str) -> list[Count]:
    found = []
    for each in map(_table, _list(value)[:_MOST_COUNTS]):
        name, other = _text(each.get("class")), _text(each.get(taken_for))
        part, whole = _whole(each.get(times)), _whole(each.get("targets"))
        if name is not None and other is not None and part is not None and whole and 0 <= part <= whole:
            found.append(Count(name, other, part, whole))
    return found


def _png(value: Any) -> bytes | None:
    if not isinstance(value, str) or len(value) > _LARGEST_IMAGE:
        return None
    try:
        content = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        return None
    return content if content.startswith(_PNG) else None


def _numbers(value: Any) -> list[Number]:
    return [_number(each) for each in _list(value)]


def _number(value: Any) -> Number:
    """A number of a plausible size, else None: JSON of an older version may hold NaN, of a stranger anything."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if abs(value) < _LARGEST_NUMBER else None  # False for NaN.
    except OverflowError:
        return None


def _whole(value: Any) -> int | None:
    """A whole number of a plausible size for a count, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MOST else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else []


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
