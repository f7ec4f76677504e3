"""The three measurements: agreement of gradients, interleaved times, peak memory. Each runs in a process of its own."""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from rivals.cases import Case, megabytes_of_inputs, small
from rivals.contenders import REFERENCE, SETTINGS, Contender, Setting, setting_of
from rivals.libraries import Skipped, require
from speed.machine import ChildrenWatch, environment, peak_resident, resident, set_allocator, use_threads
from speed.processes import Apart, Record

TOLERANCE = 1e-9
# Adam divides tiny gradients by their size, so each further step may multiply the rounding of the one before.
GROWTH_OF_ROUNDING = 10
CHECKED_TASKS = 2
SPREAD = 0.02  # Rates and rows differ from one another in a check, and every loss still falls.


def agreement(case: Case, names: Sequence[str], device: str) -> Iterator[Record]:
    """Each setting's float64 meta-gradient against the plain loop's, at every step until it settles.

    There are two tasks, or one for each rank. The error of a tensor is max|a - b| / max(max|b|, 1e-3 * the largest
    entry of all tensors), because a bias before a batch norm has a gradient of zero up to rounding. The record has the
    error of the worst tensor, divided by GROWTH_OF_ROUNDING for each step before.
    """
    case = replace(case, tasks=min(case.tasks, max(CHECKED_TASKS, case.ranks)))
    expected = {order: _Expected(case, device, first_order=order) for order in (False, True)}
    for name in names:
        setting = setting_of(name)
        try:
            contender = setting.build(case, torch.float64, device, SPREAD)
            worst = (0.0, "")
            for step in range(setting.settles):
                contender.step()
                error, tensor = worst_error(contender.gradients(), expected[setting.first_order].at(step))
                worst = max(worst, (error / GROWTH_OF_ROUNDING**step, tensor))
        except Exception as error:
            yield not_run(case, setting, error)
            continue
        finally:
            contender = None  # type: ignore[assignment]
        yield {
            "kind": "agreement",
            "case": asdict(case),
            "setting": name,
            "relative_error": worst[0],
            "worst_tensor": worst[1],
            "steps": setting.settles,
            "agrees": worst[0] < TOLERANCE,
        }


class _Expected:
    """The plain loop's gradients, step by step; each is computed once, when it is asked for."""

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
    case: Case,
    names: Sequence[str],
    device: str,
    repeats: int,
    threads: int,
    allocator: str = "default",
    apart: Sequence[str] = (),
) -> Iterator[Record]:
    """Seconds of a float32 meta-step: one of each setting in turn, in a new order at each repeat.

    Args:
        apart: settings that step in processes of their own, besides those that always do and those of several ranks. A
            setting that has the metawrap of another checkout gives a record of kind "versions", too: the time of the
            same setting here over the time there, as the median over repeats.
    """
    contenders: dict[str, Contender] = {}
    first: dict[str, float] = {}
    for name in names:
        setting = setting_of(name)
        shared = {"device": device, "threads": threads, "allocator": allocator, "checkout": setting.checkout}
        try:
            ranks = setting.ranks(case)
            away = setting.apart or name in apart or ranks > 1
            contenders[name] = Apart(case, shared, name, ranks) if away else setting.build(case, torch.float32, device)
            first[name] = seconds_of_step(contenders[name], device, threads)
            for _ in range(setting.settles):
                contenders[name].step()
        except Exception as error:
            contenders.pop(name, None)
            yield not_run(case, setting, error)
    seconds = interleaved(contenders, repeats, device, threads)
    for contender in contenders.values():
        if isinstance(contender, Apart):
            contender.close()
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
        if (here := name.partition(" at ")[0]) != name and here in seconds:
            ratio = statistics.median(a / b for a, b in zip(seconds[here], found, strict=True))
            yield {"kind": "versions", "case": asdict(case), "setting": name, "here_over_there": ratio}


def interleaved(contenders: Mapping[str, Contender], repeats: int, device: str, threads: int) -> dict[str, list[float]]:
    """Seconds of `repeats` meta-steps of each contender, one of each in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order, shuffled = list(contenders), random.Random(0)
    for _ in range(repeats):
        # The caches hold the data of the previous contender, which should not always be the same one.
        shuffled.shuffle(order)
        for name in order:
            seconds[name].append(seconds_of_step(contenders[name], device, threads))
    return seconds


def serve(case: Case, name: str, device: str, threads: int) -> Iterator[Record]:
    """The other side of `Apart`: a step for each line of the standard input. Yields nothing."""
    contender = setting_of(name).build(case, torch.float32, device)
    print("ready", flush=True)
    for _ in sys.stdin:
        seconds_of_step(contender, device, threads)
        print("done", flush=True)
    yield from ()


def seconds_of_step(contender: Contender, device: str, threads: int) -> float:
    """Wall time of one meta-step, the device's work included."""
    # Another contender may have changed the number of threads.
    torch.set_num_threads(threads)
    return seconds_of(contender.step, device)


def seconds_of(work: Callable[[], Any], device: str) -> float:
    """Wall time of a call, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Waits for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def memory(case: Case, name: str, device: str, threads: int) -> Iterator[Record]:
    """Peak MB of one setting over a few meta-steps, above its imports, and of the device's allocator.

    The peak is that of this process, or of this process and its children together where the setting forks.

    Needs a fresh process. Much of torch is imported when it is first used (150 MB by the first optimizer). For this
    reason a tiny meta-step of the plain loop runs first, and counts as an import.
    """
    setting = setting_of(name)
    try:
        for module in setting.needs:
            require(module)
        seconds_of_step(SETTINGS[REFERENCE].build(small(case), torch.float32, device), device, threads)
        cuda = device.startswith("cuda")
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        before = resident()
        with ChildrenWatch() as children:
            contender = setting.build(case, torch.float32, device)
            for _ in range(setting.settles + 2):
                seconds_of_step(contender, device, threads)
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


def run_job(order: Record) -> Iterator[Record]:
    """The job that `in_child` or `Apart` asked for, in this process."""
    shared, job, ranks = order["shared"], order["job"], int(os.environ.get("WORLD_SIZE", "1"))
    set_allocator(shared["allocator"])
    use_threads(shared["threads"], shared["device"])
    if ranks > 1:  # They share the cores.
        shared["threads"] = max(1, shared["threads"] // ranks)
        torch.set_num_threads(shared["threads"])
        torch.distributed.init_process_group("gloo")
    takes = {"agreement": (), "times": ("threads", "allocator")}.get(job, ("threads",))
    arguments = {name: shared[name] for name in ("device", *takes)} | order["arguments"]
    everywhere = environment(shared["device"], shared["allocator"])
    for record in JOBS[job](Case(**order["case"]), **arguments):
        yield record | everywhere
    if ranks > 1:
        torch.distributed.destroy_process_group()


def main() -> None:
    """Prints the records of the job in the first argument."""
    for record in run_job(json.loads(sys.argv[1])):
        print(json.dumps(record), flush=True)
