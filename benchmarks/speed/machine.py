"""What a figure depends on besides the code, set and written down: allocator, threads, cores, versions."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import threading
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from metawrap.training.machine import describe_machine

# What it can be told from outside only: no cache of small blocks for each thread, which tears the heap to pieces.
UNCACHED = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
# glibc's mallopt: blocks of any size come from the heap, the heap is never given back, and all threads share one.
MALLOPT = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_ARENA_MAX": (-8, 1)}
PEERS = ("higher", "torchopt", "learn2learn", "jax", "jaxlib")
MEGABYTE = 2**20


def has_glibc() -> bool:
    """Whether the allocator can be set."""
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def set_allocator(name: str) -> None:
    """Sets this process's allocator: "tuned" keeps freed memory in the process, "default" leaves glibc as it is.

    For "tuned" the process is to be started with `UNCACHED` in its environment.

    Raises:
        SystemExit: it cannot be set here.
    """
    if name != "tuned":
        return
    if not has_glibc():
        raise SystemExit("--allocator tuned: expected Linux with glibc, which this is not. Pass --allocator default.")
    libc = ctypes.CDLL(None)
    for option, (number, value) in MALLOPT.items():
        if not libc.mallopt(number, value):
            raise SystemExit(f"--allocator tuned: mallopt({option}, {value}) was refused. Pass --allocator default.")


def use_threads(count: int, device: str) -> None:
    """torch's threads inside an operation; and no more cores than that for anyone, so that nobody has more."""
    torch.set_num_threads(count)
    if device == "cpu" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def environment(device: str, allocator: str) -> dict[str, Any]:
    """What every record holds."""
    peers = {}
    for name in PEERS:
        try:
            peers[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"machine": describe_machine(torch.device(device)) | peers, "allocator": allocator}


def resident() -> float:
    """MB that this process holds now."""
    return _status("VmRSS")


def peak_resident() -> float:
    """The most MB that this process has held.

    Not ru_maxrss where it can be helped: on Linux a child starts with the figure of the parent that started it.
    """
    return _status("VmHWM")


class ChildrenWatch(threading.Thread):
    """The most MB that this process's children have held beside it while the `with` block ran; `peak` is its figure.

    Of a page that several processes share each has its part (`Pss`), as a forked one begins with all of its parent's.
    Looked at every few milliseconds, so that a short peak can be missed; 0 where /proc does not tell.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0.0
        self._own = _shares([os.getpid()])
        self._ended = threading.Event()

    def run(self) -> None:
        """Looks until the block ends."""
        children = Path(f"/proc/self/task/{os.getpid()}/children")
        while not self._ended.wait(0.005):
            if children.exists() and (pids := [int(pid) for pid in children.read_text().split()]):
                self.peak = max(self.peak, _shares([os.getpid(), *pids]) - self._own)

    def __enter__(self) -> ChildrenWatch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()


def _shares(pids: list[int]) -> float:
    total = 0.0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # It has just ended.
            continue
        total += sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:"))
    return total


def _status(field: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        import resource

        # Kilobytes, but bytes on macOS. It knows no present figure: at a start, the peak is near enough.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (MEGABYTE if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
