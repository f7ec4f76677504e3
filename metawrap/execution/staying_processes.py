"""Forked processes that stay from one meta-step to the next.

A fork and the first use of each page take up to a third of a meta-step. A process knows nothing of what happens after
its fork, so it serves only while the fingerprint of all that its work can reach is the one of the fork. The weights and
buffers, which each meta-step changes, are sent to it.
"""

from __future__ import annotations

import os
import random
import stat
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metawrap.execution.forked_processes import (
    DIED,
    PATIENCE,
    Child,
    ChildError,
    Item,
    Result,
    fork,
    gathered,
    in_words,
    refuse_changes,
    serve,
)
from metawrap.execution.messages import receive, send
from metawrap.snapshot.fingerprint import Fingerprint
from metawrap.tasks import Task

_RANDOM: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
    (random.getstate, random.setstate),
    (np.random.get_state, np.random.set_state),
    (torch.get_rng_state, torch.set_rng_state),
]
Look = Callable[[], Fingerprint | None]
Watch = Callable[[], Callable[[], str | None]]


class StayingProcesses:
    """Processes that solve tasks in one meta-step after another."""

    def __init__(
        self,
        work: Callable[[Any], Any],
        tensors: Sequence[Tensor],
        ranks: range,
        world: Fingerprint,
        look: Look,
        watch: Watch,
    ) -> None:
        """Forks the processes.

        Args:
            work: of one item. tensors: whose values are sent before each meta-step.
            ranks: of the processes, among all that share a meta-step. world: the fingerprint now, as `look` gives it.
            watch: called before the items of a meta-step; returns `left`, as `in_processes` takes it.
        """
        self._world, self._ranks = world, ranks
        self._children: list[Child] = []
        self._end = weakref.finalize(self, _end_all, self._children, os.getpid())
        try:
            for rank in ranks:
                self._children.append(fork(partial(_stay, work, tensors, world, look, watch), rank))
        except BaseException:
            self.end()
            raise

    def fit(self, world: Fingerprint, ranks: range) -> bool:
        """Whether they were forked in the same world, and live."""
        same = self._world.content == world.content and self._ranks == ranks
        return same and self._end.alive and all(child.lives() for child in self._children)

    def run(
        self, items: Sequence[Item], tensors: Sequence[Tensor], own: Callable[[Item], Result] | None
    ) -> Iterator[Result]:
        """As `in_processes`; the values of `tensors` are those that the work needs now."""
        count, stay = self._ranks.stop, False
        try:
            for child in self._children:
                try:
                    send(child.pipe, (list(tensors), _random_states(), items[child.rank :: count]))
                except OSError as error:
                    raise ChildError(child.rank, DIED) from error
            last = yield from gathered(self._children, items, count, own)
            refuse_changes([reason for reason, _ in last])
            stay = all(same for _, same in last)
        finally:
            if not stay:
                self.end()

    def end(self) -> None:
        """Ends the processes; done too when the object is freed, and when the interpreter ends."""
        self._end()


def can_be_sent(tasks: Iterable[Task]) -> bool:
    """Whether tasks consist of plain tensors, which arrive as they are."""
    return all(type(task) is Task and all(map(_is_plain, vars(task).values())) for task in tasks)


def _is_plain(value: Any) -> bool:
    if type(value) is Tensor:
        return value.layout == torch.strided and value.is_contiguous() and not value.requires_grad and not vars(value)
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, [*value, *value.values()]))
    return type(value) in (type(None), bool, int, float, str)


def _end_all(children: list[Child], home: int) -> None:
    if os.getpid() == home:  # A process that was forked later has a copy of this object, and is not the parent.
        for child in children:
            child.end()


def _stay(
    work: Callable[[Any], Any],
    tensors: Sequence[Tensor],
    world: Fingerprint,
    look: Look,
    watch: Watch,
    pipe: Connection,
) -> None:
    _close_pipes({0, 1, 2, pipe.fileno()})
    home = os.getppid()
    while True:
        while not pipe.poll(PATIENCE):
            if os.getppid() != home:
                return
        values, states, items = receive(pipe)
        try:
            with torch.no_grad():
                for tensor, value in zip(tensors, values, strict=True):
                    tensor.copy_(value)
            for (_, put), state in zip(_RANDOM, states, strict=True):
                put(state)
            left = watch()
        except Exception as error:
            return send(pipe, ("failed", in_words(error)))
        serve(work, items, partial(_last_word, left, world, look), pipe)


def _random_states() -> list[Any]:
    return [read() for read, _ in _RANDOM]


def _close_pipes(kept: set[int]) -> None:
    """Whoever waits for the end of a pipe must not have to wait for this process."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # It need not be a file.
            kept.add(stream.fileno())
    for number in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):
            mode = os.fstat(number).st_mode
            if number not in kept and (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
                os.close(number)


def _last_word(left: Callable[[], str | None], world: Fingerprint, look: Look) -> tuple[str | None, bool]:
    """What the work has changed, or None; whether this process can serve in the next meta-step."""
    now = look()
    return left(), now is not None and now.content == world.content
