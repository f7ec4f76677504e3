"""Scalars of a run for TensorBoard, one point per epoch: the log, and the learned rates by layer and inner step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metawrap.errors import MetaWrapError
from metawrap.training.callbacks import Callback, TrainingState
from metawrap.training.run_folder import read_insight

FOLDER = "tensorboard"
# The name in the log, and the tag in TensorBoard.
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
    """Raises MetaWrapError if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    except ImportError as error:
        raise MetaWrapError(
            'tensorboard: logging needs the package tensorboard: pip install "metawrap[tensorboard]". '
            f"Or leave --tensorboard out, which changes nothing else ({error})."
        ) from error


def logs_to_tensorboard(run: Path) -> bool:
    """Whether the run in this folder has event files."""
    return any((run / FOLDER).glob("events.out.tfevents.*"))


class TensorBoard(Callback):
    """Writes the event files of one run, in its folder.

    Each epoch stands there once: points of epochs that are trained again are purged, and epochs that were trained
    without TensorBoard are filled in. Raises MetaWrapError if TensorBoard is not installed.
    """

    def __init__(self) -> None:
        check_tensorboard()
        self._writer: Any = None

    def on_train_start(self, state: TrainingState) -> None:
        """Opens the files, and fills in earlier epochs."""
        from torch.utils.tensorboard import SummaryWriter

        logged = logs_to_tensorboard(state.out)
        purged = state.epoch + 1 if logged else None
        self._writer = SummaryWriter(str(state.out / FOLDER), purge_step=purged)
        if not logged:
            by_epoch = {record["epoch"]: record for record in read_insight(state.out, state.epoch)}
            for record in state.history:
                self._write(record, by_epoch.get(record["epoch"], {}))

    def on_epoch_end(self, state: TrainingState) -> None:
        """Adds the epoch and flushes, since its checkpoint is written next."""
        self._write(state.record, state.insight)

    def on_train_end(self, state: TrainingState) -> None:
        """Closes the files."""
        self._writer.close()

    def _write(self, record: dict[str, Any], insight: dict[str, Any]) -> None:
        for tag, value in _scalars(record, insight):
            self._writer.add_scalar(tag, value, record["epoch"])
        self._writer.flush()


def _scalars(record: dict[str, Any], insight: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, tag in _TAGS.items():
        if (value := record.get(name)) is not None:
            yield tag, value
    for name, value in record.get("validation_metrics", {}).items():
        if value is not None:
            yield f"{name}/validation", value
    rows = {"target_loss": insight.get("step_losses", []), "target_loss_weight": insight.get("step_weights", [])}
    for layer, rates in insight.get("rates", {}).items():
        rows[f"rates/{layer}"] = rates["median"] if isinstance(rates, dict) else rates
    for tag, values in rows.items():
        for step, value in enumerate(values, start=1):
            if value is not None:
                yield f"{tag}/step {step}", value
