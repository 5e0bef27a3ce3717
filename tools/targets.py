"""Several plans compiled for several targets, and one table of what each gained on each."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

from pydantic import TypeAdapter, ValidationError
from rich.table import Table
from torch import Tensor, nn

import planner
import profiles
from backends import Artifact, Candidate, Measurement, Samples, compare, load, load_rebuilt, ratio
from backends.artifact import specs_of
from backends.build import digest_of
from backends.environment import Environment
from backends.registry import known
from planner import Plan
from profiles import Machine, Profile, atomic
from profiles.errors import BackendUnavailable, BuildError, EspalierError, ProfileError
from tools.outcome import Count, Fraction, Interval, Plain
from tools.sources import example_inputs, load_data, load_model

DENSE = "dense"
Progress = Callable[[str, int, int], None]
_MEASUREMENTS = TypeAdapter(list[Measurement])


@dataclass(frozen=True)
class Target:
    """A device or a runtime to compile for."""

    name: str
    runtime: str
    profile: Profile | None

    @classmethod
    def of(cls, name: str) -> Self:
        """Return the target called `name`: a runtime in fp32, or a profile; raises EspalierError if it is neither."""
        if name in known():
            return cls(name, name, None)
        try:
            profile = profiles.load(name)
        except ProfileError as error:
            raise ProfileError(f"{error}\na target is a profile or one of the runtimes {', '.join(known())}") from error
        return cls(profile.id, profile.runtime.name, profile)

    @property
    def elsewhere(self) -> str:
        """Why what is timed on this machine says nothing of the target; empty if it is this machine."""
        return "; ".join(profiles.fit(self.profile, Machine.here()).unmet) if self.profile else ""


@dataclass(frozen=True)
class Variant:
    """One model of the table: the dense one, or one that a plan made smaller."""

    label: str
    model: nn.Module
    macs: int
    plan_sha256: str | None


class Row(Plain):
    """One model on one target; `measured` and `efficiency` come from the timer here, `estimated` from a compiler.

    `efficiency` is the measured speed-up over that of the multiply-accumulates; an estimate has none.
    """

    plan: str
    target: str
    runtime: str
    runtime_version: str
    dtype: str
    record: str
    macs: Count
    mac_speedup: float
    measured_s: Interval | None = None
    speedup: Interval | None = None
    efficiency: float | None = None
    estimated_s: float | None = None
    estimated_speedup: float | None = None
    estimated_by: str | None = None
    accuracy: Fraction | None = None
    remark: str = ""


class Gains(Plain):
    """The table; `absent` names the targets whose runtime is not here, `refused` the models that were not right."""

    schema_version: Literal[1] = 1
    rows: list[Row]
    absent: dict[str, str]
    refused: dict[str, str]


@dataclass(frozen=True)
class Work:
    """What is compiled, from what, and where to."""

    variants: Sequence[Variant]  # the dense one first
    inputs: tuple[Tensor, ...]
    samples: Samples
    folder: Path
    seconds: float
    fresh: bool
    absent: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def compiled(self, targets: Sequence[Target], progress: Progress) -> dict[tuple[str, str], Artifact]:
        """Compile every variant for every target; what cannot be is written down, and the others go on."""
        found: dict[tuple[str, str], Artifact] = {}
        total = len(targets) * len(self.variants)
        for number, target in enumerate(targets):
            for index, variant in enumerate(self.variants):
                progress(f"{variant.label} for {target.name}", number * len(self.variants) + index, total)
                try:
                    found[target.name, variant.label] = self._artifact(target, variant)
                except BackendUnavailable as error:
                    self.absent[target.name] = str(error)
                    break
                except BuildError as error:
                    self.refused[f"{variant.label} for {target.name}"] = str(error)
        return found

    def _artifact(self, target: Target, variant: Variant) -> Artifact:
        runtime = load(target.runtime)
        path = self.folder / f"{variant.label}.{target.name}{runtime.SUFFIX}"
        kept = None if self.fresh else self._kept(record_of(path), target, variant, runtime.version())
        if kept is not None:
            return kept
        built = runtime.build(variant.model, self.inputs, target.profile, path, samples=self.samples)
        built.save(record_of(path))
        return built

    def _kept(self, record: Path, target: Target, variant: Variant, version: str) -> Artifact | None:
        """Return the artifact of an earlier run if it is whole and was built from the same by the same."""
        try:
            artifact = Artifact.load(record)
        except BuildError:
            return None
        found = (artifact.runtime, artifact.runtime_version, artifact.plan_sha256, artifact.built_from)
        wanted = (target.runtime, version, variant.plan_sha256, digest_of(variant.model, target.profile))
        with_data = (artifact.parity_real is not None) == bool(self.samples.calibration)
        same = found == wanted and artifact.inputs == specs_of(self.inputs) and with_data
        return artifact if same else None

    def measured(self, target: Target, artifacts: Mapping[str, Artifact], progress: Progress) -> list[Measurement]:
        """Time the variants of a target in turns, or return what an earlier run measured of the same files here."""
        path = self.folder / f"{target.name}.measured.json"
        earlier = [] if self.fresh else _earlier(path, artifacts)
        if earlier:
            return earlier
        runtime, models = load(target.runtime), {each.label: each.model for each in self.variants}
        candidates = [
            Candidate.of(runtime, own, self.inputs, label=label, model=models[label], instances=runtime.INSTANCES)
            for label, own in artifacts.items()
        ]
        found = compare(candidates, seconds=self.seconds, progress=lambda done, of: progress(target.name, done, of))
        content = [each.model_dump(mode="json") for each in found]
        atomic.write_text(path, json.dumps(content, indent=1) + "\n")
        return found


def record_of(path: Path) -> Path:
    """Return where the record of an artifact lies."""
    return path.with_name(path.name + ".json")


def _earlier(path: Path, artifacts: Mapping[str, Artifact]) -> list[Measurement]:
    try:
        found = _MEASUREMENTS.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return []
    same = [(m.label, m.artifact_sha256) for m in found] == [(name, own.sha256) for name, own in artifacts.items()]
    versions = all(m.runtime_version == own.runtime_version for m, own in zip(found, artifacts.values(), strict=False))
    here = all(_machine(m.environment) == _machine(Environment.read()) for m in found)
    return found if same and versions and here and not any(m.remark for m in found) else []


def _machine(environment: Environment) -> tuple[object, ...]:
    return environment.platform, environment.cpu, environment.cores, environment.torch


def variants(
    model: str, plans: Sequence[Path], weights: Sequence[Path], dense: Path | None, inputs: tuple[Tensor, ...]
) -> list[Variant]:
    """Return the dense model and one for each plan with its weights, with the multiply-accumulates of each."""

    def of(label: str, net: nn.Module, sha256: str | None) -> Variant:
        graph = planner.trace(net, inputs)
        return Variant(label, net.eval(), graph.macs(graph.dense), sha256)

    found = [of(DENSE, load_model(model, dense), None)]
    for label, path, own in zip(labels(plans), plans, weights, strict=True):
        plan = Plan.load(path)
        found.append(of(label, load_rebuilt(plan, load_model(model), own), plan.sha256))
    return found


def weights_of(plans: Sequence[Path], given: Sequence[Path]) -> list[Path]:
    """Return the rebuilt weights of each plan: those given, in the same order, or the ones that lie beside it."""
    if given and len(given) != len(plans):
        raise EspalierError(f"{len(plans)} plans and {len(given)} --weights: give one for each plan, in their order")
    return list(given) or [_beside(plan) for plan in plans]


def _beside(plan: Path) -> Path:
    names = ("small.safetensors", "weights.safetensors")  # of `espalier rebuild` and of `backends.save_pruned`
    found = next((plan.parent / name for name in names if (plan.parent / name).exists()), None)
    if found is None:
        raise EspalierError(f"{plan} has no {' or '.join(names)} beside it; give --weights, one for each plan")
    return found


def labels(plans: Sequence[Path]) -> list[str]:
    """Return the name of each plan: that of its file, or of its folder where the file is just called plan.

    A name does not depend on the other plans, so that files of an earlier run are found again beside new ones.
    """
    paths = [path.resolve() for path in plans]
    found = [path.parent.name if path.stem == "plan" and path.parent.name else path.stem for path in paths]
    for index, (name, path) in enumerate(zip(found, plans, strict=True)):
        if name in (DENSE, *found[:index]):
            raise EspalierError(f"{path}: another model of the table is called {name!r} too; rename the file or folder")
    return found


@dataclass(frozen=True)
class Order:
    """What the command line asks for: plans with their rebuilt weights, and where the files go."""

    model: str
    plans: Sequence[Path]
    weights: Sequence[Path]
    dense_weights: Path | None
    inputs: str | None
    data: str | None
    folder: Path
    seconds: float
    fresh: bool

    def work(self, targets: Sequence[Target]) -> Work:
        """Load what was named; raises EspalierError for what is missing before anything is compiled."""
        if not self.plans:
            raise EspalierError("--targets compiles plans; name at least one: espalier compile PLAN... --targets a,b,c")
        int8 = [each.name for each in targets if each.profile and each.profile.dtype.weights == "int8"]
        if int8 and self.data is None:
            raise EspalierError(f"{', '.join(int8)} is int8, which is calibrated with real inputs; give --data")
        example = example_inputs(self.inputs, None) if self.inputs else _shared_inputs(self.plans)
        source = load_data(self.data) if self.data else None
        samples = Samples.of(source.train, source.test, like=example) if source else Samples()
        models = variants(self.model, self.plans, weights_of(self.plans, self.weights), self.dense_weights, example)
        return Work(models, example, samples, self.folder, self.seconds, self.fresh)


def _shared_inputs(plans: Sequence[Path]) -> tuple[Tensor, ...]:
    loaded = [Plan.load(path) for path in plans]
    if any(plan.inputs != loaded[0].inputs for plan in loaded):
        raise EspalierError(f"{', '.join(map(str, plans))} were made for inputs of different shapes; give --inputs")
    return loaded[0].inputs_like()


def targets_of(names: str) -> list[Target]:
    """Return the targets named in a list with commas, each once; raises EspalierError for an unknown one."""
    found = {own.name: own for own in map(Target.of, filter(None, map(str.strip, names.split(","))))}
    if not found:
        raise EspalierError("--targets is empty; name profiles or runtimes, separated by commas")
    return list(found.values())


def gains(
    work: Work, targets: Sequence[Target], artifacts: Mapping[tuple[str, str], Artifact], progress: Progress
) -> Gains:
    """Measure what can be measured here, and return the table, which is also written into the folder."""
    rows = []
    for target in targets:
        own = {each.label: found for each in work.variants if (found := artifacts.get((target.name, each.label)))}
        timed: dict[str, Measurement] = {}
        if own and not target.elsewhere and not any(each.estimate for each in own.values()):
            timed = {each.label: each for each in work.measured(target, own, progress)}
        rows += [_row(work, target, variant, own, timed) for variant in work.variants if variant.label in own]
    gained = Gains(rows=rows, absent=work.absent, refused=work.refused)
    atomic.write_text(work.folder / "targets.json", gained.model_dump_json(indent=1) + "\n")
    return gained


def _row(
    work: Work, target: Target, variant: Variant, own: Mapping[str, Artifact], timed: Mapping[str, Measurement]
) -> Row:
    artifact, dense = own[variant.label], own.get(DENSE)
    mac_speedup = work.variants[0].macs / variant.macs
    row = Row(
        plan=variant.label,
        target=target.name,
        runtime=artifact.runtime,
        runtime_version=artifact.runtime_version,
        dtype=artifact.dtype,
        record=record_of(Path(artifact.path)).name,
        macs=variant.macs,
        mac_speedup=mac_speedup,
        accuracy=artifact.accuracy.compiled if artifact.accuracy else None,
        remark="" if timed or artifact.estimate else f"not measured: {target.elsewhere}",
    )
    if artifact.estimate is not None:
        full = dense and dense.estimate
        estimated = {
            "estimated_s": artifact.estimate.latency_s,
            "estimated_speedup": full.latency_s / artifact.estimate.latency_s if full else None,
            "estimated_by": artifact.estimate.compiler,
        }
        return row.model_copy(update=estimated)
    return row.model_copy(update=_timing(timed, variant.label, mac_speedup)) if timed else row


def _timing(timed: Mapping[str, Measurement], label: str, mac_speedup: float) -> dict[str, object]:
    latency = timed[label].latency_s
    found: dict[str, object] = {
        "measured_s": Interval(value=latency.p50, low=latency.ci95[0], high=latency.ci95[1]),
        "remark": timed[label].remark,
    }
    if DENSE in timed:
        gain = ratio(timed[DENSE], timed[label])
        found["speedup"] = Interval(value=gain.value, low=gain.ci95[0], high=gain.ci95[1])
        found["efficiency"] = gain.value / mac_speedup
    return found


def table(found: Gains) -> Table:
    """Return the table for the terminal; what a compiler estimates has columns of its own."""
    estimated = any(row.estimated_s for row in found.rows)
    head = ["plan", "target", "MACs", "MAC speed-up", "measured ms (95 %)", "speed-up (95 %)", "efficiency"]
    head += ["estimated ms", "estimated speed-up"] * estimated
    shown = Table(*head, box=None)
    for row in found.rows:
        cells = [row.plan, row.target, f"{row.macs / 1e6:.4g} M", f"{row.mac_speedup:.2f}x"]
        cells += [_milliseconds(row.measured_s), _times(row.speedup)]
        cells += ["-" if row.efficiency is None else f"{row.efficiency:.2f}"]
        if estimated:
            cells += ["-" if row.estimated_s is None else f"{row.estimated_s * 1e3:.4g}"]
            cells += ["-" if row.estimated_speedup is None else f"{row.estimated_speedup:.2f}x"]
        shown.add_row(*cells)
    shown.caption = "\n".join(_notes(found)) or None
    shown.caption_justify = "left"
    return shown


def _milliseconds(value: Interval | None) -> str:
    return "-" if value is None else f"{value.value * 1e3:.4f} ({value.low * 1e3:.4f}-{value.high * 1e3:.4f})"


def _times(value: Interval | None) -> str:
    return "-" if value is None else f"{value.value:.2f}x ({value.low:.2f}-{value.high:.2f})"


def _notes(found: Gains) -> list[str]:
    compilers = sorted({row.estimated_by for row in found.rows if row.estimated_by})
    notes = [f"estimated by {', '.join(compilers)}: nothing ran on the device"] if compilers else []
    return notes + list(dict.fromkeys(f"{row.target}: {row.remark}" for row in found.rows if row.remark))
