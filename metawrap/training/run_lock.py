"""The lock of a run's folder: one process trains there. The operating system frees the lock when that process ends."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from metawrap.errors import CheckpointError


class RunLock:
    """The lock of one run's folder.

    The file `.lock` stays in the folder; without a process that holds it, it locks nothing. A symbolic link of that
    name is never followed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Without flock a marker file would have to serve as the lock, and a killed process would leave it behind.
        self._lock = FileLock(
            folder / ".lock", timeout=0, thread_local=False, fallback_to_soft=False, on_acquired=_write_holder
        )

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._lock.is_locked

    def take(self) -> None:
        """Takes the lock unless this object holds it.

        A folder that cannot be written, and a file system without locks, go unlocked: the first write names the
        problem. Raises CheckpointError if another process, or another run in this one, holds the lock, or `.lock` is a
        symbolic link.
        """
        if self.held:
            return
        path = self.folder / ".lock"
        try:
            self._lock.acquire()
        except Timeout:
            holder = ""
            with suppress(OSError):  # Windows lets nobody else read a locked file.
                holder = path.read_bytes()[:200].decode(errors="replace").strip()
            raise CheckpointError(
                f"'{self.folder}' is in use by another run (pid {holder or 'unknown'}). Wait until it ends, stop it, "
                "or choose another --out."
            ) from None
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise CheckpointError(f"'{path}' is a symbolic link, which no run writes. Delete it.") from error

    def release(self) -> None:
        """Frees the lock if this object holds it."""
        self._lock.release()


def _write_holder(descriptor: int) -> None:
    with suppress(OSError):  # On a full disk the lock holds without a name.
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()} on {socket.gethostname()}".encode())
