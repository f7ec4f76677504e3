"""RunSettings -> data set -> episode samplers, network -> learner: the live objects of one run."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import metawrap.methods as methods
from metawrap.backbones import Conv4
from metawrap.data import DataSplits, EpisodeSampler, ImageSet, StreamedImages, load_data, normalisation_of
from metawrap.data.catalog import DOWNLOADED
from metawrap.errors import ArgumentError, MetaWrapError
from metawrap.learner.describing import look_at
from metawrap.settings.keywords import flattened, nearest, plain_keywords
from metawrap.tasks import Task
from metawrap.training.launch import one_after_another, own_device
from metawrap.training.run_settings import METHODS, RunSettings

# Validation and test tasks are the same for every run, whatever its seed, so that results can be compared.
VALIDATION_SEED = 1_000_001
TEST_SEED = 1_000_002

# Processes that read streamed images ahead, unless the settings say otherwise.
LOADER_WORKERS = 2

# Keywords of a method that take functions or classes: no run.json can hold these.
PYTHON_ONLY = frozenset({"loss_fn", "optimizer", "scheduler", "wrapping.swap"})


@dataclass(frozen=True)
class Experiment:
    """What a run works with: train, validation and test tasks never share a class."""

    learner: Any
    train: EpisodeSampler
    validation: EpisodeSampler
    test: EpisodeSampler
    device: torch.device


def build_experiment(settings: RunSettings) -> Experiment:
    """Everything that the settings describe, freshly initialised; the learner has looked at its first task.

    Sets torch's global seed, which the initial weights and dropout are drawn from.

    Raises:
        ArgumentError, DataError, UnsupportedModuleError: the settings ask for something that does not exist or work.
    """
    if flattened(settings.options).get("outputs.head_init") == "stored":
        raise ArgumentError(
            'options: outputs.head_init="stored" keeps a head for each task that comes back under its id, but the '
            "tasks of a run are drawn anew and have none. Use learned, zeros or random."
        )
    device = own_device(find_device(settings.device))
    splits = load_splits(settings)
    torch.manual_seed(settings.seed)
    train = _train_sampler(settings, splits.train, device)
    learner = build_learner(settings, build_model(settings, splits.train), train.num_classes).to(device)
    show_task(learner.train(), train.batch(0)[0], "model", "--image-size sets the side of the images.")
    return Experiment(
        learner=learner,
        train=train,
        validation=fixed_tasks(settings, splits.validation, settings.validation_tasks, VALIDATION_SEED, device),
        test=fixed_tasks(settings, splits.test, settings.test_tasks, TEST_SEED, device),
        device=device,
    )


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU where there is one.

    Raises:
        ArgumentError: torch does not know the name, or it is a CUDA device and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ArgumentError(f"device: expected auto, cpu, cuda or cuda:1, but got '{name}'.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(f"device: '{name}' was asked for, but torch finds no CUDA device here. Use cpu or auto.")
    return device


def load_splits(settings: RunSettings) -> DataSplits:
    """The data set's three splits, downloaded if need be; only options that were set are passed on."""
    options = {"split": settings.split, "image_size": settings.image_size, "stream": settings.stream}
    given = {name: value for name, value in options.items() if value is not None}
    if settings.data in DOWNLOADED:
        given["download"] = True
        return one_after_another(lambda: load_data(settings.data, root=settings.data_root, **given))
    return load_data(settings.data, root=settings.data_root, **given)


def build_learner(settings: RunSettings, model: nn.Module, classes: int | None = None) -> Any:
    """The method around the network.

    Args:
        classes: how many the training tasks are drawn from, for methods that want to know.
    Raises:
        ArgumentError: `options` has a keyword that the method does not take, or one that takes no plain value.
    """
    method = getattr(methods, METHODS[settings.method])
    taken = plain_keywords(method)
    chosen = {
        "preset": settings.preset,
        "norm": settings.norm,
        "engine": settings.engine,
        "inner_steps": settings.inner_steps,
        "inner_lr": settings.inner_lr,
        "meta_lr": settings.meta_lr,
        "epochs": settings.epochs,
        "iterations_per_epoch": settings.iterations_per_epoch,
    }
    allowed = [name for name in taken if name not in {*chosen, *PYTHON_ONLY}]
    for name in flattened(settings.options):
        if name in PYTHON_ONLY:
            raise ArgumentError(
                f"options: '{name}' takes Python objects, which a run cannot store. Use {method.__name__} from Python "
                f"for it; the options of a run are {', '.join(allowed)}."
            )
        if name not in allowed:
            close = nearest(name, allowed)
            fix = f". Did you mean '{close}'?" if close else f"; it has {', '.join(allowed)}."
            raise ArgumentError(f"options: {method.__name__} has no option '{name}'{fix}")
    given = {name: value for name, value in chosen.items() if value is not None}
    if extra := [name for name in given if name not in taken]:
        raise ArgumentError(f"{extra[0]}: {method.__name__} has no such setting. Leave it out.")
    if "classes" in taken and classes is not None:
        given = {"classes": classes, **given}
    return method(model, **(given | settings.options))


def build_model(settings: RunSettings, images: ImageSet) -> nn.Module:
    """The user's network if `model` is set, else the backbone, sized for these images."""
    if settings.model is not None:
        return call_factory(settings.model, settings.ways)
    channels, height, width = images.image_shape
    if height != width:
        raise ArgumentError(
            f"backbone: '{settings.backbone}' needs square images, but they are {height}x{width}. "
            "Pass --model for a network of your own."
        )
    strided = settings.backbone == "conv4-strided"
    return Conv4(channels, height, settings.ways, settings.filters, strided)


def fixed_tasks(settings: RunSettings, images: ImageSet, count: int, seed: int, device: torch.device) -> EpisodeSampler:
    """A sampler whose first `count / tasks_per_batch` batches are the fixed evaluation tasks, without rotated classes.

    The same tasks for every run with the same data, ways, shots, targets and count.
    """
    return EpisodeSampler(
        images,
        settings.ways,
        settings.shots,
        settings.targets,
        math.gcd(count, 20),
        seed=seed,
        device=device,
        **_reading(settings, images),
    )


def _train_sampler(settings: RunSettings, images: ImageSet, device: torch.device) -> EpisodeSampler:
    # Omniglot is trained with rotated characters as extra classes in nearly every publication since MANN (2016).
    rotations = settings.data == "omniglot" if settings.rotations is None else settings.rotations
    return EpisodeSampler(
        images,
        settings.train_ways or settings.ways,
        settings.shots,
        settings.targets,
        settings.tasks_per_batch,
        seed=settings.seed,
        rotations=rotations,
        device=device,
        **_reading(settings, images),
    )


def _reading(settings: RunSettings, images: ImageSet) -> dict[str, Any]:
    """How images become batches: normalised as asked for, or as the data set is in publications; read by workers."""
    normalise = normalisation_of(settings.data) if settings.normalise is None else settings.normalise
    workers = LOADER_WORKERS if settings.loader_workers is None else settings.loader_workers
    return {
        "normalise": None if normalise == "none" else normalise,
        "workers": workers if isinstance(images, StreamedImages) else 0,
    }


def show_task(learner: Any, task: Task, argument: str, fix: str) -> None:
    """Lets a learner look at a task, so that what cannot be trained is refused before anything is written.

    Args:
        argument, fix: what to blame, and what to do, when the network fails on the task's inputs.
    Raises:
        ArgumentError: it fails on them, or has fewer outputs than the task has classes.
        TaskError, UnsupportedModuleError: as the first meta-step would.
    """
    try:
        look_at(learner, task)
    except MetaWrapError as error:
        if "holds labels" not in str(error):
            raise
        raise ArgumentError(
            f"ways: {error} --ways sets how many classes a task has, --train-ways in training."
        ) from error
    except Exception as error:  # Whatever the user's own forward raises.
        shape = ", ".join(map(str, task.support_x.shape))  # type: ignore[union-attr]
        raise ArgumentError(
            f"{argument}: the network fails on inputs of shape ({shape}): {_in_one_line(error)}. {fix}"
        ) from error


def call_factory(name: str, ways: int) -> nn.Module:
    """The network that "package.module:factory" makes, called with `ways` if it takes that.

    Raises:
        ArgumentError: there is no such function, it fails or needs other arguments, or it returns no module.
    """
    factory = _find_factory(name)
    given: dict[str, int] = {}
    try:
        signature = inspect.signature(factory)
        given = {"ways": ways} if "ways" in signature.parameters else {}
        signature.bind(**given)
    except TypeError as error:
        raise ArgumentError(
            f"model: '{name}' cannot be called {'with ways alone' if given else 'without arguments'} ({error}). Write "
            f"a function that fills in the rest, such as def build(): return {name.partition(':')[2]}(...)."
        ) from error
    except ValueError:  # A built-in without a signature: calling it tells.
        pass
    try:
        model = factory(**given)
    except (Exception, SystemExit) as error:
        raise ArgumentError(
            f"model: '{name}' fails when it is called: {_in_one_line(error)}. Correct it there; -v shows the line."
        ) from error
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"model: '{name}' returned {type(model).__name__}, expected a torch.nn.Module. "
            "Name a function or class that returns the network."
        )
    return model


def _find_factory(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ArgumentError(f"model: expected 'package.module:factory', but got '{name}'.")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # Importing runs the user's file; a script may even exit.
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}."):
            fix = "Run from the folder that holds it, or install it."
        elif missing:
            fix = f"Install '{missing}', or correct the import."
        else:
            fix = "Correct it there; -v shows the line."
        raise ArgumentError(f"model: cannot import '{module_name}' ({_in_one_line(error)}). {fix}") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise ArgumentError(f"model: '{module_name}' has no function or class named '{attribute}'.")
    return factory  # type: ignore[no-any-return]


def _in_one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".: ")
