"""Counting meta-steps that were skipped because their gradient was not finite, without waiting for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metawrap.checks.not_finite import trouble_in_words
from metawrap.errors import DivergedError
from metawrap.tasks import TaskBatch


def row_of_skipped(counts: Tensor, applied: Tensor) -> Tensor:
    """The counts after one more meta-step: (total, at present in a row, longest row), on the device.

    Args:
        counts: before it. applied: bool scalar, whether its update was made.
    """
    total, row, longest = counts.unbind()
    row = torch.where(applied, torch.zeros_like(row), row + 1)
    return torch.stack([total + ~applied, row, torch.maximum(longest, row)])


def refuse_divergence(learner: Any, counts: Tensor, batch: TaskBatch) -> None:
    """Looks at the counts once in `max_skipped_steps` meta-steps, so that a GPU waits no more often.

    Raises:
        DivergedError: the last steps, this one included, were skipped, and they are at least `max_skipped_steps`.
    """
    limit = learner.settings.outer_update.max_skipped_steps
    if (learner.iteration + 1) % limit == 0 and int(counts[1]) >= limit:
        learner.skipped_steps[1:] = 0  # So that training can go on with other tasks.
        raise DivergedError(
            f"At least {limit} meta-steps in a row had a meta-gradient that is not finite, and changed nothing. The "
            f"weights are finite.{trouble_in_words(learner, batch)} Lower meta_lr or inner_lr, or set "
            "outer_update.max_grad_norm."
        )
