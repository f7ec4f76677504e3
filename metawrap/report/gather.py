"""Folders -> runs -> groups: runs that differ in their seed alone are one experiment, with one name and one colour."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metawrap.training.run_records import RunRecords, read_records
from metawrap.training.run_settings import FREE_ON_RESUME
from metawrap.training.tables import method_title

# Told apart by people who do not see all colours, and on white as on black.
COLOURS = ("#3b7dd8", "#e07b39", "#2a9d7f", "#9b6bd3", "#d1528a", "#a8843a", "#4fa8c9", "#7d8794")
_MOST_DIFFERENCES = 3


@dataclass(frozen=True)
class Group:
    """An experiment: its runs, one for each seed, and what it is called."""

    label: str
    runs: tuple[RunRecords, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """Those of its runs, but for the seed."""
        return self.runs[0].settings

    def run_label(self, run: RunRecords) -> str:
        """The name of one of its runs."""
        return f"{self.label}, seed {run.seed}"


def gather(paths: Sequence[Path]) -> list[Group]:
    """The experiments in these folders, in their order; a folder that is named twice counts once.

    Raises:
        CheckpointError: one of them has no run.
    """
    seen: set[Path] = set()
    groups: dict[str, list[list[RunRecords]]] = {}
    for path in paths:
        for run in read_records(path):
            if (place := run.path.resolve()) not in seen:
                seen.add(place)
                _join(groups.setdefault(json.dumps(shared_settings(run.settings), sort_keys=True), []), run)
    experiments = [tuple(runs) for alike in groups.values() for runs in alike]
    labels = _labels(experiments)
    return [Group(label, runs) for label, runs in zip(labels, experiments, strict=True)]


def shared_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """What the runs of an experiment have in common."""
    return {name: value for name, value in settings.items() if name not in FREE_ON_RESUME | {"seed"}}


def differences(settings: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The settings that are not the same in all, with the value in each; options count one by one."""
    flat = [_flat(shared_settings(each)) for each in settings]
    names = dict.fromkeys(name for each in flat for name in each)
    values = {name: [each.get(name) for each in flat] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    options = settings.get("options")
    return {name: value for name, value in settings.items() if name != "options"} | (
        _by_field(options) if isinstance(options, dict) else {}
    )


def _join(alike: list[list[RunRecords]], run: RunRecords) -> None:
    """Puts the run with others of its settings, unless these have one with its seed: that is another experiment."""
    for runs in alike:
        if all(each.seed != run.seed for each in runs):
            runs.append(run)
            return
    alike.append([run])


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
    """A stored group, whatever it holds, as "group.field" for each field."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, dict):
            found |= {f"{name}.{field}": each for field, each in value.items()}
        else:
            found[name] = value
    return found
