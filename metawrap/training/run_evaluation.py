"""The test of a run: at its end, and again at any time by `evaluate_run`, on the run's own data or on others."""

from __future__ import annotations

import math
import shlex
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import metawrap.methods as methods
from metawrap.data import DATASETS, ImageSet, Preprocessing
from metawrap.data.class_split import PARTS
from metawrap.data.episode_draws import Demand, check_enough
from metawrap.data.episode_splits import TEST_SEED
from metawrap.data.folder import load_whole_folder
from metawrap.data.loader_workers import naming_dead_workers
from metawrap.data.problems import listed
from metawrap.errors import ArgumentError, CheckpointError, DataError
from metawrap.layers.norm_policies import policies_of
from metawrap.settings.keywords import flattened, nested, plain_keywords
from metawrap.settings.validated import check_value
from metawrap.training.checkpoints import load_into
from metawrap.training.data_record import changed, differences, joined, read_record, record_of, unseen
from metawrap.training.experiment import Experiment, build_learner, find_device, fixed_tasks, load_splits, show_task
from metawrap.training.final_evaluation import epochs_to_test, final_test
from metawrap.training.loaded_run import Model, network_of_run, open_run, preprocessing_of_run
from metawrap.training.machine import command_line, describe_machine
from metawrap.training.named_model import model_flag
from metawrap.training.progress import say
from metawrap.training.run_folder import NO_RECORD, RunFolder
from metawrap.training.run_settings import METHODS, RunSettings
from metawrap.training.torchrun import on_rank_zero

UNSEEN = "unseen classes"


@naming_dead_workers()
def evaluate_run(
    out: str | Path,
    norms: Sequence[str] | None = None,
    new_classes: bool = False,
    *,
    part: str = "test",
    model: Model = None,
    **changes: Any,
) -> dict[str, Any]:
    """Tests the best checkpoint of a run again, finished or not. Writes nothing.

    >>> import tempfile
    >>> from metawrap.training import RunSettings, train
    >>> settings = RunSettings(method="protonet", epochs=1, iterations_per_epoch=1, validation_tasks=2, test_tasks=2)
    >>> result = train(settings, folder := f"{tempfile.mkdtemp()}/run")
    >>> evaluate_run(folder, norms=["batch"], ways=3, test_tasks=4).get("test").get("tasks")
    4

    Args:
        out: the run's folder.
        norms: batch-norm policies to test under; all that apply if None.
        new_classes: test on all classes of the present data, of any part, that were not in the run's training or
            validation, in place of the test part.
        part: the classes to test on: "train", "validation" or "test"; or "all" classes of the data, which must all be
            new. A folder is then not split.
        model: as for `metawrap.load`: a run with the user's own network needs its name again, or the network.
        changes: settings of the test that replace the run's own: ways, shots, targets, test_tasks, ensemble, data,
            data_root, device.
    Returns:
        As `train`, with the settings of the test, and without "seconds"; with "tested", in words, if the images are not
        those of the run's own test part.
    Raises:
        ArgumentError: `model` is missing or another, or the network has fewer outputs than the tasks have classes.
        CheckpointError: the folder has no run, or no finished epoch, or with `new_classes` no record of its classes.
        DataError: the data have changed since the run began; a class that is to be tested as unseen was in the run's
            training or validation; or the classes, or their images, are too few.
    """
    path = Path(out)
    check_value("part", part, Literal["all", "train", "validation", "test"])
    if new_classes and part != "test":
        raise ArgumentError(
            f"part: new_classes chooses among the classes of all parts, but got '{part}'. Leave it out."
        )
    stored, _, newest = open_run(path, model)
    # Another data set's images get the form of the training images.
    settings, way = replace(stored, **changes), preprocessing_of_run(path, stored)
    device = find_device(settings.device)
    # A folder for downloads is the user's choice, not that of a file.
    download = settings.data_root is None or "data_root" in changes
    sets = _sets(settings, part, download, way)
    images, words, kind = _images_to_test(path, stored, settings, sets, part, new_classes)
    named = {"all": "the whole of '{}'", "test": "the test part of '{}'"}.get(part, f"the {part} part of '{{}}'")
    which = "the set of new classes" if new_classes else named.format(settings.data)
    check_enough([Demand(images, settings.ways, part=which)], settings.shots, settings.targets)
    shape = next(iter(sets.values())).image_shape
    learner = build_learner(_masking(stored, settings.ways), network_of_run(stored, model, shape)).to(device)
    tasks = fixed_tasks(settings, images, settings.test_tasks, TEST_SEED, device, way)
    if settings.ways != stored.ways:
        fix = f"The run was trained with {stored.ways} outputs: use --ways {stored.ways} or fewer, or train with more."
        show_task(learner, tasks.batch(0)[0], "data", "Test on images like those of training.", fix)
    experiment = Experiment(learner=learner, train=tasks, validation=tasks, test=tasks, device=device)
    result = tested(experiment, RunFolder(path, settings), newest.history, norms, kind)
    return result | {"classes": kind} | ({"tested": words} if words else {})


def _sets(settings: RunSettings, part: str, download: bool, way: Preprocessing) -> Mapping[str, ImageSet]:
    """The parts of the data by name; or with "all" alone, where that needs no split: a folder."""
    if part == "all" and settings.data not in DATASETS:
        return {"all": load_whole_folder(settings.data, image_size=way, stream=settings.stream)}
    return dict(zip(PARTS, load_splits(settings, way, download), strict=True))


def _masking(stored: RunSettings, ways: int) -> RunSettings:
    """The run's settings, where outputs that a task of fewer ways has no class for are masked."""
    name = "outputs.mask_unused_outputs"
    if ways >= stored.ways or name not in plain_keywords(getattr(methods, METHODS[stored.method])):
        return stored
    return replace(stored, options=nested({**flattened(stored.options), name: True}))


def _images_to_test(
    run: Path, stored: RunSettings, settings: RunSettings, sets: Mapping[str, ImageSet], part: str, new_classes: bool
) -> tuple[ImageSet, str | None, str]:
    """The images to draw tasks from; in words what they are, if not those of the run's own test part; and whether the
    classes are unseen.
    """
    own = {"train": "classes of training", "validation": "classes of validation"}.get(part, UNSEEN)
    record, present = read_record(run), record_of(sets)
    other = (stored.data, stored.split) != (settings.data, settings.split)
    if record is None:
        if new_classes:
            raise CheckpointError(f"new_classes: {NO_RECORD.format(run)} Leave --new-classes out, or train a new run.")
        say(f"{NO_RECORD.format(run)} Its test classes may be classes that it was trained on.")
        return _chosen(sets, part), None if part == "test" else f"{_classes(part)} of '{settings.data}'", own
    fresh = unseen(record, present, by_name=settings.data == stored.data)
    total = sum(map(len, fresh.values()))
    if new_classes:
        if not total:
            raise DataError(
                f"new_classes: the run in '{run}' was trained or validated on each class of '{settings.data}'. Add "
                "classes to these data, or test on others: --data."
            )
        names = listed([name for part in fresh.values() for name in part])
        words = f"{total} classes that were in neither training nor validation: {names}"
        return joined(list(sets.values()), fresh), words, UNSEEN
    found = [] if part == "all" else differences(record, present)
    if part != "all" and not found:  # Also where the folder of images has moved.
        return sets[part], None if part == "test" else f"{_classes(part)} of the run itself", own
    command = f"metawrap evaluate {shlex.quote(str(run))}{f' --data {shlex.quote(settings.data)}' if other else ''}"
    command += model_flag(stored)
    fix = f", or test the classes that it never saw: {command} --new-classes" if total >= settings.ways else ""
    if not other and part != "all":
        raise changed(run, found, fix)
    asked = [name for each in present for name in present[each] if part in ("all", each)]
    new = {name for each in fresh.values() for name in each}
    if known := [name for name in asked if name not in new]:
        raise DataError(
            f"data: the run in '{run}' was trained or validated on images of {len(known)} of the {len(asked)} "
            f"{'' if part == 'all' else f'{part} '}classes of '{settings.data}': {listed(known)}. Test on data with "
            f"other classes{fix}."
        )
    alike = len(set(asked) & (record["train"] | record["validation"]).keys())
    words = f"; {alike} have names of classes of that training, but other images" if alike else ""
    return (
        _chosen(sets, part),
        f"{_classes(part)} of '{settings.data}', after training on '{stored.data}'{words}",
        UNSEEN,
    )


def _classes(part: str) -> str:
    return f"{'all' if part == 'all' else f'the {part}'} classes"


def _chosen(sets: Mapping[str, ImageSet], part: str) -> ImageSet:
    if part in sets:
        return sets[part]
    return joined(list(sets.values()), {name: each.class_names for name, each in sets.items()})


def tested(
    experiment: Experiment, folder: RunFolder, history: list[dict[str, Any]], norms: Sequence[str] | None, kind: str
) -> dict[str, Any]:
    """The final test of a learner, with the record of the run: see `train`. kind: the classes, in words. Leaves the
    weights of the best epoch in the learner.
    """
    settings, learner, begun = folder.settings, experiment.learner, time.monotonic()
    found: dict[str, Any] = {}
    if experiment.test is None:
        epoch = on_rank_zero(lambda: epochs_to_test(folder.checkpoints, history)[0])
        load_into(learner, on_rank_zero(lambda: folder.checkpoints.load(epoch)))
    else:
        norms = norms or policies_of(learner.settings.norm, inner_loop=learner.inner_loop)
        counted = f'norm="{norms[0]}"' if len(norms) == 1 else f"{len(norms)} batch-norm policies"
        say(f"Testing on {settings.test_tasks} tasks of {kind}, under {counted} ...")
        count, metric = settings.test_tasks, experiment.metric
        found["test"] = final_test(
            learner, experiment.test, count, folder.checkpoints, history, settings.ensemble, norms, metric
        )
        epoch = found["test"]["epoch"]
    step_seconds = [seconds for record in history if (seconds := record.get("step_seconds")) is not None]
    return {
        "settings": settings.to_dict(),
        **found,
        "trained_norm": learner.settings.norm,
        "best_validation": {"epoch": epoch, "accuracy": history[epoch - 1]["validation_accuracy"]},
        "skipped_steps": sum(record.get("skipped_steps", 0) for record in history),
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
