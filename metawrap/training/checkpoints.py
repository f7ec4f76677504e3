"""Checkpoints that survive a kill: temporary file -> fsync -> rename -> fsync of the folder -> old ones go.

A reader therefore finds either the whole old file or the whole new one. What a disk does to it later, a checksum at its
end tells. Files are read with `weights_only=True`, so a checkpoint from a stranger cannot run code.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from metawrap.errors import CheckpointError
from metawrap.training.checkpoint_archive import check_archive, check_tensors

FORMAT = "metawrap-checkpoint"
VERSION = 1
_FILE_NAME = re.compile(r"epoch-(\d+)\.pt")
# Behind the zip archive that torch.save writes, whose readers look for its end from behind and pass over this.
_CHECKSUM = b"\nmetawrap-sha256 "
_DIGITS = 2 * hashlib.sha256().digest_size


@dataclass(frozen=True)
class Checkpoint:
    """All that the rest of a run depends on, as it stood after the epoch `len(history)`.

    settings: plain values that define the run. learner, optimizer, scheduler: their state_dicts (no scheduler: None).
    rng: states of torch's global generators, which dropout draws from. history: one record per finished epoch.
    seconds: time spent on the run so far, summed over resumes.
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
        path: made when the first checkpoint is saved.
        keep_best: how many with the highest validation accuracy stay (of equals, the earliest).
        keep_newest: how many of the newest stay.
    """

    def __init__(self, path: Path, keep_best: int, keep_newest: int) -> None:
        self.path = path
        self.keep_best = keep_best
        self.keep_newest = keep_newest

    def save(self, checkpoint: Checkpoint) -> Path:
        """Puts the checkpoint in place, then deletes those that need no longer be kept.

        Raises:
            CheckpointError: it cannot be written: the disk is full, say. Those before it are as they were.
        """
        path = self._file(checkpoint.epoch)
        content = {"format": FORMAT, "version": VERSION, "checksum": "sha256", **vars(checkpoint)}
        with explained(path):
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda handle: _save_with_checksum(content, handle))
            self._prune(checkpoint.history)
        return path

    def epochs(self) -> list[int]:
        """Epochs that have a file, ascending; whether it can be read is not checked."""
        found = (_FILE_NAME.fullmatch(entry.name) for entry in self.path.glob("epoch-*.pt"))
        return sorted(int(match.group(1)) for match in found if match)

    def load(self, epoch: int) -> Checkpoint:
        """The state after `epoch` (from 1), with tensors on the CPU.

        Raises:
            CheckpointError: see `load_checkpoint`.
        """
        return load_checkpoint(self._file(epoch))

    def newest(self, skipped: Callable[[CheckpointError], None]) -> Checkpoint | None:
        """The newest checkpoint that can be read, None if there is no file; `skipped` hears of each that cannot.

        Raises:
            CheckpointError: there are files, but none of them can be read.
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
        for epoch in self.epochs():
            if epoch not in kept:
                self._file(epoch).unlink(missing_ok=True)
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)

    def _file(self, epoch: int) -> Path:
        return self.path / f"epoch-{epoch:04d}.pt"


def best_epochs(history: list[dict[str, Any]], count: int) -> list[int]:
    """The `count` epochs (from 1) with the highest validation accuracy, best first; of equals, the earliest."""
    return sorted(range(1, len(history) + 1), key=lambda epoch: -history[epoch - 1]["validation_accuracy"])[:count]


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint without running anything that is inside it.

    Raises:
        CheckpointError: the file is missing, torn, not a checkpoint of this version, or holds code.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint '{path}'.")
    try:
        fits = _fits_checksum(path)
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read ({error}). Delete it to resume from the one before.") from error
    if fits is False:
        raise _damaged(path)
    check_archive(path)
    try:
        with warnings.catch_warnings():
            # Of a check of sparse tensors, which torch mentions once a process; what is here has none.
            warnings.filterwarnings("ignore", message="Validating sparse tensor invariants")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"'{path}' holds more than tensors and plain values, or is damaged, so it was not loaded: objects in a "
            "file can run code. Delete it, or write it again with `metawrap train`."
        ) from error
    except Exception as error:  # torch.load documents no list of what a torn file can raise
        raise CheckpointError(f"'{path}' cannot be read ({error}). Delete it to resume from the one before.") from error
    checkpoint = _checked(path, content)
    check_tensors(path, content)
    if fits is None and "checksum" in content:  # It was cut off, or is damaged itself.
        raise _damaged(path)
    return checkpoint


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(
        f"'{path}' is damaged: its checksum is not that of what was written. Delete it to resume from the one before, "
        "and have the disk checked."
    )


def load_into(learner: nn.Module, checkpoint: Checkpoint) -> None:
    """Puts the checkpoint's weights, statistics and counters into the learner.

    Raises:
        CheckpointError: the learner's network is not the one that was trained.
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
    """Replaces `path` by what `write` puts into a file handle, wholly or not at all, also across a power cut.

    Raises:
        CheckpointError: the disk is full, the file system read-only, or the like; `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explained(path), _interrupts_wait():
        try:
            with open(temporary, "wb") as handle:
                write(handle)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, path)
        finally:
            with suppress(OSError):  # Of a file system that has become read-only: the first error says it.
                temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Says what the operating system refused while `path` was written, and what to do.

    Raises:
        CheckpointError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        cause = error.strerror or str(error)
        raise CheckpointError(
            f"'{path}' could not be written ({cause}). What was saved before is whole: {_remedy(error)}, and go on "
            "with --resume, or choose another --out."
        ) from error


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free some space"
    return "make the folder writable" if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) else "see to the disk"


class _Checked:
    """Hands what is written on to a file, and sums it up.

    torch.save aborts the whole process when a write fails in the middle, so a failure waits here until it is done.
    """

    def __init__(self, handle: IO[bytes]) -> None:
        self.sum = hashlib.sha256()
        self._handle = handle
        self.failure: OSError | None = None

    def write(self, content: Any) -> int:
        self.sum.update(content)
        if self.failure is None:
            try:
                self._handle.write(content)
            except OSError as error:
                self.failure = error
        return len(content)

    def flush(self) -> None:
        """Done where the file is synchronised."""


def _save_with_checksum(content: dict[str, Any], handle: IO[bytes]) -> None:
    checked = _Checked(handle)
    torch.save(content, checked)  # type: ignore[arg-type]
    if checked.failure is not None:
        raise checked.failure
    handle.write(_CHECKSUM + checked.sum.hexdigest().encode())


def _fits_checksum(path: Path) -> bool | None:
    """Whether the file is what was written; None for one without a checksum, as older versions wrote it."""
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


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Indented JSON, wholly or not at all."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda handle: handle.write(text.encode()))


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Holds Ctrl-C and SIGTERM back: torch.save aborts the whole process when an exception stops it half-way."""
    if threading.current_thread() is not threading.main_thread():  # other threads get no signals
        yield
        return
    received: list[int] = []
    held = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not None]
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in held}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # only POSIX lets a folder be opened for fsync
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checked(path: Path, content: Any) -> Checkpoint:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"'{path}' is not a metawrap checkpoint. Expected a file that `metawrap train` wrote.")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"'{path}' has checkpoint version {content.get('version')}, but this metawrap reads version {VERSION}. "
            "Use the metawrap version that wrote it."
        )
    fields = Checkpoint.__dataclass_fields__
    missing = sorted(set(fields) - set(content))
    if missing:
        raise CheckpointError(f"'{path}' lacks {', '.join(missing)}. Delete it to resume from the one before.")
    return Checkpoint(**{name: content[name] for name in fields})
