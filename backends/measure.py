"""The only timer: candidates run in turns, warmed up, pinned, and each with its uncertainty.

A block is some runs of one candidate without pause; a round is one block of every candidate, in random order. What
disturbs the machine for longer than a block disturbs all candidates alike. Medians of blocks ignore the rest.
"""

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from backends.affinity import pinned
from backends.artifact import Artifact
from backends.contract import Array, Runtime
from backends.environment import Environment
from backends.latency import Latency, Measurement, Ratio, ratio

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Candidate", "Latency", "Measurement", "Ratio", "compare", "measure", "ratio"]

BLOCK_S = 0.03  # short against the drift of a machine, long against its caches
MIN_ROUNDS = 5
WINDOW_S = 0.01
WINDOW_RUNS = 1000
STABLE = 0.03  # warm when the medians of two consecutive windows differ by less
SAMPLES_KEPT = 1000
Clock = Callable[[], int]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """Something to time: a call without arguments, and where it came from."""

    label: str
    run: Callable[[], object]
    runtime: str
    runtime_version: str
    artifact_sha256: str | None = None
    threads: int = 1

    @classmethod
    def of(
        cls,
        runtime: Runtime,
        artifact: Artifact,
        inputs: Sequence[torch.Tensor | Array],
        *,
        label: str,
        threads: int | None = None,
        model: torch.nn.Module | None = None,
    ) -> Self:
        """Open `artifact` with its inputs in place; `model` as for `Runtime.session`."""
        session = runtime.session(artifact, threads=threads, model=model)
        run = session.bind(inputs).run
        return cls(label, run, runtime.NAME, runtime.version(), artifact.sha256, session.threads)


@dataclass(frozen=True)
class _Warm:
    runs: int
    run_s: float


def measure(
    runtime: Runtime,
    artifact: Artifact,
    inputs: Sequence[torch.Tensor | Array],
    *,
    seconds: float = 1.0,
    threads: int | None = None,
    model: torch.nn.Module | None = None,
) -> Measurement:
    """Time one artifact for about `seconds`, with the threads it was built for unless told otherwise.

    Two of these must not be compared with each other: `compare` does that.
    """
    candidate = Candidate.of(runtime, artifact, inputs, label=artifact.path, threads=threads, model=model)
    return compare([candidate], seconds=seconds)[0]


def compare(
    candidates: Sequence[Candidate],
    *,
    seconds: float = 1.0,
    rounds: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    clock: Clock = time.perf_counter_ns,
) -> list[Measurement]:
    """Time all candidates in turns, each for about `seconds` in all, and return one measurement for each, in order.

    `rounds` is chosen so that a block lasts about 30 ms, unless given. Warm-up comes on top and lasts at most as long
    again. `seed` orders the blocks; `progress` is called with the blocks done and the blocks in all; `clock` returns
    nanoseconds. Raises ValueError for no candidate, two of one label, or no time.
    """
    _check(candidates, seconds=seconds, rounds=rounds)
    with pinned(max(candidate.threads for candidate in candidates)) as cores:
        environment = Environment.read(cores)
        warm = [_warm_up(candidate, cap_s=seconds, clock=clock) for candidate in candidates]
        rounds = rounds or _rounds(seconds, max(each.run_s for each in warm))
        counts = [max(1, round(seconds / rounds / each.run_s)) for each in warm]
        taken: list[list[list[int]]] = [[] for _ in candidates]  # ns, per candidate and round
        for done, index in enumerate(_order(len(candidates), rounds, seed=seed), start=1):
            taken[index].append(_block(candidates[index].run, counts[index], clock=clock))
            if progress:
                progress(done, rounds * len(candidates))
    return [
        _measurement(candidate, blocks, warmup_runs=each.runs, environment=environment)
        for candidate, blocks, each in zip(candidates, taken, warm, strict=True)
    ]


def _check(candidates: Sequence[Candidate], *, seconds: float, rounds: int | None) -> None:
    labels = [candidate.label for candidate in candidates]
    if not labels:
        raise ValueError("nothing to compare: give at least one candidate")
    if len(set(labels)) < len(labels):
        raise ValueError(f"labels must differ, got {labels}")
    if seconds <= 0 or (rounds is not None and rounds < 1):
        raise ValueError(f"seconds and rounds must be positive, got {seconds} and {rounds}")


def _warm_up(candidate: Candidate, *, cap_s: float, clock: Clock) -> _Warm:
    """Run until the median run time is stable; the first run, which allocates and compiles, counts for nothing."""
    candidate.run()
    window = _window(candidate.run, clock)
    runs, spent_s, current = 1 + len(window), sum(window) * 1e-9, median(window)
    while spent_s < cap_s:
        previous, window = current, _window(candidate.run, clock)
        runs, spent_s, current = runs + len(window), spent_s + sum(window) * 1e-9, median(window)
        if abs(current - previous) <= STABLE * previous:
            break
    else:
        log.info("%s: not stable within %.3g s of warm-up", candidate.label, cap_s)
    return _Warm(runs, max(current, 1) * 1e-9)


def _window(run: Callable[[], object], clock: Clock) -> list[int]:
    taken: list[int] = []
    with _collector_off():
        while sum(taken) < WINDOW_S * 1e9 and len(taken) < WINDOW_RUNS:
            taken.append(_timed(run, clock))
    return taken


def _rounds(seconds: float, slowest_s: float) -> int:
    return max(MIN_ROUNDS, round(seconds / max(BLOCK_S, slowest_s)))


def _order(candidates: int, rounds: int, *, seed: int) -> Iterator[int]:
    generator = np.random.default_rng(seed)
    for _ in range(rounds):
        yield from generator.permutation(candidates).tolist()


def _block(run: Callable[[], object], count: int, *, clock: Clock) -> list[int]:
    """Time `count` runs; the first of a longer block refills the caches that other candidates used, untimed."""
    if count > 1:
        run()
    with _collector_off():
        return [_timed(run, clock) for _ in range(count)]


def _timed(run: Callable[[], object], clock: Clock) -> int:
    start = clock()
    run()
    return clock() - start


@contextmanager
def _collector_off() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _measurement(
    candidate: Candidate, taken: list[list[int]], *, warmup_runs: int, environment: Environment
) -> Measurement:
    medians_s = [max(float(np.median(block)), 1.0) * 1e-9 for block in taken]
    samples_s = np.maximum(np.concatenate(taken).astype(np.float64), 1.0) * 1e-9
    return Measurement(
        label=candidate.label,
        runtime=candidate.runtime,
        runtime_version=candidate.runtime_version,
        artifact_sha256=candidate.artifact_sha256,
        threads=candidate.threads,
        runs=len(samples_s),
        rounds=len(taken),
        warmup_runs=warmup_runs,
        latency_s=Latency.of(samples_s, medians_s),
        round_medians_s=tuple(medians_s),
        samples_s=_spread(samples_s),
        environment=environment,
    )


def _spread(samples: "NDArray[np.float64]") -> tuple[float, ...]:
    kept = np.linspace(0, len(samples) - 1, min(len(samples), SAMPLES_KEPT)).round().astype(int)
    return tuple(samples[kept].tolist())
