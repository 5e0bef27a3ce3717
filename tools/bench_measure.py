"""Hold the timer against itself: a network beside itself takes as long, and the interval of the ratio contains 1.

    python tools/bench_measure.py [--runtimes onnxruntime,openvino] [--repetitions 20] [--seconds 1]

For each runtime, one dense ResNet-20 is opened as two candidates, and their ratio is measured again and again. Printed
are how often it is within 2 % of 1, how often its 95 % interval contains 1, the worst ratio, half the width of the
median interval, and how many rounds had to be repeated because something disturbed them. Exit 1 if it is within 2 % in
fewer than 19 of 20, or the interval contains 1 less often than 95 % allow (a chance of one in a thousand).
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from scipy.stats import binom

from backends import Candidate, Measurement, compare, installed, load, ratio
from tools.console import Stage
from tools.examples import cifar10

NEAR, OF_20 = 0.02, 19
CHANCE = 1e-3


def repeated(name: str, repetitions: int, seconds: float, stage: Stage) -> list[tuple[Measurement, Measurement]]:
    """Return the measurements of one network as two candidates of one runtime, again and again."""
    model, inputs, runtime = cifar10.resnet20().eval(), (torch.randn(1, 3, 32, 32),), load(name)
    with tempfile.TemporaryDirectory() as folder, stage.phase(f"{name} beside itself") as phase:
        artifact = runtime.build(model, inputs, None, Path(folder) / f"dense{runtime.SUFFIX}")
        found = []
        for seed in range(repetitions):
            a, b = (
                Candidate.of(runtime, artifact, inputs, label=label, model=model, instances=runtime.INSTANCES)
                for label in "ab"
            )
            first, second = compare([a, b], seconds=seconds, seed=seed)
            found.append((first, second))
            phase.show(seed + 1, repetitions)
    return found


def row(name: str, found: Sequence[tuple[Measurement, Measurement]]) -> tuple[list[str], bool]:
    """Return a row of the table, and whether its limits hold."""
    ratios = [ratio(a, b) for a, b in found]
    near = sum(abs(each.value - 1) <= NEAR for each in ratios)
    covered = sum(each.ci95[0] <= 1 <= each.ci95[1] for each in ratios)
    worst = max((each.value for each in ratios), key=lambda value: abs(value - 1))
    half = median((each.ci95[1] - each.ci95[0]) / 2 for each in ratios)
    again = sum(a.repeated_rounds for a, _ in found) / sum(a.rounds for a, _ in found)
    marked = sum(bool(a.remark or b.remark) for a, b in found)
    holds = near >= OF_20 / 20 * len(found) and covered >= binom.ppf(CHANCE, len(found), 0.95)
    cells = [f"{near} of {len(found)}", f"{covered} of {len(found)}", f"{worst:.3f}", f"{half:.1%}", f"{again:.0%}"]
    return [name, *cells, str(marked), "" if holds else "missed"], holds


def main(
    runtimes: Annotated[str, typer.Option(help="comma-separated")] = ",".join(installed()),
    repetitions: Annotated[int, typer.Option(min=5)] = 20,
    seconds: Annotated[float, typer.Option(help="per candidate and repetition")] = 1.0,
) -> None:
    """Print how well the timer repeats itself; exit 1 if a limit is missed."""
    torch.set_num_threads(1)
    stage, table, every = Stage(Console(stderr=True)), Table(), True
    for title in ("runtime", "within 2 %", "interval holds 1", "worst ratio", "half width", "repeated", "marked", ""):
        table.add_column(title)
    for name in runtimes.split(","):
        cells, holds = row(name, repeated(name, repetitions, seconds, stage))
        table.add_row(*cells)
        every &= holds
    Console().print(table)
    sys.exit(0 if every else 1)


if __name__ == "__main__":
    typer.run(main)
