"""`calibrate --check`: the rules of a profile held against the staircases that its runtime shows on this machine.

A rule that is not confirmed is reported, and `overlay` writes what was measured as a profile of the user, which extends
the one that was checked and wins on this machine.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Literal

import archspec.cpu
from matplotlib.figure import Figure
from platformdirs import user_cache_path, user_config_path
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from backends import load as runtime_of
from profiles import BackendUnavailable, PlanError, Profile, atomic
from profiles.schema import Granularity
from tools.calibrate import Countdown, Progress
from tools.figures import COLOURS, DASHED, NORMAL, SMALL
from tools.place import Place
from tools.rewriting import Moves, Rewriting, rewriting
from tools.rewriting import measured as moves_of
from tools.staircase import Measure, Point, Staircase, explore, inferred
from tools.strand import Strands, known

_HERE = "-here"  # ends the part of an overlay's id
_PAD = 0.95  # a larger share of the rounding is all of it
_WIDTHS = 24  # about what one staircase takes, for the progress
Maker = Callable[[str, str], Measure]
Seconds = Annotated[float, Field(gt=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Step(_Part):
    """What one operation of a width adds to a network."""

    width: Annotated[int, Field(gt=0)]
    latency_s: Seconds
    ci95_s: tuple[Seconds, Seconds]
    runs: Annotated[int, Field(gt=0)]


class Curve(_Part):
    """One measured staircase and what was inferred from it; `picture` is a file beside the check's."""

    op: str
    axis: str
    points: Annotated[tuple[Step, ...], Field(min_length=3)]
    quantum: int | None
    alpha: float | None
    cliff: int | None
    penalty: float | None
    picture: str | None = None

    @classmethod
    def of(cls, op: str, axis: str, stairs: Staircase) -> "Curve":
        """Take over what was inferred."""
        points = tuple(Step(width=p.width, latency_s=p.latency_s, ci95_s=p.ci95_s, runs=p.runs) for p in stairs.points)
        return cls(
            op=op,
            axis=axis,
            points=points,
            quantum=stairs.quantum,
            alpha=None if stairs.alpha is None else round(stairs.alpha, 3),
            cliff=stairs.cliff,
            penalty=None if stairs.penalty is None else round(stairs.penalty, 3),
        )


class Verdict(_Part):
    """One rule of the profile against what was measured."""

    op: str
    axis: str
    when: str | None
    mode: str
    documented: int
    measured: int | None
    verdict: Literal["agree", "disagree", "unchecked"]
    because: str | None = None

    def __str__(self) -> str:
        rule = f"{self.op} {self.axis}, {self.mode}{f' ({self.when})' if self.when else ''}"
        if self.verdict == "unchecked":
            return f"{rule}: documented {self.documented}: not checked, {self.because}"
        return f"{rule}: documented {self.documented}, measured {self.measured or 'none'}: {self.verdict}"


class Check(_Part):
    """All rules of a profile on one machine."""

    schema_version: Literal[1] = 1
    profile: str
    created: str
    place: Place
    verdicts: tuple[Verdict, ...]
    curves: tuple[Curve, ...]
    rewrites: tuple[Rewriting, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing that was checked is contradicted."""
        return "disagree" not in [own.verdict for own in self.verdicts] + [own.verdict for own in self.rewrites]

    def save(self, path: Path, profile: Profile) -> "Check":
        """Write the check as JSON and its staircases as SVG files beside it; return it with their names."""
        curves = []
        for curve in self.curves:
            picture = path.with_name(f"{path.stem}-{curve.op}-{curve.axis}.svg")
            with atomic.replacing(picture) as temporary:
                drawn(curve, profile.rules(curve.op, curve.axis)).savefig(temporary, format="svg")
            curves.append(curve.model_copy(update={"picture": picture.name}))
        check = self.model_copy(update={"curves": tuple(curves)})
        atomic.write_text(path, check.model_dump_json(indent=1) + "\n")
        return check


def check(
    profile: Profile,
    *,
    threads: int = 1,
    progress: Progress = lambda *_: None,
    fresh: bool = False,
    maker: Maker | None = None,
    mover: Callable[[], Moves] | None = None,
) -> Check:
    """Measure the staircase of every operation and axis that the profile has rules for, and compare rule by rule.

    Where it has rules for convolutions, whether the compiler moves strides is measured too. Staircases are kept as they
    are measured, so that an interrupted check goes on where it was. Raises PlanError if the profile has no rule that
    can be checked.
    """
    axes = list(dict.fromkeys((rule.op, rule.axis) for rule in profile.granularity if known(rule.op, rule.axis)))
    if not axes:
        raise PlanError(f"profile {profile.id} has no rule that a staircase can show; there is nothing to check")
    place = Place.here(profile, runtime_of(profile.runtime.name).version(), threads=threads, batch=1)
    paths = {which: _path(profile, place, *which) for which in axes}
    curves = {} if fresh else {which: curve for which, path in paths.items() if (curve := _stored(path)) is not None}
    clock, total = Countdown(progress, len(curves) * _WIDTHS, len(axes) * _WIDTHS), len(axes) * _WIDTHS
    for which in [which for which in axes if which not in curves]:

        def shown(widths: int, what: str = " ".join(which), before: int = len(curves) * _WIDTHS) -> None:
            clock.step(what, before + min(widths, _WIDTHS), total)

        measure = maker(*which) if maker else Strands(profile, *which, threads=threads, progress=shown)
        curves[which] = _curve(profile, which, measure)
        atomic.write_text(paths[which], curves[which].model_dump_json(indent=1) + "\n")
        clock.finished(len(curves) * _WIDTHS)
    ordered, rewrites = [curves[which] for which in axes], []
    if any(op == "conv2d" for op, _ in axes):
        rewrites = [rewriting(profile, mover() if mover else moves_of(profile, threads=threads))]
    return Check(
        profile=profile.id,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        place=place,
        verdicts=tuple(verdicts(profile, ordered)),
        curves=tuple(ordered),
        rewrites=tuple(rewrites),
    )


def _path(profile: Profile, place: Place, op: str, axis: str) -> Path:
    """Return where a staircase that was measured under these conditions is kept."""
    same = place.model_dump(exclude={"governor", "frequency_hz"})
    about = json.dumps([profile.dtype.weights, op, axis, *_range(profile, op, axis), same], sort_keys=True)
    digest = hashlib.sha256(about.encode()).hexdigest()[:20]
    return user_cache_path("espalier") / "staircases" / f"{profile.id}-{op}-{axis}-{digest}.json"


def _stored(path: Path) -> Curve | None:
    try:
        return Curve.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _range(profile: Profile, op: str, axis: str) -> tuple[list[int], int]:
    """Return the quanta whose steps are looked for, and the lowest width, 1 where none is documented.

    Cliffs are seen on the way, unless nothing else is documented.
    """
    rules = [rule for rule in profile.rules(op, axis) if rule.at_most is None] or profile.rules(op, axis)
    quanta = {rule.quantum for rule in rules if not _jumps(rule)} or {rule.quantum for rule in rules}
    return sorted(quanta), max(rule.at_least for rule in rules)


def _curve(profile: Profile, which: tuple[str, str], measure: Measure) -> Curve:
    quanta, lowest = _range(profile, *which)
    points: dict[int, Point] = {}
    for quantum in quanta:
        found = explore(measure, max(quantum, 4), lowest=lowest if lowest > 1 else None)
        points = {point.width: point for point in found} | points
    return Curve.of(*which, inferred(list(points.values())))


def verdicts(profile: Profile, curves: Sequence[Curve]) -> list[Verdict]:
    """Return what the curves say of each rule, in the order of the profile.

    Where several rules of one axis differ in their condition, which is not evaluated, one that agrees was met, and the
    others were not.
    """
    by_axis = {(curve.op, curve.axis): curve for curve in curves}
    found = []
    for rule in profile.granularity:
        curve = by_axis.get((rule.op, rule.axis))
        if curve is None:
            found.append(_verdict(rule, None, because=f"there is no network that shows {rule.op} by {rule.axis}"))
            continue
        measured = _measured(rule, curve)
        if rule.kernel is not None:
            found.append(_verdict(rule, measured, because=f"the networks have other kernels than {rule.kernel}"))
            continue
        if rule.at_most is not None:
            found.append(_verdict(rule, measured, because=f"the staircase begins above {rule.at_most}"))
            continue
        alike = (o for o in profile.rules(rule.op, rule.axis) if o.kernel is None and o.at_most is None)
        others = [other for other in alike if _jumps(other) == _jumps(rule)]
        met = next((other for other in others if other.quantum == (measured or 1)), None)
        if met is not None and met.quantum != rule.quantum:
            because = f"the networks met another condition{f' ({met.when})' if met.when else ''}"
            found.append(_verdict(rule, measured, because=because))
        else:
            found.append(_verdict(rule, measured))
    return found


def _verdict(rule: Granularity, measured: int | None, *, because: str | None = None) -> Verdict:
    agrees = (measured or 1) == rule.quantum
    return Verdict(
        op=rule.op,
        axis=rule.axis,
        when=rule.when,
        mode=rule.mode,
        documented=rule.quantum,
        measured=measured,
        verdict="unchecked" if because else "agree" if agrees else "disagree",
        because=because,
    )


def _jumps(rule: Granularity) -> bool:
    return rule.mode in ("cliff", "reject")


def _measured(rule: Granularity, curve: Curve) -> int | None:
    return curve.cliff if _jumps(rule) else curve.quantum


def drawn(curve: Curve, rules: Sequence[Granularity]) -> Figure:
    """Draw a staircase over the multiples of what is documented."""
    figure = Figure(figsize=(7.6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    widths, top = [point.width for point in curve.points], curve.points[-1].width
    grid = max((rule.quantum for rule in rules), default=top)
    for multiple in range(grid, top + 1, grid):
        axes.axvline(multiple, color=COLOURS["faint"], linewidth=0.9, linestyle=DASHED)
    middles = [1e6 * point.latency_s for point in curve.points]
    below = [1e6 * max(0.0, point.latency_s - point.ci95_s[0]) for point in curve.points]
    above = [1e6 * max(0.0, point.ci95_s[1] - point.latency_s) for point in curve.points]
    axes.errorbar(widths, middles, yerr=(below, above), fmt="o", markersize=4, color=COLOURS["accent"])
    axes.set_ylim(bottom=0)
    axes.set_xticks(range(grid, top + 1, grid))
    axes.set_xlabel(f"{curve.axis} of {curve.op}, dashed: multiples of {grid} as documented", size=NORMAL)
    axes.set_ylabel("µs per operation", size=NORMAL)
    axes.tick_params(labelsize=SMALL)
    axes.set_title(_summary(curve), size=NORMAL, loc="left")
    return figure


def _summary(curve: Curve) -> str:
    said = [f"steps of {curve.quantum}, of whose rounding {curve.alpha:.0%} is paid"] if curve.quantum else []
    said += [f"{curve.penalty:.2f} times as long beside the multiples of {curve.cliff}"] if curve.cliff else []
    return f"measured: {'; '.join(said) or 'no steps'}"


def overlay(check: Check, profile: Profile) -> Path:
    """Write what was measured as a profile in the user's folder, where it is found and preferred; return the file.

    It holds every rule that was checked, so that a rule that agrees gains the share or the penalty that documents lack.
    """
    if profile.device.kind != "cpu":
        raise BackendUnavailable(f"{profile.id} is no CPU, and an overlay could not tell this {profile.device.kind}")
    part, runtime, dtype = profile.id.split(".")
    again = part.endswith(_HERE)
    name = profile.id if again else f"{part}{_HERE}.{runtime}.{dtype}"
    path = user_config_path("espalier") / "profiles" / f"{name}.toml"
    lines = [
        f"# Measured on this machine by `espalier calibrate --check --write`, {check.created}.",
        "schema = 1",
        f"id = {_toml(name)}",
        f"extends = {_toml(list(profile.extends) if again else [profile.id])}",
    ]
    moves = [own for own in check.rewrites if own.moves.moved]
    if not moves and any(own.moves.moved is False for own in check.rewrites):
        lines.append("rewrite = []")  # in place of all that the other profile states
    if check.place.device in archspec.cpu.TARGETS:
        lines += ["", "[device]", f"match = {{ archspec = {_toml(check.place.device)} }}"]
    by_axis = {(curve.op, curve.axis): curve for curve in check.curves}
    checked = [
        (rule, by_axis[rule.op, rule.axis])
        for rule, verdict in zip(profile.granularity, check.verdicts, strict=True)
        if verdict.verdict != "unchecked"
    ]
    for rule, curve in checked:
        lines += ["", "[[granularity]]", *_keys(_rule(rule, curve))]
    for curve in dict.fromkeys(curve for _, curve in checked):
        lines += ["", "[[source]]", *_source(check, curve)]
    for own in moves:
        name = f"here-rewrite-{own.kind}"
        lines += ["", "[[rewrite]]", *_keys({"kind": own.kind, "confidence": "measured-here", "sources": [name]})]
        runs, latency_s, spread_s = own.moves.runs, own.moves.latency_s, own.moves.spread_s
        lines += ["", "[[source]]", *_cited(check, name, str(own), runs, latency_s, spread_s)]
    atomic.write_text(path, "\n".join(lines) + "\n")
    return path


def _rule(rule: Granularity, curve: Curve) -> dict[str, object]:
    measured = _measured(rule, curve)
    made: dict[str, object] = {"op": rule.op, "axis": rule.axis, "when": rule.when, "quantum": measured or 1}
    made["at_least"] = rule.at_least if rule.at_least > 1 else None
    made["at_most"] = rule.at_most
    if measured is None:  # an entry cannot be taken away, but one that rounds to 1 does nothing
        made |= {"mode": "tile", "alpha": 0.0}
    elif _jumps(rule):
        made |= {"mode": "cliff", "penalty": curve.penalty, "fallback": rule.fallback or "another kernel"}
    else:
        share = curve.alpha or 0.0
        made |= {"mode": "pad" if share >= _PAD else "tile", "alpha": 1.0 if share >= _PAD else share}
    seen = f"widths {curve.points[0].width} to {curve.points[-1].width}"
    note = f"documented {rule.quantum}, mode {rule.mode}; measured over {seen}"
    return made | {"confidence": "measured-here", "sources": [_source_id(curve)], "note": note}


def _source(check: Check, curve: Curve) -> list[str]:
    last, runs = curve.points[-1], sum(point.runs for point in curve.points)
    quote = f"{curve.op} by {curve.axis}, {_summary(curve)}"
    return _cited(check, _source_id(curve), quote, runs, last.latency_s, (last.ci95_s[1] - last.ci95_s[0]) / 2)


def _cited(check: Check, name: str, quote: str, runs: int, median_s: float, spread_s: float) -> list[str]:
    place = check.place
    measurement = {
        "machine": place.device_model or place.device,
        "runtime_version": place.runtime_version,
        "driver_version": place.driver_version or "unknown",
        "power_mode": place.governor or "not told by the system",
        "threads": place.threads,
        "batch": place.batch,
        "runs": runs,
        "median_s": median_s,
        "spread_s": spread_s,
    }
    table = ", ".join(f"{key} = {_toml(value)}" for key, value in measurement.items())
    return [
        *_keys({"id": name, "quote": quote}),
        f"retrieved = {date.fromisoformat(check.created[:10])}",
        f"measurement = {{ {table} }}",
    ]


def _source_id(curve: Curve) -> str:
    return f"here-{curve.op}-{curve.axis}"


def _keys(table: dict[str, object]) -> list[str]:
    return [f"{key} = {_toml(value)}" for key, value in table.items() if value is not None]


def _toml(value: object) -> str:
    """Return a value as TOML writes it, which is JSON for strings of one line, numbers and lists of these."""
    return json.dumps(value, ensure_ascii=False)
