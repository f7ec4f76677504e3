"""One run in many processes, as `torchrun` starts them: rank 0 reads, writes and speaks, and all of them compute.

Each process takes a contiguous share of the tasks, so that in order of rank they are the tasks of a run in one process.
In such a run everything here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from metawrap.data import EpisodeSampler
from metawrap.data.random_stream import RandomStream
from metawrap.errors import ArgumentError, RankError
from metawrap.execution.ranks import exchanging
from metawrap.results import EvaluationResult
from metawrap.tasks import map_tensors

T = TypeVar("T")


def rank() -> int:
    """The number of this process in the run, from 0."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if _started_by_torchrun() else 0


def size() -> int:
    """How many processes the run has."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if _started_by_torchrun() else 1


def local_size() -> int:
    """How many of them run on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if _started_by_torchrun() else 1


def _local_rank() -> int:
    return int(os.environ["LOCAL_RANK"]) if _started_by_torchrun() else 0


def _started_by_torchrun() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched()


@contextmanager
def process_group() -> Iterator[None]:
    """Joins the processes that torchrun started, and leaves them at the end."""
    if size() == 1 or dist.is_initialized():
        yield
        return
    # Values go through gloo on the CPU, so that telling the others how a step went does not wait for the GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
        with suppress(RuntimeError):  # Who fails has gone by then.
            # Or one closes its connections while another still uses them: seen to abort at exit on a busy machine.
            dist.barrier()
    finally:
        dist.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """The device of this process, where the run is on `device`: each process of a machine takes a CUDA device.

    Raises:
        ArgumentError: the run has several processes, and there is no device for each, or one was named.
    """
    if size() == 1 or device.type != "cuda":
        return device
    if device.index is not None:
        raise ArgumentError(
            f"device: '{device}' is one device, but the run has {size()} processes, and each takes its own. Use cuda."
        )
    if (count := torch.cuda.device_count()) < local_size():
        raise ArgumentError(
            f"device: {local_size()} processes on this machine need a CUDA device each, but torch finds {count}. Use "
            f"torchrun --nproc-per-node={count}, or --device cpu."
        )
    own = torch.device("cuda", _local_rank())
    torch.cuda.set_device(own)
    return own


def share(count: int) -> range:
    """Which of so many things are this process's: contiguous, rank 0's first, as equal as can be."""
    return range(count * rank() // size(), count * (rank() + 1) // size())


def by_first(function: Callable[[], T]) -> T:
    """Rank 0 runs it; every process gets what it returns.

    Raises:
        RankError: on the others, where it fails on rank 0.
    """
    if size() == 1:
        return function()
    message: list[Any] = [None, None]
    failure: Exception | None = None
    if rank() == 0:
        try:
            message[0] = function()
        except Exception as error:
            failure, message[1] = error, f"{type(error).__name__}: {error}"
    with exchanging():
        dist.broadcast_object_list(message, src=0)
    if failure is not None:
        raise failure
    if message[1] is not None:
        raise RankError(f"Rank 0 failed, and so all do: {message[1]}")
    return message[0]  # type: ignore[no-any-return]


def one_after_another(function: Callable[[], T]) -> T:
    """The first process of each machine runs it before the others do: what it downloads is there for them."""
    if size() > 1 and _local_rank() > 0:
        _wait()
    result = function()
    if size() > 1 and _local_rank() == 0:
        _wait()
    return result


def _wait() -> None:
    with exchanging():
        dist.barrier()


def seed_dropout(seed: int, epoch: int) -> None:
    """Gives this process its own random numbers for an epoch; rank 0 goes on with those of a run in one process."""
    if rank() > 0:
        torch.manual_seed(int(RandomStream("rank", rank(), seed, epoch).raw(1)[0]))


def evaluate_shared(learner: Any, tasks: EpisodeSampler, count: int, **how: Any) -> EvaluationResult:
    """`learner.evaluate` on the first `count` tasks, each process on its share; every process gets the whole result.

    Args:
        how: keywords of `learner.evaluate`.
    """
    batches = share(count // tasks.tasks_per_batch)
    part = learner.evaluate(tasks.batches(len(batches), batches.start), **how) if batches else None
    if size() == 1 and part is not None:
        return part  # type: ignore[no-any-return]
    parts: list[Any] = [None] * size()
    with exchanging():
        dist.all_gather_object(parts, map_tensors(part, Tensor.cpu))
    return EvaluationResult.joined([part for part in parts if part is not None])
