"""The user's own scheduler: made by the user's function, kept in the learner's state, and put back from there."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from metawrap.errors import ArgumentError, CheckpointError, MetaWrapWarning

SchedulerFactory = Callable[[Optimizer], LRScheduler]


def made_scheduler(factory: Any, optimizer: Optimizer) -> LRScheduler:
    """The scheduler that the user's function makes, or ArgumentError."""
    if isinstance(factory, LRScheduler) or not callable(factory):
        raise ArgumentError(
            "scheduler: expected a function from an optimizer to a scheduler, such as "
            f"lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 10), but got {type(factory).__name__}."
        )
    made: LRScheduler = factory(optimizer)
    check_scheduler(made, "what the function returned")
    return made


def check_scheduler(made: Any, what: str) -> None:
    """Raises ArgumentError unless this is a scheduler that needs no metric."""
    if isinstance(made, ReduceLROnPlateau) or not isinstance(made, LRScheduler):
        raise ArgumentError(
            f"scheduler: {what} is {type(made).__name__}, expected a scheduler whose step() needs no metric. "
            "Step others yourself on learner.optimizer, after each validation."
        )


def state_of(scheduler: LRScheduler | None) -> dict[str, Any]:
    """{"scheduler": its kind and state}, plain values for the learner's state; empty without a scheduler."""
    if scheduler is None:
        return {}
    kind, state = _kind(scheduler), scheduler.state_dict()
    if _is_plain(state):
        return {"scheduler": {"kind": kind, "state": state}}
    warnings.warn(
        f"scheduler: the state of {type(scheduler).__name__} holds objects, so learner.state_dict() leaves it out. A "
        "number of NumPy is one too: let a lambda return float(...). Or save the state of learner.scheduler yourself, "
        "and restore it after learner.load_state_dict.",
        MetaWrapWarning,
        stacklevel=4,
    )
    return {}


def put_back(scheduler: LRScheduler | None, stored: Any, begun: bool) -> None:
    """Loads what `state_of` gave. Rates are a part of the optimizer's state, and change where that was not loaded yet.

    Args:
        stored: None if the learner was saved without a scheduler. begun: whether it had made meta-steps.
    Raises:
        CheckpointError: the state is that of a scheduler of another kind.
    """
    saved, own = stored and stored["kind"], scheduler and _kind(scheduler)
    if saved and own and saved != own:
        raise CheckpointError(
            f"scheduler: the learner was saved with {saved}, but has {own}. Build it with the scheduler that it was "
            "trained with. Nothing was loaded."
        )
    if scheduler is not None and stored:
        scheduler.load_state_dict(copy.deepcopy(stored["state"]))
        if not scheduler.optimizer.state:
            for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                group["lr"] = rate
    elif begun and (saved or own):
        warnings.warn(
            f"scheduler: the learner was saved with {saved or 'none'}, but has {own or 'none'}, so further training "
            "would not be that of the saved run. To train on, build it with the same scheduler=.",
            MetaWrapWarning,
            stacklevel=4,
        )


def parts_of(scheduler: LRScheduler | None) -> Iterator[Any]:
    """A scheduler, and the schedulers and objects to call that it holds: each has a state that a step moves."""
    if scheduler is None:
        return
    yield scheduler
    for value in list(vars(scheduler).values()):
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, LRScheduler):
                yield from parts_of(each)
            elif callable(each) and not isinstance(each, type) and hasattr(each, "__dict__"):
                yield each


def _kind(scheduler: LRScheduler) -> str:
    """The class of a scheduler and of those that it holds: "SequentialLR, LinearLR, StepLR"."""
    return ", ".join(type(part).__name__ for part in parts_of(scheduler) if isinstance(part, LRScheduler))


def _is_plain(value: Any) -> bool:
    """Whether torch.load(weights_only=True) reads the value back."""
    if isinstance(value, dict):
        return type(value) in (dict, Counter) and all(map(_is_plain, (*value, *value.values())))
    if isinstance(value, list | tuple | set):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str, Tensor)
