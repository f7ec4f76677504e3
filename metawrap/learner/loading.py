"""Loading a state_dict wholly or not at all: torch copies the entries that fit before it complains of the others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from metawrap.errors import ArgumentError, CheckpointError, MetaWrapError
from metawrap.outer_update.users_scheduler import parts_of
from metawrap.snapshot.module_state import ModuleState
from metawrap.tasks import describe_value


@contextmanager
def wholly_or_not_at_all(learner: nn.Module, optimizer: Optimizer, scheduler: Any, state_dict: Any) -> Iterator[None]:
    """Restores learner, optimizer and scheduler if the block, which loads a state_dict, fails, from a copy of each.

    Raises:
        ArgumentError: `state_dict` is no mapping.
        CheckpointError: the state_dict is that of another model or method, or damaged.
    """
    if not isinstance(state_dict, Mapping):
        raise ArgumentError(
            f"state_dict: expected what learner.state_dict() returned, but got {describe_value(state_dict)}. A file of "
            "it is read with torch.load(path, weights_only=True)."
        )
    put_back = remembered(learner, optimizer, scheduler)
    try:
        yield
    except MetaWrapError:  # Its message names the cause already.
        put_back()
        raise
    except Exception as error:  # A damaged state can make torch raise any error.
        put_back()
        cause = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"state_dict: it is not that of this {type(learner).__name__} and its model ({cause[:300]}). Nothing was "
            "loaded: build the learner with the method, model and arguments that the state was saved with."
        ) from error


@contextmanager
def put_back_on_error(learner: nn.Module, optimizer: Optimizer, scheduler: Any) -> Iterator[None]:
    """Restores a learner, its optimizer and scheduler where the block fails, at the cost of a copy of the learner."""
    put_back = remembered(learner, optimizer, scheduler)
    try:
        yield
    except BaseException:
        put_back()
        raise


def remembered(learner: nn.Module, optimizer: Optimizer, scheduler: Any) -> Callable[[], None]:
    """Copies a learner, its optimizer and its scheduler, if any; returns the function that puts the copy back."""
    named = list(learner.named_modules())
    state = ModuleState(named)
    state.keep("tables", (table for _, m in named for table in (m._parameters, m._buffers, m._modules)))
    places = [tensor for _, m in named for tensor in (*m._parameters.values(), *m._buffers.values())]
    tensors = {id(tensor): tensor for tensor in places if tensor is not None}.values()
    values = [(t, type(t), t.data, t.grad, None if is_lazy(t) else t.detach().clone()) for t in tensors]
    executor: Any = getattr(learner, "executor", None)
    tables = [(vars(each), dict(vars(each))) for each in (executor, *parts_of(scheduler)) if each is not None]
    groups = [dict(group) for group in optimizer.param_groups]
    # Copies: an optimizer's step edits its tensors in place.
    moments = {parameter: copy.deepcopy(value) for parameter, value in optimizer.state.items()}

    def put_back() -> None:
        state.put_back()
        for table, known in tables:
            table.update(known)
        with torch.no_grad():
            for tensor, kind, data, gradient, value in values:
                tensor.__class__ = kind  # A parameter that had no size yet was of another class.
                tensor.grad = None  # It may be of the other shape.
                tensor.data = data
                tensor.grad = gradient
                if value is not None:
                    tensor.copy_(value)
        for group, known in zip(optimizer.param_groups, groups, strict=True):
            group.update(known)
        optimizer.state.clear()
        optimizer.state.update(moments)

    return put_back
