"""What a model's widths and blocks are tied to, and what a plan decided, in words and rows."""

import difflib
from typing import Any

from rich.table import Table

from planner import Graph, Plan
from planner.spec import TrimPlan, WidthPlan
from planner.structures import of_width
from profiles.errors import PlanError

KEPT = {"channel": "inputs", "kernel": "positions of its kernel", "nm": "weights that follow each other"}


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


def reasons(plan: Plan, name: str) -> list[str]:
    """Return why a plan keeps what it keeps of a width, a block or a layer; raises PlanError if it names none."""
    width = next((own for own in plan.widths if own.name == name), None)
    block = next((own for own in plan.blocks if own.name == name), None)
    trims = [own for own in plan.trims if name in (own.layer, own.name)]
    if width is None and block is None and not trims:
        known = [*(own.name for own in plan.widths), *(own.name for own in plan.blocks)]
        known += dict.fromkeys(own.layer for own in plan.trims)
        near = difflib.get_close_matches(name, known, n=3) or known[:5]
        raise PlanError(f"the plan has no width or block {name!r}; near it: {', '.join(near)}")
    told = [f"block {name} {'leaves' if block.removed else 'stays'}"] if block else []
    told += _of_width(plan, width) if width else []
    return told + [line for trim in trims for line in _of_trim(plan, trim)]


def _of_width(plan: Plan, width: WidthPlan) -> list[str]:
    kept = f"keeps {width.keep} of {width.dense}" if width.keep else "leaves with the block around it"
    told = [f"{width.structure} {width.name} {kept}; {plan.profile} computes it in steps of {width.quantum}"]
    if next_ := _next_useful(width):
        told.append(next_)
    return told + _considered(plan, width)


def _of_trim(plan: Plan, trim: TrimPlan) -> list[str]:
    return [f"{trim.name} keeps {trim.keep} of {trim.dense} {KEPT[trim.structure]}", *_considered(plan, trim)]


def _considered(plan: Plan, part: WidthPlan | TrimPlan) -> list[str]:
    told = []
    for count, fraction, loss in zip(part.considered, part.fractions, part.losses, strict=True):
        mark = " <- kept" if count == part.keep else ""
        told.append(f"  {count:>5}: latency {fraction:.3f} of dense, loss {loss:+.4g} ({plan.importance}){mark}")
    return told


def _next_useful(width: WidthPlan) -> str | None:
    """Return which width is the next useful one below what is kept, None where every width is a step."""
    below = max((count for count in width.considered if count < (width.keep or width.dense)), default=None)
    if below is None:
        return None
    top = min(width.dense, -(-(below + 1) // width.quantum) * width.quantum)
    return f"{below + 1} costs as much as {top}; {below} is the next useful width" if top > below + 1 else None


def plan_table(plan: Plan) -> Table:
    """Return what a plan keeps, for the terminal."""
    table = Table("width", "dense", "keep", "chosen from", box=None, title=f"plan for {plan.profile}")
    for width in plan.widths:
        keep = str(width.keep) if width.keep else "block removed"
        table.add_row(width.name, str(width.dense), keep, " ".join(map(str, width.considered)))
    for trim in plan.trims:
        if trim.keep < trim.dense:
            table.add_row(trim.name, str(trim.dense), str(trim.keep), " ".join(map(str, trim.considered)))
    p = plan.predicted
    seconds = f", {p.latency_s * 1e3:.3f} ms of {p.dense_s * 1e3:.3f} ms" if p.latency_s and p.dense_s else ""
    remedy = "; run calibrate for times" if p.basis == "documented" else ""
    table.caption = (
        f"predicted latency {p.fraction:.3f} ({p.low:.3f} to {p.high:.3f}) of dense{seconds} ({p.trust}{remedy}); "
        f"MACs {p.macs / p.dense_macs:.3f} of dense; solved to gap {plan.proof.gap:g} in {plan.proof.solved_s:.1f} s"
    )
    for own in plan.limits:
        if own.name != plan.profile:
            table.caption += f"\n{own.name}: {own.planned:.4g} of at most {own.budget:.4g} {own.unit}"
    for note in plan.notes:
        table.caption += f"\nnote: {note}"
    return table
