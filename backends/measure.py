"""The only timer: candidates run in turns, warmed up, pinned, and each with its uncertainty.

A block is some runs of one candidate without pause; a round is one block of every candidate, in random order. What
disturbs the machine for longer than a block disturbs all candidates alike: such rounds are repeated, and counted where
they stay disturbed. Medians of blocks ignore the rest. A candidate of several instances, the same model compiled again,
takes them in turns from round to round, each beside the same instance of the other candidates, so that what their
compilations differ by is part of the interval.
"""

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count as counted
from statistics import median
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from backends.affinity import pinned
from backends.artifact import Artifact
from backends.contract import Array, Runtime
from backends.disturbance import disturbed
from backends.environment import Environment
from backends.heap import held
from backends.latency import Latency, Measurement, Ratio, ratio

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "REAL",
    "Candidate",
    "Clock",
    "Latency",
    "Measurement",
    "Ratio",
    "Run",
    "check",
    "compare",
    "measure",
    "ratio",
]

BLOCK_S = 0.03  # short against the drift of a machine, long against its caches
MIN_ROUNDS = 5
WINDOW_S = 0.01
WINDOW_RUNS = 1000
STABLE = 0.03  # warm when the medians of two consecutive windows differ by less
SAMPLES_KEPT = 1000
REPEATS = 1.0  # disturbed rounds are repeated, at most this many times the rounds asked for in all
Run = Callable[[], object]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Clock:
    """Where nanoseconds come from: those that passed, and those in which this process computed."""

    wall: Callable[[], int] = time.perf_counter_ns
    cpu: Callable[[], int] = time.process_time_ns


REAL = Clock()


@dataclass(frozen=True)
class Candidate:
    """Something to time: a call without arguments for each of its instances, and where they came from."""

    label: str
    runs: tuple[Run, ...]
    runtime: str
    runtime_version: str
    artifact_sha256: str | None = None
    threads: int = 1
    batch: int = 1  # examples that a run computes

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
        instances: int = 1,
    ) -> Self:
        """Open `artifact` so many times with its inputs in place; `model` as for `Runtime.session`."""
        sessions = [runtime.session(artifact, threads=threads, model=model) for _ in range(instances)]
        runs = tuple(session.bind(inputs).run for session in sessions)
        batch = artifact.inputs[0].shape[0] if artifact.inputs and artifact.inputs[0].shape else 1
        return cls(label, runs, runtime.NAME, runtime.version(), artifact.sha256, sessions[0].threads, batch)


@dataclass(frozen=True)
class _Warm:
    runs: int
    run_s: float


@dataclass(frozen=True)
class _Block:
    taken: list[int]  # ns
    instance: int
    busy: float  # CPU time of the process over time passed

    @property
    def median_s(self) -> float:
        """The median run, at least a nanosecond."""
        return max(float(np.median(self.taken)), 1.0) * 1e-9


_Round = list[_Block]  # one for each candidate


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
    candidate = Candidate.of(
        runtime, artifact, inputs, label=artifact.path, threads=threads, model=model, instances=runtime.INSTANCES
    )
    return compare([candidate], seconds=seconds)[0]


def compare(
    candidates: Sequence[Candidate],
    *,
    seconds: float = 1.0,
    rounds: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    clock: Clock = REAL,
) -> list[Measurement]:
    """Time all candidates in turns, each for about `seconds` in all, and return one measurement for each, in order.

    `rounds` is chosen so that a block lasts about 30 ms, unless given; all instances run in equally many. Warm-up comes
    on top and lasts at most as long again, and so do rounds that are repeated because something disturbed them. `seed`
    orders the blocks; `progress` is called with the blocks done and the blocks in all. Raises ValueError for no
    candidate, two of one label, no time, or candidates of differently many instances, unless of one.
    """
    check(candidates, seconds=seconds, rounds=rounds)
    turn = _turn(candidates)
    with held(), pinned(max(candidate.threads for candidate in candidates)) as cores:
        environment = Environment.read(cores)
        warm = [_warm_up(candidate, cap_s=seconds, clock=clock) for candidate in candidates]
        rounds = turn * math.ceil((rounds or _rounds(seconds, max(each.run_s for each in warm))) / turn)
        counts = [max(1, round(seconds / rounds / each.run_s)) for each in warm]
        series = _Series(candidates, counts, np.random.default_rng(seed), clock, progress)
        taken = series.rounds(rounds, done=0)
        repeated = _repeat(series, taken)
    off = int(_disturbed(taken).sum())
    if off:
        log.info("%d of %d rounds were disturbed by another load or a change of clock", off, rounds)
    found = {"disturbed_rounds": off, "repeated_rounds": repeated}
    return [
        _measurement(candidate, list(blocks), each.runs, environment).model_copy(update=found)
        for candidate, blocks, each in zip(candidates, zip(*taken, strict=True), warm, strict=True)
    ]


@dataclass(frozen=True)
class _Series:
    """Rounds of blocks, in an order drawn anew for each."""

    candidates: Sequence[Candidate]
    counts: Sequence[int]
    random: np.random.Generator
    clock: Clock
    progress: Callable[[int, int], None] | None

    def rounds(self, count: int, *, done: int, first: int = 0) -> list[_Round]:
        """Return so many more rounds, after `done`; `first` is the number of the first, which says the instance."""
        blocks = counted(done * len(self.candidates) + 1)
        total = (done + count) * len(self.candidates)
        found = []
        for number in range(first, first + count):
            taken: dict[int, _Block] = {}
            for index in self.random.permutation(len(self.candidates)).tolist():
                runs = self.candidates[index].runs
                taken[index] = _block(runs, number % len(runs), self.counts[index], clock=self.clock)
                if self.progress:
                    self.progress(next(blocks), total)
            found.append([taken[index] for index in range(len(self.candidates))])
        return found


def _repeat(series: _Series, taken: list[_Round]) -> int:
    """Replace disturbed rounds by new ones with the same instances, while there are any left; return how many."""
    repeated, allowed = 0, round(REPEATS * len(taken))
    while repeated < allowed and (numbers := _disturbed(taken).nonzero()[0].tolist()):
        for number in numbers[: allowed - repeated]:
            (taken[number],) = series.rounds(1, done=len(taken) + repeated, first=number)
            repeated += 1
    return repeated


def _disturbed(taken: Sequence[_Round]) -> "NDArray[np.bool_]":
    instances = np.array([[block.instance for block in each] for each in taken])
    relative = np.array([[block.median_s for block in each] for each in taken])
    for index, own in enumerate(instances.T):
        for instance in np.unique(own):  # a block is held against those of its own instance
            relative[own == instance, index] /= np.median(relative[own == instance, index])
    return disturbed(relative, [[block.busy for block in each] for each in taken])


def check(candidates: Sequence[Candidate], *, seconds: float, rounds: int | None) -> None:
    """Raise ValueError for no candidate, two of one label, or no time."""
    labels = [candidate.label for candidate in candidates]
    if not labels:
        raise ValueError("nothing to compare: give at least one candidate")
    if len(set(labels)) < len(labels):
        raise ValueError(f"labels must differ, got {labels}")
    if seconds <= 0 or (rounds is not None and rounds < 1):
        raise ValueError(f"seconds and rounds must be positive, got {seconds} and {rounds}")


def _turn(candidates: Sequence[Candidate]) -> int:
    """Return in how many rounds all instances take part."""
    several = {len(candidate.runs) for candidate in candidates} - {1}
    if len(several) > 1:
        raise ValueError(f"candidates have {sorted(several)} instances; open all equally often, or once")
    return next(iter(several), 1)


def _warm_up(candidate: Candidate, *, cap_s: float, clock: Clock) -> _Warm:
    """Run each instance until its median run time is stable, sharing `cap_s`; the first runs count for nothing."""
    warm = [_warm_instance(run, candidate.label, cap_s / len(candidate.runs), clock) for run in candidate.runs]
    return _Warm(sum(each.runs for each in warm), median(each.run_s for each in warm))


def _warm_instance(run: Run, label: str, cap_s: float, clock: Clock) -> _Warm:
    run()  # allocates and compiles
    window = _window(run, clock)
    runs, spent_s, current = 1 + len(window), sum(window) * 1e-9, median(window)
    while spent_s < cap_s:
        previous, window = current, _window(run, clock)
        runs, spent_s, current = runs + len(window), spent_s + sum(window) * 1e-9, median(window)
        if abs(current - previous) <= STABLE * previous:
            break
    else:
        log.info("%s: not stable within %.3g s of warm-up", label, cap_s)
    return _Warm(runs, max(current, 1) * 1e-9)


def _window(run: Run, clock: Clock) -> list[int]:
    taken: list[int] = []
    with _collector_off():
        while sum(taken) < WINDOW_S * 1e9 and len(taken) < WINDOW_RUNS:
            taken.append(_timed(run, clock))
    return taken


def _rounds(seconds: float, slowest_s: float) -> int:
    return max(MIN_ROUNDS, round(seconds / max(BLOCK_S, slowest_s)))


def _block(runs: Sequence[Run], instance: int, count: int, *, clock: Clock) -> _Block:
    """Time `count` runs; the first of a longer block refills the caches that other candidates used, untimed."""
    run = runs[instance]
    if count > 1:
        run()
    with _collector_off():
        start, computed = clock.wall(), clock.cpu()
        taken = [_timed(run, clock) for _ in range(count)]
        busy = (clock.cpu() - computed) / max(clock.wall() - start, 1)
    return _Block(taken, instance, busy)


def _timed(run: Run, clock: Clock) -> int:
    start = clock.wall()
    run()
    return clock.wall() - start


@contextmanager
def _collector_off() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _measurement(candidate: Candidate, blocks: list[_Block], warmup_runs: int, environment: Environment) -> Measurement:
    medians_s = [block.median_s for block in blocks]
    samples_s = np.maximum(np.concatenate([block.taken for block in blocks]).astype(np.float64), 1.0) * 1e-9
    own = [[b.median_s for b in blocks if b.instance == index] for index in range(len(candidate.runs))]
    return Measurement(
        label=candidate.label,
        runtime=candidate.runtime,
        runtime_version=candidate.runtime_version,
        artifact_sha256=candidate.artifact_sha256,
        threads=candidate.threads,
        runs=len(samples_s),
        rounds=len(blocks),
        warmup_runs=warmup_runs,
        latency_s=Latency.of(samples_s, medians_s, instances=len(candidate.runs)),
        round_medians_s=tuple(medians_s),
        samples_s=_spread(samples_s),
        environment=environment,
        instance_medians_s=tuple(median(each) for each in own if each),
        cpu_share=median(block.busy for block in blocks) / candidate.threads,
    )


def _spread(samples: "NDArray[np.float64]") -> tuple[float, ...]:
    kept = np.linspace(0, len(samples) - 1, min(len(samples), SAMPLES_KEPT)).round().astype(int)
    return tuple(samples[kept].tolist())
