"""A long run of a tiny model: does memory grow, do file handles leak, does a step get slower?

    python benchmarks/long_run.py --steps 20000

Prints one JSON record. Resident memory is read from /proc after a warm-up of a tenth of the steps, and at the end.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metawrap import MAMLPlusPlus

LIMIT_MIB = 20.0


def tiny_tasks(index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two tasks of two classes, others at each index."""
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(2, 8, 4, generator=generator)
    y = torch.arange(8).remainder(2).expand(2, 8)
    x = x + y[..., None]
    return x[:, :4], y[:, :4], x[:, 4:], y[:, 4:]


def resident_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_files() -> int:
    """How many file handles this process has open."""
    return len(os.listdir("/proc/self/fd"))


def long_run(steps: int, engine: str) -> dict[str, Any]:
    """Takes so many meta-steps, with an evaluation after each hundred, as a run has one after each epoch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    learner = MAMLPlusPlus(model, inner_steps=1, engine=engine, iterations_per_epoch=max(1, steps // 100))
    seconds: list[float] = []
    warm, files = 0.0, 0
    for index in range(steps):
        if index == steps // 10:
            gc.collect()
            warm, files = resident_mib(), open_files()
        batch = tiny_tasks(index)
        begun = time.perf_counter()
        learner.meta_step(batch)
        seconds.append(time.perf_counter() - begun)
        if index % 100 == 99:
            learner.evaluate([tiny_tasks(10**9 + index)])
    gc.collect()
    tenth = max(1, steps // 10)
    # The first tenth without what is done once: the looks at the first task.
    first, last = statistics.median(seconds[:tenth]), statistics.median(seconds[-tenth:])
    return {
        "steps": steps,
        "engine": engine,
        "warm_mib": round(warm, 2),
        "end_mib": round(resident_mib(), 2),
        "growth_mib": round(resident_mib() - warm, 2),
        "leaked_files": open_files() - files,
        "first_tenth_ms": round(first * 1e3, 3),
        "last_tenth_ms": round(last * 1e3, 3),
        "drift": round(last / first, 3),
        "total_s": round(sum(seconds), 1),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def main() -> int:
    """Exit code 1 where memory grew by the limit or more, or a file handle is left."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=20_000, help="meta-steps (20000)")
    parser.add_argument("--engine", default="functional", choices=["functional", "higher", "batched"])
    arguments = parser.parse_args()
    record = long_run(arguments.steps, arguments.engine)
    print(json.dumps(record))
    return int(record["growth_mib"] >= LIMIT_MIB or record["leaked_files"] > 0)


if __name__ == "__main__":
    sys.exit(main())
