"""The rows of WGSEF (Refael et al. 2024): networks trained from scratch to a group sparsity that is given.

    python -m tools.evidence.wgsef --cifar10 FOLDER --fashion-mnist FOLDER --epochs 10 [--examples 10000]

A group is an output channel, with all that is tied to it. Every width has a pool of its own in which the given share of
the groups is to be zero at the end; of a sparsity of 0 nothing is, which is the row to compare with. The level is
reached when exactly as many groups are zero as asked. Schedules are much shorter than the paper's: a row says how many
epochs on how many images it had. The test images decide nothing.

A row goes into evidence/wgsef.json when its run ends, and is not run again; a run that is broken off goes on.
"""

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from torch import nn

import planner
from planner import Filter, Plan, Recipe
from profiles.errors import EspalierError
from tools.batches import Data
from tools.console import Stage
from tools.evidence.record import FOLDER, Row, add, read
from tools.evidence.runs import RUNTIMES, Timer, part, tested, trained_, variant
from tools.examples import cifar10, fashion_mnist, small_images
from tools.given import given
from tools.targets import DENSE

NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "vgg16": small_images.vgg16,
    "resnet18": small_images.resnet18,
    "mobilenet_v1": small_images.mobilenet_v1,
}
SETS: dict[str, tuple[str, Callable[[], Data]]] = {
    "cifar10": (cifar10.FOLDER, cifar10.data),
    "fashion_mnist": (fashion_mnist.FOLDER, fashion_mnist.data),
}
KEY = ("network", "data", "sparsity", "form", "epochs", "examples", "seed")


@dataclass(frozen=True)
class Run:
    """One row to be."""

    network: str
    data: str
    sparsity: float
    debiased: bool
    recipe: Recipe
    examples: int
    seed: int

    @property
    def about(self) -> Row:
        """What the row is found by."""
        form = "none" if not self.sparsity else "de-biased" if self.debiased else "convex"
        values = (self.network, self.data, self.sparsity, form, self.recipe.epochs, self.examples, self.seed)
        return dict(zip(KEY, values, strict=True))

    @property
    def folder(self) -> str:
        """Where its files lie."""
        return "-".join(map(str, self.about.values()))


def plan_of(model: nn.Module, data: Data, run: Run) -> Plan:
    """Return the plan that keeps the same share of every width, at least one channel."""
    graph = planner.trace(model.eval(), (next(iter(data.test))[0][:1],))
    keep = {width.name: max(1, width.size - round(run.sparsity * width.size)) for width in graph.cuttable}
    return given(graph, keep).model_copy(update={"debiased": run.debiased})


def zeros(plan: Plan, model: nn.Module) -> tuple[int, int, int]:
    """Return how many groups the plan's widths have, how many of them are to be zero, and how many are."""
    graph = plan.graph(model)
    norms = planner.group([Filter(graph.width[own.name]) for own in plan.widths], model).norms(
        dict(model.named_parameters())
    )
    return len(norms), sum(own.dense - own.keep for own in plan.widths), int((norms == 0).sum())


def row(run: Run, data: Data, timer: Timer) -> Row:
    """Train, rebuild, test and time."""
    channels = data.train.x.shape[1]
    model = NETWORKS[run.network](channels)
    plan = plan_of(model, data, run)
    checkpoint = timer.folder / run.folder / "training.safetensors"
    small = trained_(model, plan if run.sparsity else None, data, run.recipe, checkpoint=checkpoint, stage=timer.stage)
    test = tested(model, small, data)
    inputs = (next(iter(data.test))[0][:1],)
    models = [variant(DENSE, NETWORKS[run.network](channels), inputs), variant("rebuilt", small, inputs, plan)]
    speed = timer.speeds(run.folder, models, inputs)["rebuilt"] if run.sparsity else {}
    groups, asked, zero = zeros(plan, model)
    return {
        **run.about,
        "lr": run.recipe.lr,
        "groups": groups,
        "groups_asked": asked,
        "groups_zero": zero,
        "level_reached": zero == asked,
        "before_cut_accuracy": 1 - test.before_cut,
        "accuracy": 1 - test.error,
        "images_changed": test.changed,
        "compression": _parameters(model) / _parameters(small),
        "macs_speedup": models[0].macs / models[1].macs,
        "speed": speed,
    }


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass
class Sets:
    """The data sets, read when a run needs them, with a part of their training images."""

    examples: int | None
    seed: int
    read: dict[str, Data] = field(default_factory=dict)

    def of(self, name: str) -> Data:
        """Return a data set."""
        if name not in self.read:
            self.read[name] = part(SETS[name][1](), self.examples, seed=self.seed)
        return self.read[name]


def listed(names: str, known: Collection[str]) -> list[str]:
    """Return names separated by commas; raises EspalierError for an unknown one."""
    found = names.split(",")
    if unknown := [name for name in found if name not in known]:
        raise EspalierError(f"{unknown[0]!r} is not known; there are {', '.join(known)}")
    return found


def shares(sparsities: str) -> list[float]:
    """Return sparsities separated by commas; raises EspalierError for what is none."""
    found = [float(each) for each in sparsities.split(",")]
    if wrong := [share for share in found if not 0 <= share < 1]:
        raise EspalierError(f"the sparsity {wrong[0]} is no share from 0 to below 1")
    return found


def known(table: Path) -> list[Row]:
    """Return what tells the rows of a table that need not be there from each other."""
    if not (table / "wgsef.json").exists():
        return []
    return [{key: row[key] for key in KEY} for row in read("wgsef", table).rows]


def main(
    networks: Annotated[str, typer.Option(help="comma-separated")] = ",".join(NETWORKS),
    data_sets: Annotated[str, typer.Option(help="comma-separated")] = ",".join(SETS),
    sparsities: Annotated[str, typer.Option(help="shares of the groups, comma-separated")] = "0,0.5,0.6,0.7,0.8,0.9",
    cifar10_folder: Annotated[Path | None, typer.Option("--cifar10", help="where CIFAR-10 lies")] = None,
    fashion_folder: Annotated[Path | None, typer.Option("--fashion-mnist", help="where Fashion-MNIST lies")] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    lr: Annotated[float, typer.Option(min=0)] = 0.05,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    examples: Annotated[int | None, typer.Option(min=1, help="training images [default: all]")] = None,
    convex: Annotated[bool, typer.Option("--convex", help="the paper's own form, not the de-biased one")] = False,
    runtimes: Annotated[str, typer.Option(help="comma-separated")] = RUNTIMES,
    seconds: Annotated[float, typer.Option(min=0.01, help="of measuring per model and runtime")] = 2.0,
    out: Annotated[Path, typer.Option(help="where weights and files are kept")] = Path("evidence-wgsef"),
    table: Annotated[Path, typer.Option(help="the folder of the table")] = FOLDER,
) -> None:
    """Run what is missing from the table."""
    for name, folder in (("cifar10", cifar10_folder), ("fashion_mnist", fashion_folder)):
        if folder is not None:
            os.environ[SETS[name][0]] = str(folder)
    timer = Timer(out, runtimes.split(","), seconds, Stage(Console(stderr=True)))
    sets, recipe = Sets(examples, seed), Recipe(epochs, lr=lr, bfloat16=True)
    for name, network, share in product(listed(data_sets, SETS), listed(networks, NETWORKS), shares(sparsities)):
        data = sets.of(name)
        run = Run(network, name, share, not convex, recipe, len(data.train.x), seed)
        if run.about in known(table):
            timer.stage.say(f"{run.folder} is in the table")
        else:
            add("wgsef", [row(run, data, timer)], command="python -m tools.evidence.wgsef", key=KEY, folder=table)


if __name__ == "__main__":
    typer.run(main)
