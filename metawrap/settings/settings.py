"""Presets, and the check of every keyword argument, before anything is built."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from metawrap.errors import ArgumentError
from metawrap.inner_loop.update_rules import UpdateRule

NormPolicy = Literal["batch", "running", "support"]
HeadInit = Literal["learned", "zeros", "random", "stored"]
Memory = Literal["unrolled", "flat"]
WorkersIn = Literal["threads", "processes"]
InnerOptimizerName = Literal["sgd", "adam"]

_OFF: dict[str, Any] = {
    "inner_steps": 5,
    "inner_lr": 0.1,
    "multi_step_loss": False,
    "msl_epochs": 10,
    "first_order_epochs": 0,
    "per_step_norm_statistics": False,
    "per_step_norm_affine": False,
    "learn_inner_lr": False,
    "cosine_annealing": False,
    "meta_lr": 1e-3,
    "min_meta_lr": 1e-5,
    "epochs": 100,
    "iterations_per_epoch": 500,
    "norm": "batch",
    "betas": (0.9, 0.999),
}
_RULE = UpdateRule()
_INNER: dict[str, Any] = {
    "inner_optimizer": _RULE.name,
    "inner_momentum": _RULE.momentum,
    "inner_betas": _RULE.betas,
    "inner_eps": _RULE.eps,
    "workers_in": "threads",
}
_ALL_PARTS = dict.fromkeys(
    ("multi_step_loss", "per_step_norm_statistics", "per_step_norm_affine", "learn_inner_lr", "cosine_annealing"), True
)
PRESETS: dict[str, dict[str, Any]] = {
    "maml": _OFF,
    "fomaml": _OFF | {"first_order_epochs": math.inf},
    # Derivative-order annealing is off in every configuration that the authors released, and evaluation is
    # transductive.
    "authors_code": _OFF | _ALL_PARTS,
    "paper": _OFF | _ALL_PARTS | {"first_order_epochs": 50, "epochs": 150, "norm": "running", "betas": (0.9, 0.99)},
    "meta_sgd": _OFF | {"inner_steps": 1, "learn_inner_lr": True},
    "reptile": _OFF | {"first_order_epochs": math.inf, "meta_lr": 1.0, "linear_annealing": True},
    "lstm": _OFF | {"first_order_epochs": math.inf, "inner_lr": 0.01},
}
# What these say holds for one method only, which takes no other.
OF_ONE_METHOD = frozenset({"meta_sgd", "reptile", "lstm"})


@dataclass(frozen=True, kw_only=True)
class OuterSettings:
    """The resolved keyword arguments that every learner has; see `MAMLPlusPlus` for their meaning."""

    cosine_annealing: bool
    meta_lr: float
    min_meta_lr: float
    epochs: int
    iterations_per_epoch: int
    norm: NormPolicy
    betas: tuple[float, float]
    max_grad_norm: float | None
    max_grad_value: float | None
    tasks_per_backward: int | None
    max_skipped_steps: int
    detect_anomaly: bool
    allocator: bool

    @property
    def default_steps(self) -> int | None:
        """Inner steps where a caller names none; None for a method without an inner loop."""
        return None

    @property
    def in_threads(self) -> bool:
        """Whether tasks may be solved in several threads."""
        return False

    def as_dict(self) -> dict[str, Any]:
        """All settings by keyword name."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class TunedSettings(OuterSettings):
    """Those of a method that takes gradient steps on a part of the network for each task."""

    inner_steps: int

    @property
    def default_steps(self) -> int | None:
        """Inner steps where a caller names none."""
        return self.inner_steps


@dataclass(frozen=True, kw_only=True)
class Settings(OuterSettings):
    """The resolved keyword arguments of a gradient-based learner; see `MAMLPlusPlus` for their meaning."""

    inner_steps: int
    inner_lr: float
    multi_step_loss: bool
    msl_epochs: int
    first_order_epochs: float
    per_step_norm_statistics: bool
    per_step_norm_affine: bool
    learn_inner_lr: bool
    adapt_norm: bool
    inner_optimizer: InnerOptimizerName
    inner_momentum: float
    inner_betas: tuple[float, float]
    inner_eps: float
    inner_max_grad_norm: float | None
    inner_max_grad_value: float | None
    head_init: HeadInit
    mask_unused_outputs: bool
    memory: Memory
    workers: int | str
    workers_in: str
    channels_last: bool
    tune: bool
    cuda_graphs: bool

    @property
    def update_rule(self) -> UpdateRule:
        """The update of an inner step."""
        return UpdateRule(self.inner_optimizer, self.inner_momentum, self.inner_betas, self.inner_eps)

    @property
    def step_loss_epochs(self) -> int:
        """Epochs of the multi-step loss; 0 when it is off."""
        return self.msl_epochs if self.multi_step_loss else 0

    @property
    def default_steps(self) -> int:
        """Inner steps where a caller names none."""
        return self.inner_steps

    @property
    def in_threads(self) -> bool:
        """Whether tasks may be solved in several threads."""
        return (self.workers != 1 and self.workers_in == "threads") or self.tune


OUTER_DEFAULTS: dict[str, Any] = {
    "cosine_annealing": True,
    "meta_lr": 1e-3,
    "min_meta_lr": 1e-5,
    "epochs": 100,
    "iterations_per_epoch": 500,
    "norm": "running",
    "betas": (0.9, 0.999),
    "max_grad_norm": None,
    "max_grad_value": None,
    "tasks_per_backward": None,
    "max_skipped_steps": 20,
    "detect_anomaly": False,
    "allocator": True,
}


def resolve_outer(given: Mapping[str, Any], defaults: Mapping[str, Any], own_outer: Collection[str]) -> OuterSettings:
    """The keywords of a method without an inner loop, where None means the default.

    Raises:
        ArgumentError: a value of the wrong type, range or combination.
    """
    explicit = {name: _plain(value) for name, value in given.items() if value is not None}
    _refuse_replaced(explicit, own_outer)
    values = OUTER_DEFAULTS | dict(defaults) | explicit
    for name, value in values.items():
        _check(name, value)
    return OuterSettings(**_consistent(values, explicit))


def check_preset(given: str | None, default: str, method: str) -> str:
    """The name of the preset that a method was given, or its own.

    Raises:
        ArgumentError: it is unknown, or belongs to another method.
    """
    preset = default if given is None else given
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ArgumentError(f"preset: expected one of {', '.join(map(repr, PRESETS))}, but got {preset!r}.")
    if preset != default and {preset, default} & OF_ONE_METHOD:
        raise ArgumentError(f"preset: {preset!r} is no preset of {method}. Leave it out, or take its own method.")
    return preset


def resolve(
    preset: str, given: Mapping[str, Any], own_outer: Collection[str] = (), kind: type[Settings] = Settings
) -> Settings:
    """The preset's values, with every argument that is not None in its place.

    Args:
        given: every keyword; None means the preset's value.
        own_outer: "optimizer" or "scheduler" or both, where the user brings one.
        kind: which settings; `given` has a key for each of their fields.
    Raises:
        ArgumentError: a value of the wrong type, range or combination.
    """
    explicit = {name: _plain(value) for name, value in given.items() if value is not None}
    if explicit.get("adapt_norm") and explicit.get("per_step_norm_affine"):
        raise ArgumentError(
            "adapt_norm=True adapts one scale and shift per norm in the inner loop, so they cannot also be per step. "
            "Leave out per_step_norm_affine, or set adapt_norm=False."
        )
    _refuse_replaced(explicit, own_outer)
    values: dict[str, Any] = dict.fromkeys(given) | _INNER | PRESETS[preset] | explicit
    if values["adapt_norm"]:
        values["per_step_norm_affine"] = False
    for name, value in values.items():
        _check(name, value)
    for name, rule in _BELONGS_TO_RULE.items():
        if name in explicit and explicit[name] and values["inner_optimizer"] != rule:
            raise ArgumentError(
                f'{name}: has no effect with inner_optimizer="{values["inner_optimizer"]}". Leave it out, or pass '
                f'inner_optimizer="{rule}".'
            )
    if values["tune"] and (chosen := [name for name, plain in _TUNED.items() if explicit.get(name) != plain]):
        raise ArgumentError(f"{chosen[0]}: is chosen by measurement with tune=True. Leave it out, or tune=True.")
    return kind(**_consistent(values, explicit))


def _refuse_replaced(explicit: Mapping[str, Any], own_outer: Collection[str]) -> None:
    for name in _REPLACED.get("optimizer" if "optimizer" in own_outer else "scheduler", ()) if own_outer else ():
        if explicit.get(name):
            raise ArgumentError(
                f"{name}: belongs to the built-in optimizer and its schedule, but {' and '.join(own_outer)}= was "
                f"given. "
                f"Set it there, and leave {name} out."
            )


def _consistent(values: dict[str, Any], explicit: Mapping[str, Any]) -> dict[str, Any]:
    """The values as settings hold them; raises ArgumentError where two do not go together."""
    for name, switch in _BELONGS.items():
        if name in explicit and not values[switch]:
            raise ArgumentError(f"{name}: has no effect with {switch}=False. Leave it out, or pass {switch}=True.")
    if "min_meta_lr" not in explicit:
        values["min_meta_lr"] = min(values["min_meta_lr"], values["meta_lr"])
    if "workers_in" in explicit and values["workers"] == 1:
        raise ArgumentError('workers_in: has no effect with workers=1. Leave it out, or pass workers=2 or "auto".')
    if values["detect_anomaly"] and values.get("cuda_graphs"):
        raise ArgumentError("detect_anomaly: has no effect on what is replayed. Leave it out, or cuda_graphs=True.")
    if values.get("cuda_graphs") and values.get("memory") == "flat":
        raise ArgumentError(
            'memory: expected "unrolled" with cuda_graphs=True, but got "flat", which reads the state of the random '
            "generators at every inner step: that cannot be recorded. Leave one of them out."
        )
    for name in {"betas", "inner_betas"} & values.keys():
        values[name] = tuple(values[name])
    if values["min_meta_lr"] > values["meta_lr"]:
        raise ArgumentError(
            f"min_meta_lr: expected at most meta_lr={values['meta_lr']}, but got {values['min_meta_lr']}."
        )
    return values


def _check(name: str, value: Any) -> None:
    wanted = _WANTED[name]
    if not wanted[1](value):
        raise ArgumentError(f"{name}: expected {wanted[0]}, but got {value!r}.")


_BELONGS_TO_RULE = {"inner_momentum": "sgd", "inner_betas": "adam", "inner_eps": "adam"}
_TUNED = {"workers": 1, "workers_in": None, "channels_last": False}
_BELONGS = {"msl_epochs": "multi_step_loss", "min_meta_lr": "cosine_annealing"}
_REPLACED = {
    "optimizer": ("meta_lr", "min_meta_lr", "betas", "cosine_annealing", "linear_annealing"),
    "scheduler": ("min_meta_lr", "cosine_annealing", "linear_annealing"),
}


def _count(lowest: int) -> tuple[str, Any]:
    return f"a whole number of at least {lowest}", lambda v: _is_int(v) and v >= lowest


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_SWITCH = ("True or False", lambda v: isinstance(v, bool))
_POSITIVE = ("a positive number", lambda v: _is_number(v) and v > 0)
_CLIP = ("a positive number or None", lambda v: v is None or (_is_number(v) and v > 0))
_BETAS = (
    "two numbers from 0 up to, not including, 1",
    lambda v: isinstance(v, tuple | list) and len(v) == 2 and all(_is_number(b) and 0 <= b < 1 for b in v),
)


def _one_of(choices: Any) -> tuple[str, Any]:
    names = get_args(choices)
    listed = f"{', '.join(map(repr, names[:-1]))} or {names[-1]!r}"
    return listed, lambda v: isinstance(v, str) and v in names


_WANTED: dict[str, tuple[str, Any]] = {
    "inner_steps": _count(1),
    "inner_lr": ("a finite number", _is_number),
    "multi_step_loss": _SWITCH,
    "msl_epochs": _count(0),
    "first_order_epochs": (
        "a whole number of at least 0, or math.inf",
        lambda v: v == math.inf or (_is_int(v) and v >= 0),
    ),
    "per_step_norm_statistics": _SWITCH,
    "per_step_norm_affine": _SWITCH,
    "learn_inner_lr": _SWITCH,
    "cosine_annealing": _SWITCH,
    "meta_lr": _POSITIVE,
    "min_meta_lr": ("a number of at least 0", lambda v: _is_number(v) and v >= 0),
    "epochs": _count(1),
    "iterations_per_epoch": _count(1),
    "norm": _one_of(NormPolicy),
    "betas": _BETAS,
    "adapt_norm": _SWITCH,
    "max_grad_norm": _CLIP,
    "max_grad_value": _CLIP,
    "tasks_per_backward": (
        "a whole number of at least 1, or None",
        lambda v: v is None or (_is_int(v) and v >= 1),
    ),
    "max_skipped_steps": _count(1),
    "detect_anomaly": _SWITCH,
    "inner_optimizer": _one_of(InnerOptimizerName),
    "inner_momentum": ("a number from 0 up to, not including, 1", lambda v: _is_number(v) and 0 <= v < 1),
    "inner_betas": _BETAS,
    "inner_eps": _POSITIVE,
    "first_order": _SWITCH,
    "inner_max_grad_norm": _CLIP,
    "inner_max_grad_value": _CLIP,
    "head_init": _one_of(HeadInit),
    "mask_unused_outputs": _SWITCH,
    "memory": _one_of(Memory),
    "workers": ('a whole number of at least 1, or "auto"', lambda v: v == "auto" or (_is_int(v) and v >= 1)),
    "workers_in": _one_of(WorkersIn),
    "channels_last": _SWITCH,
    "tune": _SWITCH,
    "allocator": _SWITCH,
    "cuda_graphs": _SWITCH,
    "linear_annealing": _SWITCH,
    "inner_batch_size": (
        "a whole number of at least 1, or None",
        lambda v: v is None or (_is_int(v) and v >= 1),
    ),
    "evaluation_steps": _count(1),
    "hidden_size": _count(1),
}


def check_choice(name: str, value: Any) -> None:
    """Checks one argument that is also taken outside the constructor (`norm=` of `evaluate`, say)."""
    _check(name, value)


def check_positive(name: str, value: Any) -> None:
    """Checks a method's own argument: a finite number above 0."""
    if not _POSITIVE[1](_plain(value)):
        raise ArgumentError(f"{name}: expected {_POSITIVE[0]}, but got {value!r}.")


def check_switch(name: str, value: Any) -> None:
    """Raises ArgumentError unless the value is True or False."""
    if not _SWITCH[1](value):
        raise ArgumentError(f"{name}: expected {_SWITCH[0]}, but got {value!r}.")


def check_whole(name: str, value: Any, least: int) -> None:
    """Raises ArgumentError unless the value is a whole number of at least `least`."""
    if not _is_int(value) or value < least:
        raise ArgumentError(f"{name}: expected a whole number of at least {least}, but got {value!r}.")


def check_number(name: str, value: Any, low: float, high: float = math.inf, *, open_below: bool = False) -> None:
    """Raises ArgumentError unless the value is a finite number in low..high, where low itself may be left out."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high or (open_below and value == low) or value == math.inf:
        bounds = f"{'above' if open_below else 'of at least'} {low:g}"
        bounds += "" if high == math.inf else f" and at most {high:g}"
        raise ArgumentError(f"{name}: expected a number {bounds}, but got {value!r}.")
