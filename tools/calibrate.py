"""Calibration: measure, in the profile's runtime, networks that a model can become, and fit the latency table to them.

Every probe is the model itself with some widths narrowed and some blocks gone, so an entry is what an operation adds
inside a network, with the fusions and layout changes that it meets there. Probes are timed in turns, a few at a time,
each time with the dense network, whose drift is divided out.
"""

import hashlib
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from platformdirs import user_cache_path
from torch import Tensor, nn

from backends import Candidate, compare, load, ratio
from backends.contract import Runtime
from backends.rebuild import cut
from planner.graph import Graph, trace
from planner.latency import LatencyTable, Probe, fit, keys
from planner.operations import Choice
from planner.search import candidates
from planner.widths import Width
from profiles import Machine, Profile, atomic

Options = Mapping[str, Sequence[int]]
Progress = Callable[[str, int, int], None]
_TOGETHER = 12  # probes timed in turns with the dense network
_HELD_OUT = 6
_LONGER = 4


@dataclass(frozen=True)
class Bench:
    """A model on a runtime, ready to measure what it can become."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    graph: Graph
    profile: Profile
    runtime: Runtime
    threads: int
    seconds: float  # per probe

    def describe(self) -> dict[str, str]:
        """Return what a table must agree on to be reused."""
        machine = Machine.here()
        return {
            "profile": self.profile.id,
            "runtime": f"{self.runtime.NAME} {self.runtime.version()}",
            "device": machine.cpu,
            "threads": str(self.threads),
            "fingerprint": self.graph.fingerprint,
        }


def bench(
    model: nn.Module, inputs: tuple[Tensor, ...], profile: Profile, *, threads: int = 1, seconds: float = 0.25
) -> Bench:
    """Return a bench for `model` on the runtime of `profile`; raises BackendUnavailable if that is not installed."""
    runtime = load(profile.runtime.name)
    runtime.version()
    return Bench(model, inputs, trace(model, inputs), profile, runtime, threads, seconds)


def calibrate(bench: Bench, *, progress: Progress, fresh: bool = False) -> LatencyTable:
    """Return the latency table of a bench: the one measured before on this machine, or a new one.

    Probes are kept as they are measured, so that an interrupted calibration goes on where it was.
    """
    options = candidates(bench.graph, bench.profile)
    wanted = design(bench.graph, options)
    path = cache_path(bench, wanted)
    if path.exists() and not fresh:
        return LatencyTable.load(path)
    part = path.with_suffix(".part.json")
    if fresh:
        part.unlink(missing_ok=True)
    probes = _stored(part)
    for start in range(len(probes), len(wanted), _TOGETHER):
        probes += measure_choices(
            bench, wanted[start : start + _TOGETHER], progress=progress, offset=(start, len(wanted))
        )
        atomic.write_text(part, json.dumps([probe.model_dump(mode="json") for probe in probes]))
    table = fitted(bench, probes, options)
    table.save(path)
    part.unlink(missing_ok=True)
    return table


def cache_path(bench: Bench, wanted: Sequence[tuple[Choice, bool]]) -> Path:
    """Return where the table of this bench is kept."""
    about = [bench.describe(), [(dict(c.keep), sorted(c.removed), held) for c, held in wanted]]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:20]
    return user_cache_path("espalier") / "tables" / f"{bench.profile.id}-{digest}.json"


def _stored(part: Path) -> list[Probe]:
    try:
        return [Probe.model_validate(probe) for probe in json.loads(part.read_text())]
    except (OSError, ValueError):
        return []


def design(graph: Graph, options: Options, *, seed: int = 0) -> list[tuple[Choice, bool]]:
    """Return the networks to measure, with whether each is held out to judge the fit.

    The dense one; for each kind of width, all its members at each candidate; for each kind of block, all of them gone;
    and uneven random ones with blocks removed, as plans are.
    """
    wanted = [(graph.dense, False)]
    for names in _kinds(graph, [graph.width[name] for name in options]):
        for count in options[names[0]]:
            if count < graph.width[names[0]].size:
                wanted.append((graph.choice(dict.fromkeys(names, count)), False))
    for blocks in _block_kinds(graph):
        wanted.append((graph.choice({}, frozenset(blocks)), False))
    random = np.random.default_rng(seed)
    for index in range(max(8, len(wanted) // 3) + _HELD_OUT):
        keep = {name: int(random.choice(counts)) for name, counts in options.items()}
        gone = frozenset(b.name for b in graph.blocks if not b.frozen and random.random() < 0.35)
        wanted.append((graph.choice(keep, gone), index < _HELD_OUT))
    return wanted


def _kinds(graph: Graph, widths: Sequence[Width]) -> list[list[str]]:
    """Group widths that the same operations make and read."""
    kinds: dict[object, list[str]] = defaultdict(list)
    for width in widths:
        uses = [
            (o.signature, o.widths(graph.dense), role)
            for o in graph.operations
            for role, extent in (("in", o.inputs), ("out", o.outputs))
            if any(name == width.name for name, _ in extent.parts)
        ]
        kinds[width.size, *sorted(uses)].append(width.name)
    return list(kinds.values())


def _block_kinds(graph: Graph) -> list[list[str]]:
    kinds: dict[object, list[str]] = defaultdict(list)
    for block in graph.blocks:
        if not block.frozen:
            inside = sorted((o.signature, o.widths(graph.dense)) for o in graph.operations if block.name in o.blocks)
            kinds[block.repeats_relu, *inside].append(block.name)
    return list(kinds.values())


def measure_choices(
    bench: Bench, wanted: Sequence[tuple[Choice, bool]], *, progress: Progress, offset: tuple[int, int] = (0, 0)
) -> list[Probe]:
    """Build and time networks, in turns with the dense one; latencies are scaled to the dense one of the first call."""
    done, total = offset if offset[1] else (0, len(wanted))
    with tempfile.TemporaryDirectory(prefix="espalier-") as folder:
        timed = [_candidate(bench, bench.graph.dense, Path(folder), "dense")]
        for index, (choice, _) in enumerate(wanted):
            timed.append(_candidate(bench, choice, Path(folder), str(index)))
            progress("building", done + index + 1, total)
        rows = compare(timed, seconds=bench.seconds, seed=done, progress=lambda n, m: progress("timing", n, m))
    return [
        Probe(
            keep=dict(choice.keep),
            removed=tuple(sorted(choice.removed)),
            latency_s=row.latency_s.p50,
            relative=ratio(row, rows[0]).value,
            ci95_s=row.latency_s.ci95,
            runs=row.runs,
            held_out=held_out,
        )
        for (choice, held_out), row in zip(wanted, rows[1:], strict=True)
    ]


def _candidate(bench: Bench, choice: Choice, folder: Path, label: str) -> Candidate:
    present = {w.name: torch.arange(choice.keep[w.name]) for w in bench.graph.cuttable if choice.keep[w.name] < w.size}
    kept = {name: channels for name, channels in present.items() if bench.graph.width[name].block not in choice.removed}
    small = cut(bench.model, bench.graph, kept, choice.removed)
    artifact = bench.runtime.build(small, bench.inputs, bench.profile, folder / f"{label}.onnx", threads=bench.threads)
    return Candidate.of(bench.runtime, artifact, bench.inputs, label=label, model=small)


def fitted(bench: Bench, probes: Sequence[Probe], options: Options) -> LatencyTable:
    """Fit a table to probes: judged on those held out, then fitted to all."""
    wanted = keys(bench.graph, options)
    about = bench.describe()
    anchor = float(np.median([probe.latency_s / probe.relative for probe in probes]))
    scaled = [probe.model_copy(update={"latency_s": probe.relative * anchor}) for probe in probes]

    def table(rows: Sequence[Probe], errors: Sequence[float]) -> LatencyTable:
        overhead_s, entries = fit(bench.graph, bench.profile, wanted, rows)
        return LatencyTable(
            profile=bench.profile.id,
            runtime=bench.runtime.NAME,
            runtime_version=bench.runtime.version(),
            device=about["device"],
            threads=bench.threads,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            fingerprint=bench.graph.fingerprint,
            overhead_s=overhead_s,
            entries=entries,
            probes=tuple(probes),
            mean_error=mean(map(abs, errors)) if errors else 0.0,
            max_error=max(map(abs, errors), default=0.0),
            held_out_errors=tuple(errors),
        )

    first = table([probe for probe in scaled if not probe.held_out], [])
    judged = [probe for probe in scaled if probe.held_out]
    errors = [first.latency(bench.graph, p.choice) / p.latency_s - 1 for p in judged]
    return table(scaled, errors)


def refined(bench: Bench, table: LatencyTable, choice: Choice, *, progress: Progress) -> tuple[LatencyTable, float]:
    """Measure the network of a plan and fit the table to it too; return the table and the error it had there."""
    full = bench.graph.choice(choice.keep, choice.removed)
    longer = replace(bench, seconds=_LONGER * bench.seconds)  # one network decides more here than one of many
    (probe,) = measure_choices(longer, [(full, False)], progress=progress)
    dense_s = table.latency(bench.graph, bench.graph.dense)
    error = table.latency(bench.graph, full) / (probe.relative * dense_s) - 1
    return fitted(bench, [*table.probes, probe], candidates(bench.graph, bench.profile)), error
