"""RunSettings: all that defines a run, as plain values that can be stored, compared and repeated."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields
from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from metawrap.data import DATASETS
from metawrap.errors import ArgumentError, CheckpointError
from metawrap.settings.settings import NormPolicy
from metawrap.settings.validated import Count, Expected, Number, Options, Seed, Several, Switch, Whole, validated

# The name on the command line, and the class in metawrap.methods.
METHODS = {
    "maml++": "MAMLPlusPlus",
    "maml": "MAML",
    "fomaml": "FOMAML",
    "meta-sgd": "MetaSGD",
    "anil": "ANIL",
    "boil": "BOIL",
    "reptile": "Reptile",
    "lstm": "LSTMMetaLearner",
    "r2d2": "R2D2",
    "metaoptnet": "MetaOptNet",
    "logistic": "LogisticRegression",
    "protonet": "ProtoNet",
    "simpleshot": "SimpleShot",
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


def nearest_method(name: str) -> str | None:
    """The method that is most like a name, which may be that of a class, or as recipes' names spell it.

    >>> nearest_method("MAMLPlusPlus"), nearest_method("proto-net"), nearest_method("mamlpp")
    ('maml++', 'protonet', 'maml++')
    """
    spelled = {"mamlpp": "maml++"} | {_plain(kind): each for each, kind in METHODS.items()}
    spelled |= {_plain(each): each for each in METHODS}
    alike = get_close_matches(_plain(name), spelled, 1)
    return spelled[alike[0]] if alike else None


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


Backbone = Literal["conv4", "conv4-strided", "resnet12", "wrn28-10"]
BACKBONES: tuple[str, ...] = get_args(Backbone)
NORMS: tuple[str, ...] = get_args(NormPolicy)

# A resumed run may change these settings: they decide where training runs, which files stay and what is tested.
FREE_ON_RESUME = frozenset(
    {"recipe", "data_root", "stream", "loader_workers", "device", "keep", "ensemble", "test_tasks", "test_norms"}
)

OWN_OBJECTS = (
    "The run was trained by metawrap.train on Python objects of the user's own, which its files do not hold. Give them "
    "again, in Python: metawrap.train(learner, train, ..., out=..., resume=True) continues the run, or returns the "
    "result of a finished one; both put its weights into the learner."
)

# Methods that were under norm="batch" by default in metawrap 0.1.
_ONCE_BATCH = ("maml++", "maml", "fomaml", "meta-sgd", "anil", "boil", "reptile", "lstm")

Text = Annotated[str, Expected("text")]
Keywords = Annotated[dict[str, Any], Expected("a dict of keyword arguments by name")]
Method = Annotated[
    str, Field(pattern=f"^({'|'.join(map(re.escape, METHODS))})$"), Expected(f"one of {', '.join(METHODS)}")
]


@validated
class RunSettings(Options):
    """The settings of `metawrap train`. None means: the default of the data set, method or preset.

    data: the name of a data set, or a folder of class folders. split: see the loader of the data set. resize: see
    `Preprocessing`. normalise: "imagenet" or "none". stream: read images when they are drawn, in `loader_workers`
    processes (0: in this process); neither changes the drawn tasks. targets: target images per class and task.
    model, weights: the user's own network, see `load_network`; it replaces backbone and filters.
    filters: channels of the first block; those of wrn28-10 are fixed.
    train_ways: classes of a training task, for methods that do not use the network's own outputs; None means ways.
    keep: number of the best checkpoints to keep, and of the newest. ensemble: number of the best checkpoints to average
    in the final test (0: none). validation_alone: number of the validation tasks whose targets are also predicted one
    at a time, which tells transductive norms from inductive ones (0: none). test_norms: "all" batch-norm policies in
    the final test, or the run's "own" alone.
    options: further keyword arguments of the method, such as {"msl_epochs": 15}. recipe: the name of the recipe behind
    the settings, for the record alone.

    >>> settings = RunSettings(data="glyphs", ways=5, method="protonet", epochs=2)
    >>> settings.backbone
    'conv4'
    """

    data: Text = "glyphs"
    data_root: Text | None = None
    split: Text | None = None
    image_size: Count | None = None
    resize: Literal["squeeze", "crop"] | None = None
    rotations: Switch | None = None
    normalise: Literal["none", "imagenet"] | None = None
    stream: Switch | None = None
    loader_workers: Whole | None = None
    ways: Several = 5
    train_ways: Several | None = None
    shots: Count = 1
    targets: Count = 1
    method: Method = "maml++"
    preset: Text | None = None
    norm: NormPolicy | None = None
    engine: Text | None = None
    backbone: Backbone = "conv4"
    filters: Count = 64
    model: Text | None = None
    weights: Text | None = None
    inner_steps: Count | None = None
    inner_lr: Number | None = None
    meta_lr: Number | None = None
    options: Keywords = Field(default_factory=dict)
    epochs: Count = 10
    iterations_per_epoch: Count = 50
    tasks_per_batch: Count = 8
    validation_tasks: Several = 200
    validation_alone: Whole = 0
    test_tasks: Several = 600
    test_norms: Literal["all", "own"] = "all"
    seed: Seed = 0
    device: Text = "auto"
    keep: Count = 5
    ensemble: Whole = 0
    recipe: Text | None = None

    def check_together(self) -> None:
        """Raises ArgumentError for weights without a model, filters without effect, or too many targets alone."""
        if self.weights is not None and self.model is None:
            raise ArgumentError("weights: expected a model that they belong to. Name it with --model.")
        if self.backbone == "wrn28-10" and self.filters != 64:
            raise ArgumentError(
                f"filters: wrn28-10 has 160, 320 and 640 channels, but got {self.filters}. Leave --filters out, "
                "or take --backbone resnet12 or conv4."
            )
        if self.validation_alone > self.validation_tasks:
            raise ArgumentError(
                f"validation_alone: expected at most validation_tasks={self.validation_tasks}, but got "
                f"{self.validation_alone}. Use fewer, or more --validation-tasks."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which JSON and `torch.load(weights_only=True)` can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> RunSettings:
        """The settings from the values of `to_dict`. Raises CheckpointError if a name is unknown, as another version of
        metawrap may have written it, or a value is of the wrong type or range.
        """
        if "objects" in stored:
            raise CheckpointError(OWN_OBJECTS)
        if unknown := sorted(set(stored) - {each.name for each in fields(cls)}):
            raise CheckpointError(
                f"The stored settings have '{unknown[0]}', which this metawrap does not know. "
                "Use the metawrap version that wrote them."
            )
        try:
            return cls(**_with_former_norm(stored))
        except ArgumentError as error:
            raise CheckpointError(
                f"The stored settings are damaged ({error}) Start again with another --out."
            ) from error

    def check_resumes(self, stored: Mapping[str, Any], may_move: bool = True) -> None:
        """Checks that a run with the `stored` settings may continue with these, maybe for more epochs. Raises
        CheckpointError if a setting that training depends on differs; the error names it and both values.

        Args:
            may_move: whether a folder of images may have another path.
        """
        stored = _with_former_norm(stored)
        moved = may_move and not {self.data, stored.get("data")} & set(DATASETS)
        refuse_changes(stored, self.to_dict(), FREE_ON_RESUME | ({"data"} if moved else set()))


def refuse_changes(stored: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str]) -> None:
    """Raises CheckpointError if a setting that is not free differs from the stored one, or the epochs are fewer."""
    for name, value in now.items():
        before = stored.get(name)
        longer = name == "epochs" and isinstance(before, int) and before < value
        if name not in free and before != value and not longer:
            raise CheckpointError(
                f"{name}: the run was started with {before!r}, but is resumed with {value!r}. Leave it out to continue "
                "the run as it was, or start a new one with another --out."
                + (" More epochs extend the run." if name == "epochs" else "")
            )


def _with_former_norm(stored: Mapping[str, Any]) -> Mapping[str, Any]:
    """Stored settings that mean now what they meant when they were written."""
    # Records without "weights" are older than the default norm="support" of methods with an inner loop.
    if "weights" in stored or stored.get("norm") is not None or stored.get("preset") == "paper":
        return stored
    # "maml++" is the default in records that lack the method.
    return {**stored, "norm": "batch"} if stored.get("method", "maml++") in _ONCE_BATCH else stored
