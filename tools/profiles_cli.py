"""`espalier profiles` and `espalier detect`: which devices are known, what is known of them, and which is here."""

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from profiles import compare as comparing
from profiles import lint as linting
from profiles import registry
from profiles.detect import detect as ranked
from profiles.detect import fits, why
from profiles.detect import why_not as explained
from profiles.errors import ProfileError
from profiles.evidence import Cited, Source
from profiles.machine import Machine
from profiles.schema import Profile

app = typer.Typer(help="List, show, compare and check device profiles.", invoke_without_command=True)

AsJson = Annotated[bool, typer.Option("--json", help="print JSON for machines")]
Recording = Annotated[
    Path | None, typer.Option("--machine", metavar="FILE", help="a recorded machine [default: this one]")
]
Name = Annotated[str, typer.Argument(metavar="ID", help="a profile's id, or the path of its .toml file")]


@app.callback()
def main(context: typer.Context, as_json: AsJson = False) -> None:
    """List, show, compare and check device profiles."""
    if context.invoked_subcommand is None:
        list_profiles(as_json=as_json)


@app.command("list")
def list_profiles(
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="print a table of parts and formats")] = False,
) -> None:
    """List all profiles."""
    if markdown:
        sys.stdout.write(_markdown(registry.Library.here().every()))
        return
    rows, table = [], Table("profile", "device", "runtime", "dtype", "filters in steps of", "status", box=None)
    for profile in registry.Library.here().every():
        step = max(profile.quantum("conv2d", "out_channels"), profile.quantum("linear", "out_channels"))
        rows.append(
            {
                "id": profile.id,
                "device": f"{profile.device.vendor} {profile.device.arch}",
                "runtime": profile.runtime.name,
                "dtype": profile.dtype.weights,
                "quantum": step,
                "status": profile.status,
            }
        )
        known = str(step) if step > 1 else comparing.UNKNOWN
        shown = (str(rows[-1][key]) for key in ("id", "device", "runtime", "dtype"))
        table.add_row(*shown, known, profile.status)
    _out(as_json, rows, table)


def _markdown(found: Iterable[Profile]) -> str:
    """Return one row for each vendor: its parts, with the libraries and number formats that are profiled."""
    rows: dict[str, dict[str, list[str]]] = {}
    for profile in found:
        part, library, dtype = profile.id.split(".")
        vendor = "any CPU" if profile.device.vendor == "any" else profile.device.vendor
        rows.setdefault(vendor, {}).setdefault(part, []).append(f"{library} {dtype}")
    lines = ["| vendor | parts |", "|---|---|"]
    for vendor, parts in sorted(rows.items()):
        named = (f"`{part}` ({', '.join(formats)})" for part, formats in sorted(parts.items()))
        lines.append(f"| {vendor} | {'; '.join(named)} |")
    return "\n".join(lines) + "\n"


@app.command()
def show(name: Name, as_json: AsJson = False) -> None:
    """Show one profile as a card, with the source of every number."""
    profile = _profile(name)
    _out(as_json, profile.model_dump(mode="json", by_alias=True), _card(profile))


@app.command()
def compare(
    first: Name,
    second: Name,
    third: Annotated[str | None, typer.Argument(metavar="ID")] = None,
    as_json: AsJson = False,
) -> None:
    """Put two or three profiles side by side; ≠ marks where they differ."""
    chosen = [_profile(name) for name in (first, second, third) if name is not None]
    rows = comparing.compare(*chosen)
    table = Table("", "", *(profile.id for profile in chosen), box=None)
    for row in rows:
        table.add_row("≠" if row.differs else "", row.field, *row.values, style="bold" if row.differs else "dim")
    content = [{"field": row.field, "values": row.values, "differs": row.differs} for row in rows]
    _out(as_json, {"profiles": [profile.id for profile in chosen], "rows": content}, table)


@app.command()
def lint(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="FILE", help="profile files [default: all found]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check profile files: one line for each finding; exit 1 if there is any."""
    findings = linting.lint(*(files or ()))
    if as_json:
        _out(True, [asdict(finding) for finding in findings])
    else:
        sys.stdout.write("".join(f"{finding}\n" for finding in findings))
    if findings:
        raise typer.Exit(1)


@app.command()
def machine(as_json: AsJson = False) -> None:
    """Print what is seen of this machine, always as JSON: a recording for `espalier detect --machine`."""
    del as_json
    sys.stdout.write(json.dumps(Machine.here().model_dump(mode="json"), indent=1, default=sorted) + "\n")


def detect(
    why_not: Annotated[
        str | None, typer.Option("--why-not", metavar="ID", help="explain why a profile does not fit")
    ] = None,
    recording: Recording = None,
    as_json: AsJson = False,
) -> None:
    """Say which profiles fit this machine, best first; exit 1 if none does."""
    here = _machine(recording)
    if why_not is not None:
        reason = explained(why_not, here)
        _out(as_json, {"profile": why_not, "why_not": reason}, Text(reason))
        return
    found = ranked(here)
    table = Table("profile", "why", box=None)
    for profile in found:
        table.add_row(profile.id, why(profile, here))
    if found or as_json:
        _out(as_json, [{"id": profile.id, "why": why(profile, here)} for profile in found], table)
    if not found:
        Console(stderr=True).print(_none_fits(here), highlight=False, soft_wrap=True, markup=False)
        raise typer.Exit(1)


app.command("detect")(detect)


def _none_fits(here: Machine) -> str:
    """Say that no profile fits, and which lack only one thing."""
    near = [found.unmet[0] for _, found in fits(here) if len(found.unmet) == 1 and found.met]
    lines = [f"no profile fits this machine ({here.cpu}); `espalier detect --why-not ID` explains one"]
    return "\n".join([*lines, *(f"one step away: {reason}" for reason in dict.fromkeys(near))])


def _machine(recording: Path | None) -> Machine:
    if recording is None:
        return Machine.here()
    try:
        return Machine.model_validate_json(recording.read_bytes())
    except (OSError, ValueError) as error:
        raise ProfileError(
            f"{recording}: is no recorded machine ({str(error).splitlines()[0]}); write one with "
            "`espalier profiles machine`"
        ) from error


def _profile(name: str) -> Profile:
    return registry.load_file(name) if name.endswith(".toml") else registry.load(name)


def _card(profile: Profile) -> Group:
    """Return the card of a profile: its head, a table for each part, and the sources by number."""
    number = {source.id: str(index) for index, source in enumerate(profile.source, 1)}

    def cited(statement: Cited) -> tuple[str, str]:
        return statement.confidence, " ".join(f"[{number[name]}]" for name in statement.sources)

    widths = Table("operation", "axis", "when", "step", "confidence", "source", title="widths", box=None)
    for rule in profile.granularity:
        words = comparing.rounding(rule) + (f"; else {rule.fallback}" if rule.fallback else "")
        _row(widths, rule.op, rule.axis, rule.when or "", _noted(words, rule), *cited(rule))
    pays = Table("structure", "pays", "confidence", "source", title="structures", box=None)
    for structure in profile.structure:
        _row(pays, comparing.kind(structure), _noted(comparing.verdict(structure), structure), *cited(structure))
    changes = Table("what", "how", "confidence", "source", title="changed by the compiler", box=None)
    for rewrite in profile.rewrite:
        _row(changes, rewrite.kind, _noted(comparing.REWRITES[rewrite.kind], rewrite), *cited(rewrite))
    rest = Table("", "", "confidence", "source", title="speed and memory", box=None)
    if profile.peak is not None:
        words = ", ".join(f"{name} {speed}" for name, speed in comparing.peaks(profile.peak).items())
        place = f" ({profile.peak.condition})" if profile.peak.condition else ""
        _row(rest, "peak", _noted(words + place, profile.peak), *cited(profile.peak))
    for memory in profile.memory:
        _row(rest, memory.name, _noted(comparing.storage(memory), memory), *cited(memory))
    for overhead in profile.overhead:
        _row(rest, f"per {overhead.per}", _noted(comparing.delay(overhead), overhead), *cited(overhead))
    tables = [table for table in (widths, pays, changes, rest) if table.row_count]
    parts = [part for table in tables for part in (Text(), table)]
    return Group(Text(_head(profile)), *parts, *(Text(_source(number[s.id], s)) for s in profile.source))


def _source(number: str, source: Source) -> str:
    return f"\n[{number}] {source.place}\n    {source.quote}\n    read on {source.retrieved}"


def _head(profile: Profile) -> str:
    said = comparing.facts(profile)
    keys = [key for key in ("device", "runtime", "layout", "dtype", "status") if key in said]
    lines = [profile.id, *(f"  {key:<8} {said[key]}" for key in keys)]
    return "\n".join([*lines, *([f"  note     {profile.note}"] if profile.note else [])])


def _noted(words: str, statement: Cited) -> str:
    return f"{words} ({statement.note})" if statement.note else words


def _row(table: Table, *cells: str) -> None:
    table.add_row(*map(Text, cells))  # words of a profile are not markup


def _out(as_json: bool, content: Any, shown: Table | Group | Text | None = None) -> None:
    if as_json:
        sys.stdout.write(json.dumps(content, indent=1, default=str) + "\n")
    elif shown is not None:
        Console(width=None if sys.stdout.isatty() else 160).print(shown, highlight=False)
