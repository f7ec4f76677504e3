"""The conditions of a measurement, set and recorded: allocator, threads, cores, versions. Memory of a process."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
import threading
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import metawrap
from metawrap.training.machine import describe_machine

# glibc reads this at the start of a process only: no cache of small blocks for each thread, which fragments the heap.
UNCACHED = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
# glibc's mallopt: blocks of any size come from the heap, the heap is never given back, and all threads share one.
MALLOPT = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_ARENA_MAX": (-8, 1)}
PEERS = ("higher", "torchopt", "learn2learn", "iteryne", "parallel-metalearn", "jax", "jaxlib")
MEGABYTE = 2**20


def has_glibc() -> bool:
    """Whether the allocator can be set: on Linux with glibc."""
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def set_allocator(name: str) -> None:
    """Sets this process's allocator: "tuned" keeps freed memory in the process, "default" leaves glibc as it is.

    A process with "tuned" must be started with `UNCACHED` in its environment.

    Raises:
        SystemExit: the allocator cannot be set here.
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
    """Sets torch's threads inside an operation, and limits the process to as many cores, for every contender alike."""
    torch.set_num_threads(count)
    if device == "cpu" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def environment(device: str, allocator: str) -> dict[str, Any]:
    """The fields that every record has."""
    peers = {}
    for name in PEERS:
        try:
            peers[name] = version(name)
        except PackageNotFoundError:
            continue
    machine = describe_machine(torch.device(device)) | peers
    return {"machine": machine, "allocator": allocator, "commit": commit_of(Path(metawrap.__file__).parents[1])}


def commit_of(folder: str | Path) -> str | None:
    """The commit of a checkout, with "-dirty" where files differ from it; None outside of git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def resident() -> float:
    """MB that this process holds now."""
    return _status("VmRSS")


def peak_resident() -> float:
    """The most MB that this process has held.

    On Linux from /proc, because the ru_maxrss of a child starts with the figure of its parent.
    """
    return _status("VmHWM")


class ChildrenWatch(threading.Thread):
    """The most MB that this process and its children have gained together while the `with` block ran; see `peak`.

    A page that several processes share counts in parts (`Pss`), because a forked process starts with all pages of its
    parent. The figure is read every few milliseconds, so that a short peak can be missed. It is 0 without /proc.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0.0
        self._own = _shares([os.getpid()])
        self._ended = threading.Event()

    def run(self) -> None:
        """Reads the figure until the block ends."""
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
        except OSError:  # The process has just ended.
            continue
        total += sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:"))
    return total


def _status(field: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        import resource

        # Kilobytes, but bytes on macOS. Only the peak is known; at the start of a process the two are near.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (MEGABYTE if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
