"""Tasks in processes, each forked for one meta-step: it holds what the learner holds at that moment, and is then gone.

Nothing has to be sent there: parameters, the user's own attributes, closures and globals are shared as they stand, page
by page. Only results travel, through a pipe, and come back in task order. Unlike threads, processes do not wait for
each other's Python.
"""

from __future__ import annotations

import gc
import io
import os
import pickle
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Item = TypeVar("Item")
Result = TypeVar("Result")

# Results that may stand in the parent, for each process, before the one that is next in order has come.
_AHEAD = 2


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
    work: Callable[[Item], Result], items: Sequence[Item], count: int, left: Callable[[], str | None]
) -> Iterator[Result]:
    """`work(item)` for each item, in `count` forked processes with one intra-op thread each; results in order.

    Args:
        left: run in each process at its end; says what the work has changed there, which nobody else will see.
    Raises:
        ChildError: the work raised, or a process died; what it sent before stands.
        LeftBehindError: `left` said something.
    """
    children = [_fork(work, items, rank, count, left) for rank in range(min(count, len(items)))]
    try:
        yield from _gathered(children, len(items))
    finally:
        for child in children:
            child.end()


class LeftBehindError(Exception):
    """The work changed something in its process."""


@dataclass
class _Child:
    pid: int
    pipe: Connection
    next: int

    def end(self) -> None:
        self.pipe.close()
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def _gathered(children: list[_Child], count: int) -> Iterator[Any]:
    early: dict[int, Any] = {}
    for index in range(count):
        while index not in early:
            ahead = index + _AHEAD * len(children)
            ready = wait([child.pipe for child in children if child.next < min(ahead, count)])
            for child in children:
                if child.pipe in ready:
                    early[child.next] = _received(child)
                    child.next += len(children)
        yield early.pop(index)
    for child in children:
        if reason := _received(child):
            raise LeftBehindError(reason)


def _received(child: _Child) -> Any:
    try:
        kind, value = _unpacked(child.pipe)
    except EOFError:
        raise ChildError(child.next, "a process that solved tasks died; it may have run out of memory") from None
    if kind == "failed":
        raise ChildError(child.next, value)
    return value


def _fork(
    work: Callable[[Item], Any], items: Sequence[Item], rank: int, count: int, left: Callable[[], str | None]
) -> _Child:
    reading, writing = os.pipe()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # Or a child would print again what waits to be printed.
    drawn = random.getstate()
    with warnings.catch_warnings():
        # Python 3.12 warns of forks in a process with threads, which those of an idle OpenMP count as.
        warnings.simplefilter("ignore")
        pid = os.fork()
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
        last = ("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    # Before the parent hears the last word, and ends this process.
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    _packed(pipe, last)


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
