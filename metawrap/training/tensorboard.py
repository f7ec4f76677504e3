"""Scalars of a run for TensorBoard, one point an epoch: the log, and the learned rates by layer and inner step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from metawrap.errors import MetaWrapError

FOLDER = "tensorboard"
# By the name in the log: where TensorBoard shows it.
_TAGS = {
    "train_loss": "loss/train",
    "validation_loss": "loss/validation",
    "train_accuracy": "accuracy/train",
    "validation_accuracy": "accuracy/validation",
    "learning_rate": "run/outer_learning_rate",
    "skipped_steps": "run/skipped_steps",
    "step_seconds": "run/step_seconds",
    "peak_mib": "run/peak_mib",
}


def check_tensorboard() -> None:
    """Raises MetaWrapError where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    except ImportError as error:
        raise MetaWrapError(
            'tensorboard: logging needs the package tensorboard: pip install "metawrap[tensorboard]". '
            f"Or leave --tensorboard out, which changes nothing else ({error})."
        ) from error


def logs_to_tensorboard(run: Path) -> bool:
    """Whether the run in this folder has been logged."""
    return any((run / FOLDER).glob("events.out.tfevents.*"))


class TensorBoard:
    """The event files of one run, in its folder. Use as a context manager.

    What an earlier start wrote of epochs that are trained again is purged, and epochs that it did not write, as it was
    not asked to, are filled in, so that each epoch is there once.

    Args:
        run: the run's folder.
        history: the log of the epochs before this start.
        insight: of the same epochs, as far as there is any.
    """

    def __init__(self, run: Path, history: Sequence[dict[str, Any]], insight: Sequence[dict[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        logged = logs_to_tensorboard(run)
        purged = len(history) + 1 if logged else None
        self._writer: Any = SummaryWriter(str(run / FOLDER), purge_step=purged)
        if not logged:
            by_epoch = {record["epoch"]: record for record in insight}
            for record in history:
                self.write(record, by_epoch.get(record["epoch"], {}))

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def write(self, record: dict[str, Any], insight: dict[str, Any]) -> None:
        """Adds an epoch, and sees that it reaches the file: the checkpoint of the epoch comes next."""
        for tag, value in _scalars(record, insight):
            self._writer.add_scalar(tag, value, record["epoch"])
        self._writer.flush()


def _scalars(record: dict[str, Any], insight: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, tag in _TAGS.items():
        if (value := record.get(name)) is not None:
            yield tag, value
    for kind, values in (("step_losses", "target_loss"), ("step_weights", "target_loss_weight")):
        for step, value in enumerate(insight.get(kind, []), start=1):
            if value is not None:
                yield f"{values}/step {step}", value
    for layer, rates in insight.get("rates", {}).items():
        rows = rates["median"] if isinstance(rates, dict) else rates
        for step, value in enumerate(rows, start=1):
            if value is not None:
                yield f"rates/{layer}/step {step}", value
