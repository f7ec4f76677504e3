"""Tasks in threads: each worker has a replica of the learner, and results come back in task order.

A replica has modules, a clock and an engine of its own, and shares the parameters and buffers, which no worker changes.
So the gradients are those that one thread would have found, added up in the same order.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from metawrap.errors import UnsupportedModuleError

Learner = TypeVar("Learner", bound=nn.Module)
Item = TypeVar("Item")
Result = TypeVar("Result")
_TABLES = ("_parameters", "_buffers", "_modules")


def replica(learner: Learner, shared: Iterable[Any] = ()) -> Learner:
    """A copy of the learner that shares its parameters, its buffers and what else is named.

    Raises:
        UnsupportedModuleError: a module has a `__deepcopy__` of its own that copies those.
    """
    tensors: list[Any] = [*learner.parameters(), *learner.buffers()]
    made = copy.deepcopy(learner, {id(value): value for value in [*tensors, *shared]})
    if list(map(id, [*made.parameters(), *made.buffers()])) != list(map(id, tensors)):
        raise UnsupportedModuleError("a copy of the model does not share its parameters, so it needs workers=1")
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
            waiting.append(pool.submit(run, item))
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


class Traces:
    """What a forward pass leaves behind besides its result: what the next task's pass, or the user, might read.

    `with Traces(model) as traces: ...`, and `traces.found` says what it was, or None.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.found: str | None = None

    def __enter__(self) -> Traces:
        self._random, self._state = _random_state(), _attributes(self._model)
        return self

    def __exit__(self, *error: Any) -> None:
        if any(map(_unequal, self._random, _random_state())):
            self.found = "it draws random numbers, which come in the order of the tasks"
        elif changed := [name for name, value in _attributes(self._model).items() if self._state.get(name) != value]:
            self.found = f"forward changes '{changed[0]}'"


def _random_state() -> tuple[Any, ...]:
    _, numbers, place, *_ = np.random.get_state(legacy=True)
    return random.getstate(), (numbers, place), torch.get_rng_state()


def _unequal(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor):
        return not torch.equal(before, after)
    if isinstance(before, tuple) and any(isinstance(part, np.ndarray) for part in before):
        return any(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    return bool(before != after)


def _attributes(model: nn.Module) -> dict[str, Any]:
    """Every attribute and buffer of every module by its identity, with the contents of plain containers by theirs."""
    return {
        f"{path}.{name}" if path else name: _identity(value)
        for path, module in model.named_modules()
        for name, value in [*module.__dict__.items(), *module._buffers.items()]
        # A recurrent module caches its weights; the engine puts the cache right after each call.
        if name not in _TABLES and not (isinstance(module, nn.RNNBase) and name.startswith("_flat_weight"))
    }


def _identity(value: Any, depth: int = 3) -> Any:
    if isinstance(value, dict) and depth:
        return id(value), tuple((key, _identity(item, depth - 1)) for key, item in value.items())
    if isinstance(value, list | tuple | set | deque) and depth:
        return id(value), tuple(_identity(item, depth - 1) for item in value)
    if isinstance(value, Tensor):
        return id(value), value._version
    return value if isinstance(value, int | float | str | bool | None) else id(value)
