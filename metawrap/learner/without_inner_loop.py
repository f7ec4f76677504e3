"""What learners without an inner loop over the user's module share: they run the module as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from metawrap.checks.first_look import FirstLook
from metawrap.engines.calling import autograd
from metawrap.errors import ArgumentError, shown
from metawrap.layers.norm_policies import BLENDS
from metawrap.learner.keywords import OuterKeywords
from metawrap.settings.keywords import flattened, keyword_types, refuse_unknown
from metawrap.settings.settings import PLAIN_TRAINING, OuterSettings, TunedSettings, resolve
from metawrap.snapshot.module_state import unchanged
from metawrap.surgery.wrap import Wrapped, wrap
from metawrap.tasks import Task, copy_of, device_of


def wrapped_as_it_is(
    method: type,
    model: nn.Module,
    keywords: OuterKeywords,
    *,
    defaults: Mapping[str, Any],
    head: str | None,
    own_steps: int | None,
) -> tuple[Wrapped, OuterSettings]:
    """The copy of the user's module, and the settings, from the keywords of a constructor.

    Args:
        defaults: of the method, in place of the usual ones. own_steps: inner steps on a part of the network.
    Raises:
        ArgumentError, TypeError: a keyword is wrong or unknown.
    """
    refuse_unknown(method.__name__, flattened(keywords), keyword_types(OuterKeywords), keyword_types(method))
    own_outer = [name for name in ("optimizer", "scheduler") if keywords.get(name) is not None]
    kind = OuterSettings if own_steps is None else TunedSettings
    settings = resolve(kind, {**keywords, "inner_steps": own_steps}, {**PLAIN_TRAINING, **defaults}, own_outer)
    given = flattened({"wrapping": keywords.get("wrapping")})
    wrapped = wrap(
        model,
        steps=1,
        affine=False,
        statistics=False,
        norm=settings.norm if settings.norm in BLENDS else "batch",
        adapt=False,
        swap=given.get("wrapping.swap"),
        keep_norm=given.get("wrapping.keep_norm", ()),
        head=head,
    )
    return wrapped, settings


def moved_parts(parts: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """What a method learns besides the module, on the module's device and in its precision."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    return {
        name: nn.Parameter(part.detach().to(like), requires_grad=part.requires_grad)
        if isinstance(part, nn.Parameter)
        else part.to(like.device, like.dtype)
        for name, part in parts.items()
    }


def inspect_once(learner: Any, task: Task, inspect: Callable[[Task], FirstLook]) -> None:
    """Inspects the first task of each mode; the model is put back afterwards."""
    learner.wrapped.hold_kept_norms()
    _place_unsized(learner)
    if learner.model.training not in learner.findings:
        with autograd(True), unchanged(learner.model, device_of(learner.model)):
            found = inspect(task.map(copy_of))
        learner.findings[learner.model.training] = found


def refuse_inner_loop(learner: Any, steps: int | None, mask: bool | None = None) -> None:
    """Raises ArgumentError where an option of an inner loop was given."""
    for name, value in {"steps": steps, "mask_unused_outputs": mask}.items():
        if value is not None:
            raise ArgumentError(
                f"{name}: has no effect on {type(learner).__name__}, which has no inner loop on the network's own "
                f"outputs, but got {shown(value)}. Leave it out."
            )


def shown_settings(learner: Any) -> dict[str, Any]:
    """The method's own keywords, and the settings that it takes, for `describe()`."""
    taken = {*keyword_types(OuterKeywords), "inner_steps"}
    return {**learner.options, **{name: v for name, v in learner.settings.as_dict().items() if name in taken}}


def leave_out_unsized(learner: nn.Module) -> None:
    """Leaves parameters without a size out of state_dict: torch.load(weights_only=True) would not take them."""
    learner._register_state_dict_hook(_without_unsized)  # type: ignore[no-untyped-call]
    learner.register_load_state_dict_pre_hook(_with_unsized)  # type: ignore[no-untyped-call]


def _without_unsized(learner: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name, parameter in learner.named_parameters():
        if is_lazy(parameter):
            state.pop(prefix + name, None)


def _with_unsized(learner: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, parameter in learner.named_parameters():
        if is_lazy(parameter):
            state.setdefault(prefix + name, parameter)


def _place_unsized(learner: nn.Module) -> None:
    # A pickled parameter without a size loses its device and precision; it must stay the optimizer's object.
    unsized = [p for p in learner.parameters() if is_lazy(p)]
    like = next((p for p in learner.parameters() if not is_lazy(p)), None) if unsized else None
    for parameter in unsized if like is not None else ():
        parameter.data = parameter.data.to(like)
