"""What to do where tasks do not fit into memory: fewer of them at once, and if that was one, what takes less."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import torch

from metawrap.errors import MetaWrapWarning
from metawrap.inner_loop.task_solver import TaskSolver
from metawrap.settings.groups import Memory
from metawrap.settings.schedules import is_second_order
from metawrap.settings.settings import OuterSettings
from metawrap.tasks import Task


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no more memory, on a GPU or, where torch says it in words, on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def free_memory(device: torch.device) -> None:
    """Frees what is not in use any more, and hands a GPU's cached blocks, which may be in pieces, back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def can_be_flat(learner: Any, task: Task, memory: Memory) -> bool:
    """Whether flat memory would hold a smaller graph of a task than this `memory`, and the same gradient."""
    execution, solver = learner.settings.execution, learner._solver()
    if memory == "flat" or "memory" in execution.given or execution.cuda_graphs or not isinstance(solver, TaskSolver):
        return False
    has_graph = is_second_order(solver.epoch, solver.settings.first_order_epochs) or solver.update.keeps_graph
    if solver.training_path is not None or solver.settings.inner_steps < 2 or not has_graph:
        return False
    try:
        learner.checks.look_at_flat_memory(learner, task)
    except Exception:  # Such as a lack of memory here, too: then fewer tasks at once are left.
        return False
    return True


def warn_flat() -> None:
    """Says that from now on the graph of one inner step at a time is kept."""
    warnings.warn(
        "Out of memory: from now on the graph of one inner step at a time is kept, and each support pass runs twice. "
        'The gradient is the same. Pass execution={"memory": "flat"} to begin with that, or "unrolled" to refuse it.',
        MetaWrapWarning,
        stacklevel=5,
    )


def warn_split(size: int) -> None:
    """Says that from now on so many tasks are unrolled at once."""
    warnings.warn(
        f"Out of memory: from now on {size} task{'s' if size > 1 else ''} at a time. The gradient is the same. "
        f'Pass execution={{"tasks_per_backward": {size}}} to begin with that.',
        MetaWrapWarning,
        stacklevel=4,
    )


def too_little_memory(error: BaseException, settings: OuterSettings, memory: Memory) -> str:
    """The text of the error where one task does not fit, tried last with this `memory`."""
    fixes = []
    if memory == "unrolled":
        fixes.append('execution={"memory": "flat"}, which holds the graph of one inner step at a time')
    if settings.execution.workers != 1:
        fixes.append('execution={"workers": 1}')
    if getattr(settings, "inner_steps", None) and memory != "flat":
        fixes.append("fewer inner_steps")
    fixes += ["fewer or smaller images in a task", "a smaller network"]
    cause = " ".join(str(error).split())[:200]
    tried = " and the graph of one inner step" if memory != settings.execution.memory else ""
    return f"Out of memory with 1 task{tried} at a time ({cause}). Use {', '.join(fixes[:-1])}, or {fixes[-1]}."
