"""Random numbers that are the same on every platform and with every version of NumPy.

NumPy promises a fixed stream for the raw bits of a bit generator, but not for the numbers that `Generator` derives from
them. So all numbers here are derived from `PCG64.random_raw`. The global generators keep their state.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from metawrap.snapshot.generators import Generators

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]


class RandomStream:
    """One stream of random numbers, fixed by its key: non-negative integers and names."""

    def __init__(self, *key: int | str) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence([_as_int(part) for part in key]))

    def raw(self, *shape: int) -> NDArray[np.uint64]:
        """Unsigned 64-bit integers."""
        return np.asarray(self._bits.random_raw(int(np.prod(shape))), dtype=np.uint64).reshape(shape)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Floats:
        """Floats in [low, high), on a grid of 2**-53 of the range."""
        unit = (self.raw(*shape) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return np.asarray(low + (high - low) * unit, dtype=np.float64)

    def bell(self, *shape: int) -> Floats:
        """Floats with mean 0 and standard deviation 1 inside (-3, 3): a sum of three uniforms, times 2.

        Logarithms and cosines differ between maths libraries in their last bit; sums and products do not.
        """
        parts = self.uniform(3, *shape)
        return np.asarray((parts[0] + parts[1] + parts[2] - 1.5) * 2.0, dtype=np.float64)

    def permutation(self, size: int) -> Ints:
        """The numbers 0..size-1 in random order."""
        return np.argsort(self.raw(size), kind="stable").astype(np.int64)

    def distinct(self, sizes: Ints, count: int) -> Ints:
        """For each row r, `count` different numbers from 0..sizes[r]-1 in random order; shape (len(sizes), count)."""
        # The modulo favours small numbers by less than size / 2**64, which no experiment can see.
        offsets = np.arange(count, dtype=np.int64)
        spans = (sizes[:, None] - offsets).astype(np.uint64)
        picks = offsets + (self.raw(len(sizes), count) % spans).astype(np.int64)
        rows = np.arange(len(sizes))
        pool = np.tile(np.arange(int(sizes.max()), dtype=np.int64), (len(sizes), 1))
        for place in range(count):  # the first `count` swaps of a Fisher-Yates shuffle, in all rows at once
            chosen = pool[rows, picks[:, place]]
            pool[rows, picks[:, place]] = pool[:, place]
            pool[:, place] = chosen
        return pool[:, :count].copy()


@contextmanager
def seeded_generators(*key: int | str) -> Iterator[None]:
    """Seeds the global generators of torch (CPU), NumPy and Python for the user's code, and puts them back after it."""
    kept, seed = Generators(), int(RandomStream(*key).raw(1)[0] >> np.uint64(1))
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        kept.put_back()


def _as_int(part: int | str) -> int:
    # hash() of a str changes from process to process.
    return int.from_bytes(hashlib.sha256(part.encode()).digest(), "big") if isinstance(part, str) else part
