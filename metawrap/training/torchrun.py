"""One run in several processes, as `torchrun` starts them: rank 0 reads, writes and prints, and every rank computes.

Each rank takes a contiguous share of the tasks; in order of rank these are the tasks of a run in one process. In a run
of one process the functions change nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from metawrap.data.random_stream import RandomStream
from metawrap.errors import ArgumentError, RankError
from metawrap.evaluation_result import EvaluationResult
from metawrap.execution.ranks import exchanging
from metawrap.tasks import map_tensors
from metawrap.training.task_sources import FixedTasks

T = TypeVar("T")


def rank() -> int:
    """The number of this process in the run, from 0."""
    return dist.get_rank() if _group_exists() else _from_torchrun("RANK", 0)


def world_size() -> int:
    """The number of processes of the run."""
    return dist.get_world_size() if _group_exists() else _from_torchrun("WORLD_SIZE", 1)


def local_world_size() -> int:
    """The number of processes of the run on this machine."""
    return _from_torchrun("LOCAL_WORLD_SIZE", 1)


def _group_exists() -> bool:
    return dist.is_available() and dist.is_initialized()


def _from_torchrun(name: str, default: int) -> int:
    return int(os.environ[name]) if dist.is_available() and dist.is_torchelastic_launched() else default


@contextmanager
def process_group() -> Iterator[None]:
    """Joins the processes that torchrun started, and leaves them at the end."""
    if world_size() == 1 or dist.is_initialized():
        yield
        return
    # Plain values go through gloo on the CPU: an exchange of errors and flags then does not wait for the GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
        with suppress(RuntimeError):  # A rank that failed has left already.
            # Without the barrier a rank may close connections that another still uses, which aborts it at exit.
            dist.barrier()
    finally:
        dist.destroy_process_group()


def device_of_rank(device: torch.device) -> torch.device:
    """The device of this process for a run on `device`: each process of a machine takes its own CUDA device. Raises
    ArgumentError if the run has several processes, and `device` has an index, or there are fewer CUDA devices.
    """
    if world_size() == 1 or device.type != "cuda":
        return device
    if device.index is not None:
        raise ArgumentError(
            f"device: '{device}' is one device, but the run has {world_size()} processes, and each takes its own. "
            "Use cuda."
        )
    if (count := torch.cuda.device_count()) < local_world_size():
        raise ArgumentError(
            f"device: {local_world_size()} processes on this machine need a CUDA device each, but torch finds {count}. "
            f"Use torchrun --nproc-per-node={count}, or --device cpu."
        )
    own = torch.device("cuda", _from_torchrun("LOCAL_RANK", 0))
    torch.cuda.set_device(own)
    return own


def share(count: int) -> range:
    """The numbers from 0 to `count` that belong to this process: contiguous, rank 0's first, shares as equal as can be.

    >>> share(8)  # in a run of one process
    range(0, 8)
    """
    return range(count * rank() // world_size(), count * (rank() + 1) // world_size())


def on_rank_zero(function: Callable[[], T]) -> T:
    """Calls `function` on rank 0 and returns its value on every rank. Raises RankError on the other ranks if the
    call fails on rank 0.
    """
    if world_size() == 1:
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


def local_rank_zero_first(function: Callable[[], T]) -> T:
    """Calls `function` on the first process of each machine, then on the others, which find its downloads."""
    first = _from_torchrun("LOCAL_RANK", 0) == 0
    if not first:
        _barrier()
    result = function()
    if first:
        _barrier()
    return result


def _barrier() -> None:
    if world_size() > 1:
        with exchanging():
            dist.barrier()


def seed_dropout(seed: int, epoch: int) -> None:
    """Gives each rank its own random numbers for an epoch; rank 0 keeps those of a run in one process."""
    if rank() > 0:
        torch.manual_seed(int(RandomStream("rank", rank(), seed, epoch).raw(1)[0]))


def evaluate_shared(learner: Any, tasks: FixedTasks, count: int, **how: Any) -> EvaluationResult:
    """`learner.evaluate` on the first `count` tasks, each rank on its share; every rank gets the whole result.

    Args:
        how: keywords of `learner.evaluate`.
    """
    batches = share(count // tasks.tasks_per_batch)
    part = learner.evaluate(tasks.batches(len(batches), batches.start), **how) if batches else None
    if world_size() == 1 and part is not None:
        return part  # type: ignore[no-any-return]
    parts: list[Any] = [None] * world_size()
    with exchanging():
        dist.all_gather_object(parts, map_tensors(part, Tensor.cpu))
    return EvaluationResult.joined([part for part in parts if part is not None])
