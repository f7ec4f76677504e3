"""A run of the user's own objects: a learner and sources of tasks -> `run_experiment` -> result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import length_hint
from pathlib import Path
from typing import Any, Literal

from torch import nn

from metawrap.data import EpisodeSampler
from metawrap.data.loader_workers import naming_dead_workers
from metawrap.errors import ArgumentError
from metawrap.learner.learner import Learner
from metawrap.learner.metrics import Metric
from metawrap.results import accuracy_of
from metawrap.tasks import Task, TaskBatch, as_task_batch, describe_value, device_of, is_stacked
from metawrap.training.callbacks import check_callbacks
from metawrap.training.checkpoints import load_into
from metawrap.training.experiment import Experiment, show_task
from metawrap.training.final_evaluation import epochs_to_test
from metawrap.training.own_settings import OwnSettings
from metawrap.training.progress import say
from metawrap.training.run_folder import RunFolder
from metawrap.training.run_settings import METHODS
from metawrap.training.tables import result_text
from metawrap.training.task_sources import BatchStream, FixedTasks, ListedTasks, TrainingTasks, task_at
from metawrap.training.torchrun import on_rank_zero, world_size
from metawrap.training.training_loop import find_start, run_experiment

_VALIDATION_TASKS, _TEST_TASKS = 200, 600
_KIND = "your own"


@naming_dead_workers()
def train(
    learner: Learner,
    train: Any,
    validation: Any = None,
    test: Any = None,
    *,
    out: str | Path,
    epochs: int | None = None,
    validation_tasks: int | None = None,
    test_tasks: int | None = None,
    metric: Metric | None = None,
    callbacks: Sequence[Any] = (),
    resume: bool = False,
    keep: int = 5,
    test_norms: Literal["all", "own"] = "all",
    seed: int | None = None,
) -> dict[str, Any]:
    """Trains, validates and tests a learner of the user's own on tasks of the user's own, in the folder `out`.

    The run has the files of `metawrap train`: settings, log, checkpoints, result; `metawrap report` shows it. Files do
    not hold objects: the same call with `resume=True`, on objects made as before, goes on with a run that was
    interrupted, to the same bits where the tasks are the same. Afterwards the learner has the best epoch's weights.

    An epoch is `iterations_per_epoch` meta-steps of the learner, followed by validation, log, callbacks and checkpoint.

    Args:
        learner: a method around the user's network, with its own loss, optimizer and schedules.
        train: an EpisodeSampler, or any object with `batches(count, start)`; or an iterable of task batches, such as a
            list or a DataLoader, which is begun again when it ends. A resumed run draws the batches of an iterable
            that it has trained on once more, and skips them.
        validation: an EpisodeSampler, of which the first tasks are taken, or an iterable of task batches that ends; the
            same tasks after each epoch. Without it the newest epoch counts as the best.
        test: likewise, for the final test; None for no test.
        out: a folder without a run, or with `resume` also that of a run of such objects.
        epochs: the length of the run; the learner's `epochs`, which its schedules have, if None. More epochs than the
            run had extend it.
        validation_tasks, test_tasks: how many tasks to take; of a sampler 200 and 600 if None, rounded up to whole
            batches, of an iterable all.
        metric: one metric or several by name, as for `learner.evaluate`, measured and logged besides the accuracy.
        callbacks: objects whose methods are called as the run goes, see `Callback`.
        resume: go on from the newest readable checkpoint. A finished run returns its result.
        keep: number of the best checkpoints to keep, and of the newest.
        test_norms: "all" batch-norm policies in the final test, or the learner's "own" alone.
        seed: for the record; the sampler's if None. A report shows runs that differ in nothing else as one.
    Returns:
        The content of result.json, as `metawrap.training.train` returns it; without "test" if there are no test tasks,
        and with "metrics" in each of its scores if there are any.
    Raises:
        ArgumentError: an argument is of the wrong type, or the learner does not fit the tasks.
        CheckpointError: `out` has a run and `resume` is False, or its run is another, or cannot be written.
        DataError: the classes of a sampler are others than in the run that is resumed.
    """
    if not isinstance(learner, Learner):
        fix = " Wrap it first: metawrap.MAMLPlusPlus(model)." if isinstance(learner, nn.Module) else ""
        raise ArgumentError(f"learner: expected a learner of metawrap, but got {type(learner).__name__}.{fix}")
    check_callbacks(callbacks)
    stream = _stream(train, learner)
    first = stream.first() if isinstance(stream, BatchStream) else next(iter(stream.batches(1)))
    fix, ways_fix = "Give tasks that its forward takes.", "Give the network an output for each class of a task."
    show_task(learner.train(), as_task_batch(first)[0], "train", fix, ways_fix)
    sources = {"validation": (validation, validation_tasks, _VALIDATION_TASKS), "test": (test, test_tasks, _TEST_TASKS)}
    fixed = {name: _fixed(name, *source) for name, source in sources.items()}
    tasks = {name: each for name, (each, _) in fixed.items()}
    one = next((each for each in tasks.values() if each is not None), None)
    metric = metric if one is None or metric is None else _with_accuracy(learner, metric, one)
    experiment = Experiment(learner, stream, tasks["validation"], tasks["test"], device_of(learner), metric, kind=_KIND)
    counts = {f"{name}_tasks": count for name, (_, count) in fixed.items()}
    how: dict[str, Any] = {"keep": keep, "test_norms": test_norms, **counts}
    how["epochs"] = learner.settings.epochs if epochs is None else epochs
    how["seed"] = getattr(train, "seed", 0) if seed is None else seed
    settings = _settings(learner, {"train": train, "validation": validation, "test": test}, metric, how)
    folder = RunFolder(Path(out), settings)
    try:
        return _train(experiment, folder, settings, resume, callbacks)
    finally:
        folder.lock.release()


def _train(
    experiment: Experiment, folder: RunFolder, settings: OwnSettings, resume: bool, callbacks: Sequence[Any]
) -> dict[str, Any]:
    start, result = find_start(folder, resume)
    if start is not None and result is not None:
        on_rank_zero(lambda: folder.check_data(experiment.data()))
        best = epochs_to_test(folder.checkpoints, start.history)[0]
        load_into(experiment.learner, on_rank_zero(lambda: folder.checkpoints.load(best)))
        say(f"The run in '{folder.path}' is finished; this is its result. Another out starts a new one.")
        return result
    result = run_experiment(experiment, folder, start, callbacks)
    if "test" in result:
        say(f"\n{result_text(result | {'classes': _KIND})}\n")
    return result


def _stream(train: Any, learner: Learner) -> TrainingTasks:
    if callable(getattr(train, "batches", None)) and not isinstance(train, type):
        return train  # type: ignore[no-any-return]
    if world_size() > 1:
        raise ArgumentError(
            "train: a run in several processes needs an object with batches(count, start), such as an EpisodeSampler, "
            f"which gives each process the same batches, but got {type(train).__name__}."
        )
    if isinstance(train, str | type) or not hasattr(train, "__iter__"):
        fix = " Give what a call of it returns." if callable(train) else ""
        raise ArgumentError(
            "train: expected an EpisodeSampler, an object with batches(count, start), or an iterable of task batches, "
            f"but got {describe_value(train)}.{fix}"
        )
    whole = isinstance(train, Task | TaskBatch) or is_stacked(train)
    whole = whole or (isinstance(train, Sequence) and len(train) > 0 and all(isinstance(each, Task) for each in train))
    return BatchStream([train] if whole else train, device_of(learner))


def _fixed(name: str, source: Any, count: int | None, default: int) -> tuple[FixedTasks | None, int]:
    """The tasks of validation or test, and their number."""
    if source is None:
        if count is not None:
            raise ArgumentError(f"{name}_tasks: is {count}, but there are no tasks. Give {name}=..., or leave it out.")
        return None, 0
    if not isinstance(source, EpisodeSampler):
        listed = ListedTasks(source, name, count)
        return listed, listed.count
    size = source.tasks_per_batch
    return source, -(-(count or default) // size) * size


def _with_accuracy(learner: Learner, metric: Metric, tasks: FixedTasks) -> Metric:
    """The user's metrics by name, and the accuracy where the learner knows it of such tasks."""
    task = task_at(tasks, 0)
    table = dict(metric) if isinstance(metric, Mapping) else {_name(metric): metric}
    if "accuracy" not in table and learner.evaluate([task]).accuracy is not None:
        table["accuracy"] = partial(accuracy_of, loss_fn=learner.loss_fn, known=True)
    learner.evaluate([task], metric=table)  # A metric that fails does so before anything is written.
    return table


def _settings(learner: Learner, sources: Mapping[str, Any], metric: Any, how: Mapping[str, Any]) -> OwnSettings:
    name = type(learner).__name__
    short = next((short for short, method in METHODS.items() if method == name), name)
    options = {
        name: value
        for name, value in learner.describe().settings.items()
        if name not in ("epochs", "iterations_per_epoch") and not name.startswith("execution.")
    }
    objects: dict[str, Any] = {
        "learner": _name(learner),
        "model": _name(learner.model),
        "parameters": sum(each.numel() for each in learner.parameters()),
        "loss_fn": _name(learner.loss_fn),
        "optimizer": _name(learner.optimizer),
        "scheduler": None if learner.scheduler is None else _name(learner.scheduler),
        "metrics": sorted(metric) if isinstance(metric, Mapping) else [],
    }
    objects |= {name: None if source is None else _in_words(source) for name, source in sources.items()}
    train = sources["train"]
    sampled = ("ways", "shots", "targets", "tasks_per_batch") if isinstance(train, EpisodeSampler) else ()
    return OwnSettings(
        method=short,
        data=f"own data, {train.num_classes} classes" if sampled else objects["train"],
        iterations_per_epoch=learner.settings.iterations_per_epoch,
        options=json.loads(json.dumps(options, default=_name)),
        objects=objects,
        **{name: getattr(train, name) for name in sampled},
        **how,
    )


def _name(value: Any) -> str:
    """The name of a function, or of the class of any other object."""
    value = getattr(value, "func", value)  # of a partial
    named: Callable[..., Any] | type = value if hasattr(value, "__qualname__") else type(value)
    return str(named.__qualname__)


def _in_words(source: Any) -> str:
    if isinstance(source, EpisodeSampler):
        task = f"{source.ways}-way {source.shots}-shot, {source.targets} targets, {source.tasks_per_batch} per batch"
        return f"episodes of {source.num_classes} classes, {task}, seed {source.seed}"
    length = length_hint(source)  # 0 of a DataLoader that does not know.
    return f"{_name(source)} of {length}" if length else _name(source)
