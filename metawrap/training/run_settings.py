"""RunSettings: all that defines a run, as plain values that can be stored, compared and repeated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from metawrap.errors import ArgumentError, CheckpointError

# The name on the command line, and the class in metawrap.methods.
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

# A resumed run may change these settings: they decide where training runs, which files stay and what is tested.
FREE_ON_RESUME = frozenset(
    {"recipe", "data_root", "stream", "loader_workers", "device", "keep", "ensemble", "test_tasks", "test_norms"}
)

_AT_LEAST = {"ensemble": 0, "loader_workers": 0, "ways": 2, "train_ways": 2, "validation_tasks": 2, "test_tasks": 2}
_AT_LEAST |= dict.fromkeys(
    ("shots", "targets", "filters", "inner_steps", "epochs", "iterations_per_epoch", "tasks_per_batch", "keep"), 1
)
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "method": tuple(METHODS),
    "backbone": BACKBONES,
    "norm": (None, *NORMS),
    "normalise": (None, "none", "imagenet"),
    "test_norms": ("all", "own"),
}


@dataclass(frozen=True)
class RunSettings:
    """The settings of `metawrap train`. None means: the default of the data set, method or preset.

    data: the name of a data set, or a folder of class folders. split: see the loader of the data set. normalise:
    "imagenet" or "none". stream: read images when they are drawn, in `loader_workers` processes (0: in this process);
    neither changes the drawn tasks. targets: target images per class and task.
    model: "package.module:factory" of the user's own network; replaces backbone and filters.
    train_ways: classes of a training task, for methods that do not use the network's own outputs; None means ways.
    keep: number of the best checkpoints to keep, and of the newest. ensemble: number of the best checkpoints to average
    in the final test (0: none). test_norms: "all" batch-norm policies in the final test, or the run's "own" alone.
    options: further keyword arguments of the method, such as {"msl_epochs": 15}. recipe: the name of the recipe behind
    the settings, for the record alone.

    >>> settings = RunSettings(data="glyphs", ways=5, method="protonet", epochs=2)
    >>> settings.backbone
    'conv4'
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
                raise ArgumentError(f"{name}: expected at least {least}, but got {value}.")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                listed = ", ".join(choice for choice in allowed if choice)
                raise ArgumentError(f"{name}: expected one of {listed}, but got '{getattr(self, name)}'.")
        if self.seed < 0:
            raise ArgumentError(f"seed: expected 0 or more, but got {self.seed}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which JSON and `torch.load(weights_only=True)` can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> RunSettings:
        """The settings from the values of `to_dict`. Raises CheckpointError if a name is unknown; another version of
        metawrap may have written it.
        """
        if unknown := sorted(set(stored) - {each.name for each in fields(cls)}):
            raise CheckpointError(
                f"The stored settings have '{unknown[0]}', which this metawrap does not know. "
                "Use the metawrap version that wrote them."
            )
        return cls(**stored)

    def check_resumes(self, stored: Mapping[str, Any]) -> None:
        """Checks that a run with the `stored` settings may continue with these. Raises CheckpointError if a setting
        that training depends on differs; the error names it and both values.
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
    """Raises ArgumentError for a value that differs from its field's type: a recipe or a file can hold anything."""
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
