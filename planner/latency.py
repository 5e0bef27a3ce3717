"""Latency of a choice: from a table measured on the device, or in ratios from the profile's documented rules.

The table holds one entry per (operation, input channels, output channels): what the operation adds inside a network;
and what weights add that are too many for a cache to keep from run to run, which no operation decides alone. It is
fitted to whole networks that were measured (probes), see planner.kriging. Widths that it lacks cost what the same
process says of them, so that a step of the device stays a step between two entries. How far it is off on networks
that it was not fitted to is known from cross-validation: a part of the probes is left out of the fit in turn.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from scipy.stats import norm
from scipy.stats import t as student_t

from planner.graph import Graph
from planner.kriging import NOISE, SURE, Features, Key, Networks, Prior, regress
from planner.operations import Choice, Operation
from planner.roofline import EXPECTED_ERROR, Rules
from planner.spec import Prediction, canonical, read
from profiles import Profile, atomic
from profiles import load as profile_of
from profiles.errors import PlanError, ProfileError

__all__ = [
    "ESTIMATE",
    "Costs",
    "Entry",
    "Fitted",
    "Key",
    "LatencyTable",
    "Probe",
    "Rules",
    "cross_validated",
    "fit",
    "forecast",
    "keys",
    "rates_of",
]

log = logging.getLogger(__name__)
ESTIMATE = "compiler's estimate"  # the method of a table that no device was measured for
_PARTS = 5  # of the probes, in cross-validation


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

    @property
    def noise(self) -> float:
        """The relative standard deviation of its latency."""
        low, high = self.ci95_s
        return (high - low) / (low + high) / float(norm.ppf(0.975))

    @property
    def choice(self) -> Choice:
        """What the network keeps."""
        return Choice(self.keep, frozenset(self.removed))


class Reload(_Part):
    """What each weight adds beyond as many as a cache keeps from one run to the next."""

    beyond: Annotated[float, Field(ge=0)]  # weights
    each_s: Annotated[float, Field(ge=0)]


class Fitted(_Part):
    """What explains the probes: the overhead of a run, reloads, the rates of the prior, and the entries."""

    overhead_s: Annotated[float, Field(ge=0)]
    reloads: tuple[Reload, ...] = ()
    moves_strides: bool = False  # whether strides of 1x1 convolutions move to what makes their inputs: planner.strides
    rates: dict[str, float]  # see planner.kriging
    entries: tuple[Entry, ...]


class LatencyTable(Fitted):
    """A latency table measured in one runtime on one device, for the operations that one model can become."""

    schema_version: Literal[3] = 3
    profile: str
    runtime: str
    runtime_version: str
    device: str
    threads: int
    created: str
    fingerprint: str
    probes: tuple[Probe, ...]
    errors: tuple[float, ...] = ()  # predicted / measured - 1 of each probe, by fits that it was left out of
    device_model: str | None = None  # the name that the device itself tells, such as "AMD EPYC 9654"
    driver_version: str | None = None  # the kernel's where the device has no driver of its own
    batch: Annotated[int, Field(gt=0)] | None = None
    governor: str | None = None  # of the clock; None where the system does not say
    frequency_hz: Annotated[float, Field(gt=0)] | None = None  # when the measurement began
    method: str = "calibrate"  # or "kit", measured on the device by the kit's own script or its tool; or ESTIMATE

    @property
    def uncertainty(self) -> float:
        """Half the width of the 95 % prediction interval, relative: Student's t times the errors' rms."""
        if not self.errors:
            return 0.0
        rms = float(np.sqrt(np.mean(np.square(self.errors))))
        return float(student_t.ppf(0.975, len(self.errors))) * rms

    @property
    def mean_error(self) -> float:
        """The mean of the absolute errors; 0 if there are none."""
        return float(np.abs(self.errors).mean()) if self.errors else 0.0

    @property
    def max_error(self) -> float:
        """The largest of the absolute errors; 0 if there are none."""
        return float(np.abs(self.errors).max()) if self.errors else 0.0

    @cached_property
    def _cost(self) -> dict[Key, float]:
        return {(e.operation, e.inputs, e.outputs): e.latency_s for e in self.entries}

    @cached_property
    def _measured(self) -> dict[str, dict[tuple[int, int], float]]:
        found: dict[str, dict[tuple[int, int], float]] = {}
        for entry in self.entries:
            if entry.probes:
                found.setdefault(entry.operation, {})[entry.inputs, entry.outputs] = entry.latency_s
        return found

    @cached_property
    def _prior(self) -> Prior | None:
        try:
            return Prior(Features(Rules(profile_of(self.profile))), self.rates) if self.rates else None
        except ProfileError as error:
            log.warning("only measured widths have a cost, as the table's profile is not known here: %s", error)
            return None

    def cost(self, operation: Operation, inputs: int, outputs: int) -> float:
        """Return the seconds that an operation adds; at widths that the table lacks, by the process it is fitted with.

        One that is trimmed in a way that was not measured costs what the whole one does, times the ratio of the rules.
        Raises PlanError if the table lacks the operation, or the widths and the profile is not known here.
        """
        key = (operation.signature, inputs, outputs)
        if key not in self._cost:
            near = self._measured.get(operation.signature)
            if operation.whole is not None and not self.knows(operation):
                return self._by_ratio(operation, operation.whole, inputs, outputs)
            if not near or self._prior is None:
                raise PlanError(
                    f"the latency table has no entry for {operation.signature} {inputs}->{outputs} "
                    f"({operation.name}); run `espalier calibrate` for this model and these widths"
                )
            self._cost[key] = self._prior.between(operation, near, (inputs, outputs))
        return self._cost[key]

    def knows(self, operation: Operation) -> bool:
        """Whether an operation was measured, so that the table tells its cost at any widths."""
        return operation.signature in self._measured and self._prior is not None

    def _by_ratio(self, operation: Operation, whole: Operation, inputs: int, outputs: int) -> float:
        try:
            rules = Rules(profile_of(self.profile)) if self._prior is None else self._prior.features.rules
        except ProfileError as error:
            raise PlanError(f"{operation.name} was not measured as it is trimmed, and {error}") from error
        ratio = rules.cost(operation, inputs, outputs) / rules.cost(whole, inputs, outputs)
        return self.cost(whole, inputs, outputs) * ratio

    def whole_s(self, graph: Graph) -> float | None:
        """Return the latency of the dense network as it is known, beside what its operations add up to.

        A compiler says how long that takes, and always the same, though its sum may be off as that of any network; a
        fit of measured networks goes through it.
        """
        kept = (probe for probe in self.probes if self.method == ESTIMATE and not probe.removed)
        return next((probe.latency_s for probe in kept if graph.choice(probe.keep) == graph.dense), None)

    def latency(self, graph: Graph, choice: Choice) -> float:
        """Return the predicted seconds of one run under `choice`."""
        if choice == graph.dense and (whole_s := self.whole_s(graph)) is not None:
            return whole_s
        again_s = sum(reload.each_s * max(0.0, graph.weights(choice) - reload.beyond) for reload in self.reloads)
        under = graph.under(choice, strides=self.moves_strides)
        return self.overhead_s + again_s + sum(self.cost(*made) for made in under)

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
        expected_error=costs.mean_error if costs.errors else None,
        dense_s=dense_s,
        latency_s=latency_s,
        macs=macs,
        dense_macs=dense_macs,
        table_sha256=costs.sha256,
    )


def keys(graph: Graph, candidates: Mapping[str, Sequence[int]], *, strides: bool = False) -> list[Key]:
    """Return every (operation, input, output) that `graph` can become with these candidate widths, in order.

    With `strides`, also what they are once strides have moved.
    """
    found: dict[Key, None] = {}
    moved = (made for own in graph.operations for _, made in own.strided) if strides else ()
    for operation in (*graph.operations, *moved):
        names = list(dict.fromkeys(name for name, _ in operation.inputs.parts + operation.outputs.parts))
        for kept in product(*(candidates.get(name, (graph.width[name].size,)) for name in names)):
            choice = Choice(dict(zip(names, kept, strict=True)), frozenset())
            found[operation.signature, *operation.widths(choice)] = None
    return list(found)


def fit(graph: Graph, profile: Profile, wanted: Sequence[Key], probes: Sequence[Probe]) -> Fitted:
    """Return what explains the probes: the entries of the `wanted` keys and of all that a probe holds."""
    strides = profile.moves_strides
    networks = _seen(graph, probes, strides=strides)
    found = regress(Features(Rules(profile)), _operations(graph, probes, strides=strides), wanted, networks)
    seen, runs = Counter[Key](), Counter[Key]()
    for probe, count in zip(probes, networks.counts[:-1], strict=True):
        seen.update(count.keys())
        runs.update(dict.fromkeys(count, probe.runs))
    entries = tuple(
        Entry(
            operation=key[0],
            inputs=key[1],
            outputs=key[2],
            latency_s=seconds,
            probes=seen[key],
            runs=runs[key],
            spread_s=found.spread_s[key],
        )
        for key, seconds in found.cost_s.items()
    )
    return Fitted(
        overhead_s=found.overhead_s,
        reloads=tuple(Reload(beyond=kept, each_s=seconds) for kept, seconds in found.reloads.items()),
        rates=dict(found.prior.rates),
        entries=entries,
        moves_strides=strides,
    )


def rates_of(graph: Graph, profile: Profile, cost_s: Mapping[Key, float]) -> dict[str, float]:
    """Return the rates between the costs of single operations, for a table whose entries are known one by one."""
    known = {key: seconds for key, seconds in cost_s.items() if seconds > 0}
    seen = Networks(
        counts=[Counter([key]) for key in known],
        times_s=np.array(list(known.values())),
        spread=np.full(len(known), NOISE),
        turns=np.arange(len(known)),
        weights=np.zeros(len(known)),
    )
    found = regress(Features(Rules(profile)), {o.signature: o for o in graph.operations}, (), seen)
    return dict(found.prior.rates)


def cross_validated(graph: Graph, profile: Profile, probes: Sequence[Probe]) -> tuple[float, ...]:
    """Return predicted / measured - 1 of each probe, by fits to the other parts; nothing of too few probes."""
    if len(probes) < 2 * _PARTS:
        return ()
    features, strides = Features(Rules(profile)), profile.moves_strides
    seen, operations = _seen(graph, probes, strides=strides), _operations(graph, probes, strides=strides)
    parts = np.append(np.arange(len(probes)) % _PARTS, -1)  # the dense network is always known
    errors = np.zeros(len(parts))
    for part in range(_PARTS):
        judged = seen.part(parts == part)
        wanted = list(dict.fromkeys(key for count in judged.counts for key in count))
        found = regress(features, operations, wanted, seen.part(parts != part))
        errors[parts == part] = found.latency_s(judged) / judged.times_s - 1
    return tuple(errors[:-1].tolist())


def _seen(graph: Graph, probes: Sequence[Probe], *, strides: bool) -> Networks:
    """Return the probes as if the dense network had taken the same time beside all of them, and last that one."""
    dense_s = np.array([probe.latency_s / probe.relative for probe in probes])
    middle_s = float(np.median(dense_s))
    turns = np.unique(np.round(dense_s / middle_s, 9), return_inverse=True)[1]
    choices = [*(probe.choice for probe in probes), graph.dense]
    return Networks(
        counts=[_present(graph, choice, strides=strides) for choice in choices],
        times_s=middle_s * np.array([*(probe.relative for probe in probes), 1.0]),
        spread=np.array([*(float(np.hypot(NOISE, probe.noise)) for probe in probes), SURE]),
        turns=np.append(turns, -1),
        weights=np.array([graph.weights(choice) for choice in choices], float),
    )


def _operations(graph: Graph, probes: Sequence[Probe], *, strides: bool) -> dict[str, Operation]:
    """Return the operations of a graph by their signatures, and what probes trimmed them to."""
    found = {made.signature: made for own in graph.operations for _, made in own.strided} if strides else {}
    found |= {own.signature: own for own in graph.operations}
    for probe in probes:
        under = (own.under(probe.choice, strides=strides)[0] for own in graph.operations)
        found |= {made.signature: made for made in under if made.signature not in found}
    return found


def _present(graph: Graph, choice: Choice, *, strides: bool) -> Counter[Key]:
    under = graph.under(choice, strides=strides)
    return Counter((made.signature, inputs, outputs) for made, inputs, outputs in under)
