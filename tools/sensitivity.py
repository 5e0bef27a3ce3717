"""The loss against the kept share of every width, and of every block alone: as values, and as a picture."""

import csv
import io
import math
from pathlib import Path

from matplotlib.figure import Figure

from planner import Graph, Importance
from profiles import atomic

COLUMNS = ("group", "kind", "size", "keep", "loss")
_ACROSS = 4  # panels in a row


def rows(graph: Graph, importance: Importance) -> list[dict[str, str | int | float]]:
    """Return the rise of the loss for each candidate of each width, and for each block that leaves alone."""
    found: list[dict[str, str | int | float]] = [
        {"group": name, "kind": graph.part[name].structure, "size": graph.part[name].size, "keep": keep, "loss": loss}
        for name, losses in importance.widths.items()
        for keep, loss in sorted(losses.items())
    ]
    return found + [
        {"group": name, "kind": "depth", "size": 1, "keep": 0, "loss": loss} for name, loss in importance.blocks.items()
    ]


def told(graph: Graph, importance: Importance) -> list[str]:
    """Return the groups by what half of each costs, dearest first, and the blocks by what each costs alone."""
    half = {}
    for name, losses in importance.widths.items():
        keep = min(losses, key=lambda count: abs(count - graph.part[name].size / 2))
        half[f"{name}: {keep} of {graph.part[name].size} kept"] = losses[keep]
    half |= {f"block {name} removed": loss for name, loss in importance.blocks.items()}
    return [f"{name}, loss {loss:+.4f}" for name, loss in sorted(half.items(), key=lambda item: -item[1])]


def write(graph: Graph, importance: Importance, path: Path) -> Path:
    """Write the values as CSV, and beside them the picture, whose path is returned."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows(graph, importance))
    atomic.write_text(path, text.getvalue())
    down = math.ceil(max(1, len(importance.widths)) / _ACROSS)
    figure = Figure(figsize=(3 * _ACROSS, 2 * down), layout="constrained")
    panels = figure.subplots(down, _ACROSS, squeeze=False, sharey=True).reshape(-1)
    for panel, (name, losses) in zip(panels, importance.widths.items(), strict=False):
        size = graph.part[name].size
        panel.plot([count / size for count in sorted(losses)], [losses[count] for count in sorted(losses)], marker=".")
        panel.set_title(f"{name} ({size})", fontsize=7, parse_math=False)
        panel.set_xlim(0, 1.02)
        panel.grid(alpha=0.3)
    for panel in panels[len(importance.widths) :]:
        panel.set_axis_off()
    figure.supxlabel("share of the width that is kept")
    figure.supylabel(f"rise of the loss ({importance.name})")
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=120)
    return picture
