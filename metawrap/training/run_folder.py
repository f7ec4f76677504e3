"""A run's folder: run.json (settings, command), log.jsonl (a line per epoch), insight.jsonl (likewise, what the learner
is like inside), checkpoints/, final_insight.json and result.json (the final test).

The truth is in the checkpoints: each holds the history of all epochs before it, and a resumed run rewrites the log from
there, so that a log never shows an epoch that the weights have not seen. The insight, which would make each checkpoint
grow, is cut there instead; each of its lines is written before the checkpoint of its epoch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from metawrap.errors import CheckpointError
from metawrap.training.checkpoints import Checkpoint, CheckpointFolder, explained, write_atomically, write_json
from metawrap.training.machine import command_line
from metawrap.training.progress import say
from metawrap.training.run_lock import RunLock
from metawrap.training.run_settings import RunSettings

LOG = "log.jsonl"
INSIGHT = "insight.jsonl"
FINAL_INSIGHT = "final_insight.json"


class RunFolder:
    """The files of one run; nothing is written before `begin`.

    Args:
        path: the folder, which need not exist.
        settings: of the run that is to be started or resumed.
    """

    def __init__(self, path: Path, settings: RunSettings) -> None:
        self.path = path
        self.settings = settings
        self.lock = RunLock(path)
        self._was_new = False
        self.checkpoints = CheckpointFolder(
            path / "checkpoints", keep_best=max(settings.keep, settings.ensemble), keep_newest=settings.keep
        )

    def find_start(self, resume: bool) -> Checkpoint | None:
        """The checkpoint to continue from; None: start with the first epoch. Reads only, and locks what is there.

        Raises:
            CheckpointError: the folder has a run and `resume` is False, or the run there has other settings, or none
                of its checkpoints can be read, or another process is at it.
        """
        self._was_new = not self.path.is_dir()
        if not resume:
            refuse_existing_run(self.path)
        elif (self.path / "run.json").exists():
            self.settings.check_resumes(read_run(self.path)[0].to_dict())
        if not self._was_new:
            self.lock.take()
        if not resume:
            return None
        checkpoint = self.checkpoints.newest(skipped=lambda error: say(f"Skipped: {error}"))
        if checkpoint is not None:
            self.settings.check_resumes(checkpoint.settings)
        return checkpoint

    def begin(self, history: list[dict[str, Any]]) -> None:
        """Writes the settings, and the log as it stood when `history` ended.

        Raises:
            CheckpointError: another process has made the folder its own since `find_start`, or it cannot be written.
        """
        if not self.lock.held:
            with explained(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            self.lock.take()
            if self._was_new:  # So whatever is there now is another's.
                refuse_existing_run(self.path)
        write_run(self.path, self.settings, None)
        lines = "".join(_line(record) for record in history)
        write_atomically(self._log, lambda handle: handle.write(lines.encode()))
        insight = self.insight(len(history))
        kept = "".join(_line(record) for record in insight)
        if kept or self._insight.exists():
            write_atomically(self._insight, lambda handle: handle.write(kept.encode()))

    def append(self, record: dict[str, Any], insight: dict[str, Any]) -> None:
        """Adds a line to the log, and one to the insight."""
        for path, line in ((self._insight, _line(insight)), (self._log, _line(record))):
            with explained(path), open(path, "a", encoding="utf-8") as handle:
                handle.write(line)

    def insight(self, epochs: int) -> list[dict[str, Any]]:
        """The lines of insight on the first `epochs`, in order; those that cannot be read are left out."""
        found = {
            record["epoch"]: record for record in read_lines(self._insight) if isinstance(record.get("epoch"), int)
        }
        return [found[epoch] for epoch in sorted(found) if 1 <= epoch <= epochs]

    def result(self) -> dict[str, Any] | None:
        """The final test's result if there is one for exactly these settings."""
        try:
            content: dict[str, Any] = json.loads((self.path / "result.json").read_text(encoding="utf-8"))
            # By way of RunSettings: what an older metawrap wrote lacks the settings that are new.
            same = RunSettings.from_dict(content["settings"]) == self.settings
        except (OSError, ValueError, TypeError, KeyError, CheckpointError):
            return None
        return content if same else None

    def write_result(self, result: dict[str, Any], insight: dict[str, Any]) -> None:
        """Writes final_insight.json, then result.json, which makes the run a finished one."""
        write_json(self.path / FINAL_INSIGHT, insight)
        write_json(self.path / "result.json", result)

    @property
    def _log(self) -> Path:
        return self.path / LOG

    @property
    def _insight(self) -> Path:
        return self.path / INSIGHT


def refuse_existing_run(path: Path) -> None:
    """Raises CheckpointError when the folder has a run."""
    if (path / "run.json").exists() or any((path / "checkpoints").glob("epoch-*.pt")):
        raise CheckpointError(f"'{path}' already has a run. Continue it with --resume, or choose another --out.")


def write_run(path: Path, settings: RunSettings, seeds: Sequence[int] | None) -> None:
    """Writes run.json; `seeds` lists those of a run that has one folder per seed. The first command stays."""
    with explained(path):
        path.mkdir(parents=True, exist_ok=True)
    command = read_json(path / "run.json").get("command", command_line())
    listed = None if seeds is None else list(seeds)
    write_json(path / "run.json", {"settings": settings.to_dict(), "seeds": listed, "command": command})


def read_run(path: Path) -> tuple[RunSettings, list[int] | None]:
    """What `write_run` wrote: the settings, and the seeds of a run over several.

    Raises:
        CheckpointError: the folder has no run, or its run.json is damaged.
    """
    try:
        content = json.loads((path / "run.json").read_text(encoding="utf-8"))
        settings, seeds = content["settings"], content["seeds"]
    except OSError as error:
        raise CheckpointError(
            f"There is no run in '{path}' (no run.json). Start one with: metawrap train --out {path}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"'{path / 'run.json'}' is damaged ({error}). Start again with another --out.") from error
    return RunSettings.from_dict(settings), seeds


def seed_folders(path: Path, settings: RunSettings, seeds: Sequence[int]) -> dict[int, RunFolder]:
    """One folder per seed inside `path`."""
    return {seed: RunFolder(path / f"seed-{seed}", replace(settings, seed=seed)) for seed in seeds}


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where it is missing, damaged, or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file with one a line; none where it is missing, and a line that cannot be read is left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"
