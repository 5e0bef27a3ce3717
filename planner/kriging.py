"""What operations cost, from the latency of whole networks: regression with a Gaussian process, as in kriging.

A network of W weights takes the overhead c0, the sum of its operations' costs, and what weights take that no cache
keeps from one run to the next, Σ_j ρ_j max(0, W - CACHES_j). With a = (operation, input width, output width),

    c ~ GP(m, k),   m(a) = Σ_f r_f x_f(a),
    k(a, b) = SLOPE² Σ_f r_f² x_f(a) x_f(b) + m(a) m(b) ([same class] SMOOTH² exp(-d²/2 REACH²) + OWN² [a = b])
              within one operation, and 0 between two,

where x_f are the seconds that a device at its peak spends on the work, the work after the profile's rounding, the
bytes, what of them is beyond each of CACHES, and the launch; a class is which of the profile's quanta the widths are
multiples of, and has its own rates; d is the distance of two pairs of widths in doublings. The rates r ≥ 0, ρ ≥ 0 and
c0 come first, from non-negative least squares over all networks; then the process explains what they leave: each
operation's own rates and its own steps. Measured networks are linear in c, so that the posterior is exact (Rasmussen
and Williams 2006, chapter 2), and holds for every width, measured or not. The errors of networks that were timed in
turns share a part, of deviation TURN, as the state of the machine was theirs alike. The constants were chosen once, by
the likelihood of calibrations of five networks; TURN by the errors of 17 tables on networks that they had not seen,
most of which it hardly changes.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import nnls

from planner.operations import Operation
from planner.roofline import Rules

Key = tuple[str, int, int]  # operation signature, input channels, output channels
Widths = Sequence[tuple[int, int]]
Vector = NDArray[np.float64]
SLOPE, SMOOTH, OWN = 0.3, 0.15, 0.05  # relative standard deviations of the process
REACH = 0.7  # doublings of a width over which it is smooth
NOISE = 0.01  # relative standard deviation of a measured network, beside what its timing tells
TURN = 0.02  # and of all that were timed in turns with each other
SURE = 0.001  # of the dense network, which is what the others are relative to
CACHES = (2e6, 8e6, 32e6)  # bytes: between them lie the sizes of caches
_COARSE, _RATE, _USUAL = 0.02, 1.0, 0.5  # of a network under the rates alone; of the rates, and their prior mean
_LEAST = 0.02  # of a rate: what seems to cost nothing may still cost something elsewhere


class Features:
    """What a device at its peak spends on operations, in seconds, by what it spends them on; and their classes."""

    def __init__(self, rules: Rules) -> None:
        """Take the device of `rules`."""
        self.rules = rules
        self._known: dict[Key, dict[str, float]] = {}

    def of(self, operation: Operation, inputs: int, outputs: int) -> dict[str, float]:
        """Return the features of an operation; the launch counts 1, and its rate is in seconds."""
        key = (operation.signature, inputs, outputs)
        if key not in self._known:
            found = self._made(operation, inputs, outputs)
            self._known[key] = {name: value for name, value in found.items() if value > 0}
        return self._known[key]

    def _made(self, operation: Operation, inputs: int, outputs: int) -> dict[str, float]:
        at, words, load = self.rules.balance, operation.signature.split(), self.rules.load(operation, inputs, outputs)
        kind = " ".join([words[0], *(word for word in words[1:2] if operation.macs_per_pair and word[0].isdigit())])
        alignment = self.rules.alignment(operation, inputs, outputs)
        work = operation.macs_per_pair * outputs * (1 if operation.grouped else inputs)
        near_s = at.activation_bytes_per_s
        moved = load.activation_bytes / near_s + load.weight_bytes / at.weight_bytes_per_s
        return {
            kind: work / at.macs_per_s,
            f"{kind} {alignment}": load.penalty * load.macs / at.macs_per_s,
            "bytes" if operation.macs_per_pair else f"bytes, {kind}": moved,
            f"bytes, {kind} {alignment}": moved if "-" in alignment else 0.0,
            **{f"bytes, beyond {size:.0e}": max(0.0, load.activation_bytes - size) / near_s for size in CACHES},
            "launch": 1.0,
        }


@dataclass(frozen=True)
class Prior:
    """The process before the networks that it is conditioned on: rates for each feature of an operation."""

    features: Features
    rates: Mapping[str, float]

    @cached_property
    def _known(self) -> dict[str, tuple[int, float]]:
        return {name: (column, rate) for column, (name, rate) in enumerate(self.rates.items())}

    def _rate(self, name: str) -> tuple[int, float]:
        """Return the column and the rate of a feature; of a class that was never met, those of the other classes."""
        if name not in self._known:
            stem = name.rpartition(" ")[0]
            like = [at for other, at in self._known.items() if other.rpartition(" ")[0] == stem]
            like = like or [at for other, at in self._known.items() if other == "bytes" == name[:5]]
            self._known[name] = (like[0][0], fmean(rate for _, rate in like)) if like else (0, 0.0)
        return self._known[name]

    def parts(self, operation: Operation, widths: Widths) -> Vector:
        """Return r_f x_f for each pair of widths and feature."""
        found = np.zeros((len(widths), len(self.rates)))
        for row, pair in zip(found, widths, strict=True):
            for name, seconds in self.features.of(operation, *pair).items():
                column, rate = self._rate(name)
                row[column] += seconds * rate
        return found

    def mean(self, operation: Operation, widths: Widths) -> Vector:
        """Return m for each pair of widths."""
        total: Vector = self.parts(operation, widths).sum(1)
        return total

    def covariance(self, operation: Operation, rows: Widths, columns: Widths) -> Vector:
        """Return k between two lists of widths of one operation."""
        one, other = self.parts(operation, rows), self.parts(operation, columns)
        away = np.square(np.log2(np.array(rows, float))[:, None] - np.log2(np.array(columns, float))).sum(-1)
        alike = self._classes(operation, rows)[:, None] == self._classes(operation, columns)
        own = SMOOTH**2 * alike * np.exp(-away / (2 * REACH**2)) + OWN**2 * (away == 0)
        found: Vector = SLOPE**2 * (one @ other.T) + own * np.outer(one.sum(1), other.sum(1))
        return found

    def _classes(self, operation: Operation, widths: Widths) -> NDArray[np.str_]:
        return np.array([self.features.rules.alignment(operation, *pair) for pair in widths])

    def between(self, operation: Operation, known: Mapping[tuple[int, int], float], widths: tuple[int, int]) -> float:
        """Return the cost at widths from those `known` of the same operation."""
        at = list(known)
        mean = self.mean(operation, at)
        # Divided by the mean, as costs differ by orders of magnitude.
        spread = self.covariance(operation, at, at) / np.outer(mean, mean)
        ratio = np.array(list(known.values())) / mean - 1
        reach = self.covariance(operation, [widths], at)[0] / mean
        return max(0.0, float(self.mean(operation, [widths])[0] + reach @ cho_solve(cho_factor(spread), ratio)))


@dataclass(frozen=True)
class Networks:
    """What was measured: how many of each key a network holds, and how long it takes."""

    counts: Sequence[Counter[Key]]
    times_s: Vector
    spread: Vector  # relative standard deviation of each
    turns: NDArray[np.int64]  # which were timed in turns with each other: the state of the machine was theirs alike
    weights: Vector  # how many each holds

    def part(self, index: NDArray[np.bool_]) -> "Networks":
        """Return those where `index` is true."""
        counts = [count for count, inside in zip(self.counts, index, strict=True) if inside]
        return Networks(counts, self.times_s[index], self.spread[index], self.turns[index], weights=self.weights[index])

    @property
    def noise(self) -> Vector:
        """The covariance of the relative errors: of each network its own, and one for all of its turn.

        One that was timed alone, as a planned network is, counts as it was found.
        """
        alike = self.turns[:, None] == self.turns
        shared = alike & (alike.sum(1) > 1)
        found: Vector = np.diag(self.spread**2) + TURN**2 * shared
        return found


@dataclass(frozen=True)
class Posterior:
    """What the networks say: the overhead, what reloads take, the prior, and each key's cost with its deviation."""

    overhead_s: float
    reloads: dict[float, float]  # weights that are kept at most -> seconds for each weight beyond
    prior: Prior
    cost_s: dict[Key, float]
    spread_s: dict[Key, float]

    def latency_s(self, networks: Networks) -> Vector:
        """Return what networks take whose keys are all known."""
        costs = np.array([sum(self.cost_s[key] * n for key, n in count.items()) for count in networks.counts])
        again = _beyond(networks.weights, list(self.reloads)) @ np.array(list(self.reloads.values()))
        found: Vector = self.overhead_s + again + costs
        return found


def regress(
    features: Features,
    operations: Mapping[str, Operation],
    wanted: Sequence[Key],
    seen: Networks,
) -> Posterior:
    """Return the costs of the `wanted` keys, and of all that the networks hold."""
    names = list(dict.fromkeys([*(key for count in seen.counts for key in count), *wanted]))
    matrix = np.array([[count[key] for key in names] for count in seen.counts], float)
    times = seen.times_s
    held = int(np.count_nonzero(matrix.any(0)))  # these come first
    overhead_s, reloads, prior = _rates(features, operations, names[:held], matrix[:, :held], seen)
    apart = overhead_s + _beyond(seen.weights, list(reloads)) @ np.array(list(reloads.values()))
    scaled = matrix / times[:, None]
    groups = list(_groups(names, operations))
    mean = np.concatenate([prior.mean(operation, at) for operation, _, at in groups])
    before = [prior.covariance(operation, at, at) for operation, _, at in groups]
    cross = [own @ scaled[:, index].T for own, (_, index, _) in zip(before, groups, strict=True)]
    order = np.concatenate([index for _, index, _ in groups])
    joint = np.concatenate(cross)  # covariance of each key with each network
    left = 1 - apart / times - scaled[:, order] @ mean
    factor = cho_factor(scaled[:, order] @ joint + seen.noise)
    cost = mean + joint @ cho_solve(factor, left)
    variance = np.concatenate([own.diagonal() for own in before]) - (joint * cho_solve(factor, joint.T).T).sum(1)
    keys = [names[index] for index in order]
    return Posterior(
        overhead_s=overhead_s,
        reloads={kept: seconds for kept, seconds in reloads.items() if seconds > 0},
        prior=prior,
        cost_s=dict(zip(keys, np.maximum(cost, 0.0).tolist(), strict=True)),
        spread_s=dict(zip(keys, np.sqrt(np.maximum(variance, 0.0)).tolist(), strict=True)),
    )


def _groups(
    names: Sequence[Key], operations: Mapping[str, Operation]
) -> Iterator[tuple[Operation, list[int], list[tuple[int, int]]]]:
    """Yield each operation with where its keys are and their widths."""
    rows: dict[str, list[int]] = {}
    for index, (signature, _, _) in enumerate(names):
        rows.setdefault(signature, []).append(index)
    for signature, places in rows.items():
        yield operations[signature], places, [names[index][1:] for index in places]


def _rates(
    features: Features,
    operations: Mapping[str, Operation],
    names: Sequence[Key],
    matrix: Vector,
    seen: Networks,
) -> tuple[float, dict[float, float], Prior]:
    """Return the overhead, the reloads and the rates that explain the networks best, all non-negative."""
    rules, times = features.rules, seen.times_s
    rows = [features.of(operations[key[0]], key[1], key[2]) for key in names]
    ideal_s = np.array([rules.seconds(rules.load(operations[key[0]], key[1], key[2])) for key in names])
    speed = float(np.median(times / (matrix @ ideal_s)))  # of the networks beside the device at its peak
    unit = {name: speed for row in rows for name in row} | {"launch": speed * 0.02 * float(ideal_s.mean())}
    table = np.array([[row.get(name, 0.0) * seconds for name, seconds in unit.items()] for row in rows])
    overhead_s = 0.02 * float(times.max())
    kept = [size / rules.weight_bytes for size in CACHES]
    reload_s = speed * rules.weight_bytes / rules.balance.weight_bytes_per_s  # of a weight
    again = _beyond(seen.weights, kept) * reload_s
    weight = 1 / np.hypot(_COARSE, seen.spread)
    data = np.column_stack([again, np.full(len(times), overhead_s), matrix @ table]) * (weight / times)[:, None]
    usual = np.concatenate([np.zeros(len(kept)), np.full(1 + len(unit), _USUAL)])  # most networks fit into caches
    goal = np.concatenate([weight, usual / _RATE])
    found = nnls(np.vstack([data, np.eye(len(usual)) / _RATE]), goal)[0]
    reloads, overhead, rates = np.split(found, [len(kept), len(kept) + 1])
    prior = Prior(features, dict(zip(unit, (np.maximum(rates, _LEAST) * list(unit.values())).tolist(), strict=True)))
    return overhead_s * float(overhead[0]), dict(zip(kept, (reloads * reload_s).tolist(), strict=True)), prior


def _beyond(weights: Vector, kept: Sequence[float]) -> Vector:
    """Return how many weights of each network are beyond each number of `kept`."""
    found: Vector = np.maximum(weights[:, None] - np.array(kept), 0.0)
    return found
