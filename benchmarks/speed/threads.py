"""Throughput of `adapt` on one learner, from 1, 2 and 8 threads.

    OMP_NUM_THREADS=1 python benchmarks threads --out runs/threads.jsonl

Each thread has one intra-op thread. Prints one JSON record for each method and number of threads, best of the repeats.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from metawrap import MAMLPlusPlus, ProtoNet, Task, TaskBatch
from metawrap.backbones import Conv4
from metawrap.learner.learner import Learner
from speed.machine import environment


def case(method: str, filters: int) -> tuple[Learner, Task]:
    """A learner of a Conv4 on 28x28 images that has seen a 5-way 1-shot task, and the task."""
    torch.manual_seed(0)
    learner = (MAMLPlusPlus if method == "maml++" else ProtoNet)(Conv4(filters=filters))
    y = torch.arange(5)
    task = Task(torch.randn(5, 1, 28, 28), y, torch.randn(5, 1, 28, 28), y)
    learner.evaluate(TaskBatch((task,)))
    return learner, task


def calls_per_second(learner: Learner, task: Task, threads: int, calls: int) -> float:
    """How many `adapt` calls end in a second, all threads together."""

    def work(count: int) -> None:
        torch.set_num_threads(1)
        for _ in range(count):
            learner.adapt(task.support_x, task.support_y)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, [1] * threads))
        begun = time.perf_counter()
        list(pool.map(work, [calls // threads] * threads))
        return calls // threads * threads / (time.perf_counter() - begun)


def main() -> None:
    """Measures both methods, and prints and stores the records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--filters", type=int, default=64, help="of the Conv4 (64)")
    parser.add_argument("--calls", type=int, default=80, help="adapt calls of one measurement (80)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements, the best of which counts (3)")
    parser.add_argument("--out", type=Path, help="JSON Lines file that gets the records too")
    arguments = parser.parse_args()
    records: list[dict[str, Any]] = []
    for method in ("maml++", "protonet"):
        learner, task = case(method, arguments.filters)
        for threads in (1, 2, 8):
            found = [calls_per_second(learner, task, threads, arguments.calls) for _ in range(arguments.repeats)]
            known = {"method": method, "filters": arguments.filters, "threads": threads}
            records.append(known | {"adapts_per_s": round(max(found), 2)})
            print(json.dumps(records[-1]), flush=True)
    machine = environment("cpu", "default")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text("".join(json.dumps(record | machine) + "\n" for record in records))
