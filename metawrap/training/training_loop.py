"""The loop of a run: an experiment -> epochs (meta-steps, validation, log, callbacks, checkpoint) -> final test.

Read `run_experiment` first. Runs of names and runs of the user's own objects pass through the same lines.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from metawrap.errors import ArgumentError, CheckpointError
from metawrap.results import StepMetrics
from metawrap.tasks import Task, TaskBatch, as_task_batch
from metawrap.training.callbacks import TrainingState
from metawrap.training.checkpoints import Checkpoint, load_into
from metawrap.training.experiment import Experiment
from metawrap.training.final_evaluation import own_metrics
from metawrap.training.insight import epoch_insight, final_insight
from metawrap.training.machine import peak_memory
from metawrap.training.own_settings import OwnSettings
from metawrap.training.progress import Progress, say
from metawrap.training.run_evaluation import tested
from metawrap.training.run_folder import AnySettings, RunFolder
from metawrap.training.tables import headline
from metawrap.training.torchrun import evaluate_shared, on_rank_zero, rank, seed_dropout, share, world_size

# Skipped meta-steps of an epoch that the log explains, task by task.
_TROUBLES_KEPT = 20


def find_start(folder: RunFolder, resume: bool) -> tuple[Checkpoint | None, dict[str, Any] | None]:
    """The checkpoint to go on from, and the result if nothing is left to do. Raises as `RunFolder.find_start`."""
    start = on_rank_zero(lambda: folder.find_start(resume))
    done = on_rank_zero(folder.result) if start is not None and _ended(start, folder.settings) else None
    return start, done


def _ended(start: Checkpoint, settings: AnySettings) -> bool:
    stopped = "stopped" in start.history[-1] and start.settings["epochs"] == settings.epochs
    return stopped or start.epoch == settings.epochs


def run_experiment(
    experiment: Experiment, folder: RunFolder, start: Checkpoint | None, callbacks: Sequence[Any]
) -> dict[str, Any]:
    """Trains the missing epochs, tests, and writes the result, which it returns; see `train` in `run.py`."""
    settings = folder.settings
    if experiment.words:
        say(experiment.words)
    history = list(start.history) if start else []
    if start is not None:
        on_rank_zero(lambda: folder.check_data(experiment.data(), experiment.preprocessing))
        extended = start.settings["epochs"] != settings.epochs
        _restore(experiment, start, extended)
        say(f"Resuming '{folder.path}' after epoch {start.epoch} of {settings.epochs}.")
        if extended:
            say(f"The run is extended from {start.settings['epochs']} epochs; its schedules follow the new length.")
    on_rank_zero(lambda: folder.begin(history, experiment.data_file))
    processes = f" in {world_size()} processes" if world_size() > 1 else ""
    tasks = "" if settings.tasks_per_batch is None else f" x {settings.tasks_per_batch} tasks"
    say(
        f"{headline(settings.to_dict())}: {settings.epochs} epochs x {settings.iterations_per_epoch} meta-steps{tasks}"
        f", on {experiment.device}{processes}, in '{folder.path}'"
    )
    state = TrainingState(experiment.learner, folder.path, settings.epochs, history)
    with _called(callbacks, state):
        seconds = start.seconds if start else 0.0
        if start is None or not _ended(start, settings):
            seconds = _train_epochs(experiment, folder, state, seconds, callbacks)
        norms = None if settings.test_norms == "all" else (experiment.learner.settings.norm,)
        result = tested(experiment, folder, history, norms, experiment.kind) | {"seconds": round(seconds, 3)}
        insight = final_insight(experiment.learner, experiment.test, settings.test_tasks) if experiment.test else {}
        on_rank_zero(lambda: folder.write_result(result, insight))
        state.result = result
    return result


@contextmanager
def _called(callbacks: Sequence[Any], state: TrainingState) -> Iterator[None]:
    """Calls `on_train_start` of the callbacks and, of those that it has called, `on_train_end` in any case."""
    with ExitStack() as ends:
        for each in callbacks if rank() == 0 else ():
            _call(each, "on_train_start", state)
            ends.callback(_call, each, "on_train_end", state)
        yield


def _call(callback: Any, name: str, state: TrainingState) -> None:
    if (method := getattr(callback, name, None)) is not None:
        method(state)


def _train_epochs(
    experiment: Experiment, folder: RunFolder, state: TrainingState, seconds_before: float, callbacks: Sequence[Any]
) -> float:
    """Trains the missing epochs; returns the seconds of training over all resumes."""
    settings, begun, seconds, history = (
        folder.settings,
        time.monotonic() - seconds_before,
        seconds_before,
        state.history,
    )
    with Progress(settings.epochs, settings.iterations_per_epoch, len(history), shown=rank() == 0) as progress:
        for epoch in range(len(history), settings.epochs):
            progress.start_epoch(epoch)
            trained, state.insight = _train_epoch(experiment, settings, epoch, progress)
            validated = _validate(experiment, settings)
            seconds = time.monotonic() - begun
            record = trained | validated | {"seconds": round(seconds, 3)}
            history.append(record)
            try:
                state.stopped = on_rank_zero(lambda: _epoch_ended(callbacks, state))
                if state.stopped is not None:
                    record["stopped"] = state.stopped
            finally:  # An error of a callback costs no epoch.
                snapshot = _snapshot(experiment, settings, history, seconds)
                on_rank_zero(lambda: _write_epoch(folder, record, state.insight, snapshot))  # noqa: B023
            progress.end_epoch(record)
            if state.stopped is not None:
                say(f"Stopped after epoch {epoch + 1} of {settings.epochs}: {state.stopped}.")
                break
    return seconds


def _epoch_ended(callbacks: Sequence[Any], state: TrainingState) -> str | None:
    for each in callbacks:
        _call(each, "on_epoch_end", state)
    return state.stopped


def _write_epoch(folder: RunFolder, record: dict[str, Any], insight: dict[str, Any], snapshot: Checkpoint) -> None:
    folder.append(record, insight)
    folder.checkpoints.save(snapshot)


def _train_epoch(
    experiment: Experiment, settings: AnySettings, epoch: int, progress: Progress
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trains one epoch; returns the training part of its log line, and its insight."""
    learner, count = experiment.learner.train(), settings.iterations_per_epoch
    steps: list[StepMetrics] = []
    troubles: list[dict[str, Any]] = []
    seed_dropout(settings.seed, epoch)
    begun = time.monotonic()
    for iteration, batch in enumerate(experiment.train.batches(count, epoch * count), epoch * count):
        tasks = _own_share(batch)
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


def _own_share(batch: Any) -> Any:
    """The tasks of a batch that this process takes."""
    if world_size() == 1:
        return batch
    tasks = as_task_batch(batch).tasks
    if len(tasks) < world_size():
        raise ArgumentError(
            f"train: {world_size()} processes cannot share the {len(tasks)} tasks of a batch. Give more."
        )
    own = share(len(tasks))
    return TaskBatch(tasks[own.start : own.stop])


def _troubles(learner: Any, tasks: Any, iteration: int) -> list[dict[str, Any]]:
    """The causes of a skipped meta-step, for the log; prints the first."""
    found = learner.find_trouble(tasks)
    for each in found[:1]:
        say(f"Skipped meta-step {iteration + 1}: {each}.")
    return [{"iteration": iteration + 1, **asdict(each), "text": str(each)} for each in found]


def _validate(experiment: Experiment, settings: AnySettings) -> dict[str, Any]:
    if experiment.validation is None:
        return {"validation_accuracy": None}
    how = {} if experiment.metric is None else {"metric": experiment.metric}
    result = evaluate_shared(experiment.learner, experiment.validation, settings.validation_tasks, **how)
    alone = {}
    if count := settings.validation_alone:
        batches = experiment.validation.batches(-(-count // experiment.validation.tasks_per_batch))
        drawn = islice(itertools.chain.from_iterable(batches), count)
        tasks = [one for task in drawn for one in _one_by_one(task)]
        alone = {"validation_alone_accuracy": experiment.learner.evaluate(tasks).accuracy}
    return (
        alone
        | {
            "validation_loss": result.loss if math.isfinite(result.loss) else None,  # JSON has no NaN.
            "validation_accuracy": result.accuracy,
            "validation_interval": result.metrics.get("accuracy", result).interval,
        }
        | ({} if experiment.metric is None else {"validation_metrics": own_metrics(result)})
    )


def _one_by_one(task: Task) -> list[Task]:
    """A task for each target image, as a deployed model meets them."""
    rows = range(len(task.target_y))
    return [replace(task, target_x=task.target_x[i : i + 1], target_y=task.target_y[i : i + 1]) for i in rows]  # type: ignore[index]


def _snapshot(
    experiment: Experiment, settings: AnySettings, history: list[dict[str, Any]], seconds: float
) -> Checkpoint:
    learner, device = experiment.learner, experiment.device
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return Checkpoint(
        settings=settings.to_dict(),
        learner=learner.state_dict(),
        optimizer=learner.optimizer.state_dict(),
        scheduler=None if learner.scheduler is None else learner.scheduler.state_dict(),
        # A run of names draws nothing from those of Python.
        rng={"cpu": torch.get_rng_state(), "cuda": cuda}
        | (_rng_of_python() if isinstance(settings, OwnSettings) else {}),
        history=history,
        seconds=seconds,
    )


def _restore(experiment: Experiment, checkpoint: Checkpoint, extended: bool) -> None:
    learner = experiment.learner
    load_into(learner, checkpoint)
    rates = [group["lr"] for group in learner.optimizer.param_groups]
    try:
        learner.optimizer.load_state_dict(checkpoint.optimizer)
        if extended and learner.outer.anneals:  # The schedule of the new length does not know the rate of the old one.
            for group, rate in zip(learner.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        if checkpoint.scheduler is not None:
            learner.scheduler.load_state_dict(checkpoint.scheduler)
        torch.set_rng_state(checkpoint.rng["cpu"])
        if "python" in checkpoint.rng:
            random.setstate(checkpoint.rng["python"])
            np.random.set_state(checkpoint.rng["numpy"])
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


def _rng_of_python() -> dict[str, Any]:
    """The states of the global generators of Python and NumPy, which the user's own code may draw from."""
    kind, keys, *rest = np.random.get_state()
    return {"python": random.getstate(), "numpy": (kind, list(map(int, keys)), *rest)}


def _mean(values: Sequence[Any]) -> float | None:
    """None without values: in an epoch without a finite loss, since JSON has no NaN, or where a value is not known."""
    return sum(values) / len(values) if values and None not in values else None
