"""What a runtime frees while it is timed stays with the process, as with allocators made for such work.

A runtime that allocates as it runs, as eager PyTorch does, pays for glibc's returning of memory: a block of more than
32 MiB is mapped and zeroed anew each time, and so is the free end of the heap. Which layers pay depends on their size
and on what else lies in the heap, so that the same network takes far longer in one process than in the next. The tuning
guide of PyTorch recommends allocators that keep memory (jemalloc, tcmalloc). Runtimes that plan theirs do not notice.

Glibc does the same with `ENVIRONMENT` set when a process starts; its manual has the numbers under mallopt.
"""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["ENVIRONMENT", "held", "kept"]

ENVIRONMENT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of malloc.h
_MAPPED, _LARGEST = 65536, 64 << 20  # glibc's default, and the most that it lets its own threshold grow to


@contextmanager
def held() -> Iterator[None]:
    """Keep what is freed inside; give it back on leaving. Does nothing without glibc, or where the user chose."""
    if not kept():
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_MAX, _MAPPED)
        libc.mallopt(_TRIM_THRESHOLD, _LARGEST)
        libc.malloc_trim(0)


def kept() -> bool:
    """Return whether memory can be held here: with glibc's malloc, unless its environment variables say how."""
    chosen = [name for name in os.environ if name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD")]
    return platform.libc_ver()[0] == "glibc" and not chosen
