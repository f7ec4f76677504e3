"""Batch norm to per-step batch norm, in a copy of the user's module, and back to a plain module of the user's class."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metawrap.errors import ArgumentError, shown
from metawrap.layers.moments import SHIFTS
from metawrap.layers.norm_policies import BLENDS
from metawrap.layers.per_step_norm import PerStepNorm, PerStepState, per_step_class
from metawrap.layers.step_clock import StepClock
from metawrap.layers.task_norm import BLEND, task_norm
from metawrap.surgery.copying import duplicate, give_own_class
from metawrap.surgery.inspect import batch_norms

Factory = Callable[[nn.Module], nn.Module]
_Made = dict[int, tuple[nn.Parameter, nn.Parameter]]
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def replace_modules(model: nn.Module, swap: Mapping[type[nn.Module], Factory]) -> list[str]:
    """Replaces, in place, every child of exactly the given classes by `factory(child)`; returns their names.

    A module that is registered twice is replaced by one and the same module.

    Raises:
        ArgumentError: `swap` is no mapping of classes to functions, a factory returns no module, or a class is nowhere
            in the model.
    """
    if not isinstance(swap, Mapping) or not all(isinstance(cls, type) and callable(new) for cls, new in swap.items()):
        raise ArgumentError(
            f"swap: expected a mapping from module class to factory(module), such as {{nn.Mish: lambda m: nn.ReLU()}}, "
            f"but got {swap!r:.80}."
        )
    made: dict[int, nn.Module] = {}
    replaced: dict[str, type] = {}
    for path, module in list(model.named_modules()):
        for child_name, child in list(module._modules.items()):
            if child is None or type(child) not in swap:
                continue
            new = made.setdefault(id(child), swap[type(child)](child)) if id(child) not in made else made[id(child)]
            if not isinstance(new, nn.Module):
                raise ArgumentError(
                    f"swap: the factory for {type(child).__name__} returned {shown(new)}, expected a module."
                )
            replaced[f"{path}.{child_name}" if path else child_name] = type(child)
            module._modules[child_name] = new
    if missing := set(swap) - set(replaced.values()):
        names = ", ".join(sorted(cls.__name__ for cls in missing))
        raise ArgumentError(f"swap: no submodule of class {names} was found in {type(model).__name__}.")
    return list(replaced)


def make_per_step(
    model: nn.Module,
    clock: StepClock,
    steps: int,
    affine: bool,
    statistics: bool,
    keep: Collection[str] = (),
    norm: str = "batch",
) -> list[PerStepNorm]:
    """Makes every batch norm of `model` per-step, in place: for a copy in which `find_problems` found nothing.

    Every row starts with the present values, pretrained ones too. Shared parameters stay shared. Names do not change.

    Args:
        clock: the inner-step index that all of them will share.
        steps: rows of a per-step tensor.
        affine: whether weight and bias get a row per step.
        statistics: whether the running statistics get a row per step.
        keep: names of norms to leave alone.
        norm: the learner's policy; "running" adds rows of shifts, "task" the learned blend.
    """
    rows: _Made = {}
    norms = []
    for name, layer in batch_norms(model).items():
        if name in keep:
            continue
        layer.__class__ = per_step_class(type(layer))
        assert isinstance(layer, PerStepNorm)
        layer.per_step = PerStepState(clock, name, steps, affine, statistics, BLENDS.get(norm, "instance"))
        for local in ("weight", "bias") if affine else ():
            if (parameter := layer._parameters.get(local)) is not None:
                # The old parameter is kept beside the new one: a freed one's id could come back as another's.
                layer._parameters[local] = rows.setdefault(id(parameter), (parameter, _repeated(parameter, steps)))[1]
        for local in _STATISTICS if statistics else ():
            if (buffer := layer._buffers.get(local)) is not None:
                layer._buffers[local] = torch.stack([buffer] * steps)
        _add_policy(layer, norm)
        norms.append(layer)
    return norms


def _add_policy(layer: PerStepNorm, norm: str) -> None:
    """Adds what a policy stores or learns in a norm."""
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    like = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
    rows = (layer.per_step.steps,) if layer.per_step.statistics else ()
    if norm == "running":
        shift, ratio, count = SHIFTS
        layer.register_buffer(shift, like.new_zeros(*rows, layer.num_features))
        layer.register_buffer(ratio, like.new_zeros(*rows, layer.num_features))
        layer.register_buffer(count, torch.zeros(rows, dtype=torch.long, device=like.device))
    if norm in BLENDS:
        for name in BLEND:
            layer.register_parameter(name, nn.Parameter(like.new_zeros(())))


def plain_copy(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    step: int,
    statistics: Mapping[str, tuple[Tensor, ...]] | None,
    keep_statistics: bool,
) -> nn.Module:
    """A module of the user's own class, with the given weights and with ordinary norms that hold one step's row.

    Args:
        weights: values by parameter name; parameters that are not named keep the model's.
        step: inner step whose rows the norms take.
        statistics: what `Wrapped.held` returned, in place of the stored rows.
        keep_statistics: whether the norms keep running statistics; without them they use each batch's own.
    """
    with torch.inference_mode(False), torch.no_grad():
        plain = duplicate(model)
        parameters = dict(plain.named_parameters())
        for name, weight in weights.items():
            # In place: a second holder of the parameter, such as a recurrent layer's list, sees it too.
            parameters[name].copy_(weight)
        rows: _Made = {}
        for norm in [module for module in plain.modules() if isinstance(module, PerStepNorm)]:
            name, blend = norm.per_step.name, norm.per_step.blend
            _make_plain(norm, step, rows)
            if not keep_statistics:
                norm.track_running_stats = False
                norm._buffers.update(dict.fromkeys(_STATISTICS))
            elif statistics and name in statistics:
                mean, variance, *share = statistics[name]
                if share:
                    task_norm(norm, blend, mean, variance, *share)
                else:
                    _hold(norm, mean, variance)
    return plain


def parameter_slots(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Where each parameter sits: (owner, local name) pairs by its first name; several where it is shared."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    slots: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in names.values()}
    for module in model.modules():
        for local, parameter in module._parameters.items():
            if parameter is not None:
                slots[names[id(parameter)]].append((module, local))
    return slots


def _hold(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Sets a plain norm's running statistics."""
    # Moments of half-precision inputs come in single precision, which a norm in half precision cannot take.
    like = next((t for t in (norm.running_mean, norm.weight) if t is not None), mean)
    norm.track_running_stats = True
    norm._buffers.update(running_mean=mean.to(like, copy=True), running_var=variance.to(like, copy=True))
    if norm._buffers.get("num_batches_tracked") is None:
        norm._buffers["num_batches_tracked"] = torch.zeros((), dtype=torch.long, device=mean.device)


def _make_plain(norm: PerStepNorm, step: int, rows: _Made) -> None:
    state = norm.__dict__.pop("per_step")
    row = min(step, state.steps - 1)
    for local, parameter in norm._parameters.items():
        if state.affine and local in ("weight", "bias") and parameter is not None:
            value = nn.Parameter(parameter.detach()[row].clone(), requires_grad=parameter.requires_grad)
            norm._parameters[local] = rows.setdefault(id(parameter), (parameter, value))[1]
    for local, buffer in norm._buffers.items():
        if state.statistics and local in _STATISTICS:
            norm._buffers[local] = None if buffer is None else buffer[row].clone()
    for local in SHIFTS:
        norm._buffers.pop(local, None)
    for local in BLEND:
        norm._parameters.pop(local, None)
    norm.__class__ = type(norm).original_class  # type: ignore[attr-defined]
    give_own_class(norm)


def _repeated(parameter: Tensor, steps: int) -> nn.Parameter:
    return nn.Parameter(torch.stack([parameter.detach()] * steps), requires_grad=parameter.requires_grad)
