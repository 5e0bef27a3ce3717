"""Write the tables of the README from `evidence/`: `python -m tools.evidence.render`, `--check` to only compare.

A table stands between `<!-- evidence: NAME -->` and `<!-- end of evidence -->`; whatever is there is replaced.
"""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import typer

from profiles import atomic
from profiles.errors import EspalierError
from tools.evidence.fronts import fronts
from tools.evidence.record import FOLDER, Evidence, Row, read

README = FOLDER.parent / "README.md"
_RUN = ("network", "runtime", "budget", "epochs", "method", "sparse", "total", "anneal", "lr", "distil")
_PLACE = re.compile(r"(<!-- evidence: (\w+) -->\n).*?(<!-- end of evidence -->)", re.S)


def latency(found: Evidence) -> str:
    """Return how well latency is predicted, a line for each network, batch and runtime."""
    own = ("network, batch, runtime", "seed", "table: MAPE", "worst", "tau")
    head = (*own, "measured again: MAPE", "worst", "tau", "rules: MAPE", "tau", "MACs: MAPE", "tau")
    cases: dict[str, dict[str, Row]] = {}
    for row in found.rows:
        cases.setdefault(row["case"], {})[row["basis"]] = row
    lines = []
    for case, by in cases.items():
        network, batch, runtime, *_, seed = case.split()
        table, rules, macs = by["table"], by["rules"], by["macs"]
        cells = [_share(table, "mape"), _share(table, "worst"), _tau(table)]
        again = by.get("again")
        cells += [_share(again, "mape"), _share(again, "worst"), _tau(again)] if again else ["-", "-", "-"]
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


def accuracy(found: Evidence) -> str:
    """Return what every method's network comes to, means over seeds, a line for each network, budget and method."""
    runtimes = list(dict.fromkeys(name for row in found.rows for name in row["speedup"]))
    by: dict[tuple[Any, ...], list[Row]] = {}
    for row in found.rows:
        by.setdefault(tuple(row[part] for part in _RUN), []).append(row)
    lines = []
    for (network, runtime, budget, epochs, method, *how, lr, distil), rows in sorted(by.items(), key=_by_accuracy):
        shrinks = ", shrinking {:g}, strength {:g}, annealed {:g}".format(*how) if rows[0]["zeroed"] is not None else ""
        place = f"{network} ({_points(rows, 'dense')}), {budget:g} in {runtime}, {epochs} epochs"
        steps = [_points(rows, part) for part in ("before", "at_cut", "recalibrated", "after")]
        speed = [f"{rows[0]['speedup'][name]['value']:.2f}x" for name in runtimes]
        macs, params = (f"{rows[0][part] / 1e6:.3g} M" for part in ("macs", "params"))
        taught = ", distilled" if distil else ""
        lines.append([place, f"{method}{shrinks}{taught}, lr {lr:g}", *steps, str(len(rows)), params, macs, *speed])
    head = ("network (dense %), latency, training", "method", "before the cut %", "right after", "BatchNorm anew")
    return _markdown((*head, "trained %", "seeds", "parameters", "MACs", *runtimes), lines)


def _by_accuracy(entry: tuple[tuple[Any, ...], list[Row]]) -> tuple[Any, ...]:
    case, rows = entry
    return (*case[:4], -mean(row["after"] for row in rows))


def _points(rows: Sequence[Row], part: str) -> str:
    """Return the mean in percent, with the standard deviation where there are several seeds."""
    values = [100 * row[part] for row in rows if row[part] is not None]
    if not values:
        return "-"
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 and part == "after" else ""
    return f"{mean(values):.2f}{spread}"


def macs(found: Evidence) -> str:
    """Return what fewer MACs gain on every runtime, and what ours keep at the same latency: a line for each recipe."""
    runtimes = list(dict.fromkeys(row["runtime"] for row in found.rows))
    by: dict[tuple[str, str], dict[str, Row]] = {}
    for row in found.rows:
        by.setdefault((row["network"], row["recipe"]), {})[row["runtime"]] = row
    gains, kept = [], []
    for case, own in by.items():
        one = next(iter(own.values()))
        about = [", ".join(case), f"{one['macs_speedup']:.2f}x"]
        gains.append([*about, *(_beside(own.get(name)) for name in runtimes)])
        kept.append([*about, f"{one['kept']:.0%}", *(_keeping(own.get(name)) for name in runtimes)])
    head = ("network, recipe", "MACs")
    first = _markdown((*head, *(f"{name}, ours within these MACs" for name in runtimes)), gains)
    return first + "\n" + _markdown((*head, "keeps", *(f"ours at its latency in {n}" for n in runtimes)), kept)


def _beside(row: Row | None) -> str:
    """Return the measured speed-up of a recipe and of ours within its MACs, each with its share of that in MACs."""
    return "-" if row is None else ", ".join(_realised(own) for own in (row, row["same_macs"]))


def _realised(own: Row | None) -> str:
    if own is None:
        return "-"
    gain = own["speedup"]
    return f"{gain['value']:.2f}x ±{(gain['high'] - gain['low']) / 2:.2f} ({own['efficiency']:.0%})"


def _keeping(row: Row | None) -> str:
    """Return what ours keeps at the recipe's latency, with both speed-ups and its own in MACs."""
    if row is None or (own := row["same_latency"]) is None:
        return "-"
    speeds = f"{own['speedup']['value']:.2f}x, {row['speedup']['value']:.2f}x"
    return f"{own['kept']:.0%} at {own['macs_speedup']:.2f}x MACs ({speeds})"


def rivals(found: Evidence) -> str:
    """Return what ours keeps, and how much more than each rival's network of the same latency: a column for a plan."""
    plans: dict[tuple[str, float], list[Row]] = {}
    for row in found.rows:
        plans.setdefault((row["network"], row["budget"]), []).append(row)
    head = ("importance kept", *(f"{network} at {rows[0]['latency']:.2f}" for (network, _), rows in plans.items()))
    lines = [["espalier", *(f"{100 * rows[0]['ours']:.1f} %" for rows in plans.values())]]
    for name in dict.fromkeys(row["rival"] for row in found.rows):
        own = (next((row for row in rows if row["rival"] == name), None) for rows in plans.values())
        lines.append([f"more than {name}", *map(_more, own)])
    return _markdown(head, lines)


def _more(row: Row | None) -> str:
    if row is None or row["theirs"] is None:
        return "-"
    gain = row["ours"] / row["theirs"] - 1
    noise = row.get("noise", 0.0)  # rows of before did not say
    return _bold(f"{100 * gain:+.1f} %" + (f" ±{100 * noise:.1f}" if noise else ""), gain < -noise)


def lossless(found: Evidence) -> str:
    """Return how many images change their class by fixing the support and by cutting: a line for each method."""
    by: dict[tuple[str, str], list[Row]] = {}
    for row in found.rows:
        by.setdefault((row["data"], row["method"]), []).append(row)
    lines = []
    for case, rows in by.items():
        before, fixed, cut, end = (f"{mean(_accuracies(rows, part)):.2f}" for part in _MOMENTS)
        changed = [f"{sum(row[part] for row in rows)}" for part in _CHANGES]
        total, groups = (f"{sum(row[part] for row in rows)}" for part in ("images", "groups_cut"))
        lines.append([", ".join(case), total, before, groups, fixed, changed[0], cut, changed[1], end, changed[2]])
    head = ("data, method", "images", "before %", "groups zeroed", "support fixed %", "changed", "cut out %", "changed")
    return _markdown((*head, "trained on %", "changed by cutting out"), lines)


_MOMENTS = ("before", "fixed", "rebuilt", "trained")
_CHANGES = ("changed_by_fixing", "changed_by_rebuild", "changed_in_the_end")


def _accuracies(rows: Sequence[Row], part: str) -> list[float]:
    return [100 * row["accuracy"][part] for row in rows]


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


def ssl(found: Evidence) -> str:
    """Return the rows of SSL: layers learned, then AlexNet at published sparsities."""
    runtimes = list(dict.fromkeys(name for row in found.rows if row["part"] == "depth" for name in row["speed"]))
    head = (
        "layers (training)",
        "blocks that left",
        "error at the start",
        "before the cut",
        "rebuilt",
        "images changed",
    )
    depth = [_layers(row, runtimes) for row in found.rows if row["part"] == "depth"]
    tables = [_markdown((*head, "SSL's error", *runtimes), depth)] if depth else []
    alexnet = [row for row in found.rows if row["part"] == "alexnet"]
    return "\n".join([*tables, *([_alexnet(alexnet)] if alexnet else [])])


def _layers(row: Row, runtimes: Sequence[str]) -> list[str]:
    published = row["published_error"]
    errors = [f"{100 * error:.2f} %" for error in (row["start_error"], row["before_cut_error"], row["error"])]
    return [
        f"{row['layers']} ({row['how']})",
        ", ".join(f"`{name}`" for name in row["blocks_left"]) or "-",
        *errors,
        str(row["images_changed"]),
        "-" if published is None else f"{100 * published:.2f} %",
        *_speedups(row, runtimes),
    ]


def _alexnet(rows: Sequence[Row]) -> str:
    """Return the speed-ups of layers, their mean, and those of the network, a line for each pattern and runtime."""
    by = {(row["case"], row["how"]): row for row in rows}
    cases, hows = (list(dict.fromkeys(row[key] for row in rows)) for key in ("case", "how"))
    layers = {row["case"]: row["published"] for row in rows if "published" in row}
    wholes = [case for case in cases if case not in layers]
    head = ["speed-up", *layers, "mean of layers", *wholes]
    lines = []
    for label, kind in (("zero filters", "rows"), ("zero columns", "columns")):
        lines.append([label, *(f"{100 * own[kind]:.1f} %" for own in layers.values()), "-", *["-" for _ in wholes]])
    for how in hows:
        reached = [by[case, how]["zero_columns"] for case in layers if "zero_columns" in by.get((case, how), {})]
        if len(reached) == len(layers):
            cells = [f"{100 * share:.1f} %" for share in reached]
            lines.append([f"zero columns as {how}", *cells, "-", *["-" for _ in wholes]])
    for label, kind in (("SSL, product on a CPU", "cpu"), ("SSL, product on a GPU", "gpu")):
        lines.append([label, *_means([own[kind] for own in layers.values()]), *["-" for _ in wholes]])
    for how in hows:
        for runtime in dict.fromkeys(name for row in rows if row["how"] == how for name in row["speed"]):
            own = [_value(by.get((case, how)), runtime) for case in layers]
            rest = [_times(_value(by.get((case, how)), runtime)) for case in wholes]
            lines.append([f"{how}, {runtime}", *_means(own), *rest])
    return _markdown(head, lines)


def _means(values: Sequence[float | None]) -> list[str]:
    known = [value for value in values if value is not None]
    mean = sum(known) / len(known) if known and len(known) == len(values) else None
    return [*map(_times, values), _times(mean)]


def _value(row: Row | None, runtime: str) -> float | None:
    speedup = ((row or {}).get("speed", {}).get(runtime) or {}).get("speedup")
    return speedup["value"] if speedup else None


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def wgsef(found: Evidence) -> str:
    """Return networks at given group sparsities, a line for each run; bold where the level is not reached exactly."""
    runtimes = list(dict.fromkeys(name for row in found.rows for name in row["speed"]))
    head = ("network, data (training)", "groups asked", "zero", "accuracy", "images changed", "parameters", "MACs")
    return _markdown((*head, *runtimes), [_run(row, runtimes) for row in found.rows])


def _run(row: Row, runtimes: Sequence[str]) -> list[str]:
    training = f"{row['form']}, {row['epochs']} epochs of {row['examples']}, seed {row['seed']}"
    return [
        f"{row['network']}, {row['data']} ({training})",
        f"{row['groups_asked']} of {row['groups']}",
        _bold(str(row["groups_zero"]), not row["level_reached"]),
        f"{100 * row['accuracy']:.2f} %",
        str(row["images_changed"]),
        _times(row["compression"]),
        _times(row["macs_speedup"]),
        *_speedups(row, runtimes),
    ]


def _speedups(row: Row, runtimes: Sequence[str]) -> list[str]:
    """Return by runtime the measured latency and how much faster than dense that is."""
    return [_latency(row["speed"].get(name)) for name in runtimes]


def _latency(speed: Row | None) -> str:
    if not speed or not speed["measured_s"]:
        return "-"
    return f"{1e3 * speed['measured_s']['value']:.3g} ms, {speed['speedup']['value']:.2f}x"


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = [":--", *["--:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *lines))


TABLES: dict[str, Callable[[Evidence], str]] = {
    "latency": latency,
    "targets": targets,
    "budget": budget,
    "rivals": rivals,
    "accuracy": accuracy,
    "macs": macs,
    "lossless": lossless,
    "ssl": ssl,
    "wgsef": wgsef,
}


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
        if (FOLDER / "accuracy.json").exists():
            with atomic.replacing(FOLDER / "accuracy.svg") as temporary:
                fronts(read("accuracy")).savefig(temporary, format="svg", metadata={"Date": None})
    sys.exit(int(check and before != after))


if __name__ == "__main__":
    typer.run(main)
