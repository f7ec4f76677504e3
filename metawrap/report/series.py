"""The numbers behind the figures, the same for the page and for the pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from metawrap.report.gather import Group
from metawrap.training.run_records import Epoch, Number, RunRecords

# The most epochs that a slider offers: of a longer run as many, in equal strides, with the first and the last.
MOST_SLIDES = 40
KINDS = {
    "running_mean": "running mean",
    "running_var": "running variance",
    "weight": "scale (gamma)",
    "bias": "shift (beta)",
}


@dataclass(frozen=True)
class Band:
    """A line over epochs, and a band around it where `low` and `high` are not None."""

    epochs: list[int]
    middle: list[float]
    low: list[Number]
    high: list[Number]

    def outline(self) -> tuple[list[int], list[float]]:
        """The band as a closed line."""
        edges = [each for each in zip(self.epochs, self.low, self.high, strict=True) if each[1] is not None]
        there = [(epoch, high) for epoch, _, high in edges if high is not None]
        back = [(epoch, low) for epoch, low, _ in reversed(edges) if low is not None]
        return [epoch for epoch, _ in there + back], [value for _, value in there + back]


def curve(group: Group, name: str) -> Band:
    """Mean over seeds and one standard deviation to each side, by epoch; of one run, the interval over its tasks.

    The band of an accuracy stays within 0 and 1.
    """
    by_epoch: dict[int, list[float]] = {}
    interval: dict[int, float] = {}
    for run in group.runs:
        for epoch in run.epochs:
            if name in epoch.curves:
                by_epoch.setdefault(epoch.number, []).append(epoch.curves[name])
            if name == "validation_accuracy" and "validation_interval" in epoch.curves:
                interval[epoch.number] = epoch.curves["validation_interval"]
    epochs = sorted(by_epoch)
    middle = [statistics.fmean(by_epoch[epoch]) for epoch in epochs]
    if len(group.runs) > 1:
        spread = [statistics.stdev(by_epoch[epoch]) if len(by_epoch[epoch]) > 1 else None for epoch in epochs]
    else:
        spread = [interval.get(epoch) if name == "validation_accuracy" else None for epoch in epochs]
    least, most = (0.0, 1.0) if name.endswith("accuracy") else (-math.inf, math.inf)
    low = [None if s is None else max(least, value - s) for value, s in zip(middle, spread, strict=True)]
    high = [None if s is None else min(most, value + s) for value, s in zip(middle, spread, strict=True)]
    return Band(epochs, middle, low, high)


def slides(epochs: Sequence[int]) -> list[int]:
    """The epochs that a slider offers."""
    if len(epochs) <= MOST_SLIDES:
        return list(epochs)
    last = len(epochs) - 1
    return [epochs[round(place * last / (MOST_SLIDES - 1))] for place in range(MOST_SLIDES)]


def with_rates(groups: Sequence[Group]) -> list[tuple[str, RunRecords]]:
    """The runs whose rates were learned, and their names."""
    return [(group.run_label(run), run) for group in groups for run in group.runs if _any(run, "rates")]


def with_norms(groups: Sequence[Group]) -> list[tuple[str, RunRecords]]:
    """The runs that recorded batch norms, and their names."""
    return [(group.run_label(run), run) for group in groups for run in group.runs if _any(run, "norms")]


def with_step_losses(groups: Sequence[Group]) -> list[tuple[str, RunRecords]]:
    """The first run of each group that recorded losses by inner step, and the group's name."""
    chosen = []
    for group in groups:
        runs = [run for run in group.runs if _any(run, "step_losses") and _any(run, "step_weights")]
        chosen += [(group.label, runs[0])] if runs else []
    return chosen


def _any(run: RunRecords, name: str) -> bool:
    return any(getattr(epoch, name) for epoch in run.epochs)


@dataclass(frozen=True)
class Panel:
    """Parameters of one kind, such as all weights. layers: a name for each place on the axis; parameters: its own."""

    title: str
    layers: list[str]
    parameters: list[str]


def rate_panels(runs: Sequence[RunRecords]) -> list[Panel]:
    """Weights and biases apart, as far as there are few kinds of parameters; in the order of the network."""
    names = list(dict.fromkeys(name for run in runs for epoch in run.epochs for name in epoch.rates))
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    if len(kinds) > 2:
        return [Panel("parameters", names, names)]
    plural = {"weight": "weights", "bias": "biases"}
    return [Panel(plural.get(kind, kind), [n.rpartition(".")[0] or n for n in own], own) for kind, own in kinds.items()]


def steps_of(values: Sequence[Sequence[Number]]) -> int:
    """The most inner steps among rows that have one number for each."""
    return max((len(row) for row in values), default=0)


def rates_at(epoch: Epoch | None, parameters: Sequence[str], step: int) -> list[Number]:
    """The rate of each parameter at an inner step (from 0); None where it was not recorded."""
    return [_at(epoch.rates[name].median, step) if epoch and name in epoch.rates else None for name in parameters]


def norms_at(
    epoch: Epoch, layers: Sequence[str], part: str, step: int
) -> tuple[list[Number], list[Number], list[Number]]:
    """The low quartile, median and high quartile over channels of each layer, at an inner step (from 0)."""
    found = [epoch.norms.get(layer, {}).get(part) for layer in layers]
    low = [None if each is None else _at(each.low, step) for each in found]
    median = [None if each is None else _at(each.median, step) for each in found]
    high = [None if each is None else _at(each.high, step) for each in found]
    return low, median, high


def norm_layers(run: RunRecords) -> list[str]:
    """The batch norms of a run, in the order of the network."""
    return list(dict.fromkeys(layer for epoch in run.epochs for layer in epoch.norms))


def epoch_of(run: RunRecords, number: int) -> Epoch | None:
    """The run's epoch with this number, or None."""
    return next((epoch for epoch in run.epochs if epoch.number == number), None)


def spread_of(values: Sequence[Number]) -> tuple[float, float]:
    """A range that holds all values, with some room."""
    present = [value for value in values if value is not None] or [0.0]
    low, high = min(present), max(present)
    room = 0.06 * (high - low) or 1.0
    return low - room, high + room


def _at(row: Sequence[Number], step: int) -> Number:
    return row[step] if step < len(row) else None
