"""The drawing of accuracy against measured latency: every method's networks, as fast as they were measured."""

import itertools
from collections.abc import Sequence
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from tools.evidence.methods import OURS
from tools.evidence.record import Evidence, Row
from tools.figures import COLOURS, NORMAL, SMALL

MARKERS = "osv^Px*hd<>pD"
_SETTING = ("sparse", "total", "anneal", "lr", "distil")


def fronts(found: Evidence) -> Figure:
    """Return a panel for each network and runtime: measured latency / dense across, accuracy in percent up."""
    places = sorted({(row["network"], row["runtime"]) for row in found.rows})
    figure = Figure(figsize=(7.6, 3.4 * len(places)), layout="constrained")
    for axes, (network, runtime) in zip(figure.subplots(len(places), squeeze=False).flat, places, strict=True):
        own = [row for row in found.rows if (row["network"], row["runtime"]) == (network, runtime)]
        marks = itertools.cycle(MARKERS)
        for method in dict.fromkeys(row["method"] for row in own):
            points = _points([row for row in own if row["method"] == method], runtime)
            style: dict[str, Any] = {"marker": next(marks), "markersize": 5, "linewidth": 1.0, "label": method}
            style["color"] = COLOURS["accent" if method in OURS else "muted"]
            axes.plot(*zip(*points, strict=True), **style)
        axes.axhline(100 * own[0]["dense"], color=COLOURS["faint"], linewidth=1.0)
        axes.set_title(f"{network}, planned for {runtime}", size=NORMAL, color=COLOURS["ink"])
        axes.set_xlabel("measured latency / dense", size=NORMAL)
        axes.set_ylabel("accuracy, %", size=NORMAL)
        axes.tick_params(labelsize=SMALL)
        axes.legend(frameon=False, fontsize=SMALL, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _points(rows: Sequence[Row], runtime: str) -> list[tuple[float, float]]:
    """Return (latency / dense, mean accuracy in percent) of each budget: the longest training, the best setting."""
    budgets = sorted({row["budget"] for row in rows})
    found = []
    for budget in budgets:
        own = [row for row in rows if row["budget"] == budget]
        longest = max(row["epochs"] for row in own)
        by: dict[tuple[Any, ...], list[Row]] = {}
        for row in own:
            if row["epochs"] == longest:
                by.setdefault(tuple(row[name] for name in _SETTING), []).append(row)
        after, best = max(
            ((mean(row["after"] for row in each), each[0]) for each in by.values()), key=lambda found: found[0]
        )
        found.append((1 / best["speedup"][runtime]["value"], 100 * after))
    return found
