"""A study: several experiments, each over the same seeds, side by side -> a table, figures and a plot.

Each run is a process of its own, as in `comparison`, so that one that diverges, which is a result here, leaves the
others standing. The folder of an experiment is what `train_seeds` makes: one per seed, read like any other.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from metawrap.errors import CheckpointError
from metawrap.training.checkpoints import write_atomically, write_json
from metawrap.training.comparison import run_all
from metawrap.training.experiment import build_experiment
from metawrap.training.machine import command_line
from metawrap.training.progress import quiet
from metawrap.training.run import train_seeds
from metawrap.training.run_folder import read_run, write_run
from metawrap.training.run_settings import RunSettings
from metawrap.training.study_plot import draw_study
from metawrap.training.tables import markdown_table, method_name, percent_pair


def run_study(
    name: str, experiments: Mapping[str, RunSettings], seeds: Sequence[int], out: str | Path, resume: bool = False
) -> dict[str, Any]:
    """Trains and tests each experiment with each seed, in `out`/experiment/seed-0, ...

    Args:
        name: of the study, for the record.
        experiments: settings by the name of the folder.
        seeds: of each experiment.
        out: a folder without a study, or with `resume` one whose study has these settings.
        resume: continue what is unfinished.
    Returns:
        What `out`/study.json holds: "study", "command", "runs", each {"experiment", "method", "seed", "error",
        "validation" [accuracy after each epoch], "test" {"accuracy", "interval"} or None, "norm", "ways"}.
    Raises:
        CheckpointError: `out` has a study that is not to be, or cannot be, continued.
        MetaWrapError: nothing could be trained.
    """
    path = Path(out)
    _check(path, experiments, seeds, resume)
    for folder, settings in experiments.items():
        write_run(path / folder, settings, seeds)
    runs = {
        f"{folder}/seed-{seed}": replace(settings, seed=seed)
        for folder, settings in experiments.items()
        for seed in seeds
    }
    rows = run_all(runs, path)
    results = [_result(path, *each, row) for each, row in zip(runs.items(), rows, strict=True)]
    for folder, settings in experiments.items():
        if not any(each["error"] for each in results if each["experiment"] == folder):
            with quiet():  # All of it is finished: this puts the seeds' results together.
                train_seeds(settings, seeds, path / folder, resume=True)
    study = {"study": name, "runs": results, "command": command_line()}
    write_json(path / "study.json", study)
    write_atomically(path / "study.md", lambda handle: handle.write(f"{study_table(results)}\n".encode()))
    draw_study(results, path / "study.png")
    return study


def study_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """A line for each run, and the mean of each experiment over its seeds, as a table that is also Markdown.

    largest fall: how far the validation accuracy came down from the best epoch before, at most, in percentage points.
    """
    lines = []
    for experiment in dict.fromkeys(each["experiment"] for each in runs):
        own = [each for each in runs if each["experiment"] == experiment]
        lines += [[each["method"], str(each["seed"]), *_cells(each)] for each in own]
        if len(tested := [each["test"]["accuracy"] for each in own if each["test"]]) > 1:
            mean = percent_pair(statistics.fmean(tested), statistics.stdev(tested))
            lines.append([own[0]["method"], f"mean of {len(tested)}", mean, "", ""])
    table = markdown_table(["method", "seed", "test", "best validation", "largest fall"], lines)
    failed = [f"{each['experiment']}, seed {each['seed']}: {each['error']}" for each in runs if each["error"]]
    note = "Accuracy in percent; ± 95 % interval over tasks, behind a mean the standard deviation over seeds."
    return "\n".join([table, "", note, *failed])


def largest_fall(accuracies: Sequence[float]) -> float:
    """How far a later value lies below the best one before it, at most; 0 where none does."""
    best, fall = 0.0, 0.0
    for value in accuracies:
        best = max(best, value)
        fall = max(fall, best - value)
    return fall


def _check(path: Path, experiments: Mapping[str, RunSettings], seeds: Sequence[int], resume: bool) -> None:
    for folder, settings in experiments.items():
        if not (path / folder / "run.json").exists():
            continue
        if not resume:
            raise CheckpointError(f"'{path}' already has a study. Continue it with --resume, or choose another --out.")
        stored, stored_seeds = read_run(path / folder)
        settings.check_resumes(stored.to_dict())
        if stored_seeds != list(seeds):
            raise CheckpointError(
                f"seeds: the study was started with {stored_seeds}, but is resumed with {list(seeds)}. "
                "Use the same, or another --out."
            )
    for folder, settings in experiments.items():
        if not (path / folder / "run.json").exists():
            build_experiment(replace(settings, seed=seeds[0]))  # What cannot be built leaves no folder behind.


def _result(path: Path, name: str, settings: RunSettings, row: Mapping[str, Any]) -> dict[str, Any]:
    experiment, _, _ = name.rpartition("/")
    log = path / name / "log.jsonl"  # Up to where it diverged, if it did.
    history = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    return {
        "experiment": experiment,
        "method": method_name(settings),
        "seed": settings.seed,
        "error": row["error"],
        "validation": [record["validation_accuracy"] for record in history],
        "epochs": settings.epochs,
        "test": None if row["error"] else {"accuracy": row["accuracy"], "interval": row["interval"]},
        "norm": row.get("norm"),
        "data": settings.data,
        "ways": settings.ways,
        "shots": settings.shots,
    }


def _cells(run: Mapping[str, Any]) -> list[str]:
    test = percent_pair(run["test"]["accuracy"], run["test"]["interval"]) if run["test"] else "stopped"
    if not run["validation"]:
        return [test, "", ""]
    return [test, percent_pair(max(run["validation"])), percent_pair(largest_fall(run["validation"]))]
