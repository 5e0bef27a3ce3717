"""Measure the proximal step on a billion weights: time per weight against a small model, and peak of memory.

    python tools/bench_large.py [--weights 1000000000] [--json]

Layers of 4096 inputs in bfloat16, a group per filter and a pool per layer, on one thread. Times are CPU times, the
least of several steps, so that a busy machine does not show. Exit 1 if a limit is missed.
"""

import json
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from planner.axes import Slice
from planner.pools import Share, pooled
from planner.prox import Proximal, Schedule
from planner.structures import Filter
from planner.widths import Width

INPUTS = FILTERS = 4096  # of a layer; the last may have fewer filters
SMALL = 10**7
MAX_TIME_RATIO = 1.5  # of the time per weight
MAX_PEAK_GIB = 24.0
_STEPS = 3


@dataclass(frozen=True)
class Row:
    """One measured model."""

    weights: int
    groups: int
    shrink_cpu_s: float  # norms, root search, scaling
    hold_cpu_s: float  # scaling on a fixed support
    peak_gib: float  # of the whole process, weights included
    nonzero: int
    budget: int

    def per_weight_ns(self, cpu_s: float) -> float:
        """Divide by the number of weights."""
        return cpu_s / self.weights * 1e9


def layers(weights: int) -> nn.ParameterDict:
    """Return about as many bfloat16 weights, in layers."""
    block = torch.randn(FILTERS, INPUTS, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    rows = max(1, round(weights / INPUTS))
    sizes = [min(FILTERS, rows - first) for first in range(0, rows, FILTERS)]
    return nn.ParameterDict({f"layer{i}": nn.Parameter(block[:size].clone()) for i, size in enumerate(sizes)})


def shares(model: nn.ParameterDict) -> Iterator[Share]:
    """Yield a pool for each layer: half of its filters may remain."""
    for name, weight in model.items():
        piece = Slice(name, 0, np.arange(len(weight)), True)
        width = Width(name, len(weight), (piece,), None, (name,), None)
        yield Share.of(Filter(width), len(weight) // 2)


def measured(weights: int) -> Row:
    """Train nothing, but take every proximal step of a schedule."""
    model = layers(weights)
    proximal = Proximal(pooled(list(shares(model)), model), model, Schedule(_STEPS + 1), debiased=True)
    shrink = min(_cpu_s(proximal) for _ in range(_STEPS))
    proximal.step()
    assert proximal.frozen
    hold = min(_cpu_s(proximal) for _ in range(_STEPS))
    count = sum(weight.numel() for weight in model.values())
    groups = sum(len(weight) for weight in model.values())
    return Row(count, groups, shrink, hold, _peak_gib(), proximal.nonzero(), proximal.budget_groups)


def _cpu_s(proximal: Proximal) -> float:
    start = time.process_time()
    proximal.step()
    return time.process_time() - start


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def verdicts(small: Row, large: Row) -> Iterator[tuple[str, float, float]]:
    """Yield (what, value, limit)."""
    yield (
        "time per weight, while shrinking",
        large.shrink_cpu_s / large.weights / (small.shrink_cpu_s / small.weights),
        MAX_TIME_RATIO,
    )
    yield (
        "time per weight, on a fixed support",
        large.hold_cpu_s / large.weights / (small.hold_cpu_s / small.weights),
        MAX_TIME_RATIO,
    )
    yield "peak of memory, GiB", large.peak_gib, MAX_PEAK_GIB
    yield "groups above the budget", float(large.nonzero - large.budget), 0.0


def _table(rows: list[Row]) -> Table:
    table = Table("weights", "groups", "shrinking", "per weight", "holding", "per weight", "peak", title="bfloat16")
    for row in rows:
        times = [(f"{s * 1e3:,.1f} ms", f"{row.per_weight_ns(s):.3f} ns") for s in (row.shrink_cpu_s, row.hold_cpu_s)]
        table.add_row(f"{row.weights:,}", f"{row.groups:,}", *times[0], *times[1], f"{row.peak_gib:.2f} GiB")
    return table


def main(
    weights: Annotated[int, typer.Option(min=SMALL, help="the weights of the large model")] = 10**9,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Measure the proximal step."""
    torch.set_num_threads(1)
    rows = [measured(SMALL), measured(weights)]
    judged = list(verdicts(*rows))
    if as_json:
        found = [{"name": name, "value": value, "limit": limit} for name, value, limit in judged]
        print(json.dumps({"torch": torch.__version__, "rows": [asdict(row) for row in rows], "verdicts": found}))
    else:
        console = Console()
        console.print(_table(rows))
        for name, value, limit in judged:
            sign = "within" if value <= limit else "[red]above[/red]"
            console.print(f"{name}: {value:.2f}, {sign} the limit {limit:g}")
    sys.exit(0 if all(value <= limit for _, value, limit in judged) else 1)


if __name__ == "__main__":
    typer.run(main)
