"""Batches made ahead in worker processes, in order: indices -> torch's DataLoader -> what each index stands for."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from metawrap.errors import DataError, MetaWrapError

Made = TypeVar("Made")
AHEAD = 2  # batches that each worker makes before they are asked for


def made_ahead(make: Callable[[int], Made], indices: Iterable[int], workers: int) -> Iterator[Made]:
    """`make(index)` for each index, in order, in so many processes; `indices` may be endless.

    What `make` returns travels through a pipe, so it should be plain values and NumPy arrays: shared memory, which
    tensors would take, is short in containers.

    Raises:
        DataError: a worker died; and whatever error of metawrap's `make` raises.
    """
    with warnings.catch_warnings():
        # Of more workers than cores, which the user chose, and of forking beside threads, which the workers do not use.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        warnings.filterwarnings("ignore", ".*use of fork", DeprecationWarning)
        loader = DataLoader(
            _Made(make),
            batch_size=None,
            sampler=indices,
            num_workers=workers,
            prefetch_factor=AHEAD,
            collate_fn=_unchanged,
            worker_init_fn=_leave_interrupts_to_the_main_process,
            generator=torch.Generator(),  # Or it would draw from the global one.
        )
        ahead = iter(loader)
    try:
        with naming_dead_workers():
            for made in ahead:
                # An exception that crosses processes by itself arrives wrapped in the worker's traceback.
                if isinstance(made, MetaWrapError):
                    raise made
                yield made
    finally:
        # An error's traceback would keep the iterator, and so the workers, alive.
        del ahead, loader


@contextmanager
def naming_dead_workers() -> Iterator[None]:
    """Turns torch's error about a dead worker, which may come up at any line of the main thread, into a DataError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, MetaWrapError) or "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"A process that loads images died: {' '.join(str(error).split())[:160]} Most often memory ran out. Use "
            "fewer of them (--loader-workers 1, or 0 to load in the main process) or fewer tasks per batch; a run goes "
            "on with --resume."
        ) from error


class _Made(Dataset[Made], Generic[Made]):
    def __init__(self, make: Callable[[int], Made]) -> None:
        self._make = make

    def __getitem__(self, index: int) -> Made | MetaWrapError:  # type: ignore[override]
        try:
            return self._make(index)
        except MetaWrapError as error:
            return error


def _unchanged(made: Made) -> Made:
    return made


def _leave_interrupts_to_the_main_process(_: int) -> None:
    # Ctrl-C reaches every process of the terminal; the main one stops the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
