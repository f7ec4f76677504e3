"""Tasks in forked processes: each holds what the learner holds at that moment.

Parameters, the user's own attributes, closures and globals are shared as they stand, page by page. Results come back in
task order. Unlike threads, processes do not wait for each other's Python. This process can do the work of one: a fork
costs a copy of every page that its tasks write to. Processes of this file end with their meta-step; those of
staying_processes.py stay.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

from metawrap.execution.messages import receive, send

Item = TypeVar("Item")
Result = TypeVar("Result")

# Results that may stand in the parent, for each process, before the one that is next in order has come.
_AHEAD = 2
PATIENCE = 0.5  # Seconds.
DIED = "a process that solved tasks died; it may have run out of memory"


class ChildError(Exception):
    """A process failed, or died. index: of the item that it was at."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


def refused() -> str | None:
    """Why processes cannot be forked here, or None."""
    if sys.platform != "linux":
        return "processes are forked on Linux alone"
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return "CUDA was used in this process, and cannot be carried into a forked one"
    return None


def in_processes(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    count: int,
    left: Callable[[], str | None],
    own: Callable[[Item], Result] | None = None,
) -> Iterator[Result]:
    """`work(item)` for each item, in `count` forked processes with one intra-op thread each; results in order.

    Args:
        left: run in each process at its end; says what the work has changed there, which nobody else will see.
        own: does the work of one of the processes in this one, which saves a fork; left out, all are forked.
    Raises:
        ChildError: the work raised, or a process died; what it sent before stands.
        LeftBehindError: `left` said something.
    """
    count = max(1, min(count, len(items)))
    children: list[Child] = []
    try:
        for rank in range(own is not None, count):
            children.append(fork(partial(serve, work, items[rank::count], left), rank))
        refuse_changes((yield from gathered(children, items, count, own)))
    finally:
        for child in children:
            child.end()


class LeftBehindError(Exception):
    """The work changed something in its process."""


@dataclass
class Child:
    """rank: its place. next: index of the item whose result comes next. room: for results that wait here."""

    pid: int
    pipe: Connection
    rank: int
    next: int = 0
    room: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(_AHEAD))
    reader: threading.Thread | None = None
    ended: bool = False

    def read_into(self, arrived: SimpleQueue[Any], results: int) -> None:
        """Receives in a thread: a pipe holds 64 KiB, and this process may be at work of its own."""

        def read() -> None:
            for _ in range(results):
                self.room.acquire()
                if self.ended:
                    return
                try:
                    arrived.put((self, receive(self.pipe)))
                except (EOFError, OSError):
                    return arrived.put((self, ("failed", DIED)))
                except BaseException as error:
                    return arrived.put((self, ("raised", error)))

        reader = threading.Thread(target=read, name="metawrap-reader", daemon=True)
        reader.start()
        self.reader = reader

    def lives(self) -> bool:
        """Whether it has not ended."""
        try:
            return os.waitpid(self.pid, os.WNOHANG) == (0, 0)
        except ChildProcessError:  # Somebody else has waited for it.
            return False

    def end(self) -> None:
        """Kills it and waits until it is gone."""
        if self.lives():  # Or the number may be that of another process by now.
            os.kill(self.pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        self.ended = True
        if self.reader is not None:
            self.room.release()
            self.reader.join(PATIENCE)  # It waits for ever where a process that the child began holds the pipe.
        if self.reader is None or not self.reader.is_alive():
            self.pipe.close()


def gathered(
    children: list[Child], items: Sequence[Any], count: int, own: Callable[[Any], Any] | None
) -> Generator[Any, None, list[Any]]:
    """Yields the results in the order of the items; returns what each process said at its end."""
    threads = torch.get_num_threads()
    try:
        if own is not None:
            torch.set_num_threads(1)
        return (yield from _in_order(children, items, count, own))
    finally:
        torch.set_num_threads(threads)


def _in_order(
    children: list[Child], items: Sequence[Any], count: int, own: Callable[[Any], Any] | None
) -> Generator[Any, None, list[Any]]:
    arrived: SimpleQueue[tuple[Child, Any]] = SimpleQueue()
    for child in children:
        child.next, child.room = child.rank, threading.Semaphore(_AHEAD)
        child.read_into(arrived, len(range(child.rank, len(items), count)) + 1)
    mine = deque(range(0, len(items) if own else 0, count))
    early: dict[int, Any] = {}
    for index in range(len(items)):
        while index not in early:
            if own and mine and mine[0] < index + _AHEAD * count and arrived.empty():
                early |= _done(own, items, mine.popleft())
            else:
                _take(arrived, early, count)
        yield early.pop(index)
        for child in children:
            if (child.next - index) % count == 0:
                child.room.release()
    while len(early) < len(children):  # The last word of each stands behind its items.
        _take(arrived, early, count)
    return list(early.values())


def refuse_changes(reasons: Sequence[str | None]) -> None:
    """Raises LeftBehindError where a process has said that something was changed."""
    for reason in filter(None, reasons):
        raise LeftBehindError(reason)


def _done(own: Callable[[Any], Any], items: Sequence[Any], index: int) -> dict[int, Any]:
    try:
        return {index: own(items[index])}
    except Exception as error:
        raise ChildError(index, in_words(error)) from error


def _take(arrived: SimpleQueue[tuple[Child, Any]], early: dict[int, Any], count: int) -> None:
    child, (kind, value) = arrived.get()
    if kind == "failed":
        raise ChildError(child.next, value)
    if kind == "raised":
        raise value
    early[child.next] = value
    child.next += count


def fork(job: Callable[[Connection], Any], rank: int) -> Child:
    """A process that does the job, given its end of a pipe."""
    here, there = Pipe()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # Or a child would print again what waits to be printed.
    drawn = random.getstate()
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns of forks in a process with threads, which those of an idle OpenMP count as.
            warnings.simplefilter("ignore")
            pid = os.fork()
    except OSError as error:
        here.close()
        there.close()
        raise ChildError(rank, in_words(error)) from error
    if pid:
        there.close()
        return Child(pid, here, rank)
    status = 1
    try:
        here.close()
        random.setstate(drawn)  # Python seeds it anew in a forked process.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        gc.freeze()  # What was inherited is not walked, as that would copy it.
        torch.set_num_threads(1)  # OpenMP's other threads are not here.
        job(there)
        status = 0
    finally:
        # Neither exit handlers nor anybody's `finally`: they are the parent's.
        os._exit(status)


def serve(work: Callable[[Item], Any], items: Sequence[Item], left: Callable[[], Any], pipe: Connection) -> None:
    """Runs in a forked process: sends the result of each item, and at the end what `left()` returns."""
    try:
        for item in items:
            send(pipe, ("done", work(item)))
        last = ("done", left())
    except BaseException as error:  # Told to the parent, which does the same work again and sees it happen.
        last = ("failed", in_words(error))
    # Before the parent hears the last word, and may end this process.
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    send(pipe, last)


def in_words(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
