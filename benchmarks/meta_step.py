"""Times one meta-step in each engine, interleaved in one run, after checking that their gradients agree.

    python benchmarks/meta_step.py --cases A B --repeats 15 --json meta_step.json

Cases, all Conv4, second order, 5 inner steps. A: 5-way 1-shot, 28x28x1, 64 filters, 1 target per class, 8 tasks.
A15: the same with 15 targets per class. B: 20-way 1-shot, 4 tasks. C: 84x84x3, 48 filters, 5-way 1-shot, 15 targets,
2 tasks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from metawrap import MAMLPlusPlus, TaskBatch
from metawrap.backbones import Conv4
from metawrap.engines import ENGINES


@dataclass(frozen=True)
class Case:
    """One setting: image side in pixels, channels, filters, and the shape of a task batch."""

    name: str
    ways: int
    shots: int
    targets: int
    tasks: int
    side: int = 28
    channels: int = 1
    filters: int = 64


CASES = {
    case.name: case
    for case in (
        Case("A", ways=5, shots=1, targets=1, tasks=8),
        Case("A15", ways=5, shots=1, targets=15, tasks=8),
        Case("B", ways=20, shots=1, targets=1, tasks=4),
        Case("C", ways=5, shots=1, targets=15, tasks=2, side=84, channels=3, filters=48),
    )
}


def make_batch(case: Case, device: str, dtype: torch.dtype) -> TaskBatch:
    """Random images with balanced labels."""
    generator = torch.Generator().manual_seed(0)

    def part(per_class: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(case.ways).repeat_interleave(per_class).repeat(case.tasks, 1)
        images = torch.rand(*labels.shape, case.channels, case.side, case.side, generator=generator)
        return images.to(device, dtype), labels.to(device)

    return TaskBatch.stacked(*part(case.shots), *part(case.targets))


def make_learner(
    case: Case, engine: str, device: str, dtype: torch.dtype, first_order: bool, **options: Any
) -> MAMLPlusPlus:
    """The same initial weights for every engine."""
    torch.manual_seed(0)
    model = Conv4(case.channels, case.side, case.ways, case.filters).to(device, dtype)
    epochs = 1_000 if first_order else 0
    return MAMLPlusPlus(model, engine=engine, first_order_epochs=epochs, epochs=max(epochs, 1) + 1, **options)


def check_gradients(case: Case, device: str) -> float:
    """The engines' largest difference in the float64 meta-gradient of two tasks, relative to its largest entry."""
    found = []
    for engine in ENGINES:
        learner = make_learner(case, engine, device, torch.float64, first_order=False)
        learner(TaskBatch(make_batch(case, device, torch.float64).tasks[:2])).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in learner.parameters() if p.grad is not None]))
    return max(float((other - found[0]).abs().max() / found[0].abs().max()) for other in found[1:])


def seconds_of_step(learner: MAMLPlusPlus, batch: TaskBatch) -> float:
    """Wall time of one meta-step, the device's work included."""
    start = time.perf_counter()
    learner.meta_step(batch)
    if batch[0].support_y.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def bench_meta_step(case: Case, device: str, repeats: int, first_order: bool) -> dict[str, object]:
    """Median seconds per engine, and their ratio to `functional`."""
    difference = check_gradients(case, device)
    assert difference < 1e-9, f"the engines disagree by {difference:.1e}: timing them would mean nothing"
    batch = make_batch(case, device, torch.float32)
    learners = {engine: make_learner(case, engine, device, torch.float32, first_order) for engine in ENGINES}
    for learner in learners.values():
        seconds_of_step(learner, batch)
    times: dict[str, list[float]] = {engine: [] for engine in learners}
    for _ in range(repeats):
        for engine, learner in learners.items():
            times[engine].append(seconds_of_step(learner, batch))
    medians = {engine: statistics.median(values) for engine, values in times.items()}
    return {
        "case": asdict(case),
        "order": "first" if first_order else "second",
        "median_s": {engine: round(value, 4) for engine, value in medians.items()},
        "ratio_to_functional": {engine: round(value / medians["functional"], 3) for engine, value in medians.items()},
        "repeats": repeats,
        "gradient_difference": difference,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }


def main() -> None:
    """Runs the cases and prints one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["A"], choices=list(CASES))
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--first-order", action="store_true", help="time first-order steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the records here, one per line")
    args = parser.parse_args()
    records = []
    for name in args.cases:
        record = bench_meta_step(CASES[name], args.device, args.repeats, args.first_order)
        records.append(record)
        medians = ", ".join(f"{engine} {seconds:.3f} s" for engine, seconds in record["median_s"].items())  # type: ignore[attr-defined]
        ratio = record["ratio_to_functional"]["higher"]  # type: ignore[index]
        print(f"{name:>4}  {record['order']} order  {medians}  higher/functional {ratio:.2f}")
    if args.json:
        args.json.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main()
