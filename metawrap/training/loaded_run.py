"""A run's folder -> its learner with the best weights, its preprocessing, classes, settings and result: ready for use.

Nothing that the files name is imported: the user names the run's own network again.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from metawrap.data import Preprocessing
from metawrap.errors import ArgumentError, CheckpointError, shown
from metawrap.snapshot.generators import Generators
from metawrap.training.checkpoints import Checkpoint, load_into
from metawrap.training.data_record import read_preprocessing, read_record
from metawrap.training.experiment import backbone_of, build_learner, find_device, network_of, preprocessing_for
from metawrap.training.final_evaluation import epochs_to_test
from metawrap.training.named_model import check_model_is_named, model_flag
from metawrap.training.run_folder import RunFolder, read_run
from metawrap.training.run_settings import RunSettings

# The user's own network: the name that the run stores, or the network itself.
Model: TypeAlias = str | nn.Module | None


@dataclass(frozen=True)
class LoadedRun:
    """A run that can be used.

    learner: in eval mode, with the weights of `epoch`. preprocessing: the way from a picture to the network's input, as
    in training. classes: the names of "train", "validation" and "test"; empty for a run of metawrap 0.1, which recorded
    none. settings: of the run. result: the content of result.json; None for a run that has not been tested.
    """

    path: Path
    epoch: int
    learner: Any
    preprocessing: Preprocessing
    classes: Mapping[str, tuple[str, ...]]
    settings: RunSettings
    result: dict[str, Any] | None


def load(run: str | Path, checkpoint: str | int = "best", model: Model = None, device: str = "auto") -> LoadedRun:
    """The learner of a run, finished or not, ready to adapt. Reads no images, and changes neither files nor generators.

    >>> import tempfile
    >>> from metawrap.training import RunSettings, train
    >>> settings = RunSettings(method="protonet", epochs=1, iterations_per_epoch=1, validation_tasks=2, test_tasks=2)
    >>> result = train(settings, folder := f"{tempfile.mkdtemp()}/run")
    >>> loaded = load(folder)
    >>> loaded.epoch, len(loaded.classes["test"]), loaded.learner.training
    (1, 80, False)

    Args:
        run: the run's folder; of a run over several seeds, the folder of one.
        checkpoint: "best" (by validation, as in the final test), "newest", or the number of an epoch.
        model: needed for a run with the user's own network: its name as in training, "package.module:factory", or the
            network. A name in the files is compared with it, and never imported by itself.
        device: of the learner; "auto" is the GPU if there is one.
    Raises:
        ArgumentError: `model` is missing or another, or there is no such device.
        CheckpointError: the folder has no run, or not that checkpoint, or its files are damaged.
    """
    path, place = Path(run), find_device(device)
    settings, folder, newest = open_run(path, model)
    if checkpoint == "newest":
        chosen = newest
    else:
        epoch = epochs_to_test(folder.checkpoints, newest.history)[0] if checkpoint == "best" else checkpoint
        kept = folder.checkpoints.epochs()
        if isinstance(epoch, bool) or epoch not in kept:
            choices = ", ".join(map(str, kept))
            raise CheckpointError(
                f"checkpoint: expected 'best', 'newest' or an epoch that '{path}' has kept ({choices}), but got "
                f"{shown(checkpoint)}."
            )
        chosen = folder.checkpoints.load(int(epoch))
    way = preprocessing_of_run(path, settings)
    before = Generators(place)
    try:
        learner = build_learner(settings, network_of_run(settings, model, (way.channels, *way.size))).to(place)
        load_into(learner, chosen)
    finally:
        before.put_back()
    return LoadedRun(
        path=path,
        epoch=chosen.epoch,
        learner=learner.eval(),
        preprocessing=way,
        classes={part: tuple(names) for part, names in (read_record(path) or {}).items()},
        settings=settings,
        result=folder.result(),
    )


def open_run(path: Path, model: Model) -> tuple[RunSettings, RunFolder, Checkpoint]:
    """The settings of a run, its folder, and its newest checkpoint. Raises as `load`, which says what `model` is."""
    settings, seeds = read_run(path)
    if seeds is not None:
        first = path / f"seed-{seeds[0]}"
        raise CheckpointError(f"'{path}' holds one run per seed. Name one of them, such as '{first}'.")
    if not isinstance(model, nn.Module):
        check_model_is_named(settings.model, model, f"the run in '{path}'")
    elif settings.model is None:
        raise ArgumentError(f"model: the run in '{path}' has one of metawrap's own networks. Leave it out.")
    folder = RunFolder(path, settings)
    newest = folder.newest_checkpoint()
    if newest is None:
        raise CheckpointError(
            f"'{path}' has no finished epoch yet. Continue it with: metawrap train --out {shlex.quote(str(path))} "
            f"--resume{model_flag(settings)}"
        )
    return settings, folder, newest


def preprocessing_of_run(path: Path, settings: RunSettings) -> Preprocessing:
    """The preprocessing of a run's pictures: on record, or for a run of metawrap 0.1 by its settings."""
    return preprocessing_for(settings, read_preprocessing(path))


def network_of_run(settings: RunSettings, model: Model, image_shape: tuple[int, int, int]) -> nn.Module:
    """The network of a run, without its weights. The name that is imported is the user's, never that of the files."""
    if isinstance(model, nn.Module):
        return model
    network = network_of(replace(settings, model=model, weights=None))
    return backbone_of(settings, image_shape) if network is None else network.model
