"""How the C library's allocator is told to keep the memory that a meta-step will ask for again.

A second-order meta-step frees and takes blocks of up to 100 MB at every operation. glibc gives such blocks back to the
system each time, and the system clears every page of them again: half the time of a meta-step on 84x84 images.

One thing can be told to glibc before Python starts only: GLIBC_TUNABLES=glibc.malloc.tcache_count=0. torch asks for
aligned blocks, glibc cuts the rest off, and a cache of each thread then holds the cuttings, of 112 bytes, between the
blocks: those cannot be joined when they are freed, nor serve another request of their own size.
"""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache

# The parameters of mallopt(3), from malloc.h.
_MMAP_MAX, _TRIM_THRESHOLD, _ARENA_MAX = -4, -1, -8


def keep_memory(one_arena: bool = False) -> bool:
    """Lets this process keep the memory that it frees, up to its peak; on Linux with glibc, elsewhere nothing happens.

    Nothing happens either where the environment sets the allocator already (`MALLOC_...`, or `glibc.malloc.` in
    `GLIBC_TUNABLES`, but for the threads' caches).

    Args:
        one_arena: all threads allocate from one pool, so that a block that one frees serves another.
    Returns:
        Whether it was done.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "").split(":")
    told = [t for t in tunables if t.startswith("glibc.malloc.") and not t.startswith("glibc.malloc.tcache_")]
    if told or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    kept = _set(_MMAP_MAX, 0) and _set(_TRIM_THRESHOLD, -1)
    return kept and (not one_arena or _set(_ARENA_MAX, 1))


@cache
def _set(parameter: int, value: int) -> bool:
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    try:
        return bool(ctypes.CDLL(None).mallopt(parameter, value))
    except (OSError, AttributeError):
        return False
