"""The `espalier` command: files in, files out; results on stdout, progress on stderr.

Exit 0: done. 1: the answer is no (a budget missed, a parity failure). 2: wrong use. 130: interrupted.
"""

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

import planner
from planner import LatencyTable, Plan, Recipe, Scope
from profiles import atomic
from profiles.errors import BuildError, EspalierError
from tools import calibrate_cli, compile_cli, plan_cli, profiles_cli
from tools.scoping import scoped

app = typer.Typer(
    name="espalier", help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None
)
app.add_typer(profiles_cli.app, name="profiles")
app.command()(profiles_cli.detect)
app.command()(calibrate_cli.calibrate)
app.command()(plan_cli.plan)
app.command()(plan_cli.sensitivity)
app.command(name="compile")(compile_cli.compile_)
app.command()(compile_cli.verify)
INTERRUPTED = 130  # what typer makes of Ctrl-C
out_console, console = Console(width=None if sys.stdout.isatty() else 120), Console(stderr=True)

Model = Annotated[str, typer.Option("--model", help="package.module:factory of the model")]
DataFactory = Annotated[str, typer.Option("--data", help="package.module:factory of (train, test)")]
MaybeData = Annotated[str | None, typer.Option("--data", help="package.module:factory of (train, test)")]
ProfileId = Annotated[str | None, typer.Option("--profile", help="profile id [default: the best for this machine]")]
Inputs = Annotated[str | None, typer.Option("--inputs", help="input shape, e.g. 1x3x32x32 [default: from --data]")]
Weights = Annotated[Path | None, typer.Option("--weights", help="safetensors file of the model's weights")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for machines")]
Fresh = Annotated[bool, typer.Option("--fresh", help="do not reuse earlier results")]
Epochs = Annotated[int, typer.Option("--epochs", min=1, help="epochs of training with the plan")]
Rate = Annotated[float, typer.Option("--lr", min=0.0, help="learning rate")]
Latency = Annotated[str, typer.Option("--latency", help="0.5 (of dense), '50 %' or '3 ms'")]


def main() -> None:
    """Run the command line; the user's mistakes end in one message and no traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console)])
    try:
        app(standalone_mode=True)
    except EspalierError as error:
        console.print(f"[bold red]espalier:[/] {_plain(error)}", highlight=False, soft_wrap=True)
        sys.exit(1 if isinstance(error, BuildError) else 2)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            console.print("espalier: interrupted; the same command continues where this one was", highlight=False)
        raise


def _plain(error: Exception) -> str:
    return str(error).replace("[", r"\[")


def _print(as_json: bool, content: Any, table: Table | str | None = None) -> None:
    if as_json:
        sys.stdout.write(json.dumps(content, indent=1, default=str) + "\n")
    elif table is not None:
        out_console.print(table, highlight=False)


@app.command()
def groups(
    model: Model,
    inputs: Inputs = None,
    data: MaybeData = None,
    why: Annotated[
        str | None, typer.Option("--why", metavar="NAME", help="what is tied, or why it cannot be cut")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the widths and blocks of a model, and what cannot be cut."""
    from tools.explain import explained, listed
    from tools.sources import example_inputs, load_data, load_model

    graph = planner.trace(load_model(model), example_inputs(inputs, load_data(data).test if data else None))
    if why is not None:
        _print(as_json, explained(graph, why), "\n".join(explained(graph, why)["told"]))
        return
    rows = listed(graph)
    table = Table("name", "kind", "channels", "tied to", "cannot be cut because", box=None)
    for row in rows:
        table.add_row(row["name"], row["kind"], str(row["size"]), ", ".join(row["tied"]), row["frozen"] or "")
    _print(as_json, rows, table)


@app.command()
def train(
    model: Model,
    data: DataFactory,
    plan: Annotated[Path, typer.Option("--plan", help="the plan")] = Path("plan.json"),
    epochs: Epochs = 10,
    lr: Rate = 0.02,
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="autocast to bfloat16")] = False,
    weights: Weights = None,
    out: Annotated[Path, typer.Option("--out", help="where to write the weights")] = Path("sparse.safetensors"),
    as_json: AsJson = False,
) -> None:
    """Train with WGSEF until exactly the planned groups are zero; started again, it continues."""
    from backends.weights import save
    from tools.console import Stage
    from tools.sources import load_data, load_model
    from tools.threads import fastest

    net, spec, source = load_model(model, weights), Plan.load(plan), load_data(data)
    checkpoint = out.with_suffix(".training.safetensors")
    with Stage(console).phase("train with WGSEF") as phase, fastest(net, next(iter(source.train))[0]):

        def watch(m: planner.Moment) -> None:
            phase.step(f"loss {m.loss:.3f}, {m.nonzero_groups} groups", m.step, m.steps)

        recipe = Recipe(epochs, lr=lr, bfloat16=bfloat16)
        history = planner.fit(net, source.train, recipe, plan=spec, checkpoint=checkpoint, watch=watch)
    save(net, out)
    accuracy, last = planner.accuracy(net, source.test), history[-1]
    content = {"out": out, "accuracy": accuracy, "groups": last.nonzero_groups, "budget": last.budget_groups}
    words = f"{out}: accuracy {accuracy:.2%}, {last.nonzero_groups} of {last.budget_groups} groups not zero"
    _print(as_json, content, words)


@app.command()
def rebuild(
    model: Model,
    weights: Annotated[Path, typer.Option("--weights", help="weights with exact zeros, from train")],
    plan: Annotated[Path, typer.Option("--plan", help="the plan")] = Path("plan.json"),
    out: Annotated[Path, typer.Option("--out", help="where to write the smaller weights")] = Path("small.safetensors"),
    as_json: AsJson = False,
) -> None:
    """Cut the zeros out; refuses unless the smaller model computes the same."""
    from backends.rebuild import rebuild as cut_out
    from backends.weights import save
    from tools.sources import load_model

    net = load_model(model, weights)
    small = cut_out(Plan.load(plan), net)
    save(small, out)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (net, small))
    _print(as_json, {"out": out, "params": after, "dense_params": before}, f"{out}: {after:,} of {before:,} parameters")


@app.command()
def measure(
    artifacts: Annotated[list[Path], typer.Argument(help="artifact records (FILE.json, written by compile)")],
    model: Annotated[str | None, typer.Option("--model", help="the dense model, for pytorch artifacts")] = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="the plan of pytorch artifacts")] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="measuring time per artifact")] = 2.0,
    streams: Annotated[int, typer.Option(min=0, help="also examples per second of so many streams at once")] = 0,
    memory: Annotated[bool, typer.Option("--memory", help="also peak memory, in a process of its own")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="write raw measurements here")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure artifacts in turns; ratios are to the first one."""
    from backends import compare, peak_memory, throughput
    from tools.console import Stage
    from tools.stages import measurement_table, opened

    stage = Stage(console)
    with stage.phase("measure in turns") as phase:
        found = compare(opened(artifacts, model=model, plan=plan), seconds=seconds, progress=phase.show)
    rates, memories = [], []
    if streams:
        with stage.phase(f"measure {streams} streams") as phase:
            side_by_side = opened(artifacts, model=model, plan=plan, streams=streams)
            rates = throughput(side_by_side, seconds=seconds, progress=phase.show)
    if memory:
        memories = [peak_memory(record) for record in artifacts]
    parts: dict[str, Sequence[BaseModel]] = {"latency": found, "throughput": rates, "memory": memories}
    content = {name: [each.model_dump(mode="json") for each in own] for name, own in parts.items()}
    if out is not None:
        atomic.write_text(out, json.dumps(content, indent=1) + "\n")
    _print(as_json, content, measurement_table(found, rates, memories))


@app.command()
def report(
    measurements: Annotated[Path, typer.Argument(help="measurements.json of a run")] = Path("measurements.json"),
    out: Annotated[Path | None, typer.Option("--out", help="the page [default: report.html beside it]")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="print the table as Markdown")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the report of a run again, and print its table."""
    from tools import report as reporting
    from tools.outcome import Outcome

    outcome = Outcome.load(measurements)
    latencies = measurements.parent / "table.json"
    page = out or measurements.parent / "report.html"
    table = LatencyTable.load(latencies) if latencies.exists() else None
    atomic.write_text(page, reporting.render(outcome, table=table))
    if markdown and not as_json:
        sys.stdout.write(reporting.markdown(outcome) + "\n")
    else:
        _print(as_json, outcome.model_dump(mode="json"), reporting.table(outcome))


@app.command()
@scoped
def run(
    scope: Scope,
    model: Model,
    data: DataFactory,
    out: Annotated[Path, typer.Option("--out", help="folder of the results")],
    latency: Latency = "0.5",
    profile: ProfileId = None,
    epochs: Epochs = 10,
    lr: Rate = 0.02,
    dense_epochs: Annotated[int, typer.Option(min=0, help="train the dense model first")] = 0,
    max_drop: Annotated[float, typer.Option(min=0, max=1, help="accuracy that may be lost, else exit 1")] = 0.01,
    global_budget: Annotated[
        bool, typer.Option("--global-budget", help="one budget over all widths, shared out anew as training goes on")
    ] = False,
    every: Annotated[int, typer.Option("--every", min=1, help="epochs until it is shared out anew")] = 2,
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="autocast training to bfloat16")] = False,
    weights: Weights = None,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:
    """Do the whole chain; started again with the same arguments, it continues."""
    from tools.pipeline import Job

    recipe = Recipe(epochs, lr=lr, bfloat16=bfloat16)
    dense = Recipe(dense_epochs, bfloat16=bfloat16) if dense_epochs else None
    again = every if global_budget else 0
    job = Job(model, data, profile, latency, recipe, out, weights, dense, max_drop, resolve_every=again, scope=scope)
    _execute(job, fresh, as_json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="folder of the results")] = Path("espalier-demo"),
    profile: ProfileId = None,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:
    """Prune a residual CNN on handwritten digits to half its latency on this machine."""
    from tools.pipeline import Job

    model, data = "tools.examples.digits:resnet", "tools.examples.digits:data"
    job = Job(model, data, profile, "0.5", Recipe(8, lr=0.02), out, dense=Recipe(6))
    _execute(job, fresh, as_json)


def _execute(job: Any, fresh: bool, as_json: bool) -> None:
    from tools import report as reporting
    from tools.console import Stage
    from tools.pipeline import clear, execute

    if fresh and job.out.exists():
        clear(job.out)
    outcome = execute(job, Stage(console))
    _print(as_json, outcome.model_dump(mode="json"), reporting.table(outcome))
    if not as_json:
        for line in reporting.way(outcome):
            out_console.print(line, highlight=False, markup=False)
        for verdict in outcome.verdicts:
            mark = "[green]yes[/]" if verdict.ok else "[bold red]NO[/]"
            out_console.print(f"{mark}  {verdict.what}: {verdict.detail}", highlight=False)
        out_console.print(f"report: {job.out / 'report.html'}", highlight=False, soft_wrap=True)
    if not all(verdict.ok for verdict in outcome.verdicts):
        raise typer.Exit(1)
