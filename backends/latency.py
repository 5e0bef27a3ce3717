"""Latencies with their uncertainty: percentiles, 95 % intervals, ratios of paired measurements."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from scipy.stats import t as student_t

from backends.artifact import Sha256
from backends.environment import Environment
from profiles.errors import BuildError

__all__ = ["Latency", "Measurement", "Ratio", "centre", "ratio"]

RESAMPLES = 2000
DISTURBED = 0.2  # the share of rounds above which a median is doubtful
HELD = 0.9  # of its core, below which a process shared it with another; on a GPU it waits, and has it for less
_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)
_SEED = 0
Floats = NDArray[np.float64]


class Latency(BaseModel):
    """One latency distribution; `p50` is the `centre` of the round medians, `ci95` its interval."""

    model_config = _STRICT

    p50: PositiveFloat
    p90: PositiveFloat
    p99: PositiveFloat
    mean: PositiveFloat
    min: PositiveFloat
    ci95: tuple[PositiveFloat, PositiveFloat]

    @classmethod
    def of(
        cls, samples: Sequence[float] | Floats, round_medians: Sequence[float] | Floats, *, instances: int = 1
    ) -> Self:
        """Summarise every run (`samples`) and the medians of the rounds they were taken in, in one unit."""
        runs = np.asarray(samples)
        p90, p99 = np.percentile(runs, (90, 99)).tolist()
        p50, ci95 = centre(np.asarray(round_medians), instances=instances)
        return cls(
            p50=p50,
            p90=p90,
            p99=p99,
            mean=float(runs.mean()),
            min=float(runs.min()),
            ci95=ci95,
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
    instance_medians_s: tuple[PositiveFloat, ...] = ()  # the same model compiled several times; they take turns
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
    """How many times the latency of one is that of another, with its 95 % interval."""

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
    instances = max(len(a.instance_medians_s), len(b.instance_medians_s), 1)
    value, ci95 = centre(paired, instances=instances)
    return Ratio(value=value, ci95=ci95)


def centre(rounds: Floats, *, instances: int = 1) -> tuple[float, tuple[float, float]]:
    """Return the typical value of rounds that `instances` took in turns, and its 95 % interval.

    Rounds of one instance share what its compilation came out as, so they are one observation however many they are
    (Kalibera and Jones, Rigorous benchmarking in reasonable time, 2013). With m_i the median of the logarithms of
    instance i, of n, the centre is exp(mean m), and the interval exp(mean m -+ t_{n-1} sd(m) / sqrt(n)): a t-test of
    estimates by group, right for few of them and on the safe side where they scatter unequally (Ibragimov and Mueller,
    t-statistic based correlation and heterogeneity robust inference, 2010). The noise of rounds is in sd(m). Drawing
    few instances anew, a bootstrap, would be too narrow (Cameron, Gelbach and Miller, 2008). Of one instance it is the
    percentile-bootstrap interval of the median (Efron 1979), which says nothing of other compilations.
    """
    if instances == 1:
        return float(np.median(rounds)), _bootstrap(rounds)
    medians = np.array([np.median(np.log(rounds[own::instances])) for own in range(instances)])
    half = student_t.ppf(0.975, instances - 1) * medians.std(ddof=1) / np.sqrt(instances)
    low, value, high = np.exp(medians.mean() + np.array([-half, 0.0, half])).tolist()
    return value, (low, high)


def _bootstrap(rounds: Floats) -> tuple[float, float]:
    drawn = np.random.default_rng(_SEED).integers(0, len(rounds), size=(RESAMPLES, len(rounds)))
    low, high = np.percentile(np.median(rounds[drawn], axis=1), (2.5, 97.5)).tolist()
    return low, high
