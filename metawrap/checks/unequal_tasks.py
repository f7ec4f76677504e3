"""Whether tasks of unequal sizes may be padded to one size: a trial with the first task and a longer twin of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metawrap.checks.first_look import Gradients, differ
from metawrap.engines import first_line
from metawrap.heads.joint_rows import rows_stand_alone
from metawrap.inner_loop.padding import are_near, can_be_padded
from metawrap.inner_loop.task_solver import TaskSolver
from metawrap.tasks import Inputs, Task


def why_not_padded(
    solver: TaskSolver, task: Task, gradient: Callable[[str, Sequence[Task]], Gradients], tolerance: float
) -> str | None:
    """The reason why tasks of unequal sizes are not padded, in words; None where they may be.

    Args:
        gradient: the gradient of the summed loss of tasks through an engine; `"batched"` pads them.
        tolerance: how far gradients may differ.
    """
    if solver.examples is not None or solver.training_path is not None:
        return "each inner step draws rows of its own"
    if not can_be_padded(task, solver.loss_fn):
        return "inputs or labels are not one tensor each, or loss_fn is no loss of torch that can leave rows out"

    def run(inputs: Inputs) -> Any:
        # Batch norms by the moments of one set, whatever the rows.
        solver.wrapped.run(task.support_x, "capture")
        found = solver.wrapped.run(inputs, "captured")
        if not isinstance(found, Tensor):
            raise TypeError("of other outputs it is not known which parts have a row for each example")
        return found

    if not rows_stand_alone(solver.wrapped.model, run, task.support_x, task.target_x):
        return "the output is no single tensor, or rows of a task act on each other outside of batch norms"
    # Never to one length: a norm over another axis of that length would not be seen.
    more = 2 if len(task.support_y) == len(task.target_y) else 1
    longer = Task(*(_longer(part, count) for part, count in zip(task.parts(), (1, 1, more, more), strict=True)))
    if not are_near([task, longer]):
        return "the first task has a set of one row, which shows nothing"
    try:
        reference = gradient("functional", [task, longer])
        finite = all(bool(g.isfinite().all()) for g in reference if g is not None)
        if not finite or differ(gradient("batched", [task, longer]), reference, tolerance):
            return "the gradient of two padded tasks is not that of one after the other"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"padded tasks fail with {first_line(error)}"
    return None


def _longer(rows: Any, count: int) -> Any:
    """With rows from the front behind the last, so that they differ from padded ones."""
    return torch.cat([rows, *([rows[:1]] * count)])
