"""Peak memory and time of a meta-step against inner steps, for both settings of `memory`.

    python benchmarks/memory.py --case A --steps 1 5 10 --json memory.json

Each figure is from a process of its own: the peak of resident memory above what the imports took, and the median of
three meta-steps. Cases as in meta_step.py.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from meta_step import CASES, make_batch, make_learner, seconds_of_step

MEGABYTE = 1024  # Linux counts ru_maxrss in kilobytes.


def measure(case: str, memory: str, steps: int) -> dict[str, object]:
    """In this process: peak in MB above the imports, and seconds of a meta-step."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    learner = make_learner(
        CASES[case], "functional", "cpu", torch.float32, first_order=False, inner_steps=steps, memory=memory
    )
    batch = make_batch(CASES[case], "cpu", torch.float32)
    seconds_of_step(learner, batch)
    times = [seconds_of_step(learner, batch) for _ in range(3)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "case": case,
        "memory": memory,
        "inner_steps": steps,
        "peak_mb": round(peak / MEGABYTE),
        "seconds": round(statistics.median(times), 3),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Measures every combination, and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="A", choices=list(CASES))
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 5, 10])
    parser.add_argument("--memory", nargs="+", default=["unrolled", "flat"])
    parser.add_argument("--json", type=Path, help="also write the records here, one per line")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.case, args.memory[0], args.steps[0])))
        return
    records = []
    for memory in args.memory:
        for steps in args.steps:
            command = [
                sys.executable,
                __file__,
                "--one",
                "--case",
                args.case,
                "--memory",
                memory,
                "--steps",
                str(steps),
            ]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            records.append(json.loads(output.splitlines()[-1]))
            print(
                "{case:>4}  {memory:<9} {inner_steps:>3} steps  {peak_mb:>6} MB  {seconds:.3f} s".format(**records[-1])
            )
    if args.json:
        args.json.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main()
