"""`espalier calibrate`: latency tables measured here, or on a device without PyTorch; profiles held to measurement."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from profiles.errors import EspalierError
from tools.console import Stage

if TYPE_CHECKING:
    from torch import Tensor, nn

    from profiles import Profile

    Source = tuple[nn.Module, tuple[Tensor, ...], Profile]

console = Console(stderr=True)


Minutes = Annotated[
    float | None, typer.Option("--minutes", min=0.1, help="of measuring [default: 2.7]; more go on from the last table")
]
Check = Annotated[
    bool, typer.Option("--check", help="hold the profile's rules against staircases; exit 1 if one disagrees")
]
Write = Annotated[bool, typer.Option("--write", help="with --check: store what was measured as a profile of yours")]
Kit = Annotated[Path | None, typer.Option("--kit", help="write networks and run.py here, for a device without PyTorch")]
Import = Annotated[
    Path | None, typer.Option("--import", help="read the kit's results.json back as a table; needs --kit")
]


def calibrate(
    model: Annotated[str | None, typer.Option("--model", help="package.module:factory of the model")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="where to write [default: table.json; with --check, check.json]")
    ] = None,
    profile: Annotated[
        str | None, typer.Option("--profile", help="profile id [default: the best for this machine]")
    ] = None,
    inputs: Annotated[
        str | None, typer.Option("--inputs", help="input shape, e.g. 1x3x32x32 [default: from --data]")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="package.module:factory of (train, test)")] = None,
    weights: Annotated[
        Path | None, typer.Option("--weights", help="safetensors file of the weights, which an NPU's compiler packs")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="threads of the runtime")] = 1,
    minutes: Minutes = None,
    check: Check = False,
    write: Write = False,
    kit: Kit = None,
    import_: Import = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="do not reuse earlier results")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON for machines")] = False,
) -> None:
    """Measure the latency table of what a model can become, or check a profile's rules."""
    if check:
        _check(profile, out or Path("check.json"), threads, write=write, fresh=fresh, as_json=as_json)
        return
    if write or (import_ and not kit):
        raise EspalierError("--write goes with --check, and --import with --kit; add it")
    if model is None:
        raise EspalierError("calibrate needs --model, unless --check is given")
    if import_ is not None and kit is not None:
        _import(model, import_, kit, out or Path("table.json"), as_json)
        return
    source = _source(model, profile, inputs, data, weights)
    if kit is not None:
        _write_kit(source, kit, threads, as_json)
        return
    _measure(source, out or Path("table.json"), threads, minutes, fresh=fresh, as_json=as_json)


def _print(as_json: bool, content: Any, words: str) -> None:
    sys.stdout.write((json.dumps(content, indent=1, default=str) if as_json else words) + "\n")


def _source(model: str, profile: str | None, inputs: str | None, data: str | None, weights: Path | None) -> "Source":
    """Load what was named: the model, an example, the profile."""
    import torch

    from tools.pipeline import chosen
    from tools.sources import example_inputs, load_data, load_model

    torch.manual_seed(0)  # without weights: those that an earlier calibration had, whose work is kept
    example = example_inputs(inputs, load_data(data).test if data else None)
    return load_model(model, weights), example, chosen(profile)


def _write_kit(source: "Source", kit: Path, threads: int, as_json: bool) -> None:
    from tools.kit import write_kit

    with Stage(console).phase("write the kit") as phase:
        write_kit(*source, kit, threads=threads, progress=phase.step)
    _print(as_json, {"kit": kit}, f"{kit}: copy it to the device, run python3 run.py, copy results.json back")


def _measure(
    source: "Source",
    out: Path,
    threads: int,
    minutes: float | None,
    *,
    fresh: bool,
    as_json: bool,
) -> None:
    from tools import calibrate as calibration
    from tools.threads import one_thread

    bench = calibration.bench(*source, threads=threads)
    estimates = calibration.by_compiler(bench.profile)
    doing = "estimate" if estimates else "measure"
    with Stage(console).phase(f"{doing} latency table") as phase, one_thread():
        limit_s = 60 * minutes if minutes else None
        table = calibration.calibrate(bench, progress=phase.step, fresh=fresh, limit_s=limit_s)
    table.save(out)
    what = "estimated by its compiler, not measured; " if estimates else ""
    words = (
        f"{len(table.probes)} networks, {len(table.entries)} entries, {what}"
        f"error on unseen networks {table.mean_error:.1%}"
    )
    _print(as_json, {"out": out, "mean_error": table.mean_error, "entries": len(table.entries)}, f"{out}: {words}")


def _import(model: str, results: Path, kit: Path, out: Path, as_json: bool) -> None:
    from tools.kit import import_results, inputs_of
    from tools.sources import load_model

    table = import_results(results, kit, load_model(model), inputs_of(kit))
    table.save(out)
    words = f"{out}: {len(table.probes)} networks measured on {table.device}, error on unseen {table.mean_error:.1%}"
    _print(as_json, {"out": out, "device": table.device, "mean_error": table.mean_error}, words)


def _check(profile: str | None, out: Path, threads: int, *, write: bool, fresh: bool, as_json: bool) -> None:
    from tools import check as checking
    from tools.pipeline import chosen
    from tools.threads import one_thread

    device = chosen(profile)
    with Stage(console).phase("measure staircases") as phase, one_thread():
        found = checking.check(device, threads=threads, progress=phase.step, fresh=fresh)
    found = found.save(out, device)
    lines = [str(verdict) for verdict in (*found.verdicts, *found.rewrites)]
    if write:
        lines.append(f"stored as {checking.overlay(found, device)}")
    _print(as_json, found.model_dump(mode="json"), "\n".join(lines))
    if not found.ok:
        raise typer.Exit(1)
