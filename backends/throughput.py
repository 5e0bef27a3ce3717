"""Throughput: how many examples a second several streams of one model compute side by side."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from backends.affinity import pinned
from backends.artifact import Sha256
from backends.environment import Environment
from backends.latency import centre
from backends.measure import REAL, Candidate, Clock, Run, check

__all__ = ["Throughput", "throughput"]

ROUNDS = 10
WARM_RUNS = 3


class Throughput(BaseModel):
    """Examples per second: the median over the rounds, and its 95 % bootstrap interval."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_version: Literal[1] = 1
    label: str
    runtime: str
    runtime_version: str
    artifact_sha256: Sha256 | None
    threads: PositiveInt  # of each stream
    streams: PositiveInt
    batch: PositiveInt
    examples_per_s: PositiveFloat
    ci95: tuple[PositiveFloat, PositiveFloat]
    rounds_per_s: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    environment: Environment


def throughput(
    candidates: Sequence[Candidate],
    *,
    seconds: float = 1.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    clock: Clock = REAL,
) -> list[Throughput]:
    """Run all instances of a candidate at once, each in its own thread, for about `seconds` in all per candidate.

    Candidates take turns in ten rounds of random order. The rate of a stream is its runs over the time to the end of
    the last one; streams add up. Raises ValueError for no candidate, two of one label, or no time.
    """
    check(candidates, seconds=seconds, rounds=ROUNDS)
    random, rates = np.random.default_rng(seed), [list[float]() for _ in candidates]
    with pinned(max(candidate.threads * len(candidate.runs) for candidate in candidates)) as cores:
        environment = Environment.read(cores)
        for done in range(ROUNDS):
            for turn, index in enumerate(random.permutation(len(candidates)).tolist()):
                rates[index].append(_rate(candidates[index], seconds / ROUNDS, clock))
                if progress:
                    progress(done * len(candidates) + turn + 1, ROUNDS * len(candidates))
    found = [centre(np.array(own)) for own in rates]
    return [
        Throughput(
            label=candidate.label,
            runtime=candidate.runtime,
            runtime_version=candidate.runtime_version,
            artifact_sha256=candidate.artifact_sha256,
            threads=candidate.threads,
            streams=len(candidate.runs),
            batch=candidate.batch,
            examples_per_s=middle,
            ci95=ci95,
            rounds_per_s=tuple(own),
            environment=environment,
        )
        for candidate, own, (middle, ci95) in zip(candidates, rates, found, strict=True)
    ]


def _rate(candidate: Candidate, seconds: float, clock: Clock) -> float:
    """Return the examples per second of all streams of one candidate together."""
    together = threading.Barrier(len(candidate.runs))

    def stream(run: Run) -> float:
        for _ in range(WARM_RUNS):
            run()
        together.wait()
        start, count = clock.wall(), 0
        while not count or clock.wall() - start < seconds * 1e9:
            run()
            count += 1
        return count / max(clock.wall() - start, 1) * 1e9

    with ThreadPoolExecutor(len(candidate.runs)) as pool:
        return candidate.batch * sum(pool.map(stream, candidate.runs))
