"""Whether a runtime's compiler moves strides, as two networks tell that compute the same; see planner.strides.

A 3x3 convolution, a rectifier, and a 1x1 convolution: in one the last has a stride of 2, in the other the first. Unless
the stride is moved, the 3x3 convolution of the one computes four times as much as that of the other.
"""

import tempfile
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from backends import Candidate, Measurement, compare, load
from backends.measure import ratio
from profiles import Profile
from tools.networks import random_samples

__all__ = ["Moves", "Rewriting", "measured", "rewriting"]
_MOVED, _KEPT = 1.5, 2.0  # times as long: at most where the stride moves, at least where it stays
_WIDTH, _SIDE = 64, 28
_ROUNDS = 15
Seconds = Annotated[float, Field(gt=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Moves(_Part):
    """How many times as long the network takes whose last convolution has the stride."""

    ratio: Seconds
    ci95: tuple[Seconds, Seconds]
    latency_s: Seconds  # of that network
    spread_s: Annotated[float, Field(ge=0)]
    runs: Annotated[int, Field(gt=0)]

    @classmethod
    def of(cls, late: Measurement, early: Measurement) -> Self:
        """Compare two networks that were timed in turns."""
        found, (low, high) = ratio(late, early), late.latency_s.ci95
        spread_s = (high - low) / 2
        return cls(ratio=found.value, ci95=found.ci95, latency_s=late.latency_s.p50, spread_s=spread_s, runs=late.runs)

    @property
    def moved(self) -> bool | None:
        """Whether the stride moved; None if that cannot be told."""
        return True if self.ci95[1] <= _MOVED else False if self.ci95[0] >= _KEPT else None


class Rewriting(_Part):
    """One rewrite of a compiler: whether the profile states it, and whether it was seen."""

    kind: Literal["strides"] = "strides"
    documented: bool
    moves: Moves
    verdict: Literal["agree", "disagree", "unchecked"]

    def __str__(self) -> str:
        """Say it in a line."""
        told, seen = "yes" if self.documented else "no", {True: "yes", False: "no", None: "unclear"}[self.moves.moved]
        took = f"{self.moves.ratio:.2f} times as long as with the stride before"
        return f"rewrite strides: documented {told}, measured {seen} ({took}): {self.verdict}"


def rewriting(profile: Profile, moves: Moves) -> Rewriting:
    """Hold what a profile states against what was measured; silence states that strides stay."""
    documented, moved = any(own.kind == "strides" for own in profile.rewrite), moves.moved
    verdict: Literal["agree", "disagree", "unchecked"] = "unchecked"
    if moved is not None:
        verdict = "agree" if moved == documented else "disagree"
    return Rewriting(documented=documented, moves=moves, verdict=verdict)


def network(*, late: bool) -> nn.Module:
    """Return the network whose last convolution has the stride, or the one whose first has; both compute the same."""
    torch.manual_seed(0)
    first, last = (1, 2) if late else (2, 1)
    wide = nn.Conv2d(_WIDTH, _WIDTH, 3, first, padding=1)
    return nn.Sequential(wide, nn.ReLU(), nn.Conv2d(_WIDTH, _WIDTH, 1, last), nn.ReLU()).eval()


def measured(profile: Profile, *, threads: int = 1, seconds: float = 0.5) -> Moves:
    """Build both networks for the runtime of a profile and time them in turns, `seconds` each."""
    runtime, candidates = load(profile.runtime.name), []
    inputs = (torch.randn(1, _WIDTH, _SIDE, _SIDE, generator=torch.Generator().manual_seed(0)),)
    samples = random_samples(inputs, profile)
    with tempfile.TemporaryDirectory(prefix="espalier-") as folder:
        for label, late in (("late", True), ("early", False)):
            path, net = Path(folder) / f"{label}{runtime.SUFFIX}", network(late=late)
            artifact = runtime.build(net, inputs, profile, path, threads=threads, samples=samples)
            candidates.append(Candidate.of(runtime, artifact, inputs, label=label, model=net))
        late_s, early_s = compare(candidates, seconds=seconds, rounds=_ROUNDS)
    return Moves.of(late_s, early_s)
