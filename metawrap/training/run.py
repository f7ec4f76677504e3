"""A run: settings -> experiment -> epochs (meta-steps, validation, log, checkpoint) -> final test -> result.

Read `train` first. An epoch is the unit of resuming: a run that was killed repeats the epoch it was in, from the same
weights, optimizer state and random state, on the same tasks, and so ends with the same bits on the same CPU.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metawrap.data import normalisation_of
from metawrap.data.loader_workers import naming_dead_workers
from metawrap.errors import ArgumentError, CheckpointError
from metawrap.results import StepMetrics
from metawrap.tasks import TaskBatch
from metawrap.training.checkpoints import Checkpoint, load_into, write_json
from metawrap.training.experiment import (
    TEST_SEED,
    Experiment,
    build_experiment,
    build_learner,
    build_model,
    find_device,
    fixed_tasks,
    load_splits,
)
from metawrap.training.final_evaluation import final_test
from metawrap.training.insight import epoch_insight, final_insight
from metawrap.training.launch import by_first, evaluate_shared, rank, seed_dropout, share, size
from metawrap.training.machine import command_line, describe_machine, peak_memory
from metawrap.training.progress import Progress, say
from metawrap.training.run_folder import RunFolder, read_run, refuse_existing_run, seed_folders, write_run
from metawrap.training.run_settings import NORMS, RunSettings
from metawrap.training.tables import headline, summarise_seeds
from metawrap.training.tensorboard import TensorBoard, check_tensorboard, logs_to_tensorboard

# Skipped steps of an epoch that the log explains, task by task.
_TROUBLES_KEPT = 20


@naming_dead_workers()
def train(settings: RunSettings, out: str | Path, resume: bool = False, tensorboard: bool = False) -> dict[str, Any]:
    """Trains, validates and tests one run in the folder `out`. Sets torch's global random state.

    Args:
        settings: what to run.
        out: a folder without a run, or with `resume` one that may have a run with these settings.
        resume: continue from the newest readable checkpoint; a finished run is tested again only if it has to be.
        tensorboard: also log to `out`/tensorboard; a resumed run that did goes on with it.
    Returns:
        What result.json holds: "settings", "test" (see `final_test`), "trained_norm", "best_validation",
        "skipped_steps", "parameters" (learned numbers), "step_seconds" (of a meta-step, median over epochs), "peak_mib"
        (see `peak_memory`), "seconds" of training and validation, "test_seconds", "machine", "command".
    Raises:
        CheckpointError: `out` has a run that is not to be, or cannot be, resumed, another process is at it, or it
            cannot be written.
        MetaWrapError: the settings do not fit the data or the network, or training diverged.
    """
    _check_shares(settings)
    folder = RunFolder(Path(out), settings)
    try:
        return _train(folder, resume, tensorboard)
    finally:
        folder.lock.release()


def _train(folder: RunFolder, resume: bool, tensorboard: bool) -> dict[str, Any]:
    settings, out = folder.settings, folder.path
    tensorboard = tensorboard or (resume and logs_to_tensorboard(folder.path))
    if tensorboard:
        check_tensorboard()
    start = by_first(lambda: folder.find_start(resume))
    if start is not None and start.epoch == settings.epochs and (done := by_first(folder.result)) is not None:
        say(f"The run in '{out}' is finished; this is its result. Another --out starts a new one.")
        return done
    experiment = build_experiment(settings)
    history = list(start.history) if start else []
    if start is not None:
        _restore(experiment, start)
        say(f"Resuming '{out}' after epoch {start.epoch} of {settings.epochs}.")
    by_first(lambda: folder.begin(history))
    board = TensorBoard(folder.path, history, folder.insight(len(history))) if tensorboard and rank() == 0 else None
    processes = f" in {size()} processes" if size() > 1 else ""
    say(
        f"{headline(settings)}: {settings.epochs} epochs x {settings.iterations_per_epoch} meta-steps x "
        f"{settings.tasks_per_batch} tasks, on {experiment.device}{processes}, in '{out}'"
    )
    with board or nullcontext():
        seconds = _train_epochs(experiment, folder, history, start.seconds if start else 0.0, board)
    norms = NORMS if settings.test_norms == "all" else (experiment.learner.settings.norm,)
    result = _test(experiment, folder, history, norms) | {"seconds": round(seconds, 3)}
    insight = final_insight(experiment.learner, experiment.test, settings.test_tasks)
    by_first(lambda: folder.write_result(result, insight))
    return result


def train_seeds(
    settings: RunSettings, seeds: Sequence[int], out: str | Path, resume: bool = False, tensorboard: bool = False
) -> dict[str, Any]:
    """Runs `train` for each seed in `out`/seed-0, ... and summarises over them; resumes what is unfinished.

    Returns:
        What `out`/result.json holds: "settings", "summary" (see `summarise_seeds`), "trained_norm", "results" by seed.
    """
    path = Path(out)
    if tensorboard:
        check_tensorboard()
    if stored := by_first(lambda: read_run(path)[0] if resume and (path / "run.json").exists() else None):
        settings.check_resumes(stored.to_dict())
    else:
        if not resume:
            by_first(lambda: refuse_existing_run(path))
        build_experiment(replace(settings, seed=seeds[0]))  # What cannot be built leaves no folder behind.
    by_first(lambda: write_run(path, settings, seeds))
    results: dict[int, dict[str, Any]] = {}
    for seed, folder in seed_folders(path, settings, seeds).items():
        say(f"Seed {seed} in '{folder.path}'")
        results[seed] = train(folder.settings, folder.path, resume, tensorboard)
    summary = {
        "settings": settings.to_dict(),
        "summary": summarise_seeds(results),
        "trained_norm": results[seeds[0]]["trained_norm"],
        "results": {str(seed): result for seed, result in results.items()},
    }
    by_first(lambda: write_json(path / "result.json", summary))
    return summary


@naming_dead_workers()
def evaluate_run(out: str | Path, norms: Sequence[str] = NORMS, **changes: Any) -> dict[str, Any]:
    """Tests a run's best checkpoint again; finished or not. Writes nothing.

    Args:
        out: the run's folder.
        norms: batch-norm policies to test under.
        changes: settings to test with instead of the run's own, such as test_tasks=1000, ensemble=5, data="omniglot".
    Returns:
        As `train`, with the settings that were used, and without "seconds".
    Raises:
        CheckpointError: there is no run, or no finished epoch.
    """
    stored, seeds = read_run(Path(out))
    if seeds is not None:
        first = Path(out) / f"seed-{seeds[0]}"
        raise CheckpointError(f"'{out}' holds one run per seed. Name one of them, such as '{first}'.")
    folder = RunFolder(Path(out), stored)
    newest = folder.checkpoints.newest(skipped=lambda error: say(f"Skipped: {error}"))
    if newest is None:
        raise CheckpointError(
            f"'{out}' has no finished epoch yet. Continue it with: metawrap train --out {out} --resume"
        )
    if changes.get("data", stored.data) != stored.data:
        # Images of another data set are normalised as those were that the network was trained on.
        changes = {"normalise": stored.normalise or normalisation_of(stored.data) or "none", **changes}
    settings = replace(stored, **changes)
    device = find_device(settings.device)
    splits = load_splits(settings)
    learner = build_learner(stored, build_model(stored, splits.train)).to(device)
    tasks = fixed_tasks(settings, splits.test, settings.test_tasks, TEST_SEED, device)
    experiment = Experiment(learner=learner, train=tasks, validation=tasks, test=tasks, device=device)
    return _test(experiment, RunFolder(Path(out), settings), newest.history, norms)


def _train_epochs(
    experiment: Experiment,
    folder: RunFolder,
    history: list[dict[str, Any]],
    seconds_before: float,
    board: TensorBoard | None,
) -> float:
    """Trains what is missing of the run; returns the seconds that training took, over all resumes."""
    settings, begun = folder.settings, time.monotonic()
    seconds = seconds_before
    with Progress(settings.epochs, settings.iterations_per_epoch, len(history), shown=rank() == 0) as progress:
        for epoch in range(len(history), settings.epochs):
            progress.start_epoch(epoch)
            trained, insight = _train_epoch(experiment, settings, epoch, progress)
            record = trained | _validate(experiment, settings)
            seconds = seconds_before + time.monotonic() - begun
            record["seconds"] = round(seconds, 3)
            history.append(record)
            snapshot = _snapshot(experiment, settings, history, seconds)
            by_first(partial(_write_epoch, folder, record, insight, snapshot, board))
            progress.end_epoch(record)
    return seconds


def _write_epoch(
    folder: RunFolder, record: dict[str, Any], insight: dict[str, Any], snapshot: Checkpoint, board: TensorBoard | None
) -> None:
    folder.append(record, insight)
    if board is not None:
        board.write(record, insight)
    folder.checkpoints.save(snapshot)


def _train_epoch(
    experiment: Experiment, settings: RunSettings, epoch: int, progress: Progress
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The epoch's line of the log, as far as training goes, and that of the insight."""
    learner, count = experiment.learner.train(), settings.iterations_per_epoch
    steps: list[StepMetrics] = []
    troubles: list[dict[str, Any]] = []
    own = share(settings.tasks_per_batch)
    seed_dropout(settings.seed, epoch)
    begun = time.monotonic()
    for iteration, batch in enumerate(experiment.train.batches(count, epoch * count), epoch * count):
        tasks = TaskBatch(batch.tasks[own.start : own.stop])
        steps.append(learner.meta_step(tasks))
        # Elsewhere than on a CPU the question would wait for the device.
        if experiment.device.type == "cpu" and steps[-1].skipped and len(troubles) < _TROUBLES_KEPT:
            troubles += _troubles(learner, tasks, iteration)
        progress.step(steps[-1])
    good = [step for step in steps if math.isfinite(step.loss)]  # The first number read waits for the device.
    seconds = time.monotonic() - begun
    record = {
        "epoch": epoch + 1,
        "iteration": (epoch + 1) * count,
        "train_loss": _mean([step.loss for step in good]),
        "train_accuracy": _mean([step.accuracy for step in good]),
        "learning_rate": steps[-1].meta_lr,
        "skipped_steps": sum(step.skipped for step in steps),
        "step_seconds": round(seconds / count, 5),
        "peak_mib": peak_memory(experiment.device),
    } | ({"not_finite": troubles} if troubles else {})
    return record, epoch_insight(learner, epoch, steps)


def _troubles(learner: Any, tasks: TaskBatch, iteration: int) -> list[dict[str, Any]]:
    """What there is to say of a skipped step, for the log; the first of it is said at once."""
    found = learner.find_trouble(tasks)
    for each in found[:1]:
        say(f"Skipped meta-step {iteration + 1}: {each}.")
    return [{"iteration": iteration + 1, **asdict(each), "text": str(each)} for each in found]


def _check_shares(settings: RunSettings) -> None:
    if settings.tasks_per_batch < size():
        raise ArgumentError(
            f"tasks_per_batch: {size()} processes cannot share the {settings.tasks_per_batch} tasks of a meta-step. "
            f"Use --batch {size()} or more, or --nproc-per-node={settings.tasks_per_batch}."
        )


def _validate(experiment: Experiment, settings: RunSettings) -> dict[str, Any]:
    result = evaluate_shared(experiment.learner, experiment.validation, settings.validation_tasks)
    return {
        "validation_loss": result.loss if math.isfinite(result.loss) else None,  # JSON has no NaN.
        "validation_accuracy": result.accuracy,
        "validation_interval": result.interval,
    }


def _test(
    experiment: Experiment, folder: RunFolder, history: list[dict[str, Any]], norms: Sequence[str]
) -> dict[str, Any]:
    settings, begun = folder.settings, time.monotonic()
    say(f"Testing on {settings.test_tasks} tasks of unseen classes, under {_counted(norms)} ...")
    test = final_test(
        experiment.learner,
        experiment.test,
        settings.test_tasks,
        folder.checkpoints,
        history,
        settings.ensemble,
        norms,
    )
    best = history[test["epoch"] - 1]
    return {
        "settings": settings.to_dict(),
        "test": test,
        "trained_norm": experiment.learner.settings.norm,
        "best_validation": {"epoch": test["epoch"], "accuracy": best["validation_accuracy"]},
        "skipped_steps": sum(record["skipped_steps"] for record in history),
        "parameters": _learned_numbers(experiment.learner),
        "step_seconds": _median([record.get("step_seconds") for record in history]),
        "peak_mib": max((record.get("peak_mib") or 0.0 for record in history), default=0.0) or None,
        "test_seconds": round(time.monotonic() - begun, 3),
        "machine": describe_machine(experiment.device),
        "command": command_line(),
    }


def _counted(norms: Sequence[str]) -> str:
    return f'norm="{norms[0]}"' if len(norms) == 1 else f"{len(norms)} batch-norm policies"


def _snapshot(
    experiment: Experiment, settings: RunSettings, history: list[dict[str, Any]], seconds: float
) -> Checkpoint:
    learner = experiment.learner
    return Checkpoint(
        settings=settings.to_dict(),
        learner=learner.state_dict(),
        optimizer=learner.optimizer.state_dict(),
        scheduler=None if learner.scheduler is None else learner.scheduler.state_dict(),
        rng={"cpu": torch.get_rng_state(), "cuda": _device_rng(experiment.device)},
        history=history,
        seconds=seconds,
    )


def _restore(experiment: Experiment, checkpoint: Checkpoint) -> None:
    learner = experiment.learner
    load_into(learner, checkpoint)
    try:
        learner.optimizer.load_state_dict(checkpoint.optimizer)
        if checkpoint.scheduler is not None:
            learner.scheduler.load_state_dict(checkpoint.scheduler)
        torch.set_rng_state(checkpoint.rng["cpu"])
        # A run may move between CPU and GPU; the random state of a GPU then starts afresh.
        if experiment.device.type == "cuda" and (states := checkpoint.rng["cuda"]):
            # Older checkpoints hold those of all devices.
            torch.cuda.set_rng_state(states[min(experiment.device.index or 0, len(states) - 1)], experiment.device)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        cause = " ".join(str(error).split())
        raise CheckpointError(
            f"The checkpoint of epoch {checkpoint.epoch} cannot be resumed: its optimizer or random state is not this "
            f"run's ({type(error).__name__}: {cause[:200]}). Resume with the code and the torch that wrote it, or "
            "train anew into another --out."
        ) from error


def _device_rng(device: torch.device) -> list[Tensor]:
    return [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []


def _learned_numbers(learner: Any) -> int:
    """How many numbers training changes: those of parameters that play no part are left out."""
    rows = learner.describe().modules
    unused = sum(
        math.prod(row.parameters[name]) for row in rows for name, fate in row.fates.items() if fate == "unused"
    )
    return int(sum(p.numel() for p in learner.parameters() if p.requires_grad) - unused)


def _median(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return statistics.median(present) if present else None


def _mean(values: Sequence[Any]) -> float | None:
    """None for no values, as when no step of the epoch had a finite loss: JSON has no NaN."""
    return sum(values) / len(values) if values else None
