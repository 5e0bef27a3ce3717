"""Latency of a choice: from a table measured on the device, or in ratios from the profile's documented rules.

The table holds one entry per (operation, input channels, output channels): what the operation adds inside a network. It
is fitted to whole networks that were measured (probes): minimise over entries c >= 0 and overhead c0 >= 0

    sum_i ((c0 + sum_j n_ij c_j - T_i) / (0.01 T_i))² + sum_j ((c_j - prior_j) / (0.3 prior_j))²

with n_ij the number of operations of kind j in probe i and T_i its measured latency: probes decide what they can tell
apart, the prior the rest. The prior is itself fitted to the probes, first and more coarsely: the work and the bytes
after the profile's rounding (planner.roofline), with one rate for each class of operation, on the grid and beside it.

What no probe contains costs its prior, scaled as far as the prior is off at the nearest widths that one does contain.
Widths that the table lacks cost what the rules say, times what its nearest entries of that operation cost over what the
rules say of them: so a step of the device stays a step between two entries.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from scipy.optimize import nnls
from scipy.stats import t as student_t

from planner.graph import Graph
from planner.operations import Choice, Operation
from planner.roofline import EXPECTED_ERROR, Load, Rules
from planner.spec import Prediction, canonical, read
from profiles import Profile, atomic
from profiles import load as profile_of
from profiles.errors import PlanError, ProfileError

__all__ = ["ESTIMATE", "Costs", "Entry", "Key", "LatencyTable", "Probe", "Rules", "fit", "forecast", "keys"]

Key = tuple[str, int, int]  # operation signature, input channels, output channels
ESTIMATE = "compiler's estimate"  # the method of a table that no device was measured for
_MEASURED, _PRIOR = 0.01, 0.3  # assumed relative standard deviations of a probe and of the prior
_COARSE, _RATE = 0.01, 1.5  # of a probe under the coarse model, and of its rates
_OTHER_SIDE = 2.0  # how much farther an entry on the other side of a cliff counts, in doublings of a width


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Entry(_Part):
    """What one operation adds to a network's latency."""

    operation: str
    inputs: Annotated[int, Field(gt=0)]
    outputs: Annotated[int, Field(gt=0)]
    latency_s: Annotated[float, Field(ge=0)]
    probes: Annotated[int, Field(ge=0)]  # measured networks that contain it; 0: only the prior speaks
    runs: Annotated[int, Field(ge=0)] = 0  # timed runs of those networks
    spread_s: Annotated[float, Field(ge=0)] | None = None  # standard error in the fit


class Probe(_Part):
    """One measured network."""

    keep: dict[str, int]
    removed: tuple[str, ...]
    latency_s: Annotated[float, Field(gt=0)]
    relative: Annotated[float, Field(gt=0)]  # to the dense network timed in turns with it, which takes out drift
    ci95_s: tuple[float, float]
    runs: Annotated[int, Field(gt=0)]
    held_out: bool  # judged the table before it joined the fit

    @property
    def choice(self) -> Choice:
        """What the network keeps."""
        return Choice(self.keep, frozenset(self.removed))


class LatencyTable(_Part):
    """A latency table measured in one runtime on one device, for the operations that one model can become."""

    schema_version: Literal[1] = 1
    profile: str
    runtime: str
    runtime_version: str
    device: str
    threads: int
    created: str
    fingerprint: str
    overhead_s: Annotated[float, Field(ge=0)]
    entries: tuple[Entry, ...]
    probes: tuple[Probe, ...]
    mean_error: float  # relative, on the held-out probes
    max_error: float
    held_out_errors: tuple[float, ...] = ()  # predicted / measured - 1 of each
    device_model: str | None = None  # the name that the device itself tells, such as "AMD EPYC 9654"
    driver_version: str | None = None  # the kernel's where the device has no driver of its own
    batch: Annotated[int, Field(gt=0)] | None = None
    governor: str | None = None  # of the clock; None where the system does not say
    frequency_hz: Annotated[float, Field(gt=0)] | None = None  # when the measurement began
    method: str = "calibrate"  # or "kit", measured on the device by the kit's own script or its tool; or ESTIMATE

    @property
    def uncertainty(self) -> float:
        """Half the width of the 95 % prediction interval, relative: Student's t times the held-out errors' rms."""
        if not self.held_out_errors:
            return 0.0
        rms = float(np.sqrt(np.mean(np.square(self.held_out_errors))))
        return float(student_t.ppf(0.975, len(self.held_out_errors))) * rms

    @cached_property
    def _cost(self) -> dict[Key, float]:
        return {(e.operation, e.inputs, e.outputs): e.latency_s for e in self.entries}

    @cached_property
    def _of(self) -> dict[str, list[Entry]]:
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            found.setdefault(entry.operation, []).append(entry)
        return found

    @cached_property
    def _rules(self) -> Rules | None:
        try:
            return Rules(profile_of(self.profile))
        except ProfileError:
            return None

    def cost(self, operation: Operation, inputs: int, outputs: int) -> float:
        """Return the seconds that an operation adds; between the widths of the table by the profile's rules.

        Raises PlanError if the table lacks the operation, or the widths and the profile is not known here.
        """
        key = (operation.signature, inputs, outputs)
        if key not in self._cost:
            near = self._of.get(operation.signature)
            if not near or self._rules is None:
                raise PlanError(
                    f"the latency table has no entry for {operation.signature} {inputs}->{outputs} "
                    f"({operation.name}); run `espalier calibrate` for this model and these widths"
                )
            self._cost[key] = _between(self._rules, operation, (inputs, outputs), near)
        return self._cost[key]

    def latency(self, graph: Graph, choice: Choice) -> float:
        """Return the predicted seconds of one run under `choice`."""
        present = (o for o in graph.operations if o.present(choice))
        return self.overhead_s + sum(self.cost(o, *o.widths(choice)) for o in present)

    @property
    def sha256(self) -> str:
        """The digest of the content."""
        return hashlib.sha256(canonical(self.model_dump(mode="json"))).hexdigest()

    def save(self, path: Path | str) -> None:
        """Write the table as JSON with its digest, atomically."""
        atomic.write_text(path, json.dumps({**self.model_dump(mode="json"), "sha256": self.sha256}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a table; raises PlanError if the file is not a whole, unedited table of this version."""
        return read(cls, path, "espalier calibrate")


Costs = LatencyTable | Rules


def forecast(costs: Costs, graph: Graph, choice: Choice) -> Prediction:
    """Return what a choice is expected to take.

    The range of a table is its 95 % prediction interval, that of the rules is what they leave open.
    """
    full = graph.choice(choice.keep, choice.removed)
    dense_s, latency_s = costs.latency(graph, graph.dense), costs.latency(graph, full)
    fraction, macs, dense_macs = latency_s / dense_s, graph.macs(full), graph.macs(graph.dense)
    if isinstance(costs, Rules):
        low, high = costs.fractions(graph, full)
        return Prediction(
            basis="documented",
            fraction=fraction,
            low=low,
            high=high,
            expected_error=EXPECTED_ERROR,
            dense_s=None,
            latency_s=None,
            macs=macs,
            dense_macs=dense_macs,
        )
    off = min(costs.uncertainty, 1.0)
    return Prediction(
        basis="estimated by the compiler" if costs.method == ESTIMATE else "measured here",
        fraction=fraction,
        low=fraction * (1 - off),
        high=fraction * (1 + off),
        expected_error=costs.mean_error if costs.held_out_errors else None,
        dense_s=dense_s,
        latency_s=latency_s,
        macs=macs,
        dense_macs=dense_macs,
        table_sha256=costs.sha256,
    )


def keys(graph: Graph, candidates: Mapping[str, Sequence[int]]) -> list[Key]:
    """Return every (operation, input, output) that `graph` can become with these candidate widths, in order."""
    found: dict[Key, None] = {}
    for operation in graph.operations:
        names = list(dict.fromkeys(name for name, _ in operation.inputs.parts + operation.outputs.parts))
        for kept in product(*(candidates.get(name, (graph.width[name].size,)) for name in names)):
            choice = Choice(dict(zip(names, kept, strict=True)), frozenset())
            found[operation.signature, *operation.widths(choice)] = None
    return list(found)


def fit(
    graph: Graph, profile: Profile, wanted: Iterable[Key], probes: Sequence[Probe]
) -> tuple[float, tuple[Entry, ...]]:
    """Return the overhead and the entries for the `wanted` keys that explain the probes (see the module's text)."""
    counts = [Counter(_present(graph, probe.choice)) for probe in probes]
    measured = [key for count in counts for key in count]
    names = list(dict.fromkeys([*measured, *wanted, *_beside(graph, profile, measured)]))  # those measured come first
    matrix = np.array([[1, *(count[key] for key in names)] for count in counts], float)
    times = np.array([probe.latency_s for probe in probes])
    prior = _prior(graph, profile, names, matrix, times)
    seen = (matrix > 0).sum(0)
    known = int((seen > 0).sum())
    data = matrix[:, :known] / (_MEASURED * times)[:, None]
    goal = np.concatenate([np.full(len(times), 1 / _MEASURED), np.full(known, 1 / _PRIOR)])
    # Solved for c / prior: the columns are then of one size.
    ratio = nnls(np.vstack([data * prior[:known], np.eye(known) / _PRIOR]), goal)[0]
    own: dict[str, dict[Key, float]] = {}
    for key, found in zip(names, ratio[1:].tolist(), strict=False):
        own.setdefault(key[0], {})[key] = found
    scales = [_near(key, own.get(key[0], {})) for key in names]
    return float(ratio[0] * prior[0]), tuple(
        Entry(operation=key[0], inputs=key[1], outputs=key[2], latency_s=float(cost) * scale, probes=int(count))
        for key, scale, cost, count in zip(names, scales, prior[1:], seen[1:], strict=True)
    )


def _beside(graph: Graph, profile: Profile, measured: Iterable[Key]) -> list[Key]:
    """Return for each operation its widest widths less one channel, where that is beside a cliff.

    Their prior has the rate of their class there: so what was measured of some operations beside a cliff tells, through
    these entries, what the others cost there.
    """
    rules, operation = Rules(profile), {o.signature: o for o in graph.operations}
    widest: dict[str, Key] = {}
    for key in measured:
        widest[key[0]] = max(key, widest.get(key[0], key), key=lambda k: (k[1], k[2]))
    off = [(name, max(1, n - one), max(1, m - two)) for name, n, m in widest.values() for one, two in ((0, 1), (1, 0))]
    return [key for key in off if rules.load(operation[key[0]], key[1], key[2]).beside]


def _near(key: Key, known: Mapping[Key, float]) -> float:
    """Return how far the prior is off at these widths, or at those nearest to them of the same operation; else 1."""
    if key in known or not known:
        return known.get(key, 1.0)
    return float(np.average(list(known.values()), weights=[1 / (0.1 + _apart(key[1:], o[1:])) ** 2 for o in known]))


def _apart(one: tuple[int, int], other: tuple[int, int]) -> float:
    """Return how far two pairs of widths are apart, in doublings."""
    return abs(math.log2(one[0] / other[0])) + abs(math.log2(one[1] / other[1]))


def _present(graph: Graph, choice: Choice) -> list[Key]:
    return [(o.signature, *o.widths(choice)) for o in graph.operations if o.present(choice)]


def _between(rules: Rules, operation: Operation, widths: tuple[int, int], near: Sequence[Entry]) -> float:
    """Return the cost of widths that the table lacks: by the rules, scaled as the entries near them are."""
    wanted = rules.load(operation, *widths)
    scales, weights = [], []
    for entry in near:
        load = rules.load(operation, entry.inputs, entry.outputs)
        away = _apart(widths, (entry.inputs, entry.outputs)) + _OTHER_SIDE * (load.beside != wanted.beside)
        scales.append(entry.latency_s / rules.seconds(load))
        weights.append((1.0 if entry.probes else 0.1) / (0.1 + away) ** 2)
    return rules.seconds(wanted) * float(np.average(scales, weights=weights))


def _prior(
    graph: Graph, profile: Profile, names: Sequence[Key], matrix: NDArray[np.float64], times: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the prior of the overhead and of each entry: its features at the rates that explain the probes."""
    rules = Rules(profile)
    operation = {o.signature: o for o in graph.operations}
    loads = [rules.load(operation[key[0]], key[1], key[2]) for key in names]
    ideal_s = np.array([rules.seconds(load) for load in loads])
    speed = float(np.median(times / (matrix[:, 1:] @ ideal_s)))  # of the probes beside the device at its peak
    launch_s = max(rules.balance.launch_s, 0.02 * float(ideal_s.mean()))  # something, where the rules know none
    rows = [
        {**_features(rules, operation[key[0]], load), "launch": launch_s}
        for key, load in zip(names, loads, strict=True)
    ]
    kinds = list(dict.fromkeys(kind for row in rows for kind in row))
    table = np.array([[row.get(kind, 0.0) for kind in kinds] for row in rows]) * speed
    overhead_s = 0.02 * float(times.max())
    data = np.column_stack([np.full(len(times), overhead_s), matrix[:, 1:] @ table]) / (_COARSE * times)[:, None]
    goal = np.concatenate([np.full(len(times), 1 / _COARSE), np.full(len(kinds) + 1, 1 / _RATE)])
    rates = nnls(np.vstack([data, np.eye(len(kinds) + 1) / _RATE]), goal)[0]
    found = table @ rates[1:]
    least = 0.02 * float(found.max())  # tiny operations cost their launch
    return np.concatenate([[overhead_s * max(rates[0], 0.1)], np.maximum(found, least)])


def _features(rules: Rules, operation: Operation, load: Load) -> dict[str, float]:
    """Return the seconds that a device at its peak spends on an operation, by what it spends them on."""
    at, words = rules.balance, operation.signature.split()
    kind = " ".join([words[0], *(word for word in words[1:2] if operation.macs_per_pair and word[0].isdigit())])
    moved = load.activation_bytes / at.activation_bytes_per_s + load.weight_bytes / at.weight_bytes_per_s
    found = {
        f"{kind}, beside" if load.beside else kind: load.penalty * load.macs / at.macs_per_s,
        "bytes" if operation.macs_per_pair else f"{kind} bytes": load.penalty * moved,
        "converted": load.converted_bytes / at.activation_bytes_per_s,
    }
    return {name: seconds for name, seconds in found.items() if seconds > 0}
