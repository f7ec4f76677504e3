"""RunSettings: everything that defines a run, as plain values, so that it can be stored, compared and repeated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from metawrap.errors import ArgumentError, CheckpointError

# By the name on the command line: the class in metawrap.methods.
METHODS = {
    "maml++": "MAMLPlusPlus",
    "maml": "MAML",
    "fomaml": "FOMAML",
    "meta-sgd": "MetaSGD",
    "anil": "ANIL",
    "reptile": "Reptile",
    "lstm": "LSTMMetaLearner",
    "r2d2": "R2D2",
    "metaoptnet": "MetaOptNet",
    "protonet": "ProtoNet",
    "matchingnet": "MatchingNet",
    "relationnet": "RelationNet",
    "siamese": "SiameseNet",
    "mann": "MANN",
    "metanet": "MetaNet",
    "memorymodule": "MemoryModule",
    "statistician": "NeuralStatistician",
    "fine-tune": "FineTune",
    "multi-task": "MultiTask",
    "zero-step": "ZeroStep",
}
BACKBONES = ("conv4", "conv4-strided")
NORMS = ("batch", "running", "support")

# These may differ when a run is resumed: they change where training runs, what is kept and what is tested.
FREE_ON_RESUME = frozenset(
    {"recipe", "data_root", "stream", "loader_workers", "device", "keep", "ensemble", "test_tasks", "test_norms"}
)

_AT_LEAST = {
    "ways": 2,
    "train_ways": 2,
    "shots": 1,
    "targets": 1,
    "filters": 1,
    "inner_steps": 1,
    "epochs": 1,
    "iterations_per_epoch": 1,
    "tasks_per_batch": 1,
    "validation_tasks": 2,
    "test_tasks": 2,
    "keep": 1,
    "ensemble": 0,
    "loader_workers": 0,
}


@dataclass(frozen=True)
class RunSettings:
    """What `metawrap train` needs to know. None means: the default of the data set, method or preset.

    data: the name of a data set, or a folder of class folders. split: see the loader of the data set. normalise:
    "imagenet" or "none". stream: read images when they are drawn, in loader_workers processes (0: in this one); neither
    changes what is drawn. targets: target images per class and task.
    model: "package.module:factory" of the user's own network; it replaces backbone and filters.
    train_ways: classes of a training task, for methods that do not use the network's own outputs; ways if None.
    keep: how many of the best checkpoints stay, and how many of the newest. ensemble: how many of the best are averaged
    in the final test (0: none). test_norms: "all" batch-norm policies in it, or the run's "own" alone.
    options: further keyword arguments of the method, such as {"msl_epochs": 15}. recipe: where the settings are
    from, for the record alone.
    """

    data: str = "glyphs"
    data_root: str | None = None
    split: str | None = None
    image_size: int | None = None
    rotations: bool | None = None
    normalise: str | None = None
    stream: bool | None = None
    loader_workers: int | None = None
    ways: int = 5
    train_ways: int | None = None
    shots: int = 1
    targets: int = 1
    method: str = "maml++"
    preset: str | None = None
    norm: str | None = None
    engine: str | None = None
    backbone: str = "conv4"
    filters: int = 64
    model: str | None = None
    inner_steps: int | None = None
    inner_lr: float | None = None
    meta_lr: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    epochs: int = 10
    iterations_per_epoch: int = 50
    tasks_per_batch: int = 8
    validation_tasks: int = 200
    test_tasks: int = 600
    test_norms: str = "all"
    seed: int = 0
    device: str = "auto"
    keep: int = 5
    ensemble: int = 0
    recipe: str | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        for name, least in _AT_LEAST.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ArgumentError(f"{name}: expected at least {least}, but got {getattr(self, name)}.")
        choices = {
            "method": tuple(METHODS),
            "backbone": BACKBONES,
            "norm": (None, *NORMS),
            "normalise": (None, "none", "imagenet"),
            "test_norms": ("all", "own"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                listed = ", ".join(str(choice) for choice in allowed if choice)
                raise ArgumentError(f"{name}: expected one of {listed}, but got '{getattr(self, name)}'.")
        if self.seed < 0:
            raise ArgumentError(f"seed: expected 0 or more, but got {self.seed}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values only: fit for JSON and for `torch.load(weights_only=True)`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> RunSettings:
        """The settings that `to_dict` gave.

        Raises:
            CheckpointError: a name is unknown, as when another version of metawrap wrote them.
        """
        unknown = sorted(set(stored) - {each.name for each in fields(cls)})
        if unknown:
            raise CheckpointError(
                f"The stored settings have '{unknown[0]}', which this metawrap does not know. "
                "Use the metawrap version that wrote them."
            )
        return cls(**stored)

    def check_resumes(self, stored: Mapping[str, Any]) -> None:
        """Checks that a run with the `stored` settings may be continued with these.

        Raises:
            CheckpointError: a setting differs that training depends on; names it and both values.
        """
        for name, value in self.to_dict().items():
            if name not in FREE_ON_RESUME and stored.get(name) != value:
                raise CheckpointError(
                    f"{name}: the run was started with {stored.get(name)!r}, but is resumed with {value!r}. "
                    "Leave it out to continue the run as it was, or start a new one with another --out."
                )


_KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "str": ("text", (str,)),
    "int": ("a whole number", (int,)),
    "float": ("a number", (int, float)),
    "bool": ("True or False", (bool,)),
    "dict[str, Any]": ("a dict of keyword arguments", (dict,)),
}


def _check_types(settings: RunSettings) -> None:
    """Raises ArgumentError where a value is not of the type that its field has: a recipe or file can hold anything."""
    for each in fields(settings):
        value, (kind, optional, _) = getattr(settings, each.name), str(each.type).partition(" | None")
        words, types = _KINDS[kind]
        right = isinstance(value, types) and (bool in types or not isinstance(value, bool))
        if not right and not (value is None and optional):
            raise ArgumentError(f"{each.name}: expected {words}, but got {type(value).__name__} {value!r:.60}.")
        if isinstance(value, dict) and (bad := [key for key in value if not isinstance(key, str)]):
            raise ArgumentError(f"{each.name}: expected names of keyword arguments, but got the key {bad[0]!r:.60}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise ArgumentError(f"{each.name}: expected a finite number, but got {value}.")
