"""A run of names: settings -> experiment -> `run_experiment` -> result; once, or for each of several seeds.

Read `train` first. A resumed run continues from the last finished epoch with the same weights, optimizer state and
random state on the same tasks, and so ends with the same bits on the same CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from metawrap.data.loader_workers import naming_dead_workers
from metawrap.errors import ArgumentError, DataError
from metawrap.training.callbacks import check_callbacks
from metawrap.training.checkpoints import write_json
from metawrap.training.data_record import record_of
from metawrap.training.experiment import build_experiment, load_splits
from metawrap.training.progress import say
from metawrap.training.run_folder import RunFolder, read_run, refuse_existing_run, refuse_links, write_run
from metawrap.training.run_settings import RunSettings
from metawrap.training.tables import summarise_seeds
from metawrap.training.tensorboard import TensorBoard, check_tensorboard, logs_to_tensorboard
from metawrap.training.torchrun import on_rank_zero, world_size
from metawrap.training.training_loop import find_start, run_experiment


@naming_dead_workers()
def train(
    settings: RunSettings,
    out: str | Path,
    resume: bool = False,
    tensorboard: bool = False,
    callbacks: Sequence[Any] = (),
) -> dict[str, Any]:
    """Trains, validates and tests one run in the folder `out`. Sets torch's global random state.

    >>> import tempfile
    >>> settings = RunSettings(method="protonet", epochs=1, iterations_per_epoch=1, validation_tasks=2, test_tasks=2)
    >>> test = train(settings, out=f"{tempfile.mkdtemp()}/run")["test"]
    >>> sorted(test["norms"])
    ['batch', 'running', 'support']

    Args:
        settings: all that defines the run.
        out: a folder without a run, or with `resume` also the folder of a run with these settings.
        resume: continue from the newest readable checkpoint. A finished run returns its result; with more epochs than
            it had, it is extended.
        tensorboard: also log to `out`/tensorboard; a run that did so before always continues to.
        callbacks: objects whose methods are called as the run goes, see `Callback`.
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
        return _train(settings, folder, resume, callbacks, tensorboard or (resume and logs_to_tensorboard(folder.path)))
    finally:
        folder.lock.release()


def _train(
    settings: RunSettings, folder: RunFolder, resume: bool, callbacks: Sequence[Any], tensorboard: bool
) -> dict[str, Any]:
    check_callbacks(callbacks)
    callbacks = [*callbacks, *([TensorBoard()] if tensorboard else [])]
    start, done = find_start(folder, resume)
    if done is not None:
        _check_data_of_finished(settings, folder)
        say(f"The run in '{folder.path}' is finished; this is its result. Another --out starts a new one.")
        return done
    return run_experiment(build_experiment(settings), folder, start, callbacks)


def _check_data_of_finished(settings: RunSettings, folder: RunFolder) -> None:
    """A comparison shows finished runs beside new ones, so their data must be the same. A result outlives its data."""
    try:
        present = record_of(load_splits(settings))
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
