"""A run: settings -> experiment -> epochs (meta-steps, validation, log, checkpoint) -> final test -> result.

Read `train` first. A resumed run continues from the last finished epoch with the same weights, optimizer state and
random state on the same tasks, and so ends with the same bits on the same CPU.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from metawrap.data.loader_workers import naming_dead_workers
from metawrap.errors import ArgumentError, CheckpointError, DataError
from metawrap.results import StepMetrics
from metawrap.tasks import Task, TaskBatch
from metawrap.training.checkpoints import Checkpoint, load_into, write_json
from metawrap.training.data_record import record_of
from metawrap.training.experiment import Experiment, build_experiment, load_splits
from metawrap.training.insight import epoch_insight, final_insight
from metawrap.training.machine import peak_memory
from metawrap.training.progress import Progress, say
from metawrap.training.run_evaluation import UNSEEN, tested
from metawrap.training.run_folder import RunFolder, read_run, refuse_existing_run, refuse_links, write_run
from metawrap.training.run_settings import RunSettings
from metawrap.training.tables import headline, summarise_seeds
from metawrap.training.tensorboard import TensorBoard, check_tensorboard, logs_to_tensorboard
from metawrap.training.torchrun import evaluate_shared, on_rank_zero, rank, seed_dropout, share, world_size

# Skipped meta-steps of an epoch that the log explains, task by task.
_TROUBLES_KEPT = 20


@naming_dead_workers()
def train(settings: RunSettings, out: str | Path, resume: bool = False, tensorboard: bool = False) -> dict[str, Any]:
    """Trains, validates and tests one run in the folder `out`. Sets torch's global random state.

    >>> import tempfile
    >>> settings = RunSettings(method="protonet", epochs=1, iterations_per_epoch=1, validation_tasks=2, test_tasks=2)
    >>> test = train(settings, out=f"{tempfile.mkdtemp()}/run")["test"]
    >>> sorted(test["norms"])
    ['batch', 'running', 'support']

    Args:
        settings: all that defines the run.
        out: a folder without a run, or with `resume` also the folder of a run with these settings.
        resume: continue from the newest readable checkpoint. A finished run returns its result.
        tensorboard: also log to `out`/tensorboard; a run that did so before always continues to.
    Returns:
        The content of result.json: "settings", "test" (see `final_test`), "trained_norm", "best_validation",
        "skipped_steps", "parameters" (learned numbers), "step_seconds" (of a meta-step, median over epochs), "peak_mib"
        (see `peak_memory`), "seconds" of training and validation, "test_seconds", "machine", "command".
    Raises:
        CheckpointError: `out` has a run and `resume` is False, or its run cannot be resumed, or another process uses
            the folder, or it cannot be written.
        MetaWrapError: the settings do not fit the data or the network, or training diverged.
    """
    if settings.tasks_per_batch < world_size():
        raise ArgumentError(
            f"tasks_per_batch: {world_size()} processes cannot share the {settings.tasks_per_batch} tasks of a "
            f"meta-step. Use --batch {world_size()} or more, or --nproc-per-node={settings.tasks_per_batch}."
        )
    folder = RunFolder(Path(out), settings)
    try:
        return _train(folder, resume, tensorboard)
    finally:
        folder.lock.release()


def _train(folder: RunFolder, resume: bool, tensorboard: bool) -> dict[str, Any]:
    settings, out = folder.settings, folder.path
    tensorboard = tensorboard or (resume and logs_to_tensorboard(out))
    if tensorboard:
        check_tensorboard()
    start = on_rank_zero(lambda: folder.find_start(resume))
    if start is not None and start.epoch == settings.epochs and (done := on_rank_zero(folder.result)) is not None:
        _check_data_of_finished(folder)
        say(f"The run in '{out}' is finished; this is its result. Another --out starts a new one.")
        return done
    experiment = build_experiment(settings)
    if experiment.words:
        say(experiment.words)
    history = list(start.history) if start else []
    if start is not None:
        on_rank_zero(lambda: folder.check_data(experiment.data(), experiment.preprocessing))
        _restore(experiment, start)
        say(f"Resuming '{out}' after epoch {start.epoch} of {settings.epochs}.")
    on_rank_zero(lambda: folder.begin(history, experiment.data_file))
    board = TensorBoard(out, history, folder.insight(len(history))) if tensorboard and rank() == 0 else None
    processes = f" in {world_size()} processes" if world_size() > 1 else ""
    say(
        f"{headline(settings)}: {settings.epochs} epochs x {settings.iterations_per_epoch} meta-steps x "
        f"{settings.tasks_per_batch} tasks, on {experiment.device}{processes}, in '{out}'"
    )
    with board or nullcontext():
        seconds = _train_epochs(experiment, folder, history, start.seconds if start else 0.0, board)
    norms = None if settings.test_norms == "all" else (experiment.learner.settings.norm,)
    result = tested(experiment, folder, history, norms, UNSEEN) | {"seconds": round(seconds, 3)}
    insight = final_insight(experiment.learner, experiment.test, settings.test_tasks)
    on_rank_zero(lambda: folder.write_result(result, insight))
    return result


def _check_data_of_finished(folder: RunFolder) -> None:
    """A comparison shows finished runs beside new ones, so their data must be the same. A result outlives its data."""
    try:
        present = record_of(load_splits(folder.settings))
    except DataError as error:
        say(f"The result stands, but its data cannot be read any more: {error}")
    else:
        on_rank_zero(lambda: folder.check_data(present))


def train_seeds(
    settings: RunSettings, seeds: Sequence[int], out: str | Path, resume: bool = False, tensorboard: bool = False
) -> dict[str, Any]:
    """Runs `train` for each seed in `out`/seed-0, ... and summarises over the seeds.

    >>> import tempfile
    >>> settings = RunSettings(method="protonet", epochs=1, iterations_per_epoch=1, validation_tasks=2, test_tasks=2)
    >>> train_seeds(settings, [0, 1], out=f"{tempfile.mkdtemp()}/runs").get("summary").get("seeds")
    [0, 1]

    Returns:
        The content of `out`/result.json: "settings", "summary" (see `summarise_seeds`), "trained_norm", "results" by
        seed.
    """
    path = Path(out)
    if tensorboard:
        check_tensorboard()
    on_rank_zero(lambda: refuse_links(path))
    if stored := on_rank_zero(lambda: read_run(path)[0] if resume and (path / "run.json").exists() else None):
        settings.check_resumes(stored.to_dict())
    else:
        if not resume:
            on_rank_zero(lambda: refuse_existing_run(path))
        build_experiment(replace(settings, seed=seeds[0]))  # Settings that cannot be built leave no folder behind.
        on_rank_zero(lambda: write_run(path, settings, seeds))
    results: dict[int, dict[str, Any]] = {}
    for seed in seeds:
        say(f"Seed {seed} in '{path / f'seed-{seed}'}'")
        results[seed] = train(replace(settings, seed=seed), path / f"seed-{seed}", resume, tensorboard)
        on_rank_zero(lambda: write_run(path, settings, seeds))  # The data of a resumed run are the right ones.
    summary = {
        "settings": settings.to_dict(),
        "summary": summarise_seeds(results),
        "trained_norm": results[seeds[0]]["trained_norm"],
        "results": {str(seed): result for seed, result in results.items()},
    }
    on_rank_zero(lambda: write_json(path / "result.json", summary))
    return summary


def _train_epochs(
    experiment: Experiment,
    folder: RunFolder,
    history: list[dict[str, Any]],
    seconds_before: float,
    board: TensorBoard | None,
) -> float:
    """Trains the missing epochs; returns the seconds of training over all resumes."""
    settings, begun, seconds = folder.settings, time.monotonic() - seconds_before, seconds_before
    with Progress(settings.epochs, settings.iterations_per_epoch, len(history), shown=rank() == 0) as progress:
        for epoch in range(len(history), settings.epochs):
            progress.start_epoch(epoch)
            trained, insight = _train_epoch(experiment, settings, epoch, progress)
            validated = _validate(experiment, settings)
            seconds = time.monotonic() - begun
            record = trained | validated | {"seconds": round(seconds, 3)}
            history.append(record)
            snapshot = _snapshot(experiment, settings, history, seconds)
            on_rank_zero(partial(_write_epoch, folder, record, insight, snapshot, board))
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
    """Trains one epoch; returns the training part of its log line, and its insight."""
    learner, count = experiment.learner.train(), settings.iterations_per_epoch
    steps: list[StepMetrics] = []
    troubles: list[dict[str, Any]] = []
    own = share(settings.tasks_per_batch)
    seed_dropout(settings.seed, epoch)
    begun = time.monotonic()
    for iteration, batch in enumerate(experiment.train.batches(count, epoch * count), epoch * count):
        tasks = TaskBatch(batch.tasks[own.start : own.stop])
        steps.append(learner.meta_step(tasks))
        # On a GPU, reading `skipped` after each step would wait for the device.
        if experiment.device.type == "cpu" and steps[-1].skipped and len(troubles) < _TROUBLES_KEPT:
            troubles += _troubles(learner, tasks, iteration)
        progress.step(steps[-1])
    finite = [step for step in steps if math.isfinite(step.loss)]  # The first number read waits for the device.
    seconds = time.monotonic() - begun
    record = {
        "epoch": epoch + 1,
        "iteration": (epoch + 1) * count,
        "train_loss": _mean([step.loss for step in finite]),
        "train_accuracy": _mean([step.accuracy for step in finite]),
        "learning_rate": steps[-1].meta_lr,
        "skipped_steps": sum(step.skipped for step in steps),
        "step_seconds": round(seconds / count, 5),
        "peak_mib": peak_memory(experiment.device),
    } | ({"not_finite": troubles} if troubles else {})
    return record, epoch_insight(learner, epoch, steps)


def _troubles(learner: Any, tasks: TaskBatch, iteration: int) -> list[dict[str, Any]]:
    """The causes of a skipped meta-step, for the log; prints the first."""
    found = learner.find_trouble(tasks)
    for each in found[:1]:
        say(f"Skipped meta-step {iteration + 1}: {each}.")
    return [{"iteration": iteration + 1, **asdict(each), "text": str(each)} for each in found]


def _validate(experiment: Experiment, settings: RunSettings) -> dict[str, Any]:
    result = evaluate_shared(experiment.learner, experiment.validation, settings.validation_tasks)
    alone = {}
    if count := settings.validation_alone:
        batches = experiment.validation.batches(-(-count // experiment.validation.tasks_per_batch))
        drawn = islice(itertools.chain.from_iterable(batches), count)
        tasks = [one for task in drawn for one in _one_by_one(task)]
        alone = {"validation_alone_accuracy": experiment.learner.evaluate(tasks).accuracy}
    return alone | {
        "validation_loss": result.loss if math.isfinite(result.loss) else None,  # JSON has no NaN.
        "validation_accuracy": result.accuracy,
        "validation_interval": result.interval,
    }


def _one_by_one(task: Task) -> list[Task]:
    """A task for each target image, as a deployed model meets them."""
    rows = range(len(task.target_y))
    return [replace(task, target_x=task.target_x[i : i + 1], target_y=task.target_y[i : i + 1]) for i in rows]  # type: ignore[index]


def _snapshot(
    experiment: Experiment, settings: RunSettings, history: list[dict[str, Any]], seconds: float
) -> Checkpoint:
    learner, device = experiment.learner, experiment.device
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return Checkpoint(
        settings=settings.to_dict(),
        learner=learner.state_dict(),
        optimizer=learner.optimizer.state_dict(),
        scheduler=None if learner.scheduler is None else learner.scheduler.state_dict(),
        rng={"cpu": torch.get_rng_state(), "cuda": cuda},
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
        # A run may move from a CPU to a GPU, whose random state then starts afresh.
        if experiment.device.type == "cuda" and (states := checkpoint.rng["cuda"]):
            # Older checkpoints hold the states of all devices.
            torch.cuda.set_rng_state(states[min(experiment.device.index or 0, len(states) - 1)], experiment.device)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        cause = " ".join(str(error).split())
        raise CheckpointError(
            f"The checkpoint of epoch {checkpoint.epoch} cannot be resumed: its optimizer or random state is not this "
            f"run's ({type(error).__name__}: {cause[:200]}). Resume with the code and the torch that wrote it, or "
            "train anew into another --out."
        ) from error


def _mean(values: Sequence[Any]) -> float | None:
    """None without values: in an epoch without a finite loss, since JSON has no NaN, or where a value is not known."""
    return sum(values) / len(values) if values and None not in values else None
