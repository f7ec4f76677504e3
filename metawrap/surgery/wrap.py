"""Wrapping a module: copy, swap, check, select. Every failure comes before the copy is handed out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from metawrap.errors import ArgumentError, MetaWrapError, MetaWrapWarning, UnsupportedModuleError, shown
from metawrap.layers.norm_policies import Statistics
from metawrap.layers.per_step_norm import PerStepNorm
from metawrap.layers.step_clock import Moments, StepClock
from metawrap.surgery.copying import copy_model
from metawrap.surgery.inspect import batch_norms, find_problems
from metawrap.surgery.swap import Factory, make_per_step, replace_modules
from metawrap.tasks import Inputs, call_model

Selection: TypeAlias = str | Iterable[str] | Callable[[str], bool] | None


@dataclass
class Wrapped:
    """A copy of the user's module with per-step norms, and a record of the changes.

    adapted: names of the parameters that the inner loop changes. swapped, kept: names of norms; the kept ones
    always run on their own stored statistics. notes: the other changes, in words.
    """

    model: nn.Module
    clock: StepClock
    adapted: tuple[str, ...]
    swapped: list[str]
    kept: list[str]
    notes: list[str] = field(default_factory=list)

    def adapted_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Name and initial value of each adapted parameter."""
        parameters = dict(self.model.named_parameters())
        return [(name, parameters[name]) for name in self.adapted]

    def run(self, inputs: Inputs, statistics: Statistics, moments: list[Moments] | None = None) -> Any:
        """One pass of the module as it is, its norms at row 0; the statistics that they see are added to `moments`."""
        with self.clock.at(0, statistics, moments):
            return call_model(self.model, inputs)

    def held(self, norm: str, row: int = 0) -> dict[str, tuple[Tensor, ...]]:
        """The statistics that each norm of an adapted plain module will hold, by the norm's name; after a context pass.

        Args:
            norm: the policy. row: of the inner step whose shifts apply under "running".
        Raises:
            UnsupportedModuleError: a norm ran more than once in it.
        """
        captured, self.clock.captured = self.clock.captured, {}
        for name, passes in captured.items():
            if len(passes) != 1:
                raise UnsupportedModuleError(
                    f"'{name}' runs {len(passes)} times in one forward pass, but a plain norm holds one set of "
                    'statistics. Use norm="batch", or evaluate with the learner itself.'
                )
        taken = {name: passes[0] for name, passes in captured.items()}
        if norm != "running":
            return taken
        norms = {m.per_step.name: m for m in self.model.modules() if isinstance(m, PerStepNorm)}
        with self.clock.at(row, "shifted"):
            return {name: norms[name].shifted(*moments) for name, moments in taken.items()}

    @contextmanager
    def in_training_mode(self) -> Iterator[None]:
        """Training mode for a while; every flag is put back."""
        flags = [(module, module.training) for module in self.model.modules()]
        self.model.train()
        self.hold_kept_norms()
        try:
            yield
        finally:
            for module, flag in flags:
                module.training = flag

    def hold_kept_norms(self) -> None:
        """Keeps the norms that were left alone on their stored statistics; call after every `train()`."""
        norms = batch_norms(self.model)
        for name in self.kept:
            norms[name].eval()


def wrap(
    model: nn.Module,
    *,
    steps: int,
    affine: bool,
    statistics: bool,
    adapt: Selection | Literal[False] = None,
    adapt_norm: bool = False,
    swap: Mapping[type[nn.Module], Factory] | None = None,
    keep_norm: str | Iterable[str] = (),
    head: str | None = None,
    norm: str = "batch",
) -> Wrapped:
    """Copies a module and makes the copy ready for an inner loop; `model` itself is only read.

    Args:
        adapt: which parameters the inner loop adapts; False for a method that has none.
        norm: see `make_per_step`.
    Raises:
        ArgumentError: an argument has the wrong type or names nothing in the model.
        UnsupportedModuleError: no engine could adapt the module correctly; all reasons are listed.
    """
    if torch.is_inference_mode_enabled():
        raise MetaWrapError(
            "A learner was made under torch.inference_mode(), in which tensors cannot learn. Make it outside; its "
            "methods may be called inside."
        )
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: expected a torch.nn.Module, but got {type(model).__name__}.")
    copied, notes = copy_model(model)
    if swap:
        notes += [f"'{name}' was replaced by wrapping.swap=" for name in replace_modules(copied, swap)]
    kept = _named("keep_norm", keep_norm, batch_norms(copied)) if keep_norm else []
    if problems := find_problems(copied, kept, affine):
        raise UnsupportedModuleError("\n".join(problems))
    if head is not None and (not isinstance(head, str) or head not in dict(copied.named_modules())):
        raise ArgumentError(f"head: expected the name of a submodule of {type(model).__name__}, but got {shown(head)}.")
    adapted = () if adapt is False else _selected(copied, adapt, adapt_norm)
    _check_devices(copied)
    clock = StepClock()
    model_hooks = {name: p for name, p in copied.named_parameters() if p._backward_hooks}
    _warn_of_frozen_norms(copied, kept)
    norms = make_per_step(copied, clock, steps, affine, statistics, kept, norm)
    lost = [name for name, p in model_hooks.items() if dict(copied.named_parameters())[name] is not p]
    notes += [f"the hooks on '{name}' are not carried over: it has a row per step now" for name in lost]
    wrapped = Wrapped(copied, clock, adapted, [norm.per_step.name for norm in norms], kept, notes)
    wrapped.hold_kept_norms()
    return wrapped


def _selected(model: nn.Module, adapt: Selection, adapt_norm: bool) -> tuple[str, ...]:
    norm_owned = {id(p) for norm in batch_norms(model).values() for p in norm.parameters()}
    free = {name: id(p) in norm_owned for name, p in model.named_parameters() if p.requires_grad}
    candidates = [name for name, is_norm in free.items() if adapt_norm or not is_norm]
    if not candidates:
        raise ArgumentError(
            f"model: {type(model).__name__} has no parameter to adapt: "
            f"{len(free)} require a gradient, {sum(free.values())} of them in batch norms. "
            "Unfreeze some with requires_grad_(), or pass adapt_norm=True to adapt the norms."
        )
    if adapt is None:
        return tuple(candidates)
    if callable(adapt):
        chosen = [name for name in candidates if adapt(name)]
        if not chosen:
            raise ArgumentError(f"adapt: the function selected none of {', '.join(candidates)}.")
        return tuple(chosen)
    named = tuple(_named("adapt", adapt, candidates))
    if not named:
        raise ArgumentError(f"adapt: expected at least one of {', '.join(candidates)}, but got {shown(adapt)}.")
    return named


def _named(argument: str, patterns: str | Iterable[str], names: Iterable[str]) -> list[str]:
    """The names that match any of the patterns (shell wildcards), in order; every pattern must match something."""
    names = list(names)
    if not isinstance(patterns, Iterable):
        raise ArgumentError(f"{argument}: expected names or wildcards such as 'head.*', but got {shown(patterns)}.")
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in wanted:
        if not isinstance(pattern, str):
            raise ArgumentError(f"{argument}: expected names or wildcards such as 'head.*', but got {shown(pattern)}.")
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ArgumentError(f"{argument}: {shown(pattern)} matches none of {', '.join(names) or 'an empty list'}.")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in wanted)]


def _warn_of_frozen_norms(model: nn.Module, kept: list[str]) -> None:
    frozen = [name for name, norm in batch_norms(model).items() if not norm.training and name not in kept]
    if model.training and frozen:
        warnings.warn(
            f"{', '.join(frozen)}: in eval mode in a model in training mode, as frozen norms are, but now per-step; "
            f"norm= decides on the statistics. To leave them alone, pass wrapping={{'keep_norm': {frozen}}}.",
            MetaWrapWarning,
            stacklevel=5,
        )


def _check_devices(model: nn.Module) -> None:
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1:
        raise UnsupportedModuleError(
            f"{type(model).__name__} is spread over {', '.join(sorted(devices))}. Move it to one device before "
            f"wrapping."
        )
