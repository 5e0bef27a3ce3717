"""Calibration: measure, in the profile's runtime, networks that a model can become, and fit the latency table to them.

Every probe is the model itself with some widths narrowed and some blocks gone, so an entry is what an operation adds
inside a network, with the fusions and layout changes that it meets there. Probes are timed in turns, a few at a time,
each time with the dense network, whose drift is divided out.
"""

import hashlib
import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Self

import numpy as np
from platformdirs import user_cache_path
from torch import Tensor, nn

from backends import Artifact, Candidate, Measurement, compare, load
from backends.contract import Family, Narrows, Runtime
from backends.heap import kept
from planner.candidates import candidates
from planner.graph import Graph, trace
from planner.latency import ESTIMATE, LatencyTable, Probe, cross_validated, fit, keys
from planner.operations import Choice
from profiles import Machine, Profile, atomic
from profiles.errors import BackendUnavailable, BuildError, PlanError
from tools.design import Options, design, off_the_grid
from tools.networks import network, present, random_samples
from tools.place import Place, belongs

Progress = Callable[[str, int, int], None]
_TOGETHER = 12  # probes timed in turns with the dense network
_INSTANCES = 2  # of a network, as two openings of one file differ in speed, up to 5 % in OpenVINO
_DENSE = 2  # times as many of the dense network, as all others are relative to it
_UNREST, _TIMED_S = 0.03, 15.0  # timed again while 95 % intervals are wider than this share, for no longer
LIMIT_S = 160.0  # unless asked otherwise, no networks are begun that would take longer in all
_ENOUGH, _AT_MOST, _LEAST = 0.01, 0.03, 48  # mean error of networks left out of the fit, that of 95 %, how many
_LONGER = 4
log = logging.getLogger(__name__)


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

    @cached_property
    def family(self) -> Family | None:
        """What makes the files of what the model can become, where that is faster than to build each."""
        if not isinstance(self.runtime, Narrows):
            return None
        samples = random_samples(self.inputs, self.profile)
        try:
            return self.runtime.family(
                self.model, self.inputs, self.profile, self.graph, threads=self.threads, samples=samples
            )
        except BuildError as error:
            log.info("each network is built, which takes longer than to narrow one: %s", error)
            return None

    def place(self) -> Place:
        """Return where and under which conditions this bench measures."""
        return Place.here(self.profile, self.runtime.version(), threads=self.threads, batch=self.batch)

    def describe(self) -> dict[str, str]:
        """Return what a table must agree on to be reused."""
        place = self.place()
        memory = {"freed memory": "kept"} if self.runtime.NAME == "pytorch" and kept() else {}  # others plan theirs
        return {
            **memory,
            "schema": str(LatencyTable.model_fields["schema_version"].default),
            "profile": self.profile.id,
            "rules": hashlib.sha256(self.profile.model_dump_json().encode()).hexdigest(),
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


def calibrate(bench: Bench, *, progress: Progress, fresh: bool = False, limit_s: float | None = None) -> LatencyTable:
    """Return the latency table of a bench: the one measured before on this machine, or a new one.

    Probes are kept as they are measured, so that an interrupted calibration goes on where it was, and one that is given
    more time than usual goes on from its table. Of an NPU that is not here, the table holds its compiler's estimates.
    """
    if by_compiler(bench.profile):
        from tools import estimates  # its imports need the compiler

        return estimates.tabled(bench, progress=progress, fresh=fresh)
    options = candidates(bench.graph, bench.profile)
    wanted = design(bench.graph, options)
    path = cache_path(bench, wanted)
    known = LatencyTable.load(path) if path.exists() and not fresh else None
    limit_s = limit_s or LIMIT_S
    if known and limit_s <= LIMIT_S:
        return known
    place, part = bench.place(), path.with_suffix(".part.json")
    if fresh:
        part.unlink(missing_ok=True)
    before = _stored(part) or list(known.probes if known else ())
    probes = _measured(bench, wanted, before, part=part, progress=progress, limit_s=limit_s)
    table = known if known and len(probes) == len(known.probes) else fitted(bench, probes, options, place=place)
    table.save(path)
    part.unlink(missing_ok=True)
    return table


def _measured(
    bench: Bench, wanted: Sequence[Choice], before: list[Probe], *, part: Path, progress: Progress, limit_s: float
) -> list[Probe]:
    """Measure what is wanted after what was measured before, until it is enough or time is up; keep it in `part`."""
    clock, started, taken_s = Countdown(progress, len(before), len(wanted), limit_s=limit_s), time.monotonic(), 0.0
    probes = list(before)
    for start in range(len(probes), len(wanted), _TOGETHER):
        if time.monotonic() - started + taken_s > limit_s or _enough(bench, probes):
            break
        begun, some = time.monotonic(), wanted[start : start + _TOGETHER]
        probes += measure_choices(bench, some, progress=clock.step, offset=(start, len(wanted)))
        taken_s = time.monotonic() - begun
        clock.finished(len(probes))
        atomic.write_text(part, json.dumps([probe.model_dump(mode="json") for probe in probes]))
    return probes


def _enough(bench: Bench, probes: Sequence[Probe]) -> bool:
    if len(probes) < _LEAST:
        return False
    errors = np.abs(cross_validated(bench.graph, bench.profile, probes))
    return float(errors.mean()) <= _ENOUGH and float(np.quantile(errors, 0.95)) <= _AT_MOST


class Countdown:
    """Progress with the time left, estimated from the networks that are done."""

    def __init__(
        self,
        progress: Progress,
        done: int,
        total: int,
        *,
        limit_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Show on `progress`; `done` of `total` networks were measured earlier, and all ends after `limit_s`."""
        self._last = clock() + limit_s
        self._progress, self._clock, self._total = progress, clock, total
        self._start, self._before, self._end = clock(), done, None if done < total else clock()

    def finished(self, done: int) -> None:
        """Take note that `done` networks are measured."""
        now = self._clock()
        each_s = (now - self._start) / max(1, done - self._before)
        self._end = min(now + each_s * (self._total - done), self._last)

    def step(self, what: str, done: int, total: int) -> None:
        """Move the bar, and say how long it will take once that is known."""
        left = "" if self._end is None else f", {_spoken(max(0.0, self._end - self._clock()))} left"
        self._progress(f"{what}{left}", done, total)


def _spoken(left_s: float) -> str:
    minutes, seconds = divmod(round(left_s), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def cache_path(bench: Bench, wanted: Sequence[Choice]) -> Path:
    """Return where the table of this bench is kept."""
    about = [bench.describe(), [(dict(c.keep), sorted(c.removed)) for c in wanted]]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:20]
    return user_cache_path("espalier") / "tables" / f"{bench.profile.id}-{digest}.json"


def _stored(part: Path) -> list[Probe]:
    try:
        return [Probe.model_validate(probe) for probe in json.loads(part.read_text())]
    except (OSError, ValueError):
        return []


def measure_choices(
    bench: Bench, wanted: Sequence[Choice], *, progress: Progress, offset: tuple[int, int] = (0, 0)
) -> list[Probe]:
    """Build and time networks, in turns with the dense one; longer while something else disturbs the machine.

    Of an NPU that is not here, they are its compiler's estimates.
    """
    if by_compiler(bench.profile):
        from tools import estimates  # its imports need the compiler

        return estimates.estimated_choices(bench, wanted, progress=progress)
    done, total = offset if offset[1] else (0, len(wanted))
    with tempfile.TemporaryDirectory(prefix="espalier-") as folder:
        timed = _opened(bench, bench.graph.dense, Path(folder) / "dense", times=_DENSE)
        for index, choice in enumerate(wanted):
            timed += _opened(bench, choice, Path(folder) / str(index))
            progress("building", done + index + 1, total)
        shown = lambda n, m: progress("timing", done + len(wanted) * n // m, total)  # noqa: E731
        rows: list[list[Measurement]] = []
        started = time.monotonic()
        while not rows or (time.monotonic() - started < _TIMED_S and not _calm(rows)):
            rows.append(compare(timed, seconds=bench.seconds, seed=done + len(rows), progress=shown))
    found = [_Timed.of(each) for each in zip(*rows, strict=True)]
    dense_s = mean(own.latency_s for own in found[:_DENSE])
    return [own.probe(choice, dense_s) for choice, own in zip(wanted, found[_DENSE:], strict=True)]


def _calm(rows: Sequence[Sequence[Measurement]]) -> bool:
    found = [_Timed.of(each) for each in zip(*rows, strict=True)]
    return mean((own.ci95_s[1] - own.ci95_s[0]) / own.latency_s for own in found) < _UNREST


@dataclass(frozen=True)
class _Timed:
    """What was found of one network: the mean over its instances of their lower quartiles, as disturbances only add."""

    latency_s: float
    ci95_s: tuple[float, float]  # from the rounds of these instances
    runs: int

    @classmethod
    def of(cls, rows: Sequence[Measurement]) -> Self:
        """Take the rounds of all measurements of a network, which its instances took in turns."""
        several = max(1, len(rows[0].instance_medians_s))
        rounds = np.array([[s for row in rows for s in row.round_medians_s[own::several]] for own in range(several)])
        drawn = np.random.default_rng(0).integers(rounds.shape[1], size=(200, rounds.shape[1]))
        low, high = np.quantile(np.quantile(rounds[:, drawn], 0.25, axis=2).mean(0), (0.025, 0.975))
        of_each = np.quantile(rounds, 0.25, axis=1)
        return cls(float(of_each.mean()), (float(low), float(high)), sum(row.runs for row in rows))

    def probe(self, choice: Choice, dense_s: float) -> Probe:
        """Return what is kept of it."""
        return Probe(
            keep=dict(choice.keep),
            removed=tuple(sorted(choice.removed)),
            latency_s=self.latency_s,
            relative=self.latency_s / dense_s,
            ci95_s=self.ci95_s,
            runs=self.runs,
        )


def _opened(bench: Bench, choice: Choice, stem: Path, *, times: int = 1) -> list[Candidate]:
    small, path = network(bench.model, bench.graph, choice), stem.with_suffix(bench.runtime.SUFFIX)
    with off_the_grid():
        artifact = _built(bench, choice, small, path)
    several = min(_INSTANCES, bench.runtime.INSTANCES)
    return [
        Candidate.of(bench.runtime, artifact, bench.inputs, label=f"{stem.name}, {n}", model=small, instances=several)
        for n in range(times)
    ]


def _built(bench: Bench, choice: Choice, small: nn.Module, path: Path) -> Artifact:
    """Return the file of a network: narrowed from the dense one's where that is known how, and built otherwise."""
    trimmed = choice.keep.keys() - bench.graph.width.keys()
    if not trimmed and (family := bench.family):
        try:
            return family.build(small, path, kept=present(bench.graph, choice), removed=choice.removed)
        except BuildError as error:
            log.info("%s is built, not narrowed: %s", path.stem, error)
    samples = random_samples(bench.inputs, bench.profile)
    return bench.runtime.build(small, bench.inputs, bench.profile, path, threads=bench.threads, samples=samples)


def fitted(bench: Bench, probes: Sequence[Probe], options: Options, *, place: Place | None = None) -> LatencyTable:
    """Fit a table to probes that were measured on a bench, at `place` if not here and now."""
    return fitted_at(place or bench.place(), probes, options, graph=bench.graph, profile=bench.profile)


def fitted_at(
    place: Place, probes: Sequence[Probe], options: Options, *, graph: Graph, profile: Profile
) -> LatencyTable:
    """Fit a table to probes: judged by cross-validation, then fitted to all."""
    return LatencyTable(
        profile=profile.id,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        fingerprint=graph.fingerprint,
        probes=tuple(probes),
        errors=cross_validated(graph, profile, probes),
        **fit(graph, profile, keys(graph, options, strides=profile.moves_strides), probes).model_dump(),
        **place.model_dump(),
    )


def refined(bench: Bench, table: LatencyTable, choice: Choice, *, progress: Progress) -> tuple[LatencyTable, float]:
    """Measure the network of a plan and fit the table to it too; return the table and the error it had there.

    Where that error is beyond the table's own 95 % interval, the middle one of three measurements decides.
    """
    if by_compiler(bench.profile):
        from tools import estimates  # its imports need the compiler

        return estimates.refined(bench, table, choice)
    full = bench.graph.choice(choice.keep, choice.removed)
    longer = replace(bench, seconds=_LONGER * bench.seconds)  # one network decides more here than one of many
    predicted = table.latency(bench.graph, full) / table.latency(bench.graph, bench.graph.dense)
    probes = measure_choices(longer, [full], progress=progress)
    if abs(predicted / probes[0].relative - 1) > table.uncertainty:
        probes += [probe for _ in range(2) for probe in measure_choices(longer, [full], progress=progress)]
    probe = sorted(probes, key=lambda each: each.relative)[len(probes) // 2]
    error = predicted / probe.relative - 1
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
