"""Checkpoints that survive a kill: temporary file -> fsync -> rename -> fsync of the folder -> old files are deleted.

A reader therefore finds the whole old file or the whole new one. A checksum at the end of the file shows later damage
by the disk. Files are read with `weights_only=True`, so a checkpoint of a stranger cannot run code.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from pydantic import ValidationError
from torch import nn

from metawrap.errors import CheckpointError
from metawrap.settings.validated import in_words
from metawrap.snapshot.module_state import signals_deferred
from metawrap.training.checkpoint_archive import REMEDY, check_archive, check_tensors, reading
from metawrap.training.stored_files import CheckpointForm

FORMAT = "metawrap-checkpoint"
VERSION = 1
_FILE_NAME = re.compile(r"epoch-(\d+)\.pt")
# Stands behind the zip archive of torch.save. Zip readers search the end of an archive backwards and skip the checksum.
_CHECKSUM = b"\nmetawrap-sha256 "
_DIGITS = 2 * hashlib.sha256().digest_size


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after the epoch `len(history)`: the rest of the run depends on nothing else.

    settings: plain values that define the run. learner, optimizer, scheduler: state_dicts (no scheduler: None).
    rng: states of torch's global generators, which dropout draws from. history: one record per finished epoch.
    seconds: training time so far, summed over resumes.
    """

    settings: dict[str, Any]
    learner: dict[str, Any]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any] | None
    rng: dict[str, Any]
    history: list[dict[str, Any]]
    seconds: float

    @property
    def epoch(self) -> int:
        """Finished epochs, from 1."""
        return len(self.history)


class CheckpointFolder:
    """The checkpoints of one run: `epoch-0001.pt` holds the state after the first epoch.

    Args:
        path: the folder; `save` makes it.
        keep_best: number of best checkpoints to keep; see `best_epochs`.
        keep_newest: number of the newest checkpoints to keep.
    """

    def __init__(self, path: Path, keep_best: int, keep_newest: int) -> None:
        self.path = path
        self.keep_best = keep_best
        self.keep_newest = keep_newest

    def save(self, checkpoint: Checkpoint) -> Path:
        """Writes the checkpoint, then deletes the checkpoints that need not be kept. Raises CheckpointError if the file
        cannot be written, for example on a full disk. Older checkpoints are unchanged.
        """
        path = self._file(checkpoint.epoch)
        content = {"format": FORMAT, "version": VERSION, "checksum": "sha256", **vars(checkpoint)}
        with explained(path):
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda handle: _save_with_checksum(content, handle))
            self._prune(checkpoint.history)
        return path

    def epochs(self) -> list[int]:
        """Epochs that have a file, ascending. The files are not opened."""
        found = (_FILE_NAME.fullmatch(entry.name) for entry in self.path.glob("epoch-*.pt"))
        return sorted(int(match.group(1)) for match in found if match)

    def load(self, epoch: int) -> Checkpoint:
        """The state after `epoch` (from 1), with tensors on the CPU. Raises CheckpointError as `load_checkpoint`."""
        return load_checkpoint(self._file(epoch))

    def newest(self, skipped: Callable[[CheckpointError], None]) -> Checkpoint | None:
        """The newest readable checkpoint; None if the folder has no files. Raises CheckpointError if none of its files
        can be read. `skipped` gets the error of each unreadable file.
        """
        epochs = self.epochs()
        for epoch in reversed(epochs):
            try:
                return self.load(epoch)
            except CheckpointError as error:
                skipped(error)
        if epochs:
            raise CheckpointError(
                f"None of the {len(epochs)} checkpoints in '{self.path}' can be read. Start again with another --out."
            )
        return None

    def _prune(self, history: list[dict[str, Any]]) -> None:
        newest = range(len(history), len(history) - self.keep_newest, -1)
        kept = {*best_epochs(history, self.keep_best), *newest}
        old = [self._file(epoch) for epoch in self.epochs() if epoch not in kept]
        for path in [*old, *self.path.glob(".*.tmp")]:
            path.unlink(missing_ok=True)

    def _file(self, epoch: int) -> Path:
        return self.path / f"epoch-{epoch:04d}.pt"


def best_epochs(history: list[dict[str, Any]], count: int) -> list[int]:
    """The `count` epochs (from 1) with the highest validation accuracy, best first; of equals, the earliest.

    Where an epoch has no accuracy, those with the lowest validation loss; without a finite loss an epoch comes last.
    Without validation, the newest.
    """
    if not any(is_validated(each) for each in history):
        return list(range(len(history), 0, -1))[:count]
    known = all(each["validation_accuracy"] is not None for each in history)

    def rank(epoch: int) -> float:
        found = history[epoch - 1]
        value = found["validation_accuracy"] if known else found.get("validation_loss")
        return math.inf if value is None else -value if known else value

    return sorted(range(1, len(history) + 1), key=rank)[:count]


def is_validated(record: dict[str, Any]) -> bool:
    """Whether an epoch of this record was validated."""
    return record["validation_accuracy"] is not None or "validation_loss" in record


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint without running any code from the file. Raises CheckpointError if the file is missing, torn,
    no checkpoint of this version, or holds code.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint '{path}'.")
    with reading(path):
        intact = _matches_checksum(path)
    if intact is not False:
        check_archive(path)
        with reading(path), warnings.catch_warnings():
            # torch mentions once a process that it does not check sparse tensors; `check_tensors` measures them.
            warnings.filterwarnings("ignore", message="Validating sparse tensor invariants")
            content = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint = _as_checkpoint(path, content)
        check_tensors(path, content)
    # A file that names a checksum, but ends without one, was cut off.
    if intact is False or (intact is None and "checksum" in content):
        raise CheckpointError(
            f"'{path}' is damaged: its checksum differs from that of the saved content. {REMEDY} Have the disk checked."
        )
    return checkpoint


def load_into(learner: nn.Module, checkpoint: Checkpoint) -> None:
    """Loads the checkpoint's weights, statistics and counters into the learner. Raises CheckpointError if the learner's
    network differs from the trained one.
    """
    try:
        learner.load_state_dict(checkpoint.learner)
    except RuntimeError as error:
        cause = " ".join(str(error).split())
        raise CheckpointError(
            f"The network is not the one that the checkpoint of epoch {checkpoint.epoch} holds ({cause[:300]}). "
            "Use the same model code, and images of the same size and channels, as in training."
        ) from error


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Replaces `path` by the bytes that `write` puts into a file handle, wholly or not at all, also across a power cut.
    Raises CheckpointError if the disk is full, the file system is read-only, or the like; `path` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # An exception in the middle of torch.save would abort the whole process.
    with explained(path), signals_deferred() as defer:
        defer()
        try:
            temporary.unlink(missing_ok=True)  # Of a killed process of this number, or a stranger's link.
            with open(temporary, "xb") as handle:
                write(handle)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, path)
        finally:
            with suppress(OSError):  # The file system may be read-only by now; the first error names the cause.
                temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes indented JSON with `write_atomically`."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text with `write_atomically`."""
    write_atomically(path, lambda handle: handle.write(text.encode()))


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Raises CheckpointError, with the file, the cause and the fix, in place of an OSError while `path` is written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise CheckpointError(
                f"'{path}' could not be written ({error.strerror}): its folder was moved or deleted, or a link stands "
                "there. Put the folder back and go on with --resume, or choose another --out."
            ) from error
        raise CheckpointError(
            f"'{path}' could not be written ({error.strerror or error}). What was saved before is whole: "
            f"{_remedy(error)}, and go on with --resume, or choose another --out."
        ) from error


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free some space"
    return "make the folder writable" if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) else "see to the disk"


class _HashingWriter:
    """Writes to a file and hashes the content.

    torch.save aborts the whole process if a write fails, so the first failure is stored until torch.save returns.
    """

    def __init__(self, handle: IO[bytes]) -> None:
        self.hash = hashlib.sha256()
        self.failure: OSError | None = None
        self._handle = handle

    def write(self, content: Any) -> int:
        self.hash.update(content)
        if self.failure is None:
            try:
                self._handle.write(content)
            except OSError as error:
                self.failure = error
        return len(content)

    def flush(self) -> None:
        """torch.save calls this; `write_atomically` flushes the file itself."""


def _save_with_checksum(content: dict[str, Any], handle: IO[bytes]) -> None:
    writer = _HashingWriter(handle)
    torch.save(content, writer)  # type: ignore[arg-type]
    if writer.failure is not None:
        raise writer.failure
    handle.write(_CHECKSUM + writer.hash.hexdigest().encode())


def _matches_checksum(path: Path) -> bool | None:
    """Whether the file matches its checksum; None for a file without one, as older versions wrote."""
    with open(path, "rb") as handle:
        length = handle.seek(0, os.SEEK_END) - len(_CHECKSUM) - _DIGITS
        if length < 0:
            return None
        handle.seek(length)
        end = handle.read()
        if not end.startswith(_CHECKSUM):
            return None
        handle.seek(0)
        found = hashlib.sha256()
        while length > 0 and (block := handle.read(min(length, 1 << 20))):
            found.update(block)
            length -= len(block)
    return found.hexdigest().encode() == end[len(_CHECKSUM) :]


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # Only POSIX opens a folder for fsync.
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _as_checkpoint(path: Path, content: Any) -> Checkpoint:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"'{path}' is not a metawrap checkpoint. Expected a file that `metawrap train` wrote.")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"'{path}' has checkpoint version {content.get('version')}, but this metawrap reads version {VERSION}. "
            "Use the metawrap version that wrote it."
        )
    fields = Checkpoint.__dataclass_fields__
    if missing := sorted(set(fields) - set(content)):
        raise CheckpointError(f"'{path}' lacks {', '.join(missing)}. {REMEDY}")
    try:
        CheckpointForm.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(f"'{path}' is damaged ({in_words(error)}). {REMEDY}") from error
    return Checkpoint(**{name: content[name] for name in fields})
