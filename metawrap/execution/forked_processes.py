"""Tasks in processes, each forked for one meta-step: it holds what the learner holds at that moment, and is then gone.

Nothing has to be sent there: parameters, the user's own attributes, closures and globals are shared as they stand, page
by page. Only results travel, through a pipe, and come back in task order. Unlike threads, processes do not wait for
each other's Python. This process can do the work of one: a fork costs a copy of every page that its tasks write to.
"""

from __future__ import annotations

import gc
import io
import os
import pickle
import random
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Item = TypeVar("Item")
Result = TypeVar("Result")

# Results that may stand in the parent, for each process, before the one that is next in order has come.
_AHEAD = 2
_PATIENCE = 0.5  # Seconds.
_DIED = "a process that solved tasks died; it may have run out of memory"


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
    count, threads = max(1, min(count, len(items))), torch.get_num_threads()
    children: list[_Child] = []
    try:
        for rank in range(own is not None, count):
            children.append(_fork(work, items, rank, count, left))
        if own is not None:
            torch.set_num_threads(1)
        yield from _gathered(children, items, count, own)
    finally:
        torch.set_num_threads(threads)
        for child in children:
            child.end()


class LeftBehindError(Exception):
    """The work changed something in its process."""


@dataclass
class _Child:
    """next: index of the item whose result comes next. room: for results that wait here."""

    pid: int
    pipe: Connection
    next: int
    room: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(_AHEAD))
    reader: threading.Thread | None = None
    ended: bool = False

    def read_into(self, arrived: SimpleQueue[Any], results: int) -> None:
        """Receives in a thread: a pipe holds 64 KiB, and this process may be at work of its own."""

        def read() -> None:
            with self.pipe:
                for _ in range(results):
                    self.room.acquire()
                    if self.ended:
                        return
                    try:
                        arrived.put((self, _unpacked(self.pipe)))
                    except (EOFError, OSError):
                        return arrived.put((self, ("failed", _DIED)))
                    except BaseException as error:
                        return arrived.put((self, ("raised", error)))

        reader = threading.Thread(target=read, name="metawrap-reader", daemon=True)
        reader.start()
        self.reader = reader

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        if self.reader is None:
            self.pipe.close()
        else:
            self.ended = True
            self.room.release()
            self.reader.join(_PATIENCE)  # It waits for ever where a process that the child began holds the pipe.


def _gathered(
    children: list[_Child], items: Sequence[Any], count: int, own: Callable[[Any], Any] | None
) -> Iterator[Any]:
    arrived: SimpleQueue[tuple[_Child, Any]] = SimpleQueue()
    for child in children:
        child.read_into(arrived, len(range(child.next, len(items), count)) + 1)
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
    if reasons := [reason for reason in early.values() if reason]:
        raise LeftBehindError(reasons[0])


def _done(own: Callable[[Any], Any], items: Sequence[Any], index: int) -> dict[int, Any]:
    try:
        return {index: own(items[index])}
    except Exception as error:
        raise ChildError(index, _in_words(error)) from error


def _take(arrived: SimpleQueue[tuple[_Child, Any]], early: dict[int, Any], count: int) -> None:
    child, (kind, value) = arrived.get()
    if kind == "failed":
        raise ChildError(child.next, value)
    if kind == "raised":
        raise value
    early[child.next] = value
    child.next += count


def _fork(
    work: Callable[[Item], Any], items: Sequence[Item], rank: int, count: int, left: Callable[[], str | None]
) -> _Child:
    reading, writing = os.pipe()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # Or a child would print again what waits to be printed.
    drawn = random.getstate()
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns of forks in a process with threads, which those of an idle OpenMP count as.
            warnings.simplefilter("ignore")
            pid = os.fork()
    except OSError as error:
        os.close(reading)
        os.close(writing)
        raise ChildError(rank, _in_words(error)) from error
    if pid:
        os.close(writing)
        return _Child(pid, Connection(reading, writable=False), rank)
    status = 1
    try:
        os.close(reading)
        random.setstate(drawn)  # Python seeds it anew in a forked process.
        _serve(Connection(writing, readable=False), work, items[rank::count], left)
        status = 0
    finally:
        # Neither exit handlers nor anybody's `finally`: they are the parent's.
        os._exit(status)


def _serve(pipe: Connection, work: Callable[[Item], Any], items: Sequence[Item], left: Callable[[], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # What was inherited is not walked, as that would copy it.
    torch.set_num_threads(1)  # OpenMP's other threads are not here.
    try:
        for item in items:
            _packed(pipe, ("done", work(item)))
        last = ("done", left())
    except BaseException as error:  # Told to the parent, which does the same work again and sees it happen.
        last = ("failed", _in_words(error))
    # Before the parent hears the last word, and ends this process.
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    _packed(pipe, last)


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class _Pickler(pickle.Pickler):
    """Leaves ordinary tensors out, to be sent as they lie in memory."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, obj: Any) -> Any:
        if type(obj) not in (Tensor, nn.Parameter) or obj.layout != torch.strided or obj.device.type != "cpu":
            return None
        self.tensors.append(obj.detach().resolve_conj().resolve_neg().contiguous())
        return len(self.tensors) - 1, obj.dtype, tuple(obj.shape)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, blocks: Callable[[int], Any]) -> None:
        super().__init__(file)
        self._blocks = blocks

    def persistent_load(self, pid: Any) -> Tensor:
        index, dtype, shape = pid
        block = self._blocks(index)
        return torch.frombuffer(block, dtype=dtype).view(shape) if block else torch.empty(shape, dtype=dtype)


def _packed(pipe: Connection, value: Any) -> None:
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    pipe.send_bytes(file.getbuffer())
    pipe.send_bytes(len(pickler.tensors).to_bytes(4, "little"))
    for tensor in pickler.tensors:
        pipe.send_bytes(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _unpacked(pipe: Connection) -> Any:
    file = io.BytesIO(pipe.recv_bytes())
    count = int.from_bytes(pipe.recv_bytes(), "little")
    blocks = [bytearray(pipe.recv_bytes()) for _ in range(count)]
    return _Unpickler(file, blocks.__getitem__).load()
