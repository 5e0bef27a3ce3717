"""The budget is met: plans at five budgets for each network and runtime, rebuilt and measured.

    python -m tools.evidence.budget [--networks resnet20] [--runtimes onnxruntime,openvino] [--log FILE] [--plans 40]

What `tools/bench_planner.py --truth FILE` measures, see tools/truth.py; here the rows go into evidence/budget.json.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from tools import truth
from tools.evidence.record import add


def main(
    networks: Annotated[str, typer.Option(help="comma-separated [default: all]")] = "",
    runtimes: Annotated[str, typer.Option(help="comma-separated")] = "onnxruntime,openvino,executorch",
    log: Annotated[Path, typer.Option(help="what is measured, and gone on with")] = Path("budget.log.json"),
    plans: Annotated[int, typer.Option(min=1, help="how many more to measure in this call")] = 40,
) -> None:
    """Measure plans, keep the rows; exit 1 if the limits do not hold."""
    torch.set_num_threads(1)
    holds = truth.run(log, networks=networks, runtimes=runtimes, plans=plans, console=Console(stderr=True))
    rows = truth.rows(json.loads(log.read_text()))
    add("budget", rows, command="python -m tools.evidence.budget", key=("network", "runtime", "budget"))
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    typer.run(main)
