"""A task with fewer classes than the network has outputs: the unused outputs are masked, on request."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metawrap.errors import TaskError
from metawrap.results import IGNORED, are_logits
from metawrap.tasks import Task, describe_value


def used_labels(task: Task, ignored: int = IGNORED) -> Tensor:
    """The classes of the support set, ascending.

    Raises:
        TaskError: the labels are no classes, or the target set has a class that the support set lacks.
    """
    found: list[Tensor] = []
    for part in ("support", "target"):
        labels = getattr(task, f"{part}_y")
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
            raise TaskError(
                f"mask_unused_outputs=True needs whole numbers as labels, but {part}_y is {describe_value(labels)}. "
                "Leave it False for regression."
            )
        found.append(torch.unique(labels[labels != ignored]).long())
    support, target = found
    if missing := sorted(set(target.tolist()) - set(support.tolist())):
        raise TaskError(
            f"mask_unused_outputs=True: target_y holds classes {missing}, which the support set has not shown. "
            "Their outputs would be masked: leave such targets out, or show the classes."
        )
    return support


def mask_unused(prediction: Any, y: Any, used: Tensor) -> Tensor:
    """Logits with minus infinity for every class but `used`: their probability, and their gradient, is zero.

    Args:
        prediction: (examples, classes, ...). y: (examples, ...).
        used: class indices.
    """
    if not are_logits(prediction, y):
        raise TaskError(
            "mask_unused_outputs=True needs logits of shape (examples, classes, ...) for labels of shape "
            f"(examples, ...), but the model returns {describe_value(prediction)} for {describe_value(y)}. Leave it "
            "False, and mask in loss_fn."
        )
    classes = prediction.shape[1]
    if len(used) and not 0 <= int(used[0]) <= int(used[-1]) < classes:
        raise TaskError(
            f"support_y holds labels {int(used[0])}..{int(used[-1])}, but the model has {classes} outputs. "
            f"Relabel the episode to 0..{classes - 1}, or give the model more outputs."
        )
    unused = torch.ones(classes, dtype=torch.bool, device=prediction.device)
    unused[used] = False
    masked: Tensor = prediction.masked_fill(unused.view(1, -1, *(1,) * (prediction.ndim - 2)), -torch.inf)
    return masked


def check_masked_loss(loss: Tensor, prediction: Tensor, used: Tensor) -> None:
    """Raises TaskError where a loss is infinite because of the mask alone."""
    if bool(loss.isinf()) and bool(prediction.detach()[:, used].isfinite().all()):
        raise TaskError(
            "mask_unused_outputs=True: the loss is infinite, because it asks masked outputs for a probability, as "
            "label smoothing does. Use a loss that looks at the label's own output, or leave it False."
        )
