"""One run folder, one process: a lock that the operating system lets go of when its process ends, however it ends."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from metawrap.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows: no lock there.
    fcntl = None  # type: ignore[assignment]

_NAME = ".lock"
_TAKEN = (errno.EAGAIN, errno.EACCES)
_held: set[int] = set()


class RunLock:
    """The lock of a run's folder; the file stays, and is no lock without a process that holds it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds it."""
        return self._descriptor is not None

    def take(self) -> None:
        """Takes the lock, unless it is held here, or the folder cannot be written, which writing will say.

        Raises:
            CheckpointError: another process, or another run in this one, holds it; names its pid.
        """
        if self.held or fcntl is None:
            return
        try:
            descriptor = os.open(self.folder / _NAME, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno not in _TAKEN:  # A file system without locks.
                return
            raise CheckpointError(
                f"'{self.folder}' is in use by another run (pid {holder or 'unknown'}). Wait until it ends, stop it, "
                "or choose another --out."
            ) from None
        self._descriptor = descriptor
        _held.add(descriptor)
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()} on {socket.gethostname()}".encode())
        except OSError:  # A full disk: the lock holds all the same, without a name.
            pass

    def release(self) -> None:
        """Lets go of it, if it is held here."""
        if self._descriptor is not None:
            _held.discard(self._descriptor)
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.release()


def _let_go() -> None:
    # A forked process that outlives its parent for a moment must not hold the parent's lock.
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
