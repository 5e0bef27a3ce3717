"""The whole chain on one model, step by step, each step's result in a file that a second run reuses."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

import planner
import profiles
from backends.equivalence import proven
from backends.rebuild import rebuild
from backends.registry import known
from backends.weights import save
from planner import Agreement, LatencyTable, Moment, Plan, Recipe, Scope
from planner.search import doubts
from profiles import Profile, atomic
from profiles.errors import BuildError, EspalierError, PlanError, ProfileError
from tools import report
from tools.batches import Data
from tools.calibrate import Bench, bench, by_compiler, calibrate
from tools.console import Stage
from tools.contenders import Contender, built, narrowed, rows, runtimes, timed, uniform
from tools.outcome import Accuracy, Interval, Outcome, Step, Verdict, WidthRow
from tools.planning import CONTROL, Brief, Settling, contest, control, sensitivity
from tools.sources import example_inputs, load_data, load_model
from tools.threads import fastest, one_thread

OVER_BUDGET = 1.10  # measured / planned latency that still counts as the budget met


@dataclass(frozen=True)
class Job:
    """What `espalier run` is asked to do."""

    model: str
    data: str
    profile: str | None
    latency: str
    recipe: Recipe
    out: Path
    weights: Path | None = None
    dense: Recipe | None = None  # train the dense model first
    max_drop: float = 0.01  # of accuracy
    seconds: float = 1.0  # of measurement per model and runtime
    resolve_every: int = 0  # epochs after which one budget over all widths is shared out anew; 0: a budget each
    scope: Scope = field(default_factory=Scope)

    @property
    def identity(self) -> str:
        """A digest of everything that decides the result."""
        content = {**asdict(self), "out": None, "weights": self.weights and _digest(self.weights)}
        return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise EspalierError(f"{path} cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class Run:
    """One job under way."""

    job: Job
    stage: Stage

    @cached_property
    def data(self) -> Data:
        """The data."""
        return load_data(self.job.data)

    @cached_property
    def profile(self) -> Profile:
        """The profile asked for, or the best for this machine."""
        return chosen(self.job.profile)

    @cached_property
    def dense(self) -> nn.Module:
        """The dense model, trained first if the job says so."""
        model = load_model(self.job.model, self.job.weights)
        if self.job.dense is not None:
            self._fit(model, self.job.dense, "dense", None)
        return model

    @cached_property
    def inputs(self) -> tuple[Tensor, ...]:
        """One example."""
        return example_inputs(None, self.data.test)

    @cached_property
    def bench(self) -> Bench:
        """The model on the profile's runtime."""
        return bench(self.dense, self.inputs, self.profile)

    def _fit(self, model: nn.Module, recipe: Recipe, name: str, plan: Plan | Agreement | None) -> list[Moment]:
        title = "train dense" if plan is None else "train with WGSEF"
        with self.stage.phase(title) as phase:

            def watch(moment: Moment) -> None:
                groups = f", {moment.nonzero_groups} groups for {moment.budget_groups}" if plan else ""
                phase.step(f"loss {moment.loss:.3f}{groups}", moment.step, moment.steps)

            checkpoint = self.job.out / f"{name}.training.safetensors"
            with fastest(model, next(iter(self.data.train))[0]):
                return planner.fit(model, self.data.train, recipe, plan=plan, checkpoint=checkpoint, watch=watch)

    def table(self) -> LatencyTable:
        """Measure, or reuse, the latency table."""
        path = self.job.out / "table.json"
        if path.exists():
            return LatencyTable.load(path)
        with self.stage.phase("measure latency table") as phase, one_thread():
            table = calibrate(self.bench, progress=phase.step)
        table.save(path)
        return table

    @cached_property
    def settling(self) -> Settling:
        """What makes plans, and measures what they say."""
        brief = Brief(self.dense, self.inputs, self.profile, self.job.latency, self.data.train, self.job.scope)
        return Settling(brief, self.bench, self.table(), self.stage, self.job.out)

    def plan(self) -> Plan:
        """Plan, or reuse the plan."""
        path = self.job.out / ("plan.first.json" if self.job.resolve_every else "plan.json")
        if path.exists():
            return Plan.load(path)
        brief, posed = self.settling.brief, self.settling.posed
        importance = contest(brief, posed, sensitivity(brief, posed, self.stage), self.stage)
        plan = self.settling.plan(importance)
        if not self.job.scope.force:
            for doubt in doubts(plan):
                raise PlanError(f"{doubt}; ask for less latency, or add --force to train it anyway")
        told = control(brief, posed, plan, importance, self.stage)
        plan = plan.model_copy(update={"notes": (*plan.notes, told)})
        plan.save(path)
        return plan


def chosen(profile: str | None) -> Profile:
    """Return the named profile, or the best for this machine's processor; raises ProfileError if none fits."""
    if profile is not None:
        return profiles.load(profile)
    fits = (own for own in profiles.detect() if own.runtime.name in known())
    found = next((own for own in fits if own.device.kind == "cpu" and own.dtype.weights == "fp32"), None)
    if found is None:
        raise ProfileError("no profile fits this machine; `espalier detect` says why, --profile names one anyway")
    return found


def begin(job: Job) -> None:
    """Claim the folder of a job; raises EspalierError if it holds another one."""
    job.out.mkdir(parents=True, exist_ok=True)
    path = job.out / "run.json"
    if path.exists():
        try:
            known = json.loads(path.read_text()).get("identity")
        except (ValueError, AttributeError):
            known = None
        if known != job.identity:
            raise EspalierError(f"{job.out} holds another run; choose another --out or add --fresh")
    atomic.write_text(path, json.dumps({"identity": job.identity, "job": asdict(job)}, default=str, indent=1) + "\n")


_FILES = (
    *(
        "run.json",
        "table.json",
        "plan.json",
        "plan.first.json",
        "tries.json",
        "measurements.json",
        "timings.json",
        "verdict.json",
        "report.html",
    ),
    *("dense.training.safetensors", "sparse.training.safetensors", "sparse.safetensors"),
)


def clear(out: Path) -> None:
    """Forget what an earlier run left in a folder."""
    for name in _FILES:
        (out / name).unlink(missing_ok=True)


def execute(job: Job, stage: Stage) -> Outcome:
    """Do the whole job, or the rest of it, and return its outcome; the files are then all there.

    `verdict.json` says whether every claim held; it is also written when a rebuilt or compiled model is refused.
    """
    begin(job)
    done = job.out / "measurements.json"
    if done.exists():
        stage.say(f"{done} is there already: nothing left to do (--fresh starts again)")
        return Outcome.load(done)
    try:
        outcome = _execute(Run(job, stage))
    except BuildError as error:
        _judge(job.out, [Verdict(what="the smaller model is right", ok=False, detail=str(error))])
        raise
    _judge(job.out, outcome.verdicts)
    return outcome


def _judge(out: Path, claims: list[Verdict]) -> None:
    content = {"ok": all(claim.ok for claim in claims), "claims": [claim.model_dump() for claim in claims]}
    atomic.write_text(out / "verdict.json", json.dumps(content, indent=1) + "\n")


def _execute(run: Run) -> Outcome:
    if by_compiler(run.profile):
        raise EspalierError(
            f"`espalier run` ends with a measurement, and {run.profile.id} is known by its compiler's estimates only; "
            "use calibrate, plan --table, train, rebuild and compile, whose artifact carries the estimate"
        )
    run.stage.say(_why(run.profile))
    dense = run.dense
    plan, model = _trained(run, run.plan())
    return _finish(run, plan, model, planner.accuracy(dense, run.data.test))


def _why(profile: Profile) -> str:
    try:
        return profiles.why(profile)
    except EspalierError:
        return "named on the command line"


def _trained(run: Run, plan: Plan) -> tuple[Plan, nn.Module]:
    """Return the model with exact zeros where the plan wants them, and that plan, which training may have changed."""
    model = load_model(run.job.model)
    model.load_state_dict(run.dense.state_dict())
    if run.job.resolve_every:
        graph, again = run.settling.posed.graph, run.settling.again
        agreement = Agreement(graph, plan, again, every=run.job.resolve_every)
        run._fit(model, run.job.recipe, "sparse", agreement)
        told = (note for note in plan.notes if note.startswith(CONTROL))  # of the plan that training began with
        plan = agreement.plan.model_copy(update={"notes": (*told, *agreement.plan.notes)})
        plan.save(run.job.out / "plan.json")
    else:
        run._fit(model, run.job.recipe, "sparse", plan)
    save(model, run.job.out / "sparse.safetensors")
    return plan, model


def _finish(run: Run, plan: Plan, model: nn.Module, dense_accuracy: float) -> Outcome:
    """Rebuild, compile, measure, and write everything down."""
    job, stage, graph, table = run.job, run.stage, run.bench.graph, run.settling.table
    with stage.phase("rebuild and check"):
        small = rebuild(plan, model)
        error = proven(plan.graph(model), model, small, cases=4, exact=plan.lossless)
        accuracy = Accuracy(
            dense=dense_accuracy,
            sparse=planner.accuracy(model, run.data.test),
            rebuilt=planner.accuracy(small, run.data.test),
        )
    contenders = _contenders(run, plan, table, small, accuracy)
    names = runtimes(run.profile)
    with stage.phase("compile and check parity") as phase, one_thread():
        artifacts = built(contenders, names, run.inputs, job.out, progress=phase.step)
    with stage.phase("measure in turns") as phase:
        measured = timed(contenders, artifacts, run.inputs, seconds=job.seconds, progress=phase.step)
    raw = {name: [m.model_dump(mode="json") for m in rows] for name, rows in measured.items()}
    atomic.write_text(job.out / "timings.json", json.dumps(raw, indent=1) + "\n")
    environment = measured[names[0]][0].environment.model_dump(mode="json")
    table_rows = rows(contenders, graph, measured)
    outcome = Outcome(
        model=job.model,
        profile=run.profile.id,
        profile_why=_why(run.profile),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        budget=f"{plan.target_fraction:.0%} of dense",
        budget_s=plan.target_fraction * (plan.predicted.dense_s or 0.0),
        trust=plan.predicted.trust,
        accuracy=accuracy,
        rows=table_rows,
        widths=_widths(plan),
        tries=run.settling.tries,
        notes=list(plan.notes),
        history=_history(job),
        equivalence=error,
        parity={name: artifacts["espalier", name].parity.max_rel for name in names},
        verdicts=[],
        environment={key: str(value) for key, value in environment.items()},
        phases_s=stage.phases_s,
    )
    outcome = outcome.model_copy(update={"verdicts": verdicts(outcome, plan, job.max_drop)})
    atomic.write_text(job.out / "report.html", report.render(outcome, table=table))
    outcome.save(job.out / "measurements.json")
    return outcome


def _contenders(run: Run, plan: Plan, table: LatencyTable, small: nn.Module, accuracy: Accuracy) -> list[Contender]:
    graph = run.bench.graph
    choice = graph.choice(plan.choice.keep, plan.choice.removed)
    other = uniform(graph, graph.macs(choice), grid=_grid(run.profile))
    spread = table.uncertainty

    def predicted(seconds: float | None) -> Interval | None:
        if seconds is None:
            return None
        return Interval(value=seconds, low=seconds * (1 - spread), high=seconds * (1 + spread))

    return [
        Contender("dense", run.dense, graph.dense, accuracy.dense, predicted(plan.predicted.dense_s), "dense"),
        Contender("espalier", small, choice, accuracy.rebuilt, predicted(plan.predicted.latency_s), "small"),
        Contender("uniform, same MACs", narrowed(run.dense, graph, other), other, None, None, "uniform"),
    ]


def _grid(profile: Profile) -> int:
    return max(profile.quantum("conv2d", "out_channels"), profile.quantum("linear", "out_channels"))


def _widths(plan: Plan) -> list[WidthRow]:
    return [
        WidthRow(name=w.name, dense=w.dense, kept=w.keep, removed=w.keep == 0, considered=list(w.considered))
        for w in plan.widths
    ]


def _history(job: Job) -> list[Step]:
    """Return the training curve of the dense and the sparse training, from their checkpoints."""
    moments = [m for name in ("dense", "sparse") for m in planner.history(job.out / f"{name}.training.safetensors")]
    return [
        Step(
            epoch=m.epoch,
            loss=m.loss,
            accuracy=None,
            nonzero_groups=m.nonzero_groups,
            budget_groups=m.budget_groups,
            phase=m.phase,
        )
        for m in moments
    ]


def verdicts(outcome: Outcome, plan: Plan, max_drop: float) -> list[Verdict]:
    """Return the claims of a run with whether they hold."""
    dense, small = outcome.row("dense"), outcome.row("espalier")
    accuracy = outcome.accuracy
    assert dense is not None
    assert small is not None
    assert accuracy.dense is not None
    assert accuracy.rebuilt is not None
    name = outcome.runtimes[0]  # the profile's own
    took, full = small.measured[name].value, dense.measured[name].value
    found = [
        Verdict(
            what=f"budget met in {name}",
            ok=took / full <= plan.target_fraction * OVER_BUDGET,
            detail=f"measured {took / full:.3f} of dense, planned {plan.target_fraction:.3f}, a tenth more is allowed",
        ),
        Verdict(
            what="accuracy kept",
            ok=accuracy.dense - accuracy.rebuilt <= max_drop + 1e-9,
            detail=f"{accuracy.rebuilt:.2%} against {accuracy.dense:.2%} dense, allowed to lose {max_drop:.1%}",
        ),
        Verdict(
            what="the rebuild changed nothing" if plan.lossless else "the rebuild changed what --lossy allows",
            ok=accuracy.rebuilt == accuracy.sparse or not plan.lossless,
            detail=f"largest relative difference {outcome.equivalence:.1e}",
        ),
    ]
    if small.predicted_s is not None and dense.predicted_s is not None:  # of dense: the machine may be faster by now
        share, was_s = small.predicted_s.value / dense.predicted_s.value, dense.predicted_s.value
        error = share / (took / full) - 1
        detail = (
            f"{share:.3f} of dense, measured {took / full:.3f} ({error:+.1%}); "
            f"dense was {was_s * 1e3:.3g} ms when calibrated and is {full * 1e3:.3g} ms"
        )
        found.append(Verdict(what="latency predicted", ok=abs(error) <= 0.10, detail=detail))
    return found
