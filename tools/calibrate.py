"""Calibration: measure, in the profile's runtime, networks that a model can become, and fit the latency table to them.

Every probe is the model itself with some widths narrowed and some blocks gone, so an entry is what an operation adds
inside a network, with the fusions and layout changes that it meets there. Probes are timed in turns, a few at a time,
each time with the dense network, whose drift is divided out.
"""

import hashlib
import json
import tempfile
import time
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
from backends.samples import Samples
from planner.graph import Graph, trace
from planner.latency import ESTIMATE, Entry, LatencyTable, Probe, fit, keys
from planner.operations import Choice
from planner.search import candidates
from planner.widths import Width
from profiles import Machine, Profile, atomic
from profiles.errors import BackendUnavailable, PlanError
from tools.place import Place, belongs

Options = Mapping[str, Sequence[int]]
Progress = Callable[[str, int, int], None]
_TOGETHER = 12  # probes timed in turns with the dense network
_HELD_OUT = 6
_LONGER = 4
_NOISE, _PRIOR = 0.01, 0.3  # relative standard deviations of a probe and of the prior, as planner.latency assumes


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

    @property
    def batch(self) -> int:
        """How many examples one run takes."""
        return batch_of(self.inputs)

    def place(self) -> Place:
        """Return where and under which conditions this bench measures."""
        return Place.here(self.profile, self.runtime.version(), threads=self.threads, batch=self.batch)

    def describe(self) -> dict[str, str]:
        """Return what a table must agree on to be reused."""
        place = self.place()
        return {
            "profile": self.profile.id,
            "runtime": f"{place.runtime} {place.runtime_version}",
            "driver": str(place.driver_version),
            "device": f"{place.device}, {place.device_model}",
            "threads": str(self.threads),
            "fingerprint": self.graph.fingerprint,
        }

    def refuses(self, table: LatencyTable) -> list[str]:
        """Return why a table does not belong to this bench, one sentence each; empty if it does."""
        return belongs(
            table,
            Machine.here(),
            runtime_version=self.runtime.version(),
            threads=self.threads,
            batch=self.batch,
            device_model=self.place().device_model,
        )


def batch_of(inputs: Sequence[Tensor]) -> int:
    """Return how many examples the inputs hold: the length of the first axis of the first one."""
    return int(inputs[0].shape[0]) if inputs and inputs[0].dim() else 1


def bench(
    model: nn.Module, inputs: tuple[Tensor, ...], profile: Profile, *, threads: int = 1, seconds: float = 0.25
) -> Bench:
    """Return a bench for `model` on the runtime of `profile`; raises BackendUnavailable if that is not installed."""
    runtime = load(profile.runtime.name)
    runtime.version()
    return Bench(model, inputs, trace(model, inputs), profile, runtime, threads, seconds)


def calibrate(bench: Bench, *, progress: Progress, fresh: bool = False) -> LatencyTable:
    """Return the latency table of a bench: the one measured before on this machine, or a new one.

    Probes are kept as they are measured, so that an interrupted calibration goes on where it was. Of an NPU that is not
    here, the table holds its compiler's estimates.
    """
    if by_compiler(bench.profile):
        from tools import estimates  # its imports need the compiler

        return estimates.tabled(bench, progress=progress, fresh=fresh)
    options = candidates(bench.graph, bench.profile)
    wanted = design(bench.graph, options)
    path = cache_path(bench, wanted)
    if path.exists() and not fresh:
        return LatencyTable.load(path)
    place = bench.place()
    part = path.with_suffix(".part.json")
    if fresh:
        part.unlink(missing_ok=True)
    probes = _stored(part)
    clock = Countdown(progress, len(probes), len(wanted))
    for start in range(len(probes), len(wanted), _TOGETHER):
        some = wanted[start : start + _TOGETHER]
        probes += measure_choices(bench, some, progress=clock.step, offset=(start, len(wanted)))
        clock.finished(len(probes))
        atomic.write_text(part, json.dumps([probe.model_dump(mode="json") for probe in probes]))
    table = fitted(bench, probes, options, place=place)
    table.save(path)
    part.unlink(missing_ok=True)
    return table


class Countdown:
    """Progress with the time left, estimated from the networks that are done."""

    def __init__(
        self, progress: Progress, done: int, total: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Show on `progress`; `done` of `total` networks were measured earlier."""
        self._progress, self._clock, self._total = progress, clock, total
        self._start, self._before, self._end = clock(), done, None if done < total else clock()

    def finished(self, done: int) -> None:
        """Take note that `done` networks are measured."""
        now = self._clock()
        each_s = (now - self._start) / max(1, done - self._before)
        self._end = now + each_s * (self._total - done)

    def step(self, what: str, done: int, total: int) -> None:
        """Move the bar, and say how long it will take once that is known."""
        left = "" if self._end is None else f", {_spoken(max(0.0, self._end - self._clock()))} left"
        self._progress(f"{what}{left}", done, total)


def _spoken(left_s: float) -> str:
    minutes, seconds = divmod(round(left_s), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


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
    """Build and time networks, in turns with the dense one; latencies are scaled to the dense one of the first call.

    Of an NPU that is not here, they are its compiler's estimates.
    """
    if by_compiler(bench.profile):
        from tools import estimates  # its imports need the compiler

        return estimates.estimated_choices(bench, wanted, progress=progress)
    done, total = offset if offset[1] else (0, len(wanted))
    with tempfile.TemporaryDirectory(prefix="espalier-") as folder:
        timed = [_candidate(bench, bench.graph.dense, Path(folder), "dense")]
        for index, (choice, _) in enumerate(wanted):
            timed.append(_candidate(bench, choice, Path(folder), str(index)))
            progress("building", done + index + 1, total)
        shown = lambda n, m: progress("timing", done + len(wanted) * n // m, total)  # noqa: E731
        rows = compare(timed, seconds=bench.seconds, seed=done, progress=shown)
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
    small, path = network(bench.model, bench.graph, choice), folder / f"{label}{bench.runtime.SUFFIX}"
    samples = random_samples(bench.inputs, bench.profile)
    artifact = bench.runtime.build(small, bench.inputs, bench.profile, path, threads=bench.threads, samples=samples)
    return Candidate.of(bench.runtime, artifact, bench.inputs, label=label, model=small)


def network(model: nn.Module, graph: Graph, choice: Choice) -> nn.Module:
    """Return what `model` becomes under a choice that names every width; which channels stay does not matter here."""
    present = {w.name: torch.arange(choice.keep[w.name]) for w in graph.cuttable if choice.keep[w.name] < w.size}
    kept = {name: channels for name, channels in present.items() if graph.width[name].block not in choice.removed}
    return cut(model, graph, kept, choice.removed)


def random_samples(inputs: tuple[Tensor, ...], profile: Profile) -> Samples:
    """Return inputs to quantise with where the profile wants integers: latency does not depend on their values."""
    if not profile.dtype.weights.startswith("int"):
        return Samples()
    generator = torch.Generator().manual_seed(0)
    return Samples(
        calibration=tuple(
            tuple(
                torch.randn(x.shape, generator=generator, dtype=x.dtype) if x.is_floating_point() else x for x in inputs
            )
            for _ in range(4)
        )
    )


def fitted(bench: Bench, probes: Sequence[Probe], options: Options, *, place: Place | None = None) -> LatencyTable:
    """Fit a table to probes that were measured on a bench, at `place` if not here and now."""
    return fitted_at(place or bench.place(), probes, options, graph=bench.graph, profile=bench.profile)


def fitted_at(
    place: Place, probes: Sequence[Probe], options: Options, *, graph: Graph, profile: Profile
) -> LatencyTable:
    """Fit a table to probes: judged on those held out, then fitted to all."""
    wanted = keys(graph, options)
    anchor = float(np.median([probe.latency_s / probe.relative for probe in probes]))
    scaled = [probe.model_copy(update={"latency_s": probe.relative * anchor}) for probe in probes]

    def table(rows: Sequence[Probe], errors: Sequence[float]) -> LatencyTable:
        overhead_s, entries = fit(graph, profile, wanted, rows)
        return LatencyTable(
            profile=profile.id,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            fingerprint=graph.fingerprint,
            overhead_s=overhead_s,
            entries=_rested(graph, entries, rows),
            probes=tuple(probes),
            mean_error=mean(map(abs, errors)) if errors else 0.0,
            max_error=max(map(abs, errors), default=0.0),
            held_out_errors=tuple(errors),
            **place.model_dump(),
        )

    first = table([probe for probe in scaled if not probe.held_out], [])
    judged = [probe for probe in scaled if probe.held_out]
    errors = [first.latency(graph, p.choice) / p.latency_s - 1 for p in judged]
    return table(scaled, errors)


def _rested(graph: Graph, entries: Sequence[Entry], probes: Sequence[Probe]) -> tuple[Entry, ...]:
    """Return the entries with what each rests on: the timed runs, and its standard error in the fit.

    The error is that of the linear model at its solution: the inverse of N' N + P, with N the count of each entry in
    each probe over that probe's noise, and P the inverse variance of the prior.
    """
    place = {(e.operation, e.inputs, e.outputs): index for index, e in enumerate(entries)}
    counts = np.zeros((len(probes), len(entries)))
    for row, probe in zip(counts, probes, strict=True):
        for operation in graph.operations:
            if operation.present(probe.choice):
                row[place[operation.signature, *operation.widths(probe.choice)]] += 1
    scaled = counts / (_NOISE * np.array([probe.latency_s for probe in probes]))[:, None]
    costs = np.array([max(entry.latency_s, 1e-9) for entry in entries])
    # Solved for cost / latency, whose scale is 1.
    precision = (scaled * costs).T @ (scaled * costs) + np.eye(len(entries)) / _PRIOR**2
    spread_s = (np.sqrt(np.diag(np.linalg.inv(precision))) * costs).tolist()
    runs = ((counts > 0).T @ np.array([probe.runs for probe in probes])).tolist()
    return tuple(
        entry.model_copy(update={"runs": int(n), "spread_s": float(s)})
        for entry, n, s in zip(entries, runs, spread_s, strict=True)
    )


def refined(bench: Bench, table: LatencyTable, choice: Choice, *, progress: Progress) -> tuple[LatencyTable, float]:
    """Measure the network of a plan and fit the table to it too; return the table and the error it had there."""
    if by_compiler(bench.profile):
        from tools import estimates  # its imports need the compiler

        return estimates.refined(bench, table, choice)
    full = bench.graph.choice(choice.keep, choice.removed)
    longer = replace(bench, seconds=_LONGER * bench.seconds)  # one network decides more here than one of many
    (probe,) = measure_choices(longer, [(full, False)], progress=progress)
    dense_s = table.latency(bench.graph, bench.graph.dense)
    error = table.latency(bench.graph, full) / (probe.relative * dense_s) - 1
    place = Place.model_validate({name: getattr(table, name) for name in Place.model_fields})
    return fitted(bench, [*table.probes, probe], candidates(bench.graph, bench.profile), place=place), error


def elsewhere(
    table: LatencyTable, profile: Profile, inputs: tuple[Tensor, ...], *, any_table: bool = False
) -> list[str]:
    """Return why a table does not belong here; raises PlanError with the reasons unless `any_table`."""
    batch = batch_of(inputs)
    try:
        if by_compiler(profile) or table.method == ESTIMATE:
            from tools import estimates

            return _unless(any_table, estimates.foreign(table, profile, batch=batch))
        version = load(profile.runtime.name).version()
    except BackendUnavailable:
        reasons = [f"{profile.runtime.name} is not installed here"]
    else:
        model = Place.here(profile, version, threads=table.threads, batch=batch).device_model
        reasons = belongs(
            table,
            Machine.here(),
            runtime_version=version,
            threads=table.threads,
            batch=batch,
            device_model=model,
        )
    return _unless(any_table, reasons)


def _unless(any_table: bool, reasons: list[str]) -> list[str]:
    if reasons and not any_table:
        raise PlanError(f"{'; '.join(reasons)}; calibrate here, or add --any-table, which the plan then notes")
    return reasons


def by_compiler(profile: Profile) -> bool:
    """Whether a device is known by its compiler's estimates, as it is never here to be measured."""
    return profile.device.kind == "npu" and profile.runtime.name == "executorch"
