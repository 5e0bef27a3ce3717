"""The rows of SSL (Wen et al. 2016): layers of ResNet-20 learned on CIFAR-10, and AlexNet at published sparsities.

    python -m tools.evidence.ssl                                                           # AlexNet, without training
    python -m tools.evidence.ssl --data FOLDER --weights resnet20.safetensors --epochs 30  # ResNet-20

See tools/evidence/depth.py and tools/evidence/sparse_alexnet.py for what is measured and what each number includes.
Rows go into evidence/ssl.json as they are found; files are kept in --out, and a later call goes on from there.
"""

import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import profiles
from planner import Recipe
from profiles.errors import EspalierError
from tools.console import Stage
from tools.evidence import depth, sparse_alexnet
from tools.evidence.record import FOLDER, Row, add
from tools.evidence.runs import RUNTIMES, Timer, part
from tools.examples import cifar10


def main(
    data: Annotated[Path | None, typer.Option(help="folder of CIFAR-10, else AlexNet is measured")] = None,
    weights: Annotated[Path | None, typer.Option(help="safetensors of ResNet-20, with --data")] = None,
    layers: Annotated[str, typer.Option(help="how many to leave, comma-separated")] = "20,18,14",
    epochs: Annotated[int, typer.Option(min=1)] = 30,
    lr: Annotated[float, typer.Option(min=0)] = 0.04,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    examples: Annotated[int | None, typer.Option(min=1, help="training images [default: all]")] = None,
    runtimes: Annotated[str, typer.Option(help="comma-separated")] = RUNTIMES,
    seconds: Annotated[float, typer.Option(min=0.01, help="of measuring per model and runtime")] = 2.0,
    out: Annotated[Path, typer.Option(help="where weights and files are kept")] = Path("evidence-ssl"),
    table: Annotated[Path, typer.Option(help="the folder of the table")] = FOLDER,
) -> None:
    """Train, prune, rebuild and measure; keep the rows."""
    timer = Timer(out, runtimes.split(","), seconds, Stage(Console(stderr=True)))
    for row in _rows(timer, data, weights, [int(each) for each in layers.split(",")], (epochs, lr, seed, examples)):
        add("ssl", [row], command="python -m tools.evidence.ssl", key=("part", "case", "how"), folder=table)


def _rows(
    timer: Timer, data: Path | None, weights: Path | None, depths: list[int], run: tuple[int, float, int, int | None]
) -> Iterator[Row]:
    if data is None:
        profile = profiles.load("x86_64_v4.onnxruntime.fp32")  # asked whether a structure pays, and overruled
        return chain(sparse_alexnet.layers(timer), sparse_alexnet.networks(timer, profile))
    if weights is None:
        raise EspalierError("--data trains ResNet-20 from given weights; give --weights")
    os.environ[cifar10.FOLDER] = str(data)
    epochs, lr, seed, examples = run
    case = depth.Case(part(cifar10.data(), examples, seed=seed), weights, Recipe(epochs, lr=lr, bfloat16=True))
    return depth.rows(case, depths, timer)


if __name__ == "__main__":
    typer.run(main)
