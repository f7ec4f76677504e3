"""Several methods on the same data, seeds and network: one run per method -> one table and one plot.

Each run is a process of its own: the peak memory is that of one method, and a method that fails stops no other.
The same call continues a comparison that was stopped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from metawrap.errors import ArgumentError, CheckpointError, MetaWrapError
from metawrap.settings.keywords import flattened, nested
from metawrap.training.checkpoints import write_json, write_text
from metawrap.training.data_record import record_of
from metawrap.training.experiment import load_splits
from metawrap.training.machine import command_line
from metawrap.training.plots import draw_comparison
from metawrap.training.progress import say
from metawrap.training.run_folder import RunFolder, read_log, read_run, refuse_links, write_run
from metawrap.training.run_settings import METHODS, RunSettings, nearest_method
from metawrap.training.tables import comparison_cells, comparison_table, csv_table, latex_table, method_title

# One value for all methods: these settings define the task, the network and the test.
_COMMON = {
    "data", "data_root", "split", "image_size", "resize", "ways", "shots", "targets", "test_tasks", "test_norms",
    "seed", "device", "backbone", "filters", "model", "weights",
}  # fmt: skip
_IN_CSV = (
    "method", "accuracy", "interval", "loss", "norm", "parameters", "step_seconds", "peak_mib", "meta_steps", "seconds",
    "error",
)  # fmt: skip
_RUN_FIELDS = {each.name for each in fields(RunSettings)} - {"method", "options"}


def settings_by_method(
    methods: Sequence[str], common: RunSettings, budget: int, overrides: Mapping[str, Mapping[str, Any]]
) -> dict[str, RunSettings]:
    """The settings of each method's run.

    Args:
        methods: names as on the command line.
        common: the shared settings; its `epochs` validations divide the budget.
        budget: meta-steps of each method.
        overrides: changes for one method, by its name: "budget", a field of the run that is not common to all methods,
            or a keyword of the method.
    Raises:
        ArgumentError: an unknown or repeated method, a budget that the epochs do not divide, or a change of a common
            setting.
    """
    for name in [*methods, *overrides]:
        if name not in METHODS:
            fix = f" Did you mean '{close}'?" if (close := nearest_method(name)) else ""
            raise ArgumentError(f"methods: expected some of {', '.join(METHODS)}, but got '{name}'.{fix}")
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
    changes = {"test_norms": "own"} | changes | {"iterations_per_epoch": budget // epochs}
    return replace(common, method=method, options=nested(flattened(common.options) | flattened(own)), **changes)


def compare(runs: Mapping[str, RunSettings], out: str | Path, jobs: int = 1) -> dict[str, Any]:
    """Trains and tests each method in `out`/method, `jobs` at a time; writes comparison.json, .csv, .md, .tex and
    .png.

    Finished runs are not repeated; unfinished runs are continued.

    Returns:
        The content of comparison.json: "rows" (see `run_in_processes`) and "command".
    Raises:
        ArgumentError: `jobs` is below 1.
        CheckpointError, DataError: `out` has a run of one of the methods with other settings, or on other data.
        MetaWrapError: every method failed.
    """
    path = Path(out)
    if seeded := [name for name in runs if (path / name / "run.json").exists() and read_run(path / name)[1]]:
        raise CheckpointError(
            f"out: '{path / seeded[0]}' has a run over seeds. Continue it with its --seeds, or choose another --out."
        )
    rows = run_in_processes(runs, path, jobs)
    comparison = {"rows": rows, "command": command_line()}
    write_json(path / "comparison.json", comparison)
    write_text(path / "comparison.md", f"{comparison_table(rows)}\n")
    header, *cells = comparison_cells(rows)
    write_text(path / "comparison.tex", latex_table(header, cells))
    write_text(path / "comparison.csv", csv_table(rows, _IN_CSV))
    draw_comparison(rows, path / "comparison.png")
    return comparison


def run_in_processes(runs: Mapping[str, RunSettings], path: Path, jobs: int = 1) -> list[dict[str, Any]]:
    """Trains and tests each run in `path`/name, in a process of its own, `jobs` at a time.

    Returns:
        One row per run: {"method", "name", "error"} and, without an error, "accuracy", "interval" (fractions, on test
        tasks of unseen classes, under the policy "norm" of training), "validation" [(seconds of training, accuracy),
        ...], "parameters", "step_seconds", "peak_mib", "meta_steps", "seconds", "settings", "machine".
    Raises:
        ArgumentError, CheckpointError, DataError, MetaWrapError: as `compare`.
    """
    if jobs < 1:
        raise ArgumentError(f"jobs: expected at least 1, but got {jobs}.")
    for name, settings in runs.items():
        refuse_links(path / name)
        # A run that failed before its first checkpoint may start with other settings.
        if any((path / name / "checkpoints").glob("epoch-*.pt")):
            stored = read_run(path / name)[0]
            settings.check_resumes(stored.to_dict())
            if settings.data != stored.data:
                RunFolder(path / name, settings).check_data(record_of(load_splits(settings)))
    for name, settings in runs.items():
        write_run(path / name, settings, None)
    threads = max(1, torch.get_num_threads() // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        errors = list(pool.map(lambda name: _train(name, path / name, runs[name].model, threads, jobs == 1), runs))
    if all(errors):
        raise MetaWrapError(f"No method could be trained. {next(iter(runs))}: {errors[0]}")
    return [
        _row(name, settings, path / name, error) for (name, settings), error in zip(runs.items(), errors, strict=True)
    ]


def _train(name: str, folder: Path, model: str | None, threads: int, shown: bool) -> str | None:
    """Runs `metawrap train` with the settings in the folder; returns the text of its error, None if it succeeds."""
    command = [sys.executable, "-m", "metawrap", "train", "--out", str(folder), "--resume"]
    command += [] if model is None else ["--model", model]  # It would not be imported because run.json names it.
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
        error = next((line for line in reversed(lines) if line.startswith("Error")), lines[-1] if lines else "")
        error = error or f"stopped with exit code {process.returncode}"
        say(f"{name}: {error}")
        return error
    if not shown:
        say(f"{name}: done")
    return None


def _row(name: str, settings: RunSettings, folder: Path, error: str | None) -> dict[str, Any]:
    row: dict[str, Any] = {"method": name, "name": method_title(settings.method), "error": error}
    if error is not None:
        return row
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    norm = result["trained_norm"]
    copied = ("parameters", "step_seconds", "peak_mib", "seconds", "machine")
    return row | {
        **result["test"]["norms"][norm]["after"],
        "norm": norm,
        "validation": [(record.get("seconds"), record["validation_accuracy"]) for record in read_log(folder)],
        **{name: result[name] for name in copied},
        "meta_steps": settings.epochs * settings.iterations_per_epoch,
        "settings": settings.to_dict(),
    }
