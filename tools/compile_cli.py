"""`espalier compile` and `verify`: model files for runtimes and devices, and whether they compute what PyTorch does."""

import json
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from profiles.errors import EspalierError
from tools.console import Stage

if TYPE_CHECKING:
    from tools.targets import Order, Target

console = Console(stderr=True)
out_console = Console(width=None if sys.stdout.isatty() else 160)

Model = Annotated[str, typer.Option("--model", help="package.module:factory of the dense model")]
Inputs = Annotated[str | None, typer.Option("--inputs", help="input shape, e.g. 1x3x32x32 [default: the plan's]")]
Data = Annotated[str | None, typer.Option("--data", help="package.module:factory of (train, test)")]
Plans = Annotated[list[Path] | None, typer.Option("--plan", help="the plan that --weights were rebuilt with")]
Weights = Annotated[
    list[Path] | None, typer.Option("--weights", help="the model's weights; with plans, the rebuilt ones of each")
]
DenseWeights = Annotated[Path | None, typer.Option("--dense-weights", help="weights of the dense model, beside plans")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for machines")]


def compile_(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="the compiled file; with --targets, the folder of the files")],
    plans: Annotated[list[Path] | None, typer.Argument(metavar="[PLAN]...", help="as --plan")] = None,
    targets: Annotated[
        str | None, typer.Option("--targets", help="profiles and runtimes, separated by commas; measures where it can")
    ] = None,
    runtime: Annotated[
        str | None, typer.Option("--runtime", help="the runtime [default: the profile's, or onnxruntime]")
    ] = None,
    profile: Annotated[
        str | None, typer.Option("--profile", help="number format and options [default: fp32]; int8 needs --data")
    ] = None,
    plan: Plans = None,
    weights: Weights = None,
    dense_weights: DenseWeights = None,
    inputs: Inputs = None,
    data: Data = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="measuring time per model and target")] = 2.0,
    fresh: Annotated[bool, typer.Option("--fresh", help="build and measure again what is there")] = False,
    as_json: AsJson = False,
) -> None:
    """Compile rebuilt models (or, without a plan, the dense one), checked against PyTorch.

    With --targets every plan, and the dense model, is compiled for each of them and measured: one table. Started again,
    it continues.
    """
    from tools.stages import compiled, told
    from tools.targets import Order, targets_of

    given, own = [*(plans or ()), *(plan or ())], weights or []
    if targets is not None:
        if runtime or profile:
            raise EspalierError("--targets names runtimes and profiles; leave --runtime and --profile out")
        order = Order(model, given, own, dense_weights, inputs, data, out, seconds, fresh)
        _compile_for(targets_of(targets), order, as_json)
        return
    if len(given) > 1 or len(own) > 1 or dense_weights:
        raise EspalierError("several plans are compiled with --targets a,b,c; without, give one plan and its --weights")
    first, its = next(iter(given), None), next(iter(own), None)
    artifact = compiled(model, out, runtime, profile=profile, plan=first, weights=its, inputs=inputs, data=data)
    _print(as_json, artifact.model_dump(mode="json"), told(artifact))


def _compile_for(targets: Sequence["Target"], order: "Order", as_json: bool) -> None:
    from tools.targets import gains, table
    from tools.threads import one_thread

    stage = Stage(console)
    work = order.work(targets)
    with stage.phase("compile and check parity") as phase, one_thread():
        artifacts = work.compiled(targets, phase.step)
    with stage.phase("measure in turns") as phase:
        found = gains(work, targets, artifacts, phase.step)
    _print(as_json, found.model_dump(mode="json"), table(found))
    for told in (found.refused, found.absent):
        for name, reason in told.items():
            console.print(f"[bold red]{name}:[/] {_plain(reason)}", highlight=False, soft_wrap=True)
    if found.absent or found.refused:
        raise typer.Exit(2 if found.absent else 1)


def verify(
    records: Annotated[list[Path], typer.Argument(help="artifact records (FILE.json, written by compile)")],
    model: Model,
    plan: Plans = None,
    weights: Weights = None,
    dense_weights: DenseWeights = None,
    data: Data = None,
    cases: Annotated[int, typer.Option(min=8, help="random inputs")] = 8,
    seed: Annotated[int | None, typer.Option(help="of the random inputs [default: a new one each time]")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare compiled files with PyTorch on fresh random inputs and, with --data, on real ones; nothing is built."""
    from tools.sources import load_data
    from tools.threads import one_thread
    from tools.verifying import models, table, verified

    drawn = secrets.randbits(32) if seed is None else seed
    known, source = models(model, plan or [], weights or [], dense_weights), load_data(data) if data else None
    with Stage(console).phase("compare with PyTorch") as phase, one_thread():
        found = []
        for done, record in enumerate(records):
            phase.step(str(record), done, len(records))
            found += verified(record, known, source, cases=cases, seed=drawn)
    _print(as_json, {"seed": drawn, "artifacts": [each.model_dump(mode="json") for each in found]}, table(found))
    if any(each.ok is False for each in found):
        raise typer.Exit(1)
    if any(each.ok is None for each in found):
        raise typer.Exit(2)


def _print(as_json: bool, content: Any, shown: Table | str) -> None:
    if as_json:
        sys.stdout.write(json.dumps(content, indent=1, default=str) + "\n")
    else:
        out_console.print(shown, highlight=False)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
