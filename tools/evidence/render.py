"""Write the tables of the README from `evidence/`: `python -m tools.evidence.render`, `--check` to only compare.

A table stands between `<!-- evidence: NAME -->` and `<!-- end of evidence -->`; whatever is there is replaced.
"""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from profiles import atomic
from profiles.errors import EspalierError
from tools.evidence.record import FOLDER, Evidence, Row, read

README = FOLDER.parent / "README.md"
_PLACE = re.compile(r"(<!-- evidence: (\w+) -->\n).*?(<!-- end of evidence -->)", re.S)


def latency(found: Evidence) -> str:
    """Return how well latency is predicted, a line for each network, batch and runtime."""
    head = ("network, batch, runtime", "seed", "table: MAPE", "worst", "tau", "rules: MAPE", "tau", "MACs: MAPE", "tau")
    cases: dict[str, dict[str, Row]] = {}
    for row in found.rows:
        cases.setdefault(row["case"], {})[row["basis"]] = row
    lines = []
    for case, by in cases.items():
        network, batch, runtime, *_, seed = case.split()
        table, rules, macs = by["table"], by["rules"], by["macs"]
        cells = [_share(table, "mape"), _share(table, "worst"), _tau(table)]
        cells += [_share(rules, "mape"), _tau(rules), _share(macs, "mape"), _tau(macs)]
        lines.append([f"{network}, {batch[1:]}, {runtime}", seed, *cells])
    return _markdown(head, lines)


def _share(row: Row, what: str) -> str:
    return _bold(f"{100 * row[what]:.1f} %", what in row["missed"])


def _tau(row: Row) -> str:
    return _bold(f"{row['tau']:.3f}", "tau" in row["missed"])


def _bold(text: str, really: bool) -> str:
    return f"**{text}**" if really else text


def targets(found: Evidence) -> str:
    """Return what plans for one runtime gain on every target, a line for each network and plan."""
    names = list(dict.fromkeys(row["target"] for row in found.rows))
    by: dict[tuple[str, str], dict[str, Row]] = {}
    for row in found.rows:
        by.setdefault((row["network"], row["plan"]), {})[row["target"]] = row
    lines = []
    for (network, plan), own in by.items():
        macs = next(iter(own.values()))["mac_speedup"]
        cells = [_gain(own[name]) if name in own else "-" for name in names]
        lines.append([f"{network}, {'dense' if plan == 'dense' else f'half for {plan}'}", f"{macs:.2f}x", *cells])
    return _markdown(("network, plan", "MACs", *(f"`{name}`" for name in names)), lines)


def budget(found: Evidence) -> str:
    """Return how planned networks stand to their budgets, a line for each network and runtime."""
    budgets = sorted({row["budget"] for row in found.rows})
    by: dict[tuple[str, str], dict[float, Row]] = {}
    for row in found.rows:
        by.setdefault((row["network"], row["runtime"]), {})[row["budget"]] = row
    lines = [
        [", ".join(case), *(_met(own[share]) if share in own else "-" for share in budgets)] for case, own in by.items()
    ]
    return _markdown(("measured / dense at a budget of", *(f"{share:g}" for share in budgets)), lines)


def _met(row: Row) -> str:
    """Return the fraction of the dense latency in the end, bold if 5 % off its budget, with the plans it took."""
    last = row["tries"][-1]
    text = _bold(f"{last['measured']:.3f}", abs(last["of_budget"] - 1) > 0.05)
    return text if len(row["tries"]) == 1 else f"{text} ({len(row['tries'])} plans)"


def _gain(row: Row) -> str:
    if row["plan"] == "dense":
        seconds = (row["measured_s"] or {}).get("value") or row["estimated_s"]
        text = "-" if seconds is None else f"{1e3 * seconds:.3g} ms"
    elif row["speedup"] is not None:
        text = f"{row['speedup']['value']:.2f}x"
    else:
        text = "-" if row["estimated_speedup"] is None else f"{row['estimated_speedup']:.2f}x (estimated)"
    return text if row["accuracy"] is None else f"{text}, {100 * row['accuracy']:.1f} %"


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = [":--", *["--:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *lines))


TABLES: dict[str, Callable[[Evidence], str]] = {"latency": latency, "targets": targets, "budget": budget}


def rendered(text: str, folder: Path = FOLDER) -> str:
    """Return a text with its tables written anew; raises EspalierError for a table that is not known."""

    def table(place: re.Match[str]) -> str:
        begin, name, end = place.groups()
        if name not in TABLES:
            raise EspalierError(f"no table is called {name!r}; there are {', '.join(TABLES)}")
        found = read(name, folder)
        origin = f"On {found.machine.cores} cores of an {found.machine.cpu} ({found.machine.microarchitecture})"
        return f"{begin}{TABLES[name](found)}\n{origin}; made by `{found.command}`.\n{end}"

    return _PLACE.sub(table, text)


def main(
    check: Annotated[bool, typer.Option("--check", help="write nothing; exit 1 if the README differs")] = False,
) -> None:
    """Write the tables of the README."""
    before = README.read_text()
    after = rendered(before)
    if not check:
        atomic.write_text(README, after)
    sys.exit(int(check and before != after))


if __name__ == "__main__":
    typer.run(main)
