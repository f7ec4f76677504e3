"""The three measurements: agreement of gradients, interleaved times, peak memory. Each runs in a process of its own.

`in_child` starts that process, so that one measurement's heap is not the next one's, and a run that is killed for
memory ends one measurement and not all.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from cases import Case, megabytes_of_inputs, small
from competitors import REFERENCE, SETTINGS, Competitor, Setting
from machine import UNCACHED, ChildrenWatch, environment, peak_resident, resident, set_allocator, use_threads
from peers import Skipped, require
from torch import Tensor

import metawrap

Record = dict[str, Any]
TOLERANCE = 1e-9
CHECKED_TASKS = 2
SPREAD = 0.02  # Rates and rows differ from one another in a check, and every loss still falls.


def agreement(case: Case, names: Sequence[str], device: str) -> Iterator[Record]:
    """Each setting's float64 meta-gradient against the plain loop's, on two tasks, at every step until it settles.

    The error is max|a - b| over max(max|b|, 1e-3 * the largest entry of all), the worst of all tensors: a bias before a
    batch norm has a gradient of zero up to rounding.
    """
    case = replace(case, tasks=min(case.tasks, CHECKED_TASKS))
    expected = {order: _Expected(case, device, first_order=order) for order in (False, True)}
    for name in names:
        setting = SETTINGS[name]
        try:
            competitor = setting.build(case, torch.float64, device, SPREAD)
            worst = (0.0, "")
            for step in range(setting.settles):
                competitor.step()
                worst = max(worst, worst_error(competitor.gradients(), expected[setting.first_order].at(step)))
        except Exception as error:
            yield not_run(case, setting, error)
            continue
        finally:
            competitor = None  # type: ignore[assignment]
        agrees = worst[0] < TOLERANCE
        yield {
            "kind": "agreement",
            "case": asdict(case),
            "setting": name,
            "relative_error": worst[0],
            "worst_tensor": worst[1],
            "steps": setting.settles,
            "agrees": agrees,
        }


class _Expected:
    """The plain loop's gradients, step by step, each computed once and when it is asked for."""

    def __init__(self, case: Case, device: str, first_order: bool) -> None:
        name = "plain first-order" if first_order else REFERENCE
        self.loop = SETTINGS[name].build(case, torch.float64, device, SPREAD)
        self.found: list[dict[str, Tensor]] = []

    def at(self, step: int) -> dict[str, Tensor]:
        while len(self.found) <= step:
            self.loop.step()
            self.found.append({name: value.clone() for name, value in self.loop.gradients().items()})
        return self.found[step]


def worst_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error and the tensor that has it; infinite where a tensor is missing or is not finite."""
    if unequal := found.keys() ^ expected.keys():
        return float("inf"), min(unequal)
    largest = max(float(value.abs().max()) for value in expected.values())
    errors = []
    for name, value in expected.items():
        got = found[name].detach().to(value.device)
        error = float((got - value).abs().max()) if got.shape == value.shape else float("inf")
        scale = max(float(value.abs().max()), 1e-3 * largest)
        errors.append((error / scale if error == error else float("inf"), name))
    return max(errors)


def times(
    case: Case, names: Sequence[str], device: str, repeats: int, threads: int, allocator: str = "default"
) -> Iterator[Record]:
    """Seconds of a float32 meta-step: one of each setting in turn, in a new order at each repeat."""
    competitors: dict[str, Competitor] = {}
    first: dict[str, float] = {}
    for name in names:
        try:
            shared = {"device": device, "threads": threads, "allocator": allocator}
            apart = SETTINGS[name].apart
            competitors[name] = (
                Apart(case, shared, name) if apart else SETTINGS[name].build(case, torch.float32, device)
            )
            first[name] = seconds_of_step(competitors[name], device, threads)
            for _ in range(SETTINGS[name].settles):
                competitors[name].step()
        except Exception as error:
            competitors.pop(name, None)
            yield not_run(case, SETTINGS[name], error)
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    order, shuffled = list(competitors), random.Random(0)
    for _ in range(repeats):
        # Who ran before leaves its traces in the caches: not always the same one.
        shuffled.shuffle(order)
        for name in order:
            seconds[name].append(seconds_of_step(competitors[name], device, threads))
    for competitor in competitors.values():
        if isinstance(competitor, Apart):
            competitor.close()
    reference = statistics.median(seconds[REFERENCE]) if REFERENCE in seconds else None
    for name, found in seconds.items():
        low, middle, high = statistics.quantiles(found, n=4, method="inclusive") if repeats > 1 else found * 3
        yield {
            "kind": "time",
            "case": asdict(case),
            "setting": name,
            "median_s": middle,
            "q1_s": low,
            "q3_s": high,
            "ratio_to_plain": middle / reference if reference else None,
            "seconds": found,
            "first_step_s": first[name],
            "repeats": repeats,
            "threads": threads,
        }


class Apart:
    """A competitor in a process of its own, which does a step when it is told to."""

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
        """They stay there."""
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


def serve(case: Case, name: str, device: str, threads: int) -> Iterator[Record]:
    """The other side of `Apart`; yields nothing."""
    competitor = SETTINGS[name].build(case, torch.float32, device)
    print("ready", flush=True)
    for _ in sys.stdin:
        seconds_of_step(competitor, device, threads)
        print("done", flush=True)
    yield from ()


def seconds_of_step(competitor: Competitor, device: str, threads: int) -> float:
    """Wall time of one meta-step, the device's work included."""
    # A setting that moves the number of threads moves it for itself alone.
    torch.set_num_threads(threads)
    synchronize(device)
    start = time.perf_counter()
    competitor.step()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Waits for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def memory(case: Case, name: str, device: str, threads: int) -> Iterator[Record]:
    """Peak MB of one setting over a few meta-steps, above its imports, and of the device's allocator.

    Of this process, or where it forks others, of all of them together.

    Belongs into a fresh process. Much of torch is imported when it is first used (150 MB by the first optimizer), so a
    tiny meta-step of the plain loop counts among the imports.
    """
    setting = SETTINGS[name]
    try:
        for module in setting.needs:
            require(module)
        seconds_of_step(SETTINGS[REFERENCE].build(small(case), torch.float32, device), device, threads)
        cuda = device.startswith("cuda")
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        before = resident()
        with ChildrenWatch() as children:
            competitor = setting.build(case, torch.float32, device)
            for _ in range(setting.settles + 2):
                seconds_of_step(competitor, device, threads)
        peak = max(peak_resident() - before, children.peak)
    except Exception as error:
        yield not_run(case, setting, error)
        return
    yield {
        "kind": "memory",
        "case": asdict(case),
        "setting": name,
        "peak_mb": round(peak, 1),
        "device_peak_mb": round(torch.cuda.max_memory_allocated() / 2**20, 1) if cuda else None,
        "inputs_mb": round(megabytes_of_inputs(case), 1),
        "threads": threads,
    }


def not_run(case: Case, setting: Setting, error: Exception) -> Record:
    """The record of a setting that is skipped, or has failed."""
    skipped = isinstance(error, Skipped)
    text = str(error) if skipped else f"{type(error).__name__}: {error}"
    reason = " ".join(text.split())
    return {"kind": "skipped" if skipped else "failed", "case": asdict(case), "setting": setting.name, "reason": reason}


JOBS = {"agreement": agreement, "times": times, "memory": memory, "serve": serve}


def in_child(job: str, case: Case, shared: Record, **arguments: Any) -> list[Record]:
    """The records of one job, from a fresh process.

    Args:
        shared: device, threads, allocator.
    Returns:
        What it has written; and a record of kind "failed" if it ended before its time.
    """
    command = _command(job, case, shared, arguments)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=_environ(shared))
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"kind": ')]
    if done.returncode:
        reason = f"the process of '{job}' ended with status {done.returncode}, after {len(found)} records"
        found.append({"kind": "failed", "case": asdict(case), "setting": arguments.get("name"), "reason": reason})
    return found


def _command(job: str, case: Case, shared: Record, arguments: Record) -> list[str]:
    order = {"job": job, "case": asdict(case), "shared": shared, "arguments": arguments}
    return [sys.executable, __file__, json.dumps(order)]


def _environ(shared: Record) -> dict[str, str]:
    # The metawrap of this process, wherever it was found: another would be measured in silence.
    path = os.pathsep.join([str(Path(metawrap.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path.rstrip(os.pathsep)} | (UNCACHED if shared["allocator"] == "tuned" else {})


def run_job(order: Record) -> Iterator[Record]:
    """What `in_child` asked for, in this process."""
    shared = order["shared"]
    set_allocator(shared["allocator"])
    use_threads(shared["threads"], shared["device"])
    arguments = {"device": shared["device"], **order["arguments"]}
    if order["job"] != "agreement":
        arguments["threads"] = shared["threads"]
    if order["job"] == "times":
        arguments["allocator"] = shared["allocator"]
    everywhere = environment(shared["device"], shared["allocator"])
    for record in JOBS[order["job"]](Case(**order["case"]), **arguments):
        yield record | everywhere


if __name__ == "__main__":
    for record in run_job(json.loads(sys.argv[1])):
        print(json.dumps(record), flush=True)
