"""Tasks in threads: each worker has a replica of the learner, and results come back in task order.

A replica has modules, a clock and an engine of its own, and shares the parameters and buffers, which no worker changes.
So the gradients are those that one thread would have found, added up in the same order.
"""

from __future__ import annotations

import contextvars
import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import nn

from metawrap.errors import UnsupportedModuleError
from metawrap.surgery.copying import free_hooks

Learner = TypeVar("Learner", bound=nn.Module)
Item = TypeVar("Item")
Result = TypeVar("Result")


def replica(learner: Learner, shared: Iterable[Any] = (), buffers: bool = True) -> Learner:
    """A copy of the learner that shares its parameters, its buffers, its hooks and the objects in `shared`.

    A hook that holds a part of the model is copied with it; so is one that is a method of such an object.

    Args:
        buffers: False copies the buffers.
    Raises:
        UnsupportedModuleError: a module has a `__deepcopy__` of its own that copies its parameters.
    """
    kept: list[Any] = [*learner.parameters(), *(learner.buffers() if buffers else ())]
    with torch.inference_mode(False):  # A buffer that was copied in that mode could not be edited outside.
        made = copy.deepcopy(learner, {id(value): value for value in [*kept, *shared, *free_hooks(learner)]})
    if list(map(id, [*made.parameters(), *(made.buffers() if buffers else ())])) != list(map(id, kept)):
        raise UnsupportedModuleError("a copy of the model does not share its parameters, so it needs one worker")
    return made


def in_threads(
    work: Callable[[Learner, Item], Result], items: Iterable[Item], replicas: list[Learner]
) -> Iterator[Result]:
    """`work(replica, item)` for each item, as many at once as there are replicas; results in the order of the items.

    At most that many results stand at a time. The intra-op threads of torch are shared out between the replicas.
    """
    threads, state = torch.get_num_threads(), _ThreadState()
    free: SimpleQueue[Learner] = SimpleQueue()
    for each in replicas:
        free.put(each)

    def start() -> None:
        torch.set_num_threads(max(1, threads // len(replicas)))

    def run(item: Item) -> Result:
        learner = free.get()
        try:
            with state.entered():
                return work(learner, item)
        finally:
            free.put(learner)

    pool = ThreadPoolExecutor(len(replicas), "metawrap-worker", initializer=start)
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            if len(waiting) == len(replicas):
                yield waiting.popleft().result()
            # With the caller's context variables.
            waiting.append(pool.submit(contextvars.copy_context().run, run, item))
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        # Each thread has its own number of them, but the library underneath has one for all.
        torch.set_num_threads(threads)


class _ThreadState:
    """The modes of torch that a thread has to itself, as the caller has them."""

    def __init__(self) -> None:
        self._gradients, self._inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self._autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        self._cache = torch.is_autocast_cache_enabled()

    @contextmanager
    def entered(self) -> Iterator[None]:
        enabled, dtype = self._autocast
        with (
            torch.inference_mode(self._inference),
            torch.set_grad_enabled(self._gradients),
            torch.autocast("cpu", dtype=dtype, enabled=enabled, cache_enabled=self._cache),
        ):
            yield


def has_modes() -> bool:
    """Whether the caller is in a mode of torch that another thread would not be in."""
    return bool(
        torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._autograd._top_saved_tensors_default_hooks(False)
    )
