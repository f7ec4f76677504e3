"""Runs a benchmark by name, from any folder: `python benchmarks COMMAND ...`, and `python benchmarks COMMAND --help`.

compare    time and peak memory of a meta-step, against a plain loop, other libraries and other versions of metawrap
charts     draws the records of `compare` again
gpu        kernels of a meta-step, and percent of the GPU's ceilings
long-run   memory, file handles and speed over thousands of meta-steps
threads    throughput of adapt on one learner, from 1, 2 and 8 threads
omniglot   accuracy at the paper's Omniglot settings
photos     accuracy of a pretrained network with each simple head, without meta-training
measure    one measurement in a process of its own; `compare` starts it
"""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "compare": "speed.compare",
    "charts": "speed.charts",
    "gpu": "gpu.meta_step",
    "long-run": "speed.long_run",
    "threads": "speed.threads",
    "omniglot": "accuracy.omniglot",
    "photos": "accuracy.photos",
    "measure": "speed.measure",
}


def main() -> int | None:
    """Hands the rest of the command line to the command."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(__doc__, file=sys.stderr)
        return 2
    name = sys.argv.pop(1)
    sys.argv[0] = f"benchmarks {name}"
    result: int | None = importlib.import_module(COMMANDS[name]).main()
    return result


if __name__ == "__main__":
    sys.exit(main())
