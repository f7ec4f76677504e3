"""A gradient-based learner -> what it says of itself: every module, what was done to it, and what to beware of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from metawrap.checks.first_look import FirstLook
from metawrap.inner_loop.outcome import autograd, usable
from metawrap.layers.learning_rates import LearningRates
from metawrap.layers.per_step_norm import PerStepNorm
from metawrap.learner.description import Description
from metawrap.learner.module_rows import Fate, ModuleRow
from metawrap.settings.settings import Settings
from metawrap.surgery.wrap import Wrapped
from metawrap.tasks import Task

_ELSEWHERE = ("model", "learning_rates")
_NO_RATES: dict[str, Tensor] = {}


def describe_learner(
    learner: Any,
    *,
    wrapped: Wrapped,
    head: str | None,
    looks: Mapping[bool, FirstLook],
    settings: Mapping[str, Any],
    warnings: Iterable[str],
    title: str = "",
    rates: Mapping[str, Tensor] | LearningRates = _NO_RATES,
    engine: tuple[str, str] = ("", ""),
    speed: str = "",
) -> Description:
    """What wrapping found and did.

    Args:
        looks: what the first task showed, in training mode (True) and in eval mode.
        title: what stands behind the method's name.
        rates: of the inner loop. engine: its name, and why it was chosen. speed: how tasks are run.
    """
    unused = [set(look.unused) for look in looks.values()]
    never = set.intersection(*unused) if unused else set()
    fates = {name: _fate(name, p, wrapped.adapted, never) for name, p in wrapped.model.named_parameters()}
    shapes = {name: tuple(parameter.shape) for name, parameter in wrapped.model.named_parameters()}
    adapted = {name: shape for name, shape in shapes.items() if name in wrapped.adapted}
    return Description(
        method=f"{type(learner).__name__}{title}",
        model=type(wrapped.model).__name__,
        settings=dict(settings),
        adapted=adapted,
        learned_only={name: shape for name, shape in shapes.items() if fates[name] == "learned only"},
        frozen={name: shape for name, shape in shapes.items() if fates[name] == "frozen"},
        swapped=wrapped.swapped,
        left_alone=wrapped.kept,
        head=head,
        engine=engine[0],
        engine_reason=engine[1],
        rates=sum(values.numel() for _, values in rates.items()),
        notes=[*wrapped.notes, *_besides(learner)],
        warnings=list(warnings),
        modules=list(_rows(wrapped, fates, rates)),
        rate_range=_range(rates),
        seen=bool(looks),
        speed=speed,
    )


def look_at(learner: Any, task: Task) -> None:
    """Shows a learner one task as its first meta-step would, so that `describe` knows all; changes nothing else."""
    with autograd():
        learner._prepare(usable(task))


def first_order_warning(settings: Settings) -> str:
    """Which rows of the per-step norms get no gradient while it is first-order."""
    until = "the end" if math.isinf(settings.first_order_epochs) else f"epoch {settings.first_order_epochs}"
    return (
        f"from epoch {settings.step_loss_epochs} to {until} the gradient is first-order and only the last step "
        f"counts, so batch-norm rows 0..{settings.inner_steps - 2} get no gradient"
    )


def _besides(learner: Any) -> Iterator[str]:
    """What is learned that is neither the network nor its inner rates."""
    own = [(n, p) for n, p in learner.named_parameters() if p.requires_grad and n.split(".")[0] not in _ELSEWHERE]
    if own:
        sizes = [None if is_lazy(p) else p.numel() for _, p in own]
        numbers = (
            "as many numbers as the first task asks for" if None in sizes else f"{sum(filter(None, sizes)):,} numbers"
        )
        places = ", ".join(dict.fromkeys(name.split(".")[0] for name, _ in own))
        yield f"besides the network, {numbers} are learned in {places}"


def _fate(name: str, parameter: nn.Parameter, adapted: tuple[str, ...], unused: set[str]) -> Fate:
    if name in unused:
        return "unused"
    if name in adapted:
        return "adapted" if parameter.requires_grad else "adapted from a frozen start"
    return "learned only" if parameter.requires_grad else "frozen"


def _rows(
    wrapped: Wrapped, fates: Mapping[str, Fate], rates: Mapping[str, Tensor] | LearningRates
) -> Iterator[ModuleRow]:
    first_names = {id(parameter): name for name, parameter in wrapped.model.named_parameters()}
    seen: dict[int, str] = {}
    for name, module in _tree(wrapped.model, "", seen):
        kind = type(module).original_class if isinstance(module, PerStepNorm) else type(module)  # type: ignore[attr-defined]
        if seen[id(module)] != name:
            yield ModuleRow(name, kind.__name__, same_as=seen[id(module)])
            continue
        own = {local: p for local, p in module._parameters.items() if p is not None}
        full = {local: first_names[id(p)] for local, p in own.items()}
        shared = {local: first for local, first in full.items() if first != (f"{name}.{local}" if name else local)}
        yield ModuleRow(
            name=name,
            kind=kind.__name__,
            parameters={local: tuple(p.shape) for local, p in own.items()},
            buffers={local: tuple(b.shape) for local, b in module._buffers.items() if b is not None},
            fates={local: "shared" if local in shared else fates[first] for local, first in full.items()},
            shared=shared,
            rates=sum(rates[first].numel() for local, first in full.items() if first in rates and local not in shared),
            left_alone=name in wrapped.kept,
            **_per_step(module),
        )


def _tree(module: nn.Module, name: str, seen: dict[int, str]) -> Iterator[tuple[str, nn.Module]]:
    """Every registration of every module, in order; the parts of one that is registered again come once."""
    known = id(module) in seen
    seen.setdefault(id(module), name)
    yield name, module
    if not known:
        for local, child in module._modules.items():
            if child is not None:
                yield from _tree(child, f"{name}.{local}" if name else local, seen)


def _per_step(module: nn.Module) -> dict[str, Any]:
    if not isinstance(module, PerStepNorm):
        return {}
    state = module.per_step
    affine = state.affine and any(parameter is not None for parameter in module._parameters.values())
    statistics = state.statistics and module._buffers.get("running_mean") is not None
    parts = {"affine": affine, "statistics": statistics}
    return {"steps": state.steps, "per_step": tuple(part for part, present in parts.items() if present)}


def _range(rates: Mapping[str, Tensor] | LearningRates) -> tuple[float, float] | None:
    if not len(rates):
        return None
    values = torch.cat([values.detach().double().cpu().flatten() for _, values in rates.items()])
    return float(values.min()), float(values.max())


def unused_warnings(looks: Mapping[bool, FirstLook]) -> Iterator[str]:
    """Which adapted parameters play no part, and in which mode."""
    for name in dict.fromkeys(name for look in looks.values() for name in look.unused):
        modes = [mode for mode, look in looks.items() if name in look.unused]
        where = "" if len(modes) == len(looks) else f" in {'training' if modes[0] else 'eval'} mode"
        yield f"the support loss does not depend on '{name}'{where}"


def norm_warnings(settings: Settings, wrapped: Wrapped) -> Iterator[str]:
    """What a batch-norm policy is known to do to an inner loop."""
    if not wrapped.swapped:
        return
    rows = settings.per_step_norm_affine and settings.inner_steps > 1
    if rows and settings.first_order_epochs > settings.step_loss_epochs:
        yield first_order_warning(settings)
    if settings.norm == "running":
        yield (
            'norm="running" trains under batch statistics and adapts under stored ones in evaluation, where the inner '
            'loop often diverges; norm="support" is inductive and the same in both'
        )
