"""The files of a run: run.json (settings, command), data.json (classes and fingerprints of its data, the
preprocessing), log.jsonl and
insight.jsonl (a line per epoch: the log, and the learner's inner values), checkpoints/, final_insight.json and
result.json (the final test).

The checkpoints decide: each holds the history of all epochs before it, and a resumed run rewrites the log from there.
The log so never shows an epoch that the weights have not seen. The insight would make checkpoints grow, so a resumed
run cuts it to the finished epochs instead; each of its lines is written before the checkpoint of its epoch.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from metawrap.data import Preprocessing
from metawrap.data.text_files import read_regular
from metawrap.errors import CheckpointError, DataError
from metawrap.training.checkpoints import Checkpoint, CheckpointFolder, explained, write_json, write_text
from metawrap.training.data_record import FILE, DataRecord, changed, differences, read_preprocessing, read_record
from metawrap.training.machine import command_line
from metawrap.training.own_settings import OwnSettings
from metawrap.training.progress import say
from metawrap.training.run_lock import RunLock
from metawrap.training.run_settings import RunSettings
from metawrap.training.stored_files import MAX_BYTES, InsightLine, LogLine, ResultFile, RunFile, has_form, read_typed

LOG = "log.jsonl"
INSIGHT = "insight.jsonl"
FINAL_INSIGHT = "final_insight.json"
NO_RECORD = "The run in '{}' has no record of its data (data.json), which metawrap 0.1 did not write."


AnySettings: TypeAlias = RunSettings | OwnSettings


class RunFolder:
    """The files of one run. Nothing is written before `begin`.

    Args:
        path: the folder; `begin` makes it.
        settings: the settings of the run to start or to resume.
    """

    def __init__(self, path: Path, settings: AnySettings) -> None:
        self.path = path
        self.settings = settings
        self.lock = RunLock(path)
        self.checkpoints = CheckpointFolder(
            path / "checkpoints", keep_best=max(settings.keep, settings.ensemble), keep_newest=settings.keep
        )
        self._was_new = False

    def find_start(self, resume: bool) -> Checkpoint | None:
        """The checkpoint to continue from, None to start with the first epoch. Locks a folder that exists; writes
        nothing. Raises CheckpointError if the folder has a run and `resume` is False, or its run has other settings or
        no readable checkpoint, or another process uses the folder.
        """
        self._was_new = not self.path.is_dir()
        refuse_links(self.path)
        # A folder of images may have moved: `check_data` compares its content.
        may_move = resume and read_record(self.path) is not None
        if not resume:
            refuse_existing_run(self.path)
        elif (self.path / "run.json").exists():
            stored = type(self.settings).from_dict(_read_run_file(self.path)[0])
            self.settings.check_resumes(stored.to_dict(), may_move)
        if not self._was_new:
            self.lock.take()
        checkpoint = self.newest_checkpoint() if resume else None
        if checkpoint is not None:
            self.settings.check_resumes(checkpoint.settings, may_move)
        return checkpoint

    def check_data(self, present: DataRecord, way: Preprocessing | None = None) -> None:
        """Raises DataError if a run that goes on was begun with other data, or prepared its pictures in another way."""
        before = None if way is None else read_preprocessing(self.path)
        if before is not None and before != way:
            raise DataError(
                f"The run in '{self.path}' was begun with pictures prepared by {before}, but its network now wants "
                f"{way}. Put its weights back as they were, or train a new run with another --out."
            )
        if (record := read_record(self.path)) is None:
            say(f"{NO_RECORD.format(self.path)} They may have changed since.")
        elif found := differences(record, present):
            raise changed(self.path, found)

    def newest_checkpoint(self) -> Checkpoint | None:
        """The newest readable checkpoint; prints the error of each that is skipped. Raises as `CheckpointFolder`."""
        return self.checkpoints.newest(skipped=lambda error: say(f"Skipped: {error}"))

    def begin(self, history: list[dict[str, Any]], data: Callable[[], Mapping[str, Any]]) -> None:
        """Writes the settings, the data of a run that is new, and log and insight of the epochs in `history`. Raises
        CheckpointError if another process has started a run here since `find_start`, or the folder cannot be written.
        """
        if not self.lock.held:
            with explained(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            self.lock.take()
            if self._was_new:  # A run that is here now belongs to another process.
                refuse_existing_run(self.path)
        for leftover in self.path.glob(".*.tmp"):  # A start that was killed in the middle of a file.
            leftover.unlink(missing_ok=True)
        write_run(self.path, self.settings, None)
        if not history:  # The data of earlier epochs, where they are not on record, may have been others.
            write_json(self.path / FILE, dict(data()))
        write_text(self.path / LOG, "".join(map(_line, history)))
        insight = read_insight(self.path, len(history))
        if insight or (self.path / INSIGHT).exists():
            write_text(self.path / INSIGHT, "".join(map(_line, insight)))

    def append(self, record: dict[str, Any], insight: dict[str, Any]) -> None:
        """Adds a line to the insight and one to the log. Raises CheckpointError if the folder is gone or empty."""
        self._check_is_there()
        for name, content in ((INSIGHT, insight), (LOG, record)):
            path = self.path / name
            with explained(path), open(path, "a", encoding="utf-8", opener=_not_through_a_link) as handle:
                handle.write(_line(content))

    def _check_is_there(self) -> None:
        if not (self.path / "run.json").is_file():
            state = "was emptied" if self.path.is_dir() else "is gone"
            raise CheckpointError(
                f"'{self.path}' {state} while the run trained: it was moved or deleted from outside, and nothing more "
                "was written. Put it back as it was and go on with --resume, or start again."
            )

    def result(self) -> dict[str, Any] | None:
        """The content of result.json if it belongs to exactly these settings, else None."""
        content = read_json(self.path / "result.json")
        if not has_form(content, ResultFile):
            return None
        if content.get("test") is None and isinstance(self.settings, RunSettings):
            return None
        try:
            # Settings that an older metawrap lacked get their defaults in RunSettings.
            same = type(self.settings).from_dict(content["settings"]) == self.settings
        except CheckpointError:
            return None
        return content if same else None

    def write_result(self, result: dict[str, Any], insight: dict[str, Any]) -> None:
        """Writes final_insight.json, then result.json, which marks the run as finished."""
        self._check_is_there()
        write_json(self.path / FINAL_INSIGHT, insight)
        write_json(self.path / "result.json", result)


def refuse_links(path: Path) -> None:
    """Raises CheckpointError if a folder that a run would write into is a symbolic link, maybe a stranger's."""
    for each in (path / "checkpoints", path / "tensorboard", *path.glob("seed-*")):
        if each.is_symlink():
            raise CheckpointError(
                f"'{each}' is a symbolic link, which no run writes through. Put the folder itself there, or link to "
                "the whole run."
            )


def refuse_existing_run(path: Path) -> None:
    """Raises CheckpointError if the folder has a run."""
    if (path / "run.json").exists() or any((path / "checkpoints").glob("epoch-*.pt")):
        raise CheckpointError(f"'{path}' already has a run. Continue it with --resume, or choose another --out.")


def write_run(path: Path, settings: AnySettings, seeds: Sequence[int] | None) -> None:
    """Writes run.json with the settings, the seeds of a run over several, and the first command of the run."""
    with explained(path):
        path.mkdir(parents=True, exist_ok=True)
    command = read_json(path / "run.json").get("command", command_line())
    listed = None if seeds is None else list(seeds)
    write_json(path / "run.json", {"settings": settings.to_dict(), "seeds": listed, "command": command})


def read_run(path: Path) -> tuple[RunSettings, list[int] | None]:
    """The settings in run.json, and the seeds of a run over several. Raises CheckpointError if the folder has no run,
    its run.json is damaged, or its run is one of Python objects.
    """
    settings, seeds = _read_run_file(path)
    return RunSettings.from_dict(settings), seeds


def _read_run_file(path: Path) -> tuple[dict[str, Any], list[int] | None]:
    try:
        content = read_typed(path / "run.json", RunFile, "Start again with another --out.")
        return content.settings, content.seeds
    except OSError as error:
        if any((path / "checkpoints").glob("epoch-*.pt")):
            raise CheckpointError(
                f"'{path}' has checkpoints, but no run.json ({error.strerror}). Put it back, or start again with "
                "another --out."
            ) from error
        raise CheckpointError(
            f"There is no run in '{path}' (no run.json). Start one with: metawrap train --out {shlex.quote(str(path))}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty for a file that is missing or damaged or holds no object."""
    try:
        return _object(read_regular(path, MAX_BYTES).decode())
    except (OSError, UnicodeDecodeError):
        return {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file with one JSON object per line; unreadable lines are left out, a missing file has none."""
    try:
        lines = read_regular(path, MAX_BYTES).decode(errors="replace").splitlines()
    except OSError:
        return []
    return [record for line in lines if (record := _object(line))]


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines of the run's log.jsonl that have the form of one."""
    return [record for record in read_lines(run / LOG) if has_form(record, LogLine)]


def read_insight(run: Path, epochs: int) -> list[dict[str, Any]]:
    """The readable lines of the run's insight.jsonl on the first `epochs`, in order."""
    found = {record["epoch"]: record for record in read_lines(run / INSIGHT) if has_form(record, InsightLine)}
    return [found[epoch] for epoch in sorted(found) if 1 <= epoch <= epochs]


def _object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _not_through_a_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"
