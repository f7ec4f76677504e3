"""RunSettings and the user's network -> a description of the wrapped network, without training or data."""

from __future__ import annotations

import warnings

import torch

from metawrap.errors import ArgumentError, MetaWrapWarning
from metawrap.learner.description import Description
from metawrap.tasks import Task
from metawrap.training.experiment import build_learner, network_of, show_task
from metawrap.training.progress import say
from metawrap.training.run_settings import RunSettings


def inspect_model(settings: RunSettings, input_shape: tuple[int, ...] | None = None) -> Description:
    """Wraps the network that `settings.model` names, on the CPU, and describes it.

    Args:
        input_shape: the shape of one example, without the batch axis. If it is given, the learner sees a task of
            `settings.ways` random examples, one per class, which shows the head, unused parameters and a faulty engine.
    Raises:
        ArgumentError: there is no such network, or it fails on inputs of that shape.
        UnsupportedModuleError: no engine can adapt the network correctly.
    """
    torch.manual_seed(settings.seed)
    if (network := network_of(settings)) is None:
        raise ArgumentError(
            "model: expected 'package.module:factory', such as 'torchvision.models:resnet18', but got none."
        )
    if network.words:
        say(network.words)
    learner = build_learner(settings, network.model)
    if input_shape is not None:
        dtype = next(learner.model.parameters()).dtype
        x, y = torch.randn(settings.ways, *input_shape, dtype=dtype), torch.arange(settings.ways)
        fix = "Give the shape of one example, without the batch axis, or leave it out."
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MetaWrapWarning)  # The description lists them.
            show_task(learner, Task(x, y, x, y), "input-shape", fix, "--ways sets how many classes a task has.")
    return learner.describe()  # type: ignore[no-any-return]
