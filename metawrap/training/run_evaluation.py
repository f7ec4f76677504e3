"""The test of a run: at its end, and again at any time by `evaluate_run`, on the run's own data or on others."""

from __future__ import annotations

import math
import shlex
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from metawrap.data import DataSplits, ImageSet, normalisation_of
from metawrap.data.episodes import Demand, check_enough
from metawrap.data.loader_workers import naming_dead_workers
from metawrap.data.problems import listed
from metawrap.errors import CheckpointError, DataError
from metawrap.layers.norm_policies import policies_of
from metawrap.training.data_record import (
    changed,
    differences,
    joined,
    read_preprocessing,
    read_record,
    record_of,
    unseen,
)
from metawrap.training.experiment import (
    TEST_SEED,
    Experiment,
    build_learner,
    build_model,
    find_device,
    fixed_tasks,
    load_splits,
)
from metawrap.training.final_evaluation import final_test
from metawrap.training.machine import command_line, describe_machine
from metawrap.training.progress import say
from metawrap.training.run_folder import NO_RECORD, RunFolder, read_run
from metawrap.training.run_settings import RunSettings


@naming_dead_workers()
def evaluate_run(
    out: str | Path, norms: Sequence[str] | None = None, new_classes: bool = False, **changes: Any
) -> dict[str, Any]:
    """Tests the best checkpoint of a run again, finished or not. Writes nothing.

    >>> import tempfile
    >>> from metawrap.training import RunSettings, train
    >>> settings = RunSettings(method="protonet", epochs=1, iterations_per_epoch=1, validation_tasks=2, test_tasks=2)
    >>> result = train(settings, folder := f"{tempfile.mkdtemp()}/run")
    >>> evaluate_run(folder, norms=["batch"], test_tasks=4).get("test").get("tasks")
    4

    Args:
        out: the run's folder.
        norms: batch-norm policies to test under; all that apply if None.
        new_classes: test on all classes of the present data, of any part, that were not in the run's training or
            validation, in place of the test part.
        changes: settings of the test that replace the run's own, such as test_tasks=1000, ensemble=5, data="omniglot".
    Returns:
        As `train`, with the settings of the test, and without "seconds"; with "tested", in words, if the images are not
        those of the run's own test part.
    Raises:
        CheckpointError: the folder has no run, or no finished epoch, or with `new_classes` no record of its classes.
        DataError: the data have changed since the run began; or `changes` name other data, and a class of their test
            part was in the run's training or validation.
    """
    path = Path(out)
    stored, seeds = read_run(path)
    if seeds is not None:
        first = path / f"seed-{seeds[0]}"
        raise CheckpointError(f"'{out}' holds one run per seed. Name one of them, such as '{first}'.")
    newest = RunFolder(path, stored).newest_checkpoint()
    if newest is None:
        raise CheckpointError(
            f"'{out}' has no finished epoch yet. Continue it with: metawrap train --out {shlex.quote(str(out))} "
            "--resume"
        )
    own = read_preprocessing(path)
    if own is None and changes.get("data", stored.data) != stored.data:
        # Another data set's images are normalised as the network's training images were.
        changes = {"normalise": stored.normalise or normalisation_of(stored.data) or "none", **changes}
    settings = replace(stored, **changes)
    device = find_device(settings.device)
    splits = load_splits(settings, own)
    images, words = _images_to_test(path, stored, settings, splits, new_classes)
    part = "the set of new classes" if new_classes else f"the test part of '{settings.data}'"
    check_enough([Demand(images, settings.ways, part=part)], settings.shots, settings.targets, fixed=True)
    learner = build_learner(stored, build_model(stored, splits.train)).to(device)
    tasks = fixed_tasks(settings, images, settings.test_tasks, TEST_SEED, device, own)
    experiment = Experiment(learner=learner, train=tasks, validation=tasks, test=tasks, device=device)
    result = tested(experiment, RunFolder(path, settings), newest.history, norms)
    return result | ({"tested": words} if words else {})


def _images_to_test(
    run: Path, stored: RunSettings, settings: RunSettings, splits: DataSplits, new_classes: bool
) -> tuple[ImageSet, str | None]:
    """The images to draw tasks from; and in words what they are, if not those of the run's own test part."""
    record, present = read_record(run), record_of(splits)
    other = (stored.data, stored.split) != (settings.data, settings.split)
    if record is None:
        if new_classes:
            raise CheckpointError(f"new_classes: {NO_RECORD.format(run)} Leave --new-classes out, or train a new run.")
        say(f"{NO_RECORD.format(run)} Its test classes may be classes that it was trained on.")
        return splits.test, None
    fresh = unseen(record, present, by_name=settings.data == stored.data)
    total = sum(map(len, fresh.values()))
    if new_classes:
        if not total:
            raise DataError(
                f"new_classes: the run in '{run}' was trained or validated on each class of '{settings.data}'. Add "
                "classes to these data, or test on others: --data."
            )
        names = listed([name for part in fresh.values() for name in part])
        return joined(splits, fresh), f"{total} classes that were in neither training nor validation: {names}"
    if not (found := differences(record, present)):  # Also where the folder of images has moved.
        return splits.test, None
    command = f"metawrap evaluate {shlex.quote(str(run))}{f' --data {shlex.quote(settings.data)}' if other else ''}"
    fix = f", or test the classes that it never saw: {command} --new-classes" if total >= settings.ways else ""
    if other:
        if known := [name for name in present["test"] if name not in fresh["test"]]:
            raise DataError(
                f"data: the run in '{run}' was trained or validated on images of {len(known)} of the "
                f"{len(present['test'])} test classes of '{settings.data}': {listed(known)}. Test on data with other "
                f"classes{fix}."
            )
        alike = len(present["test"].keys() & (record["train"] | record["validation"]).keys())
        words = f"; {alike} have names of classes of that training, but other images" if alike else ""
        return splits.test, f"the test classes of '{settings.data}', after training on '{stored.data}'{words}"
    raise changed(run, found, fix)


def tested(
    experiment: Experiment, folder: RunFolder, history: list[dict[str, Any]], norms: Sequence[str] | None
) -> dict[str, Any]:
    """The final test of a learner, with the record of the run: see `train`."""
    settings, learner, begun = folder.settings, experiment.learner, time.monotonic()
    norms = norms or policies_of(learner.settings.norm, inner_loop=learner.inner_loop)
    counted = f'norm="{norms[0]}"' if len(norms) == 1 else f"{len(norms)} batch-norm policies"
    say(f"Testing on {settings.test_tasks} tasks of unseen classes, under {counted} ...")
    test = final_test(
        learner, experiment.test, settings.test_tasks, folder.checkpoints, history, settings.ensemble, norms
    )
    step_seconds = [seconds for record in history if (seconds := record.get("step_seconds")) is not None]
    return {
        "settings": settings.to_dict(),
        "test": test,
        "trained_norm": learner.settings.norm,
        "best_validation": {"epoch": test["epoch"], "accuracy": history[test["epoch"] - 1]["validation_accuracy"]},
        "skipped_steps": sum(record["skipped_steps"] for record in history),
        "parameters": _learned_numbers(learner),
        "step_seconds": statistics.median(step_seconds) if step_seconds else None,
        "peak_mib": max((record.get("peak_mib") or 0.0 for record in history), default=0.0) or None,
        "test_seconds": round(time.monotonic() - begun, 3),
        "machine": describe_machine(experiment.device),
        "command": command_line(),
    }


def _learned_numbers(learner: Any) -> int:
    """The count of numbers that training changes; unused parameters do not count."""
    rows = learner.describe().modules
    unused = sum(
        math.prod(row.parameters[name]) for row in rows for name, fate in row.fates.items() if fate == "unused"
    )
    return int(sum(p.numel() for p in learner.parameters() if p.requires_grad) - unused)
