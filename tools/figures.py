"""The drawings of a report: matplotlib figures without global state, as SVG that takes its colours from the page."""

import io
import itertools
import re
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from planner.latency import Entry, LatencyTable
from tools.outcome import Interval, Row, Step, WidthRow

# Stand-ins that `svg` replaces by the variables of the page (`--ink`), which have a value for light and one for dark.
COLOURS = {
    "ink": "#1d2024",
    "muted": "#686e76",
    "faint": "#d5d9de",
    "paper": "#fdfdfc",
    "accent": "#2c7a54",
    "warm": "#b4541f",
}
WIDTH_INCHES = 7.6
SMALL, NORMAL = 8.0, 9.0  # points
DASHED = (0, (4, 3))
MARKERS = {"dense": ("o", "ink"), "espalier": ("D", "accent")}
STAIRCASES = (("o", "accent"), ("s", "warm"), ("^", "ink"), ("v", "muted"))


def widths(rows: Sequence[WidthRow]) -> Figure:
    """One bar per layer: the dense width behind, the kept one in front, a notch at each width that was considered."""
    figure = Figure(figsize=(WIDTH_INCHES, 0.6 + 0.25 * len(rows)), layout="constrained")
    axes = _panel(figure.add_subplot(), grid="x")
    places = range(len(rows))
    axes.barh(places, [row.dense for row in rows], height=0.62, color=COLOURS["faint"])
    axes.barh(places, [0 if row.removed else row.kept for row in rows], height=0.62, color=COLOURS["accent"])
    for place, row in enumerate(rows):
        notches = [width for width in row.considered if 0 < width < row.dense]
        axes.vlines(notches, place - 0.31, place + 0.31, color=COLOURS["paper"], linewidth=0.6)
        text, colour = ("removed", "warm") if row.removed else (f"{row.kept:,} of {row.dense:,}", "ink")
        note: dict[str, Any] = {"size": SMALL, "color": COLOURS[colour], "va": "center", "textcoords": "offset points"}
        axes.annotate(text, (row.dense, place), (5, 0), **note)
    axes.set_yticks(places, [_shortened(row.name) for row in rows], parse_math=False)
    axes.tick_params("y", length=0, labelcolor=COLOURS["ink"])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.13 * max((row.dense for row in rows), default=1))
    axes.set_xlabel("channels")
    return figure


def latency(rows: Sequence[Row], runtime: str) -> Figure | None:
    """Predicted against measured latency with their 95 % intervals; None where no row has both."""
    points = [(row, row.predicted_s, row.measured.get(runtime)) for row in rows]
    pairs = [(row, predicted, measured) for row, predicted, measured in points if predicted and measured]
    if not pairs:
        return None
    figure = Figure(figsize=(WIDTH_INCHES, 3.6), layout="constrained")
    axes = _panel(figure.add_subplot(), grid="both")
    end = 1.12e3 * max(max(predicted.high, measured.high) for _, predicted, measured in pairs)
    axes.plot([0, end], [0, end], color=COLOURS["muted"], linewidth=0.9, linestyle=DASHED, label="measured = predicted")
    others = itertools.cycle("s^vpPX")
    for row, predicted, measured in pairs:
        marker, colour = MARKERS.get(row.label) or (next(others), "warm")
        _point(axes, predicted, measured, marker=marker, color=COLOURS[colour], label=_shortened(row.label))
    axes.set(xlim=(0, end), ylim=(0, end))
    axes.set_xlabel("predicted, ms")
    axes.set_ylabel("measured, ms")
    _legend(axes, loc="lower right", borderaxespad=1.0)
    return figure


def staircases(table: LatencyTable) -> Figure | None:
    """What the slowest operations cost at each output width, at their widest input; None without three widths of one.

    Hollow: no measured network had that width, so its cost is estimated from the others.
    """
    flights = [flight for flight in _flights(table.entries) if len(flight) >= 3]
    if not flights:
        return None
    flights.sort(key=lambda flight: -flight[-1].latency_s)
    figure = Figure(figsize=(WIDTH_INCHES, 3.2), layout="constrained")
    axes = _panel(figure.add_subplot(), grid="y")
    for flight, (marker, colour) in zip(flights, STAIRCASES, strict=False):
        steps = [(entry.outputs, 1e6 * entry.latency_s) for entry in flight]
        label = f"{_shortened(flight[0].operation, 48)}, {flight[0].inputs:,} in"
        axes.plot(*zip(*steps, strict=True), color=COLOURS[colour], linewidth=1.2, marker=marker, ms=4.5, label=label)
        hollow = [step for step, entry in zip(steps, flight, strict=True) if not entry.probes]
        for x, y in hollow:
            axes.plot(x, y, color=COLOURS["paper"], marker=marker, ms=2.5)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("output channels")
    axes.set_ylabel("cost of one, µs")
    _legend(axes, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return figure


def training(history: Sequence[Step]) -> Figure | None:
    """Loss, accuracy, and the number of non-zero groups on its way to the budget; None without a history."""
    if not history:
        return None
    epochs = elapsed(history)
    curves: dict[str, list[float | None]] = {
        "loss": [step.loss for step in history],
        "accuracy, %": [None if step.accuracy is None else 100 * step.accuracy for step in history],
        "non-zero groups": [step.nonzero_groups if step.budget_groups else None for step in history],
    }
    known = {title: values for title, values in curves.items() if any(value is not None for value in values)}
    figure = Figure(figsize=(WIDTH_INCHES, 0.6 + 1.5 * len(known)), layout="constrained")
    panels = [_panel(axes, grid="y") for axes in figure.subplots(len(known), sharex=True, squeeze=False).flat]
    for panel, (title, values) in zip(panels, known.items(), strict=True):
        drawn = [(epoch, value) for epoch, value in zip(epochs, values, strict=True) if value is not None]
        marker = "." if len(drawn) <= 60 else ""
        panel.plot(*zip(*drawn, strict=True), color=COLOURS["accent"], linewidth=1.5, marker=marker)
        panel.set_ylabel(title)
    budgets = [(epoch, step.budget_groups) for epoch, step in zip(epochs, history, strict=True) if step.budget_groups]
    if budgets:
        _budget(panels[-1], budgets)
    _phases(panels, epochs, [step.phase for step in history])
    panels[-1].set_xlabel("epoch")
    return figure


def elapsed(history: Sequence[Step]) -> list[float]:
    """Epochs since the start of the first phase, also where each phase counts its own."""
    finished, epochs = 0.0, []
    for before, step in zip([None, *history], history, strict=False):
        if before and (step.epoch < before.epoch or (step.epoch == before.epoch and step.phase != before.phase)):
            finished += before.epoch
        epochs.append(finished + step.epoch)
    return epochs


def svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element with colours from the page's variables and ids that begin with `name`.

    Texts are outlines, so that no name of a layer can become markup; the ids are numbered, so that the same figure
    gives the same text.
    """
    buffer = io.StringIO()
    unsaid = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=unsaid)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<style.*?</style>|<metadata.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"\n\s*", " ", text)
    for variable, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{variable})")
    found = dict.fromkeys(re.findall(r'id="([^"]+)"', text))
    numbers = {old: f"{name}-{number}" for number, old in enumerate(found)}
    return re.sub(r'(id="|url\(#|href="#)([^")]+)', lambda match: match[1] + numbers[match[2]], text)


def _panel(axes: Axes, *, grid: str) -> Axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(COLOURS["faint"])
    axes.tick_params(labelsize=SMALL, labelcolor=COLOURS["muted"], color=COLOURS["faint"])
    axes.grid(axis=grid, color=COLOURS["faint"], linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(size=NORMAL, color=COLOURS["muted"])
    return axes


def _legend(axes: Axes, **place: Any) -> None:
    legend = axes.legend(frameon=False, fontsize=NORMAL, **place)
    for text in legend.get_texts():
        text.set(color=COLOURS["ink"], parse_math=False)


def _flights(entries: Sequence[Entry]) -> list[list[Entry]]:
    """The entries of each operation at its widest input, by output width."""
    widest: dict[str, int] = {}
    for entry in entries:
        widest[entry.operation] = max(entry.inputs, widest.get(entry.operation, 0))
    flights: dict[str, list[Entry]] = {}
    for entry in sorted(entries, key=lambda entry: entry.outputs):
        if entry.inputs == widest[entry.operation]:
            flights.setdefault(entry.operation, []).append(entry)
    return list(flights.values())


def _point(axes: Axes, predicted: Interval, measured: Interval, **style: Any) -> None:
    x, y = (1e3 * interval.value for interval in (predicted, measured))
    across, along = (
        [[1e3 * (interval.value - interval.low)], [1e3 * (interval.high - interval.value)]]
        for interval in (predicted, measured)
    )
    axes.errorbar([x], [y], xerr=across, yerr=along, linestyle="", markersize=6, elinewidth=1.0, capsize=2.5, **style)


def _budget(axes: Axes, budgets: Sequence[tuple[float, int]]) -> None:
    warm = COLOURS["warm"]
    axes.plot(*zip(*budgets, strict=True), color=warm, linewidth=1.1, linestyle=DASHED, drawstyle="steps-post")
    note: dict[str, Any] = {"size": SMALL, "color": warm, "ha": "right", "va": "top", "textcoords": "offset points"}
    axes.annotate(f"budget {budgets[-1][1]:,}", budgets[-1], (0, -4), **note)
    axes.set_ylim(bottom=0)


def _phases(panels: Sequence[Axes], epochs: Sequence[float], phases: Sequence[str]) -> None:
    """A line where a phase gives way to the next, and the name of each above the first panel."""
    starts = [place for place, phase in enumerate(phases) if place == 0 or phases[place - 1] != phase]
    for start in starts:
        edge = epochs[0] if start == 0 else (epochs[start - 1] + epochs[start]) / 2
        for panel in panels if start else ():
            panel.axvline(edge, color=COLOURS["muted"], linewidth=0.8, linestyle=(0, (1, 2)))
        note: dict[str, Any] = {"size": SMALL, "color": COLOURS["muted"], "textcoords": "offset points"}
        panels[0].annotate(phases[start], (edge, 1.0), (3, 3), xycoords=("data", "axes fraction"), **note)


def _shortened(name: str, length: int = 30) -> str:
    """`name` on one line, its middle left out where it is longer than `length`, and visible in a legend."""
    plain = " ".join(name.split()).lstrip("_")
    return plain if len(plain) <= length else plain[: length // 2 - 1] + "…" + plain[-length // 2 :]
