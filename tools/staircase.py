"""Staircases: how the latency of one operation inside a network depends on one of its widths.

`explore` chooses the widths by bisection, `inferred` says which steps they show, and both know nothing of networks;
tools.strand measures. Four devices' habits are told apart: pad (work is rounded up), tile (the tail of a tile is partly
paid), cliff (another kernel beside the multiples) and none of them.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Floats = NDArray[np.float64]
_FLOOR = 0.015  # relative standard deviation below which no measurement is believed
_SHARE = 0.25  # steps that carry less of the rise are none
_PENALTY = 1.1  # a cliff costs at least this factor
_OUTLIER = 5.0  # standard deviations from which on a point counts no more
_MOST = 28  # widths measured
_STEPS = 4  # multiples of the expected quantum that are looked at


@dataclass(frozen=True)
class Point:
    """What one operation of a certain width adds to a network, with its 95 % interval."""

    width: int
    latency_s: float
    ci95_s: tuple[float, float]
    runs: int = 1

    @property
    def half_s(self) -> float:
        """Half the interval, or what no measurement can be believed beyond."""
        return max((self.ci95_s[1] - self.ci95_s[0]) / 2, 1.96 * _FLOOR * self.latency_s)

    def differs(self, other: "Point") -> bool:
        """Whether the two latencies differ by more than their noise."""
        return abs(self.latency_s - other.latency_s) > math.hypot(self.half_s, other.half_s)


@dataclass(frozen=True)
class Staircase:
    """What the points show: latency is flat, or nearly, between the multiples of `quantum`.

    `alpha` is the share of the rounding that is paid: 1 is pad. Beside the multiples of `cliff` it is `penalty` times
    as long.
    """

    points: tuple[Point, ...]
    quantum: int | None = None
    alpha: float | None = None
    cliff: int | None = None
    penalty: float | None = None


Measure = Callable[[Sequence[int]], Sequence[Point]]


def explore(measure: Measure, quantum: int, *, lowest: int | None = None, most: int = _MOST) -> list[Point]:
    """Measure few widths, from `lowest` to four times the expected `quantum`, and more where neighbours differ.

    Without `lowest`, from the upper half of the first step on: narrower operations often have kernels of their own.

    First quarters, and at the top the widths 1, 2, 4, ... below: a narrower operation that takes longer is beside a
    cliff, whose multiples alone are then halved. Pairs that differ most are halved first.
    """
    lowest = quantum // 2 + 1 if lowest is None else lowest
    top = lowest - lowest % quantum + _STEPS * quantum
    quarters = range(top, lowest, -quantum)
    below = [top - 2**power for power in range(quantum.bit_length()) if top - 2**power > lowest]
    points = {p.width: p for p in measure(sorted({lowest, *quarters, *below}))}
    grid = _grid(points, top)
    while len(points) < most and (wanted := _halves(points, grid)):
        points |= {p.width: p for p in measure(sorted(wanted[: most - len(points)]))}
    return [points[width] for width in sorted(points)]


def _grid(points: dict[int, Point], top: int) -> int:
    """Return the lowest power of two whose multiples are beside no cliff."""
    for power in range(top.bit_length()):
        width = top - 2**power
        slower = width in points and points[width].latency_s > points[top].latency_s
        if not (slower and points[width].differs(points[top])):
            return int(2**power)
    return 1


def _halves(points: dict[int, Point], grid: int) -> list[int]:
    """Return the middles of neighbours on the grid that differ, those that differ most first."""
    widths = [width for width in sorted(points) if width % grid == 0]
    pairs = [(points[low], points[high]) for low, high in itertools.pairwise(widths) if high - low > grid]
    differing = [pair for pair in pairs if pair[0].differs(pair[1])]
    differing.sort(key=lambda pair: -abs(pair[0].latency_s - pair[1].latency_s))
    return [(low.width // grid + high.width // grid) // 2 * grid for low, high in differing]


def inferred(points: Sequence[Point]) -> Staircase:
    """Return the steps that explain the points best, by least squares with the Bayesian criterion for their number.

    The candidates are a smooth curve; steps at the multiples of q with any height, flat or rising between them; and
    each of these on the multiples of c only, with a slower straight line beside them. Of quanta that explain the points
    equally well, that with the most factors of two is taken, and then the largest.
    """
    points = sorted(points, key=lambda point: point.width)
    best = min(_explanations(points), key=lambda pair: pair[0], default=None)
    return Staircase(tuple(points)) if best is None else best[1]


_Rank = tuple[float, int, int]


def _explanations(points: Sequence[Point]) -> Iterator[tuple[_Rank, Staircase]]:
    for cliff in range(1, max(1, points[-1].width // 2) + 1):
        on = [p for p in points if p.width % cliff == 0]
        off = [p for p in points if p.width % cliff]
        if cliff > 1 and (len(on) < 3 or len(off) < 2):
            continue
        penalty = _penalty(on, off)
        if cliff > 1 and penalty < _PENALTY:
            continue
        beside = _line(off) if off else 0.0
        extra = (2 + int(cliff > 1)) * math.log(len(points)) if off else 0.0
        for misfit, quantum, alpha in _steps(on, cliff):
            rank = (round(beside + extra + misfit, 6), -_twos(cliff) - _twos(quantum), -cliff - quantum)
            yield (
                rank,
                Staircase(
                    tuple(points),
                    quantum=quantum if quantum > 1 else None,
                    alpha=alpha if quantum > 1 else None,
                    cliff=cliff if cliff > 1 else None,
                    penalty=penalty if cliff > 1 else None,
                ),
            )


def _steps(points: Sequence[Point], grid: int) -> Iterator[tuple[float, int, float]]:
    """Yield (criterion, quantum, alpha) for a smooth curve, whose quantum is 1, and for steps on the grid."""
    widths = np.array([p.width for p in points], float)
    weights = np.array([1.96 / p.half_s for p in points])
    costs = np.array([p.latency_s for p in points])
    unit = math.log(len(points))
    many = 2 * math.log(widths[-1])  # among so many quanta, one fits noise by chance
    for terms in range(1, min(4, len(points)) + 1):
        curve = np.vander(widths / widths[-1], terms) * weights[:, None]
        yield _misfit(curve, costs * weights) + terms * unit, 1, 0.0
    for quantum in range(2 * grid if grid > 1 else 2, int(widths[-1] - widths[0]) + 1):
        treads = np.ceil(widths / quantum)
        levels = np.unique(treads)
        # Most points must speak of flatness, or steps of any height explain everything.
        if quantum % grid or not 2 <= len(levels) <= 0.4 * len(points):
            continue
        columns = (treads[:, None] == levels).astype(float)
        flat = columns * weights[:, None]
        yield _misfit(flat, costs * weights) + len(levels) * unit, quantum, 1.0
        rising = np.column_stack([columns, widths - treads * quantum])
        solution, misfit = _fit(rising * weights[:, None], costs * weights, solve=lambda a, b: nnls(a, b)[0])
        alpha = _alpha(solution[:-1], levels * quantum, float(solution[-1]))
        if _SHARE <= alpha < 1:
            yield misfit + (len(levels) + 1) * unit + many, quantum, alpha


def _alpha(heights: Floats, ends: Floats, slope: float) -> float:
    """Return the share of the rise that the steps carry: 1 - the slope within over the slope across them."""
    across = float(np.polyfit(ends, heights, 1)[0])
    return 0.0 if across <= 0 else min(1.0, max(0.0, 1 - slope / across))


def _misfit(columns: Floats, goal: Floats) -> float:
    return _fit(columns, goal, solve=lambda a, b: np.linalg.lstsq(a, b, rcond=None)[0])[1]


def _fit(columns: Floats, goal: Floats, *, solve: Callable[[Floats, Floats], Any]) -> tuple[Floats, float]:
    """Minimise the sum of min(residual², 5²), so that one width with a kernel of its own does not decide."""
    near = np.ones(len(goal), bool)
    for _ in range(4):
        solution = solve(columns[near], goal[near])
        residuals = np.abs(columns @ solution - goal)
        if not (residuals <= _OUTLIER).any() or ((residuals <= _OUTLIER) == near).all():
            break
        near = residuals <= _OUTLIER
    return solution, float(np.square(np.minimum(residuals, _OUTLIER)).sum())


def _line(points: Sequence[Point]) -> float:
    weights = np.array([1.96 / p.half_s for p in points])
    columns = np.array([[1.0, p.width] for p in points]) * weights[:, None]
    return _misfit(columns, np.array([p.latency_s for p in points]) * weights)


def _penalty(on: Sequence[Point], off: Sequence[Point]) -> float:
    """Return how many times as long it takes beside the multiples, as the median over the widths within their range."""
    inside = [p for p in off if on and on[0].width < p.width < on[-1].width]
    if not inside:
        return 0.0
    expected = np.interp([p.width for p in inside], [p.width for p in on], [p.latency_s for p in on])
    return float(np.median([p.latency_s for p in inside] / expected))


def _twos(n: int) -> int:
    return (n & -n).bit_length() - 1
