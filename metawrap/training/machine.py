"""The machine, the versions and the command behind a measured number."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy
import torch

from metawrap import __version__
from metawrap.training.torchrun import local_world_size, world_size


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Hardware and versions, as plain values for a JSON result."""
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processes": world_size(),
        "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "metawrap": __version__,
    }


def peak_memory(device: torch.device) -> float | None:
    """The peak memory of this process in MiB: allocated on the GPU if `device` is one, else resident.

    None on systems without that figure.
    """
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device) / 2**20)
    try:
        import resource
    except ImportError:  # Windows.
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak / 2**20 if sys.platform == "darwin" else peak / 2**10)


def command_line() -> str:
    """The running command, as a user would type it."""
    return shlex.join([*shlex.split(program()), *sys.argv[1:]])


def program() -> str:
    """The start of the running command: "metawrap", "python -m metawrap" or a script's path.

    For a run in several processes, the torchrun command on one machine.
    """
    if world_size() > 1:
        return f"torchrun --nproc-per-node={local_world_size()} -m metawrap"
    started = Path(sys.argv[0])
    return f"{_typed(Path(sys.executable))} -m metawrap" if started.name == "__main__.py" else _typed(started)


def _typed(path: Path) -> str:
    """The name of a program that the shell finds by its name, else the quoted path."""
    return path.name if shutil.which(path.name) == str(path) else shlex.quote(str(path))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()  # Linux names the model here alone.
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
