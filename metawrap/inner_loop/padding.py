"""Tasks of unequal sizes as one stack, padded to the rows of the largest, with the padded rows left out of every loss.

Exact where the rows of a task do not act on each other, except through batch norms: these count a task's own rows alone
(`StepClock.rows`). checks/unequal_tasks.py finds out whether that is so. The loss must be one of torch whose part of
each row is known: labels of padded rows are those that cross-entropy ignores, and other losses are taken row by row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metawrap.engines.batched import Padded
from metawrap.errors import TaskError
from metawrap.results import class_loss, function_of, ignored_label, loss_option, task_loss
from metawrap.tasks import Task, describe_value

# Losses that are the mean, or the sum, of a number for each entry of the labels.
_BY_ENTRY: dict[Any, Callable[..., Tensor]] = {
    nn.MSELoss.forward: F.mse_loss,
    nn.L1Loss.forward: F.l1_loss,
    nn.SmoothL1Loss.forward: F.smooth_l1_loss,
    nn.HuberLoss.forward: F.huber_loss,
    nn.BCELoss.forward: F.binary_cross_entropy,
    nn.BCEWithLogitsLoss.forward: F.binary_cross_entropy_with_logits,
}


def can_be_padded(task: Task, loss_fn: Any) -> bool:
    """Whether the inputs and labels are one tensor each, and the loss can leave rows out."""
    if not all(isinstance(part, Tensor) and part.layout == torch.strided for part in task.parts()):
        return False
    if class_loss(loss_fn) in (F.cross_entropy, F.nll_loss):  # Probabilities as labels cannot be ignored.
        return bool(task.support_y.dtype == task.target_y.dtype == torch.int64)
    return function_of(loss_fn, _BY_ENTRY) is not None


def are_near(tasks: Sequence[Task]) -> bool:
    """Whether no part of a task needs more padded rows than it has.

    A task of one row is near to its like alone, as a batch norm must see that it has no variance.
    """
    for part in ("support_y", "target_y"):
        sizes = [len(getattr(task, part)) for task in tasks]
        least, most = min(sizes), max(sizes)
        if most > 2 * least or least == 1 < most:
            return False
    return True


def padded(tasks: Sequence[Task], loss_fn: Any) -> Task:
    """One task whose every part has a leading task axis; parts of unequal sizes are `Padded`.

    The last row is repeated: padded rows are as finite as the task's own.
    """
    parts: list[Any] = []
    for name in ("support", "target"):
        columns = [[getattr(task, f"{name}_{kind}") for task in tasks] for kind in "xy"]
        counts = [len(y) for y in columns[1]]
        most = max(counts)
        x, y = (torch.stack([_longer(part, most) for part in column]) for column in columns)
        if min(counts) == most:
            parts += [x, y]
            continue
        # Made on the device: a recording cannot wait for the host.
        rows = torch.stack([torch.arange(most, device=y.device) < count for count in counts])
        if class_loss(loss_fn):
            labels: Any = y.masked_fill(~rows.view(*rows.shape, *(1,) * (y.ndim - 2)), ignored_label(loss_fn))
        else:
            labels = Padded(y, rows)
        parts += [Padded(x, rows), labels]
    return Task(*parts)


def _longer(rows: Tensor, count: int) -> Tensor:
    missing = count - len(rows)
    return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows


def loss_of_rows(loss_fn: Any, prediction: Any, y: Any, part: str) -> Tensor:
    """`task_loss` of the rows that are the task's own."""
    if isinstance(y, Padded):
        loss_fn, y = partial(_over_rows, loss_fn, y.rows), y.values
    return task_loss(loss_fn, prediction, y, part)


def _over_rows(loss_fn: Any, rows: Tensor, prediction: Tensor, y: Tensor) -> Tensor:
    if isinstance(loss_fn, nn.Module):
        by_entry: Any = copy.copy(loss_fn)
        by_entry.reduction = "none"
    else:
        by_entry = partial(loss_fn, reduction="none")
    losses: Tensor = by_entry(prediction, y)
    if losses.shape != y.shape:
        raise TaskError(f"loss_fn: expected a loss for each label, {describe_value(y)}, but got {losses.shape}.")
    of_rows = losses.flatten(1) if losses.ndim > 1 else losses.unsqueeze(1)
    total = torch.where(rows, of_rows.sum(1), 0).sum()
    if loss_option(loss_fn, "reduction", "mean") == "sum":
        return total
    return total / (rows.sum() * of_rows.shape[1])
