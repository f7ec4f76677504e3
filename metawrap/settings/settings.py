"""Presets, and every keyword argument of a learner with its default and bound, checked before anything is built."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from functools import cached_property
from typing import Annotated, Any, TypeVar

from pydantic import Field

from metawrap.errors import ArgumentError, shown
from metawrap.layers.norm_policies import NormPolicy
from metawrap.settings.groups import (
    GROUPS,
    ExecutionOptions,
    HeadInit,
    InnerOptimizerName,
    InnerOptions,
    Memory,
    OuterOptions,
    OutputOptions,
    WorkersIn,
)
from metawrap.settings.keywords import flattened, nested
from metawrap.settings.validated import (
    Count,
    Expected,
    NotNegative,
    Number,
    Options,
    Positive,
    Switch,
    Whole,
    WholeOrInfinite,
    check_value,
    field_types,
    validated,
)

__all__ = ["HeadInit", "InnerOptimizerName", "Memory", "NormPolicy", "WorkersIn"]

AnySettings = TypeVar("AnySettings", bound="OuterSettings")

_ALL_PARTS = dict.fromkeys(
    ("multi_step_loss", "per_step_norm_statistics", "per_step_norm_affine", "learn_inner_lr", "cosine_annealing"), True
)
# What differs from the defaults of `Settings`.
PRESETS: dict[str, dict[str, Any]] = {
    "maml": {},
    "fomaml": {"first_order_epochs": math.inf},
    "inductive": _ALL_PARTS,
    # Derivative-order annealing is off in every configuration that the authors released, and evaluation is
    # transductive.
    "authors_code": _ALL_PARTS | {"norm": "batch"},
    "paper": _ALL_PARTS
    | {"first_order_epochs": 50, "epochs": 150, "norm": "running", "outer_update.betas": (0.9, 0.99)},
    "meta_sgd": {"inner_steps": 1, "learn_inner_lr": True},
    "reptile": {"first_order_epochs": math.inf, "meta_lr": 1.0, "adapt_norm": True},
    "lstm": {"first_order_epochs": math.inf, "inner_lr": 0.01, "outer_update.max_grad_norm": 0.25},
}
# Presets that one method has, which takes no other.
OF_ONE_METHOD = frozenset({"meta_sgd", "reptile", "lstm"})
# Where a method without an inner loop differs: it is trained and evaluated as any network is.
PLAIN_TRAINING: dict[str, Any] = {"cosine_annealing": True, "norm": "running"}


@validated
class OuterSettings(Options):
    """The resolved keyword arguments that every learner has; see `MAMLPlusPlus` for their meaning."""

    cosine_annealing: Switch = False
    meta_lr: Positive = 1e-3
    min_meta_lr: NotNegative = 1e-5
    epochs: Count = 100
    iterations_per_epoch: Count = 500
    norm: NormPolicy = "support"
    outer_update: OuterOptions = Field(default_factory=OuterOptions)
    execution: ExecutionOptions = Field(default_factory=ExecutionOptions)

    @property
    def default_steps(self) -> int | None:
        """Inner steps where a caller names none; None for a method without an inner loop."""
        return None

    def as_dict(self) -> dict[str, Any]:
        """All settings by keyword name, those of a group as "group.field"."""
        return flattened(
            {
                field.name: {own.name: getattr(value, own.name) for own in fields(value)}  # type: ignore[arg-type]
                if isinstance(value := getattr(self, field.name), Options)
                else value
                for field in fields(self)
            }
        )


@validated
class TunedSettings(OuterSettings):
    """Those of a method that takes gradient steps on a part of the network for each task."""

    inner_steps: Count = 5

    @property
    def default_steps(self) -> int | None:
        """Inner steps where a caller names none."""
        return self.inner_steps


@validated
class Settings(OuterSettings):
    """The resolved keyword arguments of a gradient-based learner; see `MAMLPlusPlus` for their meaning."""

    inner_steps: Count = 5
    inner_lr: Number = 0.1
    multi_step_loss: Switch = False
    msl_epochs: Whole = 10
    first_order_epochs: WholeOrInfinite = 0
    per_step_norm_statistics: Switch = False
    per_step_norm_affine: Switch = False
    learn_inner_lr: Switch = False
    adapt_norm: Switch = False
    inner_update: InnerOptions = Field(default_factory=InnerOptions)
    outputs: OutputOptions = Field(default_factory=OutputOptions)

    @cached_property
    def step_loss_epochs(self) -> int:
        """Epochs of the multi-step loss; 0 when it is off."""
        return self.msl_epochs if self.multi_step_loss else 0

    @property
    def default_steps(self) -> int:
        """Inner steps where a caller names none."""
        return self.inner_steps


def check_preset(given: str | None, default: str, method: str) -> str:
    """The name of the preset that a method was given, or its own.

    Raises:
        ArgumentError: it is unknown, or belongs to another method.
    """
    preset = default if given is None else given
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ArgumentError(f"preset: expected one of {', '.join(map(repr, PRESETS))}, but got {shown(preset)}.")
    if preset != default and {preset, default} & OF_ONE_METHOD:
        raise ArgumentError(f"preset: {shown(preset)} is no preset of {method}. Leave it out, or take its own method.")
    return preset


def resolve(
    kind: type[AnySettings], given: Mapping[str, Any], base: Mapping[str, Any], own_outer: Collection[str] = ()
) -> AnySettings:
    """Settings of a kind: its defaults, with the values of `base`, with every argument that is not None in its place.

    Args:
        given: keywords by name; names that are no settings of this kind are left out. A field of a group may be None.
        base: a preset, by "group.field" too.
        own_outer: "optimizer" or "scheduler" or both, where the user brings one.
    Raises:
        ArgumentError: a value of the wrong type, range or combination.
    """
    known = field_types(kind)
    explicit = flattened({name: value for name, value in given.items() if name in known and value is not None})
    if explicit.get("adapt_norm") and explicit.get("per_step_norm_affine"):
        raise ArgumentError(
            "adapt_norm=True adapts one scale and shift per norm in the inner loop, so they cannot also be per step. "
            "Leave out per_step_norm_affine, or set adapt_norm=False."
        )
    _refuse_replaced(explicit, own_outer)
    values = {name: value for name, value in base.items() if name.partition(".")[0] in known} | explicit
    if values.get("adapt_norm"):
        values["per_step_norm_affine"] = False
    groups = {name: GROUPS[name](**value) if name in GROUPS else value for name, value in nested(values).items()}
    make: Any = kind
    made: AnySettings = make(**groups)
    return _consistent(made, explicit)


def _refuse_replaced(explicit: Mapping[str, Any], own_outer: Collection[str]) -> None:
    for name in _REPLACED.get("optimizer" if "optimizer" in own_outer else "scheduler", ()) if own_outer else ():
        if explicit.get(name):
            raise ArgumentError(
                f"{name}: belongs to the built-in optimizer and its schedule, but {' and '.join(own_outer)}= was "
                f"given. Set it there, and leave {name} out."
            )


def _consistent(settings: AnySettings, explicit: Mapping[str, Any]) -> AnySettings:
    """The settings; raises ArgumentError where two do not go together."""
    for name, switch in _BELONGS.items():
        if name in explicit and not getattr(settings, switch):
            raise ArgumentError(f"{name}: has no effect with {switch}=False. Leave it out, or pass {switch}=True.")
    if settings.outer_update.detect_anomaly and settings.execution.cuda_graphs:
        raise ArgumentError(
            "outer_update.detect_anomaly: has no effect on what is replayed. Leave it out, or execution.cuda_graphs."
        )
    if settings.min_meta_lr > settings.meta_lr:
        if "min_meta_lr" in explicit:
            raise ArgumentError(
                f"min_meta_lr: expected at most meta_lr={settings.meta_lr}, but got {settings.min_meta_lr}."
            )
        return replace(settings, min_meta_lr=settings.meta_lr)
    return settings


_BELONGS = {"msl_epochs": "multi_step_loss", "min_meta_lr": "cosine_annealing"}
_SCHEDULE = ("min_meta_lr", "cosine_annealing", "linear_annealing", "epochs")
_REPLACED = {"optimizer": ("meta_lr", "outer_update.betas", *_SCHEDULE), "scheduler": _SCHEDULE}


def check_choice(name: str, value: Any) -> None:
    """Checks one argument that is also taken outside the constructor (`norm=` of `evaluate`, say)."""
    check_value(name, value, Switch if name == "mask_unused_outputs" else field_types(Settings)[name])


def check_switch(name: str, value: Any) -> None:
    """Raises ArgumentError unless the value is True or False."""
    check_value(name, value, Switch)


def check_whole(name: str, value: Any, least: int) -> None:
    """Raises ArgumentError unless the value is a whole number of at least `least`."""
    check_value(name, value, Annotated[int, Field(ge=least), Expected(f"a whole number of at least {least}")])
