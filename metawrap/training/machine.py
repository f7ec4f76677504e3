"""What a measured number depends on: the machine, the versions, the command."""

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
from metawrap.training.launch import local_size, size


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Hardware and versions, as plain values for a JSON result."""
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processes": size(),
        "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "metawrap": __version__,
    }


def peak_memory(device: torch.device) -> float | None:
    """The most memory that this process has held, in MiB: of the GPU where it trains on one, else resident memory.

    None where the system does not tell.
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
    """The command that runs, as a user would type it."""
    return shlex.join([*shlex.split(program()), *sys.argv[1:]])


def program() -> str:
    """How this program was started, without its arguments: "metawrap", "python -m metawrap" or a script's path.

    Of several processes, how torchrun would start them on one machine.
    """
    started = Path(sys.argv[0])
    if size() > 1:
        return f"torchrun --nproc-per-node={local_size()} -m metawrap"
    if started.name == "__main__.py":
        python = Path(sys.executable)
        return f"{python.name if shutil.which(python.name) == str(python) else shlex.quote(str(python))} -m metawrap"
    return started.name if shutil.which(started.name) == str(started) else shlex.quote(str(started))


def _processor() -> str:
    """Linux names the model only in /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
