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
from metawrap.data import DataSplits, EpisodeSampler, LabelledImages, load_data
from metawrap.errors import ArgumentError
from metawrap.training.run_settings import METHODS, RunSettings

# Validation and test tasks are the same for every run, whatever its seed, so that results can be compared.
VALIDATION_SEED = 1_000_001
TEST_SEED = 1_000_002


@dataclass(frozen=True)
class Experiment:
    """What a run works with: train, validation and test tasks never share a class."""

    learner: Any
    train: EpisodeSampler
    validation: EpisodeSampler
    test: EpisodeSampler
    device: torch.device


def build_experiment(settings: RunSettings) -> Experiment:
    """Everything that the settings describe, freshly initialised.

    Sets torch's global seed, which the initial weights and dropout are drawn from.

    Raises:
        ArgumentError, DataError, UnsupportedModuleError: the settings ask for something that does not exist or work.
    """
    device = find_device(settings.device)
    splits = load_splits(settings)
    torch.manual_seed(settings.seed)
    learner = build_learner(settings, build_model(settings, splits.train)).to(device)
    return Experiment(
        learner=learner,
        train=_train_sampler(settings, splits.train, device),
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
    options = {"split": settings.split, "image_size": settings.image_size}
    given = {name: value for name, value in options.items() if value is not None}
    if settings.data == "omniglot":
        given["download"] = True
    return load_data(settings.data, root=settings.data_root, **given)


def build_learner(settings: RunSettings, model: nn.Module) -> Any:
    """The method around the network.

    Raises:
        ArgumentError: `options` has a keyword that the method does not take.
    """
    method = getattr(methods, METHODS[settings.method])
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
    allowed = [name for name in inspect.signature(method).parameters if name not in {"model", "settings", *chosen}]
    for name in settings.options:
        if name not in allowed:
            raise ArgumentError(f"options: {method.__name__} has no option '{name}'; it has {', '.join(allowed)}.")
    return method(model, **{name: value for name, value in chosen.items() if value is not None}, **settings.options)


def build_model(settings: RunSettings, images: LabelledImages) -> nn.Module:
    """The user's network if `model` is set, else the backbone, sized for these images."""
    if settings.model is not None:
        return call_factory(settings.model, settings.ways)
    channels, height, width = images.images.shape[1:]
    if height != width:
        raise ArgumentError(
            f"backbone: '{settings.backbone}' needs square images, but they are {height}x{width}. "
            "Pass --model for a network of your own."
        )
    strided = settings.backbone == "conv4-strided"
    return Conv4(channels, height, settings.ways, settings.filters, strided)


def fixed_tasks(
    settings: RunSettings, images: LabelledImages, count: int, seed: int, device: torch.device
) -> EpisodeSampler:
    """A sampler whose first `count / tasks_per_batch` batches are the fixed evaluation tasks, without rotated classes.

    The same tasks for every run with the same data, ways, shots, targets and count.
    """
    return EpisodeSampler(
        images, settings.ways, settings.shots, settings.targets, math.gcd(count, 20), seed=seed, device=device
    )


def _train_sampler(settings: RunSettings, images: LabelledImages, device: torch.device) -> EpisodeSampler:
    # Omniglot is trained with rotated characters as extra classes in nearly every publication since MANN (2016).
    rotations = settings.data == "omniglot" if settings.rotations is None else settings.rotations
    return EpisodeSampler(
        images,
        settings.ways,
        settings.shots,
        settings.targets,
        settings.tasks_per_batch,
        seed=settings.seed,
        rotations=rotations,
        device=device,
    )


def call_factory(name: str, ways: int) -> nn.Module:
    """The network that "package.module:factory" makes, called with `ways` if it takes that.

    Raises:
        ArgumentError: there is no such function, or it returns no module.
    """
    factory = _find_factory(name)
    takes_ways = "ways" in inspect.signature(factory).parameters
    model = factory(ways=ways) if takes_ways else factory()
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
    except ModuleNotFoundError as error:
        raise ArgumentError(
            f"model: cannot import '{module_name}' ({error}). Run from the folder that holds it, or install it."
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise ArgumentError(f"model: '{module_name}' has no function or class named '{attribute}'.")
    return factory  # type: ignore[no-any-return]
