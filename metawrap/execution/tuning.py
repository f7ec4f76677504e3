"""How tasks are run, which changes their time and never their result: chosen by measurement where that is asked for."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

# What has to be gained before the plain way is left: less would be noise.
_GAIN = 0.97
# Worker threads are taken even if they are 3 % slower than torch's own threads. Torch's threads wait for each other in
# every operation, so another program that delays one of them delays all.
_GAIN_OF_THREADS = 1.03
_REPEATS = 2
_HOPELESS = 1.5


@dataclass(frozen=True)
class Speed:
    """workers: how many solve tasks at the same time; "auto": one a core. channels_last: the layout of images.

    processes: whether they are processes, and not threads.
    """

    workers: int | str = 1
    channels_last: bool = False
    processes: bool = False
    why: str = ""

    def number_of_workers(self, chunks: int) -> int:
        """No more than there is work for; chunks: what can be run at the same time."""
        return min(torch.get_num_threads() if isinstance(self.workers, str) else self.workers, chunks)

    def __str__(self) -> str:
        kind = "process" if self.processes else "thread"
        plural = f"{kind}es" if self.processes else f"{kind}s"
        many = f"one {kind} a core" if isinstance(self.workers, str) else f"{self.workers} {plural}"
        workers = "one task after another" if self.workers == 1 else f"{many}, a task in each"
        layout = ", images in channels_last" if self.channels_last else ""
        return workers + layout + (f" ({self.why})" if self.why else "")


def fastest(run: Callable[[Speed], Any], layouts: Iterable[bool], workers: Iterable[tuple[int, bool]]) -> Speed:
    """The fastest way, or threads nearly as fast: first the layout with one worker, then the workers.

    Args:
        run: the meta-gradient of one batch; a way in which it raises is passed over, unless it is the plain one.
        layouts, workers: what may be tried besides the plain way; known to give the same gradient. workers: how many,
            and whether they are processes.
    """
    plain = Speed()
    seconds = {plain: _seconds(run, plain)}

    def best(candidates: Iterable[Speed], so_far: Speed) -> Speed:
        to_beat = seconds[so_far]
        for candidate in candidates:
            if candidate not in seconds:
                try:
                    seconds[candidate] = _seconds(run, candidate, to_beat)
                except Exception:  # What fails in every way was raised by the plain one.
                    continue
                first_threads = so_far.workers == 1 != candidate.workers and not candidate.processes
                if seconds[candidate] < (_GAIN_OF_THREADS if first_threads else _GAIN) * to_beat:
                    so_far, to_beat = candidate, min(to_beat, seconds[candidate])
        return so_far

    chosen = best((Speed(1, layout) for layout in layouts), plain)
    chosen = best((Speed(count, chosen.channels_last, processes) for count, processes in workers), chosen)
    why = f"measured: {seconds[chosen]:.3g} s for a meta-gradient"
    if chosen != plain:
        why += f", {seconds[plain]:.3g} s one after another" + (" in the usual layout" if chosen.channels_last else "")
    return replace(chosen, why=why)


def _seconds(run: Callable[[Speed], Any], speed: Speed, to_beat: float = math.inf) -> float:
    """The shortest time of some runs; of fewer where the first is far behind."""
    times: list[float] = []
    while len(times) < _REPEATS and min(times, default=0) < _HOPELESS * to_beat:
        start = time.perf_counter()
        run(speed)
        times.append(time.perf_counter() - start)
    return min(times)
