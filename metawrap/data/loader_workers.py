"""Worker processes that make batches ahead: indices -> torch's DataLoader -> `make(index)`, in order."""

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
    """`make(index)` for each index, in order, computed in `workers` processes; `indices` may be endless.

    Results travel through a pipe, so they should be plain values and NumPy arrays. Tensors would need shared memory, of
    which containers have little.

    Raises:
        DataError: a worker died.
        MetaWrapError: `make` raised it.
    """
    with warnings.catch_warnings():
        # The user chose the number of workers, and the workers use no threads.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        warnings.filterwarnings("ignore", ".*use of fork", DeprecationWarning)
        loader = DataLoader(
            _ByIndex(make),
            batch_size=None,
            sampler=indices,
            num_workers=workers,
            prefetch_factor=AHEAD,
            collate_fn=_unchanged,
            worker_init_fn=_leave_interrupts_to_the_main_process,
            generator=torch.Generator(),  # instead of the global generator
        )
        ahead = iter(loader)
    try:
        with naming_dead_workers():
            for made in ahead:
                # Workers return errors as values; raised there, they would arrive wrapped in a traceback's text.
                if isinstance(made, MetaWrapError):
                    raise made
                yield made
    finally:
        # An error's traceback would keep the iterator alive, and with it the workers.
        del ahead, loader


@contextmanager
def naming_dead_workers() -> Iterator[None]:
    """Turns torch's error about a dead worker, which any line of the main thread may raise, into a DataError."""
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


class _ByIndex(Dataset[Made], Generic[Made]):
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
    # Ctrl-C reaches every process of the terminal; the main process stops the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
