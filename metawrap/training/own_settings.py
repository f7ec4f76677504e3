"""OwnSettings: what can be stored of a run on the user's own Python objects, to tell it from another run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, ClassVar, Literal

from pydantic import Field

from metawrap.errors import ArgumentError, CheckpointError
from metawrap.settings.validated import Count, CountOrNone, Options, Seed, Whole, validated
from metawrap.training.run_settings import Keywords, Text, refuse_changes

# What a resumed run may change: the files that stay, and the test.
_FREE = frozenset({"keep", "test_tasks", "test_norms", "objects.test"})


@validated
class OwnSettings(Options):
    """The settings of a run of `metawrap.train`. Fields that `RunSettings` has mean the same.

    data: the training tasks, in words. ways, shots, targets, tasks_per_batch: of the sampler of training tasks, None of
    other tasks. validation_tasks, test_tasks: 0 for none. options: the settings of the learner, but those of execution.
    objects: the names of the classes of the user's objects, with counts.
    """

    method: Text
    data: Text
    ways: CountOrNone = None
    shots: CountOrNone = None
    targets: CountOrNone = None
    epochs: Count
    iterations_per_epoch: Count
    tasks_per_batch: CountOrNone = None
    validation_tasks: Whole = 0
    test_tasks: Whole = 0
    test_norms: Literal["all", "own"] = "all"
    seed: Seed = 0
    keep: Count = 5
    options: Keywords = Field(default_factory=dict)
    objects: Keywords = Field(default_factory=dict)

    validation_alone: ClassVar[int] = 0
    ensemble: ClassVar[int] = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which JSON and `torch.load(weights_only=True)` can hold."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> OwnSettings:
        """The settings from the values of `to_dict`. Raises CheckpointError if they are others."""
        if "objects" not in stored:
            raise CheckpointError(
                "The run was made by `metawrap train`, or from RunSettings: go on there, with --resume. Or start a new "
                "run with another out."
            )
        try:
            return cls(**{each.name: stored[each.name] for each in fields(cls) if each.name in stored})
        except (ArgumentError, TypeError) as error:
            raise CheckpointError(f"The stored settings are damaged ({error}) Start again with another out.") from error

    def check_resumes(self, stored: Mapping[str, Any], may_move: bool = True) -> None:
        """As `RunSettings.check_resumes`."""
        refuse_changes(_by_field(stored), _by_field(self.to_dict()), _FREE)


def _by_field(settings: Mapping[str, Any]) -> dict[str, Any]:
    groups = {name: settings.get(name) for name in ("options", "objects")}
    inner = {f"{group}.{name}": each for group, found in groups.items() for name, each in dict(found or {}).items()}
    return {name: value for name, value in settings.items() if name not in groups} | inner
