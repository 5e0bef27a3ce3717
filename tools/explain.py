"""What a model's widths and blocks are tied to, and what a plan decided, in words and rows."""

import difflib
from typing import Any

from rich.table import Table

from planner import Graph, Plan
from planner.structures import of_width
from profiles.errors import PlanError


def listed(graph: Graph) -> list[dict[str, Any]]:
    """Return one row per width and per block."""
    widths = [
        {
            "name": w.name,
            "kind": w.structure,
            "size": w.size,
            "tied": w.makers[1:],
            "block": w.block,
            "frozen": w.frozen,
            "lossless": w.lossy is None,
        }
        for w in graph.widths
    ]
    blocks = [
        {"name": b.name, "kind": "block", "size": 1, "tied": sorted(b.modules), "block": None, "frozen": b.frozen}
        for b in graph.blocks
    ]
    return [*widths, *blocks]


def explained(graph: Graph, name: str) -> dict[str, Any]:
    """Return what is tied to the width or block `name`, and why it cannot be cut if so, as data and as lines."""
    told: list[str] = []
    if width := graph.width.get(name):
        told.append(f"{width.structure} {name}: {width.size} groups made by {', '.join(width.makers)}")
        told.append(f"  the rebuild makes of it: {of_width(width).rebuilt_as}")
        told += [f"  tied by {where}" for where in width.ties]
        if width.lossy:
            told.append(f"  cutting it changes the output: {width.lossy}")
        told.append(
            f"it cannot be cut: {width.frozen}" if width.frozen else "zeroing a channel means zeroing its slice of"
        )
        for piece in width.slices:
            role = "zeroed" if piece.penalised else "goes with it"
            told.append(f"  {piece.tensor}, axis {piece.axis} ({role})")
    if block := graph.block.get(name):
        told.append(f"block {name} ({block.where}): its body is {', '.join(sorted(block.modules))}")
        told.append(
            f"it cannot leave: {block.frozen}" if block.frozen else f"it leaves when {', '.join(block.last)} are zero"
        )
    if not told:
        known = [*graph.width, *graph.block]
        near = difflib.get_close_matches(name, known, n=3) or known[:5]
        raise PlanError(f"no width or block is called {name!r}; near it: {', '.join(near)}")
    return {"name": name, "told": told}


def plan_table(plan: Plan) -> Table:
    """Return what a plan keeps, for the terminal."""
    table = Table("width", "dense", "keep", "chosen from", box=None, title=f"plan for {plan.profile}")
    for width in plan.widths:
        keep = str(width.keep) if width.keep else "block removed"
        table.add_row(width.name, str(width.dense), keep, " ".join(map(str, width.considered)))
    p = plan.predicted
    seconds = f", {p.latency_s * 1e3:.3f} ms of {p.dense_s * 1e3:.3f} ms" if p.latency_s and p.dense_s else ""
    remedy = "; run calibrate for times" if p.basis == "documented" else ""
    table.caption = (
        f"predicted latency {p.fraction:.3f} ({p.low:.3f} to {p.high:.3f}) of dense{seconds} ({p.trust}{remedy}); "
        f"MACs {p.macs / p.dense_macs:.3f} of dense; solved to gap {plan.proof.gap:g}"
    )
    return table
