"""Folders -> runs -> groups. Runs that differ only in their seed are one group, with one name and one colour."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metawrap.report.records import RunRecords, read_records
from metawrap.training.run_settings import FREE_ON_RESUME
from metawrap.training.tables import method_title

# Readers with colour blindness can tell these colours apart, on a white page and on a black one.
COLOURS = ("#3b7dd8", "#e07b39", "#2a9d7f", "#9b6bd3", "#d1528a", "#a8843a", "#4fa8c9", "#7d8794")
_MOST_DIFFERENCES = 3


@dataclass(frozen=True)
class Group:
    """An experiment: its name, its colour, and its runs, one for each seed."""

    label: str
    colour: str
    runs: tuple[RunRecords, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that its runs share, and the seed of the first run."""
        return self.runs[0].settings

    def run_label(self, run: RunRecords) -> str:
        """The name of one of its runs."""
        return f"{self.label}, seed {run.seed}"


def gather(paths: Sequence[Path]) -> list[Group]:
    """The groups of runs in these folders, in the order of the folders. A folder that is named twice counts once.

    >>> groups = gather([Path("runs/one"), Path("runs/two")])  # doctest: +SKIP

    Raises:
        CheckpointError: a folder has no run.
    """
    seen: set[Path] = set()
    alike: dict[str, list[list[RunRecords]]] = {}
    for run in (run for path in paths for run in read_records(path)):
        if (place := run.path.resolve()) not in seen:
            seen.add(place)
            experiments = alike.setdefault(json.dumps(shared_settings(run.settings), sort_keys=True), [])
            # A second run with the same seed belongs to another experiment.
            free = (runs for runs in experiments if all(each.seed != run.seed for each in runs))
            if (runs := next(free, None)) is None:
                experiments.append(runs := [])
            runs.append(run)
    found = [tuple(runs) for experiments in alike.values() for runs in experiments]
    return [
        Group(label, COLOURS[number % len(COLOURS)], runs)
        for number, (label, runs) in enumerate(zip(_labels(found), found, strict=True))
    ]


def recorded(run: RunRecords, name: str) -> bool:
    """Whether at least one epoch of the run has this field of `Epoch`."""
    return any(getattr(epoch, name) for epoch in run.epochs)


def runs_with(groups: Sequence[Group], name: str) -> list[tuple[str, RunRecords]]:
    """The runs that recorded this field of `Epoch`, with their names."""
    return [(group.run_label(run), run) for group in groups for run in group.runs if recorded(run, name)]


def shared_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that all runs of one experiment have in common."""
    return {name: value for name, value in settings.items() if name not in FREE_ON_RESUME | {"seed"}}


def differences(settings: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The settings that are not the same in all experiments, with each experiment's value. Options count one by one."""
    flat = [_flat(shared_settings(each)) for each in settings]
    names = dict.fromkeys(name for each in flat for name in each)
    values = {name: [each.get(name) for each in flat] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    options = settings.get("options")
    plain = {name: value for name, value in settings.items() if name != "options"}
    return plain | (_by_field(options) if isinstance(options, dict) else {})


def _labels(experiments: Sequence[tuple[RunRecords, ...]]) -> list[str]:
    methods = [method_title(str(runs[0].settings.get("method", "?"))) for runs in experiments]
    labels = list(methods)
    for method in set(methods):
        places = [place for place, each in enumerate(methods) if each == method]
        if len(places) > 1:
            different = differences([experiments[place][0].settings for place in places])
            for number, place in enumerate(places):
                shown = [f"{name}={values[number]}" for name, values in different.items()][:_MOST_DIFFERENCES]
                labels[place] = " ".join([method, ", ".join(shown)]).strip()
    return [
        label if labels.count(label) == 1 else f"{label} ({runs[0].path})"
        for label, runs in zip(labels, experiments, strict=True)
    ]


def _by_field(options: dict[str, Any]) -> dict[str, Any]:
    """Options by name; each field of a stored group as "group.field"."""
    groups = {name: value for name, value in options.items() if isinstance(value, dict)}
    fields = {f"{name}.{field}": each for name, value in groups.items() for field, each in value.items()}
    return {name: value for name, value in options.items() if name not in groups} | fields
