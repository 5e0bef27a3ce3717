"""`espalier plan` and `sensitivity`: what to keep for a budget, why, what others would give, and what cuts cost."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

import planner
from planner import Importance, LatencyTable, Limits, Plan, Problem, Scope
from planner.limits import Latency
from profiles.errors import PlanError
from tools.console import Stage
from tools.scoping import RANKINGS, limited, scoped

if TYPE_CHECKING:
    from tools.planning import Brief

console = Console(stderr=True)
out_console = Console(width=None if sys.stdout.isatty() else 120)

Model = Annotated[str, typer.Option("--model", help="package.module:factory of the model")]
ProfileId = Annotated[str | None, typer.Option("--profile", help="profile id [default: the best for this machine]")]
Inputs = Annotated[str | None, typer.Option("--inputs", help="input shape, e.g. 1x3x32x32 [default: from --data]")]
Data = Annotated[str | None, typer.Option("--data", help="package.module:factory of (train, test)")]
Weights = Annotated[Path | None, typer.Option("--weights", help="safetensors file of the model's weights")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for machines")]


Latencies = Annotated[
    list[str] | None,
    typer.Option("--latency", help="0.5 (of dense), '50 %' or '3 ms'; PROFILE=0.5 for each of several devices"),
]
Out = Annotated[Path, typer.Option("--out", help="where to write the plan")]
TableFiles = Annotated[list[Path] | None, typer.Option("--table", help="from calibrate; one for each device")]
Ranking = Annotated[
    str | None,
    typer.Option("--importance", help=f"{', '.join(RANKINGS)} [default: measured with --data, else magnitude]"),
]
GlobalBudget = Annotated[bool, typer.Option("--global-budget", help="one budget in seconds over all widths")]
AnyTable = Annotated[
    bool, typer.Option("--any-table", help="use --table though it was measured under other conditions; noted")
]
Explain = Annotated[str | None, typer.Option("--explain", metavar="LAYER", help="why it keeps what it keeps")]
Replan = Annotated[
    Path | None, typer.Option("--replan", metavar="PLAN", help="with the budgets of this plan; prints what changes")
]
Sweep = Annotated[
    str | None, typer.Option("--sweep", metavar="LOW:HIGH", help="a plan for each of many budgets: CSV and picture")
]


@scoped
@limited
def plan(
    scope: Scope,
    limits: Limits,
    model: Model,
    latency: Latencies = None,
    out: Out = Path("plan.json"),
    table: TableFiles = None,
    profile: ProfileId = None,
    inputs: Inputs = None,
    data: Data = None,
    weights: Weights = None,
    ranking: Ranking = None,
    global_budget: GlobalBudget = False,
    any_table: AnyTable = False,
    explain: Explain = None,
    replan: Replan = None,
    sweep: Sweep = None,
    as_json: AsJson = False,
) -> None:
    """Choose widths and blocks for budgets; with --data, by the loss that each cut costs."""
    from tools.planning import Brief
    from tools.sources import example_inputs, load_data, load_model

    net, source = load_model(model, weights), load_data(data) if data else None
    example = example_inputs(inputs, source.test if source else None)
    before = Plan.load(replan) if replan else None
    wanted, limits = _budgets(latency, limits, before)
    device = _device(profile, wanted, before)
    tables = [LatencyTable.load(path) for path in table or ()]
    foreign = _elsewhere(tables, example, any_table=any_table)
    brief = Brief(net, example, device, wanted, source.train if source else None, scope, limits)
    posed = brief.problem(tables)
    importance = _importance(brief, posed, ranking)
    if sweep is not None:
        _sweep(posed, sweep, limits, importance, out, as_json)
        return
    made = posed.solve(wanted, limits, importance=importance)
    _refuse_doubtful(made, force=scope.force)
    if global_budget:
        made = planner.with_global_budget(made, net)
    made = made.from_elsewhere(tuple(foreign)) if foreign else made
    _told(made, explain, before, out, as_json)


def _importance(brief: "Brief", posed: Problem, ranking: str | None) -> Importance | None:
    """Return the importance that is asked for, or that the data allow; None for that of magnitude."""
    from tools.planning import contest, ranked

    stage = Stage(console)
    if not ranking and brief.train is None:
        return None
    importance = ranked(brief, posed, ranking or "measured", stage)
    return importance if brief.train is None else contest(brief, posed, importance, stage)


def _told(made: Plan, explain: str | None, before: Plan | None, out: Path, as_json: bool) -> None:
    """Write the plan, and say what it decides, why, and what is new."""
    from tools.explain import plan_table, reasons

    told = reasons(made, explain) if explain else []
    changes = before.diff(made) if before else ()
    made.save(out)
    if as_json:
        _print({**made.model_dump(mode="json"), **({"explained": told} if told else {})})
        return
    out_console.print(plan_table(made), highlight=False)
    for line in (*told, *(f"changed: {change}" for change in changes)):
        out_console.print(line, highlight=False, markup=False, soft_wrap=True)


def _print(content: Any) -> None:
    sys.stdout.write(json.dumps(content, indent=1, default=str) + "\n")


def _budgets(given: Sequence[str] | None, limits: Limits, before: Plan | None) -> tuple[Latency | None, Limits]:
    """Return the budgets asked for, or else those of an earlier plan, or else half of the dense latency."""
    if not given and not limits.amounts() and before is not None:
        amounts = {own.name: own.given for own in before.limits}
        beside = {name: amounts.pop(name) for name in Limits().__dataclass_fields__ if name in amounts}
        return amounts or None, Limits(**beside, tied=limits.tied or before.tied, gap=limits.gap)
    if not given:
        return (None if limits.amounts() else 0.5), limits
    pairs = [text.rpartition("=") for text in given]
    if len(pairs) == 1 and not pairs[0][0]:
        return given[0], limits
    if any(not name for name, _, _ in pairs):
        raise PlanError(f"--latency {' and '.join(given)}: with several, say for which profile each is: PROFILE=0.5")
    return {name.strip(): value.strip() for name, _, value in pairs}, limits


def _device(profile: str | None, wanted: Latency | None, before: Plan | None) -> Any:
    """Return the profile that is planned for: the one named, else the first with a budget, else the machine's own."""
    from tools.pipeline import chosen

    named = next(iter(wanted), None) if isinstance(wanted, Mapping) else None
    return chosen(profile or (before.profile if before else None) or named)


def _elsewhere(tables: Sequence[LatencyTable], example: Any, *, any_table: bool) -> list[str]:
    """Return why tables do not belong here; with several devices, those of the others are from elsewhere of course."""
    import profiles
    from tools.calibrate import elsewhere

    several = any_table or len(tables) > 1
    return [
        reason
        for table in tables
        for reason in elsewhere(table, profiles.load(table.profile), example, any_table=several)
    ]


def _refuse_doubtful(made: Plan, *, force: bool) -> None:
    from planner.search import doubts

    for doubt in doubts(made):
        if not force:
            raise PlanError(f"{doubt}; ask for less latency, or add --force to plan it anyway")


def _sweep(posed: Problem, text: str, limits: Limits, importance: Importance | None, out: Path, as_json: bool) -> None:
    from tools import sweep

    with Stage(console).phase("sweep") as phase:
        plans = sweep.front(posed, sweep.budgets(text), limits, importance, progress=phase.step)
    values, picture = sweep.write(plans, out)
    if as_json:
        _print(sweep.rows(plans))
        return
    for row in sweep.rows(plans):
        out_console.print(
            f"budget {row['budget']:g}: latency {row['latency_of_dense']:.3f}, loss {row['loss']:.4g}, "
            f"MACs {row['macs_of_dense']:.3f}, solved in {row['solved_s']:.2f} s",
            highlight=False,
        )
    out_console.print(f"{values}\n{picture}", highlight=False, soft_wrap=True)


@scoped
def sensitivity(
    scope: Scope,
    model: Model,
    data: Annotated[str, typer.Option("--data", help="package.module:factory of (train, test)")],
    profile: ProfileId = None,
    weights: Weights = None,
    out: Annotated[Path, typer.Option("--out", help="where to write the values")] = Path("sensitivity.csv"),
    as_json: AsJson = False,
) -> None:
    """Measure the loss against the kept width of every group, and draw it; started again, it continues."""
    from tools import sensitivity as drawing
    from tools.pipeline import chosen
    from tools.planning import Brief
    from tools.planning import sensitivity as measure
    from tools.sources import example_inputs, load_data, load_model

    net, source = load_model(model, weights), load_data(data)
    brief = Brief(net, example_inputs(None, source.test), chosen(profile), None, source.train, scope)
    posed = brief.problem(None)
    importance = measure(brief, posed, Stage(console))
    picture = drawing.write(posed.graph, importance, out)
    if as_json:
        _print(drawing.rows(posed.graph, importance))
        return
    for line in drawing.told(posed.graph, importance):
        out_console.print(line, highlight=False, markup=False)
    out_console.print(f"{out}\n{picture}", highlight=False, soft_wrap=True)
