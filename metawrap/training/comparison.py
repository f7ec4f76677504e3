"""Several methods on the same data, seeds and network: one run each -> one table and one plot.

Each run is a process of its own, so that the peak memory is that of its method alone, and so that a method that cannot
carry the network leaves the others standing. A comparison that was stopped is continued by the same call.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from metawrap.errors import ArgumentError, MetaWrapError
from metawrap.settings.keywords import flattened, nested
from metawrap.training.checkpoints import write_atomically, write_json
from metawrap.training.comparison_plot import draw_comparison
from metawrap.training.machine import command_line
from metawrap.training.progress import say
from metawrap.training.run_folder import read_run, write_run
from metawrap.training.run_settings import METHODS, RunSettings
from metawrap.training.tables import comparison_table, method_name

Overrides = Mapping[str, Mapping[str, Any]]
# What is compared on: the same for all methods.
_COMMON = frozenset(
    {
        "data",
        "data_root",
        "split",
        "image_size",
        "ways",
        "shots",
        "targets",
        "test_tasks",
        "test_norms",
        "seed",
        "device",
    }
    | {"backbone", "filters", "model"}
)
_RUN_FIELDS = {each.name for each in fields(RunSettings)} - {"method", "options"}


def settings_of(methods: list[str], common: RunSettings, budget: int, overrides: Overrides) -> dict[str, RunSettings]:
    """The settings of each method's run.

    Args:
        methods: names on the command line.
        common: what all of them share; its `epochs` validations divide the budget.
        budget: meta-steps of each.
        overrides: for one method, by its name: "budget", a field of the run that does not change what is compared on,
            or a keyword of the method.
    Raises:
        ArgumentError: an unknown or repeated method, a budget that the epochs do not divide, or another task for one.
    """
    for name in [*methods, *overrides]:
        if name not in METHODS:
            raise ArgumentError(f"methods: expected some of {', '.join(METHODS)}, but got '{name}'.")
    if len(set(methods)) != len(methods) or not methods:
        raise ArgumentError(f"methods: expected different names, at least one, but got {', '.join(methods) or 'none'}.")
    if unused := [name for name in overrides if name not in methods]:
        raise ArgumentError(f"set: '{unused[0]}' is not one of --methods {','.join(methods)}.")
    return {name: _settings(name, common, budget, dict(overrides.get(name, {}))) for name in methods}


def _settings(method: str, common: RunSettings, budget: int, own: dict[str, Any]) -> RunSettings:
    if shared := [name for name in own if name in _COMMON]:
        raise ArgumentError(
            f"set: {shared[0]} is what the methods are compared on, and cannot be another for {method}. Set it for all."
        )
    budget = own.pop("budget", budget)
    changes = {name: own.pop(name) for name in list(own) if name in _RUN_FIELDS}
    epochs = changes.get("epochs", common.epochs)
    if not isinstance(budget, int) or budget < epochs or budget % epochs:
        raise ArgumentError(
            f"budget: expected meta-steps in {epochs} equal parts, with a validation behind each, but got {budget!r} "
            f"for {method}. Use a multiple of {epochs}, or other --epochs."
        )
    changes["iterations_per_epoch"] = budget // epochs
    changes.setdefault("test_norms", "own")
    return replace(common, method=method, options=nested(flattened(common.options) | flattened(own)), **changes)


def compare(runs: Mapping[str, RunSettings], out: str | Path, jobs: int = 1) -> dict[str, Any]:
    """Trains and tests each method in `out`/method, `jobs` at a time; writes the table and the plot.

    Finished runs are not repeated, and unfinished ones continued.

    Returns:
        What `out`/comparison.json holds: "rows" (see `_row`) and "command".
    Raises:
        ArgumentError: `jobs` is below 1.
        CheckpointError: `out` has a run of one of the methods with other settings.
        MetaWrapError: every method failed.
    """
    path = Path(out)
    rows = run_all(runs, path, jobs)
    comparison = {"rows": rows, "command": command_line()}
    write_json(path / "comparison.json", comparison)
    text = comparison_table(rows)
    write_atomically(path / "comparison.md", lambda handle: handle.write(f"{text}\n".encode()))
    draw_comparison(rows, path / "comparison.png")
    return comparison


def run_all(runs: Mapping[str, RunSettings], path: Path, jobs: int = 1) -> list[dict[str, Any]]:
    """Trains and tests each run in `path`/name, in a process of its own; returns a row for each (see `_row`).

    Raises:
        ArgumentError, CheckpointError, MetaWrapError: as `compare`.
    """
    if jobs < 1:
        raise ArgumentError(f"jobs: expected at least 1, but got {jobs}.")
    for name, settings in runs.items():
        # One that failed before its first checkpoint may be started with other settings.
        if any((path / name / "checkpoints").glob("epoch-*.pt")):
            settings.check_resumes(read_run(path / name)[0].to_dict())
    for name, settings in runs.items():
        write_run(path / name, settings, None)
    threads = max(1, torch.get_num_threads() // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        ended = pool.map(lambda name: _train(name, path / name, threads, jobs == 1), runs)
        failures = dict(zip(runs, ended, strict=True))
    if all(failures.values()):
        raise MetaWrapError(f"No method could be trained. {next(iter(failures))}: {next(iter(failures.values()))}")
    return [_row(name, settings, path / name, failures[name]) for name, settings in runs.items()]


def _train(name: str, folder: Path, threads: int, shown: bool) -> str | None:
    """Runs `metawrap train` on the settings in the folder; returns the error's text if it fails."""
    command = [sys.executable, "-m", "metawrap", "train", "--out", str(folder), "--resume"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    lines: list[str] = []
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line.rstrip())
            if shown:
                say(f"{name}: {lines[-1]}")
    if process.returncode == 130:
        raise KeyboardInterrupt
    if process.returncode:
        reason = next((line for line in reversed(lines) if line.startswith("Error")), lines[-1] if lines else "")
        say(f"{name}: {reason or f'stopped with exit code {process.returncode}'}")
        return reason or f"stopped with exit code {process.returncode}"
    if not shown:
        say(f"{name}: done")
    return None


def _row(name: str, settings: RunSettings, folder: Path, failure: str | None) -> dict[str, Any]:
    """One method's figures.

    Returns:
        {"method", "name", "error"} and, without an error, "accuracy", "interval" (fractions, on test tasks of unseen
        classes, under the policy "norm" of training), "validation" [(seconds of training, accuracy), ...],
        "parameters", "step_seconds", "peak_mib", "meta_steps", "seconds", "settings", "machine".
    """
    row: dict[str, Any] = {"method": name, "name": method_name(settings), "error": failure}
    if failure is not None:
        return row
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    history = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    norm = result["trained_norm"]
    return row | {
        **result["test"]["norms"][norm]["after"],
        "norm": norm,
        "validation": [(record["seconds"], record["validation_accuracy"]) for record in history],
        "parameters": result["parameters"],
        "step_seconds": result["step_seconds"],
        "peak_mib": result["peak_mib"],
        "meta_steps": settings.epochs * settings.iterations_per_epoch,
        "seconds": result["seconds"],
        "settings": settings.to_dict(),
        "machine": result["machine"],
    }
