"""The files of a run as typed values: the one place where JSON that may be a stranger's gets its form.

pydantic checks it strictly. Fields that are not read are left as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from metawrap.data.text_files import read_regular
from metawrap.errors import CheckpointError
from metawrap.settings.validated import Count, Seed, Whole, in_words

MAX_BYTES = 2**28  # The insight of a run of a hundred epochs of ResNet-18 has some megabytes.
T = TypeVar("T", bound=BaseModel)
Row = list[float | None]


class _Stored(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class RunFile(_Stored):
    """run.json. seeds: of a run over several."""

    settings: dict[str, Any]
    seeds: Annotated[list[Seed], Field(min_length=1, max_length=10_000)] | None


class DataFile(_Stored):
    """data.json: by part, each class with its fingerprint. preprocessing: of its pictures; None in older runs."""

    train: dict[str, str]
    validation: dict[str, str]
    test: dict[str, str]
    preprocessing: dict[str, Any] | None = None


class LogLine(_Stored):
    """A line of log.jsonl, and of the history in a checkpoint."""

    validation_accuracy: float | None
    epoch: Count | None = None
    iteration: Whole | None = None
    validation_loss: float | None = None
    validation_interval: float | None = None
    validation_alone_accuracy: float | None = None
    train_loss: float | None = None
    train_accuracy: float | None = None
    learning_rate: float | None = None
    skipped_steps: Whole = 0
    seconds: float | None = None
    step_seconds: float | None = None
    peak_mib: float | None = None


class _Quartiles(_Stored):
    median: Row


class InsightLine(_Stored):
    """A line of insight.jsonl, of which TensorBoard shows these."""

    epoch: Count
    step_losses: Row | None = None
    step_weights: Row | None = None
    rates: dict[str, Row | _Quartiles] | None = None


class _Score(_Stored):
    accuracy: float | None
    interval: float | None = None
    loss: float | None = None


class _Test(_Stored):
    tasks: Count
    epoch: Count
    ensemble_epochs: list[Count]
    norms: Annotated[dict[str, Annotated[dict[str, _Score], Field(min_length=1)]], Field(min_length=1)]


class ResultFile(_Stored):
    """result.json of one run. test: None of a run of the user's own objects without test tasks."""

    settings: dict[str, Any]
    test: _Test | None = None
    trained_norm: str


class CheckpointForm(_Stored):
    """The content of a checkpoint but for its format, version and checksum."""

    settings: dict[str, Any]
    learner: dict[str, Any]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any] | None
    rng: dict[str, Any]
    history: list[LogLine]
    seconds: float


def read_typed(path: Path, form: type[T], remedy: str) -> T:
    """The content of a JSON file.

    Raises:
        OSError: it cannot be read. CheckpointError: it has another form.
    """
    try:
        return form.model_validate_json(read_regular(path, MAX_BYTES))
    except ValidationError as error:
        raise CheckpointError(f"'{path}' is damaged ({in_words(error)}). {remedy}") from error


def has_form(content: Any, form: type[BaseModel]) -> bool:
    """Whether a value has the form."""
    try:
        form.model_validate(content)
    except ValidationError:
        return False
    return True
