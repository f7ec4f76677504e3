"""A measurement, or a contender that does a step when it is told to, in a process of its own.

In its own process, a measurement starts with a fresh heap, and ends alone if the system kills it for lack of memory.
Several processes do it together where the contender needs them, as a group of torch.distributed.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

import metawrap
from rivals.cases import Case
from speed.machine import UNCACHED

Record = dict[str, Any]
BENCHMARKS = Path(__file__).parents[1]


def in_child(job: str, case: Case, shared: Record, ranks: int = 1, **arguments: Any) -> list[Record]:
    """The records of one job, from a fresh process, or from several that do it together.

    Args:
        job: "agreement", "times" or "memory".
        shared: device, threads, allocator; and checkout, the folder of the metawrap to measure, if it is another one.
        ranks: how many processes; "agreement" and "memory" can be done by several.
        arguments: further arguments of the job.
    Returns:
        The job's records, and one of kind "failed" if a process ended too early. Of several processes: the largest
        error of an agreement, and the sum of their memory.
    """
    started = _started(job, case, shared, arguments, ranks)
    printed = [process.communicate()[0] for process in started]
    found = [[json.loads(line) for line in text.splitlines() if line.startswith('{"kind": ')] for text in printed]
    records = [_of_all(of_ranks) for of_ranks in zip(*found, strict=False)]
    if status := next((process.returncode for process in started if process.returncode), None):
        reason = f"the process of '{job}' ended with status {status}, after {len(records)} records"
        records.append({"kind": "failed", "case": asdict(case), "setting": arguments.get("name"), "reason": reason})
    return records


def _of_all(records: Sequence[Record]) -> Record:
    """One record for the processes that did a job together."""
    if not_run := [record for record in records if record["kind"] in ("skipped", "failed")]:
        return not_run[0]
    if records[0]["kind"] == "memory":
        return records[0] | {"peak_mb": round(sum(record["peak_mb"] for record in records), 1)}
    return max(records, key=lambda record: record.get("relative_error", 0.0))


class Apart:
    """A contender in a process of its own, or in several that step together."""

    def __init__(self, case: Case, shared: Record, name: str, ranks: int = 1) -> None:
        self._processes = _started("serve", case, shared, {"name": name}, ranks, stdin=subprocess.PIPE)
        self._await("ready")

    def step(self) -> None:
        """One outer update, there."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("step\n")
            process.stdin.flush()
        self._await("done")

    def gradients(self) -> dict[str, Tensor]:
        """The other process does not send them."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            with process:  # Waits, and closes its other streams.
                pass

    def _await(self, word: str) -> None:
        for process in self._processes:
            assert process.stdout is not None
            if not any(line.strip() == word for line in process.stdout):
                raise RuntimeError(f"its process ended with status {process.wait()} before it was {word}")


def _started(
    job: str, case: Case, shared: Record, arguments: Record, ranks: int, stdin: int | None = None
) -> list[subprocess.Popen[str]]:
    order = {"job": job, "case": asdict(case), "shared": shared, "arguments": arguments}
    command = [sys.executable, str(BENCHMARKS), "measure", json.dumps(order)]
    return [
        subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, text=True, env=_environ(shared) | group)
        for group in _group_of(ranks)
    ]


def _group_of(ranks: int) -> list[dict[str, str]]:
    """The variables by which the processes of a group find each other (torch.distributed, `env://`)."""
    if ranks == 1:
        return [{"WORLD_SIZE": "1"}]  # torchrun may have set another one.
    with socket.create_server(("127.0.0.1", 0)) as server:
        everyone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    return [everyone | {"RANK": str(rank)} for rank in range(ranks)]


def _environ(shared: Record) -> dict[str, str]:
    # Without a checkout, the metawrap of this process: another one would be measured without notice.
    folder = shared.get("checkout") or str(Path(metawrap.__file__).parents[1])
    path = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return os.environ | {"PYTHONPATH": path} | (UNCACHED if shared["allocator"] == "tuned" else {})
