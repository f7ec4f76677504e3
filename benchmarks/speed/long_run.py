"""A long run of a tiny model: does memory grow, do file handles leak, does a step get slower?

    python benchmarks long-run --steps 20000

Prints one JSON record. Resident memory is read after a tenth of the steps and at the end. Needs Linux.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from metawrap import MAMLPlusPlus
from speed.machine import resident

LIMIT_MIB = 20.0


def tiny_tasks(index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two tasks of two classes; each index has its own."""
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(2, 8, 4, generator=generator)
    y = torch.arange(8).remainder(2).expand(2, 8)
    x = x + y[..., None]
    return x[:, :4], y[:, :4], x[:, 4:], y[:, 4:]


def open_files() -> int:
    """Open file handles of this process."""
    return len(os.listdir("/proc/self/fd"))


def long_run(steps: int, engine: str) -> dict[str, Any]:
    """Takes `steps` meta-steps, with an evaluation after each hundred, as a run has one after each epoch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    learner = MAMLPlusPlus(model, inner_steps=1, engine=engine, iterations_per_epoch=max(1, steps // 100))
    seconds: list[float] = []
    warm, files = 0.0, 0
    for index in range(steps):
        if index == steps // 10:
            gc.collect()
            warm, files = resident(), open_files()
        batch = tiny_tasks(index)
        begun = time.perf_counter()
        learner.meta_step(batch)
        seconds.append(time.perf_counter() - begun)
        if index % 100 == 99:
            learner.evaluate([tiny_tasks(10**9 + index)])
    gc.collect()
    tenth = max(1, steps // 10)
    # Medians, so that the checks at the first task do not count.
    first, last = statistics.median(seconds[:tenth]), statistics.median(seconds[-tenth:])
    return {
        "steps": steps,
        "engine": engine,
        "warm_mib": round(warm, 2),
        "end_mib": round(resident(), 2),
        "growth_mib": round(resident() - warm, 2),
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
