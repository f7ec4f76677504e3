"""Folders -> runs -> groups. Runs that differ only in their seed are one group, with one name and one colour."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metawrap.report.records import RunRecords, read_records
from metawrap.training.run_settings import FREE_ON_RESUME
from metawrap.training.tables import method_title

# Readers with colour blindness can tell these colours apart, on a white page and on a black one.
COLOURS = ("#3b7dd8", "#e07b39", "#2a9d7f", "#9b6bd3", "#d1528a", "#a8843a", "#4fa8c9", "#7d8794")
_DASHES = ("solid", "dash", "dot", "dashdot")


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

    @property
    def method(self) -> str:
        """The published name of its method."""
        return method_title(str(self.settings.get("method", "?")))

    def run_label(self, run: RunRecords) -> str:
        """The name of one of its runs."""
        return f"{self.label}, seed {run.seed}" if len(self.runs) > 1 else self.label


@dataclass(frozen=True)
class ShownRun:
    """A run as all charts show it. Seeds of one experiment differ in their colour if no other is shown, else in their
    dash.
    """

    label: str
    run: RunRecords
    colour: str
    dash: str


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


def shown_runs(groups: Sequence[Group]) -> list[ShownRun]:
    """All runs, group by group."""
    return [
        ShownRun(group.run_label(run), run, COLOURS[nth % len(COLOURS)], _DASHES[0])
        if len(groups) == 1
        else ShownRun(group.run_label(run), run, group.colour, _DASHES[nth % len(_DASHES)])
        for group in groups
        for nth, run in enumerate(group.runs)
    ]


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
    labels = [_label(runs) for runs in experiments]
    return [
        label if labels.count(label) == 1 else f"{label} ({runs[0].path})"
        for label, runs in zip(labels, experiments, strict=True)
    ]


def _label(runs: Sequence[RunRecords]) -> str:
    """The recipe of an experiment, or its folder; with the method, where that does not tell it."""
    settings = runs[0].settings
    method = str(settings.get("method", "?"))
    folders = [run.path.resolve() for run in runs]
    names = [(path.parent if re.fullmatch(r"seed-\d+", path.name) else path).name for path in folders]
    if len(set(names)) > 1:  # A folder of the user's for each seed.
        names = [re.sub(r"[-_. ]*(seed)?[-_. ]*\d*$", "", name) for name in names]
    name = str(settings.get("recipe") or names[0] or "run")
    if _plain(name) == _plain(method):
        return method_title(method)
    return name if _plain(method) in _plain(name) else f"{name} ({method_title(method)})"


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "p"))


def _by_field(options: dict[str, Any]) -> dict[str, Any]:
    """Options by name; each field of a stored group as "group.field"."""
    groups = {name: value for name, value in options.items() if isinstance(value, dict)}
    fields = {f"{name}.{field}": each for name, value in groups.items() for field, each in value.items()}
    return {name: value for name, value in options.items() if name not in groups} | fields
