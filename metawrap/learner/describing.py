"""A learner -> its description: every module of its network, what was done to the module, and warnings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from metawrap.checks.first_look import FirstLook
from metawrap.engines.calling import autograd
from metawrap.execution.calls import at_rest
from metawrap.inner_loop.update_rules import LearningRates
from metawrap.layers.per_step_norm import PerStepNorm
from metawrap.learner.description import Description, Fate, ModuleRow
from metawrap.settings.settings import Settings
from metawrap.surgery.wrap import Wrapped
from metawrap.tasks import Task, usable

_NO_RATES: dict[str, Tensor] = {}


@at_rest
def describe_learner(
    learner: Any,
    *,
    settings: Mapping[str, Any],
    wrapped: Wrapped | None = None,
    warnings: Iterable[str] = (),
    title: str = "",
    rates: Mapping[str, Tensor] | LearningRates = _NO_RATES,
    engine: tuple[str, str] = ("", ""),
    speed: str = "",
) -> Description:
    """What wrapping found and did.

    Args:
        wrapped: the network and what was done to it, where that is not the learner's own.
        title: text behind the name of the method.
        rates: the inner learning rates, by parameter.
        engine: its name, and why it was chosen.
        speed: how tasks are run.
    """
    wrapped, looks = wrapped or learner.wrapped, learner.findings
    unused = set.intersection(*(set(look.unused) for look in looks.values())) if looks else set()
    parameters = dict(wrapped.model.named_parameters())
    fates = {name: _fate(name, parameter, wrapped.adapted, unused) for name, parameter in parameters.items()}
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    values = [each.detach().double().cpu().flatten() for _, each in rates.items()]
    every_rate = torch.cat(values) if values else None
    return Description(
        method=f"{type(learner).__name__}{title}",
        model=type(wrapped.model).__name__,
        settings=dict(settings),
        adapted={name: shape for name, shape in shapes.items() if name in wrapped.adapted},
        learned_only={name: shape for name, shape in shapes.items() if fates[name] == "learned only"},
        frozen={name: shape for name, shape in shapes.items() if fates[name] == "frozen"},
        swapped=wrapped.swapped,
        left_alone=wrapped.kept,
        head=learner.head,
        engine=engine[0],
        engine_reason=engine[1],
        rates=0 if every_rate is None else every_rate.numel(),
        notes=[*wrapped.notes, *_learned_besides(learner)],
        warnings=list(warnings),
        modules=_rows(wrapped, fates, rates),
        rate_range=None if every_rate is None else (float(every_rate.min()), float(every_rate.max())),
        seen=bool(looks),
        speed=speed,
    )


def look_at(learner: Any, task: Task) -> None:
    """Shows the learner one task, as its first meta-step would, so that `describe` knows all. Changes nothing else.

    >>> look_at(learner, task)  # doctest: +SKIP
    >>> print(learner.describe())  # doctest: +SKIP
    """
    with autograd():
        learner._prepare(usable(task))


def first_order_warning(settings: Settings) -> str:
    """Which rows of the per-step norms get no gradient while the gradient is first-order."""
    until = "the end" if math.isinf(settings.first_order_epochs) else f"epoch {settings.first_order_epochs}"
    return (
        f"from epoch {settings.step_loss_epochs} to {until} the gradient is first-order and only the last step "
        f"counts, so batch-norm rows 0..{settings.inner_steps - 2} get no gradient"
    )


def unused_warnings(looks: Mapping[bool, FirstLook]) -> Iterator[str]:
    """Which adapted parameters the support loss does not depend on, and in which mode."""
    for name in dict.fromkeys(name for look in looks.values() for name in look.unused):
        modes = [mode for mode, look in looks.items() if name in look.unused]
        where = "" if len(modes) == len(looks) else f" in {'training' if modes[0] else 'eval'} mode"
        yield f"the support loss does not depend on '{name}'{where}"


def norm_warnings(settings: Settings, wrapped: Wrapped) -> Iterator[str]:
    """Known harm of a batch-norm policy to the inner loop."""
    if not wrapped.swapped:
        return
    has_rows = settings.per_step_norm_affine and settings.inner_steps > 1
    if has_rows and settings.first_order_epochs > settings.step_loss_epochs:
        yield first_order_warning(settings)


def _learned_besides(learner: Any) -> Iterator[str]:
    """A note on learned parameters that belong neither to the network nor to the inner learning rates."""
    own = [
        (name.split(".")[0], parameter)
        for name, parameter in learner.named_parameters()
        if parameter.requires_grad and name.split(".")[0] not in ("model", "learning_rates")
    ]
    if own:
        is_open = any(is_lazy(parameter) for _, parameter in own)
        total = "as many" if is_open else f"{sum(parameter.numel() for _, parameter in own):,}"
        places = ", ".join(dict.fromkeys(place for place, _ in own))
        yield f"besides the network, {total} numbers{' as the first task asks for' * is_open} are learned in {places}"


def _fate(name: str, parameter: nn.Parameter, adapted: tuple[str, ...], unused: set[str]) -> Fate:
    if name in unused:
        return "unused"
    if name in adapted:
        return "adapted" if parameter.requires_grad else "adapted from a frozen start"
    return "learned only" if parameter.requires_grad else "frozen"


def _rows(wrapped: Wrapped, fates: Mapping[str, Fate], rates: Mapping[str, Tensor] | LearningRates) -> list[ModuleRow]:
    """A row for every registration of every module, in order. The parts of a module come below its first name only."""
    names_of_parameters = {id(parameter): name for name, parameter in wrapped.model.named_parameters()}
    names_of_modules: dict[int, str] = {}
    rows = []

    def visit(module: nn.Module, name: str) -> None:
        kind = type(module).original_class if isinstance(module, PerStepNorm) else type(module)  # type: ignore[attr-defined]
        if id(module) in names_of_modules:
            rows.append(ModuleRow(name, kind.__name__, same_as=names_of_modules[id(module)]))
            return
        names_of_modules[id(module)], prefix = name, f"{name}." if name else ""
        own = {local: parameter for local, parameter in module._parameters.items() if parameter is not None}
        full = {local: names_of_parameters[id(parameter)] for local, parameter in own.items()}
        shared = {local: first for local, first in full.items() if first != prefix + local}
        row = ModuleRow(
            name=name,
            kind=kind.__name__,
            parameters={local: tuple(parameter.shape) for local, parameter in own.items()},
            buffers={local: tuple(buffer.shape) for local, buffer in module._buffers.items() if buffer is not None},
            fates={local: "shared" if local in shared else fates[first] for local, first in full.items()},
            shared=shared,
            rates=sum(rates[first].numel() for local, first in full.items() if first in rates and local not in shared),
            left_alone=name in wrapped.kept,
            **_per_step(module),
        )
        rows.append(row)
        for local, child in module._modules.items():
            if child is not None:
                visit(child, prefix + local)

    visit(wrapped.model, "")
    return rows


def _per_step(module: nn.Module) -> dict[str, Any]:
    if not isinstance(module, PerStepNorm):
        return {}
    state = module.per_step
    has_affine = state.affine and any(parameter is not None for parameter in module._parameters.values())
    has_statistics = state.statistics and module._buffers.get("running_mean") is not None
    parts = {"affine": has_affine, "statistics": has_statistics}
    return {"steps": state.steps, "per_step": tuple(part for part, present in parts.items() if present)}
