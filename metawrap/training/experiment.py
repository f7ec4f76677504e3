"""RunSettings -> data set -> episode samplers, network -> learner: the live objects of one run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import metawrap.methods as methods
from metawrap.backbones import Conv4, ResNet12, WideResNet
from metawrap.data import (
    DataSplits,
    EpisodeSampler,
    ImageSet,
    Preprocessing,
    StreamedImages,
    load_data,
    preprocessing_of,
)
from metawrap.data.catalog import DOWNLOADED
from metawrap.data.class_split import PARTS
from metawrap.data.episode_draws import Demand, check_enough
from metawrap.data.episode_splits import EVALUATION_TASKS, TEST_SEED, VALIDATION_SEED
from metawrap.data.normalisation import IMAGENET, statistics_of
from metawrap.errors import ArgumentError, MetaWrapError
from metawrap.factory import in_one_line
from metawrap.learner.describing import look_at
from metawrap.learner.embedding_learner import EmbeddingLearner
from metawrap.pretrained import PUBLISHED, PretrainedNetwork, load_network
from metawrap.settings.keywords import flattened, nearest, plain_keywords
from metawrap.tasks import Task
from metawrap.training.data_record import DataRecord, record_of
from metawrap.training.run_settings import METHODS, RunSettings
from metawrap.training.task_sources import FixedTasks, TrainingTasks
from metawrap.training.torchrun import device_of_rank, local_rank_zero_first

# Processes that read streamed images ahead, unless the settings say otherwise.
LOADER_WORKERS = 2

# Keywords of a method that take functions or classes: no run.json can hold them.
PYTHON_ONLY = frozenset({"loss_fn", "optimizer", "scheduler", "wrapping.swap"})
# Keywords of a method that are settings of the run.
_RUN_KEYWORDS = ("preset", "norm", "engine", "inner_steps", "inner_lr", "meta_lr", "epochs", "iterations_per_epoch")


@dataclass(frozen=True)
class Experiment:
    """The live objects of a run.

    validation, test: None in a run of the user's own objects without them; else of classes that training does not see.
    metric: the user's own, for validation and test. preprocessing: that of every picture of the run. words: about the
    network's weights, for people. kind: the classes of the test, in words.
    """

    learner: Any
    train: TrainingTasks
    validation: FixedTasks | None
    test: FixedTasks | None
    device: torch.device
    metric: Any = None
    preprocessing: Preprocessing | None = None
    words: str = ""
    kind: str = "unseen classes"

    def data(self) -> DataRecord:
        """The classes of the three parts, with fingerprints; no classes of tasks that no sampler draws from images."""
        parts = zip(PARTS, (self.train, self.validation, self.test), strict=True)
        sets = {part: tasks.images for part, tasks in parts if isinstance(tasks, EpisodeSampler)}
        return {part: {} for part in PARTS} | record_of(sets)

    def data_file(self) -> dict[str, Any]:
        """The content of data.json: `data`, and the preprocessing as plain values."""
        way = self.preprocessing
        return dict(self.data()) | ({} if way is None else {"preprocessing": way.to_dict()})


def build_experiment(settings: RunSettings) -> Experiment:
    """Builds data, network and learner; the learner has seen its first task.

    Sets torch's global seed, which decides the initial weights and dropout. Raises ArgumentError, DataError or
    UnsupportedModuleError if the settings ask for something that does not exist or work.
    """
    if flattened(settings.options).get("outputs.head_init") == "stored":
        raise ArgumentError(
            'options: outputs.head_init="stored" keeps a head for each task that comes back under its id, but the '
            "tasks of a run are drawn anew and have none. Use learned, zeros or random."
        )
    device = device_of_rank(find_device(settings.device))
    with sizes_fit_memory(settings):
        return _built(settings, device)


def _built(settings: RunSettings, device: torch.device) -> Experiment:
    torch.manual_seed(settings.seed)
    network = network_of(settings)
    own = None if network is None else network.preprocessing
    splits = load_splits(settings, own)
    keyword = "train_ways" if settings.train_ways else "ways"
    demands = [
        Demand(splits.train, _train_ways(settings), _rotates(settings), "train", keyword),
        *(Demand(getattr(splits, part), settings.ways, part=part) for part in ("validation", "test")),
    ]
    check_enough(demands, settings.shots, settings.targets)
    train = _train_sampler(settings, splits.train, device, own)
    model = backbone_of(settings, splits.train.image_shape) if network is None else network.model
    learner = build_learner(settings, model, train.num_classes).to(device)
    ways = "--ways sets how many classes a task has, --train-ways in training."
    show_task(learner.train(), train.batch(0)[0], "model", "--image-size sets the side of the images.", ways)
    return Experiment(
        learner=learner,
        train=train,
        validation=fixed_tasks(settings, splits.validation, settings.validation_tasks, VALIDATION_SEED, device, own),
        test=fixed_tasks(settings, splits.test, settings.test_tasks, TEST_SEED, device, own),
        device=device,
        preprocessing=preprocessing_for(settings, own),
        words=_in_words(settings, network),
    )


def find_device(name: str) -> torch.device:
    """The device with that name; "auto" is the GPU if there is one, else the CPU. Raises ArgumentError if torch does
    not know the name, or it names a CUDA device on a machine without CUDA.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ArgumentError(f"device: expected auto, cpu, cuda or cuda:1, but got '{name}'.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(f"device: '{name}' was asked for, but torch finds no CUDA device here. Use cpu or auto.")
    try:
        torch.zeros(1, device=device).cpu()
    except Exception as error:  # torch has an error of its own for each kind of device; "meta" holds no numbers.
        raise ArgumentError(
            f"device: '{name}' was asked for, but torch cannot use it here ({in_one_line(error)[:200]}). Use cpu."
        ) from error
    return device


def preprocessing_for(settings: RunSettings, own: Preprocessing | None = None) -> Preprocessing:
    """The preprocessing of a run: the network's `own`, else that of the data set; with the changes of the settings.

    Raises:
        ArgumentError: `normalise` is for another number of channels.
    """
    way = own or preprocessing_of(settings.data)
    changes: dict[str, Any] = {}
    if settings.image_size is not None:
        changes["size"] = settings.image_size, settings.image_size
    if settings.resize not in (None, way.resize):
        changes |= {"resize": settings.resize, "crop_fraction": 1.0}
    if settings.normalise is not None:
        normalise = None if settings.normalise == "none" else settings.normalise
        mean, deviation = IMAGENET if statistics_of(normalise, way.channels) else ((), ())
        changes |= {"mean": mean, "deviation": deviation}
    return replace(way, **changes)


def _in_words(settings: RunSettings, network: PretrainedNetwork | None) -> str:
    """The network's weights, and where the settings win over their preprocessing."""
    if network is None:
        return ""
    if (own := network.preprocessing) is None:
        return network.words
    way = preprocessing_for(settings, own)
    pixels = f"{'x'.join(map(str, way.size))} pixels"
    parts = {"image_size": way.size != own.size, "resize": way.resize != own.resize}
    parts["normalise"] = (way.mean, way.deviation) != (own.mean, own.deviation)
    won = [f"--{name.replace('_', '-')}" for name, differs in parts.items() if differs]
    return f"{network.words}; pictures of {pixels}, as its weights want them" + (
        f", but for {', '.join(won)}: these win" if won else ""
    )


@contextmanager
def sizes_fit_memory(settings: RunSettings) -> Iterator[None]:
    """Raises ArgumentError in place of torch's or numpy's error for numbers that no memory holds."""
    try:
        yield
    except (MemoryError, OverflowError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search(r"allocat|overflow|out of memory", str(error)):
            raise
        names = ("image_size", "filters", "ways", "train_ways", "shots", "targets", "tasks_per_batch")
        sizes = ", ".join(f"{name}={value}" for name in names if (value := getattr(settings, name)) is not None)
        raise ArgumentError(
            f"A batch, or the network, does not fit into memory with {sizes} ({in_one_line(error)[:120]}). Use "
            "smaller numbers."
        ) from error


def load_splits(settings: RunSettings, own: Preprocessing | None = None, download: bool = True) -> DataSplits:
    """The three splits of the data set. None in the settings leaves an option out.

    Args:
        own: the preprocessing of the network's weights. download: whether a data set that is missing is downloaded,
            where that is known how.
    """
    options = {"split": settings.split, "stream": settings.stream, "image_size": preprocessing_for(settings, own)}
    given = {name: value for name, value in options.items() if value is not None}
    if settings.data in DOWNLOADED and download:
        given["download"] = True
        return local_rank_zero_first(lambda: load_data(settings.data, root=settings.data_root, **given))
    return load_data(settings.data, root=settings.data_root, **given)


def build_learner(settings: RunSettings, model: nn.Module, classes: int | None = None) -> Any:
    """The method around the network.

    Args:
        classes: number of classes that training tasks are drawn from, for methods with such a keyword.
    Raises:
        ArgumentError: `options` has a keyword that the method lacks, or one that takes no plain value.
    """
    method = getattr(methods, METHODS[settings.method])
    taken = plain_keywords(method)
    check_options(method, settings.options, [name for name in taken if name not in _RUN_KEYWORDS])
    given = {name: value for name in _RUN_KEYWORDS if (value := getattr(settings, name)) is not None}
    if extra := [name for name in given if name not in taken]:
        raise ArgumentError(f"{extra[0]}: {method.__name__} has no such setting. Leave it out.")
    if "classes" in taken and classes is not None:
        given = {"classes": classes, **given}
    return method(model, **(given | settings.options))


def check_options(method: Any, options: Mapping[str, Any], taken: Iterable[str]) -> None:
    """Raises ArgumentError where a name in `options` is not among the keywords, or takes no plain value."""
    allowed = [name for name in taken if name not in PYTHON_ONLY]
    for name in flattened(options):
        if name in PYTHON_ONLY:
            raise ArgumentError(
                f"options: '{name}' takes Python objects, which a run cannot store. Use {method.__name__} from Python "
                f"for it; the options of a run are {', '.join(allowed)}."
            )
        if name not in allowed:
            close = nearest(name, allowed)
            fix = f". Did you mean '{close}'?" if close else f"; it has {', '.join(allowed)}."
            raise ArgumentError(f"options: {method.__name__} has no option '{name}'{fix}")


def network_of(settings: RunSettings) -> PretrainedNetwork | None:
    """The user's network with its weights; None if `model` is not set.

    A published network gets a head of `ways` classes, unless the method is one on embeddings, which uses none.
    """
    if settings.model is None:
        return None
    embeds = issubclass(getattr(methods, METHODS[settings.method]), EmbeddingLearner)
    published = settings.model.startswith(PUBLISHED)
    return load_network(settings.model, settings.weights, None if embeds and published else settings.ways)


def backbone_of(settings: RunSettings, image_shape: tuple[int, int, int]) -> nn.Module:
    """metawrap's own network for images of this (channels, height, width)."""
    channels, height, width = image_shape
    if settings.backbone == "resnet12":
        return ResNet12(channels, settings.ways, settings.filters)
    if settings.backbone == "wrn28-10":
        return WideResNet(channels, settings.ways)
    if height != width:
        raise ArgumentError(
            f"backbone: '{settings.backbone}' needs square images, but they are {height}x{width}. "
            "Pass --model for a network of your own."
        )
    return Conv4(channels, height, settings.ways, settings.filters, settings.backbone == "conv4-strided")


def fixed_tasks(
    settings: RunSettings,
    images: ImageSet,
    count: int,
    seed: int,
    device: torch.device,
    own: Preprocessing | None = None,
) -> EpisodeSampler:
    """A sampler of evaluation tasks without rotated classes; its first `count / tasks_per_batch` batches are the tasks.

    Every run with the same data, ways, shots, targets and count gets the same tasks.
    """
    return _sampler(settings, images, device, settings.ways, math.gcd(count, EVALUATION_TASKS), own, seed=seed)


def _train_sampler(
    settings: RunSettings, images: ImageSet, device: torch.device, own: Preprocessing | None
) -> EpisodeSampler:
    how: dict[str, Any] = {"seed": settings.seed, "rotations": _rotates(settings)}
    return _sampler(settings, images, device, _train_ways(settings), settings.tasks_per_batch, own, **how)


def _train_ways(settings: RunSettings) -> int:
    return settings.train_ways or settings.ways


def _rotates(settings: RunSettings) -> bool:
    # Nearly every publication since MANN (2016) trains Omniglot with rotated characters as extra classes.
    return settings.data == "omniglot" if settings.rotations is None else settings.rotations


def _sampler(
    settings: RunSettings,
    images: ImageSet,
    device: torch.device,
    ways: int,
    tasks: int,
    own: Preprocessing | None,
    **how: Any,
) -> EpisodeSampler:
    """Workers read streamed images. own: the preprocessing of the network's weights."""
    workers = LOADER_WORKERS if settings.loader_workers is None else settings.loader_workers
    return EpisodeSampler(
        images,
        ways,
        settings.shots,
        settings.targets,
        tasks,
        device=device,
        normalise=preprocessing_for(settings, own),
        workers=workers if isinstance(images, StreamedImages) else 0,
        **how,
    )


def show_task(learner: Any, task: Task, argument: str, fix: str, ways_fix: str) -> None:
    """Shows a learner its first task, so that a network that cannot be trained is refused before anything is written.

    Args:
        argument, fix: the argument to blame, and the remedy, if the network fails on the task's inputs.
        ways_fix: the remedy if the network has fewer outputs than the task has classes.
    Raises:
        ArgumentError: the network fails on the inputs, or has fewer outputs than the task has classes.
        TaskError, UnsupportedModuleError: as the first meta-step would.
    """
    try:
        look_at(learner, task)
    except MetaWrapError as error:
        if "holds labels" not in str(error):
            raise
        raise ArgumentError(f"ways: {error} {ways_fix}") from error
    except Exception as error:  # The user's own forward may raise anything.
        shape = ", ".join(map(str, task.support_x.shape))  # type: ignore[union-attr]
        raise ArgumentError(
            f"{argument}: the network fails on inputs of shape ({shape}): {in_one_line(error)}. {fix}"
        ) from error
