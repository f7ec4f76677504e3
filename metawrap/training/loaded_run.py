"""A run's folder -> its learner with the best weights, its preprocessing, classes, settings and result: ready for use.

Nothing that the files name is imported: the user names the run's own network again.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn

from metawrap.data.normalisation import statistics_of
from metawrap.data.pictures import GRAY, Decoding, channels_first, decode_image, plain
from metawrap.data.pixel_sources import MAX_IMAGE_BYTES
from metawrap.errors import ArgumentError, CheckpointError, DataError, shown
from metawrap.snapshot.generators import Generators
from metawrap.training.checkpoints import Checkpoint, load_into
from metawrap.training.data_record import image_shape_of, read_record
from metawrap.training.experiment import (
    build_learner,
    build_model,
    check_model_is_named,
    find_device,
    load_splits,
    model_flag,
    normalise_of,
)
from metawrap.training.final_evaluation import epochs_to_test
from metawrap.training.run_folder import RunFolder, read_run
from metawrap.training.run_settings import RunSettings

Picture: TypeAlias = str | Path | Image.Image
# The user's own network: the name that the run stores, or the network itself.
Model: TypeAlias = str | nn.Module | None


@dataclass(frozen=True)
class LoadedRun:
    """A run that can be used.

    learner: in eval mode, with the weights of `epoch`. preprocessing: a picture (a path or a PIL image) as the float32
    tensor (channels, height, width) that the network was trained with. classes: the names of "train", "validation" and
    "test"; empty for a run of metawrap 0.1, which recorded none. settings: of the run. result: the content of
    result.json; None for a run that has not been tested.
    """

    path: Path
    epoch: int
    learner: Any
    preprocessing: Callable[[Picture], Tensor]
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
    shape = image_shape_of(path) or load_splits(settings, download=settings.data_root is None).train.image_shape
    before = Generators(place)
    try:
        learner = build_learner(settings, network_of(settings, model, shape)).to(place)
        load_into(learner, chosen)
    finally:
        before.put_back()
    return LoadedRun(
        path=path,
        epoch=chosen.epoch,
        learner=learner.eval(),
        preprocessing=_preprocessing(settings, shape),
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


def network_of(settings: RunSettings, model: Model, image_shape: tuple[int, int, int]) -> nn.Module:
    """The network of a run, untrained. The name that is imported is the user's, never that of the files."""
    return model if isinstance(model, nn.Module) else build_model(replace(settings, model=model), image_shape)


def _preprocessing(settings: RunSettings, image_shape: tuple[int, int, int]) -> Callable[[Picture], Tensor]:
    channels, size, _ = image_shape
    # As the loader of Omniglot; all others resize with Lanczos.
    resample = Image.Resampling.NEAREST if settings.data == "omniglot" else Image.Resampling.LANCZOS
    statistics = statistics_of(normalise_of(settings), channels)
    return partial(_prepared, decoding=Decoding(size, channels == GRAY, resample), statistics=statistics)


def _prepared(picture: Picture, *, decoding: Decoding, statistics: tuple[Tensor, Tensor] | None) -> Tensor:
    """A picture as the sampler gives it to the network. Raises DataError if it cannot be read."""
    if isinstance(picture, Image.Image):
        upright = plain(picture, "the picture").convert("L" if decoding.grayscale else "RGB")
        pixels = channels_first(upright.resize((decoding.size, decoding.size), decoding.resample))
    else:
        try:
            with open(picture, "rb") as file:
                content = file.read(MAX_IMAGE_BYTES + 1)
        except OSError as error:
            raise DataError(f"'{picture}' cannot be read ({error.strerror}). Name an image file.") from error
        if len(content) > MAX_IMAGE_BYTES:
            raise DataError(f"'{picture}' has more than {MAX_IMAGE_BYTES} bytes. Shrink it.")
        pixels = decode_image(content, str(picture), decoding)
    scaled = torch.from_numpy(pixels).float().mul_(1 / 255)
    return scaled if statistics is None else scaled.sub_(statistics[0]).div_(statistics[1])
