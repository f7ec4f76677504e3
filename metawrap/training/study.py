"""A study: several experiments, each over the same seeds, side by side -> a table, figures and a plot.

Each run is a process of its own, as in `comparison`: a run that diverges is a result here and stops no other run. The
folder of an experiment is that of `train_seeds`, with one folder per seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from metawrap.errors import CheckpointError
from metawrap.training.checkpoints import write_json, write_text
from metawrap.training.comparison import run_in_processes
from metawrap.training.experiment import build_experiment
from metawrap.training.machine import command_line
from metawrap.training.plots import draw_study
from metawrap.training.progress import quiet
from metawrap.training.run import train_seeds
from metawrap.training.run_folder import read_log, read_run, write_run
from metawrap.training.run_settings import RunSettings
from metawrap.training.tables import csv_table, latex_table, markdown_table, method_title, percent_pair, score_text

_IN_CSV = (
    "experiment", "method", "seed", "accuracy", "interval", "loss", "norm", "best_validation", "largest_fall", "error",
)  # fmt: skip


def run_study(
    name: str,
    experiments: Mapping[str, RunSettings],
    seeds: Sequence[int],
    out: str | Path,
    resume: bool = False,
    jobs: int = 1,
) -> dict[str, Any]:
    """Trains and tests each experiment with each seed, in `out`/experiment/seed-0, ...

    Args:
        name: the study's name, for the record.
        experiments: settings by the name of the experiment's folder.
        seeds: one run of each experiment per seed.
        out: a folder without a study, or with `resume` the folder of a study with these settings.
        resume: continue unfinished runs. jobs: runs at a time.
    Returns:
        The content of `out`/study.json: "study", "command", "runs", each {"experiment", "method" (see `study_titles`),
        "seed", "error", "validation" [accuracy after each epoch], "alone" [the same with targets one at a time, see
        RunSettings.validation_alone], "meta_steps" [before each validation], "planned" (meta-steps), "test"
        {"accuracy", "interval"} or None, "norm", "data", "ways", "shots"}.
    Raises:
        CheckpointError: `out` has a study, and `resume` is False or its settings differ.
        MetaWrapError: no run could be trained.
    """
    path = Path(out)
    _check(path, experiments, seeds, resume)
    for folder, settings in experiments.items():
        if not (path / folder / "run.json").exists():  # A resumed study may have moved data, which are checked first.
            write_run(path / folder, settings, seeds)
    keys = [(folder, seed) for folder in experiments for seed in seeds]
    runs = {f"{folder}/seed-{seed}": replace(experiments[folder], seed=seed) for folder, seed in keys}
    rows = run_in_processes(runs, path, jobs)
    titles = study_titles(experiments)
    results = [
        _result(folder, titles[folder], settings, path / run, row)
        for (folder, _), (run, settings), row in zip(keys, runs.items(), rows, strict=True)
    ]
    for folder, settings in experiments.items():
        if not any(each["error"] for each in results if each["experiment"] == folder):
            with quiet():  # Every run is finished: this only writes the summary over the seeds.
                train_seeds(settings, seeds, path / folder, resume=True)
    study = {"study": name, "runs": results, "command": command_line()}
    write_json(path / "study.json", study)
    write_text(path / "study.md", f"{study_table(results)}\n")
    header, *lines = _table(results)
    write_text(path / "study.tex", latex_table(header, lines))
    flat = [each | (each["test"] or {}) | _best(each) for each in results]
    write_text(path / "study.csv", csv_table(flat, _IN_CSV))
    draw_study(results, path / "study.png")
    return study


def study_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table with a line per run and the mean of each experiment over its seeds.

    The column "largest fall" has `largest_fall` of the validation accuracy, in percentage points.
    """
    header, *lines = _table(runs)
    failed = [f"{each['experiment']}, seed {each['seed']}: {each['error']}" for each in runs if each["error"]]
    note = "Accuracy in percent; ± 95 % interval over tasks, behind a mean the standard deviation over seeds."
    return "\n".join([markdown_table(header, lines), "", note, *failed])


def _table(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    lines = [["method", "seed", "test", "best validation", "largest fall"]]
    for experiment in dict.fromkeys(each["experiment"] for each in runs):
        own = [each for each in runs if each["experiment"] == experiment]
        lines += [[each["method"], str(each["seed"]), *_cells(each)] for each in own]
        if len(tested := [each["test"]["accuracy"] for each in own if each["test"]]) > 1 and None not in tested:
            mean = percent_pair(statistics.fmean(tested), statistics.stdev(tested))
            lines.append([own[0]["method"], f"mean of {len(tested)}", mean, "", ""])
    return lines


def _best(run: Mapping[str, Any]) -> dict[str, float]:
    known = run["validation"] and None not in run["validation"]
    found = run["validation"]
    return {"best_validation": max(found), "largest_fall": largest_fall(found)} if known else {}


def study_titles(experiments: Mapping[str, RunSettings]) -> dict[str, str]:
    """What tells the experiments apart, by folder: the method; or, where two have one, the settings that differ.

    >>> study_titles({"a": RunSettings(norm="batch"), "b": RunSettings(norm="task")})
    {'a': 'MAML++, norm=batch', 'b': 'MAML++, norm=task'}
    """
    titles = {folder: method_title(settings.method) for folder, settings in experiments.items()}
    if len(set(titles.values())) == len(titles):
        return titles
    values = {folder: settings.to_dict() for folder, settings in experiments.items()}
    names = [name for name in next(iter(values.values())) if name not in ("method", "recipe")]
    differing = [name for name in names if len({repr(each[name]) for each in values.values()}) > 1]
    return {
        folder: ", ".join([title, *(f"{name}={values[folder][name]}" for name in differing)])
        for folder, title in titles.items()
    }


def largest_fall(accuracies: Sequence[float]) -> float:
    """The largest distance of a value below the best value before it; 0 if the values never fall.

    >>> round(largest_fall([0.2, 0.9, 0.5, 0.95]), 2)
    0.4
    """
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
                f"seeds: the study was started with {stored_seeds or 'one'}, but is resumed with {list(seeds)}. "
                "Use the same, or another --out."
            )
    for folder, settings in experiments.items():
        if not (path / folder / "run.json").exists():
            build_experiment(replace(settings, seed=seeds[0]))  # Settings that cannot be built leave no folder behind.


def _result(experiment: str, title: str, settings: RunSettings, folder: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    logged = read_log(folder)
    return {
        "experiment": experiment,
        "method": title,
        "seed": settings.seed,
        "error": row["error"],
        "validation": [record["validation_accuracy"] for record in logged],
        "alone": [record.get("validation_alone_accuracy") for record in logged if settings.validation_alone],
        "meta_steps": [record.get("iteration") for record in logged],
        "planned": settings.epochs * settings.iterations_per_epoch,
        "test": None if row["error"] else {name: row[name] for name in ("accuracy", "interval", "loss") if name in row},
        "norm": row.get("norm"),
        "data": settings.data,
        "ways": settings.ways,
        "shots": settings.shots,
    }


def _cells(run: Mapping[str, Any]) -> list[str]:
    test = score_text(run["test"], "accuracy", "interval") if run["test"] else "stopped"
    if not run["validation"] or None in run["validation"]:
        return [test, "", ""]
    return [test, percent_pair(max(run["validation"])), percent_pair(largest_fall(run["validation"]))]
