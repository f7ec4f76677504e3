"""How tasks are run, which changes their time and never their result: chosen by measurement where that is asked for."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

# What has to be gained before the plain way is left: less would be noise.
_GAIN = 0.97
# Worker threads are taken even if they are 3 % slower than torch's own threads. Torch's threads wait for each other in
# every operation, so another program that delays one of them delays all.
_GAIN_OF_THREADS = 1.03
# The loss of channels_last with one worker up to which it is tried with several.
_LAYOUT_LOSS = 1.2
# Two ways whose times differ by less than this factor are timed once more, because noise could decide between them.
_NEAR = 1.2


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
    """The fastest way, or threads nearly as fast.

    Each way is timed once, and the two fastest a second time. If these two are within 20 % of each other, they are
    timed a third time. Of several times of one way, the shortest counts.

    Args:
        run: the meta-gradient of one batch; a way in which it raises is passed over, unless it is the plain one.
        layouts, workers: what may be tried besides the plain way; known to give the same gradient. workers: how many,
            and whether they are processes.
    """
    plain = Speed()
    seconds = {plain: _seconds(run, plain)}

    def tried(way: Speed) -> None:
        with suppress(Exception):  # What fails in every way was raised by the plain one.
            if way.processes:
                run(way)  # Forks them; from then on they stay.
            seconds[way] = _seconds(run, way)

    for layout in layouts:
        tried(Speed(1, layout))
    # An operation in one thread, as workers run it, gains more from channels_last than one in several.
    last = seconds.get(Speed(1, True), math.inf) < _LAYOUT_LOSS * seconds[plain]
    for count, processes in workers:
        tried(Speed(count, last, processes))
    for near in (math.inf, _NEAR):
        two = sorted(seconds, key=seconds.__getitem__)[:2]
        if len(two) > 1 and seconds[two[1]] < near * seconds[two[0]]:
            for way in two:
                seconds[way] = min(seconds[way], _seconds(run, way))
    chosen, to_beat = plain, seconds[plain]
    for way, taken in seconds.items():
        first_threads = chosen.workers == 1 != way.workers and not way.processes
        if taken < (_GAIN_OF_THREADS if first_threads else _GAIN) * to_beat:
            chosen, to_beat = way, min(to_beat, taken)
    why = f"measured on a short inner loop: {seconds[chosen]:.3g} s for a meta-gradient"
    if chosen != plain:
        why += f", {seconds[plain]:.3g} s one after another" + (" in the usual layout" if chosen.channels_last else "")
    return replace(chosen, why=why)


def _seconds(run: Callable[[Speed], Any], speed: Speed) -> float:
    start = time.perf_counter()
    run(speed)
    return time.perf_counter() - start
