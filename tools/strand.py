"""Strands: networks in which one operation of a chosen width occurs few or many times, and what one more of it adds.

The time of a call, of the first layout conversion and of the last is the same in a short strand and a long one, so the
difference is what the operation adds inside a network, with what the runtime fuses behind it.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from backends import Candidate, Measurement, compare, load
from backends.contract import Runtime
from profiles import Profile
from tools.design import off_the_grid
from tools.networks import random_samples
from tools.staircase import Floats, Point

SHORT, LONG = 2, 8
_ROUNDS = 15
_SIDE, _TOKENS = 14, 196  # positions of an image and of a sequence
_GROUPS = 4
_RESAMPLES = 1000
Make = Callable[[], nn.Module]
Progress = Callable[[int], None]


class Side(nn.Module):
    """x -> relu(... relu(relu(f1(x)) + f2(x)) ... + fn(x)): every operation reads one width and makes another."""

    def __init__(self, stem: nn.Module, make: Make, length: int) -> None:
        super().__init__()
        self.stem, self.operations = stem, nn.ModuleList(make() for _ in range(length))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the sum, with a rectifier after each term so that no compiler can join the operations."""
        x = self.stem(x).relu()
        total = self.operations[0](x).relu()
        for operation in list(self.operations)[1:]:
            total = (operation(x) + total).relu()
        return cast(Tensor, total)


class Chain(nn.Module):
    """x -> relu(fn(... relu(f1(x)))): every operation reads the width that it makes."""

    def __init__(self, stem: nn.Module, make: Make, length: int) -> None:
        super().__init__()
        self.stem, self.operations = stem, nn.ModuleList(make() for _ in range(length))

    def forward(self, x: Tensor) -> Tensor:
        """Compute one after the other."""
        x = self.stem(x).relu()
        for operation in self.operations:
            x = operation(x).relu()
        return x


@dataclass(frozen=True)
class Probe:
    """How one axis of one operation is looked at: a network by width and length, and its input."""

    network: Callable[[int, int], nn.Module]
    shape: tuple[int, ...]  # of one input


def _convolution(axis: str, groups: int = 1) -> Probe:
    fixed = 32  # in each group; a multiple of what CPUs want, so that only the other axis can be beside it

    def network(width: int, length: int) -> nn.Module:
        source, made = (fixed, width) if axis == "out_channels" else (width, fixed)
        stem = nn.Conv2d(16, source * groups, 3, padding=1)
        return Side(stem, lambda: nn.Conv2d(source * groups, made * groups, 3, padding=1, groups=groups), length)

    return Probe(network, (16, _SIDE, _SIDE))


def _sequence(axis: str) -> Probe:
    def network(width: int, length: int) -> nn.Module:
        source, made = (32, width) if axis == "out_channels" else (width, 32)
        return Side(nn.Conv1d(16, source, 3, padding=1), lambda: nn.Conv1d(source, made, 3, padding=1), length)

    return Probe(network, (16, _TOKENS))


def _depthwise() -> Probe:
    def network(width: int, length: int) -> nn.Module:
        stem = nn.Conv2d(16, width, 3, padding=1)
        return Chain(stem, lambda: nn.Conv2d(width, width, 3, padding=1, groups=width), length)

    return Probe(network, (16, 2 * _SIDE, 2 * _SIDE))


def _linear(axis: str) -> Probe:
    def network(width: int, length: int) -> nn.Module:
        source, made = (128, width) if axis == "out_channels" else (width, 128)
        return Side(nn.Linear(64, source), lambda: nn.Linear(source, made), length)

    return Probe(network, (_TOKENS, 64))


def _hidden() -> Probe:
    def network(width: int, length: int) -> nn.Module:
        return Chain(
            nn.Linear(64, 128),
            lambda: nn.Sequential(nn.Linear(128, width), nn.ReLU(), nn.Linear(width, 128)),
            length,
        )

    return Probe(network, (_TOKENS, 64))


_PROBES: Mapping[tuple[str, str], Callable[[], Probe]] = {
    ("conv2d", "out_channels"): lambda: _convolution("out_channels"),
    ("conv2d", "in_channels"): lambda: _convolution("in_channels"),
    ("grouped_conv2d", "out_channels"): lambda: _convolution("out_channels", _GROUPS),
    ("grouped_conv2d", "in_channels"): lambda: _convolution("in_channels", _GROUPS),
    ("conv1d", "out_channels"): lambda: _sequence("out_channels"),
    ("conv1d", "in_channels"): lambda: _sequence("in_channels"),
    ("depthwise_conv2d", "out_channels"): _depthwise,
    ("depthwise_conv2d", "in_channels"): _depthwise,
    ("linear", "out_channels"): lambda: _linear("out_channels"),
    ("linear", "in_channels"): lambda: _linear("in_channels"),
    ("linear", "hidden"): _hidden,
}


def known(op: str, axis: str) -> bool:
    """Whether there is a network that shows this axis of this operation."""
    return (op, axis) in _PROBES


@dataclass
class Strands:
    """Measures what one operation adds at a width, in the runtime of a profile; calling it takes widths, gives points.

    Every call times the first call's widest strand too, whose drift is divided out.
    """

    profile: Profile
    op: str
    axis: str
    threads: int = 1
    batch: int = 1
    seconds: float = 0.15  # per network
    progress: Progress = lambda _: None  # told how many widths are done
    _anchor: tuple[int, float] | None = field(default=None, init=False)  # its width and its latency at first
    _done: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.probe = _PROBES[self.op, self.axis]()
        self.runtime: Runtime = load(self.profile.runtime.name)

    def __call__(self, widths: Sequence[int]) -> list[Point]:
        """Build and time the strands of these widths, in turns."""
        anchor = self._anchor[0] if self._anchor else max(widths)
        with tempfile.TemporaryDirectory(prefix="espalier-") as folder:
            rows = {(anchor, LONG): self._candidate(anchor, LONG, Path(folder))}
            for width in widths:
                for length in (SHORT, LONG):
                    if (width, length) not in rows:
                        rows[width, length] = self._candidate(width, length, Path(folder))
                self._done += 1
                self.progress(self._done)
            timed = compare(list(rows.values()), seconds=self.seconds, rounds=_ROUNDS, seed=self._done)
        measured = dict(zip(rows, timed, strict=True))
        reference = measured[anchor, LONG]
        if self._anchor is None:
            self._anchor = anchor, reference.latency_s.p50
        scale = self._anchor[1] / np.array(reference.round_medians_s)
        return [_point(width, measured[width, SHORT], measured[width, LONG], scale) for width in widths]

    def _candidate(self, width: int, length: int, folder: Path) -> Candidate:
        torch.manual_seed(0)
        network = self.probe.network(width, length).eval()
        inputs = (torch.randn(self.batch, *self.probe.shape),)
        samples = random_samples(inputs, self.profile)
        label = f"{width}x{length}"
        path = folder / f"{label}{self.runtime.SUFFIX}"
        with off_the_grid():
            artifact = self.runtime.build(network, inputs, self.profile, path, threads=self.threads, samples=samples)
        return Candidate.of(self.runtime, artifact, inputs, label=label, model=network)


def _point(width: int, short: Measurement, long: Measurement, scale: Floats) -> Point:
    """Return the median over the rounds of the difference, per operation, with its bootstrap interval."""
    taken = np.array(long.round_medians_s) - np.array(short.round_medians_s)
    added = np.maximum(taken * scale / (LONG - SHORT), 1e-9)
    drawn = np.random.default_rng(0).integers(0, len(added), size=(_RESAMPLES, len(added)))
    low, high = np.percentile(np.median(added[drawn], axis=1), (2.5, 97.5)).tolist()
    return Point(width, float(np.median(added)), (low, high), short.runs + long.runs)
