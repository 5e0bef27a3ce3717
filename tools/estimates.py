"""What the compiler of an NPU estimates of the networks that a model can become: estimates, never measurements.

The model is lowered once, which takes a minute; each network is then made from that program (backends.tosa) and
compiled in a fraction of a second. The compiler tells the cycles of every operation, and their sum is its estimate of
the whole network, so nothing has to be fitted.
"""

import hashlib
import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import mean

import numpy as np
from platformdirs import user_cache_path
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from backends.build import Job
from backends.ethos_u import Compiled, compiler, dialect, estimated
from backends.executorch import NAME, Options, options_for, version
from backends.tosa import TosaProgram
from planner.candidates import candidates
from planner.graph import Graph
from planner.latency import ESTIMATE, Entry, Key, LatencyTable, Probe, rates_of
from planner.operations import Choice, Operation
from profiles import Profile, atomic
from profiles.errors import BuildError
from tools.calibrate import Bench, Countdown, Progress, cache_path
from tools.design import design as uneven
from tools.networks import random_samples
from tools.place import Place

_UNEVEN, _JUDGES = 40, 6


class Estimated(BaseModel):
    """What the compiler says of one network: its latency, and what each operation in it takes."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    latency_s: float = Field(gt=0)
    operations: tuple[tuple[str, int, int, float], ...]  # signature, input and output channels, seconds


@dataclass(frozen=True)
class Estimator:
    """A model's program for one NPU; calling it estimates what the model becomes under a choice of every width."""

    graph: Graph
    options: Options
    dense: TosaProgram

    @classmethod
    def of(cls, bench: Bench) -> "Estimator":
        """Lower a model, or read what an earlier run lowered; BuildError if its layers are not those of the graph."""
        options = options_for(bench.profile)
        path = _lowered(bench.model, bench.graph, dialect(*_target(options)))
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_bytes(path, _lower(bench, options))
        found = cls(bench.graph, options, TosaProgram.load(path))
        found._agree()
        return found

    @cached_property
    def layers(self) -> tuple[Operation, ...]:
        """The operations that multiply, in the order of the program's layers."""
        return tuple(operation for operation in self.graph.operations if operation.macs_per_pair)

    def _agree(self) -> None:
        lowered = [(layer.inputs, layer.outputs) for layer in self.dense.layers]
        if lowered != [operation.widths(self.graph.dense) for operation in self.layers]:
            raise BuildError(
                "the model's operations are not lowered one to one, so what the compiler says of them cannot be told "
                "apart; plan from the profile's rules, without a table"
            )

    def program(self, choice: Choice) -> TosaProgram:
        """Return the program of what the model becomes."""
        return self.dense.narrowed([o.widths(choice) if o.present(choice) else None for o in self.layers])

    def __call__(self, choice: Choice) -> Estimated:
        """Compile what the model becomes; the time of what is between layers counts with the layer before it."""
        program = self.program(choice)
        with tempfile.TemporaryDirectory(prefix="espalier-") as folder:
            path = Path(folder) / "network.tosa"
            program.save(path)
            found = estimated(path, *_target(self.options))
        present = [operation for operation in self.layers if operation.present(choice)]
        cycles, at = [0.0] * len(present), 0
        for row in found.operators:
            layer = program.layer_behind(row.name) if row.macs else None
            at = at if layer is None else layer
            cycles[at] += row.cycles
        taken = [(o.signature, *o.widths(choice), n / found.clock_hz) for o, n in zip(present, cycles, strict=True)]
        return Estimated(latency_s=found.latency_s, operations=tuple(taken))


def _target(options: Options) -> tuple[str, str | None, str | None]:
    return options.accelerator or "", options.system_config, options.memory_mode


def _lower(bench: Bench, options: Options) -> bytes:
    samples = random_samples(bench.inputs, bench.profile)
    job = Job(NAME, version(), bench.model, bench.inputs, bench.profile, 1, samples=samples, can=("int8",))
    programs = [*Compiled.of(job, *_target(options)).tosa.values()]
    if len(programs) != 1:
        raise BuildError(
            f"the {options.accelerator} takes {len(programs)} parts of the model and leaves the rest, so its compiler "
            "does not estimate the whole; plan from the profile's rules, without a table"
        )
    return programs[0]


def _lowered(model: nn.Module, graph: Graph, dialect: str) -> Path:
    """Return where the program of a model with these weights is kept, in the dialect of this NPU and others."""
    digest = hashlib.sha256(json.dumps([graph.fingerprint, version(), dialect]).encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return user_cache_path("espalier") / "tosa" / f"{digest.hexdigest()[:20]}.tosa"


def tabled(bench: Bench, *, progress: Progress, fresh: bool = False) -> LatencyTable:
    """Return the table of the compiler's estimates for what a model can become: a kept one, or a new one.

    What was estimated is kept at once, so that an interrupted calibration goes on where it was.
    """
    options = candidates(bench.graph, bench.profile)
    wanted = design(bench.graph, options)
    program = _lowered(bench.model, bench.graph, dialect(*_target(options_for(bench.profile))))
    path = cache_path(bench, [choice for choice, _ in wanted])
    path = path.with_stem(f"{path.stem}-{program.stem}")  # the compiler packs the weights
    if path.exists() and not fresh:
        return LatencyTable.load(path)
    part = path.with_suffix(".part.json")
    if fresh:
        part.unlink(missing_ok=True)
    found = _stored(part)
    progress("lowering", len(found), len(wanted))
    estimator = Estimator.of(bench)
    clock = Countdown(progress, len(found), len(wanted))
    for choice, _ in wanted[len(found) :]:
        found.append(estimator(choice))
        clock.finished(len(found))
        clock.step("compiling", len(found), len(wanted))
        atomic.write_text(part, json.dumps([each.model_dump(mode="json") for each in found]))
    table = _table(bench, wanted, found)
    table.save(path)
    part.unlink(missing_ok=True)
    return table


def estimated_choices(bench: Bench, wanted: Sequence[Choice], *, progress: Progress) -> list[Probe]:
    """Return the compiler's estimate of each network."""
    estimator, probes = Estimator.of(bench), []
    dense_s = estimator(bench.graph.dense).latency_s
    for choice in wanted:
        probe = _probe(choice, estimator(choice))
        probes.append(probe.model_copy(update={"relative": probe.latency_s / dense_s}))
        progress("compiling", len(probes), len(wanted))
    return probes


def refined(bench: Bench, table: LatencyTable, choice: Choice) -> tuple[LatencyTable, float]:
    """Compile the network of a plan, and take its operations into the table; return the table and its error before."""
    keep = {name: count for name, count in choice.keep.items() if name in bench.graph.width}  # no trims: none compiled
    full = bench.graph.choice(keep, choice.removed)
    found = Estimator.of(bench)(full)
    error = table.latency(bench.graph, full) / found.latency_s - 1
    taken = _gathered([found])
    kept = [e for e in table.entries if (e.operation, e.inputs, e.outputs) not in taken]
    entries = (*kept, *(_entry(key, seconds) for key, seconds in taken.items()))
    probes = (*table.probes, _probe(full, found))
    # Not model_copy, which takes along the costs that the old table has looked up.
    return LatencyTable.model_validate({**dict(table), "entries": entries, "probes": probes}), error


def _gathered(found: Sequence[Estimated]) -> dict[Key, list[float]]:
    """Return what each operation takes, wherever it is met."""
    taken: dict[Key, list[float]] = defaultdict(list)
    for signature, inputs, outputs, seconds in (row for each in found for row in each.operations):
        taken[signature, inputs, outputs].append(seconds)
    return taken


def design(graph: Graph, options: Mapping[str, Sequence[int]], *, seed: int = 0) -> list[tuple[Choice, bool]]:
    """Return the networks to compile, with whether each only judges the table.

    Every width takes each of its candidates, the width just past each, and those halfway to the next, in an order of
    its own, so that what is beside an operation differs; then come networks as uneven as plans. Those that judge have
    any widths, and blocks removed.
    """
    random = np.random.default_rng(seed)
    steps = {name: _sampled(counts) for name, counts in options.items()}
    rounds = max(map(len, steps.values()), default=0)
    orders = {name: random.permutation(np.resize(np.array(counts), rounds)) for name, counts in steps.items()}
    wanted = [(graph.dense, False)]
    wanted += [(graph.choice({n: int(o[k]) for n, o in orders.items()}, frozenset()), False) for k in range(rounds)]
    wanted += [(choice, False) for choice in uneven(graph, options, seed=seed)[1 : 1 + _UNEVEN]]
    for _ in range(_JUDGES):
        keep = {name: int(random.integers(1, counts[-1], endpoint=True)) for name, counts in options.items()}
        gone = frozenset(block.name for block in graph.blocks if not block.frozen and random.random() < 0.3)
        wanted.append((graph.choice(keep, gone), True))
    return wanted


def _sampled(counts: Sequence[int]) -> list[int]:
    halves = [(low + high) // 2 for low, high in pairwise((0, *counts))]
    return sorted({n for n in (*counts, *halves, *(n + 1 for n in counts[:-1])) if n > 0})


def _stored(part: Path) -> list[Estimated]:
    try:
        return [Estimated.model_validate(each) for each in json.loads(part.read_text())]
    except (OSError, ValueError):
        return []


def _table(bench: Bench, wanted: Sequence[tuple[Choice, bool]], found: Sequence[Estimated]) -> LatencyTable:
    """Return the table: the mean of what each operation takes in the networks that do not judge it."""
    taken = _gathered([each for (_, judges), each in zip(wanted, found, strict=True) if not judges])
    between = {o.signature: o for o in bench.graph.operations if not o.macs_per_pair}
    nothing = [(name, *o.widths(bench.graph.dense)) for name, o in between.items()]  # counted with the layer before it
    entries = [_entry(key, seconds) for key, seconds in taken.items()] + [_entry(key, [0.0]) for key in nothing]
    probes = tuple(_probe(choice, each) for (choice, _), each in zip(wanted, found, strict=True))
    table = LatencyTable(
        profile=bench.profile.id,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        fingerprint=bench.graph.fingerprint,
        overhead_s=0.0,
        entries=tuple(entries),
        probes=probes,
        rates=rates_of(bench.graph, bench.profile, {key: mean(seconds) for key, seconds in taken.items()}),
        **place(bench.profile, batch=bench.batch).model_dump(),
    )
    judged = [probe for (_, judges), probe in zip(wanted, probes, strict=True) if judges]
    errors = tuple(table.latency(bench.graph, p.choice) / p.latency_s - 1 for p in judged)
    return table.model_copy(update={"errors": errors})


def place(profile: Profile, *, batch: int) -> Place:
    """Return what a table of estimates belongs to: the NPU as it is configured, and the compiler; no machine."""
    options = options_for(profile)
    how = [text for text in (options.system_config, options.memory_mode) if text]
    return Place(
        device=", ".join([str(options.accelerator), *how]),
        device_model=None,
        runtime=NAME,
        runtime_version=f"{version()}, {compiler()}",
        driver_version=None,
        threads=1,
        batch=batch,
        governor=None,
        frequency_hz=None,
        method=ESTIMATE,
    )


def foreign(table: LatencyTable, profile: Profile, *, batch: int) -> list[str]:
    """Return why a table of estimates is not what would be estimated here, one sentence each; empty if it is."""
    here, reasons = place(profile, batch=batch), []
    if table.method != ESTIMATE:
        reasons.append(f"it was measured, and {profile.id} is known here by its compiler's estimates")
    if table.device != here.device:
        reasons.append(f"it was estimated for {table.device}, and this is {here.device}")
    if table.runtime_version != here.runtime_version:
        reasons.append(f"it was estimated by {table.runtime_version}, and {here.runtime_version} is here")
    if table.batch != batch:
        reasons.append(f"it was estimated at batch {table.batch}, and the inputs have batch {batch}")
    return reasons


def _entry(key: Key, seconds: Sequence[float]) -> Entry:
    spread_s = float(np.std(seconds))
    return Entry(
        operation=key[0],
        inputs=key[1],
        outputs=key[2],
        latency_s=mean(seconds),
        probes=len(seconds),
        spread_s=spread_s,
    )


def _probe(choice: Choice, found: Estimated) -> Probe:
    return Probe(
        keep=dict(choice.keep),
        removed=tuple(sorted(choice.removed)),
        latency_s=found.latency_s,
        relative=1.0,
        ci95_s=(found.latency_s, found.latency_s),
        runs=1,
    )
