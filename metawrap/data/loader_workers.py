"""torch's DataLoader: worker processes that make batches ahead, in order; and samplers as data sets of a loader."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from metawrap.data.problems import check_int, wrong_argument
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


class BatchSlice(IterableDataset[Made]):
    """`sampler[start:stop]`: these batches, in order, each time that they are asked for.

    A data set for `DataLoader(..., batch_size=None)`, or, of an `EpisodeBatchSampler`, its `batch_sampler`.
    """

    def __init__(self, sampler: Any, each: Callable[[Iterable[int]], Iterator[Made]], place: slice) -> None:
        if not isinstance(place, slice) or place.stop is None or place.step is not None:
            raise wrong_argument("place", "a slice such as [:100] or [100:200]", place, "One batch is .batch(3).")
        check_int("start", start := 0 if place.start is None else place.start, 0)
        check_int("stop", place.stop, start)
        self._sampler, self._each, self._indices = sampler, each, range(start, place.stop)

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Made]:
        return self._each(of_this_worker(self, self._indices))

    def __repr__(self) -> str:
        return f"Batches {self._indices.start} to {self._indices.stop - 1} of {self._sampler!r}"


def of_this_worker(loaded: IterableDataset[Any], indices: Iterable[int]) -> Iterable[int]:
    """In worker i of n of a DataLoader over `loaded`, every n-th index from the i-th on; else all of them.

    The loader takes a batch of each worker in turn, so it gives the batches in the order of `indices`.
    """
    worker = get_worker_info()
    if worker is None or worker.dataset is not loaded:
        return indices
    return islice(indices, worker.id, None, worker.num_workers)


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
