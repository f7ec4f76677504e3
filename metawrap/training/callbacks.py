"""Callbacks: the user's own code after each epoch of a run, with a way to stop it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metawrap.errors import ArgumentError
from metawrap.settings.validated import Count, check_value
from metawrap.tasks import describe_value
from metawrap.training.checkpoints import best_epochs, is_validated

_METHODS = ("on_train_start", "on_epoch_end", "on_train_end")


@dataclass
class TrainingState:
    """A run as its callbacks see it.

    learner: the live learner. out: the run's folder. epochs: planned. history: the lines of log.jsonl so far, one dict
    per finished epoch. insight: the last epoch's line of insight.jsonl. result: the content of result.json, from
    `on_train_end` on; None where training was interrupted or failed. stopped: the reason that `stop` was given.
    """

    learner: Any
    out: Path
    epochs: int
    history: list[dict[str, Any]]
    insight: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] | None = None
    stopped: str | None = None

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return len(self.history)

    @property
    def record(self) -> dict[str, Any]:
        """The last epoch's line of the log: "train_loss", "validation_accuracy", "validation_metrics", ..."""
        return self.history[-1]

    def stop(self, reason: str = "a callback stopped it") -> None:
        """Ends training after this epoch; the final test follows as usual."""
        self.stopped = reason


class Callback:
    """Base of callbacks; each method may be left out. Of several processes, the first alone calls them.

    An exception of a callback ends the run, after its checkpoint was saved, and reaches the caller.
    """

    def on_train_start(self, state: TrainingState) -> None:
        """Before the first epoch, and again when the run is resumed; `state.history` tells which."""

    def on_epoch_end(self, state: TrainingState) -> None:
        """After validation, before the checkpoint: changes of the learner are in it."""

    def on_train_end(self, state: TrainingState) -> None:
        """At the end, after the final test; also after an error, then without `state.result`."""


class EarlyStopping(Callback):
    """Stops when validation has not improved for `patience` epochs, by the measure that chooses the best checkpoint.

    >>> EarlyStopping(patience=5).patience
    5
    """

    def __init__(self, patience: int = 10) -> None:
        check_value("patience", patience, Count)
        self.patience = patience

    def on_epoch_end(self, state: TrainingState) -> None:
        """Stops the run if the best epoch is too long ago. Raises ArgumentError where nothing is validated."""
        if not is_validated(state.record):
            raise ArgumentError("callbacks: EarlyStopping needs validation tasks, but the run has none. Give some.")
        best = best_epochs(state.history, 1)[0]
        if state.epoch - best >= self.patience:
            state.stop(f"validation has not improved since epoch {best}")


def check_callbacks(callbacks: Sequence[Any]) -> None:
    """Raises ArgumentError for one that has none of the methods."""
    if not isinstance(callbacks, list | tuple):
        raise ArgumentError(f"callbacks: expected a list of callbacks, but got {describe_value(callbacks)}.")
    for each in callbacks:
        if isinstance(each, type) or not any(callable(getattr(each, name, None)) for name in _METHODS):
            raise ArgumentError(
                f"callbacks: expected objects with {', '.join(_METHODS)}, at least one of them, but got "
                f"{describe_value(each)}. Derive a class from metawrap.training.Callback, and make one."
            )
