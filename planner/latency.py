"""Latency of a choice: from a table measured on the device, or in ratios from the profile's documented granularity.

The table holds one entry per (operation, input channels, output channels): what the operation adds inside a network. It
is fitted to whole networks that were measured (probes): minimise over entries c >= 0 and overhead c0 >= 0

    sum_i ((c0 + sum_j n_ij c_j - T_i) / (0.01 T_i))² + sum_j ((c_j - prior_j) / (0.5 prior_j))²

with n_ij the number of operations of kind j in probe i, T_i its measured latency, and the prior proportional to the
multiply-accumulates after the profile's rounding: probes decide what they can tell apart, the prior the rest.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from scipy.optimize import nnls
from scipy.stats import t as student_t

from planner.graph import Graph
from planner.operations import Choice, Operation
from planner.spec import canonical, read
from profiles import Profile, atomic
from profiles.errors import PlanError

Key = tuple[str, int, int]  # operation signature, input channels, output channels
_MEASURED, _PRIOR = 0.01, 0.5  # assumed relative standard deviations of a probe and of the prior


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Entry(_Part):
    """What one operation adds to a network's latency."""

    operation: str
    inputs: Annotated[int, Field(gt=0)]
    outputs: Annotated[int, Field(gt=0)]
    latency_s: Annotated[float, Field(ge=0)]
    probes: Annotated[int, Field(ge=0)]  # measured networks that contain it; 0: only the prior speaks


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

    def cost(self, operation: Operation, inputs: int, outputs: int) -> float:
        """Return the seconds that an operation adds; raises PlanError if the table lacks it."""
        try:
            return self._cost[operation.signature, inputs, outputs]
        except KeyError:
            raise PlanError(
                f"the latency table has no entry for {operation.signature} {inputs}->{outputs} ({operation.name}); "
                "run `espalier calibrate` for this model and these widths"
            ) from None

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


class Rules:
    """Costs from a profile's documented rules alone, in rounded multiply-accumulates: only ratios have meaning."""

    overhead_s = 0.0

    def __init__(self, profile: Profile) -> None:
        """Take the granularity of `profile`."""
        self._profile = profile

    def cost(self, operation: Operation, inputs: int, outputs: int) -> float:
        """Return the multiply-accumulates of an operation whose widths are rounded as the device does."""
        wide = self._rounded(operation, "out_channels", outputs)
        deep = 1 if operation.grouped else self._rounded(operation, "in_channels", inputs)
        return operation.macs_per_pair * wide * deep

    def _rounded(self, operation: Operation, axis: str, n: int) -> float:
        rules = [rule for rule in self._profile.rules(operation.kind, axis) if rule.mode in ("pad", "tile")]
        return max([rule.effective(n)[1] for rule in rules], default=float(n))

    def latency(self, graph: Graph, choice: Choice) -> float:
        """Return the rounded multiply-accumulates of one run under `choice`."""
        return sum(self.cost(o, *o.widths(choice)) for o in graph.operations if o.present(choice))


Costs = LatencyTable | Rules


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
    names = list(dict.fromkeys([*wanted, *(key for count in counts for key in count)]))
    matrix = np.array([[1, *(count[key] for key in names)] for count in counts], float)
    times = np.array([probe.latency_s for probe in probes])
    prior = _prior(graph, profile, names, matrix, times)
    data = matrix / (_MEASURED * times)[:, None]
    ridge = np.diag(1 / (_PRIOR * prior))
    goal = np.concatenate([np.full(len(times), 1 / _MEASURED), np.full(len(prior), 1 / _PRIOR)])
    # Solved for c / prior: the columns are then of one size.
    solution = nnls(np.vstack([data, ridge]) * prior, goal)[0] * prior
    seen = (matrix > 0).sum(0)
    rows = zip(names, solution[1:].tolist(), seen[1:].tolist(), strict=True)
    return float(solution[0]), tuple(
        Entry(operation=key[0], inputs=key[1], outputs=key[2], latency_s=cost, probes=count)
        for key, cost, count in rows
    )


def _present(graph: Graph, choice: Choice) -> list[Key]:
    return [(o.signature, *o.widths(choice)) for o in graph.operations if o.present(choice)]


def _prior(graph: Graph, profile: Profile, names: Sequence[Key], matrix: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Return the prior of the overhead and of each entry: the rounded work at the rate of the median probe."""
    rules = Rules(profile)
    operation = {o.signature: o for o in graph.operations}
    work = np.array([rules.cost(operation[key[0]], key[1], key[2]) for key in names])
    work = np.maximum(work, 0.02 * work.max())  # tiny operations cost their launch
    rate = float(np.median(times / (matrix[:, 1:] @ work)))
    return np.concatenate([[0.02 * float(times.max())], work * rate])
