"""Parameters made with the first tasks: given to the outer optimizer, and taken back if the call fails."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from metawrap.errors import MetaWrapWarning, UnsupportedModuleError
from metawrap.heads.embedding import Embedding
from metawrap.learner.direct import Direct


@contextmanager
def undone_if_it_fails(learner: Direct, embedding: Embedding) -> Iterator[None]:
    """Takes back the parts that a failed call made, and its changes of the optimizer.

    A failure after the outer update takes nothing back.
    """
    optimizer, iteration, head, looks = learner.optimizer, learner.iteration, embedding.head, dict(learner._looks)
    children = dict(learner._modules)
    own = [child for child in children.values() if child is not None and child is not learner.model]
    tables = [(part, dict(part._parameters)) for child in own for part in child.modules()]
    held = [(p, p.data, p.grad) for _, table in tables for p in table.values() if p is not None]
    groups = [dict(group) for group in optimizer.param_groups]
    state = {parameter: copy.copy(value) for parameter, value in optimizer.state.items()}
    try:
        yield
    except BaseException:
        if learner.iteration == iteration:
            embedding.head, learner._looks = head, looks
            learner._modules.clear()
            learner._modules.update(children)
            for part, table in tables:
                part._parameters.clear()
                part._parameters.update(table)
            for parameter, data, gradient in held:
                parameter.grad = None  # It may have the other shape.
                parameter.data, parameter.grad = data, gradient
            for group, known in zip(optimizer.param_groups, groups, strict=True):
                group.update(known)
            optimizer.state.clear()
            optimizer.state.update(state)
        raise


def refuse_late_parts(learner: nn.Module) -> None:
    """Raises UnsupportedModuleError where parameters can no longer be made; call it before making them."""
    # torch's own compiler reads this marker, which is set during the wrapped module's forward.
    if DistributedDataParallel._get_active_ddp_module() is not None:  # type: ignore[no-untyped-call]
        raise UnsupportedModuleError(
            f"{type(learner).__name__} makes parameters when it sees its first task, and DistributedDataParallel does "
            "not follow parameters that are made after it. Use meta_step, or evaluate the learner on one task before "
            "you wrap it; one with a table of classes needs classes= for that."
        )


def give_to_optimizer(learner: Direct, made: Sequence[nn.Parameter], *, warn: bool) -> None:
    """Gives the outer optimizer new parameters, and takes from it those that are gone.

    warn: whether to warn that an optimizer of the user's own would miss the new ones.
    """
    new = {id(parameter) for parameter in made if parameter.requires_grad}
    if warn and new:
        names = [name for name, parameter in learner.named_parameters() if id(parameter) in new]
        warnings.warn(
            f"{type(learner).__name__} makes {', '.join(names)} when it sees its first task: an optimizer of your own "
            "that was built before does not hold them, and they would never be learned. Use learner.optimizer, which "
            "does, or build yours afterwards.",
            MetaWrapWarning,
            stacklevel=3,
        )
    learner.outer.follow(learner.named_parameters(), made)
