"""What to do where tasks do not fit into memory: fewer of them at once, and if that was one, what takes less."""

from __future__ import annotations

import gc
import warnings

import torch

from metawrap.errors import MetaWrapWarning
from metawrap.settings.settings import OuterSettings


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


def warn_split(size: int) -> None:
    """Says that from now on so many tasks are unrolled at once."""
    warnings.warn(
        f"Out of memory: from now on {size} task{'s' if size > 1 else ''} at a time. The gradient is the same. "
        f'Pass execution={{"tasks_per_backward": {size}}} to begin with that.',
        MetaWrapWarning,
        stacklevel=4,
    )


def too_little_memory(error: BaseException, settings: OuterSettings) -> str:
    """The text of the error where one task does not fit."""
    fixes = []
    if settings.execution.memory == "unrolled":
        fixes.append('execution={"memory": "flat"}, which holds the graph of one inner step at a time')
    if settings.execution.workers != 1:
        fixes.append('execution={"workers": 1}')
    if getattr(settings, "inner_steps", None) and settings.execution.memory != "flat":
        fixes.append("fewer inner_steps")
    fixes += ["fewer or smaller images in a task", "a smaller network"]
    cause = " ".join(str(error).split())[:200]
    return f"Out of memory with 1 task at a time ({cause}). Use {', '.join(fixes[:-1])}, or {fixes[-1]}."
