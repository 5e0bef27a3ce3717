"""Latencies with their uncertainty: percentiles, bootstrap intervals, ratios of paired measurements."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from backends.artifact import Sha256
from backends.environment import Environment
from profiles.errors import BuildError

__all__ = ["Latency", "Measurement", "Ratio", "median_interval", "ratio"]

RESAMPLES = 2000
DISTURBED = 0.2  # the share of rounds above which a median is doubtful
HELD = 0.9  # of its core, below which a process shared it with another; on a GPU it waits, and has it for less
_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)
_SEED = 0
Floats = NDArray[np.float64]


class Latency(BaseModel):
    """One latency distribution; `p50` is the median of the round medians, `ci95` its bootstrap interval."""

    model_config = _STRICT

    p50: PositiveFloat
    p90: PositiveFloat
    p99: PositiveFloat
    mean: PositiveFloat
    min: PositiveFloat
    ci95: tuple[PositiveFloat, PositiveFloat]

    @classmethod
    def of(cls, samples: Sequence[float] | Floats, round_medians: Sequence[float] | Floats) -> Self:
        """Summarise every run (`samples`) and the medians of the rounds they were taken in, in one unit."""
        runs, medians = np.asarray(samples), np.asarray(round_medians)
        p90, p99 = np.percentile(runs, (90, 99)).tolist()
        return cls(
            p50=float(np.median(medians)),
            p90=p90,
            p99=p99,
            mean=float(runs.mean()),
            min=float(runs.min()),
            ci95=median_interval(medians),
        )


class Measurement(BaseModel):
    """The latency of one candidate, with what is needed to check it; written and read as JSON.

    `samples_s` are at most a thousand runs, spread evenly over all `runs`; `latency_s` was computed from all of them.
    `repeated_rounds` were disturbed by another load or a change of clock and measured again, `disturbed_rounds` stayed
    so. `cpu_share` is the CPU time that this process had in a median block, over the time passed and its threads: well
    below 1 on one thread of a CPU, something else computed on its core all the while.
    """

    model_config = _STRICT

    schema_version: Literal[1] = 1
    label: str
    runtime: str
    runtime_version: str
    artifact_sha256: Sha256 | None
    threads: PositiveInt
    runs: PositiveInt
    rounds: PositiveInt
    warmup_runs: NonNegativeInt
    latency_s: Latency
    round_medians_s: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    samples_s: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    environment: Environment
    instance_medians_s: tuple[PositiveFloat, ...] = ()  # the same model compiled several times
    disturbed_rounds: NonNegativeInt = 0
    repeated_rounds: NonNegativeInt = 0
    cpu_share: NonNegativeFloat | None = None

    @property
    def remark(self) -> str:
        """What makes this measurement doubtful, if anything."""
        found = []
        if self.disturbed_rounds > DISTURBED * self.rounds:
            found.append(
                f"{self.disturbed_rounds} of {self.rounds} rounds were disturbed by a load or a change of clock"
            )
        if self.cpu_share is not None and self.threads == 1 and self.cpu_share < HELD:
            found.append(f"the process had its core for {self.cpu_share:.0%} of the time")
        return " and ".join(found)


class Ratio(BaseModel):
    """How many times the latency of one is that of another, with its 95 % bootstrap interval."""

    model_config = _STRICT

    value: PositiveFloat
    ci95: tuple[PositiveFloat, PositiveFloat]


def ratio(a: Measurement, b: Measurement) -> Ratio:
    """Return the latency of `a` over that of `b`, from paired rounds: 2.0 means that b is twice as fast.

    Rounds of one comparison are minutes of one machine: what slows a round slows both, and leaves their ratio alone.
    BuildError unless both come from the same `compare`.
    """
    if a.environment != b.environment or a.rounds != b.rounds:
        raise BuildError(
            f"{a.label!r} and {b.label!r} were not measured in turns, so their ratio would contain what changed on the "
            "machine in between; measure both in one compare()"
        )
    paired = np.asarray(a.round_medians_s) / np.asarray(b.round_medians_s)
    return Ratio(value=float(np.median(paired)), ci95=median_interval(paired))


def median_interval(values: Floats) -> tuple[float, float]:
    """Return the 95 % percentile-bootstrap interval of the median (Efron 1979)."""
    rounds = len(values)
    drawn = np.random.default_rng(_SEED).integers(0, rounds, size=(RESAMPLES, rounds))
    medians = np.median(values[drawn], axis=1)
    low, high = np.percentile(medians, (2.5, 97.5)).tolist()
    return low, high
