"""A measurement, or a contender that does a step when it is told to, in a process of its own.

In its own process, a measurement starts with a fresh heap, and ends alone if the system kills it for lack of memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

import metawrap
from rivals.cases import Case
from speed.machine import UNCACHED

Record = dict[str, Any]
BENCHMARKS = Path(__file__).parents[1]


def in_child(job: str, case: Case, shared: Record, **arguments: Any) -> list[Record]:
    """The records of one job, from a fresh process.

    Args:
        job: "agreement", "times" or "memory".
        shared: device, threads, allocator; and checkout, the folder of the metawrap to measure, if it is another one.
        arguments: further arguments of the job.
    Returns:
        The job's records, and one of kind "failed" if the process ended too early.
    """
    command = _command(job, case, shared, arguments)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=_environ(shared))
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"kind": ')]
    if done.returncode:
        reason = f"the process of '{job}' ended with status {done.returncode}, after {len(found)} records"
        found.append({"kind": "failed", "case": asdict(case), "setting": arguments.get("name"), "reason": reason})
    return found


class Apart:
    """A contender in a process of its own."""

    def __init__(self, case: Case, shared: Record, name: str) -> None:
        command = _command("serve", case, shared, {"name": name})
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environ(shared)
        )
        self._await("ready")

    def step(self) -> None:
        """One outer update, there."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        self._await("done")

    def gradients(self) -> dict[str, Tensor]:
        """The other process does not send them."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()

    def _await(self, word: str) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip() == word:
                return
        raise RuntimeError(f"its process ended with status {self._process.wait()} before it was {word}")


def _command(job: str, case: Case, shared: Record, arguments: Record) -> list[str]:
    order = {"job": job, "case": asdict(case), "shared": shared, "arguments": arguments}
    return [sys.executable, str(BENCHMARKS), "measure", json.dumps(order)]


def _environ(shared: Record) -> dict[str, str]:
    # Without a checkout, the metawrap of this process: another one would be measured without notice.
    folder = shared.get("checkout") or str(Path(metawrap.__file__).parents[1])
    path = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return os.environ | {"PYTHONPATH": path} | (UNCACHED if shared["allocator"] == "tuned" else {})
