"""Many budgets in one call: the Pareto front of latency and loss, as a table of values and a picture."""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from planner import Importance, Limits, Plan, Problem
from profiles import atomic
from profiles.errors import EspalierError, PlanError

POINTS = 13
COLUMNS = ("budget", "latency_of_dense", "latency_s", "loss", "bound", "macs_of_dense", "blocks_removed", "solved_s")


def budgets(text: str) -> list[float]:
    """Return the fractions written as LOW:HIGH or LOW:HIGH:COUNT."""
    try:
        parts = [float(part) for part in text.split(":")]
        low, high, count = (*parts, POINTS) if len(parts) == 2 else parts
    except ValueError:
        low = high = count = 0.0
    if not 0 < low < high <= 1 or count < 2 or count != int(count):
        raise EspalierError(f"--sweep {text!r} is not a range of fractions; write LOW:HIGH or LOW:HIGH:COUNT, 0.3:0.9")
    return [round(float(value), 6) for value in np.linspace(low, high, int(count))]


def front(
    posed: Problem,
    wanted: Sequence[float],
    limits: Limits,
    importance: Importance | None,
    *,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> list[tuple[float, Plan]]:
    """Return the plan of each budget that can be met; raises PlanError if none can."""
    found, refused = [], None
    for index, budget in enumerate(wanted):
        try:
            found.append((budget, posed.solve(budget, limits, importance=importance)))
        except PlanError as error:
            refused = error
        progress(f"budget {budget:g}", index + 1, len(wanted))
    if refused is not None and not found:
        raise refused
    return found


def rows(plans: Sequence[tuple[float, Plan]]) -> list[dict[str, float | int | None]]:
    """Return what each plan gives and costs."""
    return [
        {
            "budget": budget,
            "latency_of_dense": round(plan.predicted.fraction, 6),
            "latency_s": plan.predicted.latency_s,
            "loss": plan.proof.objective,
            "bound": plan.proof.bound,
            "macs_of_dense": round(plan.predicted.macs / plan.predicted.dense_macs, 6),
            "blocks_removed": sum(block.removed for block in plan.blocks),
            "solved_s": plan.proof.solved_s,
        }
        for budget, plan in plans
    ]


def write(plans: Sequence[tuple[float, Plan]], stem: Path) -> tuple[Path, Path]:
    """Write the front beside `stem` as CSV and as a picture."""
    values, picture = stem.with_suffix(".sweep.csv"), stem.with_suffix(".sweep.png")
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows(plans))
    atomic.write_text(values, text.getvalue())
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    points = [(plan.predicted.fraction, plan.proof.objective) for _, plan in plans]
    axes.plot(*zip(*points, strict=True), marker="o")
    axes.set_xlabel(f"predicted latency of dense ({plans[0][1].predicted.basis})")
    axes.set_ylabel(f"rise of the loss ({plans[0][1].importance})")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=150)
    return values, picture
