"""Cores: keep a measurement on few and idle ones, so that it neither migrates nor shares."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["pinned"]

_SAMPLE_S = 0.05


@contextmanager
def pinned(threads: int) -> Iterator[frozenset[int]]:
    """Hold all threads of this process on the `threads` idlest cores; yields the cores, restores on leaving.

    Does nothing where the system has no affinity (macOS, Windows) or there is no core to spare. Every thread is moved,
    because the workers of an open session were started before, and those that start inside are freed afterwards.
    """
    allowed = _allowed()
    if len(allowed) <= threads:
        yield allowed
        return
    before = {task: os.sched_getaffinity(task) for task in _tasks()}
    chosen = frozenset(_by_idleness(allowed)[:threads])
    try:
        for task in before:
            _move(task, chosen)
        yield chosen
    finally:
        for task in _tasks():
            _move(task, before.get(task, allowed))


def _allowed() -> frozenset[int]:
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()


def _tasks() -> list[int]:
    return [int(task) for task in os.listdir("/proc/self/task")]


def _move(task: int, cores: frozenset[int] | set[int]) -> None:
    with suppress(ProcessLookupError):  # the thread has ended since it was listed
        os.sched_setaffinity(task, cores)


def _by_idleness(allowed: frozenset[int]) -> list[int]:
    """Order cores by one hardware thread per core first, then idle time in a short sample, then the highest number."""
    start = _idle_ticks()
    time.sleep(_SAMPLE_S)
    end = _idle_ticks()
    first = {_siblings(cpu): cpu for cpu in sorted(allowed, reverse=True)}
    alone = set(first.values())
    return sorted(allowed, key=lambda cpu: (cpu not in alone, start.get(cpu, 0) - end.get(cpu, 0), -cpu))


def _siblings(cpu: int) -> str:
    """Return the hardware threads that share the core of `cpu`, as Linux writes them, or itself if it does not say."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _idle_ticks() -> dict[int, int]:
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return {}
    rows = (line.split() for line in lines if line.startswith("cpu") and not line.startswith("cpu "))
    return {int(row[0][3:]): int(row[4]) for row in rows}
