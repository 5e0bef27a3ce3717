"""Measure the envelope: CPU time per group and extra memory of the root search, up to 1e8 groups.

    python tools/bench_envelope.py [--max-groups 100000000] [--json]

One thread, float32 norms. Times are CPU times, the least of several runs, so that a busy machine does not show. Exit 1
if a limit is missed.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from planner import envelope

MAX_TIME_RATIO = 1.5  # of the time per group, 1e8 groups against 1e6
MAX_EXTRA_VECTORS = 4.0  # vectors of as many float32 as there are groups; the result is one of them
_SMALLEST_FOR_MEMORY = 10**7  # below it the chunks, of a fixed size, outweigh the vectors


@dataclass(frozen=True)
class Row:
    """One measured call."""

    name: str
    groups: int
    cpu_s: float
    extra_vectors: float | None

    @property
    def per_group_ns(self) -> float:
        """CPU time divided by groups."""
        return self.cpu_s / self.groups * 1e9


@dataclass(frozen=True)
class Verdict:
    """A figure that has a limit."""

    name: str
    value: float
    limit: float

    @property
    def holds(self) -> bool:
        """Whether the figure is within its limit."""
        return self.value <= self.limit


def measured(name: str, groups: int, call: Callable[[], Tensor]) -> Row:
    """Time a call and take its peak of memory; the result counts as extra memory."""
    before = _reset_peak_bytes()
    result = call()
    peak = None if before is None else _status_bytes("VmHWM") - before
    del result
    best = min(_cpu_s(call) for _ in range(max(3, min(30, 10**7 // groups))))
    return Row(name, groups, best, peak / (4 * groups) if peak is not None and groups >= _SMALLEST_FOR_MEMORY else None)


def _cpu_s(call: Callable[[], Tensor]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def _reset_peak_bytes() -> int | None:
    """Make the kernel forget the peak of memory; return the present use, or None where that cannot be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _norms(groups: int, seed: int = 0) -> Tensor:
    return torch.empty(groups).log_normal_(generator=torch.Generator().manual_seed(seed))


def _sizes(max_groups: int) -> list[int]:
    return [10**power for power in range(4, 9) if 10**power <= max_groups]


def prox(max_groups: int) -> Iterator[Row]:
    """The prox of one pool, three tenths of which may remain."""
    for groups in _sizes(max_groups):
        norms = _norms(groups)
        yield measured("prox", groups, partial(envelope.scale, norms, 0.01, 1.0, 1.0, 0.3 * groups))


def debiased_prox(max_groups: int) -> Iterator[Row]:
    """The de-biased prox of the same pool."""
    for groups in _sizes(max_groups):
        norms = _norms(groups)
        call = partial(envelope.scale, norms, 0.01, 1.0, 1.0, 0.3 * groups, debiased=True)
        yield measured("de-biased prox", groups, call)


def prox_with_costs(max_groups: int) -> Iterator[Row]:
    """The prox of one pool whose groups differ in weight and cost."""
    for groups in _sizes(max_groups):
        norms, a, d = (_norms(groups, seed) for seed in range(3))
        k = 0.3 * float(d.sum())
        yield measured("prox with a, d", groups, partial(envelope.scale, norms, 0.01, a, d, k))


def prox_of_fours(max_groups: int) -> Iterator[Row]:
    """The prox of pools of four of which two may remain, as in 2:4 sparsity; a million weights."""
    groups = min(10**6, max_groups)
    norms, pool = _norms(groups), torch.arange(groups) // 4
    k = torch.full((groups // 4,), 2.0)
    yield measured("prox, pools of 4", groups, partial(envelope.scale, norms, 0.01, 1.0, 1.0, k, pool=pool))


def value(max_groups: int) -> Iterator[Row]:
    """The value of one pool."""
    for groups in _sizes(max_groups):
        norms = _norms(groups)
        yield measured("value", groups, partial(envelope.value, norms, 1.0, 1.0, 0.3 * groups))


ROWS: list[Callable[[int], Iterator[Row]]] = [prox, debiased_prox, prox_with_costs, prox_of_fours, value]


def verdicts(rows: list[Row]) -> Iterator[Verdict]:
    """Hold the rows of one pool against the limits."""
    times = {(row.name, row.groups): row.per_group_ns for row in rows}
    for name in dict.fromkeys(row.name for row in rows):
        if (name, 10**6) in times and (name, 10**8) in times:
            yield Verdict(
                f"{name}: time per group, 1e8 against 1e6", times[name, 10**8] / times[name, 10**6], MAX_TIME_RATIO
            )
    for row in rows:
        if row.extra_vectors is not None and row.name != "prox, pools of 4":
            yield Verdict(f"{row.name}: extra vectors, {row.groups:.0e} groups", row.extra_vectors, MAX_EXTRA_VECTORS)


def _table(rows: list[Row]) -> Table:
    table = Table("call", "groups", "CPU time", "per group", "extra memory", title="WGSEF on one thread, float32")
    for row in rows:
        memory = "" if row.extra_vectors is None else f"{row.extra_vectors:.2f} vectors"
        table.add_row(row.name, f"{row.groups:,}", f"{row.cpu_s * 1e3:,.2f} ms", f"{row.per_group_ns:.1f} ns", memory)
    return table


def main(
    max_groups: Annotated[int, typer.Option(min=10**4, help="the most groups to measure")] = 10**8,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Measure the envelope."""
    torch.set_num_threads(1)
    progress = Console(stderr=True)
    rows: list[Row] = []
    for measure in ROWS:
        for row in measure(max_groups):
            rows.append(row)
            progress.print(f"{row.name}, {row.groups:,} groups: {row.per_group_ns:.1f} ns per group")
    judged = list(verdicts(rows))
    if as_json:
        found = {
            "torch": torch.__version__,
            "threads": 1,
            "rows": [asdict(row) for row in rows],
            "verdicts": [{**asdict(verdict), "holds": verdict.holds} for verdict in judged],
        }
        print(json.dumps(found, indent=2))
    else:
        console = Console()
        console.print(_table(rows))
        for verdict in judged:
            sign = "within" if verdict.holds else "[red]above[/red]"
            console.print(f"{verdict.name}: {verdict.value:.2f}, {sign} the limit {verdict.limit}")
    sys.exit(0 if all(verdict.holds for verdict in judged) else 1)


if __name__ == "__main__":
    typer.run(main)
